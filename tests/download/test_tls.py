"""Downloads over TLS: trusted certificates, what a proxy sees, and aborting a wait."""

import select
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from socketserver import BaseRequestHandler, ThreadingTCPServer

import pytest
import trustme

from llama_ref.download.link import parse_link
from llama_ref.download.requests import server as servers
from llama_ref.download.requests.server import opened
from llama_ref.errors import DownloadError
from loopback import Loopback, files_of, make_link, secrets_of, serve, silent

from .conftest import REMOTE, SHARD, abort_a_wait

PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def loopback(tiny, authority) -> Iterator[Loopback]:
    """The server of the other tests, with a certificate for its address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    with serve(files_of(tiny, REMOTE), context) as found:
        yield found


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture
def trusted(authority, tmp_path_factory, monkeypatch) -> Path:
    """The certificate authority that the environment variables name as trusted."""
    path = tmp_path_factory.mktemp("trusted") / "authority.pem"
    authority.cert_pem.write_to_path(str(path))
    monkeypatch.setenv("SSL_CERT_FILE", str(path))
    return path


@dataclass
class Proxy:
    """The requests that a proxy received, and the bytes that it forwarded to the server."""

    address: str
    asked: list[str] = field(default_factory=list)
    passed: bytearray = field(default_factory=bytearray)


@contextmanager
def proxy() -> Iterator[Proxy]:
    """A local proxy that tunnels with CONNECT and records the traffic."""

    class Tunnel(BaseRequestHandler):
        def handle(self) -> None:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += self.request.recv(1)
            found.asked.append(head.split(b"\r\n")[0].decode())
            host, _, port = head.split()[1].decode().rpartition(":")
            with socket.create_connection((host, int(port))) as server:
                self.request.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                self.pass_on(server)

        def pass_on(self, server: socket.socket) -> None:
            other = {server: self.request, self.request: server}
            while True:
                for side in select.select(list(other), [], [])[0]:
                    data = side.recv(1 << 16)
                    if not data:
                        return
                    if side is self.request:
                        found.passed += data
                    other[side].sendall(data)

    class Server(ThreadingTCPServer):
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # one side closed the connection

    with Server(("127.0.0.1", 0), Tunnel) as listener:
        found = Proxy(f"http://127.0.0.1:{listener.server_address[1]}")
        thread = threading.Thread(target=listener.serve_forever, args=(0.01,))
        thread.start()
        yield found
        listener.shutdown()
        thread.join()


def test_a_release_is_downloaded_whole(downloads, trusted):
    assert downloads.run(jobs=4).report.ok
    downloads.check_whole()
    assert len(downloads.loopback.weights_asked()) > 1, "in ranges"


def test_a_certificate_that_nobody_vouches_for_ends_the_download_before_the_link_is_sent(downloads, loopback):
    line = downloads.fails("the server's certificate is not trusted .*is a proxy in between")
    assert loopback.host in line
    assert loopback.asked == [] and not list(downloads.folder.glob("*.pth"))


def test_a_certificate_for_another_host_is_not_trusted(downloads, loopback, trusted):
    other = loopback.host.replace("127.0.0.1", "localhost")
    link = parse_link(make_link(other, scheme="https"), [other])
    with (
        opened(link, [other], 1) as server,
        pytest.raises(DownloadError, match=r"certificate is not trusted .*localhost"),
        server.get(f"{REMOTE}/{SHARD}", {}),
    ):
        pass
    assert loopback.asked == []


def test_a_proxy_passes_the_download_on_and_sees_the_host_alone(downloads, loopback, trusted, monkeypatch):
    with proxy() as between:
        monkeypatch.setenv("HTTPS_PROXY", between.address)
        assert downloads.run(jobs=2).report.ok
    downloads.check_whole()
    assert set(between.asked) == {f"CONNECT {loopback.host} HTTP/1.1"}
    assert len(between.passed) > 1000 and not any(each.encode() in between.passed for each in secrets_of(loopback.link))


def test_a_connection_that_is_cut_is_taken_up_again(downloads, loopback, trusted):
    loopback.fail(SHARD, lambda handler: (handler.send_range(most=1000), handler.hang_up()))
    assert downloads.run().report.ok
    downloads.check_whole()


@pytest.mark.parametrize("through", [False, True], ids=["directly", "through a proxy"])
def test_abort_wakes_a_thread_that_waits(loopback, trusted, monkeypatch, through):
    monkeypatch.setattr(servers, "STALLED_SECONDS", 600)
    loopback.fail(SHARD, silent())
    with ExitStack() as stack:
        if through:
            monkeypatch.setenv("HTTPS_PROXY", stack.enter_context(proxy()).address)
        server = stack.enter_context(opened(parse_link(loopback.link, [loopback.host]), [loopback.host], 1))
        abort_a_wait(server, loopback, f"{REMOTE}/{SHARD}")
