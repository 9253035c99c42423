"""httpx's errors and logs contain the secret URL; neither leaves the server module."""

import logging
import traceback

import httpx
import pytest

from download.conftest import abort_a_wait
from llama_ref.download.link import parse_link
from llama_ref.download.requests import server as servers
from llama_ref.download.requests.outcomes import Transient
from llama_ref.download.requests.server import Server, opened
from llama_ref.errors import DownloadError
from loopback import make_link, secrets_of, silent, status

PATH = "Llama-3.2-1B-Instruct/params.json"


@pytest.fixture
def link(loopback):
    return parse_link(loopback.link, [loopback.host])


def ask(server: Server) -> bytes:
    with server.get(PATH, {}) as answer:
        return b"".join(answer.chunks())


def texts_of(error: BaseException) -> str:
    """Everything that a traceback or a reader of the error could show."""
    texts = traceback.format_exception(error)
    at: BaseException | None = error
    while at is not None:
        texts += [repr(at), str(vars(at)), str(at.args)]
        at = at.__context__
    return "".join(texts)


def errors_of_httpx() -> list[Exception]:
    request = httpx.Request("GET", make_link("llama3-1.llamameta.net", scheme="https"))
    kinds = [kind for kind in vars(httpx).values() if isinstance(kind, type) and issubclass(kind, httpx.RequestError)]
    url = str(request.url)
    own = [kind(f"{url} failed", request=request) for kind in kinds]
    return [*own, httpx.InvalidURL(url), httpx.CookieConflict(url), ValueError(url), UnicodeError(url), KeyError(url)]


@pytest.mark.parametrize("error", errors_of_httpx(), ids=lambda error: type(error).__name__)
def test_no_error_of_httpx_gets_out(error, link, loopback, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(httpx.Client, "send", fail)
    with opened(link, [loopback.host], 1) as server, pytest.raises((Transient, DownloadError)) as caught:
        ask(server)
    said = texts_of(caught.value)
    assert caught.value.__cause__ is None and caught.value.__context__ is None
    own = make_link("llama3-1.llamameta.net", scheme="https")
    assert [secret for secret in (*secrets_of(own), *secrets_of(loopback.link)) if secret in said] == []


def test_a_real_error_of_status_is_not_raised_by_httpx(link, loopback):
    loopback.fail("params.json", status(403))
    with opened(link, [loopback.host], 1) as server, server.get(PATH, {}) as answer:
        assert answer.status == 403


def test_the_log_of_httpx_is_silent_while_a_server_is_open(link, loopback, caplog):
    for name in ("httpx", "httpcore"):  # another imported package may have raised their level to WARNING
        caplog.set_level(logging.DEBUG, name)
    with opened(link, [loopback.host], 1) as server:
        assert ask(server) == loopback.files[PATH]
    assert [record for record in caplog.records if record.name.startswith(("httpx", "httpcore"))] == []
    httpx.get(f"http://{loopback.host}/nothing", trust_env=False)  # logging works again afterwards
    assert [record for record in caplog.records if record.name == "httpx"]


def test_no_proxy_sees_an_unencrypted_request(link, loopback, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with opened(link, [loopback.host], 1) as server, server.get(PATH, {}) as answer:
        assert answer.status == 200


def test_a_certificate_that_is_not_trusted_is_final():
    failure = servers._connect_failure("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate", "https://host/file")
    assert isinstance(failure, DownloadError) and "certificate is not trusted" in str(failure)


def test_a_host_that_does_not_answer_is_tried_again(link, loopback):
    dead = parse_link(make_link("127.0.0.1:9"), ["127.0.0.1"])
    with opened(dead, ["127.0.0.1"], 1) as server, pytest.raises(Transient, match=r"no connection .*refused"):
        ask(server)


def test_abort_wakes_a_thread_that_waits(link, loopback, monkeypatch):
    monkeypatch.setattr(servers, "STALLED_SECONDS", 600)
    loopback.fail("params.json", silent())
    with opened(link, [loopback.host], 1) as server:
        abort_a_wait(server, loopback, PATH)


def test_a_connection_that_comes_after_abort_does_not_wait(link, loopback, monkeypatch):
    monkeypatch.setattr(servers, "STALLED_SECONDS", 600)
    loopback.fail("params.json", silent())
    with opened(link, [loopback.host], 1) as server:
        server.abort()
        with pytest.raises(Transient):
            ask(server)
