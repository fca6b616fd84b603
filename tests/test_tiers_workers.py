"""Threads that call stores, in lanes, and the names under which blocks are shared."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from kvblocks import CacheConfig, CacheEngine, Group, Window
from kvblocks.tiers.names import namespace_of, shard_name
from kvblocks.tiers.workers import Task, Workers


def until(condition: Any, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_job_goes_from_lane_to_lane() -> None:
    workers, task = Workers([1, 2]), Task()
    names: list[str] = []

    def job() -> Iterator[int]:
        for lane in (1, 0, 1):
            names.append(threading.current_thread().name)
            yield lane
        names.append(threading.current_thread().name)

    workers.start(task, [(0, job())])
    until(lambda: task.ended)
    assert names == [f"kvblocks-tiers-{lane}" for lane in (0, 1, 0, 1)]
    assert task.at_rest
    workers.close()


def test_a_lane_that_hangs_holds_up_no_other() -> None:
    workers, hung, other = Workers([2, 1]), Task(), Task()
    go = threading.Event()
    done: list[int] = []

    def hangs() -> Iterator[int]:
        go.wait(60)
        yield 1
        done.append(0)

    def works(number: int) -> Iterator[int]:
        done.append(number)
        yield from ()

    workers.start(hung, [(0, hangs()) for _ in range(3)])
    workers.start(other, [(1, works(1)), (1, works(2))])
    until(lambda: other.ended)
    assert done == [1, 2]
    hung.give_up()
    assert not hung.at_rest  # two parts run
    go.set()
    until(lambda: hung.at_rest)
    assert (done, hung.ended) == ([1, 2], False)  # neither the third job nor what comes after was begun
    workers.close()


def test_a_job_that_raises_has_ended() -> None:
    workers, task = Workers([1]), Task()

    def job() -> Iterator[int]:
        yield 0
        raise KeyboardInterrupt

    workers.start(task, [(0, job())])
    until(lambda: task.ended)
    workers.close()


def test_closed_workers_do_nothing_more() -> None:
    before = threading.active_count()
    workers, task = Workers([1, 1]), Task()
    go, entered = threading.Event(), threading.Event()

    def job() -> Iterator[int]:
        entered.set()
        go.wait(60)
        yield 1

    workers.start(task, [(0, job()), (0, job())])
    assert entered.wait(10)
    workers.close()
    task.give_up()
    go.set()
    until(lambda: task.at_rest and threading.active_count() <= before)
    workers.start(task, [(0, job())])
    assert not task.ended


def test_a_system_without_threads_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """And those that could be started end."""
    before = threading.active_count()
    start = threading.Thread.start
    left = iter(range(3))

    def scarce(self: threading.Thread) -> None:
        if next(left, None) is None:
            raise RuntimeError("can't start new thread")
        start(self)

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", scarce)
        with pytest.raises(RuntimeError, match="can't start"):
            Workers([2, 2])
    until(lambda: threading.active_count() <= before)


def engine(dtype: str = "float32", layout: str = "NHD", **fields: Any) -> CacheEngine:
    sizes: dict[str, Any] = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 8, "num_gpu_blocks": 4}
    return CacheEngine(CacheConfig(**(sizes | fields)), dtype, "cpu", layout=layout)


def test_whatever_decides_what_bytes_mean_is_in_the_namespace() -> None:
    def name(made: CacheEngine, model: str = "m", weights: str = "w") -> str:
        return namespace_of(made, model=model, weights_version=weights)

    windowed = (Group(None, (0,)), Group(Window(64), (1,)))
    different = [
        name(engine()),
        name(engine(), model="n"),
        name(engine(), weights="x"),
        name(engine(dtype="float16")),
        name(engine(layout="HND")),
        name(engine(block_size=8)),
        name(engine(num_layers=3)),
        name(engine(num_kv_heads=1)),
        name(engine(head_dim=16)),
        name(engine(v_head_dim=4)),
        name(engine(groups=windowed)),
        name(engine(groups=(Group(None, (0,)), Group(Window(32), (1,))))),
        name(engine(groups=(Group(None, (1,)), Group(Window(64), (0,))))),
    ]
    assert len(set(different)) == len(different)
    assert name(engine(num_gpu_blocks=9)) == different[0]
    for wrong, error in ({"model": ""}, ValueError), ({"weights": ""}, ValueError), ({"weights": None}, TypeError):
        with pytest.raises(error):
            name(engine(), **wrong)


def test_shards() -> None:
    assert shard_name() == "all"
    assert shard_name(heads=range(4, 8)) == "h4-7"
    assert shard_name(layers=range(16), heads=range(1)) == "l0-15.h0-0"
    for wrong in (range(0), range(0, 8, 2), range(-1, 3)):
        with pytest.raises(ValueError, match="heads="):
            shard_name(heads=wrong)
