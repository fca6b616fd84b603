"""A plain-Python model of `kvblocks.manager.BlockManager` with one layer group: the oracle of its tests.

Lists and dicts, no cleverness: it is here to be read, and to be right. Speed and memory are not its business.
Imports nothing of kvblocks but the errors, so that it shares no mistake with what it judges.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import numpy as np

from kvblocks.errors import InvariantViolation, NoFreeBlocks, StaleSequence, TooManySequences

UNKNOWN = -1  # how a placeholder shows among a sequence's tokens
MAX_TOKEN = 2**31 - 1
GENERATION_SHIFT = 24  # a handle is generation << 24 | slot

Extra = Sequence[tuple[int, bytes]]
# What makes two full blocks after one prefix equal: their tokens, and the extra bytes with their offset in the block.
BlockKey = tuple[tuple[int, ...], tuple[tuple[int, bytes], ...]]

P = ParamSpec("P")
R = TypeVar("R")


class Admission(IntEnum):
    NOW = 0
    LATER = 1
    NEVER = 2


class Stats(NamedTuple):
    admitted: int
    prompt_tokens: int
    hit_tokens: int
    evictions: int
    preemptions: int
    resumed: int
    published: int
    merged: int
    copies: int
    peak_used_blocks: int


class Lengths(NamedTuple):
    num_cached: list[int]
    num_computed: list[int]
    reserved: list[int]
    num_tokens: list[int]


class ModelStep:
    """What one step shows to attention, without padding; the three sizes bound what `prepare` accepts."""

    def __init__(self, max_seqs: int, max_tokens: int, max_blocks_per_seq: int) -> None:
        self.max_seqs = max_seqs
        self.max_tokens = max_tokens
        self.max_blocks_per_seq = max_blocks_per_seq
        self.input_ids: list[int] = []
        self.positions: list[int] = []
        self.slot_mapping: list[int] = []
        self.block_table: list[list[int]] = []
        self.seq_lens: list[int] = []
        self.query_start_loc: list[int] = [0]
        self.copies: list[tuple[int, int]] = []
        self.num_seqs = 0
        self.num_tokens = 0
        self.max_query_len = 0
        self.max_seq_len = 0


@dataclass(eq=False)
class Node:
    """One full block of tokens after one exact prefix. A root (of a salt) has no parent and no block."""

    parent: "Node | None"
    key: BlockKey
    block: int
    children: dict[BlockKey, "Node"] = field(default_factory=dict)


@dataclass(eq=False)
class Seq:
    """One request: its tokens, the blocks under them, and how far it has come.

    num_cached <= num_computed <= num_prepared <= reserved <= len(tokens)
    """

    handle: int
    tokens: list[int]
    salt: bytes
    extra: dict[int, bytes]
    table: list[int] = field(default_factory=list)
    num_cached: int = 0
    num_computed: int = 0
    num_prepared: int = 0  # end of the newest open step's range; num_computed when no step is open
    reserved: int = 0
    num_published: int = 0  # leading blocks that hang in the tree
    may_publish: bool = True
    preempted: bool = False
    freed: bool = False  # its handle is gone, its blocks stay until its last open step closes


@dataclass(eq=False)
class Row:
    """One sequence's part in an open step: enough to undo it."""

    sequence: Seq
    start: int
    query_len: int
    reserved_before: int
    num_new_blocks: int
    copy: tuple[int, int] | None  # (source, target) of a copy-on-write
    slots: list[int]

    @property
    def end(self) -> int:
        return self.start + self.query_len


@dataclass(eq=False)
class OpenStep:
    step_id: int
    rows: list[Row]
    waiting: list[int] = field(default_factory=list)  # blocks free once this step closes, in the order released


def public(method: "Callable[Concatenate[ModelManager, P], R]") -> "Callable[Concatenate[ModelManager, P], R]":
    """A call from outside: afterwards every invariant holds, and a failed call has changed nothing (invariant 8)."""

    @wraps(method)
    def call(self: "ModelManager", /, *args: P.args, **kwargs: P.kwargs) -> R:
        before = self.observe() if self.checking else None
        try:
            result = method(self, *args, **kwargs)
        except Exception as error:
            if self.checking and self.observe() != before:
                raise InvariantViolation(f"{method.__name__} failed and changed the manager", 8) from error
            raise
        self.counts["peak_used_blocks"] = max(
            self.counts["peak_used_blocks"], self.num_blocks - len(self.unused) - len(self.idle)
        )
        if self.checking:
            self.check()
        return result

    return call


