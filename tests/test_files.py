"""Files are recognised and limited before they are read."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folders import tiny_folder
from llama_ref import Llama
from llama_ref.checkpoint.integrity import verify, write_checklist
from llama_ref.checkpoint.writing.convert import to_hugging_face
from llama_ref.errors import CheckpointError
from llama_ref.files import ADVICE, SNIFF_BYTES, as_utf8, check_head, read_head, read_small, what_is
from llama_ref.session import Session

IMPOSTORS = {
    "an empty file": [b""],
    "an HTML page": [
        b"<!DOCTYPE html>\n<html>",
        b"<!doctype HTML PUBLIC",
        b"\xef\xbb\xbf\r\n <HTML><body>",
        b"<head><title>Sign in",
        b"<body>",
        b"<!-- expired -->",
    ],
    "an XML error body": [b'<?xml version="1.0"?><Error><Code>AccessDenied', b"<Error><Code>ExpiredToken"],
    "a JSON error body": [b'{"error":"Unauthorized"}', b'\n{"message":"Not Found"}', b'{"detail": 1}', b'{"code": 403}'],
    "a Git LFS pointer": [b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2471645608\n"],
    "a run of zero bytes": [b"\0", b"\0" * SNIFF_BYTES],
}
HONEST = [
    b"PK\x03\x04\x00\x00",
    b'{"dim": 4096}',
    b"IQ== 0\nIg== 1\n",
    b"d41d8cd98f00b204e9800998ecf8427e  params.json",
    b"\0\0\0\1",
    b"\x80\x02}q\x00",
    b"{}",
    b"<|begin_of_text|>",
    b"version 2",
]


@pytest.mark.parametrize(("kind", "head"), [(kind, head) for kind, heads in IMPOSTORS.items() for head in heads])
def test_an_impostor_is_recognised_and_comes_with_advice(tmp_path, kind, head):
    assert what_is(head) == kind
    path = tmp_path / "consolidated.00.pth"
    path.write_bytes(head)
    with pytest.raises(CheckpointError) as error:
        check_head(path, "weights")
    assert str(error.value) == f"{path} is {kind}, not weights: {ADVICE[kind]}"


@pytest.mark.parametrize("head", HONEST)
def test_an_honest_file_passes_with_its_first_bytes(tmp_path, head):
    path = tmp_path / "honest"
    path.write_bytes(head + b"\n" * SNIFF_BYTES)
    assert check_head(path, "weights") == read_head(path) == (head + b"\n" * SNIFF_BYTES)[:SNIFF_BYTES]
    assert read_head(path, 3) == (head + b"\n" * SNIFF_BYTES)[:3]
    assert read_small(path, 1 << 20, "weights") == head + b"\n" * SNIFF_BYTES


@given(st.binary(max_size=40) | st.sampled_from([head[: len(head) // 2] for heads in IMPOSTORS.values() for head in heads]))
def test_any_bytes_are_one_of_these_or_nothing_known(head):
    assert what_is(head) in {None, *ADVICE}


def test_a_small_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "params.json"
    path.write_bytes(b"x" * 100)
    assert read_small(path, 100, "params.json") == b"x" * 100
    with pytest.raises(CheckpointError, match=r"params\.json is larger than 99 bytes, far more than params\.json ever is"):
        read_small(path, 99, "params.json")


@pytest.mark.parametrize("kind", ["folder", "pipe", "broken link", "loop", "nothing", "too long a name", "no name"])
@pytest.mark.parametrize("read", [read_head, lambda path: read_small(path, 10, "x"), lambda path: check_head(path, "x")])
def test_anything_but_a_file_is_refused_without_hanging(tmp_path, kind, read):
    path = tmp_path / {"too long a name": "x" * 300, "no name": "a\0b"}.get(kind, "path")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "broken link":
        path.symlink_to(tmp_path / "gone")
    elif kind == "loop":
        path.symlink_to(path)
    says = "is not a plain file" if kind in ("folder", "pipe") else "cannot read"
    with pytest.raises(CheckpointError, match=says) as error:
        read(path)
    assert str(path) in str(error.value)


def test_a_file_without_permission_is_refused_with_the_reason(unprivileged_folder):
    path = unprivileged_folder / "params.json"
    path.write_bytes(b"{}")
    path.chmod(0)
    with pytest.raises(CheckpointError, match=r"cannot read .*params\.json: Permission denied"):
        read_head(path)


TEXT_FILES = ("*.json", "*.model", "checklist.chk")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("form", ["native", "hugging_face"])
def test_byte_order_marks_change_nothing_in_any_file_of_a_checkpoint(tmp_path, form, encoding):
    folder = tiny_folder(tmp_path / "tiny")
    if form == "hugging_face":
        folder = to_hugging_face(folder, tmp_path / "hf", max_shard_bytes=20_000)  # then it has an index
    expected = Llama.build(folder, device="cpu", max_seq_len=32).generate([[1, 2]], 4)
    for pattern in TEXT_FILES:
        for path in folder.glob(pattern):
            path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))
        write_checklist(folder, force=True)
    list_path = folder / "checklist.chk"
    list_path.write_bytes(list_path.read_bytes().decode().encode(encoding))
    report = verify(folder)
    assert (report.exit_code, report.notes) == (0, [])
    llama = Llama.build(folder, device="cpu", max_seq_len=32, verify="always")
    assert llama.generate([[1, 2]], 4) == expected


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_saved_conversation_may_have_a_byte_order_mark(tmp_path, encoding):
    dialog = [{"role": "user", "content": "Qu'est-ce que 한국어?"}]
    (tmp_path / "talk.json").write_bytes(json.dumps(dialog, ensure_ascii=False).encode(encoding))
    session = Session(Llama.build(tiny_folder(tmp_path / "tiny"), device="cpu", max_seq_len=512))
    session.load(tmp_path / "talk.json")
    assert session.dialog == dialog


@pytest.mark.parametrize("data", [b"\xff\xfe\x00", b"\xfe\xff\xd8", b"plain", b"", b"\xef\xbb"])
def test_what_has_no_mark_or_is_no_text_is_left_alone(data):
    assert as_utf8(data) == data
