"""A fetch: which blocks of a prompt lie in stores, with the state after them, and their way into host slots.

This is what runs on the threads of `Workers`; when it begins and ends is decided in `kvblocks.tiers.tiers`. Knows keys,
buffers and stores. Imports numpy, the config's reaches, and the stores' side of tiers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvblocks.config import Chunk, Window
from kvblocks.storage.host import HostArena
from kvblocks.tiers.guarded import GuardedStore
from kvblocks.tiers.objects import Block, ObjectFormat
from kvblocks.tiers.store import Status
from kvblocks.tiers.workers import Job, Task

__all__ = ["Loading", "Looking", "Prompt", "Slots", "first_block"]

LOOKED_UP = 64  # blocks of a prompt that one call asks for

Reach = Window | Chunk | None


@dataclass(frozen=True)
class Slots:
    """The objects of an engine: their names, and the memory of each.

    The state after a block is an object of that block in the group after the last one.

    Attributes:
        format: keys and headers.
        shard: the part of the model that this process holds.
        reaches: how far each layer group attends.
        block_size: tokens in a block.
        places: for each group, and for states where there are any, the slots and the bytes of a payload.
        every: blocks from one checkpoint of a state to the next; 0 where layers keep none.
    """

    format: ObjectFormat
    shard: str
    reaches: tuple[Reach, ...]
    block_size: int
    places: tuple[tuple[HostArena, int], ...]
    every: int = 0

    def key(self, block: Block, group: int) -> str:
        return self.format.key(block, group, self.shard)

    def object(self, slot: int, group: int) -> memoryview:
        """Header and payload of what a slot holds of a group."""
        arena, payload_bytes = self.places[group]
        return arena.object(slot, payload_bytes)

    def groups_at(self, index: int) -> range:
        """The groups of which there is something to be found at a block: the state is kept at checkpoints alone."""
        return range(len(self.reaches) + (self.every > 0 and (index + 1) % self.every == 0))

    def ends(self, local: int, num_blocks: int) -> range:
        """The lengths in blocks, above `local`, at which a hit can end."""
        step = self.every or 1
        return range(local - local % step + step, num_blocks + 1, step)


@dataclass(frozen=True)
class Prompt:
    """Tokens that are looked for.

    Attributes:
        tokens: int32 [n], of whole blocks.
        salt: of the prompt.
        extras: the extra bytes of each block.
        local: leading blocks that need not be looked for, as this process has them.
    """

    tokens: npt.NDArray[np.int32]
    salt: bytes
    extras: Sequence[bytes]
    local: int


def first_block(reach: Reach, block_size: int, num_blocks: int) -> int:
    """The first block that the token after `num_blocks` blocks attends to."""
    position = num_blocks * block_size
    if isinstance(reach, Window):
        return max(0, position - reach.size + 1) // block_size
    if isinstance(reach, Chunk):
        return position // reach.size * reach.size // block_size
    return 0


class Looking(Task):
    """Finds out how many leading blocks of a prompt are in stores, or in this process.

    Attributes:
        num_blocks: as many, once it has ended. Where layers keep a state it is there after that many.
        checkpoints: each number of blocks after which a state was found and all that goes with it.
        blocks: of the prompt, once it has ended.
        where: for each (block, group) that was found the first store that has it.
    """

    def __init__(self, slots: Slots, prompt: Prompt, stores: Sequence[GuardedStore]) -> None:
        super().__init__()
        self.blocks: list[Block] = []
        self.where: dict[tuple[int, int], int] = {}
        self.num_blocks = 0
        self.checkpoints: set[int] = set()
        self._slots, self._prompt, self._stores = slots, prompt, stores

    def job(self) -> Job:
        prompt, slots = self._prompt, self._slots
        root = slots.format.root(prompt.salt)
        self.blocks = slots.format.blocks(root, prompt.tokens, slots.block_size, prompt.extras)
        full = [group for group, reach in enumerate(slots.reaches) if reach is None]
        end = len(self.blocks)  # before it, groups that attend to everything have every block
        for first in range(prompt.local, end, LOOKED_UP):
            batch = range(first, min(first + LOOKED_UP, end))
            left = [(index, group) for index in batch for group in slots.groups_at(index)]
            for number, store in enumerate(self._stores):
                if left and store.gives_objects:
                    yield number
                    there = store.lookup([slots.key(self.blocks[index], group) for index, group in left])
                    found = [each for each, is_there in zip(left, there, strict=True) if is_there]
                    store.count(misses=len(left) - len(found))
                    self.where.update(dict.fromkeys(found, number))
                    left = [each for each in left if each not in self.where]
            # Whoever attends to everything needs every block, so what lies behind a missing one is of no use.
            missing = [index for index, group in left if group in full]
            if missing:
                end = missing[0]
                break
        ends = reversed(slots.ends(prompt.local, end))
        served = (length for length in ends if all(self._has(group, length) for group in slots.groups_at(length - 1)))
        if slots.every:
            self.checkpoints = set(served)
            self.num_blocks = max(self.checkpoints, default=prompt.local)
        else:
            self.num_blocks = next(served, prompt.local)

    def _has(self, group: int, length: int) -> bool:
        """Whether a group has what the token after so many blocks attends to, or the state before it is there."""
        if group == len(self._slots.reaches):
            return (length - 1, group) in self.where
        reach = self._slots.reaches[group]
        if reach is None:
            return True  # all up to the end of the search
        first = first_block(reach, self._slots.block_size, length)
        return all((index, group) in self.where for index in range(max(first, self._prompt.local), length))


class Loading(Task):
    """Loads the blocks of a fetch into its slots, and verifies each.

    Attributes:
        rows: block of the prompt, group and slot of each object.
        digests: of the blocks.
        sources: for each row the store that it came from, once it has been verified; -1 before, and for none.
        unsafe: whether a store gave up on a slot that it may still write.
    """

    def __init__(
        self,
        slots: Slots,
        rows: npt.NDArray[np.int32],
        blocks: Sequence[Block],
        where: dict[tuple[int, int], int],
        stores: Sequence[GuardedStore],
    ) -> None:
        super().__init__()
        self.rows = [(int(index), int(group), int(slot)) for index, group, slot in rows]
        self.sources = [-1] * len(self.rows)
        self.unsafe = False
        self._first_lacking = len(self.rows)  # a row that no store gave, to save loads
        self.digests = {blocks[index].digest for index, _, _ in self.rows}
        self._slots, self._blocks, self._where, self._stores = slots, blocks, where, stores

    def jobs(self, batch: int) -> list[Job]:
        """One for each batch of rows."""
        return [
            self._load(range(first, min(first + batch, len(self.rows)))) for first in range(0, len(self.rows), batch)
        ]

    @property
    def num_ok(self) -> int:
        """Leading rows that are whole and right, once it has ended."""
        return self.sources.index(-1) if -1 in self.sources else len(self.rows)

    def blocks_by_store(self, num_ok: int, served: range, num_stores: int) -> list[int]:
        """How many of the prompt's blocks in a range came from each store; from the last one that gave a part of it."""
        last: dict[int, int] = {}
        for (index, _, _), source in zip(self.rows[:num_ok], self.sources, strict=False):
            if index in served:
                last[index] = max(source, last.get(index, 0))
        return [sum(source == number for source in last.values()) for number in range(num_stores)]

    def _load(self, numbers: range) -> Job:
        left = list(numbers)
        for number, store in enumerate(self._stores):
            # What a store did not have when it was asked, it is not asked for; what another failed to give, it is.
            asked = [row for row in left if self._where.get(self.rows[row][:2], 0) <= number]
            if not asked or not store.gives_objects:
                continue
            yield number
            if self._first_lacking < asked[0]:
                return  # rows behind it are of no use
            got = self._load_from(store, number, asked)
            left = [row for row in left if row not in got]
        if left:
            self._first_lacking = min(self._first_lacking, left[0])

    def _load_from(self, store: GuardedStore, number: int, asked: list[int]) -> set[int]:
        """Rows that are settled: those that the store gave, and those that must not be loaded again."""
        slots = self._slots
        rows = [self.rows[row] for row in asked]
        keys = [slots.key(self._blocks[index], group) for index, group, _ in rows]
        buffers = [slots.object(slot, group) for _, group, slot in rows]
        statuses = store.load(keys, buffers)
        settled = set()
        nbytes = []
        for row, (index, group, _), buffer, status in zip(asked, rows, buffers, statuses, strict=True):
            if status is Status.OK and slots.format.verify(self._blocks[index], group, slots.shard, buffer):
                self.sources[row] = number
                settled.add(row)
                nbytes.append(buffer.nbytes)
            elif status is Status.TIMEOUT and store.store.writes_late:
                self.unsafe = True
                settled.add(row)
        corrupt = statuses.count(Status.OK) - len(nbytes)
        store.count(hits=len(nbytes), bytes_loaded=sum(nbytes), corrupt=corrupt)
        return settled
