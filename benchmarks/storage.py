"""How fast blocks move: write, gather, copy_blocks and zero_blocks against the machine's memcpy and torch's indexing.

Run `python benchmarks/storage.py`; `--mebibytes 8 --layouts NHD` for a look in seconds. One thread, K and V together,
blocks scattered over a cache four times as large as what is moved.
"""

import argparse
import ctypes
import functools
from collections.abc import Callable

import torch
from harness import Row, compare, machine, report
from torch import Tensor

from kvblocks.sizes import LAYOUTS
from kvblocks.storage.cache import PagedKVCache

HEADS, DIM, BLOCK = 8, 128, 16

libc = ctypes.CDLL(None)
libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]


def by_token(cache: PagedKVCache) -> tuple[Tensor, Tensor]:
    """Views [blocks, block, heads, ...] of K and V, for torch to index."""
    orders = {"HDN": (0, 3, 1, 2), "NHD": (0, 1, 2, 3), "HND": (0, 2, 1, 3), "X": (0, 3, 1, 2, 4)}
    value_order = orders["HDN" if cache.layout == "X" else cache.layout]
    return cache.key_cache.permute(orders[cache.layout]), cache.value_cache.permute(value_order)


def movement(dtype: torch.dtype, layout: str, mebibytes: float, repeats: int) -> list[Row]:
    token = 2 * HEADS * DIM * dtype.itemsize
    num_blocks = max(1, int(mebibytes * 2**20) // (token * BLOCK))
    tokens = num_blocks * BLOCK
    nbytes = tokens * token
    cache = PagedKVCache(4 * num_blocks, HEADS, DIM, BLOCK, dtype, "cpu", layout=layout, prefault=True)
    keys, values = torch.randn(2, tokens, HEADS, DIM).to(dtype)
    out = (torch.zeros_like(keys), torch.zeros_like(values))
    shuffled = torch.randperm(4 * num_blocks)
    table, targets = shuffled[:num_blocks], shuffled[num_blocks : 2 * num_blocks]
    pairs = torch.stack([table, targets], 1)
    in_blocks = (table[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
    scattered = torch.randperm(4 * tokens)[:tokens]
    # memcpy has huge pages too, as the cache has.
    plain = PagedKVCache(num_blocks, HEADS, DIM, BLOCK, dtype, "cpu", prefault=True)
    other = PagedKVCache(num_blocks, HEADS, DIM, BLOCK, dtype, "cpu", prefault=True)
    halves = [(getattr(plain, side), getattr(other, side)) for side in ("key_cache", "value_cache")]
    views = by_token(cache)

    def memcpy() -> None:
        for source, target in halves:
            libc.memcpy(target.data_ptr(), source.data_ptr(), source.nbytes)

    def memset() -> None:
        for _, target in halves:
            libc.memset(target.data_ptr(), 0, target.nbytes)

    def torch_write(slots: Tensor) -> None:
        for view, rows in zip(views, (keys, values), strict=True):
            view[slots // BLOCK, slots % BLOCK] = rows.view(tokens, *view.shape[2:])

    def torch_gather() -> list[Tensor]:
        return [view[table].reshape(tokens, HEADS, DIM) for view in views]

    def torch_copy() -> None:
        for side in (cache.key_cache, cache.value_cache):
            side[targets] = side[table]

    def torch_zero() -> None:
        for side in (cache.key_cache, cache.value_cache):
            side[table] = 0

    def clone() -> list[Tensor]:
        return [source.clone() for source, _ in halves]

    work: dict[str, tuple[str, Callable[[], object], Callable[[], object], Callable[[], object]]] = {
        "write, blocks": (
            "memcpy",
            memcpy,
            functools.partial(cache.write, keys, values, in_blocks),
            functools.partial(torch_write, in_blocks),
        ),
        "write, tokens": (
            "memcpy",
            memcpy,
            functools.partial(cache.write, keys, values, scattered),
            functools.partial(torch_write, scattered),
        ),
        "gather, given out": ("memcpy", memcpy, functools.partial(cache.gather, table, tokens, out=out), torch_gather),
        "gather, new": ("clone", clone, functools.partial(cache.gather, table, tokens), torch_gather),
        "copy_blocks": ("memcpy", memcpy, functools.partial(cache.copy_blocks, pairs), torch_copy),
        "zero_blocks": ("memset", memset, functools.partial(cache.zero_blocks, table), torch_zero),
    }
    rows = []
    name = f"{layout} {str(dtype).removeprefix('torch.')} "
    for label, (base, machine_does, ours, theirs) in work.items():
        seconds = compare({"kvblocks": ours, base: machine_does, "torch indexing": theirs}, repeats, clock="cpu")
        rows.append(Row(name + label, seconds, 1e-9 * nbytes, "GB/s"))
    return rows


def allocation(mebibytes: int, repeats: int) -> Row:
    num_blocks = mebibytes * 2**20 // (2 * HEADS * DIM * 2 * BLOCK)
    shape = (num_blocks, HEADS, DIM, BLOCK)
    contenders: dict[str, Callable[[], object]] = {
        "kvblocks": lambda: PagedKVCache(num_blocks, HEADS, DIM, BLOCK, torch.bfloat16, "cpu"),
        "torch.zeros": lambda: [torch.zeros(shape, dtype=torch.bfloat16) for _ in range(2)],
    }
    return Row(f"zeroed cache of {mebibytes} MiB", compare(contenders, repeats, clock="cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mebibytes", type=float, default=256, help="K and V moved by a call (default: 256)")
    parser.add_argument("--allocate", type=int, default=4096, help="MiB of the allocated cache (default: 4096)")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for dtype in options.dtypes:
        for layout in options.layouts:
            rows += movement(getattr(torch, dtype), layout, options.mebibytes, options.repeats)
    workload = (
        f"{options.mebibytes:g} MiB of K and V a call, {HEADS} heads of {DIM}, blocks of {BLOCK} tokens scattered over "
        "a cache 4 times as large; one thread; CPU time, medians; GB/s of bytes moved"
    )
    about = machine()
    path = report("Block movement", rows, ours="kvblocks", workload=workload, about=about, name="storage")
    report(
        "Allocation",
        [allocation(options.allocate, 3)],
        ours="kvblocks",
        workload="K and V of one layer, zeroed, untouched",
        about={},
        name="storage-allocation",
    )
    print(f"written to {path.parent}")


if __name__ == "__main__":
    main()
