"""The files of a `DiskStore`: slots of one size, and beside them a table that says what is in each slot.

A segment is two files. `N.slots` is nothing but slots, preallocated, read and written past the page cache where the
file system takes that. `N.index` has a header and a record of 512 bytes for each slot, and goes through the page cache:
using both ways on one file at once would not be safe. A slot's record is written after all of its bytes, and wiped
before others overwrite them, so that a process killed at any moment leaves no record of a slot that is not whole.
What is stored where is decided in `kvblocks.tiers.disk`.

Imports the interface of stores, and numpy for addresses.
"""

import errno
import hashlib
import mmap
import os
import re
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from kvblocks.tiers.store import MAX_KEY_BYTES

__all__ = ["PAGE", "Record", "Segment", "is_full", "padded", "segment_files"]

PAGE = 4096  # what slots and whatever is moved past the page cache are multiples of

_HEADER = struct.Struct("<8s16sQQ")
_MAGIC = b"kvbslot1"
_CHECK_BYTES = 16
_RECORD_BYTES = 512
# Checksum; when it was last used, and that with all bits inverted: both are written alone, so the checksum does not
# cover them; then sequence, length, time in nanoseconds, length of the key. The key follows.
_RECORD = struct.Struct("<16sQQQQQH")
_USED = struct.Struct("<QQ")
_COVERED = 32  # where of a record the checksum begins to cover it
_ALL = 2**64 - 1


