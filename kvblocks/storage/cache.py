"""PagedKVCache: the K and V blocks of one layer as two tensors, and moving tokens and blocks in and out of them.

Knows integers in arrays, not who hands them out: the manager is not imported here. Imports torch, the sizes and the
movers.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self, SupportsIndex

import numpy as np
import torch
from torch import Tensor

from kvblocks import memory
from kvblocks.checks import Indices, checked_device, checked_indices, has_memory, once
from kvblocks.config import CacheConfig, Chunk, Window, itemsize
from kvblocks.errors import MovesPending, OutOfMemory
from kvblocks.movement import BlockLayout, first_outside
from kvblocks.sizes import LAYOUTS, checked_integer, checked_size
from kvblocks.storage.movers import Mover, Side, mover

__all__ = ["PagedKVCache", "StepSlots"]


# Order of the axes of K: blocks, heads, dims, tokens of a block. X splits off x dims, 16 bytes together; its V is HDN.
_KEY_AXES = {"HDN": "bhdt", "NHD": "bthd", "HND": "bhtd", "X": "bhdtx"}
_VALUE_AXES = _KEY_AXES | {"X": "bhdt"}

# Whether indices that already lie on a device are brought to the host and checked, which waits for the device.
CHECKED = os.environ.get("KVBLOCKS_CHECKED") == "1"


class StepSlots(Protocol):
    """What `PagedKVCache.write` reads of a step; `StepBuffers` is one.

    `slot_mapping` is int64 [max_tokens], or one for each layer group, [groups, max_tokens]; -1 pads.
    """

    @property
    def slot_mapping(self) -> Tensor: ...
    @property
    def num_tokens(self) -> int: ...


class PagedKVCache:
    """K and V of one layer, in blocks of `block_size` tokens, zeroed.

    Args:
        num_blocks, num_heads, head_dim, block_size: 1 to 2**31 - 1 each. `num_heads` counts KV heads.
        dtype: of K and V, a `torch.dtype` or its name; see `kvblocks.config.itemsize`.
        device: "cpu", "cuda", "cuda:1" or a `torch.device`. Other devices that hold data go the way of CUDA.
        layout: "HDN", "NHD", "HND" or "X".
        v_head_dim: of V, where it differs from K's.
        prefault: touch every page of CPU memory now rather than when it is first written.

    Shapes of `key_cache`, by layout (`value_cache` has `v_head_dim` for dim):

        HDN  [blocks, heads, dim, block]
        NHD  [blocks, block, heads, dim]
        HND  [blocks, heads, block, dim]
        X    [blocks, heads, dim / x, block, x] with x = 16 / itemsize; V as in HDN

    A slot is `block * block_size + offset`. Indices are int64 or int32 tensors, numpy arrays, or lists. On the host
    they are checked before a byte is written. Those that already lie on a device are not waited for: what is out of
    range there is dropped (zeros, in what `gather` returns). KVBLOCKS_CHECKED=1 in the environment checks them too.

    Attributes:
        group: of a cache that a `CacheEngine` made, the layer group of its layer, an index into `config.groups`; None
            for a cache made alone.
        num_groups: layer groups of the engine; 1 for a cache made alone.
        reach: how far that group attends: a `Window`, a `Chunk`, or None for everything. Blocks further back belong to
            other sequences.

    HDN is the default, as it is the layout that this class was first asked for; whatever makes caches to run a model
    chooses NHD, which attention kernels read.

    Raises:
        OutOfMemory: the memory is not there; nothing stays allocated.
        OverflowError: more than 2**63 - 1 bytes.
        ValueError: a size, layout or device that cannot be; X with a head_dim that x does not divide.
        TypeError: a size is not an integer, or the dtype cannot hold a cache.

    Example:
        >>> cache = PagedKVCache(64, 8, 128, 16, "bfloat16", "cpu", layout="NHD")
        >>> keys = torch.randn(3, 8, 128, dtype=torch.bfloat16)
        >>> cache.write(keys, keys, [32, 33, 34])
        >>> torch.equal(cache.gather([2], 3)[0], keys)
        True

    Thread-safety: any number of threads may read and write at once, as long as no two write the same slot or block.
    """

    num_blocks: int
    num_heads: int
    head_dim: int
    v_head_dim: int
    block_size: int
    dtype: torch.dtype
    device: torch.device
    layout: str
    group: int | None = None
    num_groups: int = 1
    reach: Window | Chunk | None = None

    def __init__(
        self,
        num_blocks: SupportsIndex,
        num_heads: SupportsIndex,
        head_dim: SupportsIndex,
        block_size: SupportsIndex,
        dtype: torch.dtype | str,
        device: torch.device | str,
        *,
        layout: str = "HDN",
        v_head_dim: SupportsIndex | None = None,
        prefault: bool = False,
    ) -> None:
        kind = _checked_kind(dtype, device, layout)
        config = CacheConfig(
            num_layers=1,
            num_kv_heads=checked_size("num_heads", num_heads),
            head_dim=head_dim,
            num_gpu_blocks=checked_size("num_blocks", num_blocks),
            block_size=block_size,
            v_head_dim=v_head_dim,
        )
        config.memory_bytes(dtype)  # past 64 bits an OverflowError
        shape = _Shape(config.num_gpu_blocks, *config.layer_shapes[0], config.block_size, *kind)
        self._lay_out(shape, *shape.allocate(1, prefault))

    @classmethod
    def for_config(
        cls,
        config: CacheConfig,
        dtype: torch.dtype | str,
        device: torch.device | str,
        *,
        layout: str = "HDN",
        prefault: bool = False,
    ) -> tuple[list[Self], Mover]:
        """The caches of all layers of `config`, or with an error none; and what moves whole blocks of all of them.

        A block belongs to one group at a time, so that the i-th layers of all groups share memory. Where
        layers differ in heads or dims, those of a group lie inside each block one after the other, in the group's
        order.

        Args:
            config: sizes and groups; what it says is not checked again.
            dtype, device, layout, prefault: as for one cache.

        Errors are those of one cache.
        """
        first, *others = (
            _Shape(config.num_gpu_blocks, heads, k_dim, v_dim, config.block_size, *_checked_kind(dtype, device, layout))
            for heads, k_dim, v_dim in config.layer_shapes
        )
        shapes = [first, *others]
        config.memory_bytes(dtype)  # past 64 bits an OverflowError
        caches = [cls.__new__(cls) for _ in shapes]
        if len(set(shapes)) == 1:
            storages = first.allocate(config.layers_per_group, prefault)
            for group in config.groups:
                for index, layer in enumerate(group.layers):
                    caches[layer]._lay_out(first, *storages[2 * index : 2 * index + 2])
            longest = max(config.groups, key=lambda group: len(group.layers))
            moves = mover([side for layer in longest.layers for side in (caches[layer]._keys, caches[layer]._values)])
        else:
            width = config.block_bytes(dtype)
            [storage] = first.zeroed([first.num_blocks * width], width, prefault)
            blocks = storage.view(first.num_blocks, width)
            for group in config.groups:
                start = 0
                for layer in group.layers:
                    middle, end = start + shapes[layer].key_bytes, start + shapes[layer].block_bytes
                    caches[layer]._lay_out(shapes[layer], blocks[:, start:middle], blocks[:, middle:end])
                    start = end
            sizes = {"b": first.num_blocks, "h": 1, "d": width, "t": 1}
            moves = mover([Side(storage, "bthd", sizes, torch.uint8)])
        for index, group in enumerate(config.groups):
            for layer in group.layers:
                cache = caches[layer]
                cache.group, cache.num_groups, cache.reach = index, len(config.groups), group.reach
        return caches, moves

    @torch.inference_mode(False)  # views made in inference mode could not be written outside of it
    def _lay_out(self, shape: "_Shape", keys: Tensor, values: Tensor) -> None:
        self.num_blocks, self.block_size, self.num_heads = shape.num_blocks, shape.block_size, shape.num_heads
        self.head_dim, self.v_head_dim = shape.head_dim, shape.v_head_dim
        self.dtype, self.device, self.layout = shape.dtype, shape.device, shape.layout
        sizes = {"b": shape.num_blocks, "h": shape.num_heads, "t": shape.block_size}
        self._keys = Side(keys, _KEY_AXES[shape.layout], sizes | {"d": shape.head_dim}, shape.dtype)
        self._values = Side(values, _VALUE_AXES[shape.layout], sizes | {"d": shape.v_head_dim}, shape.dtype)
        self._mover = mover([self._keys, self._values])

    @property
    def key_cache(self) -> Tensor:
        return self._keys.tensor

    @property
    def value_cache(self) -> Tensor:
        return self._values.tensor

    @property
    def block_layouts(self) -> tuple[BlockLayout, BlockLayout]:
        """Where the bytes of a token lie in `key_cache` and in `value_cache`."""
        return self._keys.blocks, self._values.blocks

    @property
    def memory_bytes(self) -> int:
        """Bytes of `key_cache` and `value_cache` together."""
        return self._keys.nbytes + self._values.nbytes

    def write(self, keys: Tensor, values: Tensor, slot_mapping: Indices | StepSlots) -> None:
        """Put row i of `keys` and `values` into slot i of `slot_mapping`; rows with slot -1 are skipped.

        A slot that comes twice keeps the later row on CPU, and elsewhere some mix of the two.

        Args:
            keys: [n, num_heads, head_dim], the cache's dtype and device, any strides.
            values: [n, num_heads, v_head_dim], likewise.
            slot_mapping: the step that `BlockManager.prepare` filled for this pass. The slots of the cache's layer
                group are taken, and checked once for all its layers; rows past `step.num_tokens` are padding and
                skipped. Or slots [n], -1 to num_blocks * block_size - 1, checked in each call.

        Raises:
            ValueError: a shape, device or slot that does not fit, or a step of other layer groups; nothing was written.
            TypeError: a dtype that does not fit; nothing was written.
            MovesPending: blocks that the step has to copy first were not copied; see `CacheEngine.move`.
        """
        keys = self._rows("keys", keys, self.head_dim)
        values = self._rows("values", values, self.v_head_dim)
        if len(values) != len(keys):
            raise ValueError(f"keys has {len(keys)} rows and values {len(values)}; they must be the same tokens")
        count = keys.shape[0]
        if hasattr(slot_mapping, "slot_mapping"):
            slots = self._slots_of(slot_mapping, count)
        else:
            slots = self._indices("slot_mapping", slot_mapping, -1, self.num_blocks * self.block_size - 1)
            if slots.shape != keys.shape[:1]:
                raise ValueError(f"slot_mapping has shape {list(slots.shape)}; for {count} tokens give [{count}]")
        self._mover.write(keys, values, slots)

    def gather(
        self, block_table: Indices, num_tokens: SupportsIndex, *, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """K and V of the first `num_tokens` tokens of the blocks of `block_table`, in order, as copies without gaps.

        Args:
            block_table: [m] with `m * block_size >= num_tokens`; entries past the last block needed are not looked at.
            num_tokens: 0 or more.
            out: contiguous tensors to fill and return; without it they are allocated.

        Returns:
            keys [num_tokens, num_heads, head_dim] and values [num_tokens, num_heads, v_head_dim].

        Raises:
            ValueError: the table is too short or names a block that does not exist; `out` does not fit.
            TypeError: the table or `num_tokens` is not of integers, or `out` of another dtype.
        """
        count = checked_integer("num_tokens", num_tokens)
        if count < 0:
            raise ValueError(f"num_tokens={count} must be 0 or more")
        table = self._indices("block_table", block_table, 0, self.num_blocks - 1, first=-(-count // self.block_size))
        if table.ndim != 1:
            raise ValueError(f"block_table has shape {list(table.shape)}; give the blocks of one sequence, [m]")
        if len(table) * self.block_size < count:
            raise ValueError(
                f"block_table has {len(table)} blocks of {self.block_size} tokens; num_tokens={count} needs "
                f"{-(-count // self.block_size)}"
            )
        return self._mover.gather(table, count, None if out is None else self._outputs(out, count))

    def copy_blocks(self, pairs: Indices) -> None:
        """Copy whole blocks, K and V: block `pairs[i][1]` becomes a copy of block `pairs[i][0]`.

        Args:
            pairs: [n, 2] of (source, target). A target appears once, and nowhere as a source.

        Raises:
            ValueError: a block that does not exist, or a target that appears twice or as a source; nothing was copied.
            TypeError: not integers.
        """
        copy_blocks(self, self._mover, pairs)

    def zero_blocks(self, ids: Indices) -> None:
        """Set all K and V of the blocks `ids`, [n], to zero.

        Raises:
            ValueError: a block that does not exist; nothing was changed.
            TypeError: not integers.
        """
        zero_blocks(self, self._mover, ids)

    def __repr__(self) -> str:
        return (
            f"PagedKVCache(num_blocks={self.num_blocks}, num_heads={self.num_heads}, head_dim={self.head_dim}, "
            f"block_size={self.block_size}, dtype={self.dtype}, device='{self.device}', layout={self.layout!r}, "
            f"v_head_dim={self.v_head_dim})"
        )

    def _slots_of(self, step: StepSlots, count: int) -> Tensor:
        """The slots of this pass's first `count` tokens in the cache's layer group, checked once a step."""
        if getattr(step, "waits", False):
            raise MovesPending("the step has blocks to copy before its pass: call engine.move(step) first", 0)
        capacity = self.num_blocks * self.block_size

        def checked() -> Tensor:
            mapping = step.slot_mapping
            groups = mapping.shape[0] if mapping.ndim == 2 else 1
            if groups != self.num_groups:
                raise ValueError(
                    f"the step has {groups} layer groups, and this cache is of {self.num_groups}; take the cache of a "
                    "CacheEngine made from the same CacheConfig, or give one group's slots: step.slot_mapping[group]"
                )
            mapping = mapping[self.group or 0] if mapping.ndim == 2 else mapping
            if not step.num_tokens <= count <= mapping.shape[0]:
                raise ValueError(
                    f"keys and values have {count} rows; the step has num_tokens={step.num_tokens}, and no more than "
                    f"{mapping.shape[0]} with padding"
                )
            return self._indices("step.slot_mapping", mapping[:count], -1, capacity - 1)

        return once(step, ("slots", self.group, self.num_groups, capacity, self.device, count), checked)

    def _rows(self, name: str, rows: Tensor, head_dim: int) -> Tensor:
        """`rows` checked, and in a form that the movers read rightly."""
        self._same_kind(name, rows)
        if rows.ndim != 3 or rows.shape[1] != self.num_heads or rows.shape[2] != head_dim:
            shape = [len(rows) if rows.ndim == 3 else "tokens", self.num_heads, head_dim]
            raise ValueError(f"{name} has shape {list(rows.shape)}; this cache takes {shape}")
        if rows.is_neg():
            rows = rows.resolve_neg()
        if rows.stride(2) != 1:
            rows = rows.contiguous()
        if self._keys.holds(rows.data_ptr()) or self._values.holds(rows.data_ptr()):
            rows = rows.clone(memory_format=torch.contiguous_format)
        return rows

    def _outputs(self, out: tuple[Tensor, Tensor], num_tokens: int) -> tuple[Tensor, Tensor]:
        if not isinstance(out, tuple | list) or len(out) != 2:
            raise TypeError("out must be two tensors, (keys, values)")
        for name, given, row in zip(("out[0]", "out[1]"), out, (self._keys.row, self._values.row), strict=True):
            self._same_kind(name, given)
            if given.shape != (num_tokens, *row) or not given.is_contiguous():
                raise ValueError(
                    f"{name} has shape {list(given.shape)} and strides {list(given.stride())}; "
                    f"give a contiguous {[num_tokens, *row]}"
                )
            if self._keys.holds(given.data_ptr()) or self._values.holds(given.data_ptr()):
                raise ValueError(f"{name} lies in this cache's own storage; give memory of its own")
        if num_tokens and _overlap(*out):
            raise ValueError("out[0] and out[1] share memory; give each its own")
        return out

    def _same_kind(self, name: str, given: Tensor) -> None:
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} is a {type(given).__name__}; give a tensor")
        if given.dtype != self.dtype:
            raise TypeError(f"{name} is {given.dtype}, this cache holds {self.dtype}; convert it with .to()")
        if given.device != self.device:
            raise ValueError(f"{name} is on {given.device}, this cache on {self.device}; move it with .to()")
        has_memory(name, given)

    def _indices(self, name: str, given: Indices, low: int, high: int, first: int | None = None) -> Tensor:
        """`given` as a contiguous tensor on the cache's device: int64, or int32 that already lay there.

        The first `first` elements, by default all, lie in low..high: checked, unless they already lie on a device.
        """
        index = checked_indices(name, given)
        if index.device != self.device and not index.is_cpu:
            raise ValueError(f"{name} is on {index.device}, this cache on {self.device}; move it with .to()")
        if index.is_cpu or CHECKED:
            host = index.to("cpu", torch.int64)
            count = host.numel() if first is None else min(first, host.numel())
            bad = first_outside(host.data_ptr(), count, low, high)
            if bad >= 0:
                where = ", ".join(str(int(i)) for i in np.unravel_index(bad, tuple(host.shape)))
                raise ValueError(
                    f"{name}[{where}]={int(host.view(-1)[bad])} is outside {low}..{high}; this cache has "
                    f"{self.num_blocks} blocks of {self.block_size} slots"
                )
        if index.device == self.device:
            return index
        # Out of pinned memory the copy would run later, and the caller may have put other indices there by then.
        return index.to(self.device, non_blocking=not index.is_pinned())


def _checked_kind(
    dtype: torch.dtype | str, device: torch.device | str, layout: str
) -> tuple[torch.dtype, torch.device, str]:
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r} is unknown; use one of {', '.join(LAYOUTS)}")
    itemsize(dtype)
    found = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype.removeprefix("torch."))
    return found, checked_device(device), layout


@dataclass(frozen=True)
class _Shape:
    """What a cache is to be: numbers that a `CacheConfig` has checked."""

    num_blocks: int
    num_heads: int
    head_dim: int
    v_head_dim: int
    block_size: int
    dtype: torch.dtype
    device: torch.device
    layout: str

    def __post_init__(self) -> None:
        packed = 16 // self.dtype.itemsize
        if self.layout == "X" and self.head_dim % packed:
            raise ValueError(
                f"head_dim={self.head_dim} does not divide by {packed}: layout X packs 16 bytes of K, which are "
                f"{packed} elements of {self.dtype}; use another layout"
            )

    @torch.inference_mode(False)
    def allocate(self, num_layers: int, prefault: bool) -> list[Tensor]:
        """Zeroed storage for K, V of each layer in turn, uint8 [bytes]; OutOfMemory leaves none of it behind."""
        sizes = [self.num_blocks * part for part in (self.key_bytes, self.block_bytes - self.key_bytes)] * num_layers
        return self.zeroed(sizes, self.block_bytes * num_layers, prefault)

    @property
    def key_bytes(self) -> int:
        """Of K in one block of one layer."""
        return self.block_size * self.num_heads * self.head_dim * self.dtype.itemsize

    @property
    def block_bytes(self) -> int:
        """Of K and V in one block of one layer."""
        return self.block_size * self.num_heads * (self.head_dim + self.v_head_dim) * self.dtype.itemsize

    def zeroed(self, sizes: Sequence[int], block_bytes: int, prefault: bool) -> list[Tensor]:
        """Zeroed storages of so many bytes, uint8, that together hold `num_blocks` blocks of `block_bytes`, or none."""
        requested = sum(sizes)
        storages: list[Tensor] = []
        fits = self.device.type != "cpu" or requested <= memory.room().nbytes
        try:
            for size in sizes if fits else ():
                storages.append(_zeroed(size, self.device, prefault))
        except (MemoryError, torch.OutOfMemoryError):
            fits = False
        # Outside of `except`, so that no traceback keeps what was allocated.
        if not fits:
            storages.clear()
            free, limit = free_memory(self.device)
            if free >= requested:
                free, limit = _refused(self.device, requested, free)
            fitting = min(free // block_bytes, self.num_blocks - 1)
            raise OutOfMemory(
                f"{self.num_blocks} blocks of {block_bytes} bytes are {requested} bytes, and {self.device} has {free} "
                f"available: {fitting} blocks fit. The limit is {limit}",
                requested,
                free,
                fitting,
            )
        return storages


def copy_blocks(cache: PagedKVCache, moves: Mover, pairs: Indices) -> None:
    """`PagedKVCache.copy_blocks` by the mover of one or more caches like `cache`."""
    index = cache._indices("pairs", pairs, 0, cache.num_blocks - 1)
    if index.numel() == 0:
        return
    if index.ndim != 2 or index.shape[1] != 2:
        raise ValueError(f"pairs has shape {list(index.shape)}; give [n, 2] of (source, target)")
    if CHECKED or not isinstance(pairs, Tensor) or pairs.is_cpu:
        _check_pairs(checked_indices("pairs", pairs).tolist())  # as they were given: `index` may lie on a device by now
    moves.copy_blocks(index)


def zero_blocks(cache: PagedKVCache, moves: Mover, ids: Indices) -> None:
    """`PagedKVCache.zero_blocks` by the mover of one or more caches like `cache`."""
    index = cache._indices("ids", ids, 0, cache.num_blocks - 1)
    if index.ndim != 1:
        raise ValueError(f"ids has shape {list(index.shape)}; give the blocks, [n]")
    moves.zero_blocks(index)


def _check_pairs(pairs: list[list[int]]) -> None:
    sources, targets = {source for source, _ in pairs}, set[int]()
    for index, (_, target) in enumerate(pairs):
        if target in targets:
            raise ValueError(f"pairs[{index}] has target {target} a second time; a block can become one copy only")
        if target in sources:
            raise ValueError(f"pairs[{index}] has target {target}, which is also a source; copy it in a later call")
        targets.add(target)


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors have a byte in common."""
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes


def _zeroed(nbytes: int, device: torch.device, prefault: bool) -> Tensor:
    if device.type == "cpu":
        return memory.zeroed(nbytes, prefault=prefault)
    return torch.zeros(nbytes, dtype=torch.uint8, device=device)


def free_memory(device: torch.device) -> memory.Room:
    """What caches on `device` can have now; 0 bytes where it does not say."""
    if device.type == "cpu":
        return memory.room()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return memory.Room(torch.cuda.mem_get_info(device)[0], "the device's memory")
    return memory.Room(0, f"unknown, as {device} does not say how much it has")


def _refused(device: torch.device, requested: int, free: int) -> memory.Room:
    """What there is where as much as was asked for seemed to be free, and was refused."""
    if device.type == "cpu":
        return memory.Room(
            memory.mappable(requested),
            f"what the system maps, though {free} bytes seemed to be free: see locked memory (ulimit -l), "
            "vm.overcommit_memory and vm.max_map_count",
        )
    return memory.Room(free, "torch's allocator, which rounds each tensor up and needs it in one piece")
