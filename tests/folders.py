"""Small folders in Meta's layout, for tests of file handling."""

import base64
import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from background import background
from llama_ref.checkpoint.integrity import write_checklist
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
    """A complete folder with random weights; `options` are make_random_checkpoint's."""
    return make_random_checkpoint(path, PARAMS, tokenizer=byte_tokenizer(path.with_name(f"{path.name}.model")), **options)


def talking_folder(path: Path, answer: str) -> Path:
    """A complete folder whose model answers a newline with this text: at most 30 distinct bytes."""
    tiny_folder(path)
    tokens = [*b"\n", *answer.encode(), 256 + 9]  # the last is <|eot_id|>
    tensors = torch.load(path / "consolidated.00.pth")
    for name, tensor in tensors.items():
        tensor.fill_(1 if name.endswith("norm.weight") else 0)
    for i, (token, following) in enumerate(itertools.pairwise(tokens)):
        tensors["tok_embeddings.weight"][token, i] = 1
        tensors["output.weight"][following, i] = 1
    torch.save(tensors, path / "consolidated.00.pth")
    write_checklist(path, force=True)
    return path


@contextmanager
def growing(path: Path, begun: int) -> Iterator[None]:
    """A running download: the file has its first `begun` bytes, and grows during the block."""
    whole = path.read_bytes()
    path.write_bytes(whole[:begun])

    def download(stop: threading.Event) -> None:
        with path.open("ab", buffering=0) as file:
            for byte in whole[begun:]:
                if stop.wait(0.01):
                    return
                file.write(bytes([byte]))

    with background(download):
        yield
