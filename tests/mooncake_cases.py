"""What `tests/test_tiers_mooncake.py` runs in a network namespace: a `MooncakeStore` on masters and owners that fail.

`MC_` settings of the environment make Mooncake give up after 1 second instead of 30.
"""

import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest
from mooncake_cluster import HOST, Master, lender, master
from server_drill import drill
from stopping import stop_process
from test_cli_stores import found_by_the_second, reported

from kvblocks.tiers import MooncakeStore, Status, Store
from kvblocks.tiers import mooncake as mooncake_module
from kvblocks.tiers.conformance import CHECKS, Subject

OK, MISSING, CORRUPT, TIMEOUT, FULL, ERROR = Status
MIB = 1 << 20
LIMIT, SLACK = 1.0, 4.0  # seconds of the settings, and what a busy machine may take besides


@cache
def content(seed: object, nbytes: int = MIB) -> bytes:
    return random.Random(repr(seed)).randbytes(nbytes)


def put(store: Store, *keys: str, nbytes: int = MIB) -> list[Status]:
    return store.store(keys, [content(key, nbytes) for key in keys])


def get(store: Store, *keys: str, nbytes: int = MIB) -> list[Status]:
    """What loading answers; what is there must be right."""
    targets = [bytearray(nbytes) for _ in keys]
    statuses = store.load(keys, targets)
    for key, status, target in zip(keys, statuses, targets, strict=True):
        assert status is not OK or target == content(key, nbytes), f"other bytes than were stored as {key}"
    return statuses


def until(call: Callable[[], list[Status]], wanted: list[Status], seconds: float = 20) -> None:
    end, seen = time.monotonic() + seconds, call()
    while seen != wanted:
        assert time.monotonic() < end, f"still {seen}, not {wanted}"
        time.sleep(0.1)
        seen = call()


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.monotonic()
    return call(), time.monotonic() - begun


class Shared:
    """A client under many names: opening and closing one takes seconds, and a check wants a store without objects."""

    def __init__(self, client: Any) -> None:
        self.client, self.number = client, 0

    def setup(self, settings: dict[str, str]) -> int:
        self.number += 1
        return 0

    def close(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        call, number = getattr(self.client, name), self.number
        if not name.startswith("batch_"):
            return call
        return lambda keys, *more: call([f"{number} {key}" for key in keys], *more)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Master]:
    with master(tmp_path_factory.mktemp("master")) as started:
        yield started


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Master]:
    """A master that the test may kill."""
    with master(tmp_path) as started:
        yield started


@pytest.fixture(scope="module")
def shared(cluster: Master) -> Iterator[Shared]:
    """Of a process that lends nothing, so that every object is another's memory."""
    with lender(cluster, 32 * MIB), MooncakeStore(cluster.address, segment=0) as store:
        yield Shared(store._client)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_conforms(
    check: Callable[[Subject], None], shared: Shared, cluster: Master, monkeypatch: pytest.MonkeyPatch
) -> None:
    if check.__name__ != "check_closing":
        monkeypatch.setattr(mooncake_module, "_client", lambda: shared)
    check(Subject(open=lambda: MooncakeStore(cluster.address, segment=0), capacity=32 * MIB))


