"""Lists are read as md5sum reads them, and never name files outside their folder."""

import ast
import hashlib
import os
import re
import subprocess
from pathlib import PurePosixPath

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama_ref.checkpoint.verify.checklist import format_entry, read_checklist
from llama_ref.errors import CheckpointError

MD5 = hashlib.md5(b"weights").hexdigest()
SHA = hashlib.sha256(b"weights").hexdigest()
OTHER = hashlib.md5(b"other").hexdigest()


def parse(tmp_path, text: str | bytes):
    path = tmp_path / "checklist.chk"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return [(entry.name, entry.sum) for entry in read_checklist(path).entries]


@pytest.mark.parametrize(
    "line, name",
    [
        (f"{MD5}  a.pth", "a.pth"),
        (f"{MD5} *a.pth", "a.pth"),
        (f"{MD5} *./a.pth", "a.pth"),
        (f"{MD5} a.pth", "a.pth"),
        (f"{MD5}\ta.pth", "a.pth"),
        (f"  {MD5}  a.pth\r", "a.pth"),
        (f"{MD5.upper()}  a.pth", "a.pth"),
        (f"\n# comment\n\n{MD5}  a.pth\n\n", "a.pth"),
        (f"{MD5}  original/a.pth", "original/a.pth"),
        (f"{MD5}  with space ", "with space "),
        (f"\\{MD5}  a\\\\b\\nc", "a\\b\nc"),
        (f"{MD5}  a\\nb", "a\\nb"),
        (f"MD5 (a (1).pth) = {MD5}", "a (1).pth"),
        (f"MD5(a.pth)={MD5}", "a.pth"),
        (f"\\MD5 (a\\\\b) = {MD5}", "a\\b"),
    ],
)
def test_every_form_of_md5sum_is_read(tmp_path, line, name):
    assert parse(tmp_path, line) == [(name, MD5)]


@pytest.mark.parametrize("line", [f"{SHA}  a.pth", f"SHA256 (a.pth) = {SHA}"])
def test_64_digits_mean_sha256(tmp_path, line):
    (tmp_path / "list").write_text(line)
    assert [(entry.algorithm, entry.sum) for entry in read_checklist(tmp_path / "list").entries] == [("sha256", SHA)]


def test_sha256_is_used_if_both_sums_are_given(tmp_path):
    assert parse(tmp_path, f"{SHA}  a\n{MD5}  a\n") == parse(tmp_path, f"{MD5}  a\n{SHA}  a\n") == [("a", SHA)]


def test_lines_that_md5sum_would_skip_are_numbered(tmp_path):
    (tmp_path / "list").write_text(f"{MD5}  a\nnot a line\n{MD5[:-1]}g  b\n{SHA[:40]}  c\n{MD5} reversed\n")
    found = read_checklist(tmp_path / "list")
    assert [entry.name for entry in found.entries] == ["a"]
    assert found.unread_lines == [2, 3, 4, 5]


@pytest.mark.parametrize("name", ["/etc/passwd", "../a.pth", "a/../../b", "..", "./../x"])
def test_an_entry_outside_the_folder_is_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match=r"line 2 names .* outside the folder"):
        parse(tmp_path, f"{MD5}  a.pth\n{MD5}  {name}\n")


@pytest.mark.parametrize(
    "text, message",
    [
        (f"{MD5}  a\n{OTHER}  ./a\n", "contradicts itself about 'a': line 1 .* line 2"),
        (f"{MD5}  ./\n", "is not a file"),
        (f"{MD5}  {'x/' * 20_000}y\n", "line 1 has a name of 40,001 bytes"),
        ("hello\nworld\n", "no line of the form"),
        ("# only a comment\n", "no line of the form"),
        ("<!DOCTYPE html><html>Sign in</html>", "an HTML page"),
        ('{"error": "expired"}', "a JSON error body"),
        ("<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML error body"),
        ("", "an empty file"),
        ("x" * (1 << 20) + "y", "larger than"),
    ],
)
def test_other_files_are_refused_with_the_reason(tmp_path, text, message):
    with pytest.raises(CheckpointError, match=message):
        parse(tmp_path, text)


def test_duplicates_that_agree_count_once(tmp_path):
    assert parse(tmp_path, f"{MD5}  a\n{MD5.upper()} *./a\n") == [("a", MD5)]


