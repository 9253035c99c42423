"""A local file server that imitates Meta's signed links and can be told to fail.

`Loopback` serves a folder's files by ranges with ETags. A fault, added by `fail`, replaces the
usual answer to a number of requests for a file; the functions at the end are the kinds of faults.
"""

import base64
import gzip
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

SIGNATURE = "c2VjcmV0~%7Esignature_of-the__link"
KEY = "K15SECRETKEYID"
Act = Callable[["Handler"], None]


def make_link(
    host: str, expires: float | None = None, *, scheme: str = "http", resource: str | None = None, path: str = "/*"
) -> str:
    """A signed link in Meta's format; by default it expires in a day."""
    statement = {
        "unique_hash": "x" * 24,
        "Resource": resource or f"{scheme}://{host}/*",
        "Condition": {"DateLessThan": {"AWS:EpochTime": int(time.time() + 86400 if expires is None else expires)}},
    }
    policy = base64.b64encode(json.dumps({"Statement": [statement]}).encode()).decode()
    policy = policy.translate(str.maketrans("+=/", "-_~"))
    return f"{scheme}://{host}{path}?Policy={policy}&Signature={SIGNATURE}&Key-Pair-Id={KEY}&Download-Request-ID=123"


def secrets_of(link: str) -> list[str]:
    """The secrets that no output and no file may contain."""
    policy = re.search(r"Policy=([^&]+)", link)[1]
    return [SIGNATURE, SIGNATURE[:12], KEY, policy, policy[:40]]


@dataclass
class Request:
    """A client's request for a file, with its headers."""

    name: str
    query: str
    headers: dict[str, str]

    @property
    def range(self) -> tuple[int, int] | None:
        """The first byte and the end of the requested range."""
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        return (int(match[1]), int(match[2]) + 1) if match else None

    @property
    def is_look_up(self) -> bool:
        return self.range == (0, 1)


@dataclass
class Fault:
    name: str
    act: Act
    times: int
    look_ups: bool


