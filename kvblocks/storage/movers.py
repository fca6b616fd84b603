"""Who moves the K and V of caches: compiled code in CPU memory, Triton kernels on CUDA, torch operations elsewhere.

`Side` says how K or V lies in memory; `mover` picks who moves it. Nothing is checked here: `cache` does.
Imports torch, the compiled mover, and the two others.
"""

import math
from collections.abc import Sequence
from typing import Protocol, Self

import torch
from torch import Tensor

from kvblocks import memory
from kvblocks.kernels import kernels
from kvblocks.movement import BlockLayout
from kvblocks.storage import on_torch

__all__ = ["Mover", "Side", "mover"]

# glibc maps allocations of this size anew each time; mapped with huge pages, filling them costs a third.
_OWN_MAPPING_BYTES = 32 << 20


class Side:
    """K or V of a layer: the tensor, and how a token lies in it."""

    def __init__(self, storage: Tensor, axes: str, sizes: dict[str, int], dtype: torch.dtype) -> None:
        """Lay `storage` out as `axes`; `sizes` has b, h, d (all dims) and t.

        `storage` is uint8, without gaps, or [blocks, bytes of a block] with gaps between blocks.
        """
        split = 16 // dtype.itemsize if "x" in axes else 1
        sizes = sizes | {"d": sizes["d"] // split, "x": split}
        self.tensor = storage.view(sizes["b"], -1).view(dtype).view([sizes[axis] for axis in axes])
        self.nbytes = storage.nbytes
        self.row = (sizes["h"], sizes["d"] * split)
        # [blocks, block_size, heads, dims...], the same memory, whatever the layout.
        self.by_token = self.tensor.permute([axes.index(axis) for axis in "bthdx" if axis in axes])
        strides = dict(zip(axes, (step * dtype.itemsize for step in self.tensor.stride()), strict=True))
        scattered = axes.index("d") < axes.index("t")
        self.blocks = BlockLayout(
            num_blocks=sizes["b"],
            block_size=sizes["t"],
            heads=sizes["h"],
            runs=sizes["d"] if scattered else 1,
            run_bytes=dtype.itemsize * (split if scattered else sizes["d"]),
            token_stride=strides["t"],
            head_stride=strides["h"],
            run_stride=strides["d"],
            block_stride=storage.view(sizes["b"], -1).stride(0),
        )

    def holds(self, address: int) -> bool:
        end = (self.blocks.num_blocks - 1) * self.blocks.block_stride + self.blocks.block_bytes
        return 0 <= address - self.tensor.data_ptr() < end


class Mover(Protocol):
    """Moves K and V of one layer or of several alike; `write` and `gather` know the first.

    Indices are contiguous tensors on the caches' device, int64 or, on a device other than the CPU, int32; rows are
    [n, heads, dim] with the dims of a head without gaps. What is out of range is skipped; `gather` gives zeros there.
    """

    def write(self, keys: Tensor, values: Tensor, slots: Tensor) -> None: ...

    def gather(self, table: Tensor, num_tokens: int, out: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]: ...

    def copy_blocks(self, pairs: Tensor) -> None: ...

    def zero_blocks(self, ids: Tensor) -> None: ...


def mover(sides: Sequence[Side]) -> Mover:
    """For K and V of each layer in turn, all layers alike; or for one side that is whole blocks."""
    device = sides[0].tensor.device
    if device.type == "cpu":
        return InMemory(sides)
    # The kernels know blocks without gaps between them.
    dense = all(side.blocks.block_stride == side.blocks.block_bytes for side in sides)
    if device.type == "cuda" and dense and len(sides) > 1 and kernels("movement") is not None:
        return WithTriton(sides)
    return WithTorch(sides)


class InMemory:
    """Compiled code that moves bytes between addresses."""

    def __init__(self, sides: Sequence[Side]) -> None:
        self._sides = sides

    def write(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        for side, rows in zip(self._sides[:2], (keys, values), strict=True):
            steps = [step * rows.itemsize for step in rows.stride()]
            cache = side.tensor.data_ptr()
            side.blocks.write(cache, rows.data_ptr(), steps[0], steps[1], slots.data_ptr(), len(slots))

    def gather(self, table: Tensor, num_tokens: int, out: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        keys, values = self._sides[:2]
        if out is None:
            out = _empty((num_tokens, *keys.row), keys.tensor), _empty((num_tokens, *values.row), values.tensor)
        for side, rows in zip((keys, values), out, strict=True):
            side.blocks.gather(side.tensor.data_ptr(), rows.data_ptr(), table.data_ptr(), num_tokens)
        return out

    def copy_blocks(self, pairs: Tensor) -> None:
        for side in self._sides:
            side.blocks.copy_blocks(side.tensor.data_ptr(), pairs.data_ptr(), len(pairs))

    def zero_blocks(self, ids: Tensor) -> None:
        for side in self._sides:
            side.blocks.zero_blocks(side.tensor.data_ptr(), ids.data_ptr(), len(ids))


class WithTorch:
    """Operations that every device has; the reference for the kernels."""

    def __init__(self, sides: Sequence[Side]) -> None:
        self._sides = sides

    def write(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        for side, rows in zip(self._sides[:2], (keys, values), strict=True):
            on_torch.write(side.by_token, rows.reshape(len(rows), *side.by_token.shape[2:]), slots.to(torch.int64))

    def gather(self, table: Tensor, num_tokens: int, out: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        keys, values = (
            on_torch.gather(side.by_token, table.to(torch.int64), num_tokens).view(num_tokens, *side.row)
            for side in self._sides[:2]
        )
        return (keys, values) if out is None else (out[0].copy_(keys), out[1].copy_(values))

    def copy_blocks(self, pairs: Tensor) -> None:
        for side in self._sides:
            on_torch.copy_blocks(side.tensor, pairs.to(torch.int64))

    def zero_blocks(self, ids: Tensor) -> None:
        for side in self._sides:
            on_torch.zero_blocks(side.tensor, ids.to(torch.int64))


class WithTriton:
    """One launch for K and V, and one for all layers where whole blocks move; nothing is allocated by a call."""

    def __init__(self, sides: Sequence[Side]) -> None:
        module = kernels("movement")
        if module is None:
            raise RuntimeError("Triton is not installed, so its kernels cannot move blocks; `pip install triton`")
        self._kernels = module
        self._sides = sides  # whose memory `addresses` points into
        self._num_blocks = sides[0].blocks.num_blocks
        self._capacity = self._num_blocks * sides[0].blocks.block_size
        self._caches = tuple(on_torch.bits(side.tensor) for side in sides[:2])
        self._layouts = tuple(side.blocks for side in sides[:2])
        self._forms = tuple(module.forms(layout) for layout in self._layouts)
        addresses = [side.tensor.data_ptr() for side in sides]
        self._addresses = torch.tensor(addresses, dtype=torch.int64, device=sides[0].tensor.device)

    def __reduce__(self) -> tuple[type[Self], tuple[Sequence[Side]]]:
        return type(self), (self._sides,)  # a copy has memory of its own, at other addresses

    def write(self, keys: Tensor, values: Tensor, slots: Tensor) -> None:
        if len(slots):
            rows = on_torch.bits(keys.detach()), on_torch.bits(values.detach())
            self._kernels.write(self._caches, self._forms, rows, slots, self._capacity)

    def gather(self, table: Tensor, num_tokens: int, out: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        keys, values = self._sides[:2]
        if out is None:
            out = keys.tensor.new_empty((num_tokens, *keys.row)), values.tensor.new_empty((num_tokens, *values.row))
        if num_tokens:
            bits = tuple(on_torch.bits(rows) for rows in out)
            self._kernels.gather(self._caches, self._forms, bits, table, self._num_blocks)
        return out

    def copy_blocks(self, pairs: Tensor) -> None:
        if len(pairs):
            self._kernels.copy_blocks(self._addresses, self._layouts, pairs, self._num_blocks)

    def zero_blocks(self, ids: Tensor) -> None:
        if len(ids):
            self._kernels.zero_blocks(self._addresses, self._layouts, ids, self._num_blocks)


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    nbytes = like.itemsize * math.prod(shape)
    if nbytes < _OWN_MAPPING_BYTES:
        return torch.empty(shape, dtype=like.dtype, device="cpu")
    return memory.zeroed(nbytes).view(like.dtype).view(shape)
