"""DiskStore: objects in files on a local disk. Which object lies in which slot, and which is evicted first.

How slots and their records lie on the disk is in `kvblocks.tiers.segments`. Imports that and the interface.
"""

import contextlib
import fcntl
import os
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import SupportsIndex

from kvblocks.errors import StoreInUse
from kvblocks.sizes import checked_bytes
from kvblocks.tiers.calls import Calls
from kvblocks.tiers.segments import Record, Segment, is_full, padded, segment_files
from kvblocks.tiers.store import Buffer, Status, Store, StoreStats, checked_batch, checked_keys

__all__ = ["DiskStats", "DiskStore", "StoredObject", "read_folder", "remove_folder"]

LOCK = "kvblocks.lock"
SEGMENTS = 32  # a folder's capacity is handed out in about so many parts
FEWEST_SLOTS = 8  # of a file, where they fit
LARGEST_SEGMENT = 1 << 30
FULL_SECONDS = 10.0  # after which a disk that was full is asked again


@dataclass(frozen=True, kw_only=True)
class DiskStats(StoreStats):
    """What a `DiskStore` holds.

    Attributes:
        bytes_on_disk: bytes that its files take, free slots included.
        segments: pairs of files.
        direct: whether bytes go past the page cache; false too while there is no file yet.
        lost: damaged objects, and damaged files, found since the store was opened.
    """

    bytes_on_disk: int
    segments: int
    direct: bool
    lost: int


@dataclass(frozen=True)
class StoredObject:
    """An object in a folder: its key, its length in bytes, and when it was stored, in seconds since 1970."""

    key: str
    length: int
    stored: float


