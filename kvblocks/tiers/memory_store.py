"""MemoryStore: objects in this process's memory, for tests and as the shortest store there is to read.

Imports the interface and sizes.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import SupportsIndex

from kvblocks.sizes import checked_bytes
from kvblocks.tiers.store import Buffer, Status, Store, StoreStats, checked_batch, checked_keys

__all__ = ["MemoryStore"]


class MemoryStore(Store):
    """Objects in memory; the least recently used are evicted first.

    Args:
        capacity: bytes of objects it holds at most, as a number or as text such as "64MiB".

    Raises:
        ValueError, TypeError: `capacity` is no size.

    Example:
        >>> store = MemoryStore("1MiB")
        >>> store.store(["a"], [b"four"])
        [<Status.OK: 'ok'>]
        >>> there = bytearray(4)
        >>> store.load(["a", "b"], [there, bytearray(4)]), bytes(there)
        ([<Status.OK: 'ok'>, <Status.MISSING: 'missing'>], b'four')

    Thread-safety: each call is atomic.
    """

    def __init__(self, capacity: str | SupportsIndex) -> None:
        self._capacity = checked_bytes("capacity", capacity)
        self._objects: OrderedDict[str, bytes] = OrderedDict()
        self._used = self._evictions = 0
        self._closed = False
        self._lock = threading.Lock()

    def lookup(self, keys: Sequence[str]) -> list[bool]:
        found = checked_keys(keys)
        with self._lock:
            self._check_open()
            return [key in self._objects for key in found]

    def load(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[Status]:
        found, views = checked_batch(keys, buffers, writable=True)
        with self._lock:
            self._check_open()
            return [self._load(key, view) for key, view in zip(found, views, strict=True)]

    def store(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[Status]:
        found, views = checked_batch(keys, buffers, writable=False)
        with self._lock:
            self._check_open()
            return [self._store(key, bytes(view)) for key, view in zip(found, views, strict=True)]

    def delete(self, keys: Sequence[str]) -> list[Status]:
        found = checked_keys(keys)
        with self._lock:
            self._check_open()
            return [Status.OK if self._drop(key) else Status.MISSING for key in found]

    def stats(self) -> StoreStats:
        with self._lock:
            self._check_open()
            return StoreStats(
                objects=len(self._objects),
                bytes_used=self._used,
                capacity=self._capacity,
                evictions=self._evictions,
            )

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._objects.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("the store is closed")

    def _load(self, key: str, view: memoryview) -> Status:
        value = self._objects.get(key)
        if value is None:
            return Status.MISSING
        if len(value) != len(view):
            return Status.CORRUPT
        self._objects.move_to_end(key)
        view[:] = value
        return Status.OK

    def _store(self, key: str, value: bytes) -> Status:
        if len(value) > self._capacity:
            return Status.FULL
        self._drop(key)
        while self._used + len(value) > self._capacity:
            self._drop(next(iter(self._objects)))
            self._evictions += 1
        self._objects[key] = value
        self._used += len(value)
        return Status.OK

    def _drop(self, key: str) -> bool:
        value = self._objects.pop(key, None)
        self._used -= len(value or b"")
        return value is not None
