"""Small folders in Meta's layout, for tests of what happens to files."""

import base64
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from make_random_checkpoint import make_random_checkpoint

PARAMS = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 4,
    "vocab_size": 512,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
}


def byte_tokenizer(path: Path) -> Path:
    """A tokenizer.model of the 256 single bytes; with Llama 3's special tokens, its vocabulary is 512."""
    path.write_bytes(b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)))
    return path


def tiny_folder(path: Path, **options: Any) -> Path:
    """A whole folder with tokenizer and checklist, of random weights; `options` are make_random_checkpoint's."""
    return make_random_checkpoint(path, PARAMS, tokenizer=byte_tokenizer(path.with_name(f"{path.name}.model")), **options)


@contextmanager
def growing(path: Path, begun: int) -> Iterator[None]:
    """A download under way: the file has its first `begun` bytes, and while the block runs more come, one after another."""
    whole = path.read_bytes()
    path.write_bytes(whole[:begun])
    stop = threading.Event()

    def download() -> None:
        with path.open("ab", buffering=0) as file:
            for byte in whole[begun:]:
                if stop.wait(0.01):
                    return
                file.write(bytes([byte]))

    thread = threading.Thread(target=download)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
