"""Memory for caches: untouched until written, private, given back; and how much of it there is."""

import gc
import mmap
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvblocks import memory

GIB = 1 << 30


def mapped() -> int:
    """Bytes of address space in use."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE


def resident() -> int:
    """Bytes in memory, without files."""
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * mmap.PAGESIZE


@pytest.mark.parametrize("nbytes", [1, 4095, 4096, 4097, 5 << 20])
def test_zeroed_is_zero_aligned_and_writable(nbytes: int) -> None:
    tensor = memory.zeroed(nbytes)
    assert tensor.shape == (nbytes,)
    assert tensor.dtype == torch.uint8
    assert tensor.data_ptr() % mmap.PAGESIZE == 0
    assert not tensor.any()
    assert tensor.fill_(7).sum() == 7 * nbytes


def test_untouched_memory_is_not_resident_and_prefaulted_memory_is() -> None:
    before = resident()
    untouched = memory.zeroed(GIB)
    assert resident() - before < 50 << 20
    prefaulted = memory.zeroed(256 << 20, prefault=True)
    assert resident() - before > 250 << 20
    assert untouched[::GIB].sum() == prefaulted[::4096].sum() == 0


def test_the_first_tokens_of_a_small_cache_take_what_they_need() -> None:
    """A page of each layer: with huge pages that would be 2 MiB each, where the system gives them."""
    layers = [memory.zeroed(17 << 20) for _ in range(60)]
    before = resident()
    for layer in layers:
        layer[: 96 << 10] = 1
    assert resident() - before < 12 << 20  # 5.6 MiB were written


def test_the_last_tensor_takes_the_memory_with_it() -> None:
    gc.collect()
    before = mapped()
    tensor = memory.zeroed(GIB)
    last = tensor.view(torch.float32).view(4, -1)[3]
    del tensor
    gc.collect()
    assert mapped() - before > GIB // 2  # what else comes and goes is far smaller
    assert last[0] == 0
    del last
    assert mapped() - before < GIB // 2


def test_a_fork_writes_to_its_own() -> None:
    tensor = memory.zeroed(1 << 20)
    tensor[0] = 1
    child = os.fork()
    if child == 0:
        tensor.data_ptr()
        tensor[0] = 2
        os._exit(int(tensor[0]))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    assert tensor[0] == 1


def test_memory_alive_at_exit_does_no_harm() -> None:
    code = "from kvblocks import memory; keep = memory.zeroed(1 << 20); keep[0] = 1"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_what_cannot_be_mapped_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match=str(1 << 60)):
        memory.zeroed(1 << 60)


@pytest.fixture(autouse=True)
def nothing_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the caches of other tests were given is theirs."""
    monkeypatch.setattr(memory, "_given", {})


def procfs(root: Path, *, available: int | None, cgroup: str = "", mounts: str = "") -> Path:
    (root / "self").mkdir(parents=True)
    lines = "MemTotal: 1 kB\n" + ("" if available is None else f"MemAvailable:   {available >> 10} kB\n")
    (root / "meminfo").write_text(lines)
    (root / "self/cgroup").write_text(cgroup)
    (root / "self/mountinfo").write_text(mounts)
    return root


