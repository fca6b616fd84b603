"""PagedKVCache: the blocks of one layer as tensors, K and V mostly, and moving tokens and blocks in and out of them.

Knows integers in arrays, not who hands them out: the manager is not imported here. Imports torch, the sizes, the memory
and the movers.
"""

import os
from collections.abc import Sequence
from itertools import combinations
from typing import Any, Protocol, Self, SupportsIndex, overload

import numpy as np
import torch
from torch import Tensor

from kvblocks.checks import Indices, checked_device, checked_dtype, checked_indices, dtype_of, has_memory, once
from kvblocks.config import CacheConfig, Chunk, LayerTensor, Window, itemsize
from kvblocks.errors import MovesPending
from kvblocks.movement import BlockLayout, first_outside
from kvblocks.sizes import LAYOUTS, checked_integer, checked_size
from kvblocks.storage.block_memory import BlockMemory
from kvblocks.storage.movers import Mover, Side, mover, whole_blocks

__all__ = ["PagedKVCache", "StepSlots"]


# Order of the axes of a tensor: blocks, heads, dims, tokens of a block. X splits off x dims of K, 16 bytes together; V
# and what else a layer keeps are HDN there.
_KEY_AXES = {"HDN": "bhdt", "NHD": "bthd", "HND": "bhtd", "X": "bhdtx"}
_AXES = _KEY_AXES | {"X": "bhdt"}

# What rows of these tensors are called where they are given.
_TITLES = {"key": "keys", "value": "values"}

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


