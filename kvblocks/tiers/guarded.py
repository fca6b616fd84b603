"""GuardedStore: a store as `Tiers` calls it, which never raises, is left alone while it fails, and is counted.

Knows keys and buffers, not what they mean. Imports the interface of stores.
"""

import itertools
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import TypeVar

from kvblocks.tiers.store import Status, Store

__all__ = ["GuardedStore", "TierStats"]

FAILURES = 3  # calls in a row, after which a store is left alone
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds that it is left alone: twice as long each time, until a call succeeds
FULL_SECONDS = 10.0  # after which a store that was full is given objects again

_LOADED = (Status.OK, Status.MISSING, Status.CORRUPT)
_STORED = (Status.OK, Status.FULL)
_FOUND = (False, True)  # None is an answer too, of a store that fails

_log = logging.getLogger("kvblocks")

_T = TypeVar("_T")


@dataclass(kw_only=True)
class TierStats:
    """What became of the calls of one store, in objects where nothing else is said.

    Attributes:
        hits: loaded, and verified.
        misses: of a prompt, and not there when they were looked up or loaded.
        corrupt: loaded, and not what was asked for.
        errors: that the store failed to look up, load or keep.
        timeouts: calls that took longer than the deadline, and objects for which the store gave up waiting.
        stored: given to the store, which said that it has them.
        known: not given to the store, as it had them.
        full: for which it had no room.
        bytes_loaded, bytes_stored: of `hits` and `stored`, headers included.
        is_open: whether a breaker is open: the store failed several times, and is left alone for a while.
    """

    hits: int = 0
    misses: int = 0
    corrupt: int = 0
    errors: int = 0
    timeouts: int = 0
    stored: int = 0
    known: int = 0
    full: int = 0
    bytes_loaded: int = 0
    bytes_stored: int = 0
    is_open: bool = False


class _Breaker:
    """Whether one kind of call is made: not for a while after several in a row have failed or took too long."""

    def __init__(self, name: str, deadline: float, clock: Callable[[], float]) -> None:
        self._name, self._deadline, self._clock = name, deadline, clock
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._running: dict[int, float] = {}  # since when; those that are late are dropped
        self._failures = 0
        self._pause = FIRST_PAUSE
        self._shut_until: float | None = None

    @property
    def is_open(self) -> bool:
        return self._shut_until is not None

    @property
    def would_call(self) -> bool:
        shut_until = self._shut_until
        return shut_until is None or self._clock() >= shut_until

    def begin(self) -> int | None:
        """A number for a call that begins now; None where none is made."""
        now = self._clock()
        with self._lock:
            if self._shut_until is not None:
                if now < self._shut_until:
                    return None
                self._shut_until = now + self._pause  # this call shows how the store is; others wait for that
            number = next(self._numbers)
            self._running[number] = now
        return number

    def end(self, number: int, failure: str | None) -> None:
        """A call has ended, and failed for a reason, or not."""
        with self._lock:
            if self._running.pop(number, None) is None:
                return  # it was late, and has been counted
            if failure is not None:
                self._fail(failure)
            else:
                self._failures, self._pause, self._shut_until = 0, FIRST_PAUSE, None

    def expire(self) -> int:
        """Let calls that run for longer than the deadline count as failed; returns how many are new."""
        limit = self._clock() - self._deadline
        if all(began >= limit for began in tuple(self._running.values())):
            return 0  # without the lock, for which a step would wait
        with self._lock:
            late = [number for number, began in self._running.items() if began < limit]
            for number in late:
                del self._running[number]
                self._fail(f"it takes longer than {self._deadline:.3g} s")
        return len(late)

    def _fail(self, reason: str) -> None:
        self._failures += 1
        if self._shut_until is not None:
            self._pause = min(2 * self._pause, LONGEST_PAUSE)
        elif self._failures < FAILURES:
            return
        else:
            _log.warning(
                "%s failed %d times in a row and is not called for %.0f s: %s",
                self._name,
                self._failures,
                self._pause,
                reason,
            )
        self._shut_until = self._clock() + self._pause


