"""The interface of stores: the suite on stores that keep to it, and on stores that do not."""

from collections.abc import Callable, Sequence

import pytest
from faulty_store import Fault, FaultyStore, StoreDied

from kvblocks.tiers import MemoryStore, Status, Store
from kvblocks.tiers.conformance import CHECKS, NotConforming, Subject
from kvblocks.tiers.store import Buffer

CAPACITY = 512 << 10


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("make", [MemoryStore, lambda capacity: FaultyStore(capacity=capacity)], ids=["memory", "none"])
def test_stores_that_conform(check: Callable[[Subject], None], make: Callable[[int], Store]) -> None:
    """A `FaultyStore` without faults is one of them: what tests above it see are its faults alone."""
    check(Subject(open=lambda: make(CAPACITY), capacity=CAPACITY))


class Forgets(MemoryStore):
    def lookup(self, keys: Sequence[str]) -> list[bool]:
        return [False] * len(keys)


class TakesAnyLength(MemoryStore):
    def _load(self, key: str, view: memoryview) -> Status:
        value = self._objects.get(key)
        if value is None:
            return Status.MISSING
        view[: len(value)] = value[: len(view)]
        return Status.OK


class WritesTooFar(MemoryStore):
    """As one does that writes whole pages into registered memory."""

    def load(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[Status]:
        import ctypes

        statuses = super().load(keys, buffers)
        for buffer in buffers:
            end = ctypes.addressof(ctypes.c_char.from_buffer(buffer)) + len(buffer)
            ctypes.memset(end, 0, -end % 4096)
        return statuses


class KeepsNoCopy(MemoryStore):
    def store(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[Status]:
        super().store(keys, buffers)
        self._objects.update(zip(keys, buffers, strict=True))
        return [Status.OK] * len(keys)


class IgnoresCase(MemoryStore):
    def load(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[Status]:
        return super().load([key.lower() for key in keys], buffers)

    def store(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[Status]:
        return super().store([key.lower() for key in keys], buffers)


class Tears(MemoryStore):
    """Stores in place, a half at a time, without keeping others out."""

    def store(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[Status]:
        for key, buffer in zip(keys, buffers, strict=True):
            new, old = bytes(buffer), self._objects.get(key, b"")
            super().store([key], [new[: len(new) // 2] + old[len(new) // 2 :]] if len(old) == len(new) else [new])
            super().lookup([key])
        return [Status.OK] * len(keys)


class RaisesWhenFull(MemoryStore):
    def _store(self, key: str, value: bytes) -> Status:
        if self._used + len(value) > self._capacity:
            raise OSError("no space left")
        return super()._store(key, value)


class AnswersAfterClose(MemoryStore):
    def _check_open(self) -> None:
        pass


class DoesTheFirstHalf(MemoryStore):
    """Of a wrong batch, as one does that checks while it works."""

    def store(self, keys: Sequence[str], buffers: Sequence[Buffer]) -> list[Status]:
        return [super(DoesTheFirstHalf, self).store([k], [b])[0] for k, b in zip(keys, buffers, strict=True)]


class DeletesNothing(MemoryStore):
    def _drop(self, key: str) -> bool:
        return key in self._objects


@pytest.mark.parametrize(
    ("kind", "check"),
    [
        (Forgets, "what_is_stored_can_be_loaded"),
        (TakesAnyLength, "an_object_of_another_length_is_not_loaded"),
        (WritesTooFar, "what_is_stored_can_be_loaded"),
        (KeepsNoCopy, "what_is_stored_can_be_loaded"),
        (IgnoresCase, "keys_have_no_meaning"),
        (Tears, "what_is_stored_again"),
        (RaisesWhenFull, "a_store_that_is_full"),
        (AnswersAfterClose, "closing"),
        (DoesTheFirstHalf, "wrong_calls_change_nothing"),
        (DeletesNothing, "deleting"),
        (MemoryStore, "opening_again"),
    ],
)
def test_the_suite_finds_what_does_not_conform(kind: type[MemoryStore], check: str) -> None:
    [chosen] = [known for known in CHECKS if known.__name__ == f"check_{check}"]
    with pytest.raises((NotConforming, OSError)):
        chosen(Subject(open=lambda: kind(CAPACITY), capacity=CAPACITY, persistent=True))


def test_each_fault_of_the_store_for_tests() -> None:
    content, other = bytes(range(256)) * 16, b"o" * 4096
    wrong: list[Fault] = []
    for fault in (Fault.TORN, Fault.RECYCLED, Fault.TRUNCATED, Fault.FOREIGN, Fault.FLIPPED, Fault.LIES):
        store = FaultyStore()
        store.store(["a", "b"], [content, other])
        store.script = [fault]
        target = bytearray(b"t" * 4096)
        assert store.load(["a"], [target]) == [Status.OK]
        wrong += [fault] * (target != content)
        assert store.seen[fault] == 1
        assert store.load(["a"], [target]) == [Status.OK]
        assert target == content
    assert len(wrong) == 6
    store = FaultyStore()
    store.script = [Fault.HALFWAY]
    with pytest.raises(StoreDied, match="in the middle"):
        store.store(["a", "b"], [content, other])
    assert store.lookup(["a", "b"]) == [True, False]
    store.script = [Fault.DEAD]
    with pytest.raises(StoreDied):
        store.lookup(["a"])
    with pytest.raises(StoreDied):
        store.stats()


def test_a_call_that_hangs_writes_late() -> None:
    from threading import Thread

    store = FaultyStore()
    store.store(["a"], [b"late"])
    store.script = [Fault.HANG]
    target = bytearray(4)
    thread = Thread(target=store.load, args=(["a"], [target]))
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    assert target == bytes(4)
    store.let_go()
    thread.join(10)
    assert target == b"late"


@pytest.mark.parametrize("capacity", [0, -1, "much"])
def test_a_capacity_that_cannot_be(capacity: int | str) -> None:
    with pytest.raises(ValueError, match="capacity="):
        MemoryStore(capacity)
