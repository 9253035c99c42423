"""Read the directory of a `.pth`'s zip archive without trusting it and without reading the data.

`torch.save` stores every record uncompressed, aligned and in order, and ends the file with the
directory. Anything else (compression, encryption, overlapping or duplicate records, a comment) is
rejected, which rules out zip bombs.
"""

import os
import struct
from dataclasses import dataclass
from typing import BinaryIO

from llama_ref.errors import CheckpointError

DIRECTORY_LIMIT_BYTES = 16 << 20  # 405B has 1,138 tensors in 80 KB of directory
END = struct.Struct("<4s4H2LH")
END64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR64 = struct.Struct("<4sLQL")
CENTRAL = struct.Struct("<4s6H3L5H2L")
LOCAL = struct.Struct("<4s5H3L2H")
END_SIGNATURE, END64_SIGNATURE, LOCATOR64_SIGNATURE = b"PK\5\6", b"PK\6\6", b"PK\6\7"
CENTRAL_SIGNATURE, LOCAL_SIGNATURE = b"PK\1\2", b"PK\3\4"
IN_ZIP64 = 0xFFFFFFFF
ZIP64_EXTRA = 1
ENCRYPTED = 1  # flag bit
FOLDER = 0x10  # bit of the external attributes


class BadArchive(CheckpointError):
    """The zip archive is damaged or was not written by `torch.save`."""


@dataclass(frozen=True, slots=True)
class Record:
    """One file in the archive, sizes in bytes. `crc` is the data's CRC-32, 0 if absent."""

    name: str
    header_offset: int
    data_offset: int
    size: int
    crc: int


@dataclass(frozen=True)
class End:
    """Where the end record says the directory is, and where it must end (`tail_offset`).

    `located_offset` is what the 64-bit locator gives for `tail_offset`, if there is one.
    """

    directory_offset: int
    directory_size: int
    n_records: int
    tail_offset: int
    located_offset: int | None = None


def read_directory(file: BinaryIO, size: int) -> list[Record]:
    """All records of an archive of `size` bytes, by offset. Reads < 20 MB. Raises BadArchive."""
    end = read_end(file, size)
    if end is None:
        raise BadArchive(
            "its zip directory is not at the end of the file: the download broke off, or something was appended; fetch it again"
        )
    if end.directory_offset + end.directory_size != end.tail_offset:
        raise BadArchive("its zip directory does not end where the archive's end record begins")
    if end.located_offset not in (None, end.tail_offset):
        raise BadArchive("its zip directory has two end records")
    if end.directory_size > DIRECTORY_LIMIT_BYTES:
        raise BadArchive(f"its zip directory claims {end.directory_size:,} bytes, more than any checkpoint needs")
    records = _parse_directory(read_at(file, end.directory_offset, end.directory_size))
    if len(records) != end.n_records:
        raise BadArchive(f"its zip directory lists {len(records):,} records, but its end record says {end.n_records:,}")
    return _with_data_offsets(file, records, end.directory_offset)


def read_end(file: BinaryIO, size: int) -> End | None:
    """The end record in the file's last bytes, not checked; None without one."""
    tail_length = min(size, END.size + LOCATOR64.size)
    tail = read_at(file, size - tail_length, tail_length)
    if tail[-END.size : -END.size + 4] != END_SIGNATURE:
        return None
    _, _, _, _, n_records, directory_size, directory_offset, comment = END.unpack(tail[-END.size :])
    if comment:
        return None
    if tail[:4] != LOCATOR64_SIGNATURE:
        return End(directory_offset, directory_size, n_records, size - END.size)
    tail_offset = size - tail_length - END64.size
    record = read_at(file, tail_offset, END64.size) if tail_offset >= 0 else b""
    if record[:4] != END64_SIGNATURE:
        return None
    *_, n_records, directory_size, directory_offset = END64.unpack(record)
    _, _, located_offset, _ = LOCATOR64.unpack(tail[: LOCATOR64.size])
    return End(directory_offset, directory_size, n_records, tail_offset, located_offset)