@given(st.binary(min_size=1, max_size=20).filter(lambda name: not set(name) & set(b"/\0") and name not in (b".", b"..")))
def test_a_written_line_is_read_back(tmp_path_factory, name):
    path = tmp_path_factory.getbasetemp() / "written.chk"
    decoded = name.decode("utf-8", "surrogateescape")
    path.write_bytes(format_entry(decoded, MD5))
    assert [(entry.name, entry.sum) for entry in read_checklist(path).entries] == [(decoded, MD5)]


# --- agreement with md5sum itself -------------------------------------------------------------------------------------

NAMES = [b"a", b" a", b"*a", b"b c", b"b c ", b"d\\e", b"f\ng", b"h)", b"(i", b"j) = k", b"\xff", b"MD5", b"l\rm"]
digests = st.sampled_from([MD5, MD5, OTHER, MD5.upper(), MD5[:-1], MD5 + "0", MD5[:-1] + "g", SHA[:40]]).map(str.encode)
names = st.sampled_from([*NAMES, b"./a", b".//b c", b"missing", rb"d\\e", rb"f\ng", rb"l\rm", rb"a\q", b"a\\", b"x\ry"])
blanks = st.sampled_from([b"", b"", b" ", b"  ", b"\t"])
slash = st.sampled_from([b"", b"", b"\\"])
plain_lines = st.tuples(blanks, slash, digests, st.sampled_from([b"  ", b"  ", b" *", b" ", b"\t", b"", b"\t*"]), names)
tagged_lines = st.tuples(
    *(blanks, slash, st.sampled_from([b"MD5", b"MD5", b"md5", b"SHA1"]), st.sampled_from([b" (", b" (", b"(", b"  (", b" "])),
    *(names, st.sampled_from([b")", b")", b""]), blanks, st.sampled_from([b"=", b"=", b"", b"=="]), blanks, digests),
    st.sampled_from([b"", b"", b" "]),
)
other_lines = st.tuples(st.sampled_from([b"", b"#", b"# comment", b" #", b" ", b"words", MD5.encode()]))
line = st.one_of(plain_lines, plain_lines, tagged_lines, other_lines).map(b"".join)
lists = st.lists(st.tuples(line, st.sampled_from([b"\n", b"\n", b"\r\n", b"\r\r\n"])).map(b"".join), max_size=6).map(b"".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("agreement")
    for name in NAMES:
        (folder / os.fsdecode(name)).write_bytes(b"weights")
    return folder


def md5sum_finds(folder, batch: list[bytes]) -> list[tuple[set[tuple[str, bool]], int]]:
    """The result of `md5sum -c` for each list: ({(name, is whole)}, number of skipped lines)."""
    for index, text in enumerate(batch):
        (folder / f"list{index}").write_bytes(text)
    script = r'for i in $(seq 1 $1); do md5sum -wc "list$((i-1))" 2>&1; printf "\0"; done'
    run = subprocess.run(
        ["bash", "-c", script, "-", str(len(batch))], cwd=folder, capture_output=True, env=os.environ | {"LC_ALL": "C"}
    )
    return [parse_md5sum(output) for output in run.stdout.split(b"\0")[:-1]]


def parse_md5sum(output: bytes) -> tuple[set[tuple[str, bool]], int]:
    found = set()
    for name, state in re.findall(rb"^(?!md5sum: )(.*): (OK|FAILED|FAILED open or read)$", output, re.MULTILINE):
        if name.startswith(b"\\"):  # an escaped name
            name = re.sub(rb"\\([nr\\])", lambda match: {b"n": b"\n", b"r": b"\r"}.get(match[1], b"\\"), name[1:])
        found.add((normal(os.fsdecode(name)), state == b"OK"))
    return found, len(re.findall(rb"improperly formatted MD5 checksum line$", output, re.MULTILINE))


def normal(name: str) -> str:
    return str(PurePosixPath(name))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(batch=st.lists(lists, min_size=50, max_size=60))
def test_thousands_of_lists_are_read_like_md5sum_reads_them(folder, batch):
    for text, (theirs, skipped) in zip(batch, md5sum_finds(folder, batch), strict=True):
        (folder / "ours").write_bytes(text)
        try:
            found = read_checklist(folder / "ours")
        except CheckpointError as error:
            if contradiction := re.search("contradicts itself about (.*): line", str(error)):
                assert (ast.literal_eval(contradiction[1]), False) in theirs
            else:
                assert theirs == set(), f"{text!r}: {error}"
            continue
        ours = {(entry.name, entry.sum == MD5 and (folder / entry.name).is_file()) for entry in found.entries}
        assert (ours, len(found.unread_lines)) == (theirs, skipped), text