@dataclass
class Loopback:
    """The server's files by path, the requests so far, and the faults to come."""

    files: dict[str, bytes]
    link: str = ""
    host: str = ""
    etags: dict[str, str] = field(default_factory=dict)
    asked: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    sent: int = 0
    is_expired: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)
    # Set when a waiting fault has started to wait.
    reached: threading.Event = field(default_factory=threading.Event)
    go: threading.Event = field(default_factory=threading.Event)  # set to let it continue

    def fail(self, name: str, act: Act, times: int = 1, *, look_ups: bool = False) -> None:
        """Answer `times` requests for a file with a fault; `look_ups`: those for its first byte."""
        self.faults.append(Fault(name, act, times, look_ups))

    def fault_for(self, request: Request) -> Act | None:
        with self.lock:
            for fault in self.faults:
                fits = fault.times and re.search(fault.name, request.name) and fault.look_ups == request.is_look_up
                if fits:
                    fault.times -= 1
                    return fault.act
        return None

    def weights_asked(self) -> list[Request]:
        """Requests for weights, without those that only looked them up."""
        return [each for each in self.asked if each.name.endswith(".pth") and not each.is_look_up]

    def etag(self, name: str) -> str:
        return self.etags.get(name, f'"{hash(self.files[name]) & 0xFFFFFF:x}"')


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    loopback: Loopback

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.request_ = Request(path.lstrip("/"), query, headers)
        with self.loopback.lock:
            self.loopback.asked.append(self.request_)
        act = self.loopback.fault_for(self.request_)
        try:
            if act is not None:
                act(self)
            else:
                self.answer()
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def answer(self) -> None:
        """Answer as the real server does."""
        if self.loopback.is_expired or f"Signature={SIGNATURE}" not in self.request_.query:
            self.status(
                403, b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", {"Content-Type": "application/xml"}
            )
        elif self.request_.name not in self.loopback.files:
            self.status(403, b"<Error/>", {"Content-Type": "application/xml"})
        else:
            self.send_range()

    @property
    def body(self) -> bytes:
        return self.loopback.files[self.request_.name]

    def wanted(self) -> tuple[int, int] | None:
        """The range to send; None for the whole file."""
        if_range = self.request_.headers.get("if-range")
        if if_range is not None and if_range != self.loopback.etag(self.request_.name):
            return None
        return self.request_.range

    def send_range(self, *, most: int | None = None) -> int:
        """Send the requested bytes, or only the first; return how many more were promised."""
        wanted, body = self.wanted(), self.body
        etag = {"ETag": self.loopback.etag(self.request_.name), "Accept-Ranges": "bytes"}
        if wanted is not None and wanted[0] >= len(body):
            self.status(416, b"", {"Content-Range": f"bytes */{len(body)}"})
            return 0
        start, stop = wanted or (0, len(body))
        part = body[start:stop]
        if wanted is not None:
            etag["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(body)}"
        self.head(200 if wanted is None else 206, len(part), etag)
        self.send(part[:most])
        return len(part) - len(part[:most])

    def head(self, code: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in {"Content-Type": "binary/octet-stream", "Content-Length": str(length), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def send(self, data: bytes) -> None:
        self.wfile.write(data)
        self.wfile.flush()
        with self.loopback.lock:
            self.loopback.sent += len(data)

    def status(self, code: int, body: bytes, headers: dict[str, str]) -> None:
        self.head(code, len(body), headers)
        self.send(body)

    def hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        pass


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # the client has disconnected


@contextmanager
def serve(files: dict[str, bytes], tls: ssl.SSLContext | None = None) -> Iterator[Loopback]:
    """Serve these files on a free port of this machine while the block runs, over TLS if a context is given."""
    loopback = Loopback(files)
    handler = type("Bound", (Handler,), {"loopback": loopback})
    with Listener(("127.0.0.1", 0), handler) as listener:
        if tls is not None:  # the handshake runs in the connection's own thread
            listener.socket = tls.wrap_socket(listener.socket, server_side=True, do_handshake_on_connect=False)
        loopback.host = f"127.0.0.1:{listener.server_address[1]}"
        loopback.link = make_link(loopback.host, scheme="http" if tls is None else "https")
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield loopback
        finally:
            loopback.stop.set()
            loopback.go.set()
            listener.shutdown()
            thread.join()


def files_of(folder: Path, remote: str) -> dict[str, bytes]:
    """A folder's files by their paths on the server."""
    return {f"{remote}/{path.name}": path.read_bytes() for path in folder.iterdir() if path.is_file()}


# ---- faults


def cut(after: int) -> Act:
    """Send this many of the promised bytes, then hang up."""

    def act(handler: Handler) -> None:
        handler.send_range(most=after)
        handler.hang_up()

    return act


def stall(after: int) -> Act:
    """Send this many bytes, then wait until the test lets it continue; then hang up."""

    def act(handler: Handler) -> None:
        handler.send_range(most=after)
        handler.loopback.reached.set()
        handler.loopback.go.wait()
        handler.hang_up()

    return act


def silent() -> Act:
    """Send nothing, not even a status."""

    def act(handler: Handler) -> None:
        handler.loopback.reached.set()
        handler.loopback.go.wait()
        handler.hang_up()

    return act


def status(code: int, body: bytes = b"", **headers: str) -> Act:
    """Answer with this status and headers; underscores in header names stand for dashes."""
    return lambda handler: handler.status(code, body, {name.replace("_", "-"): value for name, value in headers.items()})


def ignores_range(handler: Handler) -> None:
    """Send the whole file for any request."""
    handler.head(200, len(handler.body), {"ETag": handler.loopback.etag(handler.request_.name)})
    handler.send(handler.body)


def says(content_range: str, most: int | None = None) -> Act:
    """Send the right bytes, or the first, as another range; {start}, {last}, {total} are right."""

    def act(handler: Handler) -> None:
        start, stop = handler.request_.range
        data = handler.body[start:stop][:most]
        said = content_range.format(start=start, last=start + len(data) - 1, total=len(handler.body), other=start + 7)
        handler.head(206, len(data), {"Content-Range": said, "ETag": handler.loopback.etag(handler.request_.name)})
        handler.send(data)

    return act


def damaged(handler: Handler) -> None:
    """Send as many bytes as requested, but wrong ones."""
    start, stop = handler.request_.range
    data = bytes(byte ^ 0x55 for byte in handler.body[start:stop])
    headers = {"Content-Range": f"bytes {start}-{stop - 1}/{len(handler.body)}"}
    handler.head(206, len(data), headers | {"ETag": handler.loopback.etag(handler.request_.name)})
    handler.send(data)


def compressed(handler: Handler) -> None:
    """Send gzip, which was not requested."""
    data = gzip.compress(handler.body)
    handler.head(200, len(data), {"Content-Encoding": "gzip"})
    handler.send(data)


def replaced(by: bytes, after: int = 0) -> Act:
    """Send some bytes of the file, then hang up; from then on serve another file."""

    def act(handler: Handler) -> None:
        handler.send_range(most=after)
        handler.loopback.files[handler.request_.name] = by
        handler.hang_up()

    return act


def expires(after: int) -> Act:
    """Send some bytes, then hang up; from then on refuse every request."""

    def act(handler: Handler) -> None:
        handler.loopback.is_expired = True
        handler.send_range(most=after)
        handler.hang_up()

    return act
