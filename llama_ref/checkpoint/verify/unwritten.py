"""Find parts of a damaged file that were reserved on the disk but never written."""

from pathlib import Path

BLOCK_BYTES = 4096  # weights hold no run of zeros this long, except in rows that were never trained
LEAST_BYTES = 64
N_BLOCKS = 256  # spread over the file


def zero_block(path: Path) -> int | None:
    """The offset of a block of zero bytes, looking at up to 256 blocks, the last one included.

    None without such a block, or if the file cannot be read. Downloaders that reserve a file's whole length
    leave such blocks when they are interrupted.
    """
    try:
        size = path.stat().st_size
        block = min(BLOCK_BYTES, max(LEAST_BYTES, size // N_BLOCKS))
        with path.open("rb", buffering=0) as file:
            for offset in _offsets(size, block):
                file.seek(offset)
                data = file.read(block)
                if len(data) == block and not any(data):
                    return offset
    except OSError:
        pass
    return None


def _offsets(size: int, block: int) -> list[int]:
    last = max(0, size - block)
    return sorted({last * n // (N_BLOCKS - 1) for n in range(N_BLOCKS)})
