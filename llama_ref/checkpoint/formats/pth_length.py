"""Compute the complete size of a `.pth` that may be truncated or overlong.

`torch.save` writes the pickle first, then the storages, then the zip directory. So the end of a
file tells where everything should be, and the beginning of a truncated one tells how much is
missing.
"""

import os
import zlib
from pathlib import Path
from typing import BinaryIO

from llama_ref.checkpoint.formats.pth_pickle import PICKLE_LIMIT_BYTES, RefusedPickle, read_tensor_pickle
from llama_ref.checkpoint.formats.pth_zip import (
    CENTRAL,
    CENTRAL_SIGNATURE,
    END,
    END64,
    END64_SIGNATURE,
    IN_ZIP64,
    LOCAL,
    LOCAL_SIGNATURE,
    LOCATOR64,
    read_at,
    read_end,
)

DESCRIPTOR_SIGNATURE = b"PK\7\x08"
DESCRIPTOR_LENGTHS = (16, 24)  # after each record's data; the longer one if the sizes need 64 bits
SMALL_RECORD_BYTES = 4096  # enough for version, byteorder and similar
TRAILER_BYTES = END64.size + LOCATOR64.size + END.size


def archive_length(path: str | Path) -> int | None:
    """The size in bytes of the complete `.pth`, from its end or else from its beginning.

    For a file truncated among the tensors the result is too small by the padding between the
    missing ones (under 200 bytes each). None if the file is too damaged to tell.
    """
    with Path(path).open("rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        return _length_from_end(file, size) or _Walk(file, size).length()


def _length_from_end(file: BinaryIO, size: int) -> int | None:
    end = read_end(file, size)
    if end is None or not _both_ends_agree(file, size, end.directory_offset, end.directory_size):
        return None
    if read_at(file, end.directory_offset, 4) == CENTRAL_SIGNATURE:  # nothing before it is missing
        ends = end.directory_offset + end.directory_size
        return ends + (TRAILER_BYTES if read_at(file, ends, 4) == END64_SIGNATURE else size - end.tail_offset)
    begins = end.tail_offset - end.directory_size
    if begins >= 0 and read_at(file, begins, 4) == CENTRAL_SIGNATURE:  # moved
        return size + end.directory_offset - begins
    return None


def _both_ends_agree(file: BinaryIO, size: int, offset: int, directory_size: int) -> bool:
    """Whether the 32-bit end record agrees with the 64-bit one: a flipped bit must not mislead."""
    *_, size32, offset32, _ = END.unpack(read_at(file, size - END.size, END.size))
    return size32 in (directory_size, IN_ZIP64) and offset32 in (offset, IN_ZIP64)


class _Walk:
    """Reads an archive record by record from the beginning, as far as it goes."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size
        self.storages: dict[str, int] = {}  # key -> bytes, filled when the pickle is read
        self.names: list[str] = []

    def length(self) -> int | None:
        at = 0
        while (signature := read_at(self.file, at, 4)) == LOCAL_SIGNATURE:
            after = self._after_record(at)
            if after is None:
                return None
            if after >= self.size:
                return after + self._remaining_bytes()
            at = after
        if signature == CENTRAL_SIGNATURE:
            return self._after_directory(at)
        return at + self._remaining_bytes() if len(signature) < 4 and self.storages else None

    def _after_record(self, at: int) -> int | None:
        """Where the record at `at` ends, descriptor included; None if unknown."""
        head = read_at(self.file, at, LOCAL.size)
        if len(head) < LOCAL.size:
            return at + LOCAL.size if self.storages else None
        *_, name_length, extra_length = LOCAL.unpack(head)
        name = read_at(self.file, at + LOCAL.size, name_length).decode("utf-8", "backslashreplace")
        begins = at + LOCAL.size + name_length + extra_length
        length = self._data_length(name, begins)
        if length is None:
            return None
        self.names.append(name)
        self.storages.pop(name.rpartition("/data/")[2], None)
        return self._after_descriptor(begins + length)

    def _data_length(self, name: str, begins: int) -> int | None:
        key = name.rpartition("/data/")[2]
        if key in self.storages:
            return self.storages[key]
        if name.endswith("/data.pkl"):
            return self._read_pickle(read_at(self.file, begins, PICKLE_LIMIT_BYTES))
        found = read_at(self.file, begins, SMALL_RECORD_BYTES).find(DESCRIPTOR_SIGNATURE)
        if found < 0 and begins + SMALL_RECORD_BYTES > self.size and self.storages:
            return self.size - begins  # truncated within a small record
        return found if found >= 0 else None

    def _read_pickle(self, data: bytes) -> int | None:
        """Remember the storages that must follow; return the pickle's length, None if damaged."""
        try:
            tensors, length = read_tensor_pickle(data)
        except RefusedPickle:
            return None
        signature, crc = data[length : length + 4], int.from_bytes(data[length + 4 : length + 8], "little")
        if signature != DESCRIPTOR_SIGNATURE or crc not in (0, zlib.crc32(data[:length])):
            return None
        self.storages = {tensor.storage.key: tensor.storage.nbytes for tensor in tensors.values()}
        return length

    def _after_descriptor(self, at: int) -> int:
        if read_at(self.file, at, 4) != DESCRIPTOR_SIGNATURE:
            return at
        for length in DESCRIPTOR_LENGTHS:
            if read_at(self.file, at + length, 4) in (LOCAL_SIGNATURE, CENTRAL_SIGNATURE):
                return at + length
        return at + DESCRIPTOR_LENGTHS[0]

    def _remaining_bytes(self) -> int:
        n_records = len(self.names) + len(self.storages)
        return sum(self.storages.values()) + n_records * CENTRAL.size + sum(map(len, self.names)) + TRAILER_BYTES

    def _after_directory(self, at: int) -> int | None:
        for name in self.names:
            head = read_at(self.file, at, CENTRAL.size)
            if len(head) == CENTRAL.size:
                if head[:4] != CENTRAL_SIGNATURE:
                    return None
                fields = CENTRAL.unpack(head)
                at += CENTRAL.size + sum(fields[10:13])  # name, extra field, comment
            else:
                at += CENTRAL.size + len(name.encode())
        return at + TRAILER_BYTES
