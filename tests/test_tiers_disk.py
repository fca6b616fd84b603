"""A `DiskStore`: the suite, then whatever happens to folders, files, disks and processes."""

import errno
import fcntl
import os
import random
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvblocks.errors import StoreInUse
from kvblocks.sizes import HEADER_BYTES
from kvblocks.tiers import DiskStore, ObjectFormat, Status
from kvblocks.tiers import disk as disk_module
from kvblocks.tiers.conformance import CHECKS, Subject
from kvblocks.tiers.disk import FEWEST_SLOTS, LOCK, read_folder, remove_folder
from kvblocks.tiers.segments import Record, Segment

PAGE = 4096
KILLS = 200 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 10
ALLOCATE = os.posix_fallocate
OK, MISSING, CORRUPT, FULL, ERROR = Status.OK, Status.MISSING, Status.CORRUPT, Status.FULL, Status.ERROR


def content(seed: object, nbytes: int = 8 * PAGE) -> bytes:
    return random.Random(repr(seed)).randbytes(nbytes)


def put(store: DiskStore, *keys: str, nbytes: int = 8 * PAGE) -> list[Status]:
    """One after the other, so that slots and recency are in this order."""
    return [store.store([key], [content(key, nbytes)])[0] for key in keys]


def get(store: DiskStore, *keys: str, nbytes: int = 8 * PAGE) -> list[Status]:
    """What loading answers, one after the other; what is there must be right."""
    targets = [bytearray(nbytes) for _ in keys]
    statuses = [store.load([key], [target])[0] for key, target in zip(keys, targets, strict=True)]
    for key, status, target in zip(keys, statuses, targets, strict=True):
        assert status is not OK or target == content(key, nbytes), f"other bytes than were stored as {key}"
    return statuses


def files(folder: Path, ending: str) -> list[Path]:
    return sorted(folder.glob(f"*{ending}"), key=lambda path: int(path.stem))


