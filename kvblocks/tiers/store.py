"""The interface of stores: the calls, their answers, and the checks of arguments that every store makes.

Keys and objects mean nothing to a store. Imports only the standard library.
"""

import enum
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeAlias

__all__ = ["MAX_KEY_BYTES", "Buffer", "Status", "Store", "StoreStats", "checked_batch", "checked_keys"]

# Whatever has the buffer protocol: memoryview, bytes, bytearray, mmap, a numpy array, `tensor.numpy()`.
Buffer: TypeAlias = Any

MAX_KEY_BYTES = 320  # of a key in UTF-8; the keys of blocks take some 150


class Status(enum.Enum):
    """What became of one object of a `load`, a `store` or a `delete`. All but OK are a miss."""

    OK = "ok"
    MISSING = "missing"  # no such object, or none any more
    CORRUPT = "corrupt"  # what is under the key is damaged, or has another length
    TIMEOUT = "timeout"  # the store gave up waiting; it may still be reading or writing the buffer
    FULL = "full"  # no room, and nothing that could be evicted
    ERROR = "error"  # the medium failed


@dataclass(frozen=True, kw_only=True)
class StoreStats:
    """What a store holds. None where it cannot know.

    Attributes:
        objects: objects that can be loaded now.
        bytes_used: bytes of these objects.
        capacity: bytes of objects and of what the store needs beside them, at most.
        evictions: objects evicted to make room for others since the store was opened.
    """

    objects: int | None
    bytes_used: int | None
    capacity: int | None
    evictions: int | None


class Store(ABC):
    """Objects under keys, on some medium. Calls are synchronous and take a batch.

    An object is 1 byte or more, stored and loaded whole. A key is text of 1 to 320 bytes in UTF-8. It has no meaning to
    a store, which must not follow a slash or two dots in it as a path.

    `load` and `store` answer for each object by itself, in the order of the keys: a fault of the medium is a `Status`
    of the objects concerned, and None of a `lookup`, never an exception. Exceptions are for calls that are wrong:

    Raises:
        ValueError: not as many keys as buffers, a key of another length, an empty buffer or one that is not contiguous,
            or a store that was closed. Nothing was done.
        TypeError: a key that is no text, a buffer without the buffer protocol, or `load` into one that is read-only.
            Nothing was done.

    What a store promises, and `kvblocks.tiers.conformance` checks:

    - `load` answers OK only where the buffer is now filled with one whole object that some `store` put under this very
      key and that has the buffer's length. After any other answer the buffer's content is undefined. No byte outside
      of the buffer is ever written, and none inside after the call has returned, unless it answered TIMEOUT.
    - Where the same key is stored again, a load gives the old object or the new one, never a mix of both.
    - After a `delete` that answered OK or MISSING there is no such object until the next `store` of that key begins.
    - `store` reads its buffers and changes nothing in them.

    What it does not promise: that an object stays, even right after a `store` that answered OK; that `lookup` and a
    later `load` agree; that the medium gives back the bytes it was given. The caller of `load` verifies them
    (`kvblocks.tiers.objects`).

    Attributes:
        writes_late: whether a load that answered TIMEOUT may still write its buffer. Such memory is never used again,
            so a store that lets go of its buffers in time, or never answers TIMEOUT, sets it to False.

    Thread-safety: any number of threads may call at once. Buffers of calls that run at once must not overlap, unless
    the calls only read them. A store belongs to the process that opened it, not to a fork of it.
    """

    writes_late: ClassVar[bool] = True

    def register(self, buffer: Buffer) -> None:  # noqa: B027 -- most stores have nothing to do here
        """Announce memory in which buffers of later calls lie. The memory must outlive the store.

        Stores that move bytes without copying them (RDMA) need it. Others do nothing, as this does.
        """

    @abstractmethod
    def lookup(self, keys: Sequence[str]) -> Sequence[bool | None]:
        """Whether each object is there: only a hint, as it may be evicted before it is loaded. None where the medium
        failed, so that nobody knows."""

    @abstractmethod
    def load(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[Status]:
        """Fill each buffer with the object of its key, which must be as long as the buffer."""

    @abstractmethod
    def store(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[Status]:
        """Keep a copy of each buffer under its key, in place of an older object. Others may be evicted."""

    @abstractmethod
    def delete(self, keys: Sequence[str]) -> list[Status]:
        """Forget objects: OK, MISSING where there is none, or TIMEOUT or ERROR where the object may still be there."""

    @abstractmethod
    def stats(self) -> StoreStats:
        """What the store holds now."""

    @abstractmethod
    def close(self) -> None:
        """Wait for calls that run, then release everything. A second call does nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


def checked_keys(keys: Sequence[str]) -> list[str]:
    """The keys of a batch as a list.

    Raises:
        TypeError, ValueError: see `Store`.
    """
    if isinstance(keys, str | bytes):
        raise TypeError(f"keys is a {type(keys).__name__}; give a list of keys")
    found = list(keys)
    for i, key in enumerate(found):
        if not isinstance(key, str):
            raise TypeError(f"keys[{i}] is a {type(key).__name__}; give text")
        try:
            length = len(key.encode())
        except UnicodeEncodeError:
            raise ValueError(f"keys[{i}]={key!r:.60} is no valid Unicode") from None
        if not 1 <= length <= MAX_KEY_BYTES:
            raise ValueError(f"keys[{i}] has {length} bytes in UTF-8; give 1 to {MAX_KEY_BYTES}")
    return found


def checked_batch(
    keys: Sequence[str], buffers: Sequence[Buffer], *, writable: bool
) -> tuple[list[str], list[memoryview]]:
    """The keys of a batch, and its buffers as one-dimensional views of bytes.

    Args:
        writable: whether the buffers are to be written.

    Raises:
        TypeError, ValueError: see `Store`.
    """
    found = checked_keys(keys)
    given = list(buffers)
    if len(found) != len(given):
        raise ValueError(f"there are {len(found)} keys and {len(given)} buffers; give one buffer for each key")
    views = []
    for i, buffer in enumerate(given):
        try:
            view = memoryview(buffer)
        except TypeError:
            raise TypeError(f"buffers[{i}] is a {type(buffer).__name__}, which has no buffer of bytes") from None
        if not view.c_contiguous:
            raise ValueError(f"buffers[{i}] is not contiguous; give memory in one piece")
        if not view.nbytes:
            raise ValueError(f"buffers[{i}] is empty; an object has at least 1 byte")
        if writable and view.readonly:
            raise TypeError(f"buffers[{i}] is read-only; give memory that can be written")
        views.append(view.cast("B"))
    return found, views
