"""Requests to Meta's server with a signed link, made with httpx.

httpx puts URLs into its errors and its log, and these contain the secret query. So no httpx error
leaves this file, not even as another error's context, and its loggers are disabled while a server
is open.
"""

import logging
import os
import socket
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from llama_ref.download.link import SignedLink
from llama_ref.download.requests.hosts import check_host
from llama_ref.download.requests.outcomes import Refused, Transient
from llama_ref.errors import DownloadError, RequestError
from llama_ref.formatting import hide_queries

CONNECT_SECONDS = 10.0
STALLED_SECONDS = 30.0  # without receiving a byte
MOST_REDIRECTS = 3
REDIRECTS = (301, 302, 303, 307, 308)
LOGGERS = ("httpx", "httpcore")

T = TypeVar("T")


class Answer:
    """A server's answer whose body has not been read. `headers` have lower-case names."""

    def __init__(self, response: httpx.Response, address: str):
        self._response, self.address = response, address
        self.status: int = response.status_code
        self.headers: Mapping[str, str] = {name.lower(): value for name, value in response.headers.items()}

    def chunks(self) -> Iterator[bytes]:
        """The body as it arrives. Raises Transient if the connection breaks off or stalls."""
        body = self._response.iter_raw()
        while (chunk := _shielded(lambda: next(body, None), self.address)) is not None:
            yield chunk

    def close(self) -> None:
        _shielded(self._response.close, self.address)


class Server:
    """The server behind a link. Its methods may be called from several threads."""

    def __init__(self, link: SignedLink, allowed_hosts: Collection[str], jobs: int):
        self.link, self._allowed = link, allowed_hosts
        self._streams: set[Any] = set()
        self._is_aborted = False
        self._client = httpx.Client(
            headers={"User-Agent": "llama_ref", "Accept": "*/*", "Accept-Encoding": "identity"},
            timeout=httpx.Timeout(STALLED_SECONDS, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=jobs + 2),
            trust_env=link.scheme == "https",  # a proxy would see the query of unencrypted requests
        )

    @contextmanager
    def get(self, path: str, headers: Mapping[str, str]) -> Iterator[Answer]:
        """Request a file with these headers, following redirects, and yield the answer.

        Raises Transient for errors that are worth a retry, DownloadError for all others.
        """
        address, url = self.link.address(path), self.link.signed(path)
        answer = self._send(url, address, headers)
        for _ in range(MOST_REDIRECTS):
            if answer.status not in REDIRECTS:
                break
            url = self._next_url(answer)
            answer.close()
            answer = self._send(url, address, headers)
        try:
            if answer.status in REDIRECTS:
                raise DownloadError(f"{address} was redirected {MOST_REDIRECTS + 1} times; is it the right link?")
            yield answer
        finally:
            answer.close()

    def abort(self) -> None:
        """Make all current and later requests fail with Transient, so that no thread waits."""
        self._is_aborted = True  # set before closing the streams: a connection opened during the loop checks it
        for stream in list(self._streams):
            _shut_down(stream)

    def close(self) -> None:
        _shielded(self._client.close, self.link.host)

    def _send(self, url: str, address: str, headers: Mapping[str, str]) -> Answer:
        def send() -> httpx.Response:
            request = self._client.build_request("GET", url, headers=headers, extensions={"trace": self._note_stream})
            return self._client.send(request, stream=True, follow_redirects=False)

        return Answer(_shielded(send, address), address)

    def _next_url(self, answer: Answer) -> str:
        """The target of a redirect. Raises Refused if its host is not allowed."""
        location = answer.headers.get("location", "")
        parts = None
        with suppress(ValueError):
            parts = urlsplit(location)
        problem = "to nowhere"
        if parts is not None and parts.netloc:
            try:
                check_host(parts.scheme, parts.netloc.lower(), self._allowed)
                return location
            except RequestError:
                problem = f"to {parts.scheme}://{parts.netloc.rpartition('@')[2]}"
        raise Refused(f"{answer.address} redirects {problem}, which is not followed: a login page? Is it the right link?")

    def _note_stream(self, event: str, info: dict[str, Any]) -> None:
        """Remember connections for `abort`; shut down those opened after it."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self._streams.add(info["return_value"])
            if self._is_aborted:
                _shut_down(info["return_value"])


@contextmanager
def opened(link: SignedLink, allowed_hosts: Collection[str], jobs: int) -> Iterator[Server]:
    """Open a server for the block, with httpx's loggers disabled."""
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.partition(".")[0] in LOGGERS]
    loggers = [logger for logger in loggers if not logger.disabled]
    for logger in loggers:
        logger.disabled = True
    server = Server(link, allowed_hosts, jobs)
    try:
        yield server
    finally:
        server.close()
        for logger in loggers:
            logger.disabled = False


def _shut_down(stream: Any) -> None:
    """Shut down a connection's socket, even if another thread is reading from it.

    For TLS, the socket beneath.
    """
    with suppress(OSError, ValueError):
        sock = stream.get_extra_info("socket")
        if sock is not None and sock.fileno() >= 0:
            with socket.socket(fileno=os.dup(sock.fileno())) as own:
                own.shutdown(socket.SHUT_RDWR)


def _shielded(action: Callable[[], T], address: str) -> T:
    """Call httpx, and raise its errors as our own without a context.

    The originals contain the secret query.
    """
    failure: Exception
    try:
        return action()
    except httpx.ConnectTimeout:
        failure = Transient(f"{address}: no connection within {CONNECT_SECONDS:.0f} seconds")
    except httpx.TimeoutException:
        failure = Transient(f"{address}: no data for {STALLED_SECONDS:.0f} seconds")
    except httpx.ConnectError as error:
        failure = _connect_failure(hide_queries(str(error)), address)
    except httpx.TransportError as error:
        failure = Transient(f"{address}: the connection broke off ({type(error).__name__})")
    except Exception as error:
        failure = DownloadError(f"{address} cannot be requested: {type(error).__name__}; is the link damaged?")
    raise failure


def _connect_failure(reason: str, address: str) -> Exception:
    if "CERTIFICATE" in reason.upper():
        return DownloadError(f"{address}: the server's certificate is not trusted ({reason}); is a proxy in between?")
    return Transient(f"{address}: no connection ({reason})")