def test_objects_that_are_evicted_while_they_are_read(tmp_path: Path) -> None:
    """Twice as much as there is room for, by two writers, beside a reader; leases end while it reads."""
    seen: list[Status] = []
    with master(tmp_path, lease_ms=20) as own, MooncakeStore(own.address, segment=24 * MIB) as store:
        stop = threading.Event()

        def crowd(number: int) -> None:
            for i in range(100_000):
                if stop.is_set():
                    break
                put(store, f"crowd {number} {i % 40}")

        threads = [threading.Thread(target=crowd, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            seen += put(store, "a", "b") + get(store, "a", "b", "crowd 0 1", "crowd 1 2")
            time.sleep(0.05)
        stop.set()
        for thread in threads:
            thread.join(30)
        assert OK in seen
        assert MISSING in seen
        assert set(seen) <= {OK, MISSING, FULL}
        assert put(store, "large", nbytes=64 * MIB) == [FULL]


def test_registered_memory(cluster: Master) -> None:
    with MooncakeStore(cluster.address, segment=16 * MIB) as store:
        memory = memoryview(mmap(-1, 4 * MIB))
        store.register(memory)
        store.register(memory)
        with pytest.raises(ValueError, match="Mooncake does not register"):
            store.register(memory[MIB:])
        memory[:MIB] = content("registered")
        assert store.store(["registered"], [memory[:MIB]]) == [OK]
        assert store.load(["registered"], [memory[2 * MIB : 3 * MIB]]) == [OK]
        assert memory[2 * MIB : 3 * MIB] == content("registered")


def test_deleting_waits_for_leases(cluster: Master) -> None:
    with (
        MooncakeStore(cluster.address, segment=16 * MIB, lease=0) as hasty,
        MooncakeStore(cluster.address, segment=0) as patient,
    ):
        assert put(hasty, "leased") == [OK]
        assert hasty.lookup(["leased"]) == [True]
        assert hasty.delete(["leased", "none"]) == [ERROR, MISSING]
        assert get(hasty, "leased") == [OK]
        assert patient.delete(["leased", "none"]) == [OK, MISSING]
        assert get(hasty, "leased") == [MISSING]


def test_a_key_that_is_half_written(cluster: Master) -> None:
    """As by a process that died in between: a miss, until the master gives it up."""
    with MooncakeStore(cluster.address, segment=16 * MIB) as store:
        assert store._client.batch_put_session_start(["half"], [MIB]) == [0]
        assert store.lookup(["half"]) == [False]
        assert get(store, "half") == [MISSING]
        assert put(store, "half") == [OK]  # which is not true
        assert get(store, "half") == [MISSING]
        assert store.delete(["half"]) == [ERROR]
        until(lambda: [*put(store, "half"), *get(store, "half")], [OK, OK])


def test_an_owner_that_is_killed_in_the_middle_of_batches(own: Master) -> None:
    """What another process stored is found; when that is gone there are misses, until another lends memory."""
    keys, seen, slowest = [f"k{i}" for i in range(6)], [], [0.0]
    with lender(own, 64 * MIB) as owner, MooncakeStore(own.address, segment=0) as store:
        target = bytearray(MIB)
        assert store.load(["from a lender"], [target]) == [OK]
        assert target == bytes(range(256)) * 4096
        assert put(store, *keys) == [OK] * 6
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                for call in (get, put):
                    statuses, seconds = timed(lambda call=call: call(store, *keys))  # type: ignore[misc]
                    seen.extend(statuses)
                    slowest[0] = max(slowest[0], seconds)

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        owner.kill()
        owner.wait(20)
        until(lambda: get(store, *keys), [MISSING] * 6)
        assert put(store, "new") == [FULL]
        stop.set()
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads)
        assert set(seen) <= {OK, MISSING, ERROR, FULL}
        assert ERROR in seen
        assert slowest[0] < 6 * LIMIT + SLACK  # objects are asked for one after the other
        with lender(own, 64 * MIB):
            until(lambda: [*put(store, *keys), *get(store, *keys)], [OK] * 12)


def test_an_owner_that_is_stopped(own: Master) -> None:
    """SIGSTOP: the call ends with its limit, other threads run meanwhile, and nothing is written late."""
    with lender(own, 64 * MIB) as owner, MooncakeStore(own.address, segment=0) as store:
        assert put(store, "large", nbytes=16 * MIB) == [OK]
        target = bytearray(16 * MIB)
        for delay in (0.0, 0.005):
            ticks, stop = [0], threading.Event()

            def tick(ticks: list[int] = ticks, stop: threading.Event = stop) -> None:
                while not stop.wait(0.01):
                    ticks[0] += 1

            ticking = threading.Thread(target=tick)
            ticking.start()
            stopping = threading.Timer(delay, stop_process, [owner])
            stopping.start()
            if not delay:
                stopping.join()
            [status], seconds = timed(lambda: store.load(["large"], [target]))
            stopping.join()
            stop.set()
            ticking.join()
            assert seconds < LIMIT + SLACK
            assert status in (OK, MISSING, ERROR)
            assert status is not OK or target == content("large", 16 * MIB)
            assert delay or status is ERROR
            assert status is not ERROR or ticks[0] > 20
            target[:] = b"\xa5" * len(target)
            owner.send_signal(signal.SIGCONT)
            time.sleep(0.5)
            assert target == b"\xa5" * len(target)
        until(lambda: [*put(store, "large", nbytes=16 * MIB), *get(store, "large", nbytes=16 * MIB)], [OK, OK])


def test_a_master_that_is_killed_and_started_again(own: Master) -> None:
    keys = [f"k{i}" for i in range(3)]
    with MooncakeStore(own.address, segment=32 * MIB) as store:
        assert put(store, *keys) == [OK] * 3
        own.kill()
        calls: list[tuple[Callable[[], Sequence[object]], object]] = [
            (lambda: get(store, *keys), [ERROR] * 3),
            (lambda: put(store, "new"), [ERROR]),
        ]
        for call, wanted in calls:
            answer, seconds = timed(call)
            assert answer == wanted
            assert seconds < 4.3 + SLACK
        own.start()
        until(lambda: put(store, *keys), [OK] * 3)
        assert get(store, *keys) == [OK] * 3


def test_a_master_that_is_stopped(own: Master) -> None:
    keys = [f"k{i}" for i in range(3)]
    with MooncakeStore(own.address, segment=32 * MIB) as store:
        assert put(store, *keys) == [OK] * 3
        stop_process(own.process)
        calls: list[tuple[Callable[[], Sequence[object]], object]] = [
            (lambda: get(store, *keys), [ERROR] * 3),
            (lambda: put(store, "new"), [ERROR]),
            (lambda: store.lookup(keys), [None] * 3),
        ]
        for call, wanted in calls:
            answer, seconds = timed(call)
            assert answer == wanted
            assert seconds < LIMIT + SLACK
        own.process.send_signal(signal.SIGCONT)
        until(lambda: [*put(store, *keys), *get(store, *keys)], [OK] * 6)
        [kept], seconds = timed(lambda: store.lookup(["k0"]))
        assert kept
        assert seconds < SLACK


def test_no_master() -> None:
    """Mooncake itself would try for 90 seconds."""
    begun = time.monotonic()
    with pytest.raises(ConnectionError, match=f"the master {HOST}:1 does not answer"):
        MooncakeStore(f"{HOST}:1", segment=0)
    assert time.monotonic() - begun < SLACK


def test_breakers_of_a_master_that_is_killed_and_started_again(own: Master) -> None:
    """It forgets all objects, and those who lent memory come back to it."""
    with lender(own, 64 * MIB), MooncakeStore(own.address, segment=0) as store:
        drill(store, own.kill, own.start, LIMIT, hangs=True, loses=True)


def test_breakers_of_a_master_that_is_stopped(own: Master) -> None:
    with lender(own, 64 * MIB), MooncakeStore(own.address, segment=0) as store:
        fail, recover = partial(stop_process, own.process), partial(own.process.send_signal, signal.SIGCONT)
        drill(store, fail, recover, LIMIT, hangs=True, loses=True)


def test_the_command_finds_what_another_stored(cluster: Master, capsys: pytest.CaptureFixture[str]) -> None:
    """Objects lie with a process that stays; the two that compute lend nothing."""
    with lender(cluster, 64 * MIB):
        first, second = (reported(capsys, "--store", f"mooncake://{cluster.address}?segment=0") for _ in range(2))
    found_by_the_second(first, second)


def test_what_it_exposes(cluster: Master) -> None:
    """The documentation says so: each client listens on every interface, whatever it is told."""
    with MooncakeStore(cluster.address, segment=16 * MIB):
        listing = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, timeout=20).stdout
    everywhere = [
        line for line in listing.splitlines() if "python" in line and line.split()[3].startswith(("0.0.0.0", "*"))
    ]
    assert len(everywhere) >= 2, listing
