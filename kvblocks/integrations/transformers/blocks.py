"""What caches on the same blocks have in common: a manager, the storage of its blocks, and whose pass runs.

Knows rows only as far as `Sharing` says. Imports torch, the manager, storage and the shapes of layers.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol
from weakref import WeakValueDictionary

import numpy as np
import torch

from kvblocks.config import Group, State
from kvblocks.engine import CacheEngine
from kvblocks.errors import UnsupportedModel
from kvblocks.integrations.transformers.layers import KVShape, checkpoints_every, filling, one_block, slots_beside
from kvblocks.integrations.transformers.passes import Ids, Prompt
from kvblocks.integrations.transformers.states import LayerStates, SlotStates
from kvblocks.manager import BlockManager
from kvblocks.models.shapes import Reach
from kvblocks.step.buffers import StepBuffers
from kvblocks.tiers import Ticket, Tiers

__all__ = ["Blocks", "Sharing", "Sizes"]


class Sharing(Protocol):
    """Rows of one cache, as others on the same blocks see them."""

    def drop(self) -> None:
        """The running pass has failed."""

    def settle(self) -> None:
        """No pass so far is cut any more."""


class _UnknownIds:
    """Ids for tokens whose own were never told, above all real ones, each given once.

    A manager shares a computed block only where its token ids are known. These are placeholder ids, each unique, so no
    prompt can match them. When all are spent they start again, and each manager forgets the old ones first.
    """

    FIRST, END = 1 << 30, 1 << 31

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._next, self._round = self.FIRST, 0

    def draw(self, count: int) -> tuple[Ids, int]:
        """`count` ids, and how often all have been spent."""
        with self._lock:
            if self._next + count > self.END:
                self._next, self._round = self.FIRST, self._round + 1
            self._next += count
            return np.arange(self._next - count, self._next), self._round


_unknown_ids = _UnknownIds()


@dataclass
class Sizes:
    """What blocks there are to be, as far as it is known before the first K and V come.

    Attributes:
        shape: layers, heads and dims as the model's config has them; raises where it does not say.
        dtype, device: those that were asked for.
        groups: the layers by how far they attend.
        keeps_states: whether layers keep states. There are slots for checkpoints of these where `shape` has them.
        num_states: slots for them, once it is known.
        index_dims: of each layer the dim of its index keys, 0 for none.
        likely_dtype: of K and V where none was asked for.
    """

    shape: Callable[[], KVShape]
    num_layers: int
    index_dims: tuple[int, ...]
    memory: int | None
    num_blocks: int | None
    block_size: int
    dtype: torch.dtype | None
    device: torch.device | None
    likely_dtype: torch.dtype
    groups: tuple[Group, ...]
    keeps_states: bool = False
    num_states: int | None = None


class Blocks:
    """The blocks that caches share: a manager, the storage of its blocks, and the arrays of the pass under way.

    Passes follow each other: one that has begun and not ended when another cache begins its own has failed.
    """

    _of_manager: ClassVar["WeakValueDictionary[int, Blocks]"] = WeakValueDictionary()

    def __init__(
        self, sizes: Sizes | None, manager: BlockManager | None = None, engine: CacheEngine | None = None
    ) -> None:
        self.running: Sharing | None = None
        self.recorded: Sharing | None = None  # whose passes may still be cut: their steps are open
        self.tiers: Tiers | None = None  # stores below the host slots
        self._sizes = sizes
        self._manager = manager
        self._engine = engine
        self._buffers: StepBuffers | None = None
        self._round = 0
        self.slots: SlotStates | None = None  # states in slots of the engine, once a pass has shown what they are
        if manager is not None:
            self._of_manager[id(manager)] = self

    @classmethod
    def of(cls, manager: BlockManager, engine: CacheEngine) -> "Blocks":
        """The blocks of a manager, the same object for every cache on it."""
        known = cls._of_manager.get(id(manager))
        if known is not None and known._engine is not engine:
            raise ValueError("another cache uses this manager with another engine; give the engine of that cache")
        if manager.groups != tuple(group.reach for group in engine.config.groups):
            raise ValueError(
                f"the manager has layer groups {manager.groups} and the engine {engine.config.groups}; give the two of "
                "one cache"
            )
        if (manager.num_blocks, manager.block_size) != (engine.num_blocks, engine.block_size):
            raise ValueError(
                f"the manager has {manager.num_blocks} blocks of {manager.block_size} tokens and the engine "
                f"{engine.num_blocks} of {engine.block_size}; give the two of one cache"
            )
        return known or cls(None, manager, engine)

    @property
    def manager(self) -> BlockManager:
        if self._manager is None:
            assert self._sizes is not None
            sizes = self._sizes
            if sizes.num_blocks is None or sizes.keeps_states:
                try:
                    self._size(sizes.shape(), sizes.dtype or sizes.likely_dtype)
                except UnsupportedModel:  # the first K and V will say
                    if sizes.num_blocks is None:
                        raise
            assert sizes.num_blocks is not None
            groups: list[Reach | State] = [group.reach for group in sizes.groups]
            if sizes.num_states:
                groups.append(State(checkpoints_every(sizes.block_size)))
            self._manager = BlockManager(
                sizes.num_blocks, sizes.block_size, groups=groups, num_states=sizes.num_states or 0
            )
            self._of_manager[id(self._manager)] = self
        return self._manager

    def engine(self, seen: tuple[int, int, int] | None, dtype: torch.dtype, device: torch.device) -> CacheEngine:
        """The storage, allocated the first time, when K and V of this shape (heads, dim of K, dim of V) were seen.

        Raises:
            OutOfMemory: it does not fit.
            ValueError: it is more than the memory that was given, as K and V are not what the config said.
        """
        if self._engine is not None:
            return self._engine
        sizes = self._sizes
        assert sizes is not None
        if sizes.dtype not in (None, dtype) or sizes.device not in (None, device):
            raise ValueError(
                f"the model makes {dtype} on {device}, the cache was made for {sizes.dtype or dtype} on "
                f"{sizes.device or device}; give PagedCache the model's dtype and device"
            )
        shape = self._shape(seen)
        if self._manager is None:
            self._size(shape, dtype)
        assert sizes.num_blocks is not None
        if not sizes.num_states:
            shape = shape._replace(states=())
        config = one_block(shape, sizes.block_size, sizes.groups).replace(num_gpu_blocks=sizes.num_blocks)
        num_states = sizes.num_states or 0
        needed = config.memory_bytes(dtype) + num_states * config.state_bytes(dtype)
        if sizes.memory is not None and needed > sizes.memory:
            raise ValueError(
                f"{sizes.num_blocks} blocks of {shape[1]} heads of {dtype} K [{shape[2]}] and V [{shape[3]}] are "
                f"{needed} bytes, and memory={sizes.memory}; the blocks were counted by the "
                "config, which has another shape or dtype: give num_blocks, or dtype"
            )
        # NHD: a token's heads lie together, as transformers makes them and attention kernels read them.
        self._engine = CacheEngine(config, dtype, device, layout="NHD", num_states=num_states)
        return self._engine

    def slots_for(self, states: Sequence[LayerStates]) -> SlotStates:
        """The slots of the engine, which is there, for these states; the same for all caches.

        Raises:
            ValueError: the engine has no room for such states.
        """
        if self.slots is None:
            self.slots = SlotStates(states, self.allocated())
        return self.slots

    @property
    def is_allocated(self) -> bool:
        """Whether shape, dtype and device are settled."""
        return self._engine is not None

    def dtype_of(self, made: torch.dtype) -> torch.dtype:
        """Of K and V as they are kept, where autocast makes others: what was asked for or is there, else `made`."""
        if self._engine is not None:
            return self._engine.dtype
        return made if self._sizes is None or self._sizes.dtype is None else self._sizes.dtype

    def allocated(self) -> CacheEngine:
        """The storage, as far as it is known what it will be asked for."""
        sizes = self._sizes
        if self._engine is not None or sizes is None:
            assert self._engine is not None
            return self._engine
        return self.engine(None, sizes.dtype or sizes.likely_dtype, sizes.device or torch.device("cpu"))

    def _shape(self, seen: tuple[int, int, int] | None) -> KVShape:
        """Heads and dims of the layers: as the config says, or all as the first was seen, where it says otherwise."""
        sizes = self._sizes
        assert sizes is not None
        try:
            said = sizes.shape()
        except ValueError:
            if seen is None:
                raise
            return KVShape(sizes.num_layers, *seen, index_dims=sizes.index_dims)
        if seen is None or seen in (said.layers or ()):
            return said
        largest = seen  # all are as the first shows
        if said.layers is not None:
            heads, k_dim, v_dim = (max(sides) for sides in zip(said[1:4], seen, strict=True))
            largest = heads, k_dim, v_dim
        return KVShape(sizes.num_layers, *largest, index_dims=sizes.index_dims, states=said.states)

    def _size(self, shape: KVShape, dtype: torch.dtype) -> None:
        """Settle how many blocks and slots there are, as far as that was left open."""
        sizes = self._sizes
        assert sizes is not None
        one = one_block(shape, sizes.block_size, sizes.groups)
        every = checkpoints_every(sizes.block_size)
        if sizes.num_blocks is None:
            assert sizes.memory is not None
            config, sizes.num_states = filling(one, sizes.memory, dtype, every=every)
            sizes.num_blocks = config.num_gpu_blocks
        elif sizes.num_states is None:
            sizes.num_states = slots_beside(one.replace(num_gpu_blocks=sizes.num_blocks), dtype, every)

    def move(self, step: StepBuffers) -> None:
        if self._engine is not None:  # without it nothing has been written that could be copied
            self._engine.move(step)
            if self.tiers is not None:
                self.tiers.poll()
            elif self._engine.arena is not None:
                self.manager.landed(self._engine.landed())

    def bring(self, device: torch.device) -> None:
        """Make the moves that are noted, without a pass: what `admit` has found is there then."""
        step = self.buffers(1, 1, 1, device)
        step_id = self.manager.prepare([], [], step)
        try:
            self.move(step)
        finally:
            self.manager.abort(step_id)

    def admit(self, prompt: Prompt, *, max_hit: int | None, fetches: bool) -> tuple[int, int]:
        """`BlockManager.admit` of a prompt.

        Args:
            fetches: whether to ask stores for its blocks before, and wait for these up to a deadline.

        Raises:
            NoFreeBlocks, TooManySequences: as `BlockManager.admit`.
        """
        given: dict[str, Any] = {"salt": prompt.salt, "extra": prompt.extra}
        if self.tiers is None or not fetches or max_hit == 0:
            return self.manager.admit(prompt.ids, max_hit=max_hit, **given)
        ticket = self._fetched(self.tiers, prompt)
        try:
            return self.manager.admit(prompt.ids, max_hit=max_hit, fetched=ticket.fetch, **given)
        except BaseException:
            self.tiers.release(ticket)
            raise

    def fetch(self, prompts: Sequence[Prompt]) -> None:
        """Bring what stores have of prompts to host memory, where `match` finds it; wait for it up to a deadline."""
        if self.tiers is not None:
            for prompt in prompts:
                self.tiers.release(self._fetched(self.tiers, prompt))

    @staticmethod
    def _fetched(tiers: Tiers, prompt: Prompt) -> Ticket:
        ticket = tiers.fetch(prompt.ids, salt=prompt.salt, extra=prompt.extra)
        try:
            tiers.wait([ticket])
        except BaseException:
            tiers.release(ticket)
            raise
        return ticket

    def unknown_ids(self, count: int) -> Ids:
        ids, spent = _unknown_ids.draw(count)
        if spent != self._round:
            in_use = self.tiers is not None and not self.tiers.is_suspended
            self.manager.reset_prefix_cache()
            if self.tiers is not None and in_use:
                self.tiers.renew(self.tiers.namespace, same_weights=True)
            self._round = spent
        return ids

    def buffers(self, num_seqs: int, num_tokens: int, num_blocks: int, device: torch.device) -> StepBuffers:
        """Step buffers of at least these sizes; they grow by doubling."""
        old = self._buffers
        had = (4, 64, 16) if old is None else (old.max_seqs, old.max_tokens, old.max_blocks_per_seq)
        wanted = (num_seqs, num_tokens, num_blocks)
        if old is None or old.device != device or any(map(int.__gt__, wanted, had)):
            sizes = [size if need <= size else max(need, 2 * size) for need, size in zip(wanted, had, strict=True)]
            groups, states = len(self.manager.groups), self.manager.num_states > 0
            self._buffers = old = StepBuffers(*sizes, device=device, groups=groups, states=states)
        return old

    def begin(self, rows: Sharing | None) -> None:
        """Make these the rows whose pass runs; that of others, still running, has failed, if it is not at its end.

        None stands for a step of a scheduler, whose rows are in no cache.
        """
        if self.running is not None and self.running is not rows:
            self.running.drop()
        if self.recorded is not None and self.recorded is not rows:
            self.recorded.settle()
        self.running = rows
