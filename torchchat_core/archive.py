"""ZIP archives at the end of other files: where their entries lie, so that they can be mapped, and adding entries.

Only what `artifacts` needs of the format (APPNOTE.TXT 6.3, with the 64-bit records): entries that are stored as they
are. The file is a stranger's: nothing is believed before it is compared with the size of the file.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from torchchat_core.errors import TorchchatError, quoted

ALIGNMENT = 64  # bytes, of the data of every entry that is added
MAXIMUM_ENTRIES = 1 << 18
MAXIMUM_DIRECTORY = 64 << 20  # bytes
PIECE = 8 << 20  # bytes that are read and written at a time
END, END_64, LOCATOR_64, ENTRY, HEADER = b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\1\2", b"PK\3\4"
END_BYTES, ENTRY_BYTES, HEADER_BYTES = 22, 46, 30
FULL_16, FULL_32 = 0xFFFF, 0xFFFFFFFF  # "see the 64-bit record"
PADDING = 0xD935  # the kind of extra field that aligns data, as in Android's archives
DAMAGED = "the file is damaged, or was cut off: copy or export it again"


@dataclass(frozen=True)
class Entry:
    """An entry of the archive's directory."""

    name: str
    header: int  # where its header lies, from the start of the file
    size: int  # bytes of its data
    packed: int  # bytes that they take in the file
    checksum: int  # CRC-32 of its data
    stored: bool  # as it is: neither compressed nor encrypted


class Archive:
    """The directory of an archive at the end of `path`.

    Raises `TorchchatError` where the file cannot be read, ends with no archive, or with a damaged one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.file_bytes = file.seek(0, 2)
                self.entries = _apart(_directory(file, self.file_bytes, path), path)
        except OSError as error:
            raise TorchchatError(f"{path} cannot be read: {error.strerror or error}") from error

    def place(self, name: str) -> tuple[int, int]:
        """Where the data of an entry begins in the file, and how many bytes it has.

        Raises `TorchchatError` where there is no such entry, or it is compressed, or does not lie inside the file.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise TorchchatError(f"{self.path} has no entry {quoted(name)}", DAMAGED)
        if entry.header > self.file_bytes:  # no place that a file can be read at, perhaps
            raise TorchchatError(f"the entry {quoted(name)} of {self.path} is not where the directory says", DAMAGED)
        with self.path.open("rb") as file:
            file.seek(entry.header)
            header = file.read(HEADER_BYTES)
            if not entry.stored or len(header) < HEADER_BYTES or header[:4] != HEADER:
                raise TorchchatError(f"the entry {quoted(name)} of {self.path} is compressed, or not where it should "
                                     "be",
                                     DAMAGED)
            name_bytes, extra_bytes = struct.unpack_from("<HH", header, 26)
            own_name = file.read(name_bytes).decode("utf-8", "replace")
        start = entry.header + HEADER_BYTES + name_bytes + extra_bytes
        if own_name != name or start + entry.size > self.file_bytes:
            raise TorchchatError(f"the entry {quoted(name)} of {self.path} is not where the directory says", DAMAGED)
        return start, entry.size

    def read(self, name: str, limit: int) -> bytes:
        """The data of an entry. Raises `TorchchatError` as `place` does, for one of more than `limit` bytes, and for
        one that its checksum does not fit."""
        start, size = self.place(name)
        if size > limit:
            raise TorchchatError(f"the entry {quoted(name)} of {self.path} has {size} bytes; {limit} is the most",
                                 DAMAGED)
        data = b"".join(pieces_of(self.path, start, size))
        if zlib.crc32(data) != self.entries[name].checksum:
            raise TorchchatError(f"the entry {quoted(name)} of {self.path} is not what its checksum says", DAMAGED)
        return data


def pieces_of(path: Path, start: int, size: int) -> Iterator[bytes]:
    """A part of a file, some megabytes at a time. Raises `TorchchatError` where the file ends before."""
    with path.open("rb") as file:
        file.seek(start)
        while size > 0:
            piece = file.read(min(PIECE, size))
            if not piece:
                raise TorchchatError(f"{path} ends too early", DAMAGED)
            size -= len(piece)
            yield piece


