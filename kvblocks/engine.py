"""CacheEngine: the caches of all layers of a model, allocated together and handed out.

Knows sizes, storage and the arrays of a step, and nothing of the model. Imports torch through storage only.
"""

import logging
from collections.abc import Iterable, Iterator
from typing import Self, SupportsIndex

import torch

from kvblocks.checks import Indices, checked_device, checked_dtype, checked_indices
from kvblocks.config import CacheConfig, Group, LayerTensor
from kvblocks.errors import OutOfMemory
from kvblocks.manager import BlockManager
from kvblocks.movement import first_outside
from kvblocks.moves import HostMoves, MovePlaces, move_stream
from kvblocks.sizes import budget, checked_integer
from kvblocks.step import StepBuffers
from kvblocks.storage.block_memory import free_memory
from kvblocks.storage.cache import PagedKVCache, checked_pairs, zero_blocks
from kvblocks.storage.host import HostArena
from kvblocks.storage.state import StateCache, StateSlots

__all__ = ["CacheEngine"]

_log = logging.getLogger("kvblocks")

_ROUNDING = 2 << 20  # bytes; what torch rounds large CUDA allocations up to
_STATE_STORAGES = 4  # one for each size of element: 1, 2, 4 and 8 bytes


class CacheEngine:
    """One `PagedKVCache` for each layer of `config`.

    All memory is allocated, zeroed, before the constructor returns; one INFO line of the logger "kvblocks" says how
    much. The caches are handed out as they are: whoever writes through one is seen by all who hold it.

    Args:
        config: sizes, and the tensors of each layer.
        dtype: of all tensors that have none of their own.
        device, layout, prefault: as for `PagedKVCache`, the default of `layout` too. Give "NHD" to run a model:
            flash-attn, torch's `varlen_attn` and FlashInfer read it.
        host_blocks: slots of host memory for blocks that leave the device and come back, as many as the manager has; 0
            for none. On a CUDA device the memory is pinned at once, and moves need Triton.
        num_states: slots for what layers keep once for a sequence, as many as the manager has; 0 where none keeps any.
        host_states: slots of host memory for checkpoints of these, as many as the manager has; needs `host_blocks`.

    Attributes:
        arena: the slots of host memory, a `HostArena`; None without `host_blocks`.
        state_arena: those for checkpoints; None without `host_states`.
        states: of each layer its `StateCache`, None where it keeps nothing for a sequence.

    With several layer groups the layers of all groups share memory, as a block of the pool belongs to one group at a
    time. Each layer has its own `PagedKVCache` all the same, which knows its group and how far that attends: given a
    step, `write` and `paged_attention` take the group's slots and block table. Where the tensors of groups end at
    different bytes, several lie in one piece of memory, one behind the other in each block; on CUDA rows go into and
    out of such blocks by torch operations, not by the kernels.

    Raises:
        OutOfMemory: the layers do not all fit; none stays allocated.
        MemoryError: there is no memory for the host slots, or CUDA does not pin it.
        ValueError: layers keep tensors for a sequence and `num_states` is 0, or none does and it is not; groups of
            tensors of several dtypes, and a `block_size` with which these do not lie aligned; or as for `PagedKVCache`.
        OverflowError, TypeError: as for `PagedKVCache`.

    Example:
        >>> config = CacheConfig(num_layers=2, num_kv_heads=8, head_dim=128, num_gpu_blocks=64)
        >>> engine = CacheEngine(config, "float16", "cpu")
        >>> len(engine), engine.memory_bytes
        (2, 8388608)
        >>> engine.get_cache(0) is engine[0], engine.get_cache(2)
        (True, None)

    Thread-safety: caches may be taken from any thread; for writing see `PagedKVCache`.
    """

    def __init__(
        self,
        config: CacheConfig,
        dtype: torch.dtype | str,
        device: torch.device | str,
        *,
        layout: str = "HDN",
        prefault: bool = False,
        host_blocks: SupportsIndex = 0,
        num_states: SupportsIndex = 0,
        host_states: SupportsIndex = 0,
    ) -> None:
        if not isinstance(config, CacheConfig):
            raise TypeError(f"config is a {type(config).__name__}; give a CacheConfig")
        self._config = config
        self._reaches = tuple(group.reach for group in config.groups)
        slots = checked_integer("host_blocks", host_blocks, 0, 2**31 - 1)
        self.num_states = _checked_states(config, dtype, num_states)
        checkpoints = checked_integer("host_states", host_states, 0, 2**31 - 1)
        if checkpoints and not (slots and self.num_states):
            raise ValueError(
                f"host_states={checkpoints} needs num_states= and host_blocks=, each at least 1: checkpoints of the "
                "device are copied there, and go with their blocks"
            )
        caches, self._mover, self._memory = PagedKVCache.for_config(
            config, dtype, device, layout=layout, prefault=prefault
        )
        self._layers, self._dtype = tuple(caches), checked_dtype(dtype)
        self._caches = tuple(cache for cache in caches if cache is not None)
        self._states = (
            StateSlots(config, self.num_states, self._dtype, self.device, prefault=prefault)
            if self.num_states
            else None
        )
        self.states: tuple[StateCache | None, ...] = (
            (None,) * config.num_layers if self._states is None else tuple(self._states.caches)
        )
        self.arena = HostArena(slots, config.block_bytes(dtype)) if slots else None
        self.state_arena = HostArena(checkpoints, config.state_bytes(dtype)) if checkpoints else None
        self._host = None if self.arena is None else self._moves_to(self.arena, self.state_arena)
        self._closed: str | None = None
        _log.info(
            "KV cache on %s: %d blocks x %d layers = %.1f MB",
            self.device,
            self.num_blocks,
            len(self),
            self.memory_bytes / 1e6,
        )

    @classmethod
    def for_device(
        cls,
        num_kv_heads: SupportsIndex | None = None,
        head_dim: SupportsIndex | None = None,
        num_layers: SupportsIndex | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        *,
        memory: str | int = "90%",
        block_size: SupportsIndex = 16,
        v_head_dim: SupportsIndex | None = None,
        groups: Iterable[Group] | None = None,
        layers: Iterable[Iterable[LayerTensor]] | None = None,
        layout: str = "HDN",
        host_blocks: SupportsIndex = 0,
        num_states: SupportsIndex = 0,
    ) -> Self:
        """As many blocks as fit into a share of what is free on the device now; load the model before.

        Args:
            num_kv_heads, head_dim, num_layers, block_size, v_head_dim, groups, layers: as for `CacheConfig`; with
                `layers` the first three and `v_head_dim` are left out.
            dtype, device, layout: as for the class; the first two have no default.
            host_blocks: as for the class; on CPU their memory is not taken off what is free.
            num_states: as for the class; their memory comes out of the share, before blocks are counted.
            memory: "90%" of the free memory, "8GiB", or bytes. The rest is left to activations and whoever else comes;
                an INFO line of the logger "kvblocks" says how much that is.

        Memory that torch's allocator holds without using it is given back first, and counts as free. On CPU the free
        memory is what the machine, the process's cgroups and its limits leave; what caches of this process were given
        and have not touched yet counts as taken.

        Raises:
            OutOfMemory: not even one block fits, beside the states.
            ValueError: `memory` is not a size, or more than is free; or as for the others.
            NotImplementedError: the device does not say how much is free.
            TypeError, OverflowError: as for `CacheConfig.for_memory` and `PagedKVCache`.
        """
        if dtype is None or device is None:
            raise TypeError(f"{cls.__name__}.for_device() needs dtype and device; {dtype=} and {device=} were given")
        target = checked_device(device)
        if target.type not in ("cpu", "cuda"):
            raise NotImplementedError(f"{target} does not say how much memory is free; use CacheConfig.for_memory")
        one = CacheConfig(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            num_gpu_blocks=1,
            block_size=block_size,
            v_head_dim=v_head_dim,
            groups=groups,
            layers=layers,
        )
        slots = _checked_states(one, dtype, num_states)
        states = slots * one.state_bytes(dtype)
        free, limit = free_memory(target)
        share = budget(memory, free)
        usable = min(share, free - _most_storages(one) * _ROUNDING) if target.type == "cuda" else share
        if usable < states + one.block_bytes(dtype):
            beside = f" beside {slots} states of {one.state_bytes(dtype)} bytes" if slots else ""
            raise OutOfMemory(
                f"{target} has {free} bytes free, and memory={memory!r} of them holds no block of "
                f"{one.block_bytes(dtype)} bytes{beside}. The limit is {limit}",
                states + one.block_bytes(dtype),
                free,
                0,
            )
        config = CacheConfig.for_memory(
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            num_layers=num_layers,
            memory_bytes=usable,
            dtype=dtype,
            block_size=block_size,
            v_head_dim=v_head_dim,
            groups=one.groups,
            layers=None if layers is None else one.layers,
            num_states=slots,
        )
        taken = config.memory_bytes(dtype) + states
        _log.info(
            "KV cache on %s: %.1f MB of the %.1f MB that are free (memory=%s), %.1f MB in reserve",
            target,
            taken / 1e6,
            free / 1e6,
            memory,
            (free - taken) / 1e6,
        )
        return cls(config, dtype, target, layout=layout, host_blocks=host_blocks, num_states=slots)

    @property
    def config(self) -> CacheConfig:
        return self._config

    @property
    def num_blocks(self) -> int:
        return self._config.num_gpu_blocks

    @property
    def block_size(self) -> int:
        return self._config.block_size

    @property
    def memory_bytes(self) -> int:
        """Bytes of all tensors: `config.memory_bytes(dtype)`, and `config.state_bytes(dtype)` for each state."""
        return self._config.memory_bytes(self.dtype) + self.num_states * self._config.state_bytes(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._caches[0].device

    @property
    def layout(self) -> str:
        return self._caches[0].layout

    def get_cache(self, layer: SupportsIndex) -> PagedKVCache | None:
        """The cache of `layer`, or None past the last, and where it keeps nothing for a token.

        Raises:
            ValueError: `layer` is negative.
            TypeError: `layer` is not an integer.
        """
        index = checked_integer("layer", layer)
        if index < 0:
            raise ValueError(f"layer={index} is negative; layers are 0..{len(self) - 1}")
        return self._layers[index] if index < len(self) else None

    def group_of(self, layer: SupportsIndex) -> int:
        """The layer group, an index into `config.groups`, whose block table and slots the layer uses.

        Raises:
            IndexError: no such layer.
            ValueError: the layer keeps nothing for a token.
            TypeError: `layer` is not an integer.
        """
        index = checked_integer("layer", layer)
        if not 0 <= index < len(self):
            raise IndexError(f"layer {index} is outside 0..{len(self) - 1}")
        group = self[index].group
        assert group is not None
        return group

    def get_all_caches(self) -> list[PagedKVCache]:
        """The caches of all layers that keep something for a token, in order, in a list of the caller's own."""
        return list(self._caches)

    def __getitem__(self, layer: SupportsIndex) -> PagedKVCache:
        """The cache of `layer`, negative ones from the end.

        Raises:
            IndexError: no such layer.
            ValueError: it keeps nothing for a token; `states` has what it keeps for a sequence.
        """
        index = checked_integer("layer", layer)
        if not -len(self) <= index < len(self):
            raise IndexError(f"layer {index} is outside {-len(self)}..{len(self) - 1}")
        cache = self._layers[index]
        if cache is None:
            raise ValueError(f"layer {index} keeps nothing for a token; engine.states[{index}] is its StateCache")
        return cache

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[PagedKVCache]:
        return iter(self._caches)

    def __repr__(self) -> str:
        return f"CacheEngine({self.config!r}, dtype={self.dtype}, device='{self.device}', layout={self.layout!r})"

    def memory_of(self, block: SupportsIndex, group: SupportsIndex = 0) -> list[tuple[int, int]]:
        """Where the bytes of a block lie that belong to the layers of one group, in the order that stores keep.

        These are the tensors of each layer (K, then V) in the order of `config.groups[group].layers`, whatever the
        layout. A block of the pool may have more memory, which only other groups use; it is left out.

        Args:
            block: 0 to num_blocks - 1.
            group: an index into `config.groups`.

        Returns:
            (address, bytes) of each piece, on the engine's device.

        Raises:
            ValueError: no such block or group.
            TypeError: one of them is not an integer.
        """
        index = checked_integer("block", block, 0, self.num_blocks - 1)
        at = checked_integer("group", group, 0, len(self._config.groups) - 1)
        pieces = []
        for layer in self._config.groups[at].layers:
            cache = self[layer]
            for name, tensor in cache.tensors.items():
                lies = cache.layouts[name]
                pieces.append((tensor.data_ptr() + index * lies.block_stride, lies.block_bytes))
        return pieces

    def group_bytes(self, group: SupportsIndex = 0) -> int:
        """Bytes of one block that belong to the layers of a group: those of `memory_of` together.

        Raises:
            ValueError, TypeError: as for `memory_of`.
        """
        return self._memory.sizes[checked_integer("group", group, 0, len(self._config.groups) - 1)]

    def copy_to_host(self, arena: HostArena, pairs: Indices, group: SupportsIndex = 0) -> None:
        """Copy blocks of a group into slots of host memory, behind the slots' headers, and wait until that is done.

        Args:
            arena: whose slots have room for `group_bytes(group)`.
            pairs: [n, 2] of (block, slot). Made in this order, where a slot comes twice.
            group: an index into `config.groups`.

        Raises:
            ValueError: a block, slot or group that does not exist, an arena with too little room, or pairs that lie
                on a device; nothing was copied.
            TypeError: not integers, or not an arena.
            NotImplementedError: the engine is neither on CPU nor on CUDA, or there without Triton.
        """
        self._copy_slots(arena, pairs, group, True)

    def copy_from_host(self, arena: HostArena, pairs: Indices, group: SupportsIndex = 0) -> None:
        """Copy slots of host memory into blocks of a group. Arguments and errors are those of `copy_to_host`."""
        self._copy_slots(arena, pairs, group, False)

    def _copy_slots(self, arena: HostArena, pairs: Indices, group: SupportsIndex, to_slots: bool) -> None:
        self._check_open()
        if not isinstance(arena, HostArena):
            raise TypeError(f"arena is a {type(arena).__name__}; give a HostArena")
        index = checked_integer("group", group, 0, len(self._config.groups) - 1)
        nbytes = self._memory.sizes[index]
        if nbytes > arena.payload_bytes:
            raise ValueError(f"a block of group {index} has {nbytes} bytes and a slot room for {arena.payload_bytes}")
        given = checked_indices("pairs", pairs)
        if not given.is_cpu:
            raise ValueError(f"pairs is on {given.device}; move it with .to()")
        if given.ndim != 2 or given.shape[1] != 2:
            raise ValueError(f"pairs has shape {list(given.shape)}; give (block, slot) pairs, [n, 2]")
        for column, (name, count) in enumerate((("block", self.num_blocks), ("slot", arena.num_slots))):
            ids = given[:, column].contiguous()
            bad = first_outside(ids.data_ptr(), len(ids), 0, count - 1)
            if bad >= 0:
                raise ValueError(f"pairs[{bad}] names {name} {int(ids[bad])}, which is outside 0..{count - 1}")
        host = self._host if arena is self.arena and self._host is not None else self._moves_to(arena)
        if len(given):
            block, slot = given.to(torch.int32).unbind(1)
            kind = torch.full_like(block, 0 if to_slots else 1)
            ends = (block, slot) if to_slots else (slot, block)
            host.run(torch.stack([kind, torch.full_like(block, index), *ends], 1))

    def _moves_to(self, arena: HostArena, state_arena: HostArena | None = None) -> HostMoves:
        places = [MovePlaces(self._memory, self.num_blocks, arena)]
        if self._states is not None and state_arena is not None:
            places.append(MovePlaces(self._states.memory, self.num_states, state_arena))
        return HostMoves(move_stream(places, self.device), places)

    def move(self, step: StepBuffers) -> None:
        """Do all that a step needs moved before its pass, and mark it as done. Call it right after `prepare`, always.

        What is moved is `step.moves`, between device and host slots, and then `step.copies`: a block that others
        hold too, or that is published, is copied before the step writes to it. Slots for states are set to zero and
        copied after these, behind the passes launched so far: launch each pass before the next call. A second call
        moves nothing; moves of a step that was aborted are made all the same.

        On a CUDA device nothing is waited for: moves run on a stream of their own, behind the passes launched so far,
        and the current stream goes on once the moves up to `step.needs` are done, of a step without rows all that were
        handed out. Make the call on the stream on which the pass will run.

        Args:
            step: filled by `BlockManager.prepare`, on this engine's device.

        Raises:
            TypeError: not a step that a manager has filled.
            ValueError: the manager's blocks are not this engine's (their size, their number, or what the layer groups
                attend to differ); the step is on another device; it has moves of a block or slot that is not there, or
                with other numbers than those that come after the newest move made. Nothing was moved or marked.
            RuntimeError: an earlier call failed after it had begun, so that it is not known what blocks hold.
        """
        manager = getattr(step, "manager", None)
        if manager is None:
            raise TypeError(f"step is a {type(step).__name__} that no manager has filled; give what prepare was given")
        self._check_manager(manager)
        needs = step.needs if step.num_seqs else max(step.last_move, manager.moves_marked)
        if not step.waits:
            if self._host is not None:
                self._host.hold(needs)  # moves of earlier steps that this pass waits for
            return
        self._check_open()
        first, last, moves = self._checked_moves(step, manager)
        pairs = checked_pairs(self._caches[0], step.copies)
        states = self._checked_states(step)
        try:
            if self._host is not None:
                self._host.enqueue(moves, first, last, needs)
                self._host.hold(needs)
            if pairs.numel():
                self._mover.copy_blocks(pairs)
            if self._states is not None and states is not None:
                self._states.move(*states)
        except BaseException as error:
            self._closed = f"moves {first} to {last} failed halfway: {type(error).__name__}: {error}"
            raise
        manager.mark_moved(last)

    def landed(self) -> int:
        """The number of the newest move that is done together with all before it, 0 for none: for `manager.landed`.

        It is asked of the device without waiting.
        """
        return 0 if self._host is None else self._host.landed()

    def _check_open(self) -> None:
        if self._closed is not None:
            raise RuntimeError(f"the engine is closed: {self._closed}; what its blocks hold is not known, make another")

    def _checked_moves(self, step: StepBuffers, manager: BlockManager) -> tuple[int, int, torch.Tensor]:
        """The numbers of the first and the last of a step's moves, and those between device and host."""
        moves = torch.from_numpy(step.moves)
        first, last = step.first_move, step.last_move
        if len(moves):
            done = manager.moves_marked
            if first != done + 1:
                raise ValueError(
                    f"the step's moves begin with number {first}, and the newest that was made is {done}: each is made "
                    "once, in order; call engine.move(step) right after every prepare"
                )
            self._check_bounds(moves)
        return first, last, moves

    def _checked_states(self, step: StepBuffers) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Slots that begin at zero, and copies of slots."""
        if self._states is None or step.state_zero is None or step.state_copies is None:
            return None
        zeroed = self._states.checked("step.state_zero", step.state_zero[: step.num_state_zero])
        return zeroed, self._states.checked("step.state_copies", step.state_copies)

    def _check_bounds(self, moves: torch.Tensor) -> None:
        if self.arena is None:
            raise ValueError(
                f"the step has {len(moves)} moves between device and host, and the engine no host memory: make it with "
                "host_blocks="
            )
        groups = len(self._config.groups)
        _check_column("kind", moves[:, 0], 2)
        _check_column("group", moves[:, 1], groups + (self.state_arena is not None))
        kinds = moves[:, 0] != 0
        on_device, in_host = torch.where(kinds, moves[:, 3], moves[:, 2]), torch.where(kinds, moves[:, 2], moves[:, 3])
        if self.state_arena is None:
            _check_column("block", on_device, self.num_blocks)
            _check_column("slot", in_host, self.arena.num_slots)
            return
        states = moves[:, 1] == groups
        _check_column("block", on_device.where(~states, 0), self.num_blocks)
        _check_column("slot", in_host.where(~states, 0), self.arena.num_slots)
        _check_column("state", on_device.where(states, 0), self.num_states)
        _check_column("slot for a state", in_host.where(states, 0), self.state_arena.num_slots)

    def _check_manager(self, manager: BlockManager) -> None:
        if manager.groups != self._reaches:
            raise ValueError(
                f"the manager's layer groups are {manager.groups} and the engine's {self._reaches}; make the manager "
                "with groups=[group.reach for group in config.groups]"
            )
        if manager.block_size != self.block_size or manager.num_blocks > self.num_blocks:
            raise ValueError(
                f"the manager has {manager.num_blocks} blocks of {manager.block_size} tokens and the engine "
                f"{self.num_blocks} of {self.block_size}; make both from one CacheConfig"
            )
        slots = 0 if self.arena is None else self.arena.num_slots
        if manager.host_blocks > slots:
            raise ValueError(
                f"the manager has host_blocks={manager.host_blocks} and the engine {slots}; make both with one number"
            )
        checkpoints = 0 if self.state_arena is None else self.state_arena.num_slots
        if manager.host_states > checkpoints:
            raise ValueError(
                f"the manager has host_states={manager.host_states} and the engine {checkpoints}; make both with one "
                "number"
            )
        if manager.num_states > self.num_states or (manager.num_states == 0) != (self.num_states == 0):
            raise ValueError(
                f"the manager has num_states={manager.num_states} and the engine {self.num_states}; make both with one "
                "number"
            )

    def copy_blocks(self, pairs: Indices) -> None:
        """`PagedKVCache.copy_blocks` in every layer; the pairs are checked once, before anything is copied."""
        self._check_open()
        index = checked_pairs(self._caches[0], pairs)
        if index.numel():
            self._mover.copy_blocks(index)

    def zero_blocks(self, ids: Indices) -> None:
        """`PagedKVCache.zero_blocks` in every layer; the ids are checked once, before anything is changed."""
        self._check_open()
        zero_blocks(self._caches[0], self._mover, ids)


def _most_storages(config: CacheConfig) -> int:
    """The most storages that an engine of this config has; a CUDA device rounds up the memory of each."""
    of_layer = [sum(tensor.per == "token" for tensor in layer) for layer in config.layers]
    return max(sum(of_layer[layer] for layer in group.layers) for group in config.groups) + _STATE_STORAGES


def _check_column(name: str, column: torch.Tensor, count: int) -> None:
    """Raise ValueError where a move names something outside of 0 to count - 1."""
    ids = column.to(torch.int64)
    bad = first_outside(ids.data_ptr(), len(ids), 0, count - 1)
    if bad >= 0:
        raise ValueError(f"step.moves[{bad}] names {name} {int(ids[bad])}, which is outside 0..{count - 1}")


def _checked_states(config: CacheConfig, dtype: torch.dtype | str, num_states: SupportsIndex) -> int:
    slots = checked_integer("num_states", num_states, 0, 2**31 - 2)
    state_bytes = config.state_bytes(dtype)
    if state_bytes and not slots:
        layer = next(i for i, kept in enumerate(config.layers) if any(tensor.per == "sequence" for tensor in kept))
        raise ValueError(
            f"layer {layer} keeps a state for each sequence, and num_states=0: give as many slots of {state_bytes} "
            "bytes as the manager has"
        )
    if slots and not state_bytes:
        raise ValueError(f"num_states={slots}, but no layer of the config keeps anything for a sequence")
    if slots * state_bytes > 2**63 - 1:
        raise OverflowError(f"num_states={slots} slots of {state_bytes} bytes do not fit in 64 bits")
    return slots
