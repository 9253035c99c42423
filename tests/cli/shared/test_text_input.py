"""Standard input in UTF-8 or another encoding, with a byte-order mark, or that is not text."""

import io
import sys

import pytest

from llama_ref.cli import chat
from llama_ref.cli.shared.text_input import decode_stdin, known_encoding, read_stdin, text_word
from llama_ref.errors import RequestError


@pytest.fixture
def pipe(monkeypatch):
    """Pipe bytes into standard input, decoded as in a shell."""

    def pipe(data: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", newline="\n"))

    return pipe


@pytest.mark.parametrize(
    ("data", "encoding", "text"),
    [
        ("안녕\n".encode(), None, "안녕\n"),
        (b"\xef\xbb\xbfhi", None, "hi"),
        (b"a\r\nb", None, "a\r\nb"),
        ("안녕".encode("cp949"), "cp949", "안녕"),
        ("caf\xe9".encode("latin-1"), "latin-1", "caf\xe9"),
        ("안녕".encode("utf-16"), "utf-16", "안녕"),
        ("안녕".encode("utf-16-le"), "utf-16-le", "안녕"),
        (b"", None, ""),
    ],
)
def test_text_is_read_in_its_encoding(pipe, data, encoding, text):
    pipe(data)
    assert read_stdin(encoding) == text


@pytest.mark.parametrize(
    ("data", "encoding", "message"),
    [
        (
            b"caf\xe9!",
            None,
            "not UTF-8: there is a byte 0xe9 after 'caf'; give the text's encoding with --encoding, such as cp949",
        ),
        ("안녕".encode("cp949"), None, "not UTF-8"),
        ("hi".encode("utf-16"), None, "give --encoding utf-16"),
        ("hi".encode("utf-16-be"), None, "give --encoding utf-16"),
        (b"\x7fELF\0\1", None, "not text at all"),
        (b"\xff\xfeh", "utf-16", "not utf-16: .* truncated data"),
        (b"\xff\xff", "cp949", "not CP949: there is a byte 0xff"),
    ],
)
def test_what_is_not_text_is_refused_with_what_to_do(pipe, data, encoding, message):
    pipe(data)
    with pytest.raises(RequestError, match=f"^standard input is .*{message}"):
        read_stdin(encoding)


@pytest.mark.parametrize("name", ["nonsense", "hex", ""])
def test_an_unknown_encoding_is_refused(name):
    with pytest.raises(RequestError, match=r"--encoding is .*, expected an encoding such as cp949"):
        known_encoding(name)


def test_a_word_of_the_command_line_that_is_not_utf_8_is_refused():
    with pytest.raises(RequestError, match=r"'caf\\udce9' is not UTF-8"):
        text_word("caf\udce9")
    assert text_word("안녕") == "안녕"


# ---- chat


@pytest.fixture
def lines(pipe, peaked):
    """Return the lines that `chat` reads from bytes."""

    def lines(data: bytes, encoding: str | None = None) -> list[str]:
        pipe(data)
        decode_stdin(encoding)
        return list(chat._lines("", peaked.job))

    return lines


def test_chat_reads_the_lines_of_windows(lines):
    assert lines(b"\xef\xbb\xbf/help\r\nfirst \\\r\nsecond\r\n") == ["/help", "first \nsecond"]
    assert lines("안녕\r\n".encode("cp949"), "cp949") == ["안녕"]


def test_a_line_that_is_not_text_ends_a_pipe(lines):
    with pytest.raises(RequestError, match="not UTF-8"):
        lines(b"hi\ncaf\xe9\n")