def group(folder: Path, version: int, limit: int | str, usage: int, cache: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    prefix = "" if version == 2 else "total_"
    (folder / "memory.stat").write_text(f"anon 5\n{prefix}active_file {cache - 1}\n{prefix}inactive_file 1\n")


MOUNT = {
    1: "35 31 0:32 {root} {point} rw,relatime - cgroup cgroup rw,memory\n",
    2: "36 31 0:33 {root} {point} rw,relatime - cgroup2 cgroup2 rw\n",
}
PLACE = {1: "7:cpu,cpuacct:/other\n4:memory:{path}\n", 2: "0::{path}\n"}


@pytest.mark.parametrize("version", [1, 2])
def test_the_least_of_machine_and_all_parent_groups_counts(tmp_path: Path, version: int) -> None:
    point = tmp_path / "with space"
    unlimited = "max" if version == 2 else 2**63 - 4096
    proc = procfs(
        tmp_path / "proc",
        available=90 << 20,
        cgroup=PLACE[version].format(path="/a/b"),
        mounts=MOUNT[version].format(root="/", point=str(point).replace(" ", r"\040")),
    )
    assert memory.available_memory(proc) == 90 << 20
    group(point / "a/b", version, unlimited, 1 << 20)
    assert memory.available_memory(proc) == 90 << 20
    group(point / "a", version, 100 << 20, 80 << 20, cache=30 << 20)
    assert memory.available_memory(proc) == 50 << 20
    group(point / "a/b", version, 40 << 20, 10 << 20, cache=1 << 20)
    assert memory.available_memory(proc) == 31 << 20
    group(point, version, 40 << 20, 50 << 20, cache=1 << 20)
    assert memory.available_memory(proc) == 0


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("path", ["/docker/abc", "/elsewhere", "/"])
def test_a_container_sees_its_own_group_at_the_mount(tmp_path: Path, version: int, path: str) -> None:
    proc = procfs(
        tmp_path / "proc",
        available=90 << 20,
        cgroup=PLACE[version].format(path=path),
        mounts=MOUNT[version].format(root="/docker/abc", point=tmp_path / "cgroup"),
    )
    group(tmp_path / "cgroup", version, 50 << 20, 10 << 20, cache=2 << 20)
    assert memory.available_memory(proc) == 42 << 20


def test_nothing_known_is_no_limit(tmp_path: Path) -> None:
    assert memory.available_memory(tmp_path) == sys.maxsize


def test_this_machine_has_some_memory_and_less_than_it_has_in_all() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    assert 0 < memory.available_memory() < total


def test_the_limit_of_the_address_space_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    proc = procfs(tmp_path / "proc", available=8 * GIB)
    (proc / "self/status").write_text(f"VmSize:\t {GIB >> 10} kB\nVmData:\t {GIB >> 11} kB\n")
    limits = {resource.RLIMIT_AS: 3 * GIB, resource.RLIMIT_DATA: 3 * GIB}
    monkeypatch.setattr(resource, "getrlimit", lambda which: (limits[which], resource.RLIM_INFINITY))
    assert memory.room(proc) == (2 * GIB, "RLIMIT_AS (ulimit -v)")
    limits[resource.RLIMIT_DATA] = 2 * GIB
    assert memory.room(proc) == (3 * GIB // 2, "RLIMIT_DATA (ulimit -d)")


def test_where_the_kernel_never_overcommits_its_limit_counts(tmp_path: Path) -> None:
    proc = procfs(tmp_path / "proc", available=8 * GIB)
    with open(proc / "meminfo", "a") as file:
        file.write(f"CommitLimit: {5 * GIB >> 10} kB\nCommitted_AS: {GIB >> 10} kB\n")
    (proc / "sys/vm").mkdir(parents=True)
    for mode, left in (("0", 8 * GIB), ("1", 8 * GIB), ("2", 4 * GIB)):
        (proc / "sys/vm/overcommit_memory").write_text(f"{mode}\n")
        assert memory.room(proc).nbytes == left
    assert memory.room(proc).limit == "CommitLimit (vm.overcommit_memory=2)"


def test_what_was_given_and_not_touched_counts_as_taken(tmp_path: Path) -> None:
    proc = procfs(tmp_path / "proc", available=8 * GIB)
    before = memory.promised()
    tensor = memory.zeroed(GIB + 5)
    assert memory.promised() - before == GIB + 5
    assert memory.available_memory(proc) == 8 * GIB - before - GIB - 5
    tensor[: 64 << 20] = 1
    assert memory.promised() - before <= GIB + 5 - (64 << 20)
    view = tensor[7:9]
    del tensor
    assert memory.promised() > before
    del view
    gc.collect()
    assert memory.promised() == before


def test_how_much_can_be_mapped_is_found_by_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    mapped = memory._mapped

    def limited(nbytes: int) -> mmap.mmap:
        if nbytes > 1234 * mmap.PAGESIZE:
            raise OSError(12, "Cannot allocate memory")
        return mapped(nbytes)

    monkeypatch.setattr(memory, "_mapped", limited)
    assert memory.mappable(GIB) == 1234 * mmap.PAGESIZE
    assert memory.mappable(1234 * mmap.PAGESIZE - 1) == 1234 * mmap.PAGESIZE - 1
    assert memory.mappable(0) == 0
