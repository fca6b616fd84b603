"""CPU memory for caches: how much of it can be had, and zeroed pages that nobody has touched.

Knows no blocks and no layouts. Imports numpy, and torch for tensors that own such memory.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import re
import resource
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

__all__ = ["Room", "available_memory", "mappable", "promised", "room", "zeroed"]

_PROC = Path("/proc")
_LOOKED_AT = 1 << 30  # bytes of a mapping whose pages are asked for at once

_HUGE_FROM = 64 << 20  # bytes of a mapping, 32 huge pages of 2 MiB: the first touch takes at most a 32nd of it


class Room(NamedTuple):
    """How many bytes this process can still have, and what it is that ends there."""

    nbytes: int
    limit: str


def available_memory(proc: Path = _PROC) -> int:
    """Bytes that this process can still map and touch; see `room`."""
    return room(proc).nbytes


def room(proc: Path = _PROC) -> Room:
    """The least of what the machine, its cgroups and the limits of this process leave.

    Args:
        proc: where procfs is mounted.

    The machine's figure is `MemAvailable`. For each cgroup (v1 and v2) from the process's own up to the root it is
    limit - usage + page cache, which the kernel gives back before it fails. What `zeroed` gave out here and nobody has
    touched yet is taken off these, as its owners will want it; what other processes were promised is not known. What
    managers keep their books in is not counted: some 70 bytes for a block and 4 for each of its tokens, which is less
    than a thousandth of the K and V of a model.
    Of mappings RLIMIT_AS and RLIMIT_DATA, and CommitLimit where the kernel never overcommits, leave what they leave.
    Swap is not counted. `sys.maxsize` where nothing is known.
    """
    taken = promised()
    rooms = [Room(left - taken, limit) for left, limit in (*_machine(proc), *_cgroups(proc))]
    least = min([*rooms, *_mappings(proc)], default=Room(sys.maxsize, "no limit that is known"))
    return least._replace(nbytes=max(0, least.nbytes))


def promised() -> int:
    """Bytes that `zeroed` gave out and whose pages nobody has touched yet."""
    return sum(nbytes - _touched(address, nbytes) for address, nbytes in list(_given.values()))


def mappable(nbytes: int) -> int:
    """The most bytes, `nbytes` at most, that the system maps in one piece now; it is asked, and nothing is kept."""
    low, high = 0, -(-nbytes // mmap.PAGESIZE)  # pages that it maps, and pages that may be too many
    while low < high:
        middle = (low + high + 1) // 2
        try:
            _mapped(middle * mmap.PAGESIZE).close()
            low = middle
        except OSError:
            high = middle - 1
    return min(nbytes, low * mmap.PAGESIZE)


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
        pages = _mapped(nbytes)
    except OSError as error:
        raise MemoryError(f"mmap of {nbytes} bytes: {error.strerror}") from None
    with contextlib.suppress(AttributeError, OSError):  # a system or a kernel without them: ordinary pages do
        pages.madvise(mmap.MADV_HUGEPAGE if nbytes >= _HUGE_FROM else mmap.MADV_NOHUGEPAGE)
    memory = torch.frombuffer(pages, dtype=torch.uint8)
    _given[id(pages)] = memory.data_ptr(), nbytes
    weakref.finalize(pages, _given.pop, id(pages)).atexit = False
    if prefault:
        memory[:: mmap.PAGESIZE].zero_()
    return memory


_given: dict[int, tuple[int, int]] = {}  # address and bytes of each mapping that is still there

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def _mapped(nbytes: int) -> mmap.mmap:
    return mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _touched(address: int, nbytes: int) -> int:
    """Bytes of a mapping whose pages are in memory."""
    touched = 0
    for start in range(0, nbytes, _LOOKED_AT):
        size = min(nbytes - start, _LOOKED_AT)
        pages = np.empty(-(-size // mmap.PAGESIZE), np.uint8)
        if _libc.mincore(address + start, size, pages.ctypes.data):
            if ctypes.get_errno() == errno.ENOMEM:
                break  # it was unmapped meanwhile, by the thread that held its last tensor
            raise OSError(ctypes.get_errno(), f"mincore: {os.strerror(ctypes.get_errno())}")
        touched += int(np.count_nonzero(pages & 1)) * mmap.PAGESIZE
    return min(touched, nbytes)


def _machine(proc: Path) -> Iterator[Room]:
    available = _kilobytes(proc / "meminfo", "MemAvailable")
    if available is not None:
        yield Room(available, "memory of the machine")


def _mappings(proc: Path) -> Iterator[Room]:
    """What may still be mapped, touched or not."""
    for which, name, counted in (
        (resource.RLIMIT_AS, "RLIMIT_AS (ulimit -v)", "VmSize"),
        (resource.RLIMIT_DATA, "RLIMIT_DATA (ulimit -d)", "VmData"),
    ):
        limit, used = resource.getrlimit(which)[0], _kilobytes(proc / "self/status", counted)
        if limit != resource.RLIM_INFINITY and used is not None:
            yield Room(limit - used, name)
    if _read(proc / "sys/vm/overcommit_memory").strip() == "2":
        most, committed = (_kilobytes(proc / "meminfo", name) for name in ("CommitLimit", "Committed_AS"))
        if most is not None and committed is not None:
            yield Room(most - committed, "CommitLimit (vm.overcommit_memory=2)")


def _kilobytes(path: Path, name: str) -> int | None:
    """Bytes that a line such as "MemAvailable: 12 kB" says; None without it."""
    found = re.search(rf"^{name}:\s+(\d+) kB", _read(path), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _cgroups(proc: Path) -> Iterator[Room]:
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


def _hierarchy(point: Path, root: str, path: str, unified: bool) -> Iterator[Room]:
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
            left = int(most) - int(used) + sum(int(stat.get(name, 0)) for name in caches)
            yield Room(left, f"{limit} of the cgroup at {folder}")


def _unescaped(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), field)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
