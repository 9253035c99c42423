"""Fixtures for download tests: a server, a target folder, and a check for leaked secrets."""

import logging
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from folders import tiny_folder
from llama_ref.checkpoint.releases import find_release
from llama_ref.download import ranges
from llama_ref.download.link import parse_link
from llama_ref.download.release import Outcome, download
from llama_ref.download.requests import retries, server
from llama_ref.download.requests.outcomes import Transient
from llama_ref.download.requests.server import Server
from llama_ref.errors import LlamaRefError
from loopback import Loopback, files_of, secrets_of, serve

REMOTE = "Llama-3.2-1B-Instruct"
NAME = "Llama3.2-1B-Instruct"
SHARD = "consolidated.00.pth"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A checkpoint of 126 kB, whose shard is fetched in four ranges."""
    return tiny_folder(tmp_path_factory.mktemp("download") / "Tiny")


@pytest.fixture
def loopback(tiny) -> Iterator[Loopback]:
    with serve(files_of(tiny, REMOTE)) as found:
        yield found


@pytest.fixture(autouse=True)
def short_times(monkeypatch) -> None:
    """Use small ranges and short pauses between tries."""
    monkeypatch.setattr(ranges, "SMALLEST", 1 << 15)
    monkeypatch.setattr(ranges, "LARGEST", 1 << 15)
    monkeypatch.setattr(retries, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(server, "STALLED_SECONDS", 0.3)


@dataclass
class Downloads:
    """Downloads from a server into a folder; keeps their messages to search them for secrets."""

    loopback: Loopback
    folder: Path
    said: list[str] = field(default_factory=list)

    def run(self, link: str | None = None, name: str = NAME, **options: Any) -> Outcome:
        host = [self.loopback.host]
        try:
            return download(
                find_release(name), parse_link(link or self.loopback.link, host), self.folder, allowed_hosts=host, **options
            )
        except BaseException as error:
            self.said += traceback.format_exception(error)
            at: BaseException | None = error
            while at is not None:
                self.said += [repr(at), str(vars(at))]
                at = at.__cause__ or at.__context__
            raise

    def fails(self, match: str, **options: Any) -> str:
        """Run a download that must fail, and check its one-line error."""
        with pytest.raises(LlamaRefError, match=match) as caught:
            self.run(**options)
        line = str(caught.value)
        assert "\n" not in line
        return line

    def check_names(self) -> None:
        """Check that every file with a final name equals the server's."""
        for path in self.folder.glob("*"):
            if path.name.startswith(".") or ".part" in path.name:
                continue
            assert path.read_bytes() == self.loopback.files[f"{REMOTE}/{path.name}"], path

    def check_whole(self) -> None:
        names = {name.partition("/")[2] for name in self.loopback.files}
        assert {path.name for path in self.folder.iterdir()} == names, "all files and nothing else"
        self.check_names()


@pytest.fixture
def downloads(loopback, tmp_path, caplog, capfd) -> Iterator[Downloads]:
    """Downloads whose outputs, logs, errors and files must not contain the link's secrets."""
    caplog.set_level(logging.DEBUG)
    found = Downloads(loopback, tmp_path / "home" / "checkpoints" / NAME)
    yield found
    texts = [*found.said, caplog.text, *capfd.readouterr()]
    for path in tmp_path.rglob("*"):
        texts.append(str(path))
        if path.is_file():
            texts.append(path.read_bytes().decode("latin-1"))
    for secret in secrets_of(loopback.link):
        assert [text for text in texts if secret in text] == [], secret


def abort_a_wait(server: Server, loopback: Loopback, path: str) -> None:
    """Request a file that a silent server never sends, in a thread; `abort` must end the wait."""
    ended = threading.Event()

    def wait_for_it() -> None:
        with pytest.raises(Transient), server.get(path, {}) as answer:
            list(answer.chunks())
        ended.set()

    thread = threading.Thread(target=wait_for_it)
    thread.start()
    assert loopback.reached.wait(10)
    server.abort()
    assert ended.wait(10)
    thread.join()
