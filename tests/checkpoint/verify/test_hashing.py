"""Checksums are right at every size, errors stay with their file, and an interrupt stops all."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from llama_ref.checkpoint.verify.hashing import READ_BYTES, hash_file, hash_files


@pytest.mark.parametrize("size", [0, 1, READ_BYTES - 1, READ_BYTES, READ_BYTES + 1, 3 * READ_BYTES + 17])
@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_sums_equal_hashlibs_at_every_edge_of_the_buffer(tmp_path, size, algorithm):
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(content)
    assert hash_file(tmp_path / "file", algorithm) == hashlib.new(algorithm, content).hexdigest()


def test_progress_counts_each_files_bytes_up_to_the_last(tmp_path):
    sizes = {tmp_path / str(n): n * READ_BYTES + 5 for n in range(1, 4)}
    for path, size in sizes.items():
        path.write_bytes(bytes(size))
    seen: dict[Path, list[int]] = {}
    hash_files(
        [(path, "md5") for path in sizes], jobs=2, progress=lambda path, done, total: seen.setdefault(path, []).append(done)
    )
    assert all(done == sorted(done) and done[-1] == sizes[path] for path, done in seen.items()) and seen.keys() == sizes.keys()


def test_an_unreadable_file_does_not_stop_the_others(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    found = hash_files([(tmp_path / "a", "md5"), (tmp_path / "gone", "md5")])
    assert found[tmp_path / "a"].sum == hashlib.md5(b"x").hexdigest() and isinstance(found[tmp_path / "gone"], OSError)


def test_an_exception_in_one_thread_stops_the_hashing_of_all(tmp_path):
    for name in "abcd":
        with (tmp_path / name).open("wb") as file:
            file.truncate(4 << 30)  # sparse; hashing it takes seconds

    def interrupt(path, done, total):
        raise KeyboardInterrupt

    begun = time.process_time()
    with pytest.raises(KeyboardInterrupt):
        hash_files([(tmp_path / name, "md5") for name in "abcd"], jobs=2, progress=interrupt)
    assert time.process_time() - begun < 2
