"""Kill a process that is busy with a `DiskStore`, over and over, and see what the folder gives afterwards.

Run `python tests/kill_disk_store.py FOLDER ROUNDS SEED [CAPACITY]`. Each round forks a child that stores, replaces,
loads and deletes objects in three threads and notes in a journal what it begins and what has ended; it is killed
with SIGKILL after up to a quarter of a second. Then each key must give exactly what the journal says: the last object
whose storing had ended, or one that was being stored. With a small CAPACITY objects may also have made way.

Exit status 0: all was as it should be. Imports no torch, so that it can fork.
"""

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

from kvblocks.tiers.disk import DiskStore
from kvblocks.tiers.store import Status

SIZES = (64 << 10, 20_000)  # of objects under even and odd keys
KEYS = range(24)
AMPLE = 64 << 20


def content(key: int, version: int) -> bytes:
    size = SIZES[key % 2]
    return (random.Random(key * 1_000_003 + version).randbytes(256) * (size // 256 + 1))[:size]


def work(folder: Path, capacity: int, journal: int, seed: int) -> None:
    """Until killed: change keys at random, each thread its own, and note it."""
    store = DiskStore(folder, capacity)

    def note(*what: object) -> None:
        os.write(journal, (" ".join(map(str, what)) + "\n").encode())

    def run(number: int) -> None:
        chance = random.Random(seed * 3 + number)
        version = seed * 100_000
        while True:
            keys = chance.sample(KEYS[number::3], 2)
            names = [f"key {key}" for key in keys]
            action = chance.random()
            if action < 0.6:
                version += 1
                for key in keys:
                    note("begin", key, version)
                statuses = store.store(names, [content(key, version) for key in keys])
            elif action < 0.85:
                store.load(names, [bytearray(SIZES[key % 2]) for key in keys])
                continue
            else:
                for key in keys:
                    note("begin", key, 0)
                statuses = [Status.OK if s is Status.MISSING else s for s in store.delete(names)]
            for key, status in zip(keys, statuses, strict=True):
                if status is not Status.OK:
                    note("failed", key, status)
                    os._exit(3)
                note("end", key, 0 if action >= 0.85 else version)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os._exit(4)


def killed(folder: Path, capacity: int, journal: Path, seed: int, seconds: float) -> list[str]:
    """What a child noted that was killed after so many seconds of work."""
    fd = os.open(journal, os.O_CREAT | os.O_TRUNC | os.O_RDWR | os.O_APPEND, 0o600)
    pid = os.fork()
    if pid == 0:
        try:
            work(folder, capacity, fd, seed)
        finally:
            os._exit(5)
    while not os.fstat(fd).st_size and os.waitpid(pid, os.WNOHANG)[0] == 0:
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    os.close(fd)
    assert os.WIFSIGNALED(status), f"the child ended by itself with status {status}: {journal.read_text()[-300:]}"
    return journal.read_text().splitlines()


def main(folder: Path, rounds: int, seed: int, capacity: int = AMPLE) -> None:
    chance = random.Random(seed)
    state: dict[int, int] = {}  # version of each key, 0 where there is none
    served = stored = 0
    for number in range(rounds):
        lines = killed(folder, capacity, folder.with_suffix(".journal"), seed + number, chance.random() * 0.25)
        begun: dict[int, int] = {}
        for line in lines:
            what, noted, version = line.split()
            if what == "begin":
                begun[int(noted)] = int(version)
            else:
                state[int(noted)] = begun.pop(int(noted))
                stored += int(version) > 0
        with DiskStore(folder, capacity) as store:
            for key in KEYS:
                right = {state.get(key, 0), begun.get(key, state.get(key, 0))}
                target = bytearray(SIZES[key % 2])
                [status] = store.load([f"key {key}"], [target])
                if status is Status.OK:
                    found = [version for version in right if version and content(key, version) == target]
                    assert found, f"round {number}: key {key} gives other bytes than those of versions {right}"
                    state[key] = found[0]
                    served += 1
                else:
                    assert status is Status.MISSING, f"round {number}: key {key} gives {status}"
                    assert 0 in right or capacity < AMPLE, f"round {number}: key {key} of version {right} is lost"
                    state[key] = 0
            on_disk = sum(file.stat().st_blocks * 512 for file in folder.iterdir())
            assert on_disk <= capacity + 4096, f"round {number}: {on_disk} bytes on disk, of {capacity}"
    print(f"{rounds} times killed, {stored} objects stored, {served} found right afterwards")
    assert served > 2 * rounds


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
