"""MB/s of stores that lie behind a network, beside the bare socket, in the same run and over the same interface.

Run `python benchmarks/stores.py`. It starts a redis-server (Debian: redis-server), and a Mooncake master with a process
that lends memory, in a network namespace of their own where that can be had (else without Mooncake, and it says why),
and stores and loads batches of objects of 64 KiB, 1 MiB and 4 MiB. `socket` is as many bytes through one TCP
connection to a process that keeps nothing: what is to be had there, as Redis too is one connection and one thread. All
take turns, redis' own client beside them. Mooncake does not store a key again, so each of its puts has new keys.
"""

import argparse
import contextlib
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from mmap import mmap
from pathlib import Path

from harness import Row, machine, report

from kvblocks.tiers import MooncakeStore, RedisStore, Status, Store

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import mooncake_cluster

SIZES = {"64 KiB": 64 << 10, "1 MiB": 1 << 20, "4 MiB": 4 << 20}
SOCKET = "socket"
PUT, GET = b"p", b"g"


def serve(listener: socket.socket, size: int, count: int) -> None:
    """Take or give batches of `count` objects, as one byte before each says, until the client is gone."""
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    memory = memoryview(bytearray(os.urandom(size)))
    while kind := connection.recv(1):
        for _ in range(count):
            if kind == PUT:
                receive(connection, memory)
            else:
                connection.sendall(memory)
        if kind == PUT:
            connection.sendall(b"!")


def receive(connection: socket.socket, memory: memoryview) -> None:
    have = 0
    while have < len(memory):
        have += connection.recv_into(memory[have:])


class Bare:
    """The other end of `serve`."""

    def __init__(self, size: int, buffers: list[memoryview]) -> None:
        self.buffers = buffers
        listener = socket.create_server(("127.0.0.1", 0))
        fork = multiprocessing.get_context("fork")
        self.process = fork.Process(target=serve, args=(listener, size, len(buffers)), daemon=True)
        self.process.start()
        self.connection = socket.create_connection(listener.getsockname())
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.close()

    def put(self) -> None:
        self.connection.sendall(PUT)
        for buffer in self.buffers:
            self.connection.sendall(buffer)
        self.connection.recv(1)

    def get(self) -> None:
        self.connection.sendall(GET)
        for buffer in self.buffers:
            receive(self.connection, buffer)

    def close(self) -> None:
        self.connection.close()
        self.process.join(10)
        self.process.kill()