class _OfKeyValue:
    """What only a layer with "key" and "value" has, as an attribute of its own that hides this one."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name.removeprefix("_")

    def __get__(self, cache: "PagedKVCache", owner: type) -> Any:
        if cache is None:
            return self
        kept = ", ".join(cache.tensors)
        raise AttributeError(f"there is no {self._name}: the layer keeps {kept}, not key and value; see `tensors`")


class PagedKVCache:
    """What one layer keeps for its tokens, K and V mostly, in blocks of `block_size` tokens, zeroed.

    Args:
        num_blocks, num_heads, head_dim, block_size: 1 to 2**31 - 1 each. `num_heads` counts KV heads.
        dtype: of K and V, a `torch.dtype` or its name; see `kvblocks.config.itemsize`.
        device: "cpu", "cuda", "cuda:1" or a `torch.device`. Other devices that hold data are treated as CUDA is.
        layout: "HDN", "NHD", "HND" or "X".
        v_head_dim: of V, where it differs from K's.
        prefault: touch every page of CPU memory now rather than when it is first written.

    Shapes of `key_cache`, by layout (`value_cache` has `v_head_dim` for dim):

        HDN  [blocks, heads, dim, block]
        NHD  [blocks, block, heads, dim]
        HND  [blocks, heads, block, dim]
        X    [blocks, heads, dim / x, block, x] with x = 16 / itemsize; V as in HDN

    A cache that a `CacheEngine` made has the tensors that the config gives its layer, in `tensors` by their names; all
    but "key" are laid out as V is. Where "key" and "value" are not both among them, there are no `key_cache`,
    `value_cache`, `num_heads`, `head_dim` and `v_head_dim`.

    A slot is `block * block_size + offset`. Indices are int64 or int32 tensors, numpy arrays, or lists. On the host
    they are checked before a byte is written. Those that already lie on a device are not waited for: what is out of
    range there is dropped (zeros, in what `gather` returns). KVBLOCKS_CHECKED=1 in the environment checks them too.

    Attributes:
        dtype: of K and V; of a layer without them, of its first tensor.
        tensors: each tensor by its name, in the order of the layer's config: "key" and "value" for a cache made alone.
        layouts: by the same names, where the bytes of a token lie in each.
        has_key_value: whether both are there, so that attention can read them.
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
        ValueError: a size, layout or device that is not as above; X with a head_dim that x does not divide.
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
    num_heads: int = _OfKeyValue()  # type: ignore[assignment]
    head_dim: int = _OfKeyValue()  # type: ignore[assignment]
    v_head_dim: int = _OfKeyValue()  # type: ignore[assignment]
    _key_cache: Tensor = _OfKeyValue()  # type: ignore[assignment]
    _value_cache: Tensor = _OfKeyValue()  # type: ignore[assignment]
    _block_layouts: tuple[BlockLayout, BlockLayout] = _OfKeyValue()  # type: ignore[assignment]
    block_size: int
    dtype: torch.dtype
    device: torch.device
    layout: str
    tensors: dict[str, Tensor]
    layouts: dict[str, BlockLayout]
    has_key_value: bool
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
        config = CacheConfig(
            num_layers=1,
            num_kv_heads=checked_size("num_heads", num_heads),
            head_dim=head_dim,
            num_gpu_blocks=checked_size("num_blocks", num_blocks),
            block_size=block_size,
            v_head_dim=v_head_dim,
        )
        kind = _checked_kind(dtype, device, layout)
        memory = _block_memory(config, *kind, prefault)
        self._lay_out(config, config.layers[0], memory.of_group(0), kind)

    @classmethod
    def for_config(
        cls,
        config: CacheConfig,
        dtype: torch.dtype | str,
        device: torch.device | str,
        *,
        layout: str = "HDN",
        prefault: bool = False,
    ) -> tuple[list[Self | None], Mover, BlockMemory]:
        """The caches of all layers of `config`, the mover of whole blocks of all of them, and their memory.

        What layers keep for a sequence is left out; one that keeps nothing for a token has None.

        A block belongs to one group at a time, so that groups share memory: see `kvblocks.storage.block_memory`. Within
        a group, layers lie one after the other in the group's order.

        Args:
            config: sizes and groups; what it says is not checked again.
            dtype: of the tensors that have none of their own.
            device, layout, prefault: as for one cache.

        Raises:
            ValueError: groups with tensors of several dtypes, and a `block_size` with which these do not lie aligned.
        Other errors are those of one cache.
        """
        kind = _checked_kind(dtype, device, layout)
        layers = config.layers
        memory = _block_memory(config, *kind, prefault)
        caches: list[Self | None] = [None] * config.num_layers
        for index, group in enumerate(config.groups):
            storages = memory.of_group(index)
            for number in group.layers:
                layer = [tensor for tensor in layers[number] if tensor.per == "token"]
                cache = caches[number] = cls.__new__(cls)
                cache._lay_out(config, layer, storages[: len(layer)], kind)
                del storages[: len(layer)]
                cache.group, cache.num_groups, cache.reach = index, len(config.groups), group.reach
        # Where a tensor has a storage for itself, its own side is taken.
        alone = {(side.start, side.nbytes): side for cache in caches if cache for side in cache._sides}
        sides = [
            alone.get((storage.data_ptr(), storage.nbytes)) or whole_blocks(storage, width)
            for storage, width in memory.storages
        ]
        return caches, mover(sides), memory

    @torch.inference_mode(False)  # views made in inference mode could not be written outside of it
    def _lay_out(
        self,
        config: CacheConfig,
        layer: Sequence[LayerTensor],
        storages: Sequence[Tensor],
        kind: tuple[torch.dtype, torch.device, str],
    ) -> None:
        """Take the bytes of each tensor of `layer`, as `BlockMemory.of_group` gives them."""
        self.num_blocks, self.block_size = config.num_gpu_blocks, config.block_size
        dtype, self.device, self.layout = kind
        self._sides = []
        for tensor, storage in zip(layer, storages, strict=True):
            own = dtype_of(tensor, dtype)
            heads, dim = tensor.shape
            axes = (_KEY_AXES if tensor.name == "key" else _AXES)[self.layout]
            sizes = {"b": self.num_blocks, "h": heads, "d": dim, "t": self.block_size}
            self._sides.append(Side(_TITLES.get(tensor.name, tensor.name), storage, axes, sizes, own))
        names = [tensor.name for tensor in layer]
        self.tensors = {name: side.tensor for name, side in zip(names, self._sides, strict=True)}
        self.layouts = {name: side.blocks for name, side in zip(names, self._sides, strict=True)}
        self.dtype = self.tensors.get("key", self._sides[0].tensor).dtype
        self.has_key_value = "key" in names and "value" in names
        if self.has_key_value:
            keys, values = (self._sides[names.index(name)] for name in ("key", "value"))
            self._key_cache, self._value_cache = keys.tensor, values.tensor
            self._block_layouts = keys.blocks, values.blocks
            self.num_heads, self.head_dim = keys.row
            self.v_head_dim = values.row[1]
        self._mover = mover(self._sides)

    @property
    def key_cache(self) -> Tensor:
        """K of all blocks, in the shape of the layout."""
        return self._key_cache

    @property
    def value_cache(self) -> Tensor:
        """V of all blocks, in the shape of the layout."""
        return self._value_cache

    @property
    def block_layouts(self) -> tuple[BlockLayout, BlockLayout]:
        """Where the bytes of a token lie in `key_cache` and in `value_cache`."""
        return self._block_layouts

    @property
    def memory_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(side.nbytes for side in self._sides)

    @overload
    def write(self, tensor: Tensor, slot_mapping: Indices | StepSlots, /) -> None: ...

    @overload
    def write(self, keys: Tensor, values: Tensor, slot_mapping: Indices | StepSlots, /) -> None: ...

    @overload
    def write(
        self, first: Tensor, second: Tensor, third: Tensor, slot_mapping: Indices | StepSlots, /, *more: Any
    ) -> None: ...

    def write(self, *given: Any) -> None:
        """Put row i of `keys` and `values` into slot i of `slot_mapping`; rows with slot -1 are skipped.

        A layer of other tensors takes all of them, in the order of its config, and the slots last:
        `write(latent, step)`, `write(keys, values, index_keys, step)`.

        A slot that comes twice keeps the later row on CPU, and elsewhere some mix of the two.

        Args:
            keys: [n, num_heads, head_dim], the cache's dtype and device, any strides.
            values: [n, num_heads, v_head_dim], likewise. Other tensors have the heads, dim and dtype of their own.
            slot_mapping: the step that `BlockManager.prepare` filled for this pass. The slots of the cache's layer
                group are taken, and checked once for all its layers; rows past `step.num_tokens` are padding and
                skipped. Or slots [n], -1 to num_blocks * block_size - 1, checked in each call.

        Raises:
            ValueError: a shape, device or slot that does not fit, or a step of other layer groups; nothing was written.
            TypeError: a dtype that does not fit, or too few or too many tensors; nothing was written.
            MovesPending: blocks that the step has to copy first were not copied; see `CacheEngine.move`.
        """
        if len(given) != len(self._sides) + 1:
            titles = ", ".join(side.title for side in self._sides)
            raise TypeError(f"write takes {titles} and slot_mapping; {len(given)} arguments were given")
        rows = [self._rows(side, tensor) for side, tensor in zip(self._sides, given, strict=False)]
        slot_mapping, count = given[-1], len(rows[0])
        for side, tensor in zip(self._sides, rows, strict=True):
            if len(tensor) != count:
                raise ValueError(
                    f"{self._sides[0].title} has {count} rows and {side.title} {len(tensor)}; they must be the same "
                    "tokens"
                )
        if hasattr(slot_mapping, "slot_mapping"):
            slots = self._slots_of(slot_mapping, count)
        else:
            slots = self._indices("slot_mapping", slot_mapping, -1, self.num_blocks * self.block_size - 1)
            if slots.shape != (count,):
                raise ValueError(f"slot_mapping has shape {list(slots.shape)}; for {count} tokens give [{count}]")
        self._mover.write(rows, slots)

    def gather(
        self, block_table: Indices, num_tokens: SupportsIndex, *, out: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """K and V of the first `num_tokens` tokens of the blocks of `block_table`, in order, as copies without gaps.

        Args:
            block_table: [m] with `m * block_size >= num_tokens`; entries past the last block needed are not looked at.
            num_tokens: 0 or more.
            out: contiguous tensors to fill and return, one for each that the layer keeps; without it they are
                allocated.

        Returns:
            keys [num_tokens, num_heads, head_dim] and values [num_tokens, num_heads, v_head_dim]; of a layer of other
            tensors all of these, [num_tokens, heads, dim] each, in the order of its config.

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
        """Copy whole blocks, all tensors: block `pairs[i][1]` becomes a copy of block `pairs[i][0]`.

        Args:
            pairs: [n, 2] of (source, target). A target appears once, and nowhere as a source.

        Raises:
            ValueError: a block that does not exist, or a target that appears twice or as a source; nothing was copied.
            TypeError: not integers.
        """
        index = checked_pairs(self, pairs)
        if index.numel():
            self._mover.copy_blocks(index)

    def zero_blocks(self, ids: Indices) -> None:
        """Set everything in the blocks `ids`, [n], to zero.

        Raises:
            ValueError: a block that does not exist; nothing was changed.
            TypeError: not integers.
        """
        zero_blocks(self, self._mover, ids)

    def __repr__(self) -> str:
        if not self.has_key_value:
            rows = ", ".join(f"{name} {list(side.row)}" for name, side in zip(self.tensors, self._sides, strict=True))
            return f"<PagedKVCache of {self.num_blocks} blocks of {self.block_size} tokens on {self.device}: {rows}>"
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

    def _rows(self, side: Side, rows: Tensor) -> Tensor:
        """`rows`, checked, in a form that the movers can read."""
        self._same_kind(side.title, rows, side.dtype)
        heads, dim = side.row
        if rows.ndim != 3 or rows.shape[1] != heads or rows.shape[2] != dim:
            shape = [len(rows) if rows.ndim == 3 else "tokens", heads, dim]
            raise ValueError(f"{side.title} has shape {list(rows.shape)}; this cache takes {shape}")
        if rows.is_neg():
            rows = rows.resolve_neg()
        if rows.stride(2) != 1:
            rows = rows.contiguous()
        if self._holds(rows):
            rows = rows.clone(memory_format=torch.contiguous_format)
        return rows

    def _holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` begins in this cache's own memory."""
        address = tensor.data_ptr()
        for side in self._sides:  # noqa: SIM110, a generator costs as much as all else here
            if side.start <= address < side.end:
                return True
        return False

    def _outputs(self, out: Sequence[Tensor], num_tokens: int) -> Sequence[Tensor]:
        if not isinstance(out, tuple | list) or len(out) != len(self._sides):
            titles = ", ".join(side.title for side in self._sides)
            raise TypeError(f"out must be {len(self._sides)} tensors, ({titles})")
        for index, (given, side) in enumerate(zip(out, self._sides, strict=True)):
            name = f"out[{index}]"
            self._same_kind(name, given, side.dtype)
            if given.shape != (num_tokens, *side.row) or not given.is_contiguous():
                raise ValueError(
                    f"{name} has shape {list(given.shape)} and strides {list(given.stride())}; "
                    f"give a contiguous {[num_tokens, *side.row]}"
                )
            if self._holds(given):
                raise ValueError(f"{name} lies in this cache's own storage; give memory of its own")
        for (i, one), (j, other) in combinations(enumerate(out if num_tokens else ()), 2):
            if _overlap(one, other):
                raise ValueError(f"out[{i}] and out[{j}] share memory; give each its own")
        return out

    def _same_kind(self, name: str, given: Tensor, dtype: torch.dtype) -> None:
        if not isinstance(given, Tensor):
            raise TypeError(f"{name} is a {type(given).__name__}; give a tensor")
        if given.dtype != dtype:
            raise TypeError(f"{name} is {given.dtype}, this cache holds {dtype}; convert it with .to()")
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
    return checked_dtype(dtype), checked_device(device), layout


def _block_memory(
    config: CacheConfig, dtype: torch.dtype, device: torch.device, layout: str, prefault: bool
) -> BlockMemory:
    """The memory for all blocks of `config`; OutOfMemory leaves none of it behind."""
    config.memory_bytes(dtype)  # past 64 bits an OverflowError
    layers, groups = config.layers, []
    for group in config.groups:
        pieces = []
        for tensor in (tensor for layer in group.layers for tensor in layers[layer] if tensor.per == "token"):
            heads, dim = tensor.shape
            size = dtype_of(tensor, dtype).itemsize
            if layout == "X" and tensor.name == "key" and dim % (16 // size):
                raise ValueError(
                    f"head_dim={dim} does not divide by {16 // size}: layout X packs 16 bytes of K, which are "
                    f"{16 // size} elements of {tensor.dtype or dtype}; use another layout"
                )
            pieces.append((config.block_size * heads * dim * size, size))
        groups.append(pieces)
    return BlockMemory(config.num_gpu_blocks, groups, device, prefault=prefault)


def checked_pairs(cache: PagedKVCache, pairs: Indices) -> Tensor:
    """`pairs` of `PagedKVCache.copy_blocks`, checked for `cache` and on its device; empty where there is no copy."""
    index = cache._indices("pairs", pairs, 0, cache.num_blocks - 1)
    if index.numel() == 0:
        return index
    if index.ndim != 2 or index.shape[1] != 2:
        raise ValueError(f"pairs has shape {list(index.shape)}; give [n, 2] of (source, target)")
    if CHECKED or not isinstance(pairs, Tensor) or pairs.is_cpu:
        _check_pairs(checked_indices("pairs", pairs).tolist())  # as they were given: `index` may lie on a device by now
    return index


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
