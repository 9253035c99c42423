"""Tell two checkpoints apart without reading all of them: by shapes, sizes, checksums and samples.

The last bytes of a .pth are its archive's directory, with the CRC-32 of every tensor. Safetensors
have no checksums, so blocks at fixed offsets are compared.
"""

import hashlib
import os
from dataclasses import asdict
from pathlib import Path

from llama_ref.args import ModelArgs
from llama_ref.checkpoint.folder import CheckpointFolder
from llama_ref.checkpoint.verify.checklist import read_checklist
from llama_ref.errors import CheckpointError
from llama_ref.files import opened

END_BYTES = 256 << 10  # of the beginning and of the end of a file
SAMPLES = 128  # between them
SAMPLE_BYTES = 4096
SHOWN_DIGITS = 12  # of 64, in an error


def fingerprint(folder: CheckpointFolder, args: ModelArgs, tokenizer: str | Path | None) -> dict[str, object]:
    """Facts about a checkpoint, by name, that are equal for two copies of the same one.

    Includes the checksums in checklist.chk, if there is one. Raises CheckpointError for a file that
    cannot be read.
    """
    facts: dict[str, object] = asdict(args)
    facts["the list of weight files"] = ", ".join(shard.name for shard in folder.weights)
    for shard in folder.weights:
        facts[f"the size of {shard.name}"], facts[f"the digest of {shard.name}"] = _sampled(shard)
    if tokenizer is not None:
        facts["the size of the tokenizer"], facts["the digest of the tokenizer"] = _sampled(Path(tokenizer), whole=True)
    return facts | _listed_sums(folder)


def _listed_sums(folder: CheckpointFolder) -> dict[str, object]:
    """The weights' checksums in checklist.chk; empty if missing or broken, which loading reports."""
    if folder.checklist is None:
        return {}
    try:
        entries = read_checklist(folder.checklist).entries
    except CheckpointError:
        return {}
    names = {shard.name for shard in folder.weights}
    return {f"the listed {each.algorithm} of {each.name}": each.sum[:SHOWN_DIGITS] for each in entries if each.name in names}


def _sampled(path: Path, whole: bool = False) -> tuple[str, str]:
    """A file's size, and a digest of its samples or of the whole file."""
    digest = hashlib.sha256()
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        for start, length in [(0, size)] if whole else _blocks(size):
            file.seek(start)
            digest.update(file.read(length))
    return f"{size:,} bytes", digest.hexdigest()[:SHOWN_DIGITS]


def _blocks(size: int) -> list[tuple[int, int]]:
    """(start, length) of the samples of a file: all of a small one."""
    if size <= 2 * END_BYTES + SAMPLES * SAMPLE_BYTES:
        return [(0, size)]
    between = size - 2 * END_BYTES - SAMPLE_BYTES
    starts = [END_BYTES + between * i // (SAMPLES - 1) for i in range(SAMPLES)]
    return [(0, END_BYTES), *((start, SAMPLE_BYTES) for start in starts), (size - END_BYTES, END_BYTES)]
