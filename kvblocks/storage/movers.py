"""What moves the tensors of caches: compiled code in CPU memory, Triton kernels on CUDA, torch operations elsewhere.

`Side` says how a tensor lies in memory; `mover` picks what moves it. Arguments are checked by `cache`, not here.
Imports torch, the compiled mover, the kernels and `on_torch`.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from kvblocks import memory
from kvblocks.kernels import kernels
from kvblocks.movement import BlockLayout
from kvblocks.storage import on_torch

__all__ = ["Mover", "Side", "mover", "whole_blocks"]

# glibc maps allocations of this size anew each time; mapped with huge pages, filling them costs a third.
_OWN_MAPPING_BYTES = 32 << 20


class Side:
    """K, V or another tensor of a layer: the tensor, and how a token lies in it."""

    def __init__(self, title: str, storage: Tensor, axes: str, sizes: dict[str, int], dtype: torch.dtype) -> None:
        """Lay `storage` out as `axes`; `sizes` has b, h, d (all dims) and t.

        `storage` is uint8, without gaps, or [blocks, bytes of a block] with gaps between blocks. `title` is what its
        rows are called in errors.
        """
        self.title, self.dtype = title, dtype
        split = 16 // dtype.itemsize if "x" in axes else 1
        sizes = sizes | {"d": sizes["d"] // split, "x": split}
        blocks = storage.view(sizes["b"], -1)
        self.tensor = blocks.view(dtype).view([sizes[axis] for axis in axes])
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
            block_stride=blocks.stride(0),
        )

        self._locate()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._locate()  # a copy has memory of its own

    def _locate(self) -> None:
        """Note the address of its first byte, and of the first behind it."""
        self.start = self.tensor.data_ptr()
        self.end = self.start + (self.blocks.num_blocks - 1) * self.blocks.block_stride + self.blocks.block_bytes


def whole_blocks(storage: Tensor, width: int) -> Side:
    """Blocks of `width` bytes without gaps, whatever they hold."""
    sizes = {"b": storage.nbytes // width, "h": 1, "d": width, "t": 1}
    return Side("blocks", storage, "bthd", sizes, torch.uint8)


class Mover(Protocol):
    """Moves the tensors of one layer, or whole blocks.

    Indices are contiguous tensors on the caches' device, int64 or, on a device other than the CPU, int32; rows are
    [n, heads, dim] with the dims of a head without gaps. What is out of range is skipped; `gather` gives zeros there.
    """

    def write(self, rows: Sequence[Tensor], slots: Tensor) -> None: ...

    def gather(self, table: Tensor, num_tokens: int, out: Sequence[Tensor] | None) -> tuple[Tensor, ...]: ...

    def copy_blocks(self, pairs: Tensor) -> None: ...

    def zero_blocks(self, ids: Tensor) -> None: ...


def mover(sides: Sequence[Side]) -> Mover:
    """The mover for the tensors of one layer, or for any tensors of which only whole blocks are moved."""
    device = sides[0].tensor.device
    if device.type == "cpu":
        return InMemory(sides)
    # The kernels know blocks without gaps between them.
    dense = all(side.blocks.block_stride == side.blocks.block_bytes for side in sides)
    if device.type == "cuda" and dense and kernels("movement") is not None:
        return WithTriton(sides)
    return WithTorch(sides)


class InMemory:
    """Compiled code that moves bytes between addresses."""

    def __init__(self, sides: Sequence[Side]) -> None:
        self._sides = sides

    def write(self, rows: Sequence[Tensor], slots: Tensor) -> None:
        address, count = slots.data_ptr(), len(slots)
        for side, given in zip(self._sides, rows, strict=True):
            size = given.itemsize
            token, head, _ = given.stride()
            side.blocks.write(side.start, given.data_ptr(), token * size, head * size, address, count)

    def gather(self, table: Tensor, num_tokens: int, out: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
        address, filled = table.data_ptr(), out
        if filled is None:
            filled = [_empty((num_tokens, *side.row), side.dtype) for side in self._sides]
        for side, rows in zip(self._sides, filled, strict=True):
            side.blocks.gather(side.start, rows.data_ptr(), address, num_tokens)
        return tuple(filled)

    def copy_blocks(self, pairs: Tensor) -> None:
        for side in self._sides:
            side.blocks.copy_blocks(side.start, pairs.data_ptr(), len(pairs))

    def zero_blocks(self, ids: Tensor) -> None:
        for side in self._sides:
            side.blocks.zero_blocks(side.start, ids.data_ptr(), len(ids))


class WithTorch:
    """Operations that every device has; the reference for the kernels."""

    def __init__(self, sides: Sequence[Side]) -> None:
        self._sides = sides

    def write(self, rows: Sequence[Tensor], slots: Tensor) -> None:
        for side, given in zip(self._sides, rows, strict=True):
            on_torch.write(side.by_token, given.reshape(len(given), *side.by_token.shape[2:]), slots.to(torch.int64))

    def gather(self, table: Tensor, num_tokens: int, out: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
        found = [
            on_torch.gather(side.by_token, table.to(torch.int64), num_tokens).view(num_tokens, *side.row)
            for side in self._sides
        ]
        return tuple(found if out is None else [to.copy_(rows) for to, rows in zip(out, found, strict=True)])

    def copy_blocks(self, pairs: Tensor) -> None:
        for side in self._sides:
            on_torch.copy_blocks(side.tensor, pairs.to(torch.int64))

    def zero_blocks(self, ids: Tensor) -> None:
        for side in self._sides:
            on_torch.zero_blocks(side.tensor, ids.to(torch.int64))


class WithTriton:
    """One launch for K and V, and one for all tensors where whole blocks move; nothing is allocated by a call."""

    def __init__(self, sides: Sequence[Side]) -> None:
        module = kernels("movement")
        if module is None:
            raise RuntimeError("Triton is not installed, so its kernels cannot move blocks; `pip install triton`")
        self._kernels = module
        self._sides = sides  # whose memory `_blocks` points into
        self._num_blocks = sides[0].blocks.num_blocks
        self._capacity = self._num_blocks * sides[0].blocks.block_size
        self._caches = [on_torch.bits(side.tensor) for side in sides]
        self._forms = [module.forms(side.blocks) for side in sides]
        sizes = [side.blocks.block_bytes for side in sides]
        self._blocks = module.Blocks.of([side.start for side in sides], sizes, sides[0].tensor.device)

    def __reduce__(self) -> tuple[type[Self], tuple[Sequence[Side]]]:
        return type(self), (self._sides,)  # a copy has memory of its own, at other addresses

    def write(self, rows: Sequence[Tensor], slots: Tensor) -> None:
        if len(slots):
            bits = [on_torch.bits(given.detach()) for given in rows]
            self._kernels.write(self._caches, self._forms, bits, slots, self._capacity)

    def gather(self, table: Tensor, num_tokens: int, out: Sequence[Tensor] | None) -> tuple[Tensor, ...]:
        if out is None:
            out = [side.tensor.new_empty((num_tokens, *side.row)) for side in self._sides]
        if num_tokens:
            bits = [on_torch.bits(rows) for rows in out]
            self._kernels.gather(self._caches, self._forms, bits, table, self._num_blocks)
        return tuple(out)

    def copy_blocks(self, pairs: Tensor) -> None:
        if len(pairs):
            self._kernels.copy_blocks(self._blocks, pairs, self._num_blocks)

    def zero_blocks(self, ids: Tensor) -> None:
        if len(ids):
            self._kernels.zero_blocks(self._blocks, ids, self._num_blocks)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    nbytes = dtype.itemsize * math.prod(shape)
    if nbytes < _OWN_MAPPING_BYTES:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return memory.zeroed(nbytes).view(dtype).view(shape)
