"""Every fault of a folder is reported with the right file, state and advice."""

import base64
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attempts import attempts
from folders import growing, tiny_folder
from llama_ref.checkpoint.integrity import verify, write_checklist
from llama_ref.checkpoint.verify.checklist import read_checklist
from llama_ref.checkpoint.verify.hashing import hash_file
from llama_ref.checkpoint.verify.report import State
from llama_ref.checkpoint.writing.quantized_writer import quantize_folder
from llama_ref.errors import CheckpointError, RequestError
from llama_ref.formatting import human_bytes
from make_random_checkpoint import make_random_checkpoint

TINY = {
    "dim": 32,
    "n_layers": 1,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 512,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
}
SHARD0, SHARD1 = "consolidated.00.pth", "consolidated.01.pth"
HTML = b"<!DOCTYPE html>\n<html><body>Sign in to continue</body></html>"


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    """A sound folder: two shards, a vocabulary of single bytes, a checklist."""
    base = tmp_path_factory.mktemp("integrity")
    lines = [base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)]
    (base / "bytes.model").write_bytes(b"".join(lines))
    return make_random_checkpoint(base / "whole", TINY, shards=2, tokenizer=base / "bytes.model")


@pytest.fixture
def folder(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "folder"))


def states(report) -> dict[str, State]:
    return {file.name: file.state for file in report.bad}


def cut(path: Path, n_bytes: int) -> None:
    os.truncate(path, path.stat().st_size - n_bytes)