def _directory(file: BinaryIO, size: int, path: Path) -> Iterator[Entry]:
    start, length, count = _end_record(file, size, path)
    if length > MAXIMUM_DIRECTORY or count > MAXIMUM_ENTRIES or start + length > size:
        raise TorchchatError(f"the directory at the end of {path} says {count} entries in {length} bytes at {start}",
                             DAMAGED)
    file.seek(start)
    data, at = file.read(length), 0
    for _ in range(count):
        if len(data) < at + ENTRY_BYTES or data[at : at + 4] != ENTRY:
            raise TorchchatError(f"the directory at the end of {path} is damaged", DAMAGED)
        flags, method = struct.unpack_from("<HH", data, at + 8)
        checksum, packed, whole = struct.unpack_from("<III", data, at + 16)
        name_bytes, extra_bytes, comment_bytes = struct.unpack_from("<HHH", data, at + 28)
        header = struct.unpack_from("<I", data, at + 42)[0]
        name_end = at + ENTRY_BYTES + name_bytes
        extra = data[name_end : name_end + extra_bytes]
        whole, packed, header = _wide(extra, [whole, packed, header], path)
        name = data[at + ENTRY_BYTES : name_end].decode("utf-8", "replace")
        yield Entry(name, header, whole, packed, checksum, stored=method == 0 and not flags & 1 and packed == whole)
        at = name_end + extra_bytes + comment_bytes


def _apart(entries: Iterable[Entry], path: Path) -> dict[str, Entry]:
    """By their names. Raises `TorchchatError` for entries that share bytes: a small file could unfold to a huge one."""
    listed = sorted(entries, key=lambda entry: entry.header)
    for entry, following in itertools.pairwise(listed):
        if entry.header + HEADER_BYTES + entry.packed > following.header:
            raise TorchchatError(f"the entries {quoted(entry.name)} and {quoted(following.name)} of {path} overlap",
                                 DAMAGED)
    named = {entry.name: entry for entry in listed}
    if len(named) < len(listed):
        raise TorchchatError(f"two entries of {path} have one name", DAMAGED)
    return named


def _end_record(file: BinaryIO, size: int, path: Path) -> tuple[int, int, int]:
    """Where the directory starts, its bytes, and its entries."""
    tail_start = max(0, size - END_BYTES - FULL_16)
    file.seek(tail_start)
    tail = file.read(END_BYTES + FULL_16)
    at = tail.rfind(END)
    if at < 0 or len(tail) < at + END_BYTES:
        raise TorchchatError(f"there is no archive at the end of {path}", DAMAGED)
    count, length, start = struct.unpack_from("<HII", tail, at + 10)
    if count != FULL_16 and FULL_32 not in (length, start):
        return start, length, count
    locator = tail[max(0, at - 20) : at]
    if len(locator) < 20 or locator[:4] != LOCATOR_64:
        return start, length, count
    file.seek(min(struct.unpack_from("<Q", locator, 8)[0], size))
    record = file.read(56)
    if len(record) < 56 or record[:4] != END_64:
        raise TorchchatError(f"the end of the archive in {path} is damaged", DAMAGED)
    count, length, start = struct.unpack_from("<QQQ", record, 32)
    return start, length, count


def _wide(extra: bytes, narrow: list[int], path: Path) -> list[int]:
    """Size, packed size and place of an entry, from the 64-bit field where their 32 bits do not hold them."""
    wanted = [index for index, value in enumerate(narrow) if value == FULL_32]
    at = 0
    while wanted and at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        field = extra[at + 4 : at + 4 + length]
        if kind == 1 and len(field) >= 8 * len(wanted):
            values = struct.unpack_from(f"<{len(wanted)}Q", field)
            for index, value in zip(wanted, values, strict=True):
                narrow[index] = value
            return narrow
        at += 4 + length
    if wanted:
        raise TorchchatError(f"the directory at the end of {path} is damaged", DAMAGED)
    return narrow


class ArchiveWriter:
    """Adds entries to the archive that `path` is, or behind whatever it is, as an archive of its own.

    Their data is aligned to 64 bytes and never compressed; the same content gives the same bytes.
    """

    def __init__(self, path: Path) -> None:
        self._archive = zipfile.ZipFile(path, "a", zipfile.ZIP_STORED)

    def __enter__(self) -> ArchiveWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    def names(self) -> list[str]:
        """Of the entries that are there already."""
        return self._archive.namelist()

    def add(self, name: str, pieces: Iterable[bytes | memoryview], size: int) -> str:
        """Writes an entry of `size` bytes; the SHA-256 of its data, in hexadecimal digits."""
        info = zipfile.ZipInfo(name)  # of 1980, whenever it is made
        info.external_attr = 0o644 << 16
        wide = size >= 1 << 31
        fixed = self._archive.start_dir + HEADER_BYTES + len(name.encode()) + (20 if wide else 0) + 4
        info.extra = struct.pack("<HH", PADDING, -fixed % ALIGNMENT) + bytes(-fixed % ALIGNMENT)
        digest = hashlib.sha256()
        with self._archive.open(info, "w", force_zip64=wide) as to:
            for piece in pieces:
                digest.update(piece)
                to.write(piece)
        return digest.hexdigest()
