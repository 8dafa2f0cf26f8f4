"""A store to fail at: moto's S3 behind a proxy that notes each request and can refuse, hold up or change it."""

import http.client
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import unquote

import pytest

KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_METADATA_ENDPOINT": "http://127.0.0.1:9",  # where nobody answers
}
Rule = Callable[[str, str], int | None]  # of a method and a path: the status to answer instead, 0 for none at all

ERROR = b"<Error><Code>%s</Code><Message>the test says so</Message></Error>"
CODES = {403: b"AccessDenied", 501: b"NotImplemented", 503: b"SlowDown"}


class Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.port = port  # of the server behind
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.s3: Any = None  # a client that asks the server itself
        self.reset()

    def reset(self) -> None:
        self.seen: list[tuple[str, str]] = []
        self.rule: Rule = lambda method, path: None
        self.drop = ""  # a header that does not come through
        self.refuse = ""  # one that is answered with 501

    def puts(self, ending: str = ".parquet") -> list[str]:
        """Names of what was put, in order."""
        return [path.rpartition("/")[2] for method, path in self.seen if method == "PUT" and path.endswith(ending)]

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """What is there, by its name below the prefix."""
        found = self.s3.list_objects_v2(Bucket="out", Prefix=prefix).get("Contents", [])
        bodies = {item["Key"]: self.s3.get_object(Bucket="out", Key=item["Key"])["Body"] for item in found}
        return {key.removeprefix(prefix): body.read() for key, body in bodies.items()}

    def put(self, key: str, data: bytes) -> None:
        self.s3.put_object(Bucket="out", Key=key, Body=data)

    def clear(self) -> None:
        for key in self.objects():
            self.s3.delete_object(Bucket="out", Key=key)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is killed is not news."""


class _Handler(BaseHTTPRequestHandler):
    server: Proxy
    own: ClassVar[set[str]] = {"connection", "transfer-encoding", "content-length", "server", "date"}

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(self.path)
        status = 501 if self.server.refuse in self.headers else self.server.rule(self.command, path)
        self.server.seen.append((self.command, path))
        if status == 0:
            self.close_connection = True
        elif status is not None:
            self._answer(status, [], ERROR % CODES[status])
        else:
            self._forward(body)

    def _forward(self, body: bytes) -> None:
        behind = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=30)
        headers = {key: value for key, value in self.headers.items() if key.lower() != self.server.drop}
        behind.request(self.command, self.path, body, headers)
        with behind.getresponse() as answer:
            data = answer.read()
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        self._answer(answer.status, answer.getheaders(), data, length)
        behind.close()

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, length: str | None = None) -> None:
        self.send_response(status)
        for key, value in headers:
            if key.lower() not in self.own:
                self.send_header(key, value)
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

    def log_message(self, *arguments: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[Proxy]:
    """A store with an empty bucket `out`, its keys and address in the environment, and what stands before it."""
    from boto3 import client
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = Proxy(server.get_host_and_port()[1])
    thread = threading.Thread(target=proxy.serve_forever, args=(0.05,))
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in (KEYS | {"AWS_ENDPOINT_URL": proxy.url}).items():
            patch.setenv(name, value)
        proxy.s3 = client("s3", endpoint_url=f"http://127.0.0.1:{proxy.port}")
        proxy.s3.create_bucket(Bucket="out")
        proxy.clear()  # moto's objects are this process's: those of a server before, too
        try:
            yield proxy
        finally:
            proxy.s3.close()
            proxy.shutdown()
            thread.join()
            proxy.server_close()
            server.stop()
