"""A store that goes wrong in every way that stores do, for tests of what stands above stores.

What goes wrong is drawn from a seed, or told call by call. It never writes where it was not told to.
"""

import enum
import random
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

from kvblocks.tiers.memory_store import MemoryStore
from kvblocks.tiers.store import Buffer, Status, Store, StoreStats


class Fault(enum.Enum):
    SLOW = "takes a while"
    HANG = "returns only once `let_go` was called, and moves its bytes then"
    LIES = "says of each object the contrary, and OK to a store or a load that did nothing"
    TORN = "gives the first part of the object, and after it what was in the buffer"
    RECYCLED = "gives the first part of the object and the last part of another one"
    TRUNCATED = "gives the object without its end, zeros instead"
    FOREIGN = "gives another object, whole"
    FLIPPED = "gives the object with one bit changed"
    HALFWAY = "does the first half of a batch, then raises"
    DEAD = "raises from now on, whatever is called"


class StoreDied(ConnectionError):
    """What a client library raises when its server is gone; a store should never let it through, but some do."""


ON_LOAD_ALONE = (Fault.TORN, Fault.RECYCLED, Fault.TRUNCATED, Fault.FOREIGN, Fault.FLIPPED)


class FaultyStore(Store):
    """A `MemoryStore` in front of which things go wrong.

    Args:
        chances: how likely each fault is in a call.
        seed: of the draws.

    Attributes:
        script: faults of the next calls, in order, before any are drawn; None for a call that goes well.
        seen: how often each fault happened.
    """

    def __init__(self, chances: Mapping[Fault, float] | None = None, seed: int = 0, capacity: int = 64 << 20) -> None:
        self.inner = MemoryStore(capacity)
        self.script: list[Fault | None] = []
        self.seen: dict[Fault, int] = dict.fromkeys(Fault, 0)
        self._chances = dict(chances or {})
        self._chance = random.Random(seed)
        self._lock = threading.Lock()
        self._go = threading.Event()
        self._dead = False
        self._contents: dict[str, bytes] = {}

    def let_go(self) -> None:
        """Calls that hang go on."""
        self._go.set()

    def lookup(self, keys: Sequence[str]) -> list[bool]:
        fault = self._fault(on_load=False)
        found = self.inner.lookup(keys)
        if fault is Fault.HALFWAY:
            raise StoreDied("connection lost in the middle of a batch")
        return [not there for there in found] if fault is Fault.LIES else found

    def load(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[Status]:
        fault = self._fault(on_load=True)
        if fault is Fault.LIES:
            return [Status.OK] * len(keys)
        if fault is Fault.HALFWAY:
            half = len(keys) // 2
            self.inner.load(keys[:half], buffers[:half])
            raise StoreDied("connection lost in the middle of a batch")
        if fault not in ON_LOAD_ALONE:
            return self.inner.load(keys, buffers)
        statuses = []
        for key, buffer in zip(keys, buffers, strict=True):
            view = memoryview(buffer).cast("B")
            before = bytes(view)
            [status] = self.inner.load([key], [view])
            if status is Status.OK:
                self._spoil(fault, key, view, before)
            statuses.append(status)
        return statuses

    def store(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[Status]:
        fault = self._fault(on_load=False)
        if fault is Fault.LIES:
            return [Status.OK] * len(keys)
        if fault is Fault.HALFWAY:
            keys, buffers = keys[: len(keys) // 2], buffers[: len(keys) // 2]
        statuses = self.inner.store(keys, buffers)
        with self._lock:
            self._contents.update(zip(keys, map(bytes, buffers), strict=True))
        if fault is Fault.HALFWAY:
            raise StoreDied("connection lost in the middle of a batch")
        return statuses

    def delete(self, keys: Sequence[str]) -> list[Status]:
        fault = self._fault(on_load=False)
        if fault is Fault.LIES:
            return [Status.OK] * len(keys)
        if fault is Fault.HALFWAY:
            self.inner.delete(keys[: len(keys) // 2])
            raise StoreDied("connection lost in the middle of a batch")
        return self.inner.delete(keys)

    def stats(self) -> StoreStats:
        if self._dead:
            raise StoreDied("the server is gone")
        return self.inner.stats()

    def close(self) -> None:
        self._go.set()
        self.inner.close()

    def _fault(self, *, on_load: bool) -> Fault | None:
        """What goes wrong with this call; what only takes time has been waited for."""
        with self._lock:
            if self._dead:
                raise StoreDied("the server is gone")
            fault = self.script.pop(0) if self.script else self._drawn()
            if fault in ON_LOAD_ALONE and not on_load:
                fault = None
            if fault is not None:
                self.seen[fault] += 1
            if fault is Fault.DEAD:
                self._dead = True
                raise StoreDied("the server is gone")
        if fault in (Fault.SLOW, Fault.HANG):
            self._pause(fault)
        return fault

    def _pause(self, fault: Fault) -> None:
        if fault is Fault.SLOW:
            time.sleep(0.01)
        else:
            self._go.wait()

    def _drawn(self) -> Fault | None:
        for fault, chance in self._chances.items():
            if self._chance.random() < chance:
                return fault
        return None

    def _spoil(self, fault: Fault | None, key: str, view: memoryview, before: bytes) -> None:
        """Make of the object in `view` what a reader would find after this fault."""
        with self._lock:
            cut = self._chance.randrange(len(view))
            others: list[Any] = [value for name, value in self._contents.items() if name != key]
            others = [value for value in others if len(value) == len(view)]
            other = self._chance.choice(others) if others else bytes(len(view))
            if fault is Fault.TORN:
                view[cut:] = before[cut:]
            elif fault is Fault.RECYCLED:
                view[cut:] = other[cut:]
            elif fault is Fault.TRUNCATED:
                view[cut:] = bytes(len(view) - cut)
            elif fault is Fault.FOREIGN:
                view[:] = other
            elif fault is Fault.FLIPPED:
                view[cut] ^= 1 << self._chance.randrange(8)
