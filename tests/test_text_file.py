"""Reading a file of text: its kinds of damage, its limit, pipes."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_ref import text_file
from llama_ref.errors import RequestError
from llama_ref.text_file import read_text


@pytest.fixture
def files(tmp_path) -> Iterator[dict[str, Path]]:
    contents = {"latin": b"caf\xe9", "marked": "\ufeffHi".encode(), "lines": b"one\r\ntwo\n"}
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    yield {name: tmp_path / name for name in (*contents, "missing")} | {"folder": tmp_path}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("latin", "latin is not UTF-8: byte 0xe9 at 3"),
        ("missing", "cannot read .*missing: No such file"),
        ("folder", "cannot read .*: Is a directory"),
        ("a\0b", "cannot read .*null (byte|character)"),
    ],
)
def test_files_that_are_no_texts_are_refused(files, name, message):
    with pytest.raises(RequestError, match=message):
        read_text(files.get(name, name), "cut it")


@pytest.mark.parametrize("name", ["latin", "/dev/zero"])
def test_no_more_is_read_than_the_limit(files, name, monkeypatch):
    """A device has no size to check."""
    monkeypatch.setattr(text_file, "LIMIT_BYTES", 3)
    with pytest.raises(RequestError, match="has more than 3 bytes: cut it"):
        read_text(files.get(name, name), "cut it")


def test_a_byte_order_mark_is_no_text_and_line_ends_stay(files):
    assert read_text(files["marked"], "cut it") == "Hi"
    assert read_text(files["lines"], "cut it") == "one\r\ntwo\n"


def test_a_pipe_is_read_to_its_end():
    reading, writing = os.pipe()
    with os.fdopen(reading):
        os.write(writing, "여보세요".encode())
        os.close(writing)
        assert read_text(f"/dev/fd/{reading}", "cut it") == "여보세요"