class _Area:
    """A segment, and which of its slots are free, being written, or in use."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.free = list(range(segment.num_slots - 1, -1, -1))
        self.entries: set[_Entry] = set()
        self.busy = 0  # reads and writes of its slots that run
        self.used = 0  # the sum over `entries`
        self.given_up = False  # its files are damaged: nothing new goes there, and it is closed when it is not busy

    @property
    def warmth(self) -> float:
        """When its objects were last used, on average; what holds none is coldest."""
        return self.used / len(self.entries) if self.entries else -1.0


class _Entry:
    """An object that can be loaded."""

    __slots__ = ("area", "gone", "key", "length", "readers", "sequence", "slot", "stored_ns", "used")

    def __init__(self, area: _Area, slot: int, record: Record) -> None:
        self.area, self.slot = area, slot
        self.key, self.length, self.sequence = record.key, record.length, record.sequence
        self.used, self.stored_ns = record.used, record.stored_ns
        self.readers = 0
        self.gone = False  # forgotten while it was read: the last reader frees the slot


class DiskStore(Store):
    """Objects in preallocated files of slots in one folder; the least recently used are evicted first.

    Args:
        path: the folder, made if it is not there. It belongs to one store at a time.
        capacity: bytes that its files take at most, as a number or as text such as "10GiB".
        threads: how many objects of a batch are moved at once, 1 to 256.

    Objects of one padded size (a multiple of 4 KiB) share files. These are made as they are needed, each about a 32nd
    of the capacity and all of it allocated at once, so that a full disk shows when a file is made. When the capacity
    is used up, the least recently used object of the same size is evicted, or a whole file of another size, if the
    objects in it were on average used longer ago. This suits few different sizes, as the blocks of a model have.

    Where the file system supports O_DIRECT, bytes go between page-aligned buffers and the disk without a copy; those of
    other buffers are copied through a buffer of the thread.

    A live object is never overwritten in place. If the process is killed at any moment, the folder opens again with
    all objects that were stored, except those that were being written, and in their order of use. If the machine itself
    crashes, objects stored in the last seconds before may be there with wrong bytes. As with bits that flipped on the
    disk, only verifying them shows it (`kvblocks.tiers.ObjectFormat`). `close` waits until the disk has everything.

    Files have mode 0600 and a folder that is made 0700. Objects are not encrypted.

    Raises:
        StoreInUse: another store has the folder open.
        OSError: the folder cannot be made, read or written.
        ValueError, TypeError: `path` is empty, or `capacity` or `threads` is not as above.

    Example:
        >>> with DiskStore("/var/cache/kv", "10GiB") as store:
        ...     store.store(["a"], [b"four"])
        [<Status.OK: 'ok'>]

    Thread-safety: any number of threads. Calls move bytes side by side, but all wait while one makes a file.
    """

    def __init__(
        self, path: str | os.PathLike[str], capacity: str | SupportsIndex, *, threads: SupportsIndex = 4
    ) -> None:
        if not os.fspath(path):
            raise ValueError('path is empty; give the name of a folder, "." for the one that is current')
        self._capacity = checked_bytes("capacity", capacity)
        self._threads = index(threads)
        if not 1 <= self._threads <= 256:
            raise ValueError(f"threads={self._threads} is outside 1..256")
        self._folder = Path(path)
        self._lock = threading.Lock()
        self._calls = Calls(f"the store in {self._folder}")
        self._entries: dict[str, _Entry] = {}
        self._areas: dict[int, list[_Area]] = {}  # by slot size
        self._recent: dict[int, OrderedDict[str, _Entry]] = {}  # by slot size, least recently used first
        self._clock = self._bytes = self._evictions = self._lost = self._number = 0
        self._full_until, self._full_for = 0.0, 0  # for how long not to ask the disk, and for how many bytes or more
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock_fd = _locked(self._folder)
        try:
            self._load_folder()
            self._pool = ThreadPoolExecutor(self._threads, "kvblocks-disk")
        except BaseException:
            self._close_files(sync=False)
            raise
        _open_stores.add(self)

    def lookup(self, keys: Sequence[str]) -> list[bool]:
        found = checked_keys(keys)
        with self._calls.one():
            return [key in self._entries for key in found]

    def load(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[Status]:
        found, views = checked_batch(keys, buffers, writable=True)
        with self._calls.one():
            return self._each(len(found), lambda i: self._load(found[i], views[i]))

    def store(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[Status]:
        found, views = checked_batch(keys, buffers, writable=False)
        with self._calls.one():
            return self._each(len(found), lambda i: self._store(found[i], views[i]))

    def delete(self, keys: Sequence[str]) -> list[Status]:
        found = checked_keys(keys)
        with self._calls.one():
            return [self._delete(key) for key in found]

    def stats(self) -> DiskStats:
        with self._calls.one(), self._lock:
            areas = [area for size in self._areas.values() for area in size]
            return DiskStats(
                objects=len(self._entries),
                bytes_used=self._bytes,
                capacity=self._capacity,
                evictions=self._evictions,
                bytes_on_disk=sum(area.segment.nbytes for area in areas),
                segments=len(areas),
                direct=bool(areas) and all(area.segment.direct for area in areas),
                lost=self._lost,
            )

    def objects(self) -> list[StoredObject]:
        """All objects, least recently used first."""
        with self._calls.one(), self._lock:
            entries = sorted(self._entries.values(), key=lambda entry: entry.used)
            return [StoredObject(entry.key, entry.length, entry.stored_ns / 1e9) for entry in entries]

    def close(self) -> None:
        """Wait for calls that run and until the disk has everything, then release the folder.

        Raises:
            OSError: the disk did not take everything. The store is closed all the same.
        """
        if not self._calls.close():
            return  # also in a fork, which has released it already
        self._pool.shutdown()
        _open_stores.discard(self)
        self._close_files(sync=True)

    # --- calls

    def _each(self, count: int, work: Callable[[int], Status]) -> list[Status]:
        """What `work` answers to each index, several at a time; returns or raises only when all have ended."""
        statuses = [Status.ERROR] * count
        shares = min(count, self._threads)

        def share(first: int) -> None:
            for i in range(first, count, shares):
                statuses[i] = work(i)

        futures: list[Future[None]] = []
        try:
            for first in range(1, shares):
                futures.append(self._pool.submit(share, first))
            if count:
                share(0)
        finally:
            wait(futures)  # also where this thread is interrupted: the others use the caller's buffers
        for future in futures:
            future.result()
        return statuses

    # --- one object

    def _load(self, key: str, view: memoryview) -> Status:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return Status.MISSING
            if entry.length != len(view):
                return Status.CORRUPT
            entry.readers += 1
            entry.area.busy += 1
            self._use(entry)
        area, status, cut_short = entry.area, Status.ERROR, False
        try:
            cut_short = not area.segment.read(entry.slot, view)
            status = Status.CORRUPT if cut_short else Status.OK
            with contextlib.suppress(OSError):  # then it counts as used less recently when the folder is opened again
                area.segment.touch(entry.slot, entry.used)
        except OSError:
            status = Status.ERROR
        finally:
            with self._lock:
                entry.readers -= 1
                if entry.gone and not entry.readers:
                    area.free.append(entry.slot)
                self._done(area, damaged=cut_short)
        return status

    def _store(self, key: str, view: memoryview) -> Status:
        try:
            with self._lock:
                taken = self._take(padded(len(view)))
                if taken is None:
                    return Status.FULL
                area, slot = taken
                area.busy += 1
                self._clock += 1
                sequence = self._clock
        except OSError as error:
            return Status.FULL if is_full(error) else Status.ERROR
        status, written, cut_short = Status.ERROR, False, False
        try:
            cut_short = not area.segment.write(slot, view)
            written = not cut_short
        except OSError as error:
            status = Status.FULL if is_full(error) else Status.ERROR
        finally:
            with self._lock:
                if written and not area.given_up:
                    status = self._hang(area, slot, Record(key, len(view), sequence, sequence, time.time_ns()))
                else:
                    area.free.append(slot)
                self._done(area, damaged=cut_short)
        return status

    def _hang(self, area: _Area, slot: int, record: Record) -> Status:
        """Make an object that has been written the current one of its key."""
        old = self._entries.get(record.key)
        if old is not None and old.sequence > record.sequence:  # one stored later was faster
            area.free.append(slot)
            return Status.OK
        try:
            area.segment.record(slot, record)
            if old is not None:
                # In this order: killed in between, there are both, and the later one counts.
                self._forget(old)
        except OSError:
            with contextlib.suppress(OSError):
                area.segment.wipe(slot)
                area.free.append(slot)  # not where it could not be wiped: its record must never tell of other bytes
            return Status.ERROR
        self._add(_Entry(area, slot, record))
        return Status.OK

    def _delete(self, key: str) -> Status:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return Status.MISSING
            try:
                self._forget(entry)
            except OSError:
                return Status.ERROR
            return Status.OK

    # --- what lies where; all of it under the lock

    def _add(self, entry: _Entry) -> None:
        size = entry.area.segment.slot_bytes
        self._entries[entry.key] = entry
        self._recent.setdefault(size, OrderedDict())[entry.key] = entry
        entry.area.entries.add(entry)
        entry.area.used += entry.used
        self._bytes += entry.length

    def _use(self, entry: _Entry) -> None:
        self._clock += 1
        entry.area.used += self._clock - entry.used
        entry.used = self._clock
        self._recent[entry.area.segment.slot_bytes].move_to_end(entry.key)

    def _drop(self, entry: _Entry) -> None:
        """Take an object out of every table here; this does not free its slot."""
        entry.gone = True
        del self._entries[entry.key]
        del self._recent[entry.area.segment.slot_bytes][entry.key]
        entry.area.entries.remove(entry)
        entry.area.used -= entry.used
        self._bytes -= entry.length

    def _forget(self, entry: _Entry) -> None:
        """Wipe an object's record, then drop it; its slot is free as soon as nobody reads it.

        Raises:
            OSError: the record is still there, and the object is too.
        """
        entry.area.segment.wipe(entry.slot)
        self._drop(entry)
        if not entry.readers:
            entry.area.free.append(entry.slot)

    def _take(self, size: int) -> tuple[_Area, int] | None:
        """A slot of this size without a record; None where there is no room for one.

        Raises:
            OSError: of a file that could not be made or written.
        """
        for area in self._areas.get(size, []):
            if area.free:
                return area, area.free.pop()
        grown = self._grown(size)
        victim = next((entry for entry in self._recent.get(size, {}).values() if not entry.readers), None)
        if grown is None:
            grown = self._grown_for(size, victim)
        if grown is not None:
            return grown, grown.free.pop()
        if victim is None:
            return None
        self._forget(victim)
        self._evictions += 1
        return victim.area, victim.area.free.pop()

    def _grown_for(self, size: int, victim: _Entry | None) -> _Area | None:
        """A new area instead of files of other sizes that are colder than `victim`, which is evicted otherwise."""
        others = [area for other, areas in self._areas.items() if other != size for area in areas if not area.busy]
        others.sort(key=lambda area: area.warmth, reverse=True)
        least = Segment.size_of(size, 1)
        room = 0 if self._is_full(least) else self._room()
        if sum(area.segment.nbytes for area in others) + room < least:
            return None
        while others and (victim is None or others[-1].warmth < victim.used):
            area = others.pop()
            self._evictions += len(area.entries)
            self._give_up(area)
            self._full_until = 0.0
            grown = self._grown(size)
            if grown is not None:
                return grown
        return None

    def _grown(self, size: int) -> _Area | None:
        """A new area for slots of this size; None where the capacity or the disk has no room for one."""
        room, least = self._room(), Segment.size_of(size, 1)
        if least > room or self._is_full(least):
            return None
        count = max(FEWEST_SLOTS, min(self._capacity // SEGMENTS, LARGEST_SEGMENT) // size)
        while Segment.size_of(size, count) > room:
            count = min(count - 1, room // size)
        while count:
            self._number += 1
            try:
                area = _Area(Segment.create(self._folder, self._number, size, count))
            except OSError as error:
                if not is_full(error):
                    raise
                count //= 2
            else:
                self._areas.setdefault(size, []).append(area)
                return area
        self._full_until, self._full_for = time.monotonic() + FULL_SECONDS, least
        return None

    def _room(self) -> int:
        """Bytes of the capacity that no file has."""
        return self._capacity - sum(area.segment.nbytes for areas in self._areas.values() for area in areas)

    def _is_full(self, nbytes: int) -> bool:
        """Whether the disk had no room for so many bytes just now."""
        return nbytes >= self._full_for and time.monotonic() < self._full_until

    def _give_up(self, area: _Area) -> None:
        """Drop all objects of an area and delete its files; calls that use it may finish."""
        area.given_up = True
        self._areas[area.segment.slot_bytes].remove(area)
        for entry in list(area.entries):
            self._drop(entry)
        try:
            area.segment.delete()
        finally:
            if not area.busy:
                area.segment.close()

    def _done(self, area: _Area, *, damaged: bool) -> None:
        """A read or a write has ended; it may have found the file to be shorter than it was made."""
        area.busy -= 1
        if damaged and not area.given_up:
            self._lost += len(area.entries)
            with contextlib.suppress(OSError):  # nothing of it is served any more; the next opening tries it again
                self._give_up(area)
        elif area.given_up and not area.busy:
            area.segment.close()

    # --- opening and closing

    def _load_folder(self) -> None:
        """Find what earlier stores left in the folder."""
        found: list[tuple[_Area, list[Record | None]]] = []
        whole = set()
        for file in segment_files(self._folder):
            self._number = max(self._number, int(file.name.partition(".")[0]))
            if file.suffix == ".index" and (opened := Segment.open(file)) is not None:
                area = _Area(opened[0])
                self._areas.setdefault(area.segment.slot_bytes, []).append(area)
                found.append((area, opened[1]))
                whole |= {file, file.with_suffix(".slots")}
        for file in segment_files(self._folder):
            if file not in whole:  # made when the process was killed, or damaged
                self._lost += file.suffix == ".index"
                file.unlink()
        entries = []
        for area, records in found:
            free = []
            for slot, record in enumerate(records):
                if record is None or not 1 <= record.length <= area.segment.slot_bytes:
                    free.append(slot)
                else:
                    entries.append(_Entry(area, slot, record))
            area.free = free[::-1]
        # Of two objects of one key the process was killed before it wiped the earlier one.
        entries.sort(key=lambda entry: entry.sequence)
        newest = {entry.key: entry for entry in entries}
        for entry in entries:
            if newest[entry.key] is not entry:
                entry.area.segment.wipe(entry.slot)
                entry.area.free.append(entry.slot)
        for entry in sorted(newest.values(), key=lambda entry: entry.used):
            self._add(entry)
            self._clock = max(self._clock, entry.used, entry.sequence)
        self._shrink()

    def _shrink(self) -> None:
        """Delete the coldest files until the rest fits into the capacity."""
        areas = [area for areas in self._areas.values() for area in areas]
        areas.sort(key=lambda area: area.warmth)
        while sum(area.segment.nbytes for area in areas) > self._capacity:
            self._evictions += len(areas[0].entries)
            self._give_up(areas.pop(0))

    def _close_files(self, *, sync: bool) -> None:
        with contextlib.ExitStack() as stack:  # the lock last, and each of them whatever becomes of the others
            stack.callback(os.close, self._lock_fd)
            for areas in self._areas.values():
                for area in areas:
                    stack.callback(area.segment.close, sync=sync)

    def _leave(self) -> None:
        """In a fork: close the files, so that the folder is free when the process that opened it ends."""
        self._close_files(sync=False)


_open_stores: "weakref.WeakSet[DiskStore]" = weakref.WeakSet()


def _leave_all() -> None:
    for store in list(_open_stores):
        store._leave()
    _open_stores.clear()


os.register_at_fork(after_in_child=_leave_all)


def read_folder(path: str | os.PathLike[str]) -> list[StoredObject]:
    """What lies in the folder of a `DiskStore`, least recently used first, without opening it as one.

    A store may have it open; objects that it stores or evicts meanwhile may be listed or not.

    Raises:
        FileNotFoundError: there is no such folder, or it has never been one of a `DiskStore`.
        OSError: it cannot be read.
    """
    folder = _checked_folder(path)
    newest: dict[str, Record] = {}
    for file in segment_files(folder):
        if file.suffix != ".index":
            continue
        try:
            opened = Segment.open(file, read_only=True)
        except FileNotFoundError:  # it was evicted just now
            continue
        if opened is None:
            continue
        segment, records = opened
        segment.close()
        for record in records:
            if record is not None and (record.key not in newest or newest[record.key].sequence < record.sequence):
                newest[record.key] = record
    return [
        StoredObject(record.key, record.length, record.stored_ns / 1e9)
        for record in sorted(newest.values(), key=lambda record: record.used)
    ]


def remove_folder(path: str | os.PathLike[str]) -> int:
    """Delete the files of a `DiskStore`, and its folder if nothing else is in it.

    Returns:
        bytes of disk that the files took.

    Raises:
        StoreInUse: a store has it open; nothing was deleted.
        FileNotFoundError: there is no such folder, or it has never been one of a `DiskStore`.
        OSError: a file could not be deleted.
    """
    folder = _checked_folder(path)
    lock = _locked(folder)
    try:
        freed = 0
        for file in segment_files(folder):
            freed += file.stat(follow_symlinks=False).st_blocks * 512
            file.unlink()
        (folder / LOCK).unlink()
    finally:
        os.close(lock)
    with contextlib.suppress(OSError):  # there is something else in it
        folder.rmdir()
    return freed


def _checked_folder(path: str | os.PathLike[str]) -> Path:
    folder = Path(path)
    if not (folder / LOCK).exists():
        raise FileNotFoundError(f"{folder} is no folder of a DiskStore: there is no {LOCK} in it")
    return folder


def _locked(folder: Path) -> int:
    """The descriptor of the folder's lock file, locked until it is closed."""
    path = folder / LOCK
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.pread(fd, 20, 0).decode("ascii", "replace").strip() or "unknown"
                raise StoreInUse(
                    f"{folder} is in use by process {holder}; close its store first", str(folder)
                ) from None
            # `remove_folder` deletes the file while it holds the lock: a lock on a deleted file counts for nothing.
            try:
                named = os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
            except FileNotFoundError:
                named = False
            if named:
                os.ftruncate(fd, 0)
                os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