class ModelManager:
    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        groups: Sequence[Any] = (None,),
        max_seqs: int = 65536,
        max_nodes: int | None = None,
        max_open_steps: int = 8,
        prefix_caching: bool = True,
        watermark: float = 0.0,
        checking: bool = True,
    ) -> None:
        if tuple(groups) != (None,):
            raise NotImplementedError("the model has one group that attends to everything")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_seqs = max_seqs
        self.max_nodes = num_blocks if max_nodes is None else max_nodes
        self.max_open_steps = max_open_steps
        self.prefix_caching = prefix_caching
        self.watermark_blocks = int(watermark * num_blocks)
        self.checking = checking

        # A block is in `unused` or `idle`, or waits for an open step, or has references.
        self.unused = list(reversed(range(num_blocks)))  # a stack: the last is taken first
        self.idle: list[int] = []  # published and not held, least recently used first
        self.refs = [0] * num_blocks

        self.roots: dict[bytes, Node] = {}
        self.node_of: dict[int, Node] = {}  # published block -> its node

        self.sequences: dict[int, Seq] = {}
        self.pins: dict[int, list[int]] = {}
        self.free_slots = list(reversed(range(max_seqs)))  # a stack
        self.generations: dict[int, int] = {}

        self.steps: list[OpenStep] = []  # oldest first
        self.last_step_id = 0
        self.counts = dict.fromkeys(Stats._fields, 0)

    # Looking in

    @property
    def num_free_blocks(self) -> int:
        return len(self.unused) + len(self.idle)

    @property
    def num_sequences(self) -> int:
        return len(self.sequences)

    @property
    def usage(self) -> float:
        return 1 - self.num_free_blocks / self.num_blocks

    def block_table(self, seq: int) -> list[int]:
        return list(self._sequence(seq).table)

    def tokens(self, seq: int) -> list[int]:
        return list(self._sequence(seq).tokens)

    def lengths(self, seqs: Any) -> Lengths:
        batch = [self._sequence(handle) for handle in _ints("seqs", seqs)]
        return Lengths(
            [s.num_cached for s in batch],
            [s.num_computed for s in batch],
            [s.reserved for s in batch],
            [len(s.tokens) for s in batch],
        )

    def stats(self) -> Stats:
        return Stats(**self.counts)

    def audit(self) -> None:
        self.check()

    # Sequences come

    @public
    def admit(
        self, tokens: Any, *, salt: bytes = b"", extra: Extra = (), reserve: int | None = None
    ) -> tuple[int, int]:
        ids, marks = self._prompt(tokens, salt, extra)
        room = _reserve(reserve)
        if not self.free_slots:
            raise TooManySequences("every slot is taken", self.max_seqs)
        sequence = Seq(0, ids, salt, marks)
        hit, target = self._find_room(sequence, room, self.watermark_blocks)
        sequence.handle = self._new_handle()
        self.sequences[sequence.handle] = sequence
        self._occupy(sequence, hit, target)
        self.counts["admitted"] += 1
        return sequence.handle, sequence.num_cached

    @public
    def match(self, tokens: Any, *, salt: bytes = b"", extra: Extra = ()) -> int:
        ids, marks = self._prompt(tokens, salt, extra)
        return len(self._hit(ids, salt, marks)) * self.block_size

    @public
    def can_admit(self, tokens: Any, *, salt: bytes = b"", extra: Extra = (), reserve: int | None = None) -> Admission:
        ids, marks = self._prompt(tokens, salt, extra)
        room = _reserve(reserve)
        if self._blocks_for(len(ids)) > self.num_blocks:
            return Admission.NEVER
        if not self.free_slots:
            return Admission.LATER
        try:
            self._find_room(Seq(0, ids, salt, marks), room, self.watermark_blocks)
        except NoFreeBlocks:
            return Admission.LATER
        return Admission.NOW

    @public
    def fork(self, seq: int, n: int = 1) -> list[int]:
        parent = self._sequence(seq)
        if _int("n", n) < 1:
            raise ValueError(f"n={n}; a fork makes one child or more")
        self._must_be_shareable(parent)
        if n > len(self.free_slots):
            raise TooManySequences("not enough slots for the children", self.max_seqs)
        handles = [self._new_handle() for _ in range(n)]
        for handle in handles:
            self.sequences[handle] = self._child(parent, handle)
        return handles

    @public
    def reorder(self, seqs: Any, parents: Any) -> None:
        olds = self._batch(seqs)
        sources = [self._sequence(handle) for handle in _ints("parents", parents)]
        if len(olds) != len(sources):
            raise ValueError(f"{len(olds)} sequences but {len(sources)} parents")
        for sequence in olds:
            self._must_rest(sequence)
        for sequence in sources:
            self._must_be_shareable(sequence)
        moves = [(old, source) for old, source in zip(olds, sources, strict=True) if old is not source]
        news = [self._child(source, old.handle) for old, source in moves]
        for (old, _), new in zip(moves, news, strict=True):
            self._drop_from_end(old, 0)
            self.sequences[old.handle] = new

    # Tokens come and go

    @public
    def append(self, seqs: Any, tokens: Any = None) -> None:
        batch = self._batch(seqs)
        self._extend(batch, tokens, [1] * len(batch))

    @public
    def extend(self, seqs: Any, tokens: Any, counts: Any) -> None:
        self._extend(self._batch(seqs), tokens, _ints("counts", counts))

    @public
    def set_tokens(self, seqs: Any, tokens: Any, counts: Any = None) -> None:
        batch = self._batch(seqs)
        sizes = [1] * len(batch) if counts is None else _ints("counts", counts)
        ids = _token_ids(tokens)
        _check_ragged(len(batch), sizes, len(ids))
        gaps = [[i for i, token in enumerate(s.tokens) if token == UNKNOWN] for s in batch]
        for size, gap in zip(sizes, gaps, strict=True):
            if size > len(gap):
                raise ValueError(f"{size} tokens for a sequence with {len(gap)} unknown ones")
        for sequence, size, gap in zip(batch, sizes, gaps, strict=True):
            for position in gap[:size]:
                sequence.tokens[position] = ids.pop(0)

    @public
    def trim(self, seq: int, num_tokens: int) -> None:
        sequence = self._sequence(seq)
        if not 0 <= _int("num_tokens", num_tokens) <= len(sequence.tokens):
            raise ValueError(f"num_tokens={num_tokens} is outside 0..{len(sequence.tokens)}")
        if self._steps_of(sequence):
            raise ValueError("the sequence is in an open step")
        self._cut(sequence, num_tokens)

    # Steps

    @public
    def prepare(self, seqs: Any, query_lens: Any, step: ModelStep) -> int:
        batch = self._batch(seqs)
        lens = _ints("query_lens", query_lens)
        if not batch:
            raise ValueError("a step needs a sequence")
        if len(lens) != len(batch):
            raise ValueError(f"{len(batch)} sequences but {len(lens)} query lengths")
        if len(self.steps) >= self.max_open_steps:
            raise ValueError(f"{self.max_open_steps} steps are open already")
        if len(batch) > step.max_seqs:
            raise ValueError(f"{len(batch)} sequences, the step has room for {step.max_seqs}")
        needed = 0
        for sequence, query_len in zip(batch, lens, strict=True):
            if sequence.preempted:
                raise ValueError("the sequence is preempted")
            end = sequence.num_prepared + query_len
            if query_len < 1 or end > len(sequence.tokens):
                raise ValueError(f"query_len={query_len} is outside 1..{len(sequence.tokens) - sequence.num_prepared}")
            num_blocks = self._blocks_for(max(sequence.reserved, end))
            if num_blocks > step.max_blocks_per_seq:
                raise ValueError(f"{num_blocks} blocks, a row of the step has room for {step.max_blocks_per_seq}")
            needed += num_blocks - len(sequence.table) + int(self._must_copy(sequence))
        if sum(lens) > step.max_tokens:
            raise ValueError(f"{sum(lens)} tokens, the step has room for {step.max_tokens}")
        if needed > self.num_free_blocks:
            raise NoFreeBlocks("not enough free blocks for the step", needed, self.num_free_blocks)

        self.last_step_id += 1
        rows = [self._prepare_row(sequence, query_len) for sequence, query_len in zip(batch, lens, strict=True)]
        self.steps.append(OpenStep(self.last_step_id, rows))
        self._fill(step, rows)
        return self.last_step_id

    @public
    def commit(self, step_id: int, accepted: Any = None) -> None:
        if _int("step_id", step_id) not in [step.step_id for step in self.steps[:1]]:
            raise ValueError(f"step_id={step_id} is not the oldest open step")
        step = self.steps[0]
        counts = [row.query_len for row in step.rows] if accepted is None else _ints("accepted", accepted)
        if len(counts) != len(step.rows):
            raise ValueError(f"{len(step.rows)} rows but {len(counts)} counts of accepted tokens")
        for row, count in zip(step.rows, counts, strict=True):
            if not 0 <= count <= row.query_len:
                raise ValueError(f"accepted={count} is outside 0..{row.query_len}")
            if count < row.query_len and len(self._steps_of(row.sequence)) > 1:
                raise ValueError("a sequence of a later open step cannot be cut; abort that step first")

        self.steps.pop(0)  # from here on "open steps" leaves this one out
        for row, count in zip(step.rows, counts, strict=True):
            sequence = row.sequence
            if row.copy is not None:
                self._drop(row.copy[0])
            sequence.num_computed = row.start + count
            if count < row.query_len:
                self._cut(sequence, row.start + count)
            self._publish(sequence)
        for block in step.waiting:
            self._set_free(block, None)
        self._free_leavers(step)

    @public
    def abort(self, step_id: int) -> None:
        if _int("step_id", step_id) not in [step.step_id for step in self.steps[-1:]]:
            raise ValueError(f"step_id={step_id} is not the newest open step")
        step = self.steps.pop()
        for row in reversed(step.rows):
            sequence = row.sequence
            for _ in range(row.num_new_blocks):
                self._drop(sequence.table.pop())
            if row.copy is not None:
                source, target = row.copy
                sequence.table[row.start // self.block_size] = source
                self._drop(target)
            sequence.reserved = row.reserved_before
            sequence.num_prepared = row.start
        for block in step.waiting:
            self._set_free(block, self.steps[-1] if self.steps else None)
        self._free_leavers(step)

    # Sequences go

    @public
    def free(self, seqs: Any) -> None:
        for sequence in self._batch(seqs):
            del self.sequences[sequence.handle]
            sequence.freed = True
            if not self._steps_of(sequence):
                self._leave(sequence)

    @public
    def preempt(self, seq: int) -> None:
        sequence = self._sequence(seq)
        self._must_rest(sequence)
        self._drop_from_end(sequence, 0)
        sequence.num_cached = sequence.num_computed = sequence.num_prepared = sequence.reserved = 0
        sequence.num_published = 0
        sequence.preempted = True
        self.counts["preemptions"] += 1

    @public
    def resume(self, seq: int, *, reserve: int | None = None) -> int:
        sequence = self._sequence(seq)
        room = _reserve(reserve)
        if not sequence.preempted:
            raise ValueError("the sequence is not preempted")
        hit, target = self._find_room(sequence, room, watermark=0)
        sequence.preempted = False
        sequence.may_publish = True
        self._occupy(sequence, hit, target)
        self.counts["resumed"] += 1
        return sequence.num_cached

    # The prefix cache from outside

    @public
    def pin(self, tokens: Any, *, salt: bytes = b"", extra: Extra = ()) -> int:
        ids, marks = self._prompt(tokens, salt, extra)
        if not self.free_slots:
            raise TooManySequences("every slot is taken", self.max_seqs)
        blocks = self._find(ids, salt, marks, len(ids) // self.block_size)
        if not blocks:
            raise ValueError("nothing of this prefix is published")
        handle = self._new_handle()
        for block in blocks:
            self._hold(block)
        self.pins[handle] = blocks
        return handle

    @public
    def unpin(self, handle: int) -> None:
        if _int("handle", handle) in self.sequences:
            raise ValueError(f"{handle} is a sequence, not a pin")
        if handle not in self.pins:
            raise StaleSequence(f"no pin {handle}", handle)
        for block in reversed(self.pins.pop(handle)):
            self._drop(block)
        self._give_slot_back(handle)

    @public
    def reset_prefix_cache(self) -> None:
        self.roots.clear()
        self.node_of.clear()
        self.unused += self.idle
        self.idle.clear()
        for sequence in self._all_sequences():
            sequence.may_publish = False

    # Blocks

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _take(self) -> int:
        if self.unused:
            block = self.unused.pop()
        else:
            block = self.idle.pop(0)
            self._unpublish(block)
            self.counts["evictions"] += 1
        self.refs[block] = 1
        return block

    def _hold(self, block: int) -> None:
        if self.refs[block] == 0:
            self.idle.remove(block)
        self.refs[block] += 1

    def _drop(self, block: int, naming: OpenStep | None = None) -> None:
        """Give up a reference; `naming` is the newest open step whose table names the block because of it."""
        self.refs[block] -= 1
        if self.refs[block] == 0:
            self._set_free(block, naming)

    def _set_free(self, block: int, naming: OpenStep | None) -> None:
        if naming is not None:
            naming.waiting.append(block)
        elif block in self.node_of:
            self.idle.append(block)
        else:
            self.unused.append(block)

    def _drop_from_end(self, sequence: Seq, num_blocks: int) -> None:
        """Release the last blocks of a table until `num_blocks` are left."""
        while len(sequence.table) > num_blocks:
            self._drop(sequence.table.pop())

    # Prefix tree

    def _block_key(self, tokens: list[int], extra: dict[int, bytes], index: int) -> BlockKey:
        start, end = index * self.block_size, (index + 1) * self.block_size
        inside = [(position - start, extra[position]) for position in sorted(extra) if start <= position < end]
        return tuple(tokens[start:end]), tuple(inside)

    def _find(self, tokens: list[int], salt: bytes, extra: dict[int, bytes], max_blocks: int) -> list[int]:
        """Blocks of the longest published prefix. No node has an unknown token, so the walk ends before one."""
        node = self.roots.get(salt)
        blocks: list[int] = []
        while node is not None and len(blocks) < max_blocks:
            node = node.children.get(self._block_key(tokens, extra, len(blocks)))
            if node is not None:
                blocks.append(node.block)
        return blocks

    def _hit(self, tokens: list[int], salt: bytes, extra: dict[int, bytes]) -> list[int]:
        """As `_find`, leaving at least one token to compute."""
        return self._find(tokens, salt, extra, max(0, len(tokens) - 1) // self.block_size)

    def _publish(self, sequence: Seq) -> None:
        """Hang every full computed block of known tokens in the tree, or take the equal one that hangs there."""
        while sequence.may_publish and (sequence.num_published + 1) * self.block_size <= sequence.num_computed:
            index = sequence.num_published
            key = self._block_key(sequence.tokens, sequence.extra, index)
            if UNKNOWN in key[0] or not self.prefix_caching:
                return
            own = sequence.table[index]
            if not self._is_alone(own):
                return
            parent = self._parent_node(sequence, index)
            node = parent.children.get(key)
            if node is not None:
                self._hold(node.block)
                sequence.table[index] = node.block
                steps = self._steps_of(sequence)
                self._drop(own, steps[-1] if steps else None)
                self.counts["merged"] += 1
            elif len(self.node_of) >= self.max_nodes:
                sequence.may_publish = False
                return
            else:
                node = Node(parent, key, own)
                parent.children[key] = node
                self.node_of[own] = node
                self.counts["published"] += 1
            sequence.num_published += 1

    def _is_alone(self, block: int) -> bool:
        """Whether one sequence holds a block that is to be examined; a fork may have shared it before.

        If it were published then, or given up for an equal one, the other holder would have a published block without
        that block's parent, which could be evicted first.
        """
        return self.refs[block] == 1

    def _parent_node(self, sequence: Seq, index: int) -> Node:
        if index > 0:
            return self.node_of[sequence.table[index - 1]]
        return self.roots.setdefault(sequence.salt, Node(None, ((), ()), -1))

    def _unpublish(self, block: int) -> None:
        node = self.node_of.pop(block)
        assert node.parent is not None
        del node.parent.children[node.key]

    # Sequences

    def _find_room(self, sequence: Seq, reserve: int | None, watermark: int) -> tuple[list[int], int]:
        """The hit of an admission and how many tokens get slots; NoFreeBlocks if fewer than `watermark` stay free."""
        hit = self._hit(sequence.tokens, sequence.salt, sequence.extra)
        target = len(sequence.tokens)
        if reserve is not None:
            target = min(target, len(hit) * self.block_size + reserve)
        new = max(0, self._blocks_for(target) - len(hit))
        available = self.num_free_blocks - sum(self.refs[block] == 0 for block in hit)
        something_held = self.num_free_blocks < self.num_blocks
        if new > available or (something_held and available - new < watermark):
            raise NoFreeBlocks("not enough free blocks for the sequence", new, available)
        return hit, target

    def _occupy(self, sequence: Seq, hit: list[int], target: int) -> None:
        for block in hit:
            self._hold(block)
        sequence.table = list(hit)
        cached = len(hit) * self.block_size
        sequence.num_cached = sequence.num_computed = sequence.num_prepared = cached
        sequence.num_published = len(hit)
        sequence.reserved = max(target, cached)
        while len(sequence.table) < self._blocks_for(target):
            sequence.table.append(self._take())
        self.counts["prompt_tokens"] += len(sequence.tokens)
        self.counts["hit_tokens"] += cached

    def _child(self, parent: Seq, handle: int) -> Seq:
        """A sequence that shares the blocks with computed tokens, and knows all that the parent knows."""
        computed = parent.num_computed
        table = parent.table[: self._blocks_for(computed)]
        for block in table:
            self._hold(block)
        return Seq(
            handle,
            list(parent.tokens),
            parent.salt,
            dict(parent.extra),
            table,
            num_cached=parent.num_cached,
            num_computed=computed,
            num_prepared=computed,
            reserved=computed,
            num_published=parent.num_published,
            may_publish=parent.may_publish,
        )

    def _extend(self, batch: list[Seq], tokens: Any, counts: list[int]) -> None:
        ids = [UNKNOWN] * sum(counts) if tokens is None else _token_ids(tokens)
        _check_ragged(len(batch), counts, len(ids))
        for sequence, count in zip(batch, counts, strict=True):
            sequence.tokens += ids[:count]
            ids = ids[count:]

    def _cut(self, sequence: Seq, num_tokens: int) -> None:
        """Drop the tokens from `num_tokens` on, with the extra bytes that lay in them."""
        del sequence.tokens[num_tokens:]
        sequence.extra = {p: data for p, data in sequence.extra.items() if p < num_tokens}
        sequence.num_cached = min(sequence.num_cached, num_tokens)
        sequence.num_computed = min(sequence.num_computed, num_tokens)
        sequence.num_prepared = min(sequence.num_prepared, num_tokens)
        sequence.reserved = min(sequence.reserved, num_tokens)
        sequence.num_published = min(sequence.num_published, num_tokens // self.block_size)
        self._drop_from_end(sequence, self._blocks_for(sequence.reserved))

    def _must_rest(self, sequence: Seq) -> None:
        if sequence.preempted:
            raise ValueError("the sequence is preempted")
        if self._steps_of(sequence):
            raise ValueError("the sequence is in an open step")

    def _must_be_shareable(self, sequence: Seq) -> None:
        self._must_rest(sequence)
        if UNKNOWN in sequence.tokens[: sequence.num_computed]:
            raise ValueError("a computed token of the sequence is unknown; set_tokens first")

    def _steps_of(self, sequence: Seq) -> list[OpenStep]:
        return [step for step in self.steps if any(row.sequence is sequence for row in step.rows)]

    def _free_leavers(self, closed: OpenStep) -> None:
        for row in closed.rows:
            if row.sequence.freed and not self._steps_of(row.sequence):
                self._leave(row.sequence)

    def _leave(self, sequence: Seq) -> None:
        self._drop_from_end(sequence, 0)
        self._give_slot_back(sequence.handle)

    def _all_sequences(self) -> list[Seq]:
        """Those with a handle, then those that leave once their steps close."""
        found = list(self.sequences.values())
        for step in self.steps:
            found += [row.sequence for row in step.rows if row.sequence not in found]
        return found

    # Handles

    def _new_handle(self) -> int:
        slot = self.free_slots.pop()
        self.generations[slot] = self.generations.get(slot, 0) + 1
        return self.generations[slot] << GENERATION_SHIFT | slot

    def _give_slot_back(self, handle: int) -> None:
        self.free_slots.append(handle & ((1 << GENERATION_SHIFT) - 1))

    def _sequence(self, handle: int) -> Seq:
        if _int("seq", handle) in self.pins:
            raise ValueError(f"{handle} is a pin, not a sequence")
        if handle not in self.sequences:
            raise StaleSequence(f"no sequence {handle}", handle)
        return self.sequences[handle]

    def _batch(self, seqs: Any) -> list[Seq]:
        handles = _ints("seqs", seqs)
        batch = [self._sequence(handle) for handle in handles]
        if len(set(handles)) < len(handles):
            raise ValueError("a sequence is twice in the batch")
        return batch

    def _prompt(self, tokens: Any, salt: bytes, extra: Extra) -> tuple[list[int], dict[int, bytes]]:
        ids = _token_ids(tokens)
        if not ids:
            raise ValueError("a sequence needs a token")
        if not isinstance(salt, bytes):
            raise TypeError("salt is bytes")
        marks: dict[int, bytes] = {}
        last = -1
        for position, data in extra:
            if not isinstance(data, bytes):
                raise TypeError("extra is made of (position, bytes)")
            if not last < _int("position", position) < len(ids):
                raise ValueError(f"extra position {position} is outside {last + 1}..{len(ids) - 1}")
            marks[position] = data
            last = position
        return ids, marks

    # Rows of a step

    def _must_copy(self, sequence: Seq) -> bool:
        """Whether the block that the next token is written to is another's too, or published."""
        index = sequence.num_prepared // self.block_size
        if index >= len(sequence.table):
            return False
        block = sequence.table[index]
        return self.refs[block] > 1 or block in self.node_of

    def _prepare_row(self, sequence: Seq, query_len: int) -> Row:
        start, end = sequence.num_prepared, sequence.num_prepared + query_len
        reserved_before, blocks_before = sequence.reserved, len(sequence.table)
        copy = None
        if self._must_copy(sequence):
            index = start // self.block_size
            copy = (sequence.table[index], self._take())  # the source keeps this sequence's reference until commit
            sequence.table[index] = copy[1]
            self.counts["copies"] += 1
        sequence.reserved = max(sequence.reserved, end)
        while len(sequence.table) < self._blocks_for(sequence.reserved):
            sequence.table.append(self._take())
        sequence.num_prepared = end
        slots = [self._slot(sequence, position) for position in range(start, end)]
        return Row(sequence, start, query_len, reserved_before, len(sequence.table) - blocks_before, copy, slots)

    def _slot(self, sequence: Seq, position: int) -> int:
        return sequence.table[position // self.block_size] * self.block_size + position % self.block_size

    def _fill(self, step: ModelStep, rows: list[Row]) -> None:
        step.num_seqs = len(rows)
        step.num_tokens = sum(row.query_len for row in rows)
        step.max_query_len = max(row.query_len for row in rows)
        step.max_seq_len = max(row.end for row in rows)
        step.input_ids = [token for row in rows for token in row.sequence.tokens[row.start : row.end]]
        step.positions = [position for row in rows for position in range(row.start, row.end)]
        step.slot_mapping = [slot for row in rows for slot in row.slots]
        step.block_table = [list(row.sequence.table) for row in rows]
        step.seq_lens = [row.end for row in rows]
        step.query_start_loc = [0]
        for row in rows:
            step.query_start_loc.append(step.query_start_loc[-1] + row.query_len)
        step.copies = [row.copy for row in rows if row.copy is not None]

    # Judging oneself

    def check(self) -> None:
        """Raise InvariantViolation for the first of the invariants 1 to 7 that does not hold."""
        rows = [row for step in self.steps for row in step.rows]
        waiting = [block for step in self.steps for block in step.waiting]

        named = [block for sequence in self._all_sequences() for block in sequence.table]
        named += [block for blocks in self.pins.values() for block in blocks]
        named += [row.copy[0] for row in rows if row.copy is not None]
        held = [block for block in range(self.num_blocks) if self.refs[block] > 0]
        for block in range(self.num_blocks):
            _require(1, self.refs[block] == named.count(block), f"the count of block {block} is wrong")
        _require(1, all(self.refs[b] == 0 for b in self.unused + self.idle + waiting), "a free block is held")
        _require(1, all(b in self.node_of for b in self.idle), "a cached block is not published")
        _require(1, not any(b in self.node_of for b in self.unused + waiting), "a free block is still published")

        everywhere = sorted(self.unused + self.idle + waiting + held)
        _require(2, everywhere == list(range(self.num_blocks)), "a block is lost or in two places")

        reachable = [node for root in self.roots.values() for node in _descendants(root)]
        _require(3, len(reachable) == len(self.node_of) <= self.max_nodes, "the tree and the blocks disagree")
        for node in reachable:
            _require(3, self.node_of.get(node.block) is node, f"block {node.block} does not hang on its node")
            _require(3, len(node.key[0]) == self.block_size and UNKNOWN not in node.key[0], "a node's tokens are wrong")
        for sequence in self._all_sequences():
            if not sequence.may_publish:
                continue
            for index in range(sequence.num_published):
                found = self.node_of.get(sequence.table[index])
                _require(3, found is not None, f"block {index} of {sequence.handle} is not published")
                assert found is not None
                key = self._block_key(sequence.tokens, sequence.extra, index)
                _require(3, found.key == key, f"the tokens of block {index} of {sequence.handle} are not its node's")

        for node in reachable:
            if node.parent is None or node.parent.parent is None:
                continue
            parent = node.parent.block
            _require(4, parent in self.node_of, f"the parent of block {node.block} is not published")
            if parent in self.idle:
                ahead = self.idle[: self.idle.index(parent)]
                _require(4, node.block in ahead, f"block {parent} would be evicted before its child {node.block}")

        for sequence in self._all_sequences():
            s = sequence
            ordered = 0 <= s.num_cached <= s.num_computed <= s.num_prepared <= s.reserved <= len(s.tokens)
            _require(5, ordered, f"the lengths of {s.handle} are out of order")
            enough = len(s.table) == self._blocks_for(s.reserved)
            _require(5, enough, f"{s.handle} has {len(s.table)} blocks for {s.reserved} reserved tokens")

        for row in rows:
            for slot in row.slots:
                block = slot // self.block_size
                own = self.refs[block] == 1 and block in row.sequence.table and block not in self.node_of
                _require(6, own, f"a step of {row.sequence.handle} writes block {block}, which is not its own")

        for step in self.steps:
            slots = [slot for row in step.rows for slot in row.slots]
            _require(7, len(set(slots)) == len(slots), f"step {step.step_id} writes a slot twice")

    def observe(self) -> Any:
        """All of the state as values that can be compared: what a failed call must leave as it was."""
        return (
            list(self.unused),
            list(self.idle),
            list(self.refs),
            {block: (node.key, node.parent and node.parent.block) for block, node in self.node_of.items()},
            {handle: _fields(sequence) for handle, sequence in self.sequences.items()},
            {handle: list(blocks) for handle, blocks in self.pins.items()},
            list(self.free_slots),
            dict(self.generations),
            [(s.step_id, [(_fields(r.sequence), r.start, r.end) for r in s.rows], list(s.waiting)) for s in self.steps],
            self.last_step_id,
            dict(self.counts),
        )


def _fields(sequence: Seq) -> dict[str, Any]:
    return {**vars(sequence), "tokens": list(sequence.tokens), "table": list(sequence.table)}


def _descendants(node: Node) -> list[Node]:
    return [found for child in node.children.values() for found in [child, *_descendants(child)]]


def _require(invariant: int, holds: bool, message: str) -> None:
    if not holds:
        raise InvariantViolation(message, invariant)


def _int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} is an int, not {value!r}")
    return int(value)


def _reserve(reserve: Any) -> int | None:
    if reserve is not None and _int("reserve", reserve) < 0:
        raise ValueError(f"reserve={reserve}; it is 0 or more")
    return None if reserve is None else int(reserve)


def _ints(name: str, values: Any) -> list[int]:
    """A flat list of ints out of an int, a list, a numpy array or a CPU tensor."""
    array = np.asarray(values)
    if array.shape == (0,):
        return []
    if array.dtype.kind not in "iu" or array.ndim > 1:
        raise TypeError(f"{name} is one int or a flat array of them, not {values!r}")
    return [int(value) for value in array.reshape(-1)]


def _token_ids(tokens: Any) -> list[int]:
    ids = _ints("tokens", tokens)
    for token in ids:
        if not 0 <= token <= MAX_TOKEN:
            raise ValueError(f"token {token} is outside 0..{MAX_TOKEN}")
    return ids


def _check_ragged(num_seqs: int, counts: list[int], num_tokens: int) -> None:
    if len(counts) != num_seqs or any(count < 0 for count in counts) or sum(counts) != num_tokens:
        raise ValueError(f"{num_seqs} sequences, counts {counts}, {num_tokens} tokens do not agree")