def read_at(file: BinaryIO, offset: int, n_bytes: int) -> bytes:
    """Read `n_bytes` at `offset`, or fewer at the end of the file; none at any offset past it."""
    if offset > os.fstat(file.fileno()).st_size:
        return b""  # `seek` raises for offsets of 64 bits
    file.seek(offset)
    return file.read(n_bytes)


def _parse_directory(data: bytes) -> list[Record]:
    """The records in the directory's order; `data_offset` is still that of the header."""
    records: list[Record] = []
    at = 0
    while at < len(data):
        if data[at : at + 4] != CENTRAL_SIGNATURE or at + CENTRAL.size > len(data):
            raise BadArchive(f"its zip directory is broken at entry {len(records):,}")
        head = CENTRAL.unpack_from(data, at)
        _, _, _, flags, method, _, _, crc, packed, size, name_length, extra_length, comment_length, *_, attributes, offset = (
            head
        )
        at += CENTRAL.size
        name = data[at : at + name_length].decode("utf-8", "backslashreplace")
        extra = data[at + name_length : at + name_length + extra_length]
        at += name_length + extra_length + comment_length
        if at > len(data):
            raise BadArchive(f"its zip directory is broken at entry {len(records):,}")
        size, packed, offset = _zip64_values(size, packed, offset, extra)
        if method or packed != size:
            raise BadArchive(f"its record {name!r} is compressed, which torch.save never does; possible zip bomb")
        if attributes & FOLDER or name.endswith("/"):  # torch.load would use uninitialized memory
            raise BadArchive(f"its record {name!r} is marked as a folder, which torch.save never does")
        if flags & ENCRYPTED:
            raise BadArchive(f"its record {name!r} is encrypted, which torch.save never does")
        records.append(Record(name, offset, offset, size, crc))
    return records


def _zip64_values(size: int, packed: int, offset: int, extra: bytes) -> list[int]:
    """The three numbers, taken from the zip64 extra field if they do not fit in 32 bits."""
    values = [size, packed, offset]
    if IN_ZIP64 not in values:
        return values
    field = _extra_field(extra, ZIP64_EXTRA)
    for index, value in enumerate(values):
        if value == IN_ZIP64:
            if len(field) < 8:
                raise BadArchive("its zip directory lacks the 64-bit size of a large record")
            values[index], field = int.from_bytes(field[:8], "little"), field[8:]
    return values


def _extra_field(extra: bytes, wanted: int) -> bytes:
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == wanted:
            return extra[4 : 4 + length]
        extra = extra[4 + length :]
    return b""


def _with_data_offsets(file: BinaryIO, records: list[Record], directory_offset: int) -> list[Record]:
    """The records with data offsets from their local headers; rejects overlaps and duplicates.

    Names that differ only in case are duplicates, because `torch.load` ignores case.
    """
    if len({record.name.lower() for record in records}) != len(records):
        raise BadArchive("its zip directory has duplicate record names")
    with_offsets, free_from = [], 0
    for record in sorted(records, key=lambda record: record.header_offset):
        if record.header_offset < free_from:
            raise BadArchive(f"its record {record.name!r} overlaps another")
        data_offset = _data_offset(file, record)
        free_from = data_offset + record.size
        if free_from > directory_offset:
            raise BadArchive(f"its record {record.name!r} claims {record.size:,} bytes, more than the file has at that offset")
        with_offsets.append(Record(record.name, record.header_offset, data_offset, record.size, record.crc))
    return with_offsets


def _data_offset(file: BinaryIO, record: Record) -> int:
    name = record.name.encode()
    head = read_at(file, record.header_offset, LOCAL.size + len(name))
    if len(head) < LOCAL.size + len(name) or head[:4] != LOCAL_SIGNATURE or head[LOCAL.size :] != name:
        raise BadArchive(f"its record {record.name!r} does not begin where the zip directory says")
    *_, name_length, extra_length = LOCAL.unpack(head[: LOCAL.size])
    return record.header_offset + LOCAL.size + name_length + extra_length