@pytest.fixture(params=["direct", "page cache"])
def cached(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the page cache where the file system of the tests takes that, and not."""
    if request.param == "page cache":
        refuse_direct(monkeypatch)


def refuse_direct(monkeypatch: pytest.MonkeyPatch) -> None:
    really = os.open

    def opened(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT here")
        return really(path, flags, mode)

    monkeypatch.setattr(os, "open", opened)


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_conforms(check: Callable[[Subject], None], tmp_path: Path) -> None:
    check(Subject(open=lambda: DiskStore(tmp_path / "new" / "kv", 1 << 20), capacity=1 << 20, persistent=True))


# --- what goes first, and how much it takes


@pytest.mark.usefixtures("cached")
def test_least_recently_used_goes_first_and_that_outlives_the_store(tmp_path: Path) -> None:
    with DiskStore(tmp_path, 1 << 20) as store:
        number = 0
        while not store.stats().evictions:
            put(store, f"k{number}")
            number += 1
        held = number - 1
        assert get(store, "k0") == [MISSING]
        assert get(store, "k3", "k1") == [OK, OK]
        put(store, "new")  # k2 is the oldest now
        assert store.lookup(["k1", "k2", "k3", "k4"]) == [True, False, True, True]
        order = [found.key for found in store.objects()]
    assert order == [*(f"k{i}" for i in range(4, number)), "k3", "k1", "new"]
    assert [found.key for found in read_folder(tmp_path)] == order
    with DiskStore(tmp_path, 1 << 20) as store:
        assert [found.key for found in store.objects()] == order
        put(store, *(f"n{i}" for i in range(held - 3)))
        assert get(store, "k3", "k1", "new") == [OK, OK, OK]
        assert store.lookup([f"k{i}" for i in range(4, number)]) == [False] * (number - 4)


@pytest.mark.parametrize("capacity", [60_000, 1 << 20])
def test_it_never_takes_more_than_its_capacity(capacity: int, tmp_path: Path) -> None:
    chance = random.Random(0)
    with DiskStore(tmp_path, capacity) as store:
        for i in range(150):
            put(store, f"k{i}", nbytes=chance.choice([1, PAGE, 3 * PAGE, 9 * PAGE]))
            stats = store.stats()
            on_disk = sum(file.stat().st_blocks * 512 for file in tmp_path.iterdir() if file.name != LOCK)
            assert on_disk <= stats.bytes_on_disk <= capacity
            assert stats.bytes_used is not None
            assert stats.bytes_used <= stats.bytes_on_disk
        assert stats.evictions


def test_what_can_never_fit_lets_nothing_go(tmp_path: Path) -> None:
    with DiskStore(tmp_path, 1 << 20) as store:
        assert put(store, "a", "b") == [OK, OK]
        assert put(store, "large", nbytes=1 << 20) == [FULL]
        assert get(store, "a", "b", "large") == [OK, OK, MISSING]
        assert store.stats().evictions == 0


def test_objects_of_another_size_get_their_share_and_keep_it(tmp_path: Path) -> None:
    """The second size takes the place of what is coldest; then both keep about half, without giving it to and fro."""
    with DiskStore(tmp_path, 8 << 20) as store:
        for i in range(400):
            put(store, f"first{i}", nbytes=8 * PAGE)
        assert get(store, "first390", nbytes=8 * PAGE) == [OK]
        for i in range(200):
            put(store, f"a{i}", nbytes=8 * PAGE)
            put(store, f"b{i}", nbytes=7 * PAGE)
        kept = [sum(store.lookup([f"{kind}{i}" for i in range(200)])) for kind in "ab"]
        assert min(kept) > 90
        recent = [f"{kind}{i}" for i in range(140, 200) for kind in "ab"]
        assert sum(store.lookup(recent)) > 0.9 * len(recent)
        used = store.stats().bytes_used
        assert used is not None
        assert used > 0.8 * (8 << 20)


def test_a_smaller_capacity_keeps_what_is_warm(tmp_path: Path) -> None:
    with DiskStore(tmp_path, 4 << 20) as store:
        for i in range(80):
            put(store, f"k{i}")
    with DiskStore(tmp_path, 2 << 20) as store:
        assert store.stats().bytes_on_disk <= 2 << 20
        assert store.lookup(["k0", "k79"]) == [False, True]
        assert sum(status is OK for status in get(store, *(f"k{i}" for i in range(80)))) > 40


# --- who may use a folder


def test_one_store_a_folder(tmp_path: Path) -> None:
    with DiskStore(tmp_path, 1 << 20) as store:
        put(store, "a")
        with pytest.raises(StoreInUse, match=rf"{tmp_path} is in use by process {os.getpid()}; close its") as refused:
            DiskStore(tmp_path, 1 << 20)
        assert refused.value.path == str(tmp_path)
        with pytest.raises(StoreInUse):
            remove_folder(tmp_path)
        code = f"from kvblocks.tiers import DiskStore; DiskStore({str(tmp_path)!r}, 1 << 20)"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        assert f"StoreInUse: {tmp_path} is in use by process {os.getpid()}" in other.stderr
        assert get(store, "a") == [OK]
    with DiskStore(tmp_path, 1 << 20) as store:
        assert get(store, "a") == [OK]


def test_a_folder_that_is_removed_while_it_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock on a file that was deleted in between keeps nobody out, so the lock is taken again."""
    really = fcntl.flock

    def flock(fd: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", really)
        really(fd, how)
        (tmp_path / LOCK).unlink()

    monkeypatch.setattr(fcntl, "flock", flock)
    with DiskStore(tmp_path, 1 << 20), pytest.raises(StoreInUse):
        DiskStore(tmp_path, 1 << 20)


def test_an_interrupt_waits_for_the_threads_that_use_the_buffers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, ended = Segment.write, []

    def slow(segment: Segment, slot: int, view: memoryview) -> bool:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        time.sleep(0.1)
        written = write(segment, slot, view)
        ended.append(slot)
        return written

    monkeypatch.setattr(Segment, "write", slow)
    with DiskStore(tmp_path, 1 << 20) as store:
        with pytest.raises(KeyboardInterrupt):
            store.store(["a", "b", "c"], [content(key) for key in "abc"])
        assert len(ended) == 2
        assert get(store, "a", "b", "c") == [MISSING, OK, OK]
        assert len(store._areas[8 * PAGE][0].free) == FEWEST_SLOTS - 2


def test_a_fork_has_no_part_in_it(tmp_path: Path) -> None:
    """A child neither uses the store nor keeps the folder locked when the process that opened it is gone."""
    code = f"""
        import os, sys, time
        from kvblocks.tiers import DiskStore
        store = DiskStore({str(tmp_path)!r}, 1 << 20)
        store.store(["a"], [b"four"])
        if os.fork() == 0:
            try:
                os.write(1, f"{{store.lookup(['a'])}} in the fork\\n".encode())
            except ValueError as error:
                os.write(1, f"{{error}}\\n".encode())
            store.close()
            sys.stdin.read()
            os._exit(0)
        os.write(1, f"{{store.lookup(['a'])}}\\n".encode())
        os.kill(os.getpid(), 9)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = {process.stdout.readline().strip() for _ in range(2)}
        process.wait(60)  # the first process is gone, the fork still waits
        with DiskStore(tmp_path, 1 << 20) as store:
            target = bytearray(4)
            assert store.load(["a"], [target]) == [OK]
    assert "[True]" in lines
    assert any("of which this one is a fork" in line for line in lines)


def test_modes(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        with DiskStore(tmp_path / "kv", 1 << 20) as store:
            put(store, "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "kv").stat().st_mode) == 0o700
    found = {file.name: stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "kv").iterdir()}
    assert found == {LOCK: 0o600, "1.index": 0o600, "1.slots": 0o600}


# --- what happens to files and disks


def test_a_process_that_is_killed_at_any_moment(tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("kill_disk_store.py"))
    for folder, capacity in (("ample", "67108864"), ("scarce", "1000000")):
        command = [sys.executable, script, str(tmp_path / folder), str(KILLS), "1", capacity]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 + 5 * KILLS)
        assert done.returncode == 0, done.stderr
        assert f"{KILLS} times killed" in done.stdout


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("opened", [True, False])
def test_a_file_cut_short(opened: bool, tmp_path: Path) -> None:
    """What was in it is gone, or right; and no later write makes zeros of it by making the file long again."""
    keys = [f"k{i}" for i in range(13)]  # the last slots of the second file are free
    store = DiskStore(tmp_path, 1 << 20)
    put(store, *keys)
    if not opened:
        store.close()
    for file in files(tmp_path, ".slots"):
        os.truncate(file, 2 * 8 * PAGE + PAGE)
    if not opened:
        store = DiskStore(tmp_path, 1 << 20)
    with store:
        put(store, *(f"more{i}" for i in range(4)))
        assert OK in put(store, "last")
        found = get(store, *keys)
        assert found.count(OK) < 13
        assert set(found) <= {OK, MISSING, CORRUPT}
        assert get(store, "last") == [OK]
        assert store.stats().lost if opened else found.count(OK) == 4
    with DiskStore(tmp_path, 1 << 20) as store:
        again = get(store, *keys)
        assert all(now is MISSING or before is OK for now, before in zip(again, found, strict=True))
        assert get(store, "last") == [OK]


def test_a_table_cut_short(tmp_path: Path) -> None:
    keys = [f"k{i}" for i in range(8)]
    with DiskStore(tmp_path, 1 << 20) as store:
        put(store, *keys)
    os.truncate(tmp_path / "1.index", PAGE + 3 * 512 + 100)
    with DiskStore(tmp_path, 1 << 20) as store:
        assert get(store, *keys).count(OK) == 3
    os.truncate(tmp_path / "1.index", 100)
    with DiskStore(tmp_path, 1 << 20) as store:
        assert get(store, *keys).count(OK) == 0
        assert store.stats().lost == 1
        assert put(store, *keys) == [OK] * 8
        assert get(store, *keys) == [OK] * 8


def test_bits_that_turn_in_a_table_are_misses(tmp_path: Path) -> None:
    """Every object is right or missing, whichever bit of the table turned; none comes under another key."""
    with DiskStore(tmp_path, 1 << 20) as store:
        put(store, "a", "b", "c", nbytes=100)
    index = tmp_path / "1.index"
    before, chance, missing = index.read_bytes(), random.Random(3), 0
    places = [*range(24), *range(40, 48), *(PAGE + slot * 512 + i for slot in range(4) for i in range(60))]
    for place in [*range(24, 40), *chance.sample(places, 60)]:  # those sixteen say how large slots are, and how many
        spoilt = bytearray(before)
        spoilt[place] ^= 1 << chance.randrange(8)
        index.write_bytes(spoilt)
        with DiskStore(tmp_path, 1 << 20) as store:
            found = get(store, "a", "b", "c", nbytes=100)
            assert set(found) <= {OK, MISSING}
            missing += found.count(MISSING)
        if not index.exists():  # the header was hit: such a file says nothing any more
            (tmp_path / "1.slots").write_bytes(bytes(8 * PAGE))
            remove_folder(tmp_path)
            with DiskStore(tmp_path, 1 << 20) as store:
                put(store, "a", "b", "c", nbytes=100)
            before = index.read_bytes()
    assert missing > 30


def test_a_bit_that_turns_in_the_recency_changes_no_order(tmp_path: Path) -> None:
    with DiskStore(tmp_path, 1 << 20) as store:
        put(store, "a", "b", "c")
    with open(tmp_path / "1.index", "r+b") as file:
        file.seek(PAGE + 16 + 6)  # of the first record: it would be the most recent by far
        file.write(b"\x01")
    with DiskStore(tmp_path, 1 << 20) as store:
        assert [found.key for found in store.objects()] == ["a", "b", "c"]


def test_bits_that_turn_in_slots_are_seen_by_who_verifies(tmp_path: Path) -> None:
    form = ObjectFormat("0" * 64)
    [block] = form.blocks(form.root(), np.arange(16), 16)
    made = bytearray(HEADER_BYTES + 5000)
    made[HEADER_BYTES:] = content("payload", 5000)
    form.seal(block, 0, "all", made)
    key = form.key(block, 0, "all")
    with DiskStore(tmp_path, 1 << 20) as store:
        store.store([key], [made])
    slots, chance = tmp_path / "1.slots", random.Random(0)
    before = slots.read_bytes()
    for _ in range(20):
        spoilt = bytearray(before)
        spoilt[chance.randrange(len(made))] ^= 1 << chance.randrange(8)
        slots.write_bytes(spoilt)
        with DiskStore(tmp_path, 1 << 20) as store:
            target = bytearray(len(made))
            assert store.load([key], [target]) == [OK]
            assert not form.verify(block, 0, "all", target)
    slots.write_bytes(before)
    with DiskStore(tmp_path, 1 << 20) as store:
        assert store.load([key], [target]) == [OK]
        assert form.verify(block, 0, "all", target)


def test_records_count_for_their_own_slot_alone(tmp_path: Path) -> None:
    """A record that was copied to another slot, or another file, names bytes that are not its own."""
    for folder in ("one", "two"):
        with DiskStore(tmp_path / folder, 1 << 20) as store:
            put(store, "a" if folder == "one" else "b", "c", nbytes=100)
    one, two = (bytearray((tmp_path / folder / "1.index").read_bytes()) for folder in ("one", "two"))
    first, second = slice(PAGE, PAGE + 512), slice(PAGE + 512, PAGE + 1024)
    (tmp_path / "two" / "1.index").write_bytes(two[:PAGE] + one[first] + two[second] + two[PAGE + 1024 :])
    (tmp_path / "one" / "1.index").write_bytes(one[:PAGE] + one[second] + one[first] + one[PAGE + 1024 :])
    for folder, wanted in (("one", [MISSING] * 3), ("two", [MISSING, MISSING, OK])):
        with DiskStore(tmp_path / folder, 1 << 20) as store:
            assert get(store, "a", "b", "c", nbytes=100) == wanted


@pytest.mark.parametrize(
    "made",
    [
        Record("k", 100, 2**63, 1, 0),
        Record("k", 100, 1, 2**63, 0),
        Record("k", PAGE + 1, 1, 1, 0),
        Record("k", 0, 1, 1, 0),
    ],
    ids=["sequence", "used", "too long", "empty"],
)
def test_records_that_no_store_writes_are_misses(made: Record, tmp_path: Path) -> None:
    with DiskStore(tmp_path, 1 << 20) as store:
        put(store, "a", nbytes=100)
        store._areas[PAGE][0].segment.record(3, made)
    with DiskStore(tmp_path, 1 << 20) as store:
        assert store.lookup(["a", "k"]) == [True, False]
        assert put(store, "b", nbytes=100) == [OK]


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    names = ["01.index", "a.slots", "1.txt", "index"]
    for name in names:
        (tmp_path / name).write_bytes(b"mine")
    with DiskStore(tmp_path, 1 << 20) as store:
        put(store, "a")
    remove_folder(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(names)


def limited(monkeypatch: pytest.MonkeyPatch, limit: int, folder: Path) -> None:
    """A disk with room for so many bytes in this folder."""

    def allocate(fd: int, offset: int, nbytes: int) -> None:
        if sum(file.stat().st_blocks * 512 for file in folder.iterdir()) + nbytes > limit:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        ALLOCATE(fd, offset, nbytes)

    monkeypatch.setattr(os, "posix_fallocate", allocate)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It makes do with what there is, down to nothing, and grows once there is room again."""
    limited(monkeypatch, 400_000, tmp_path)
    keys = [f"k{i}" for i in range(30)]
    with DiskStore(tmp_path, 64 << 20) as store:
        assert put(store, *keys) == [OK] * 30
        assert 4 <= get(store, *keys).count(OK) < 12
        assert put(store, "other", nbytes=3 * PAGE) == [OK]
        assert get(store, "other", nbytes=3 * PAGE) == [OK]
        assert put(store, "large", nbytes=500_000) == [FULL]
        assert put(store, "again") == [OK]
        assert not list(tmp_path.glob("*.new"))
        limited(monkeypatch, 1 << 30, tmp_path)
        monkeypatch.setattr(disk_module, "FULL_SECONDS", 0.0)
        store._full_until = 0.0
        assert put(store, *keys) == [OK] * 30
        assert get(store, *keys) == [OK] * 30
    limited(monkeypatch, 0, tmp_path / "none")
    with DiskStore(tmp_path / "none", 64 << 20) as store:
        assert put(store, "a", "b") == [FULL, FULL]
        assert get(store, "a") == [MISSING]
    assert os.listdir(tmp_path / "none") == [LOCK]


def in_mount(tmp_path: Path, options: str, code: str) -> str:
    """What `code` prints with a tmpfs of these options at `tmp_path`, in a mount namespace of its own."""
    program = f"from pathlib import Path\nfolder = Path({str(tmp_path)!r})\n{textwrap.dedent(code)}"
    mount = f'mount -t tmpfs -o {options} none "{tmp_path}" && exec "$0" -c "$1"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, sys.executable, program]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("there is no unshare here, to mount a file system for the test alone")
    if done.returncode and ("unshare" in done.stderr or "mount:" in done.stderr):
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_file_system_that_is_full(tmp_path: Path) -> None:
    code = """
        from kvblocks.tiers import DiskStore
        with DiskStore(folder / "kv", "1GiB") as store:
            keys = [f"k{i}" for i in range(300)]
            print({status.name for status in store.store(keys, [key.encode() * 8000 for key in keys])})
            right = 0
            for key in keys:
                target = bytearray(8000 * len(key))
                if store.load([key], [target])[0].name == "OK":
                    assert target == key.encode() * 8000
                    right += 1
            print(right > 60)
    """
    assert in_mount(tmp_path, "size=4m", code).splitlines() == ["{'OK'}", "True"]


def test_a_folder_that_is_read_only(tmp_path: Path) -> None:
    code = """
        from kvblocks.tiers import DiskStore
        try:
            DiskStore(folder, "1GiB")
        except OSError as error:
            print(type(error).__name__, error.strerror, error.filename)
    """
    assert in_mount(tmp_path, "ro", code) == f"OSError Read-only file system {tmp_path / LOCK}\n"


def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads and writes that fail are ERROR, whatever of them fails; what was there before is there afterwards."""

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with DiskStore(tmp_path, 1 << 20) as store:
        put(store, "a", "b")
        free = len(store._areas[8 * PAGE][0].free)
        with monkeypatch.context() as broken:
            broken.setattr(os, "pwritev", fail)
            assert put(store, "a", "new") == [ERROR, ERROR]
            assert store.delete(["b"]) == [ERROR]
            assert get(store, "a") == [OK]
        with monkeypatch.context() as broken:
            broken.setattr(os, "preadv", fail)
            assert get(store, "a", "b") == [ERROR, ERROR]
        with monkeypatch.context() as broken:
            broken.setattr(Segment, "record", fail)
            assert put(store, "a", "new") == [ERROR, ERROR]
        assert len(store._areas[8 * PAGE][0].free) == free
        with monkeypatch.context() as broken:
            # A slot whose record could be neither written nor wiped is never used again: it might name other bytes.
            broken.setattr(Segment, "record", fail)
            broken.setattr(Segment, "wipe", fail)
            assert put(store, "new") == [ERROR]
            assert len(store._areas[8 * PAGE][0].free) == free - 1
        assert get(store, "a", "b", "new") == [OK, OK, MISSING]
        assert put(store, "a", "new") == [OK, OK]
        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="Input/output error"):
            store.close()
    monkeypatch.undo()
    with DiskStore(tmp_path, 1 << 20) as store:
        assert get(store, "a", "b", "new") == [OK, OK, OK]


def test_writes_that_take_less_than_they_were_given_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_direct(monkeypatch)
    write, read = os.pwritev, os.preadv
    monkeypatch.setattr(os, "pwritev", lambda fd, pieces, offset: write(fd, [pieces[0][:1000]], offset))
    monkeypatch.setattr(os, "preadv", lambda fd, pieces, offset: read(fd, [pieces[0][:1000]], offset))
    with DiskStore(tmp_path, 1 << 20) as store:
        assert put(store, "a", "b", nbytes=9001) == [OK, OK]
        assert get(store, "a", "b", nbytes=9001) == [OK, OK]


def test_of_two_that_store_one_key_the_one_that_began_later_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Segment.write
    with DiskStore(tmp_path, 1 << 20) as store:

        def slow(segment: Segment, slot: int, view: memoryview) -> bool:
            monkeypatch.setattr(Segment, "write", write)
            assert put(store, "a") == [OK]
            return write(segment, slot, view)

        monkeypatch.setattr(Segment, "write", slow)
        assert store.store(["a"], [content("earlier")]) == [OK]
        assert get(store, "a") == [OK]
        assert len(store._areas[8 * PAGE][0].free) == FEWEST_SLOTS - 1


def test_what_is_read_is_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An object that is replaced, deleted or the oldest while it is read keeps its slot until it has been."""
    read = Segment.read
    with DiskStore(tmp_path, 200_000) as store:
        put(store, "a")
        changes = [
            lambda: store.store(["a"], [content("other")]),
            lambda: store.delete(["a"]),
            lambda: [put(store, f"k{i}") for i in range(20)],
            lambda: [put(store, f"s{i}", nbytes=5 * PAGE) for i in range(20)],
        ]
        for change in changes:

            def slow(segment: Segment, slot: int, view: memoryview, change: Callable[[], object] = change) -> bool:
                monkeypatch.setattr(Segment, "read", read)
                change()
                return read(segment, slot, view)

            assert put(store, "a") == [OK]
            monkeypatch.setattr(Segment, "read", slow)
            assert get(store, "a") == [OK]
        areas = [area for areas in store._areas.values() for area in areas]
        for area in areas:
            assert len(area.free) == len(set(area.free))
            assert len(area.free) + len(area.entries) == area.segment.num_slots
            assert area.busy == 0


# --- folders from outside


def test_reading_and_removing_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "kv"
    before = time.time()
    with DiskStore(folder, 1 << 20) as store:
        put(store, "a", nbytes=5)
        put(store, "b", nbytes=9000)
        put(store, "a", nbytes=5)
        found = read_folder(folder)  # a store has it open
        assert [(each.key, each.length) for each in found] == [("b", 9000), ("a", 5)]
        assert all(before - 1 <= each.stored <= time.time() + 1 for each in found)
        assert store.objects() == found
    (folder / "mine").touch()
    (folder / "7.slots").write_bytes(b"left by a killed process")
    assert remove_folder(folder) > 0
    assert os.listdir(folder) == ["mine"]
    for call in (read_folder, remove_folder):
        with pytest.raises(FileNotFoundError, match=r"is no folder of a DiskStore: there is no kvblocks\.lock in it"):
            call(folder)
    (folder / "mine").unlink()
    with DiskStore(folder, 1 << 20) as store:
        assert get(store, "a", "b") == [MISSING, MISSING]
    remove_folder(folder)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "path is empty", {"path": ""}),
        (ValueError, "capacity=0 must be 1 to", {"capacity": 0}),
        (ValueError, "capacity='much' is not a size", {"capacity": "much"}),
        (TypeError, "capacity is a float", {"capacity": 1.5}),
        (ValueError, r"threads=0 is outside 1\.\.256", {"threads": 0}),
        (TypeError, "'str' object cannot be interpreted as an integer", {"threads": "4"}),
    ],
)
def test_wrong_arguments(error: type[Exception], message: str, arguments: Any, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        DiskStore(**({"path": tmp_path / "kv", "capacity": 1} | arguments))
    assert not (tmp_path / "kv").exists()


def test_a_path_that_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file"):
        DiskStore(tmp_path / "file", 1)