def padded(nbytes: int) -> int:
    """`nbytes` rounded up to whole pages."""
    return -(-nbytes // PAGE) * PAGE


def is_full(error: OSError) -> bool:
    """Whether an error means that there is no room, and not that something is broken."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def segment_files(folder: Path) -> list[Path]:
    """All files in a folder that segments are made of, or were being made of."""
    return sorted(path for path in folder.iterdir() if re.fullmatch(r"[1-9][0-9]*\.(slots|index|new)", path.name))


@dataclass(frozen=True)
class Record:
    """What the table says of one slot.

    Attributes:
        sequence: rises with each object stored in the folder; of two objects of one key the higher one counts.
        used: rises with each use of any object.
        stored_ns: when it was stored, in nanoseconds since 1970.
    """

    key: str
    length: int
    sequence: int
    used: int
    stored_ns: int


class Segment:
    """One file of slots and its table.

    Attributes:
        slot_bytes: bytes of each slot, a multiple of 4,096.
        num_slots: slots that can be used; fewer than were made where the file was cut short.
        nbytes: bytes that the two files take on disk.
        direct: whether bytes go past the page cache.

    Thread-safety: any number of threads, as long as no two use one slot of which one writes.
    """

    def __init__(self, folder: Path, number: int, identity: bytes, slot_bytes: int, num_slots: int) -> None:
        self.number, self.slot_bytes, self.num_slots = number, slot_bytes, num_slots
        self.nbytes = self.size_of(slot_bytes, num_slots)
        self._identity = identity
        self._index_path, self._slots_path = folder / f"{number}.index", folder / f"{number}.slots"
        self._index = self._slots = -1
        self.direct = False

    @staticmethod
    def size_of(slot_bytes: int, num_slots: int) -> int:
        """Bytes of both files."""
        return PAGE + padded(num_slots * _RECORD_BYTES) + num_slots * slot_bytes

    @classmethod
    def create(cls, folder: Path, number: int, slot_bytes: int, num_slots: int) -> Self:
        """Make both files, all of their bytes allocated. The index gets its name last, and makes the segment exist.

        Raises:
            OSError: they could not be made; nothing is left of them.
        """
        segment = cls(folder, number, os.urandom(16), slot_bytes, num_slots)
        head = _HEADER.pack(_MAGIC, segment._identity, slot_bytes, num_slots)
        head += hashlib.blake2b(head, digest_size=_CHECK_BYTES).digest()
        scratch = segment._index_path.with_suffix(".new")
        try:
            for path, nbytes in [
                (segment._slots_path, num_slots * slot_bytes),
                (scratch, PAGE + padded(num_slots * _RECORD_BYTES)),
            ]:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
                try:
                    os.posix_fallocate(fd, 0, nbytes)
                    if path == scratch:
                        _write_all(fd, head, 0)
                finally:
                    os.close(fd)
            scratch.rename(segment._index_path)
            segment._open(os.O_RDWR)
        except OSError:
            segment.close()
            segment.delete()
            scratch.unlink(missing_ok=True)
            raise
        return segment

    @classmethod
    def open(cls, index: Path, *, read_only: bool = False) -> tuple[Self, list[Record | None]] | None:
        """The segment of an index file, with what is in each of its slots; None where the files are not whole.

        Raises:
            OSError: a file could not be read.
        """
        fd = os.open(index, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            content = _read_all(fd, os.fstat(fd).st_size)
        finally:
            os.close(fd)
        if len(content) < PAGE:
            return None
        head, check = content[: _HEADER.size], content[_HEADER.size : _HEADER.size + _CHECK_BYTES]
        magic, identity, slot_bytes, num_slots = _HEADER.unpack(head)
        if magic != _MAGIC or hashlib.blake2b(head, digest_size=_CHECK_BYTES).digest() != check:
            return None
        try:
            slots_bytes = index.with_suffix(".slots").stat(follow_symlinks=False).st_size
        except FileNotFoundError:
            return None
        # Slots that are not there in full, or whose records are not, are out of use for good.
        whole = min(num_slots, slots_bytes // slot_bytes, (len(content) - PAGE) // _RECORD_BYTES)
        if whole < 1:
            return None
        segment = cls(index.parent, int(index.stem), identity, slot_bytes, whole)
        segment.nbytes = cls.size_of(slot_bytes, num_slots)
        starts = range(PAGE, PAGE + whole * _RECORD_BYTES, _RECORD_BYTES)
        records = [segment._parsed(slot, content[at : at + _RECORD_BYTES]) for slot, at in enumerate(starts)]
        segment._open(os.O_RDONLY if read_only else os.O_RDWR)
        return segment, records

    def read(self, slot: int, view: memoryview) -> bool:
        """Fill `view` with the first bytes of a slot; false where the file ends before them."""
        return self._move(os.preadv, slot, view)

    def write(self, slot: int, view: memoryview) -> bool:
        """Put bytes at the beginning of a slot, which has no record; false where the file has become shorter.

        A write past its end would make it long again, and zeros of the objects in between.

        Raises:
            OSError: they are not all there.
        """
        if os.fstat(self._slots).st_size < self.num_slots * self.slot_bytes:
            return False
        if not self._move(os.pwritev, slot, view):
            raise OSError(errno.EIO, f"a write of {len(view)} bytes took none", str(self._slots_path))
        return True

    def record(self, slot: int, record: Record) -> None:
        """Say what is in a slot now."""
        key = record.key.encode()
        used = _USED.pack(record.used, record.used ^ _ALL)
        covered = struct.pack("<QQQH", record.sequence, record.length, record.stored_ns, len(key)) + key
        _write_all(self._index, self._check(slot, covered) + used + covered, self._at(slot))

    def wipe(self, slot: int) -> None:
        """Say that nothing is in a slot."""
        _write_all(self._index, bytes(_RECORD_BYTES), self._at(slot))

    def touch(self, slot: int, used: int) -> None:
        """Say when a slot was last used; where its record has been wiped meanwhile, that says nothing."""
        _write_all(self._index, _USED.pack(used, used ^ _ALL), self._at(slot) + _CHECK_BYTES)

    def close(self, *, sync: bool = False) -> None:
        """Close the files; with `sync` wait until the disk has all of it."""
        try:
            if sync and self._slots >= 0:
                os.fsync(self._slots)
                os.fsync(self._index)
        finally:
            for fd in (self._slots, self._index):
                if fd >= 0:
                    os.close(fd)
            self._index = self._slots = -1

    def delete(self) -> None:
        """Delete both files, the index first: slots without one do not count. Open files stay usable."""
        self._index_path.unlink(missing_ok=True)
        self._slots_path.unlink(missing_ok=True)

    def _open(self, flags: int) -> None:
        try:
            self._index = os.open(self._index_path, flags | os.O_NOFOLLOW)
            try:
                self._slots = os.open(self._slots_path, flags | os.O_NOFOLLOW | os.O_DIRECT)
                # Some file systems take the flag and then refuse to read.
                self.direct = os.preadv(self._slots, [_page()], 0) == PAGE
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            if not self.direct:
                if self._slots >= 0:
                    os.close(self._slots)
                self._slots = os.open(self._slots_path, flags | os.O_NOFOLLOW)
        except OSError:
            self.close()
            raise

    def _at(self, slot: int) -> int:
        return PAGE + slot * _RECORD_BYTES

    def _check(self, slot: int, covered: bytes) -> bytes:
        """A checksum that fits this record in this slot of this segment alone."""
        message = slot.to_bytes(8, "little") + covered
        return hashlib.blake2b(message, digest_size=_CHECK_BYTES, key=self._identity).digest()

    def _parsed(self, slot: int, raw: bytes) -> Record | None:
        check, used, turned, sequence, length, stored_ns, key_bytes = _RECORD.unpack_from(raw)
        if key_bytes > MAX_KEY_BYTES:
            return None
        end = _RECORD.size + key_bytes
        if self._check(slot, raw[_COVERED:end]) != check:
            return None
        if used ^ turned != _ALL:
            used = sequence
        try:
            key = raw[_RECORD.size : end].decode()
        except UnicodeDecodeError:
            key = ""
        # No store has written such a record, and numbers counted on from it would overflow.
        if not key or max(sequence, used) >= 2**62:
            return None
        return Record(key, length, sequence, used, stored_ns)

    def _move(self, call: Callable[[int, Sequence[memoryview], int], int], slot: int, view: memoryview) -> bool:
        reads, offset = call is os.preadv, slot * self.slot_bytes
        if not self.direct:
            return _transfer(call, self._slots, [view], offset)
        # Past the page cache addresses, offsets and lengths are multiples of a page. Other bytes go through a buffer.
        whole = len(view) // PAGE * PAGE
        if np.frombuffer(view, np.uint8).__array_interface__["data"][0] % PAGE:
            whole = 0
        rest = len(view) - whole
        if not rest:
            return _transfer(call, self._slots, [view], offset)
        spare = _spare(padded(rest))
        pieces = [view[:whole], spare] if whole else [spare]
        if not reads:
            spare[:rest] = view[whole:]
            spare[rest:] = bytes(len(spare) - rest)
            return _transfer(call, self._slots, pieces, offset)
        if not _transfer(call, self._slots, pieces, offset):
            return False
        view[whole:] = spare[:rest]
        return True


_local = threading.local()


def _spare(nbytes: int) -> memoryview:
    """Page-aligned memory of this thread."""
    memory: memoryview | None = getattr(_local, "memory", None)
    if memory is None or len(memory) < nbytes:
        memory = _local.memory = memoryview(mmap.mmap(-1, nbytes))
    return memory[:nbytes]


def _page() -> memoryview:
    return memoryview(mmap.mmap(-1, PAGE))


def _transfer(
    call: Callable[[int, Sequence[memoryview], int], int], fd: int, pieces: list[memoryview], offset: int
) -> bool:
    """Move all pieces, in as many calls as it takes; false where a call moved nothing."""
    while pieces:
        moved = call(fd, pieces, offset)
        if moved == 0:
            return False
        offset += moved
        while pieces and moved >= len(pieces[0]):
            moved -= len(pieces[0])
            pieces = pieces[1:]
        if moved:
            pieces = [pieces[0][moved:], *pieces[1:]]
    return True


def _write_all(fd: int, content: bytes, offset: int) -> None:
    if not _transfer(os.pwritev, fd, [memoryview(content)], offset):
        raise OSError(errno.EIO, f"a write of {len(content)} bytes took none")


def _read_all(fd: int, nbytes: int) -> bytes:
    content = bytearray(nbytes)
    done = 0
    while done < nbytes and (got := os.preadv(fd, [memoryview(content)[done:]], done)):
        done += got
    return bytes(content[:done])
