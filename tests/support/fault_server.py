"""An HTTP server on the loopback interface that serves files, with the faults of real servers in a given order.

with FaultServer({"/a": data}) as server:
    server.faults["/a"] = [drop(after=100), status(503), good]   # then good replies
    server.url("/a"), server.requests["/a"]
"""

import hashlib
import socket
import threading
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any


@dataclass
class Reply:
    """The answer to one request; a fault changes some of its fields."""

    status: int
    body: bytes
    headers: dict[str, str]
    send: int | None = None  # close the connection after this many bytes of the body
    stall: bool = False  # leave the connection open without another byte
    reset: bool = False  # close the connection by RST
    chunked: bool = False
    drip: float = 0.0  # seconds between bytes


Fault = Callable[[Reply, "Asked"], Reply]


@dataclass
class Asked:
    """One request: its headers, and the complete file."""

    path: str
    headers: dict[str, str]
    data: bytes
    extra: dict[str, Any] = field(default_factory=dict)


def good(reply: Reply, asked: Asked) -> Reply:
    return reply


def drop(after: int, reset: bool = False) -> Fault:
    """Close the connection after `after` bytes of the body."""
    return lambda reply, asked: _with(reply, send=after, reset=reset)


def stall(after: int) -> Fault:
    """Send `after` bytes of the body and then nothing more."""
    return lambda reply, asked: _with(reply, send=after, stall=True)


def drip(seconds: float) -> Fault:
    """Send a byte at a time."""
    return lambda reply, asked: _with(reply, drip=seconds)


def status(code: int, **headers: str) -> Fault:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda reply, asked: Reply(code, b"no", {"Content-Length": "2"} | named)


def redirect(location: str) -> Fault:
    return lambda reply, asked: Reply(302, b"", {"Content-Length": "0", "Location": location})


def ignore_range(reply: Reply, asked: Asked) -> Reply:
    """Answer 200 with the complete file."""
    return Reply(200, asked.data, {"Content-Length": str(len(asked.data)), "ETag": etag(asked.data)})


def wrong_offset(by: int) -> Fault:
    """Answer 206 with a part that begins elsewhere than requested."""

    def fault(reply: Reply, asked: Asked) -> Reply:
        if reply.status != 206:
            return reply
        first, n = max(0, first_byte(asked) + by), len(asked.data)
        headers = {"Content-Range": f"bytes {first}-{n - 1}/{n}", "Content-Length": str(n - first)}
        return _with(reply, body=asked.data[first:], headers=reply.headers | headers)

    return fault


def content_range(text: str) -> Fault:
    """Put a text into the Content-Range of a 206."""
    return lambda reply, asked: (
        _with(reply, headers=reply.headers | {"Content-Range": text}) if reply.status == 206 else reply
    )


def other_file(data: bytes, **headers: str) -> Fault:
    """Answer with another file, as if the file had changed on the server."""
    return lambda reply, asked: Reply(200, data, {"Content-Length": str(len(data)), "ETag": etag(data)} | headers)


def other_part(data: bytes) -> Fault:
    """Answer with the requested part of another file, like a server that ignores If-Range."""

    def fault(reply: Reply, asked: Asked) -> Reply:
        if reply.status != 206:
            return reply
        return _with(reply, body=data[first_byte(asked) :], headers=reply.headers | {"ETag": etag(data)})

    return fault


def without(*names: str) -> Fault:
    """Answer without some headers."""
    return lambda reply, asked: _with(
        reply, headers={name: value for name, value in reply.headers.items() if name not in names}
    )


def header(**headers: str) -> Fault:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda reply, asked: _with(reply, headers=reply.headers | named)


def claim(length: int) -> Fault:
    """State a wrong Content-Length."""
    return header(Content_Length=str(length))


def chunked(extra: bytes = b"") -> Fault:
    """Send the body chunked, without its length, and `extra` bytes after it."""

    def fault(reply: Reply, asked: Asked) -> Reply:
        headers = {name: value for name, value in reply.headers.items() if name != "Content-Length"}
        return _with(reply, chunked=True, body=reply.body + extra, headers=headers)

    return fault


def both(*faults: Fault) -> Fault:
    def fault(reply: Reply, asked: Asked) -> Reply:
        for each in faults:
            reply = each(reply, asked)
        return reply

    return fault


def etag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


def first_byte(asked: Asked) -> int:
    return int(asked.headers["range"].removeprefix("bytes=").split("-")[0])


def _with(reply: Reply, **changes: Any) -> Reply:
    return Reply(**(vars(reply) | changes))


class FaultServer:
    """Serves files by path; each request gets the next fault of its path, and a good reply after the last fault."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.faults: defaultdict[str, list[Fault]] = defaultdict(list)
        self.always: dict[str, Fault] = {}
        self.requests: defaultdict[str, list[Asked]] = defaultdict(list)
        self.lock = threading.Lock()
        self.over = threading.Event()
        self.http = _Quiet(("127.0.0.1", 0), _handler(self))
        self.http.daemon_threads = True

    def url(self, path: str = "", host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.http.server_address[1]}{path}"

    def __enter__(self) -> "FaultServer":
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.over.set()
        self.http.shutdown()
        self.http.server_close()
        self.thread.join()

    def reply(self, asked: Asked) -> Reply:
        """The good answer to a request, changed by the next fault."""
        n, tag = len(asked.data), etag(asked.data)
        reply = Reply(200, asked.data, {"Content-Length": str(n), "ETag": tag})
        if "range" in asked.headers and asked.headers.get("if-range", tag) == tag:
            first = first_byte(asked)
            headers = {"Content-Length": str(n - first), "ETag": tag, "Content-Range": f"bytes {first}-{n - 1}/{n}"}
            reply = Reply(206, asked.data[first:], headers)
            if first >= n:
                reply = Reply(416, b"", {"Content-Length": "0", "Content-Range": f"bytes */{n}"})
        with self.lock:
            self.requests[asked.path].append(asked)
            waiting = self.faults[asked.path]
            fault = waiting.pop(0) if waiting else self.always.get(asked.path, good)
        return fault(reply, asked)


class _Quiet(ThreadingHTTPServer):
    """Prints nothing when a client closes its connection, which the tests make it do."""

    def handle_error(self, request: object, client_address: object) -> None:
        pass


def _handler(server: FaultServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:  # noqa: N802  # http.server's name
            data = server.files.get(self.path)
            headers = {name.lower(): value for name, value in self.headers.items()}
            asked = Asked(self.path, headers, data or b"")
            reply = server.reply(asked) if data is not None else status(404)(Reply(404, b"", {}), asked)
            try:
                self._answer(reply)
            except OSError:  # the client closed the connection
                self.close_connection = True

        def _answer(self, reply: Reply) -> None:
            self.send_response(reply.status)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            if reply.chunked:
                self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            body = reply.body if reply.send is None else reply.body[: reply.send]
            if reply.chunked:
                body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
            if reply.drip:
                self._drip(body, reply.drip)
            else:
                self.wfile.write(body)
            self.wfile.flush()
            if reply.stall:
                server.over.wait()
            short = len(body) != int(reply.headers.get("Content-Length", len(body)))
            if reply.send is not None or short:
                self.close_connection = True
            if reply.reset:
                linger = (1).to_bytes(4, "little") + (0).to_bytes(4, "little")
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()

        def _drip(self, body: bytes, seconds: float) -> None:
            for i in range(len(body)):
                self.wfile.write(body[i : i + 1])
                self.wfile.flush()
                if server.over.wait(seconds):
                    return

        def log_message(self, *arguments: object) -> None:
            pass

    return Handler