def change(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def resave(path: Path, edit) -> None:
    tensors = torch.load(path, weights_only=True)
    edit(tensors)
    torch.save(tensors, path)


def poison(tensors) -> None:
    tensors["norm.weight"][3] = float("nan")
    tensors["layers.0.attention.wq.weight"][0, :2] = float("-inf")


def test_a_whole_folder_is_whole(folder):
    report = verify(folder)
    assert report.ok and report.exit_code == 0 and report.summary() == "all 4 files are whole"
    assert {file.name: file.found_sum for file in report.files} == {
        entry.name: entry.sum for entry in read_checklist(folder / "checklist.chk").entries
    }
    assert all(file.size == (folder / file.name).stat().st_size and file.seconds > 0 for file in report.files)


def written(content: bytes):
    return lambda path: path.write_bytes(content)


def appended(content: bytes):
    return lambda path: path.write_bytes(path.read_bytes() + content)


def replaced_by(make):
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


def part_fetched(path: Path) -> None:
    path.rename(path.with_name(f"{path.name}.part"))


def one_more(path: Path) -> None:
    shutil.copy(path.with_name(SHARD0), path)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:"
PARAMS, TOKENIZER, SHARD2 = "params.json", "tokenizer.model", "consolidated.02.pth"
FAULTS = {  # file, change, expected state, words of the summary
    "removed": (SHARD1, Path.unlink, State.MISSING, "is missing: fetch it"),
    "part fetched": (SHARD1, part_fetched, State.MISSING, "its download has not finished"),
    "empty": (SHARD0, written(b""), State.EMPTY, "did not start"),
    "cut by a byte": (SHARD1, lambda path: cut(path, 1), State.CUT_SHORT, "1 byte short: the download broke off"),
    "cut in the directory": (SHARD1, lambda path: cut(path, 500), State.CUT_SHORT, "500 bytes short"),
    "cut in half": (SHARD1, lambda path: os.truncate(path, 20_000), State.CUT_SHORT, "is 29.6 kB short"),
    "cut to its head": (SHARD1, lambda path: os.truncate(path, 700), State.CUT_SHORT, "kB short"),
    "cut params": (PARAMS, lambda path: cut(path, 5), State.CUT_SHORT, "broke off"),
    "cut tokenizer": (TOKENIZER, lambda path: cut(path, 99), State.CUT_SHORT, "broke off"),
    "longer": (SHARD0, appended(b"x" * 2000), State.LONGER, "2 kB too long"),
    "longer params": (PARAMS, appended(b"{}"), State.LONGER, "delete it"),
    "longer tokenizer": (TOKENIZER, appended(b"x"), State.LONGER, "delete it"),
    "a bit flipped": (SHARD1, lambda path: change(path, 9000), State.DAMAGED, "right length, wrong sum"),
    "params changed": (PARAMS, lambda path: change(path, 8), State.DAMAGED, "not what was published"),
    "tokenizer changed": (TOKENIZER, lambda path: change(path, 90), State.DAMAGED, "fetch that file again"),
    "a web page": (SHARD0, written(HTML), State.WEB_PAGE, "fresh link"),
    "a JSON error": (SHARD0, written(b'{"error": "403"}'), State.ERROR_BODY, "refused the download"),
    "an XML error": (SHARD0, written(b"<Error><Code>AccessDenied"), State.ERROR_BODY, "fresh link"),
    "a pointer": (SHARD0, written(POINTER), State.POINTER, "git lfs pull"),
    "set aside": (SHARD0, written(bytes(90_000)), State.UNWRITTEN, "never written"),
    "a folder": (SHARD0, replaced_by(Path.mkdir), State.UNREADABLE, "not a plain file"),
    "a pipe": (SHARD0, replaced_by(os.mkfifo), State.UNREADABLE, "not a plain file"),
    "one more": (SHARD2, one_more, State.EXTRA, "the checklist does not name it"),
    "a dangling link": (SHARD0, replaced_by(lambda path: path.symlink_to("gone")), State.MISSING, "fetch it"),
    "a link out": (SHARD0, replaced_by(lambda path: path.symlink_to("/etc/passwd")), State.REFUSED, "leads out"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_state_and_its_advice(folder, settled, fault):
    name, break_it, state, words = FAULTS[fault]
    break_it(folder / name)
    report = verify(folder)
    assert states(report) == {name: state}
    assert report.exit_code == 1 and not report.ok
    assert words in report.summary() and name in report.summary()
    assert f"{len(report.files) - 1} of {len(report.files)} files are whole" in report.summary()


QUIETLY_WRONG = {
    "a bit flipped",
    "params changed",
    "tokenizer changed",
    "longer tokenizer",
}  # found only by checksums


@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - QUIETLY_WRONG))
def test_quick_finds_all_but_silent_damage(folder, settled, fault):
    name, break_it, state, _ = FAULTS[fault]
    break_it(folder / name)
    report = verify(folder, quick=True)
    assert states(report) == {name: state}
    assert all(file.found_sum is None for file in report.files)


def test_quick_on_a_sound_folder_hashes_nothing(folder):
    report = verify(folder, quick=True)
    assert report.exit_code == 0 and {file.state for file in report.files} == {State.SOUND}
    assert report.summary() == "all 4 files are sound as far as could be checked"


def test_swapped_files_are_named_by_what_they_hold(folder, settled):
    (folder / SHARD0).rename(folder / "x")
    (folder / SHARD1).rename(folder / SHARD0)
    (folder / "x").rename(folder / SHARD1)
    report = verify(folder)
    assert states(report) == {SHARD0: State.MISNAMED, SHARD1: State.MISNAMED}
    assert f"its content is that of {SHARD1}" in report.summary()
    assert "if another file has that name, move that one away first" in report.summary()


@pytest.mark.parametrize(("source", "target"), [(SHARD0, SHARD1), (SHARD1, SHARD0), ("params.json", "tokenizer.model")])
def test_a_file_copied_over_another_is_a_copy_that_no_renaming_mends(folder, settled, source, target):
    shutil.copy(folder / source, folder / target)
    report = verify(folder)
    assert states(report) == {target: State.COPY}
    assert f"{target} is a copy (of {source}, which is here too): its own content is missing" in report.summary()


@pytest.mark.parametrize("quick", [True, False])
def test_a_copied_shard_is_found_without_a_list_too(folder, settled, quick):
    (folder / "checklist.chk").unlink()
    shutil.copy(folder / SHARD0, folder / SHARD1)
    report = verify(folder, quick=quick)
    assert states(report) == {SHARD1: State.COPY} and report.exit_code == 1
    with pytest.raises(CheckpointError, match="no list was written"):
        write_checklist(folder)


def reserved(path: Path) -> None:
    """Zero the last half of the file, as if it was reserved but never written."""
    size = path.stat().st_size
    os.truncate(path, size // 2)
    os.truncate(path, size)


def with_a_hole(path: Path) -> None:
    """Leave a hole like an interrupted download over several connections: both ends are there."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 4)
        file.write(bytes(size // 2))


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("fill", [reserved, with_a_hole])
def test_a_partly_filled_file_is_unwritten(folder, settled, fill, listed):
    if not listed:
        (folder / "checklist.chk").unlink()
    fill(folder / SHARD1)
    report = verify(folder)
    assert states(report) == {SHARD1: State.UNWRITTEN} and report.exit_code == 1
    assert "zero bytes at" in report.summary() and "never written, fetch that file again" in report.summary()


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("name", [SHARD1, "params.json", "tokenizer.model"])
def test_what_neither_folder_nor_list_has_is_missing(folder, settled, name, quick):
    (folder / name).unlink()
    path = folder / "checklist.chk"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if name not in line))
    report = verify(folder, quick=quick)
    assert states(report) == {name: State.MISSING} and report.exit_code == 1
    assert f"{name} is missing (checklist.chk does not name it either): fetch it" in report.summary()


@pytest.mark.parametrize("quick", [True, False])
def test_a_file_that_the_list_does_not_name_has_nothing_to_be_compared_with(folder, quick):
    path = folder / "checklist.chk"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if SHARD1 not in line))
    report = verify(folder, quick=quick)
    assert not report.bad and report.exit_code == 3
    assert report.summary().endswith(f"checklist.chk does not name {SHARD1}, so the bytes cannot be verified")


def test_wherever_a_list_breaks_off_only_the_list_is_to_blame(folder, settled):
    path = folder / "checklist.chk"
    whole = path.read_bytes()
    for length in range(1, len(whole) - 1):
        path.write_bytes(whole[:length])
        report = verify(folder, quick=length % 10 != 0)
        ends_a_line = whole[length : length + 1] == b"\n" or whole[length - 1 : length] == b"\n"
        assert states(report) == ({} if ends_a_line else {"checklist.chk": State.CUT_SHORT}), whole[:length]
        assert report.exit_code == 3 and not report.notes
    path.write_bytes(whole[:-1])
    assert verify(folder).exit_code == 0


def test_links_within_the_folder_and_into_a_hub_caches_blobs_are_followed(folder, tmp_path):
    (folder / "real").mkdir()
    (folder / SHARD0).rename(folder / "real" / "s0")
    (folder / SHARD0).symlink_to("real/s0")
    assert verify(folder).ok
    hub = tmp_path / "models--meta-llama--x"
    snapshot = hub / "snapshots" / "abc" / "original"
    snapshot.mkdir(parents=True)
    (hub / "blobs").mkdir()
    for file in list(folder.iterdir()):
        if file.is_file():
            shutil.copy(file, hub / "blobs" / f"sum-{file.name}")
            (snapshot / file.name).symlink_to(Path("../../../blobs") / f"sum-{file.name}")
    assert verify(snapshot.parent).ok, "the repository's folder leads to its original/"
    (snapshot / SHARD0).unlink()
    (snapshot / SHARD0).symlink_to(folder / "real" / "s0")
    assert states(verify(snapshot)) == {SHARD0: State.REFUSED}


@pytest.mark.parametrize("quick", [True, False])
def test_missing_shards_are_named_without_a_list_too(folder, settled, quick):
    (folder / "checklist.chk").unlink()
    (folder / SHARD1).unlink()  # only the shapes in shard 00 imply two shards
    report = verify(folder, quick=quick)
    assert states(report) == {SHARD1: State.MISSING} and report.exit_code == 1


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("listed", [True, False])
def test_a_quantized_folder_is_checked_too(folder, settled, tmp_path, listed, quick):
    quantized = quantize_folder(folder, tmp_path / "int8", "int8")
    if not listed:
        (quantized / "checklist.chk").unlink()
    report = verify(quantized, quick=quick)
    assert not report.bad and report.exit_code == (0 if listed else 3)
    [weights] = quantized.glob("*.safetensors")
    cut(weights, 100)
    assert states(verify(quantized, quick=quick)) == {weights.name: State.CUT_SHORT}
    weights.unlink()
    missing = weights.name if listed else "consolidated.00.pth"
    assert states(verify(quantized, quick=quick)) == {missing: State.MISSING}


def test_a_shard_of_another_split_is_extra(folder):
    (folder / "checklist.chk").unlink()
    shutil.copy(folder / SHARD1, folder / "consolidated.02.pth")
    report = verify(folder, quick=True)
    assert states(report) == {"consolidated.02.pth": State.EXTRA}
    assert "imply 2 shards" in report.summary()


def test_no_list_is_said_in_one_line_and_the_archives_own_sums_are_used(folder, settled):
    (folder / "checklist.chk").unlink()
    for quick in (True, False):
        report = verify(folder, quick=quick)
        assert report.exit_code == 3 and not report.bad
        assert "there is no checklist.chk" in report.summary() and "\n" not in report.summary()
    change(folder / SHARD1, 9000)  # a weight
    report = verify(folder)
    assert report.exit_code == 1 and states(report) == {SHARD1: State.DAMAGED} and "CRC-32" in report.summary()


@pytest.mark.parametrize(
    "content, state, words",
    [
        (HTML, State.WEB_PAGE, "fresh link"),
        (b"", State.EMPTY, "did not start"),
        (b"no sums here\n", State.DAMAGED, "no line of the form"),
        (b"0" * 32 + b"  ../outside\n", State.DAMAGED, "outside the folder"),
    ],
)
def test_a_bad_list_is_reported_and_the_rest_still_looked_at(folder, settled, content, state, words):
    (folder / "checklist.chk").write_bytes(content)
    report = verify(folder)
    assert states(report) == {"checklist.chk": state} and report.exit_code == 3
    assert "checklist.chk could not be used" in report.summary() and words in report.summary()
    cut(folder / SHARD0, 1)
    assert verify(folder).exit_code == 1


def test_a_list_with_odd_lines_is_used_and_they_are_noted(folder):
    with (folder / "checklist.chk").open("a") as file:
        file.write("# fine\nnot fine\n")
    report = verify(folder)
    assert report.ok and "skipped: 6" in report.notes[0]


def test_no_folder_and_an_empty_one_could_not_be_checked(tmp_path):
    for path, words in ((tmp_path / "none", "no such folder"), (tmp_path, "holds no params.json")):
        report = verify(path)
        assert report.exit_code == 2 and words in report.summary()


def test_wrong_tensors_under_right_sums_do_not_fit(folder, settled):
    resave(folder / SHARD1, lambda tensors: tensors.update({"norm.weight": torch.ones(31), "stray": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"no list was written.*does not fit"):
        write_checklist(folder, force=True)
    lines = [entry for entry in read_checklist(folder / "checklist.chk").entries if entry.name != SHARD1]
    listed = "".join(f"{entry.sum}  {entry.name}\n" for entry in lines) + f"{hash_file(folder / SHARD1)}  {SHARD1}\n"
    (folder / "checklist.chk").write_text(listed)
    report = verify(folder)
    assert states(report) == {SHARD1: State.MISFIT}
    assert "norm.weight has shape (31,), expected (32,); stray is unexpected" in report.summary()


def test_deep_names_the_tensors_that_hold_nan_or_infinity(folder):
    resave(folder / SHARD1, poison)
    write_checklist(folder, force=True)
    assert verify(folder).ok
    report = verify(folder, deep=True)
    assert states(report) == {SHARD1: State.NOT_FINITE}
    assert "norm.weight: 1 NaN, 0 infinite" in report.summary()
    assert "layers.0.attention.wq.weight: 0 NaN, 2 infinite" in report.summary()


def test_a_growing_download_is_noticed(folder):
    with growing(folder / SHARD1, 5000):
        for quick in (True, False):
            report = verify(folder, quick=quick)
            assert states(report) == {SHARD1: State.GROWING}
            assert "a download is still writing it" in report.summary()


def test_json_has_all_that_a_script_needs(folder, settled):
    cut(folder / SHARD1, 10)
    report = json.loads(verify(folder).to_json())
    assert (report["ok"], report["exit_code"], report["folder"]) == (False, 1, str(folder))
    bad = next(file for file in report["files"] if not file["ok"])
    assert (bad["name"], bad["state"], bad["expected_size"] - bad["size"]) == (SHARD1, "cut short", 10)
    assert bad["advice"] in report["summary"]


# --- any single fault, anywhere ---------------------------------------------------------------------------------------

FILES = [PARAMS, SHARD0, SHARD1, TOKENIZER]
NAMED_AS = {  # faults in text files may look alike: half a JSON object is both cut and damaged
    "flip": {State.DAMAGED, State.UNWRITTEN},
    "cut": {State.CUT_SHORT, State.EMPTY},
    "append": {State.LONGER},
    "duplicate": {State.LONGER},
    "swap": {State.DAMAGED},
}


@pytest.mark.attack
@settings(max_examples=attempts(400), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_single_fault_is_found_in_the_right_file(original, settled, tmp_path_factory, data):
    name = data.draw(st.sampled_from(FILES))
    kind = data.draw(st.sampled_from(sorted(NAMED_AS)))
    content = (original / name).read_bytes()
    broken = data.draw(broken_by(kind, content))
    if broken.strip() == content.strip():  # a line break at the end has no state of its own
        return
    (original / name).write_bytes(broken)
    try:
        found = states(verify(original))
    finally:
        (original / name).write_bytes(content)
    assert found.keys() == {name}
    exact = name.endswith(".pth") or kind in ("cut", "append")
    assert found[name] in (NAMED_AS[kind] if exact else {State.DAMAGED, State.LONGER, State.CUT_SHORT}), (kind, found)


@st.composite
def broken_by(draw, kind: str, content: bytes) -> bytes:
    at = draw(st.integers(0, len(content) - 1))
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
    if kind == "cut":
        return content[:at]
    if kind == "append":
        return content + b"x" + draw(st.binary(max_size=50))
    other = draw(st.integers(at, len(content) - 1)) + 1
    if kind == "duplicate":
        return content[:other] + content[at:other] + content[other:]
    half = (other - at) // 2
    return (
        content[:at]
        + content[other - half : other]
        + content[at + half : other - half]
        + content[at : at + half]
        + content[other:]
    )


# --- writing a list ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm, tool", [("md5", "md5sum"), ("sha256", "sha256sum")])
def test_a_written_list_is_read_by_the_system_and_by_us(folder, algorithm, tool):
    (folder / "checklist.chk").unlink()
    assert write_checklist(folder, algorithm) == folder / "checklist.chk"
    said = subprocess.run([tool, "--strict", "-c", "checklist.chk"], cwd=folder, capture_output=True, text=True)
    assert said.returncode == 0 and said.stdout.count(": OK") == 4
    assert verify(folder).summary() == "all 4 files are whole"
    assert sorted(path.name for path in folder.iterdir()) == sorted([*FILES, "checklist.chk"])


def test_a_list_is_not_written_over_another_or_over_a_broken_folder(folder, settled):
    before = (folder / "checklist.chk").read_bytes()
    with pytest.raises(RequestError, match="--force replaces it"):
        write_checklist(folder)
    with pytest.raises(RequestError, match="expected md5 or sha256"):
        write_checklist(folder, "crc32", force=True)
    cut(folder / SHARD0, 1)
    with pytest.raises(CheckpointError, match=f"no list was written.*{SHARD0} is 1 byte short"):
        write_checklist(folder, force=True)
    assert (folder / "checklist.chk").read_bytes() == before


@pytest.mark.parametrize("list_before", [HTML, b"0" * 32 + b"  gone.pth\n"])
def test_force_replaces_a_list_whatever_it_says(folder, list_before):
    (folder / "checklist.chk").write_bytes(list_before)
    write_checklist(folder, force=True)
    assert verify(folder).summary() == "all 4 files are whole"


@pytest.mark.parametrize("jobs", [0, -1, 1.5])
def test_a_number_of_jobs_that_is_none_is_refused(folder, jobs):
    with pytest.raises(RequestError, match="jobs is"):
        verify(folder, jobs=jobs)


def test_an_interrupt_stops_the_reading_of_weights(folder):
    (folder / "checklist.chk").unlink()

    def interrupt(path, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        verify(folder, deep=True, progress=interrupt)


@pytest.mark.parametrize(
    "n, text",
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (1_234_567, "1.23 MB"), (999_950, "1 MB"), (51.27e9, "51.3 GB")],
)
def test_sizes_read_well(n, text):
    assert human_bytes(n) == text


def test_a_list_that_may_not_be_read_is_unreadable(unprivileged_folder):
    folder = unprivileged_folder / "model"
    tiny_folder(folder)
    (folder / "checklist.chk").chmod(0)
    report = verify(folder)
    assert states(report) == {"checklist.chk": State.UNREADABLE} and report.exit_code == 3
    assert "checklist.chk is unreadable (" in report.summary() and "make it readable" in report.summary()