def times(contenders: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, after one that is not counted."""
    took: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(repeats + 1):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            if i:
                took[name].append(time.perf_counter() - start)
    return took


@contextlib.contextmanager
def redis_store(folder: Path, nbytes: int) -> Iterator[tuple[Store, int]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["redis-server", "--bind", "127.0.0.1", "--port", str(port), "--dir", str(folder), "--save", ""]
    command += ["--maxmemory", str(nbytes), "--maxmemory-policy", "allkeys-lru", "--appendonly", "no"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        with RedisStore(f"redis://127.0.0.1:{port}/0", timeout=20) as store:
            for _ in range(200):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.05)
            yield store, port
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def mooncake_store(folder: Path, nbytes: int, buffers: list[memoryview]) -> Iterator["Mooncake"]:
    with (
        mooncake_cluster.master(folder, client_ttl=10, lease_ms=10_000) as master,
        mooncake_cluster.lender(master, nbytes),
        MooncakeStore(master.address, segment=0) as store,
    ):
        yield Mooncake(store, buffers)


class Mooncake:
    """Puts under new keys, and gets of the keys of the last put."""

    def __init__(self, store: Store, buffers: list[memoryview]) -> None:
        self.store, self.buffers, self.keys, self.round = store, buffers, [""], 0

    def put(self) -> None:
        self.round += 1
        self.keys = [f"object {self.round} {i}" for i in range(len(self.buffers))]
        ok(self.store.store(self.keys, self.buffers))

    def get(self) -> None:
        ok(self.store.load(self.keys, self.buffers))

    def touch(self, rounds: int) -> None:
        """Write to all memory once: its first pages are slow, and not the store's doing."""
        keys: list[str] = []
        for _ in range(rounds):
            self.put()
            keys += self.keys
        ok(self.store.delete(keys))


def ok(statuses: list[Status]) -> None:
    if any(status is not Status.OK for status in statuses):
        raise ValueError(f"the store answered {set(statuses)}")


def own_client(port: int, keys: list[str], buffers: list[memoryview]) -> dict[str, Callable[[], object]]:
    """The same by the pipelines of redis' client, with a copy into the buffers at the end."""
    import redis

    client = redis.Redis(port=port, protocol=2)

    def put() -> None:
        with client.pipeline(transaction=False) as pipeline:
            for key, buffer in zip(keys, buffers, strict=True):
                pipeline.set(key, buffer)
            pipeline.execute()

    def get() -> None:
        with client.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.get(key)
            for buffer, payload in zip(buffers, pipeline.execute(), strict=True):
                buffer[:] = payload

    return {"put": put, "get": get}


def measure(label: str, size: int, nbytes: int, repeats: int, mooncake: bool) -> list[Row]:
    count = nbytes // size
    memory = memoryview(mmap(-1, nbytes))
    memory[:] = os.urandom(nbytes)
    buffers = [memory[i * size : (i + 1) * size] for i in range(count)]
    keys = [f"object {i}" for i in range(count)]
    bare = Bare(size, buffers)
    rows = []
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        store, port = stack.enter_context(redis_store(folder, 4 * nbytes))
        plain = own_client(port, keys, buffers)
        calls: dict[str, dict[str, Callable[[], object]]] = {
            "put": {
                SOCKET: bare.put,
                "RedisStore": lambda: ok(store.store(keys, buffers)),
                "redis' pipeline": plain["put"],
            },
            "get": {
                SOCKET: bare.get,
                "RedisStore": lambda: ok(store.load(keys, buffers)),
                "redis' pipeline": plain["get"],
            },
        }
        if mooncake:
            lent = stack.enter_context(mooncake_store(folder, 2 * (repeats + 3) * nbytes, buffers))
            lent.store.register(memory)
            lent.touch(repeats + 2)
            calls["put"]["MooncakeStore"] = lent.put
            calls["get"]["MooncakeStore"] = lent.get
        for what, contenders in calls.items():
            took = times(contenders, repeats)
            seconds = {name: statistics.median(each) for name, each in took.items()}
            spread = {name: [nbytes / 1e6 / edge(each) for edge in (max, min)] for name, each in took.items()}
            rows.append(Row(f"{what} of {label}", seconds, nbytes / 1e6, "MB/s", {"spread, MB/s": spread}))
    bare.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mebibytes", type=int, default=128, help="in a batch")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--inside", action="store_true", help="this is a network namespace for it already")
    options = parser.parse_args()
    missing = mooncake_cluster.run_inside()
    print(f"without Mooncake, which {missing}" if missing else "with Mooncake, over TCP")
    nbytes = options.mebibytes << 20
    rows = [row for each in SIZES.items() for row in measure(*each, nbytes, options.repeats, not missing)]
    about = machine(("kvblocks", "redis", "mooncake-transfer-engine-non-cuda"))
    workload = f"batches of {options.mebibytes} MiB over loopback, {options.repeats} repeats, one thread; medians"
    report("Stores behind a network", rows, ours=SOCKET, workload=workload, about=about, name="stores")
    for row in rows:
        for name, (low, high) in row.notes["spread, MB/s"].items():
            median = (row.amount or 0) / row.seconds[name]
            print(f"{row.workload}, {name}: {median:,.0f} MB/s ({low:,.0f} to {high:,.0f})")


if __name__ == "__main__":
    sys.exit(main())