class GuardedStore:
    """A store behind breakers, one for each kind of call.

    Three calls in a row that raise, or answer ERROR, TIMEOUT or None for an object, or take longer than `deadline`,
    open the breaker: for a second there is no such call, then one shows how the store is, and if it fails the pause
    doubles, up to a minute. MISSING, CORRUPT and FULL are no failures.

    Args:
        store: to call.
        deadline: seconds.
        clock: that gives seconds.

    Thread-safety: any thread.
    """

    def __init__(self, store: Store, deadline: float, clock: Callable[[], float]) -> None:
        self.store = store
        self._name = type(store).__name__
        self._clock = clock
        self._lock = threading.Lock()
        self._counts = TierStats()
        self._lookups, self._loads, self._puts = (
            _Breaker(f"{call} of {self._name}", deadline, clock) for call in ("lookup", "load", "store")
        )
        self._full_until: float | None = None

    @property
    def gives_objects(self) -> bool:
        """Whether it is worth looking for something now."""
        return self._lookups.would_call and self._loads.would_call

    @property
    def takes_objects(self) -> bool:
        """Whether it is worth storing something now."""
        full_until = self._full_until
        return self._puts.would_call and (full_until is None or self._clock() >= full_until)

    def lookup(self, keys: Sequence[str]) -> list[bool]:
        """As `Store.lookup`; nothing is there where the store fails."""
        found = self._call(self._lookups, len(keys), (bool, NoneType), _FOUND, lambda: self.store.lookup(keys))
        return [False] * len(keys) if found is None else [there is True for there in found]

    def load(self, keys: Sequence[str], buffers: Sequence[memoryview]) -> list[Status]:
        """As `Store.load`; ERROR where the store fails."""
        found = self._call(self._loads, len(keys), (Status,), _LOADED, lambda: self.store.load(keys, buffers))
        if found is None:
            return [Status.ERROR] * len(keys)
        self.count(misses=found.count(Status.MISSING), corrupt=found.count(Status.CORRUPT))
        return found

    def put(self, keys: Sequence[str], buffers: Sequence[memoryview]) -> list[Status]:
        """As `Store.store`; ERROR where the store fails."""
        found = self._call(self._puts, len(keys), (Status,), _STORED, lambda: self.store.store(keys, buffers))
        if found is None:
            return [Status.ERROR] * len(keys)
        kept = [buffer.nbytes for buffer, status in zip(buffers, found, strict=True) if status is Status.OK]
        self.count(stored=len(kept), bytes_stored=sum(kept), full=found.count(Status.FULL))
        if Status.FULL in found:
            self._full_until = self._clock() + FULL_SECONDS
        return found

    def count(self, **more: int) -> None:
        """Add to counters of `TierStats`."""
        with self._lock:
            for name, number in more.items():
                setattr(self._counts, name, getattr(self._counts, name) + number)

    def expire(self) -> None:
        """Let calls that run for longer than the deadline count as failed."""
        late = sum(breaker.expire() for breaker in (self._lookups, self._loads, self._puts))
        if late:
            self.count(timeouts=late)

    def stats(self) -> TierStats:
        is_open = any(breaker.is_open for breaker in (self._lookups, self._loads, self._puts))
        with self._lock:
            return TierStats(**(vars(self._counts) | {"is_open": is_open}))

    def _call(
        self,
        breaker: _Breaker,
        count: int,
        kinds: tuple[type, ...],
        sound: Sequence[object],
        call: Callable[[], Sequence[_T]],
    ) -> list[_T] | None:
        """What the store answers to `count` keys; None where it is not asked, raises, or gives what is no answer.

        Args:
            kinds: of what is an answer.
            sound: answers of a store that works.
        """
        number = breaker.begin()
        if number is None:
            return None
        answer: list[_T] | None = None
        reason = ""
        try:
            given = call()
            if len(given) == count and all(isinstance(each, kinds) for each in given):
                answer = list(given)
            else:
                reason = f"it answered {given!r:.80} to {count} keys"
        except BaseException as error:
            # Of whatever kind it is: calls that follow, and the breaker, show whether the store recovers.
            reason = f"{type(error).__name__}: {error}"
        failed = count if answer is None else sum(each not in sound for each in answer)
        timeouts = 0 if answer is None else sum(each is Status.TIMEOUT for each in answer)
        if failed:
            self.count(errors=failed - timeouts, timeouts=timeouts)
        if answer is not None and failed:
            reason = f"it answered {', '.join(sorted({str(each) for each in answer if each not in sound}))}"
        breaker.end(number, reason if failed else None)
        return answer
