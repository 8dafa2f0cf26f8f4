"""A download that is interrupted again and again: python -m benchmarks.download [--mb 500] [--interruptions 50].

A server on loopback sends one large file at the speed of a good connection. In half of the interruptions the server
closes the connection at a random byte, the others are kill -9 of the process that downloads. At the end the file must
be the same byte for byte. What the server sends beyond the file's size is sent twice: after a kill, the bytes in the
kernel's buffers that no process had read.
"""

import argparse
import hashlib
import random
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CLIENT = """
import sys, pathlib
from batchgen.models.download import Remote, download
download(Remote(sys.argv[1], int(sys.argv[2]), None), pathlib.Path(sys.argv[3]))
"""


class Server(ThreadingHTTPServer):
    """Serves `data`, and closes the connection once at each of `cuts`; counts the bytes that it sends."""

    daemon_threads = True

    def __init__(self, data: bytes, cuts: list[int], rate: float) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.data, self.cuts, self.rate, self.sent, self.lock = data, sorted(cuts), rate, 0, threading.Lock()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        data, tag = self.server.data, '"1"'
        first = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(data) - first))
        self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        at = first
        while at < len(data):
            cut = next((cut for cut in self.server.cuts if cut > at), len(data))
            end = min(at + 2**16, cut)
            try:
                self.wfile.write(data[at:end])
            except OSError:
                return
            with self.server.lock:
                self.server.sent += end - at
            at = end
            if at in self.server.cuts:
                self.server.cuts.remove(at)
                return
            time.sleep(2**16 / self.server.rate)

    def log_message(self, *arguments: object) -> None:
        pass


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=500)
    parser.add_argument("--interruptions", type=int, default=50)
    parser.add_argument("--rate", type=float, default=60.0, help="MB/s that the server sends, at most")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng, size = random.Random(options.seed), options.mb * 10**6
    data = b"".join(rng.randbytes(10**6) for _ in range(options.mb))
    kills = options.interruptions // 2
    cuts = rng.sample(range(size), options.interruptions - kills)
    stops = sorted(rng.sample(range(size), kills))
    server = Server(data, cuts, options.rate * 1e6)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        path, started, killed = Path(folder, "file"), time.monotonic(), 0
        command = [sys.executable, "-c", CLIENT, f"http://127.0.0.1:{server.server_address[1]}/file", str(size), path]
        for stop in [*stops, size + 1]:
            child = subprocess.Popen(command)
            while child.poll() is None and _received(path) < stop:
                time.sleep(0.002)
            if child.poll() is None:
                child.kill()
                killed += 1
            child.wait()
        same = hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(data).digest()
        seconds = time.monotonic() - started
    cut = options.interruptions - kills - len(server.cuts)
    twice = server.sent - size
    print(
        f"{options.mb} MB, {cut} connections closed and {killed} processes killed in {seconds:.0f} s: "
        f"{'identical' if same else 'DIFFERENT'}, {twice / 1e6:.2f} MB ({twice / size:.2%}) sent twice"
    )
    return 0 if same and twice < 0.01 * size else 1


def _received(path: Path) -> int:
    part = path.with_name(path.name + ".part")
    try:
        return part.stat().st_size
    except FileNotFoundError:
        return 0 if not path.exists() else path.stat().st_size


if __name__ == "__main__":
    sys.exit(main())
