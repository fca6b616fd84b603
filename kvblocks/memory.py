"""CPU memory for caches: how much of it can be had, and zeroed pages that nobody has touched.

Knows no blocks and no layouts. Imports torch, for tensors that own such memory.
"""

import contextlib
import mmap
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

__all__ = ["available_memory", "zeroed"]

_HUGE_FROM = 64 << 20  # bytes of a mapping, 32 huge pages of 2 MiB: the first touch takes at most a 32nd of it


def available_memory(proc: Path = Path("/proc")) -> int:
    """Bytes that this process can still touch: the least of what the machine, its cgroups and its own limit leave.

    Args:
        proc: where procfs is mounted.

    The machine's figure is `MemAvailable`. For each cgroup (v1 and v2) from the process's own up to the root it is
    limit - usage + page cache, which the kernel gives back before it fails. Swap is not counted. Memory that was
    promised to anybody but never touched counts as available. `sys.maxsize` where nothing is known.
    """
    rooms = [*_machine(proc), *_cgroups(proc), *_address_space(proc)]
    return max(0, min(rooms, default=sys.maxsize))


def zeroed(nbytes: int, *, prefault: bool = False) -> torch.Tensor:
    """Zeroed, page-aligned CPU memory as a uint8 tensor [nbytes].

    A private anonymous mapping: no page exists before it is touched, a fork's writes stay its own, and it goes with the
    last tensor on it. From 64 MiB on huge pages are asked for: touching all of it then costs a fraction, and scattered
    blocks move faster. Below, they are declined: each layer's first tokens would take a huge page of its own, which is
    more than the tokens of a small model need.

    Args:
        nbytes: at least 1.
        prefault: touch every page now.

    Raises:
        MemoryError: the system has no such mapping to give.
    """
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"mmap of {nbytes} bytes: {error.strerror}") from None
    with contextlib.suppress(AttributeError, OSError):  # a system or a kernel without them: ordinary pages do
        pages.madvise(mmap.MADV_HUGEPAGE if nbytes >= _HUGE_FROM else mmap.MADV_NOHUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    if prefault:
        memory[:: mmap.PAGESIZE].zero_()
    return memory


def _machine(proc: Path) -> Iterator[int]:
    found = re.search(r"^MemAvailable:\s+(\d+) kB", _read(proc / "meminfo"), re.MULTILINE)
    if found:
        yield int(found[1]) * 1024


def _address_space(proc: Path) -> Iterator[int]:
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    used = _read(proc / "self/statm").split()
    if limit != resource.RLIM_INFINITY and used:
        yield limit - int(used[0]) * mmap.PAGESIZE


def _cgroups(proc: Path) -> Iterator[int]:
    paths: dict[bool, str] = {}  # is it the v2 hierarchy: this process's place in it
    for line in _read(proc / "self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" or "memory" in controllers.split(","):
            paths[number == "0"] = path
    for line in _read(proc / "self/mountinfo").splitlines():
        mount, _, filesystem = line.partition(" - ")
        root, point = (_unescaped(field) for field in mount.split()[3:5])
        kind, _, options = filesystem.split(" ", 2)
        unified = kind == "cgroup2"
        if unified in paths and (unified or (kind == "cgroup" and "memory" in options.split(","))):
            yield from _hierarchy(Path(point), root, paths[unified], unified)


def _hierarchy(point: Path, root: str, path: str, unified: bool) -> Iterator[int]:
    """Room in each cgroup from `path` up to the one mounted at `point`, which is `root` of its hierarchy."""
    if unified:
        limit, usage, caches = "memory.max", "memory.current", ("active_file", "inactive_file")
    else:
        limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        caches = ("total_active_file", "total_inactive_file")
    # A path outside the mounted part (a container's view of its host) leaves the mount itself.
    below = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path()
    for folder in [point / below, *(point / parent for parent in below.parents)]:
        most, used = _read(folder / limit).strip(), _read(folder / usage).strip()
        if most.isdecimal() and used.isdecimal():
            stat = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
            yield int(most) - int(used) + sum(int(stat.get(name, 0)) for name in caches)


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
