"""A plain-Python model of `kvblocks.manager.BlockManager`: the oracle of its tests.

Lists and dicts, no cleverness: it is here to be read, and to be right. Speed and memory are not its business.
Imports nothing of kvblocks but the errors and the names of reaches, so that it shares no mistake with what it judges.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import wraps
from itertools import pairwise
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import numpy as np

from kvblocks.config import Chunk, State, Window
from kvblocks.errors import (
    InvariantViolation,
    MovesPending,
    NoFreeBlocks,
    NoFreeStates,
    StaleSequence,
    TooManySequences,
)

GONE = -1  # in a table: a block that no later token reaches
UNKNOWN = -1  # how a placeholder shows among a sequence's tokens
MAX_TOKEN = 2**31 - 1
GENERATION_SHIFT = 24  # a handle is generation << 24 | slot
FREE_LOOK = 16  # free host slots that are looked at for one whose moves have landed
SPILL_LOOK = 1024  # slots of the queue that one `begin_spill` looks at
SPILL_NODES = 4096  # nodes of one spill, but for those of its first slot

Extra = Sequence[tuple[int, bytes]]
# What makes two full blocks after one prefix equal: their tokens, and the extra bytes with their offset in the block.
BlockKey = tuple[tuple[int, ...], tuple[tuple[int, bytes], ...]]

Reach = Window | Chunk | None

P = ParamSpec("P")
R = TypeVar("R")


class Admission(IntEnum):
    NOW = 0
    LATER = 1
    NEVER = 2

    def __bool__(self) -> bool:
        return self is Admission.NOW


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
    loads: int
    offloads: int
    host_evictions: int
    host_hit_tokens: int
    state_copies: int
    checkpoints: int
    checkpoint_evictions: int


class Found(NamedTuple):
    device: int
    host: int


class Move(NamedTuple):
    """A block of one group that is to be copied: loaded from a host slot, or else offloaded to one.

    The group after the last one is the state: source and target are slots for states.
    """

    loads: bool
    group: int
    source: int
    target: int


class SpilledNode(NamedTuple):
    """A node of a spill. Its parent is a row before it; or is known by its digest; or is the root of a salt."""

    parent: int
    parent_digest: bytes | None
    salt: bytes | None
    tokens: bytes
    extra: bytes


class Lengths(NamedTuple):
    num_cached: list[int]
    num_computed: list[int]
    reserved: list[int]
    num_tokens: list[int]
    num_loading: list[int]


class ModelStep:
    """What one step shows to attention, without padding; the three sizes bound what `prepare` accepts."""

    def __init__(self, max_seqs: int, max_tokens: int, max_blocks_per_seq: int, groups: int = 1) -> None:
        self.groups = groups
        self.max_seqs = max_seqs
        self.max_tokens = max_tokens
        self.max_blocks_per_seq = max_blocks_per_seq
        self.input_ids: list[int] = []
        self.positions: list[int] = []
        # One list for each group. In a block table what is out of reach is 0.
        self.slot_mapping: list[list[int]] = [[] for _ in range(groups)]
        self.block_table: list[list[list[int]]] = [[] for _ in range(groups)]
        self.pages: list[list[list[int]]] = [[] for _ in range(groups)]  # blocks of each row that its queries reach
        self.last_page_len: list[int] = []
        self.seq_lens: list[int] = []
        self.query_start_loc: list[int] = [0]
        self.copies: list[tuple[int, int]] = []
        self.moves: list[Move] = []
        # Slots of states: of each row; those that begin at zero; copies; and of each token where drafts are kept.
        self.state_slots: list[int] = []
        self.state_zero: list[int] = []
        self.state_copies: list[tuple[int, int]] = []
        self.state_drafts: list[int] = []
        self.needs = 0
        self.last_move = 0
        self.num_seqs = 0
        self.num_tokens = 0
        self.max_query_len = 0
        self.max_seq_len = 0


@dataclass(eq=False)
class Node:
    """One full block of tokens after one exact prefix. A root (of a salt) has no parent, no blocks and no slots."""

    parent: "Node | None"
    key: BlockKey
    blocks: list[int | None]  # for each group the one that hangs here
    slots: list[int | None]  # and the host slot; where states go to the host, then that of a checkpoint
    digest: bytes | None = None  # its name outside of this process, once somebody has said it
    children: dict[BlockKey, "Node"] = field(default_factory=dict)
    state: int | None = None  # the slot of a checkpoint: the state after the last token of this block


@dataclass(eq=False)
class StateSlot:
    """Where a state lies. Unused, held (refs > 0), or a checkpoint that nobody holds."""

    refs: int = 0  # sequences that stand on it, rows of open steps that go back to it, and pins
    at: int = 0  # the tokens that it has seen once every pass that was prepared has run
    node: Node | None = None  # whose checkpoint it is
    owner: int = 0  # the sequence whose next checkpoint frees this one; 0: none, as it was hit


@dataclass(eq=False)
class Seq:
    """One request: its tokens, the blocks under them, and how far it has come.

    num_cached <= num_computed <= num_prepared <= reserved <= len(tokens)
    """

    handle: int
    tokens: list[int]
    salt: bytes
    extra: dict[int, bytes]
    table: list[list[int]] = field(default_factory=list)  # for each block of tokens one of each group, or GONE
    num_cached: int = 0
    num_computed: int = 0
    num_prepared: int = 0  # end of the newest open step's range; num_computed when no step is open
    reserved: int = 0
    num_published: int = 0  # leading rows of the table that are in the tree
    last_node: Node | None = None  # the node of the last of them
    may_publish: bool = True
    preempted: bool = False
    freed: bool = False  # its handle is gone, its blocks stay until its last open step closes
    needs: int = 0  # the newest move that names a block of its table
    state: int | None = None  # the slot that stands at `num_prepared`; none at 0, and where the caller keeps the state
    lost: bool = False  # an aborted pass wrote that slot: to be preempted once no open step has the sequence
    checkpoint: int | None = None  # the slot of the newest checkpoint that it left


@dataclass(eq=False)
class ModelFetch:
    """Blocks, and a state, that are on their way into host slots from outside of this process."""

    number: int
    num_local: int
    num_tokens: int = 0
    blocks: list[tuple[int, int, int]] = field(default_factory=list)  # index, group, slot of blocks or of states
    taken: list[int] = field(default_factory=list)  # the slots of these, as both kinds are counted together
    path: list[Node] = field(default_factory=list)  # of what it could serve, held until it ends
    held: list[int] = field(default_factory=list)  # slots: those taken, and those of the local hit
    ended: bool = False
    released: bool = False


@dataclass(eq=False)
class ModelSpill:
    """Host slots that are being copied to outside of this process."""

    number: int
    blocks: list[tuple[int, int, int]]  # slot of blocks or of states, group, index into nodes
    slots: list[int]  # as both kinds are counted together
    nodes: list[SpilledNode]
    tree_nodes: list[Node]  # the same; none after a reset
    ended: bool = False


@dataclass(eq=False)
class Row:
    """One sequence's part in an open step: enough to undo it."""

    sequence: Seq
    start: int
    query_len: int
    reserved_before: int
    rows_before: int
    copies: list[tuple[int, int] | None]  # for each group (source, target) of a copy-on-write
    lent: list[bool]  # for each group: the source is written in place by another row, and this row gave it up
    slots: list[list[int]]  # of each group
    states: list[int] = field(default_factory=list)  # slots that the pass writes: one, or one for each token
    keeps: bool = False  # one for each token
    own: bool = False  # none, but where it ends on the grid: the caller keeps the state, and writes it there
    before: int | None = None  # the slot that an abort goes back to
    returns: bool = True  # whether it can: there is such a slot, or the row began at 0

    @property
    def end(self) -> int:
        return self.start + self.query_len


@dataclass(eq=False)
class OpenStep:
    step_id: int
    rows: list[Row]
    last_move: int = 0  # the newest move that was handed out with it
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
        groups: Sequence[Reach | State] = (None,),
        max_seqs: int = 65536,
        max_nodes: int | None = None,
        max_open_steps: int = 8,
        prefix_caching: bool = True,
        watermark: float = 0.0,
        host_blocks: int = 0,
        write_ahead: int = 256,
        num_states: int = 0,
        host_states: int = 0,
        checking: bool = True,
    ) -> None:
        if host_blocks and not prefix_caching:
            raise ValueError("host blocks are for the prefix cache")
        if host_states and not (host_blocks and num_states):
            raise ValueError("a checkpoint in host memory goes with a block, and comes from a slot of the device")
        self.groups = tuple(reach for reach in groups if not isinstance(reach, State))
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.max_seqs = max_seqs
        self.max_nodes = num_blocks + host_blocks if max_nodes is None else max_nodes
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
        self.pins: dict[int, tuple[list[list[int]], Node, int | None]] = {}
        self.free_slots = list(reversed(range(max_seqs)))  # a stack
        self.generations: dict[int, int] = {}

        self.steps: list[OpenStep] = []  # oldest first
        self.last_step_id = 0
        # Copies-on-write, loads and offloads, counted from 1: noted, handed out with a step, enqueued, done.
        self.moves_noted = self.moves_handed = self.moves_marked = self.moves_landed = 0

        # A host slot is unused, or hangs on a node.
        # Those for states are numbered after those for blocks.
        self.host_blocks, self.host_states = host_blocks, host_states
        self.write_ahead = write_ahead
        self.host_unused = list(reversed(range(host_blocks)))  # a stack
        self.host_slots: list[int] = []  # those that hang on nodes, least recently used first
        self.host_states_unused = list(reversed(range(host_blocks, host_blocks + host_states)))
        self.host_checkpoints: list[int] = []  # the same of slots for states
        self.passed: list[int] = []  # hang on nodes, and were passed over by an eviction because they are held
        self.home: dict[int, tuple[Node, int]] = {}  # slot -> its node and group
        # Of blocks, and after them of slots for states.
        self.move_of_block = [0] * (num_blocks + num_states)  # the newest move that names it: who writes it waits
        self.load_of_block = [0] * (num_blocks + num_states)  # the newest load of what it holds: who reads it waits
        self.group_of_slot = [0] * (host_blocks + host_states)
        self.move_of_slot = [0] * (host_blocks + host_states)
        self.loading: list[tuple[int, int]] = []  # (block, slot) of loads that are noted and not handed out
        self.examined = 0  # leading blocks of `idle` that were offloaded, or need not be
        self.slid: set[int] = set()  # cached blocks that went out of a window
        self.counts = dict.fromkeys(Stats._fields, 0)

        # A slot for states is unused, or in `state_idle`, or has references. Those in use are in `state_slots` alone.
        self.every = next((group.every for group in groups if isinstance(group, State)), 0)
        self.num_states = num_states
        self.state_slots = [StateSlot() for _ in range(num_states)]
        self.state_unused = list(reversed(range(num_states)))  # a stack
        self.state_idle: list[int] = []  # checkpoints that nobody holds, least recently used first
        # A checkpoint goes with the block of this group: nobody could hit it then.
        self.anchor = self.groups.index(None) if None in self.groups else 0
        self.offered: list[int] = []  # slots of checkpoints that are to be offloaded, if they still are some

        # Work in the background: it holds slots, which are not evicted, and not free before they are let go.
        self.num_begun = self.num_resets = 0
        self.fetches: list[ModelFetch] = []  # not released
        self.spills: list[ModelSpill] = []  # open
        self.holds = [0] * (host_blocks + host_states)
        self.known: set[int] = set()  # slots whose blocks are there outside of this process too
        # Slots that an offload has filled, the first one first; some have lost what they held.
        self.state_spills: list[int] = []
        self.block_spills: list[int] = []

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

    def block_table(self, seq: int) -> list[Any]:
        table = self._sequence(seq).table
        tables = [[row[g] for row in table] for g in range(len(self.groups))]
        return tables[0] if len(tables) == 1 else tables

    def tokens(self, seq: int) -> list[int]:
        return list(self._sequence(seq).tokens)

    def lengths(self, seqs: Any) -> Lengths:
        batch = [self._sequence(handle) for handle in _ints("seqs", seqs)]
        return Lengths(
            [s.num_cached for s in batch],
            [s.num_computed for s in batch],
            [s.reserved for s in batch],
            [len(s.tokens) for s in batch],
            [self._num_loading(s) for s in batch],
        )

    def _num_loading(self, sequence: Seq) -> int:
        rows = sequence.table[: sequence.num_cached // self.block_size]
        late = [row for row in rows if any(b != GONE and self.load_of_block[b] > self.moves_landed for b in row)]
        return len(late) * self.block_size

    @property
    def num_free_host_blocks(self) -> int:
        return len(self.host_unused)

    @property
    def num_free_host_states(self) -> int:
        return len(self.host_states_unused)

    @property
    def num_free_states(self) -> int:
        return len(self.state_unused) + len(self.state_idle)

    def next_checkpoint(self, seq: int) -> int:
        sequence = self._sequence(seq)
        last = len(sequence.tokens) // self.every * self.every if self.every else 0
        return last if last > sequence.num_prepared else 0

    def state_slot(self, seq: int) -> int:
        slot = self._sequence(seq).state
        return -1 if slot is None else slot

    @property
    def num_background_slots(self) -> int:
        return sum(holds > 0 for holds in self.holds)

    def stats(self) -> Stats:
        return Stats(**self.counts)

    def audit(self) -> None:
        self.check()

    # Sequences come

    @public
    def admit(
        self,
        tokens: Any,
        *,
        salt: bytes = b"",
        extra: Extra = (),
        reserve: int | None = None,
        max_hit: int | None = None,
        host: bool = True,
        fetched: ModelFetch | None = None,
    ) -> tuple[int, int]:
        ids, marks = self._prompt(tokens, salt, extra)
        room, longest = _optional("reserve", reserve), _optional("max_hit", max_hit)
        if fetched is not None:
            self._must_be(fetched, ended=True)
        if not self.free_slots:
            raise TooManySequences("every slot is taken", self.max_seqs)
        sequence = Seq(0, ids, salt, marks)
        hit, target = self._find_room(sequence, room, longest, self.watermark_blocks, host)
        sequence.handle = self._new_handle()
        self.sequences[sequence.handle] = sequence
        self._occupy(sequence, hit, target)
        if fetched is not None:
            self._release(fetched)
        self.counts["admitted"] += 1
        return sequence.handle, sequence.num_cached

    @public
    def match(
        self, tokens: Any, *, salt: bytes = b"", extra: Extra = (), max_hit: int | None = None, tiers: bool = False
    ) -> Any:
        ids, marks = self._prompt(tokens, salt, extra)
        path = self._hit(ids, salt, marks, _optional("max_hit", max_hit), host=True)
        host = sum(None in row for row in self._needed(path))
        found = Found((len(path) - host) * self.block_size, host * self.block_size)
        return found if tiers else sum(found)

    def blocks_needed(self, num_tokens: int, *, reserve: int | None = None, max_new_tokens: int = 1) -> int:
        step = _optional("reserve", reserve)
        if _int("num_tokens", num_tokens) < 1 or _int("max_new_tokens", max_new_tokens) < 1:
            raise ValueError("a prompt and its answer have a token or more each")
        prompt = self._most_held(0, num_tokens, step)
        return max(prompt, self._most_held(num_tokens, num_tokens + max_new_tokens - 1, 1))

    def _most_held(self, start: int, stop: int, reserve: int | None) -> int:
        """The most blocks that a sequence alone holds while tokens are computed in steps of `reserve`, or in one."""
        held = [0]
        while start < stop:
            end = stop if reserve is None else min(start + max(1, reserve), stop)
            held.append(sum(self._blocks_for(end) - self._first_row(g, start) for g in range(len(self.groups))))
            start = end
        return max(held)

    @public
    def can_admit(
        self,
        tokens: Any,
        *,
        salt: bytes = b"",
        extra: Extra = (),
        reserve: int | None = None,
        max_hit: int | None = None,
        host: bool = True,
        max_new_tokens: int = 1,
    ) -> Admission:
        ids, marks = self._prompt(tokens, salt, extra)
        room, longest = _optional("reserve", reserve), _optional("max_hit", max_hit)
        if self.blocks_needed(len(ids), reserve=room, max_new_tokens=max_new_tokens) > self.num_blocks:
            return Admission.NEVER
        if not self.free_slots:
            return Admission.LATER
        try:
            self._find_room(Seq(0, ids, salt, marks), room, longest, self.watermark_blocks, host)
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
        self.sequences.update({new.handle: new for new in news})  # first: they hold nodes that the old ones leave
        for old, _ in moves:
            self._let_go(old)

    # Tokens come and go

    @public
    def append(self, seqs: Any, tokens: Any = None, *, extra: Sequence[Extra] | None = None) -> None:
        batch = self._batch(seqs)
        self._extend(batch, tokens, [1] * len(batch), extra)

    @public
    def extend(self, seqs: Any, tokens: Any, counts: Any, *, extra: Sequence[Extra] | None = None) -> None:
        self._extend(self._batch(seqs), tokens, _ints("counts", counts), extra)

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
        if self.every and sequence.state is not None and num_tokens < sequence.num_computed:
            self._preempt(sequence)
        for g in range(len(self.groups)):
            needed = range(self._first_row(g, num_tokens), self._blocks_for(num_tokens))
            if num_tokens < sequence.num_computed and any(sequence.table[row][g] == GONE for row in needed):
                raise ValueError("tokens that the next one reaches are gone")
        self._cut(sequence, num_tokens)

    # Steps

    @public
    def prepare(
        self, seqs: Any, query_lens: Any, step: ModelStep, *, keep_state: bool = False, own_state: bool = False
    ) -> int:
        batch = self._batch(seqs)
        lens = _ints("query_lens", query_lens)
        if not batch and not self.host_blocks:
            raise ValueError("a step needs a sequence, unless it is there for its moves")
        if (keep_state or own_state) and not self.every:
            raise ValueError("no group keeps a state")
        if keep_state and own_state:
            raise ValueError("the manager and the caller cannot both keep the states")
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
            needed += (num_blocks - len(sequence.table)) * len(self.groups)
            needed += sum(self._must_copy(sequence, g) for g in range(len(self.groups)))
        in_place = self._in_place(batch)
        needed -= len(in_place)
        if sum(lens) > step.max_tokens:
            raise ValueError(f"{sum(lens)} tokens, the step has room for {step.max_tokens}")
        if needed > self.num_free_blocks:
            raise NoFreeBlocks("not enough free blocks for the step", needed, self.num_free_blocks)
        taken = []
        if self.every:
            taken = self._plan_own(batch, lens) if own_state else self._plan_states(batch, lens, keep_state)
        if self.moves_handed > self.moves_marked:
            raise MovesPending("blocks were not copied", self.moves_handed)

        self.last_step_id += 1
        rows = [self._prepare_row(sequence, n, in_place) for sequence, n in zip(batch, lens, strict=True)]
        step.state_slots, step.state_zero, step.state_copies, step.state_drafts = [], [], [], []
        if own_state:
            self._prepare_own(rows, taken, step)
        elif self.every:
            self._prepare_states(rows, taken, keep_state, step)
        opened = OpenStep(self.last_step_id, rows)
        self.steps.append(opened)
        self._fill(step, rows)
        copies = len(step.copies) + len(step.state_copies) + len(step.state_zero)
        self.moves_noted += copies
        waits = [row.sequence.needs for row in rows]
        waits += [self.move_of_block[self.num_blocks + slot] for row in rows for slot in row.states]
        step.needs = self.moves_noted if copies else max(waits, default=0)
        if step.needs <= self.moves_landed:
            step.needs = 0
        step.moves = self._noted_loads() + self._offload_ahead(everything=not rows)
        opened.last_move = step.last_move = self.moves_noted if self.moves_noted > self.moves_handed else 0
        self.moves_handed = self.moves_noted
        return self.last_step_id

    @public
    def mark_moved(self, number: int) -> None:
        if not 0 <= _int("number", number) <= self.moves_handed:
            raise ValueError(f"number={number} is outside 0..{self.moves_handed}")
        self.moves_marked = max(self.moves_marked, number)

    @public
    def landed(self, number: int) -> None:
        if not 0 <= _int("number", number) <= self.moves_marked:
            raise ValueError(f"number={number} is outside 0..{self.moves_marked}")
        self.moves_landed = max(self.moves_landed, number)

    @public
    def commit(self, step_id: int, accepted: Any = None) -> list[int]:
        if _int("step_id", step_id) not in [step.step_id for step in self.steps[:1]]:
            raise ValueError(f"step_id={step_id} is not the oldest open step")
        step = self.steps[0]
        if step.last_move > self.moves_marked:
            raise MovesPending("blocks were not copied", step.last_move)
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
            for copy, lent in reversed(list(zip(row.copies, row.lent, strict=True))):
                if copy is not None and not lent:
                    self._drop(copy[0])
            sequence.num_computed = row.start + count
            if self.every:
                self._settle_state(row, count)
            if count < row.query_len:
                self._cut(sequence, row.start + count)
        for row in step.rows:
            self._publish(row.sequence)
            self._slide(row.sequence)
        for row in step.rows:
            self._leave_checkpoint(row)
            for slot in row.states if row.own else []:
                self._drop_state(slot)
        for block in step.waiting:
            self._set_free(block, None)
        return self._close(step)

    @public
    def abort(self, step_id: int) -> list[int]:
        if _int("step_id", step_id) not in [step.step_id for step in self.steps[-1:]]:
            raise ValueError(f"step_id={step_id} is not the newest open step")
        step = self.steps.pop()
        if not self.host_blocks:
            self.moves_marked = max(self.moves_marked, step.last_move)  # its copies need not be made
        for row in reversed(step.rows):
            sequence = row.sequence
            self._drop_from_end(sequence, row.rows_before)
            for g, copy in reversed(list(enumerate(row.copies))):
                if copy is not None:
                    source, target = copy
                    self._drop(target)
                    sequence.table[row.start // self.block_size][g] = source
                    self.refs[source] += row.lent[g]
            sequence.reserved = row.reserved_before
            sequence.num_prepared = row.start
            if self.every:
                self._return_state(row)
        for block in step.waiting:
            self._set_free(block, self.steps[-1] if self.steps else None)
        return self._close(step)

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
        self._preempt(sequence)

    def _preempt(self, sequence: Seq) -> None:
        self._let_go(sequence)
        sequence.num_cached = sequence.num_computed = sequence.num_prepared = sequence.reserved = 0
        sequence.num_published = 0
        sequence.preempted = True
        sequence.lost = False
        self.counts["preemptions"] += 1

    @public
    def resume(self, seq: int, *, reserve: int | None = None, max_hit: int | None = None, host: bool = True) -> int:
        sequence = self._sequence(seq)
        room, longest = _optional("reserve", reserve), _optional("max_hit", max_hit)
        if not sequence.preempted:
            raise ValueError("the sequence is not preempted")
        length = len(sequence.tokens)
        if room is None and length and self.blocks_needed(length) > self.num_blocks:
            room = 1 if self.blocks_needed(length, reserve=1) <= self.num_blocks else None
        hit, target = self._find_room(sequence, room, longest, 0, host)
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
        path = self._find(ids, salt, marks, len(ids) // self.block_size)
        if not path:
            raise ValueError("nothing of this prefix is published")
        handle = self._new_handle()
        rows = self._hold_path(path, Seq(handle, ids, salt, marks))
        sequence = Seq(handle, ids, salt, marks)
        self.pins[handle] = rows, path[-1], self._hold_checkpoint(path[-1], sequence) if self.every else None
        return handle

    @public
    def unpin(self, handle: int) -> None:
        if _int("handle", handle) in self.sequences:
            raise ValueError(f"{handle} is a sequence, not a pin")
        if handle not in self.pins:
            raise StaleSequence(f"no pin {handle}", handle)
        rows, node, state = self.pins.pop(handle)
        for row in reversed(rows):
            self._drop_row(row)
        if state is not None:
            self._drop_state(state)
        self._prune(node)
        self._give_slot_back(handle)

    @public
    def reset_prefix_cache(self) -> None:
        for slot in [*self.state_idle, *range(self.num_states)]:
            if self.state_slots[slot].node is not None:
                self._drop_checkpoint(slot)
        self.roots.clear()
        self.node_of.clear()
        for handle in sorted(self.pins, key=lambda handle: handle % (1 << GENERATION_SHIFT)):
            rows, _, state = self.pins[handle]
            for row in reversed(rows):
                self._drop_row(row)
            if state is not None:
                self._drop_state(state)
        self.unused += self.idle
        self.idle.clear()
        self.examined = 0
        self.num_resets += 1
        for slots in (self.host_slots, self.host_checkpoints):
            for slot in slots:
                if not self.holds[slot]:
                    self._unused_of(slot).append(slot)
            slots.clear()
        self.passed.clear()
        self.home.clear()
        self.known.clear()
        self.state_spills.clear()
        self.block_spills.clear()
        for fetch in self.fetches:
            fetch.path.clear()
        for spill in self.spills:
            spill.tree_nodes.clear()
        for sequence in self._all_sequences():
            sequence.may_publish = False
            sequence.num_published = 0
            sequence.last_node = None
        self.pins = {handle: ([], self._root(b""), None) for handle in self.pins}  # nobody could reach what they held

    # Work in the background

    def block_extras(self, extra: Extra, num_blocks: int) -> list[bytes]:
        if _int("num_blocks", num_blocks) < 0:
            raise ValueError(f"num_blocks={num_blocks} is below 0")
        marks = _checked_extra(extra, MAX_TOKEN)
        return [_extra_bytes(self._block_key([], marks, index)) for index in range(num_blocks)]

    @public
    def begin_fetch(
        self,
        tokens: Any,
        *,
        num_blocks: int,
        checkpoints: Sequence[int] = (),
        salt: bytes = b"",
        extra: Extra = (),
    ) -> ModelFetch:
        """One length is planned: the longest that all groups can serve, with what may be taken and held.

        What is there already is held first, so that no slot is taken from it.
        """
        ids, marks = self._prompt(tokens, salt, extra)
        below = _optional("num_blocks", num_blocks)
        if below is None:
            raise TypeError("num_blocks is an int")
        if not self.host_blocks:
            raise ValueError("there is no host pool")
        states = [_int("checkpoints", n) for n in checkpoints]
        if states and not self.host_states:
            raise ValueError("states have no slots in host memory")
        if any(not 1 <= n <= below or n * self.block_size % self.every for n in states):
            raise ValueError(f"of {states} some are no checkpoints of {below} blocks")
        if any(a >= b for a, b in pairwise(states)):
            raise ValueError(f"{states} do not ascend")
        most = (len(ids) - 1) // self.block_size
        local = len(self._find(ids, salt, marks, most, host=True))
        limit = min(most, max(below, local))
        path = self._walk(ids, salt, marks, limit)
        room, room_for_states = self._room_for_work()
        held_before = {slot for slot, holds in enumerate(self.holds) if holds}
        last = len(self.groups)

        def ends(length: int) -> bool:
            """Whether a hit of this length has its state in this process."""
            return self._has_state(path[:length], True) and not (self.every and length > len(path))

        def plan(length: int) -> tuple[list[tuple[int, int]], list[int]]:
            """What has to be fetched for a hit of this length, and the slots that have it already."""
            missing, there = [], []
            for i, g in [(i, g) for i in range(length) for g in range(last)]:
                if i < self._first_row(g, length * self.block_size):
                    continue
                slot = path[i].slots[g] if i < len(path) else None
                if slot is not None:
                    there.append(slot)
                elif i >= len(path) or path[i].blocks[g] is None:
                    missing.append((i, g))
            if not ends(length):
                missing.append((length - 1, last))
            state = self._host_state(path[length - 1]) if 0 < length <= len(path) else None
            return missing, there if state is None else [*there, state]

        def fits(length: int) -> bool:
            if not ends(length) and length not in states:
                return False
            missing, there = plan(length)
            new = [slot for slot in there if slot not in held_before]
            for_states = sum(self._is_state(slot) for slot in new) + sum(g == last for _, g in missing)
            for_blocks = len(missing) + len(new) - for_states
            return for_blocks <= room and for_states <= room_for_states and all(i < below for i, _ in missing)

        def suffices(length: int) -> bool:
            """Whether so many slots were taken, of both kinds."""
            kinds = [g == last for _, g in plan(length)[0]]
            return kinds.count(False) <= len(taken) and kinds.count(True) <= len(taken_states)

        self.num_begun += 1
        fetch = ModelFetch(self.num_begun, local * self.block_size, path=list(path))
        self.fetches.append(fetch)
        on_path = [slot for node in path for slot in node.slots if slot is not None]
        for slot in on_path:
            self.holds[slot] += 1
        length = max(n for n in range(limit + 1) if fits(n))
        wanted = [g == last for _, g in plan(length)[0]]
        taken, taken_states = self._take_landed(wanted.count(False)), self._take_landed(wanted.count(True), True)
        length = min(length, len(path) + self.max_nodes - len(self._all_nodes()))
        length = max(n for n in range(length + 1) if fits(n) and suffices(n))
        missing, there = plan(length)
        kinds = [g == last for _, g in missing]
        for slots, count in ((taken, kinds.count(False)), (taken_states, kinds.count(True))):
            while len(slots) > count:
                self._unused_of(slots[-1]).append(slots.pop())
        taken += taken_states
        for slot in taken:
            self.holds[slot] = 1
        for slot in on_path:
            if slot not in there:
                self._let_go_slot(slot)
        for index in range(len(path), length):
            key = self._block_key(ids, marks, index)
            parent = fetch.path[-1] if fetch.path else self._root(salt)
            node = parent.children[key] = self._new_node(parent, key)
            fetch.path.append(node)
        del fetch.path[length:]
        if len(path) > length:
            self._prune(path[-1])
        fetch.blocks = [(i, g, self._number_of(slot)) for (i, g), slot in zip(missing, taken, strict=True)]
        fetch.taken, fetch.held = taken, taken + there
        fetch.num_tokens = max(length, local) * self.block_size
        return fetch

    @public
    def end_fetch(self, fetch: ModelFetch, num_ok: int) -> int:
        self._must_be(fetch, ended=False)
        if not 0 <= _int("num_ok", num_ok) <= len(fetch.blocks):
            raise ValueError(f"num_ok={num_ok} is outside 0..{len(fetch.blocks)}")
        path = fetch.path
        hung = []
        for (index, g, _), slot in zip(fetch.blocks[:num_ok] if path else [], fetch.taken, strict=False):
            if path[index].slots[g] is None:
                self._hang_slot(slot, path[index], g)
                self.passed.append(slot)
                self.known.add(slot)
                hung.append((index, g, slot))
        served = self._served(path, host=True)
        for index, g, slot in hung:
            if index >= len(served):
                del self.home[slot]
                self.passed.remove(slot)
                self.known.remove(slot)
                path[index].slots[g] = None
        for index in reversed(range(len(served))):
            for g in range(len(self.groups)):
                if index >= self._first_row(g, len(served) * self.block_size):
                    self._use_slot(path[index], g)
        if served and self.host_states:
            self._use_slot(served[-1], len(self.groups))
        fetch.ended = True
        fetch.path = []
        for slot in fetch.taken:
            if slot not in self.home:
                self._let_go_slot(slot)
                fetch.held.remove(slot)
        if path:
            self._prune(path[-1])
        return len(served) * self.block_size

    @public
    def release(self, fetch: ModelFetch) -> None:
        self._must_be(fetch, ended=True)
        self._release(fetch)

    def _release(self, fetch: ModelFetch) -> None:
        self.fetches.remove(fetch)
        fetch.released = True
        for slot in fetch.held:
            self._let_go_slot(slot)
        fetch.held = []

    def _must_be(self, fetch: ModelFetch, ended: bool) -> None:
        if not isinstance(fetch, ModelFetch):
            raise TypeError(f"{fetch!r} is no fetch")
        if fetch not in self.fetches or fetch.ended != ended:
            raise ValueError(f"fetch {fetch.number} is another manager's, or in another state")

    @public
    def begin_spill(self, max_blocks: int, *, max_states: int | None = None) -> ModelSpill:
        most, most_states = _optional("max_blocks", max_blocks), _optional("max_states", max_states)
        if most is None:
            raise TypeError("max_blocks is an int")
        if not self.host_blocks:
            raise ValueError("there is no host pool")
        rows: list[tuple[int, int, int]] = []
        slots: list[int] = []
        nodes: list[SpilledNode] = []
        place: dict[int, int] = {}  # of nodes in `nodes`
        tree_nodes: list[Node] = []
        room, room_for_states = self._room_for_work()
        for_states = most if most_states is None else min(most, most_states)
        for queue, most_new, end in ((self.state_spills, room_for_states, for_states), (self.block_spills, room, most)):
            looked = new = 0
            for slot in queue[:SPILL_LOOK]:
                if len(rows) >= end or new >= most_new:
                    break
                if slot in self.home and slot not in self.known:
                    if self.move_of_slot[slot] > self.moves_landed:
                        break
                    node, g = self.home[slot]
                    above = self._unnamed(node, place)
                    if rows and len(nodes) + len(above) > SPILL_NODES:
                        break
                    for each in above:
                        place[id(each)] = len(nodes)
                        tree_nodes.append(each)
                        nodes.append(self._spilled(each, place))
                    rows.append((self._number_of(slot), g, place[id(node)]))
                    slots.append(slot)
                    new += self.holds[slot] == 0
                looked += 1
            del queue[:looked]
        for slot in slots:
            self.holds[slot] += 1
        self.num_begun += 1
        spill = ModelSpill(self.num_begun, rows, slots, nodes, tree_nodes)
        self.spills.append(spill)
        return spill

    def _unnamed(self, node: Node, place: dict[int, int]) -> list[Node]:
        """A node, and those before it of which a spill has to say what they are; parents first."""
        above: list[Node] = []
        while id(node) not in place:
            above.insert(0, node)
            assert node.parent is not None
            node = node.parent
            if node.parent is None or node.digest is not None:
                break
        return above

    def _spilled(self, node: Node, place: dict[int, int]) -> SpilledNode:
        assert node.parent is not None
        parent = place.get(id(node.parent), -1)
        salt = next((salt for salt, root in self.roots.items() if root is node.parent), None)
        digest = node.parent.digest if parent < 0 else None
        tokens = np.array(node.key[0], "<i4").tobytes()
        return SpilledNode(parent, digest, salt, tokens, _extra_bytes(node.key))

    @public
    def end_spill(self, spill: ModelSpill, ok: Sequence[bool], digests: Sequence[bytes] | None = None) -> None:
        if not isinstance(spill, ModelSpill):
            raise TypeError(f"{spill!r} is no spill")
        if spill not in self.spills:
            raise ValueError(f"spill {spill.number} is another manager's, or has ended")
        if len(ok) != len(spill.blocks) or (digests is not None and len(digests) != len(spill.nodes)):
            raise ValueError("there is one answer for each block, and one digest for each node")
        for digest in digests or []:
            if len(digest) != 32:
                raise ValueError("a digest has 32 bytes")
        self.spills.remove(spill)
        for slot, done in zip(spill.slots, ok, strict=True):
            if slot in self.home and done:
                self.known.add(slot)
            elif slot in self.home:
                self._queue(slot)
        for slot in reversed(spill.slots):
            self._let_go_slot(slot)
        for node, digest in zip(spill.tree_nodes, digests or [], strict=False):
            node.digest = digest

    def _queue(self, slot: int) -> None:
        """Let a slot be spilled, after those that are to be."""
        queue = self.state_spills if self._is_state(slot) else self.block_spills
        if slot not in queue:
            queue.append(slot)

    def _room_for_work(self) -> tuple[int, int]:
        """Slots that the background may hold besides those that it does: of blocks, and of states."""
        states = sum(holds > 0 for holds in self.holds[self.host_blocks :])
        return self.host_blocks // 4 - self.num_background_slots + states, self.host_states // 4 - states

    def _take_landed(self, count: int, states: bool = False) -> list[int]:
        """Up to so many slots that no move still names, the free ones first."""
        unused = self.host_states_unused if states else self.host_unused
        taken: list[int] = []
        while len(taken) < count:
            near = [slot for slot in unused[-FREE_LOOK:] if self.move_of_slot[slot] <= self.moves_landed]
            if not near:
                oldest = self._oldest_slot(states)
                if oldest is None or self.move_of_slot[oldest] > self.moves_landed:
                    break
                self._drop_slot(oldest)
                near = [oldest]
            unused.remove(near[-1])
            taken.append(near[-1])
        return taken

    def _let_go_slot(self, slot: int) -> None:
        """A slot that nobody holds any more is free, or may be evicted again."""
        self.holds[slot] -= 1
        if self.holds[slot]:
            return
        if slot not in self.home:
            self._unused_of(slot).append(slot)
            return
        if slot in self.passed:
            self.passed.remove(slot)
            self._list_of(slot).insert(0, slot)
        if self._is_state(slot):
            node, _ = self.home[slot]
            self._check_anchor(node)
            self._prune(node)

    # Blocks

    def _blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _first_row(self, g: int, position: int) -> int:
        """The first row of a table that tokens from `position` on reach in group g."""
        reach = self.groups[g]
        first = 0
        if isinstance(reach, Window):
            first = max(0, position - reach.size + 1)
        elif isinstance(reach, Chunk):
            first = position // reach.size * reach.size
        return first // self.block_size

    def _take(self, sequence: Seq) -> int:
        if self.unused:
            block = self.unused.pop()
        else:
            block = self.idle.pop(0)
            self.examined = max(0, self.examined - 1)
            self._unpublish(block)
            self.counts["evictions"] += 1
        self.refs[block] = 1
        self._cancel_load(block)
        self.slid.discard(block)
        sequence.needs = max(sequence.needs, self.move_of_block[block])
        self.load_of_block[block] = 0
        return block

    def _hold(self, block: int) -> None:
        if self.refs[block] == 0:
            self.examined -= self.idle.index(block) < self.examined
            self.idle.remove(block)
            self.slid.discard(block)
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
            self._drop_row(sequence.table.pop())

    def _drop_row(self, row: list[int]) -> None:
        for block in reversed(row):
            if block != GONE:
                self._drop(block)

    def _let_go(self, sequence: Seq) -> None:
        """Release all blocks, and the node that was published last."""
        self._drop_from_end(sequence, 0)
        self._set_last_node(sequence, None)
        if sequence.checkpoint is not None and self.state_slots[sequence.checkpoint].owner == sequence.handle:
            self._offer(sequence.checkpoint)
        if sequence.state is not None:
            self._drop_state(sequence.state)
            sequence.state = None

    def _slide(self, sequence: Seq) -> None:
        """Give back what no token from `num_computed` on reaches."""
        for g in range(len(self.groups)):
            for row in sequence.table[: self._first_row(g, sequence.num_computed)]:
                if row[g] != GONE:
                    self._drop(row[g])
                    if self.refs[row[g]] == 0:
                        self.slid.add(row[g])
                    row[g] = GONE

    # Prefix tree

    def _block_key(self, tokens: list[int], extra: dict[int, bytes], index: int) -> BlockKey:
        start, end = index * self.block_size, (index + 1) * self.block_size
        inside = [(position - start, extra[position]) for position in sorted(extra) if start <= position < end]
        return tuple(tokens[start:end]), tuple(inside)

    def _root(self, salt: bytes) -> Node:
        return self.roots.setdefault(salt, Node(None, ((), ()), [], []))

    def _find(
        self, tokens: list[int], salt: bytes, extra: dict[int, bytes], max_blocks: int, host: bool = False
    ) -> list[Node]:
        """The longest published prefix that every group can serve, with `host` from slots too.

        No node has an unknown token.
        """
        return self._served(self._walk(tokens, salt, extra, max_blocks), host)

    def _walk(self, tokens: list[int], salt: bytes, extra: dict[int, bytes], max_blocks: int) -> list[Node]:
        """The nodes of a prefix, whatever hangs on them."""
        node = self.roots.get(salt)
        path: list[Node] = []
        while node is not None and len(path) < max_blocks:
            node = node.children.get(self._block_key(tokens, extra, len(path)))
            if node is not None:
                path.append(node)
        return path

    def _served(self, path: list[Node], host: bool) -> list[Node]:
        """The longest part of a path that every group can serve."""
        while not self._serves(path, host):
            path = path[:-1]
        return path

    def _new_node(self, parent: Node, key: BlockKey) -> Node:
        slots = len(self.groups) + bool(self.host_states)
        return Node(parent, key, [None] * len(self.groups), [None] * slots)

    def _host_state(self, node: Node) -> int | None:
        """The host slot of a node's checkpoint."""
        return node.slots[-1] if self.host_states else None

    def _has_state(self, path: list[Node], host: bool) -> bool:
        """Whether a sequence can go on after this path: from zero, or from a checkpoint, with `host` from there too."""
        if not path or not self.every or path[-1].state is not None:
            return True
        return host and self._host_state(path[-1]) is not None

    def _serves(self, path: list[Node], host: bool, loads_state: bool | None = None) -> bool:
        """Whether the blocks that a token after this path reaches are there in every group, and the state before it."""
        if not self._has_state(path, host if loads_state is None else loads_state):
            return False
        return all(
            node.blocks[g] is not None or (host and node.slots[g] is not None)
            for g in range(len(self.groups))
            for node in path[self._first_row(g, len(path) * self.block_size) :]
        )

    def _hit(
        self, tokens: list[int], salt: bytes, extra: dict[int, bytes], max_hit: int | None, host: bool
    ) -> list[Node]:
        """As `_find`, of at most `max_hit` tokens and leaving at least one to compute."""
        longest = max(0, len(tokens) - 1) if max_hit is None else min(max_hit, max(0, len(tokens) - 1))
        return self._find(tokens, salt, extra, longest // self.block_size, host)

    def _needed(self, path: list[Node]) -> list[list[int | None]]:
        """The rows of a table that begins with this hit; None: what has to be loaded."""
        first = [self._first_row(g, len(path) * self.block_size) for g in range(len(self.groups))]
        return [
            [GONE if i < low else block for low, block in zip(first, node.blocks, strict=True)]
            for i, node in enumerate(path)
        ]

    def _hold_path(self, path: list[Node], sequence: Seq) -> list[list[int]]:
        rows = self._needed(path)
        for there in (block for row in rows for block in row if block is not None and block != GONE):
            self._hold(there)
            sequence.needs = max(sequence.needs, self.load_of_block[there])
        table: list[list[int]] = []
        for node, row in reversed(list(zip(path, rows, strict=True))):
            table.insert(0, [self._load(sequence, node, g) if b is None else b for g, b in enumerate(row)])
            for g, block in enumerate(row):
                if block != GONE:
                    self._use_slot(node, g)
        return table

    # Host slots

    def _is_state(self, slot: int) -> bool:
        return slot >= self.host_blocks

    def _number_of(self, slot: int) -> int:
        """The number of a slot among those of blocks, or of states."""
        return slot - self.host_blocks if self._is_state(slot) else slot

    def _unused_of(self, slot: int) -> list[int]:
        return self.host_states_unused if self._is_state(slot) else self.host_unused

    def _list_of(self, slot: int) -> list[int]:
        return self.host_checkpoints if self._is_state(slot) else self.host_slots

    def _use_slot(self, node: Node, g: int) -> None:
        """Make the slot, if there is one, the most recently used."""
        slot = node.slots[g]
        if slot is not None:
            (self.passed if slot in self.passed else self._list_of(slot)).remove(slot)
            self._list_of(slot).append(slot)

    def _oldest_slot(self, states: bool = False) -> int | None:
        """The slot to evict next. Held ones are passed over, once: let go, they are the next."""
        slots = self.host_checkpoints if states else self.host_slots
        while slots and self.holds[slots[0]]:
            self.passed.append(slots.pop(0))
        return slots[0] if slots else None

    def _drop_slot(self, slot: int) -> None:
        """Evict what nobody holds."""
        node, _ = self.home[slot]
        self.counts["host_evictions"] += 1
        self._take_off(slot)
        self._check_anchor(node)
        self._prune(node)

    def _take_off(self, slot: int) -> None:
        """The node of a slot that nobody holds has it no more; it is unused."""
        node, g = self.home.pop(slot)
        node.slots[g] = None
        self._list_of(slot).remove(slot)
        self.known.discard(slot)
        self._unused_of(slot).append(slot)

    def _hang_slot(self, slot: int, node: Node, g: int) -> None:
        node.slots[g] = slot
        self.home[slot] = node, g
        self.group_of_slot[slot] = g

    def _load(self, sequence: Seq, node: Node, g: int) -> int:
        """A block for what lies in a host slot, on its node at once; the load is noted."""
        slot = node.slots[g]
        assert slot is not None
        block = self._take(sequence)
        node.blocks[g] = block
        self.node_of[block] = node
        self._note_load(sequence, block, slot)
        return block

    def _note_load(self, sequence: Seq, block: int, slot: int) -> None:
        self.loading.append((block, slot))
        self.moves_noted += 1
        self.load_of_block[block] = self.move_of_block[block] = self.move_of_slot[slot] = self.moves_noted
        sequence.needs = max(sequence.needs, self.moves_noted)

    def _cancel_load(self, block: int) -> None:
        """The block was evicted, and is another's: what was noted for it is not done. The last one takes its place."""
        for i, (other, _) in enumerate(self.loading):
            if other == block:
                self.loading[i] = self.loading[-1]
                self.loading.pop()
                return

    def _noted_loads(self) -> list[Move]:
        """What is handed out with a step, first of all."""
        moves = []
        for block, slot in self.loading:
            # The node may be gone, after a reset; so the group is the slot's when it was noted.
            if self._is_state(slot):
                moves.append(Move(True, len(self.groups), slot - self.host_blocks, block - self.num_blocks))
            else:
                moves.append(Move(True, self.group_of_slot[slot], slot, block))
        self.loading.clear()
        self.counts["loads"] += len(moves)
        return moves

    def _offload_ahead(self, everything: bool) -> list[Move]:
        """Copies to the host of the blocks that will be evicted next, as far as they have none there."""
        before = self.moves_noted
        moves = self._offload_checkpoints(before)
        horizon = len(self.idle) if everything else max(8192, self.num_blocks // 16)
        while len(moves) < self.write_ahead and self.examined < min(len(self.idle), horizon) and self.host_blocks:
            block = self.idle[self.examined]
            node = self.node_of[block]
            g = node.blocks.index(block)
            if node.slots[g] is None and block not in self.slid:
                if not self._find_slot(before):
                    break  # all of them are held, or were given out by this very call
                slot = self.host_unused.pop()
                self._note_offload(block, slot, node, g)
                self._queue(slot)
                moves.append(Move(False, g, block, slot))
            self.examined += 1
        self.counts["offloads"] += len(moves)
        return moves

    def _offload_checkpoints(self, before: int) -> list[Move]:
        """Those that are to stay, with what else a hit at them needs and nobody would copy: blocks that have slid out.

        As far as the host has no copy of them. The last one may go past what a step notes.
        """
        moves: list[Move] = []
        while self.offered and len(moves) < self.write_ahead:
            if not self._offload_checkpoint(self.offered[0], before, moves):
                break
            self.offered.pop(0)
        return moves

    def _offload_checkpoint(self, state: int, before: int, moves: list[Move]) -> bool:
        """Whether the state is there, or on its way; it takes along as many blocks as there are slots for."""
        node = self.state_slots[state].node
        if node is None:
            return True
        if self._host_state(node) is None:
            if not self._find_slot(before, states=True):
                return False
            slot = self.host_states_unused.pop()
            self._note_offload(self.num_blocks + state, slot, node, len(self.groups))
            self._queue(slot)
            moves.append(Move(False, len(self.groups), state, self._number_of(slot)))
        for g, each, block in self._slid_before(node):
            if each.slots[g] is not None:
                continue
            if not self._find_slot(before) or self.state_slots[state].node is not node:
                break  # nothing is left for it, or it has lost the block with which it goes
            slot = self.host_unused.pop()
            self._note_offload(block, slot, each, g)
            self._queue(slot)
            moves.append(Move(False, g, block, slot))
        return True

    def _find_slot(self, before: int, states: bool = False) -> bool:
        """Whether a slot is free, now that the oldest has gone, unless a move newer than `before` names it.

        A checkpoint that the device has too, and that nobody holds there, does not go for another one before it is
        known outside.
        """
        if not (self.host_states_unused if states else self.host_unused):
            oldest = self._oldest_slot(states)
            if oldest is None or self.move_of_slot[oldest] > before:
                return False
            if states and self.home[oldest][0].state in self.state_idle and oldest not in self.known:
                return False
            self._drop_slot(oldest)
        return True

    def _slid_before(self, node: Node) -> list[tuple[int, Node, int]]:
        """Blocks out of reach of whoever computed them that a hit at a node needs: group by group, children first."""
        path = self._path_of(node)
        found = []
        for g in range(len(self.groups)):
            for each in reversed(path[self._first_row(g, len(path) * self.block_size) :]):
                block = each.blocks[g]
                if block is not None and block in self.slid:
                    found.append((g, each, block))
        return found

    def _path_of(self, node: Node) -> list[Node]:
        """The nodes from the root's child down to this one."""
        path: list[Node] = []
        while node.parent is not None:
            path.insert(0, node)
            node = node.parent
        return path

    def _note_offload(self, block: int, slot: int, node: Node, g: int) -> None:
        self._hang_slot(slot, node, g)
        self._list_of(slot).append(slot)
        self.moves_noted += 1
        self.move_of_block[block] = self.move_of_slot[slot] = self.moves_noted

    def _publish(self, sequence: Seq) -> None:
        """Hang every full computed block of known tokens in the tree, or take the equal one that hangs there."""
        while sequence.may_publish and (sequence.num_published + 1) * self.block_size <= sequence.num_computed:
            index = sequence.num_published
            key = self._block_key(sequence.tokens, sequence.extra, index)
            if UNKNOWN in key[0] or not self.prefix_caching:
                return
            row = sequence.table[index]
            if not all(self._is_alone(own) for own in row if own != GONE):
                return
            parent = self._parent_node(sequence, index)
            node = parent.children.get(key)
            if node is None:
                while len(self._all_nodes()) >= self.max_nodes:
                    oldest = self._oldest_slot()
                    if oldest is None:
                        break
                    self._drop_slot(oldest)
                if len(self._all_nodes()) >= self.max_nodes:
                    sequence.may_publish = False
                    return
                node = parent.children[key] = self._new_node(parent, key)
            for g, own in enumerate(row):
                if own != GONE:
                    self._hang(sequence, node, g, own)
            self._set_last_node(sequence, node)
            sequence.num_published += 1

    def _hang(self, sequence: Seq, node: Node, g: int, own: int) -> None:
        there = node.blocks[g]
        if there is None:
            node.blocks[g] = own
            self.node_of[own] = node
            self.counts["published"] += 1
            return
        self._hold(there)
        sequence.needs = max(sequence.needs, self.load_of_block[there])
        sequence.table[sequence.num_published][g] = there
        steps = self._steps_of(sequence)
        self._drop(own, steps[-1] if steps else None)
        self.counts["merged"] += 1

    def _is_alone(self, block: int) -> bool:
        """Whether one sequence holds a block that is to be examined; a fork may have shared it before.

        If it were published then, or given up for an equal one, the other holder would have a published block without
        that block's parent, which could be evicted first.
        """
        return self.refs[block] == 1

    def _parent_node(self, sequence: Seq, index: int) -> Node:
        return self._root(sequence.salt) if sequence.last_node is None else sequence.last_node

    def _unpublish(self, block: int) -> None:
        node = self.node_of.pop(block)
        g = node.blocks.index(block)
        node.blocks[g] = None
        self._check_anchor(node)
        self._use_slot(node, g)
        self._prune(node)

    def _set_last_node(self, sequence: Seq, node: Node | None) -> None:
        """Make `node` the one that the sequence published last."""
        before, sequence.last_node = sequence.last_node, node
        if before is not None:
            self._prune(before)

    def _prune(self, node: Node) -> None:
        """Nodes without a block, a slot, a child or a holder go, from this one up."""
        while (
            node.parent is not None
            and not node.children
            and not any(place is not None for place in node.blocks + node.slots)
        ):
            if node in self._holders():
                return
            del node.parent.children[node.key]
            node = node.parent

    def _holders(self) -> list[Node]:
        last_nodes = [sequence.last_node for sequence in self._all_sequences() if sequence.last_node is not None]
        last_nodes += [fetch.path[-1] for fetch in self.fetches if fetch.path]
        return last_nodes + [node for _, node, _ in self.pins.values()]

    def _all_nodes(self) -> list[Node]:
        return [node for root in self.roots.values() for node in _descendants(root)]

    # Sequences

    def _find_room(
        self, sequence: Seq, reserve: int | None, max_hit: int | None, watermark: int, host: bool
    ) -> tuple[list[Node], int]:
        """The hit of an admission and how many tokens get slots; NoFreeBlocks if fewer than `watermark` stay free.

        Where what is to be loaded does not fit, the hit is cut until the rest does.
        """
        hit = self._hit(sequence.tokens, sequence.salt, sequence.extra, max_hit, host)
        loads_state = host and self.num_free_states > 0
        while not self._serves(hit, host, loads_state):
            hit.pop()
        if reserve is not None and self.blocks_needed(len(sequence.tokens) or 1, reserve=reserve) <= self.num_blocks:
            while hit and self._most_held(len(hit) * self.block_size, len(sequence.tokens), reserve) > self.num_blocks:
                hit.pop()
                while not self._serves(hit, host, loads_state):
                    hit.pop()
        refusal: NoFreeBlocks | None = None
        while True:
            target = len(sequence.tokens)
            if reserve is not None:
                target = min(target, len(hit) * self.block_size + reserve)
            blocks = [block for row in self._needed(hit) for block in row if block != GONE]
            loads = blocks.count(None)
            new = max(0, self._blocks_for(target) - len(hit)) * len(self.groups) + loads
            available = self.num_free_blocks - sum(block is not None and self.refs[block] == 0 for block in blocks)
            if new <= available and any(not other.preempted for other in self._all_sequences()):
                available = max(0, available - watermark)
            if new <= available:
                return hit, target
            if refusal is None:
                refusal = NoFreeBlocks("not enough free blocks for the sequence", new, available)
            if not loads:
                raise refusal
            hit.pop()
            while not self._serves(hit, host, loads_state):
                hit.pop()

    def _occupy(self, sequence: Seq, hit: list[Node], target: int) -> None:
        sequence.needs = 0
        self.counts["host_hit_tokens"] += self.block_size * sum(None in row for row in self._needed(hit))
        sequence.table = self._hold_path(hit, sequence)
        sequence.last_node = hit[-1] if hit else None
        sequence.state = self._hold_checkpoint(hit[-1], sequence) if hit and self.every else None
        cached = len(hit) * self.block_size
        sequence.num_cached = sequence.num_computed = sequence.num_prepared = cached
        sequence.num_published = len(hit)
        sequence.reserved = max(target, cached)
        self._grow(sequence)
        self.counts["prompt_tokens"] += len(sequence.tokens)
        self.counts["hit_tokens"] += cached

    def _grow(self, sequence: Seq) -> None:
        """Blocks of every group for the reserved tokens."""
        while len(sequence.table) < self._blocks_for(sequence.reserved):
            sequence.table.append([self._take(sequence) for _ in self.groups])

    def _child(self, parent: Seq, handle: int) -> Seq:
        """A sequence that shares the blocks with computed tokens, and knows all that the parent knows."""
        computed = parent.num_computed
        table = [list(row) for row in parent.table[: self._blocks_for(computed)]]
        for block in (block for row in table for block in row if block != GONE):
            self._hold(block)
        if parent.state is not None:
            self.state_slots[parent.state].refs += 1
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
            last_node=parent.last_node,
            may_publish=parent.may_publish,
            needs=parent.needs,
            state=parent.state,
        )

    def _extend(self, batch: list[Seq], tokens: Any, counts: list[int], extra: Sequence[Extra] | None) -> None:
        ids = [UNKNOWN] * sum(counts) if tokens is None else _token_ids(tokens)
        _check_ragged(len(batch), counts, len(ids))
        marks = [()] * len(batch) if extra is None else list(extra)
        if len(marks) != len(batch):
            raise ValueError(f"{len(batch)} sequences but extras for {len(marks)}")
        checked = [_checked_extra(pairs, count) for pairs, count in zip(marks, counts, strict=True)]
        for sequence, count, pairs in zip(batch, counts, checked, strict=True):
            sequence.extra |= {len(sequence.tokens) + position: data for position, data in pairs.items()}
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
        while sequence.num_published > num_tokens // self.block_size:
            assert sequence.last_node is not None
            sequence.num_published -= 1
            self._set_last_node(sequence, sequence.last_node.parent if sequence.num_published else None)
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

    def _close(self, closed: OpenStep) -> list[int]:
        """What waited for the step to close: sequences leave, or are preempted; the handles of the latter."""
        resting = [row.sequence for row in closed.rows if not self._steps_of(row.sequence)]
        for sequence in resting:
            if sequence.freed:
                self._leave(sequence)
        preempted = [sequence for sequence in resting if sequence.lost and not sequence.freed]
        for sequence in preempted:
            self._preempt(sequence)
        return [sequence.handle for sequence in preempted]

    def _leave(self, sequence: Seq) -> None:
        self._let_go(sequence)
        self._give_slot_back(sequence.handle)

    def _all_sequences(self) -> list[Seq]:
        """Those with a handle, then those that leave once their steps close."""
        found = list(self.sequences.values())
        for step in self.steps:
            found += [row.sequence for row in step.rows if row.sequence not in found]
        return found

    # States

    def _wants_checkpoint(self, sequence: Seq) -> bool:
        """Whether the slot that a sequence stands on is one to be found again, or will be once it is published."""
        assert sequence.state is not None
        on_grid = sequence.num_prepared % self.every == 0 and self.prefix_caching and sequence.may_publish
        return on_grid or self.state_slots[sequence.state].node is not None

    def _plan_states(self, batch: list[Seq], lens: list[int], keep: bool) -> list[int]:
        """How many slots each row takes; NoFreeStates if they are not there.

        A row that goes on where it stands needs none. Of those that stand on one slot, which nobody else holds, the
        last one can. As far as slots are left, rows take one all the same where what they leave behind is a checkpoint.
        """
        if any(sequence.lost for sequence in batch):
            raise ValueError("the state of a sequence is lost")
        if any(sequence.state is None and sequence.num_prepared for sequence in batch):
            raise ValueError("the caller keeps the state of a sequence")
        standing = [sequence.state for sequence in batch]
        last = {sequence.state: sequence for sequence in batch}
        taken = list(lens)
        if not keep:
            for i, sequence in enumerate(batch):
                alone = sequence.state is not None and self.state_slots[sequence.state].refs == standing.count(
                    sequence.state
                )
                taken[i] = int(not alone or last[sequence.state] is not sequence)
        if sum(taken) > self.num_free_states:
            raise NoFreeStates("not enough free states for the step", sum(taken), self.num_free_states)
        spare = self.num_free_states - sum(taken)
        for i, sequence in enumerate(batch):
            if taken[i] == 0 and spare and self._wants_checkpoint(sequence):
                taken[i] = 1
                spare -= 1
        return taken

    def _prepare_states(self, rows: list[Row], taken: list[int], keep: bool, step: ModelStep) -> None:
        in_place = {row.sequence.state for row, count in zip(rows, taken, strict=True) if count == 0}
        for row, count in zip(rows, taken, strict=True):
            self._prepare_state(row, count, in_place, keep, step)
        step.state_drafts = [slot for row in rows for slot in row.states] if keep else []

    def _prepare_state(self, row: Row, count: int, in_place: set[int | None], keep: bool, step: ModelStep) -> None:
        sequence = row.sequence
        old = sequence.state
        row.keeps = keep
        if count == 0:  # nobody goes back to what it stands on
            assert old is not None
            self._forget_checkpoint(old)
            row.states, row.returns = [old], False
        else:
            row.states = [self._take_state() for _ in range(count)]
            sequence.state = row.states[-1]
            if old is None:
                step.state_zero.append(row.states[0])
            elif not keep:
                step.state_copies.append((old, row.states[0]))
                self.counts["state_copies"] += 1
            if old is not None and old in in_place:  # another row of this step writes it
                self.state_slots[old].refs -= 1
                row.returns = False
            else:
                row.before = old
        for i, slot in enumerate(row.states):
            self.state_slots[slot].at = row.start + i + 1 if keep else row.end
        step.state_slots.append(row.before if keep and row.before is not None else row.states[0])

    def _plan_own(self, batch: list[Seq], lens: list[int]) -> list[int]:
        """A slot for each row that ends on the grid and will be published, as far as there are any."""
        if any(sequence.lost for sequence in batch):
            raise ValueError("the state of a sequence is lost")
        spare = self.num_free_states
        taken = []
        for sequence, query_len in zip(batch, lens, strict=True):
            on_grid = (sequence.num_prepared + query_len) % self.every == 0
            taken.append(int(on_grid and self.prefix_caching and sequence.may_publish and spare > 0))
            spare -= taken[-1]
        return taken

    def _prepare_own(self, rows: list[Row], taken: list[int], step: ModelStep) -> None:
        for row, count in zip(rows, taken, strict=True):
            row.own, row.before = True, row.sequence.state
            row.states = [self._take_state() for _ in range(count)]
            for slot in row.states:
                self.state_slots[slot].at = row.end
            row.sequence.state = None
            step.state_slots.append(-1 if row.before is None else row.before)
            step.state_drafts += [-1] * (row.query_len - 1) + (row.states or [-1])

    def _take_state(self) -> int:
        if self.state_unused:
            slot = self.state_unused.pop()
        else:
            slot = self.state_idle[0]
            node = self.state_slots[slot].node
            self._drop_checkpoint(slot)
            self.state_unused.remove(slot)
            if node is not None and self.host_states:
                self._use_slot(node, len(self.groups))
            self.counts["checkpoint_evictions"] += 1
        self.state_slots[slot].refs = 1
        self._cancel_load(self.num_blocks + slot)
        self.load_of_block[self.num_blocks + slot] = 0
        return slot

    def _offer(self, slot: int) -> None:
        """Let a checkpoint be offloaded: its sequence has left, or it was hit."""
        if self.host_states and slot not in self.offered:
            self.offered.append(slot)

    def _drop_state(self, slot: int) -> None:
        """Give up a reference."""
        state = self.state_slots[slot]
        state.refs -= 1
        if state.refs == 0:
            (self.state_idle if state.node else self.state_unused).append(slot)
            if state.node and not state.owner:
                self._offer(slot)

    def _hold_checkpoint(self, node: Node, sequence: Seq) -> int | None:
        """A hit: it stays when its sequence leaves a newer one. What lies in host memory alone is loaded."""
        source = self._host_state(node)
        if source is not None:
            self._use_slot(node, len(self.groups))
        if node.state is None:
            assert source is not None
            node.state = self._take_state()
            state = self.state_slots[node.state]
            state.node, state.at = node, _depth(node) * self.block_size
            self._note_load(sequence, self.num_blocks + node.state, source)
            return node.state
        state = self.state_slots[node.state]
        if state.refs == 0:
            self.state_idle.remove(node.state)
        state.refs += 1
        state.owner = 0
        sequence.needs = max(sequence.needs, self.load_of_block[self.num_blocks + node.state])
        return node.state

    def _forget_checkpoint(self, slot: int) -> None:
        """Nobody finds it any more."""
        node = self.state_slots[slot].node
        if node is not None:
            node.state = None
        self.state_slots[slot].node = None
        self.state_slots[slot].owner = 0

    def _drop_checkpoint(self, slot: int) -> None:
        """The same, and unused if nobody holds it."""
        self._forget_checkpoint(slot)
        if self.state_slots[slot].refs == 0:
            self.state_idle.remove(slot)
            self.state_unused.append(slot)

    def _check_anchor(self, node: Node) -> None:
        """A checkpoint goes with its block, once that is neither on the device nor on the host."""
        if not self.every or node.blocks[self.anchor] is not None or node.slots[self.anchor] is not None:
            return
        if node.state is not None:
            self._drop_checkpoint(node.state)
        slot = self._host_state(node)
        if slot is not None and not self.holds[slot]:  # else once it is let go
            self._take_off(slot)

    def _return_state(self, row: Row) -> None:
        """The pass of a row did not happen, or nothing of it counts."""
        row.sequence.lost = not row.returns
        if row.returns:
            for slot in reversed(row.states):
                self._drop_state(slot)
            row.sequence.state = row.before
            row.states = []

    def _settle_state(self, row: Row, count: int) -> None:
        """So many tokens of a row's pass count: let go of the slots that are not needed any more."""
        if count == 0 and row.returns:
            self._return_state(row)
            return
        if row.before is not None:
            self._drop_state(row.before)
        if row.own:
            for slot in row.states if count < row.query_len else []:
                self._drop_state(slot)
            row.states = [] if count < row.query_len else row.states
            return
        kept = row.states[count - 1] if row.keeps else row.states[0]
        if count < row.query_len:
            row.sequence.state = kept
            row.sequence.lost = not row.keeps
        for slot in reversed(row.states):
            if slot != kept:
                self._drop_state(slot)

    def _leave_checkpoint(self, row: Row) -> None:
        """Hang the slot that a committed row left behind on its node, if that is a grid point and published."""
        sequence, end = row.sequence, row.sequence.num_computed
        if not self.every or end % self.every or sequence.num_published * self.block_size != end:
            return
        slot = next((slot for slot in row.states if self.state_slots[slot].at == end), None)
        node = sequence.last_node
        if slot is None or sequence.lost or node is None or node.state is not None or end <= row.start:
            return
        if node.blocks[self.anchor] is None and node.slots[self.anchor] is None:
            return
        node.state = slot
        self.state_slots[slot].node = node
        self.state_slots[slot].owner = sequence.handle
        self.counts["checkpoints"] += 1
        older = sequence.checkpoint
        if older is not None and self.state_slots[older].owner == sequence.handle and older in self.state_idle:
            self._drop_checkpoint(older)
        sequence.checkpoint = slot

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
        return ids, _checked_extra(extra, len(ids))

    # Rows of a step

    def _must_copy(self, sequence: Seq, g: int) -> bool:
        """Whether the block that the next token is written to in group g is another's too, or published."""
        index = sequence.num_prepared // self.block_size
        if index >= len(sequence.table):
            return False
        block = sequence.table[index][g]
        return self.refs[block] > 1 or block in self.node_of

    def _in_place(self, batch: list[Seq]) -> dict[int, Seq]:
        """Blocks that only sequences of this batch hold, and the one of these that writes it: the others get copies.

        It is one with the most tokens there. After an abort the others still have what they had.
        """
        found: dict[int, Seq] = {}
        for g in range(len(self.groups)):
            writers: dict[int, list[Seq]] = {}
            for sequence in batch:
                if self._must_copy(sequence, g):
                    block = sequence.table[sequence.num_prepared // self.block_size][g]
                    writers.setdefault(block, []).append(sequence)
            for block, sequences in writers.items():
                if len(sequences) == self.refs[block] and block not in self.node_of:
                    longest = max(sequence.num_prepared for sequence in sequences)
                    found[block] = [s for s in sequences if s.num_prepared == longest][-1]
        return found

    def _prepare_row(self, sequence: Seq, query_len: int, in_place: dict[int, Seq]) -> Row:
        start, end = sequence.num_prepared, sequence.num_prepared + query_len
        reserved_before, rows_before = sequence.reserved, len(sequence.table)
        copies: list[tuple[int, int] | None] = [None] * len(self.groups)
        lent = [False] * len(self.groups)
        for g, must in enumerate([self._must_copy(sequence, g) for g in range(len(self.groups))]):
            row = sequence.table[start // self.block_size] if must else []
            if must and in_place.get(row[g]) is not sequence:
                # The source keeps this sequence's reference until commit, unless another row writes it in place.
                lent[g] = row[g] in in_place
                source, row[g] = row[g], self._take(sequence)
                copies[g] = source, row[g]
                self.refs[source] -= lent[g]
                self.counts["copies"] += 1
        sequence.reserved = max(sequence.reserved, end)
        self._grow(sequence)
        sequence.num_prepared = end
        slots = [[self._slot(sequence, g, position) for position in range(start, end)] for g in range(len(self.groups))]
        return Row(sequence, start, query_len, reserved_before, rows_before, copies, lent, slots)

    def _slot(self, sequence: Seq, g: int, position: int) -> int:
        return sequence.table[position // self.block_size][g] * self.block_size + position % self.block_size

    def _fill(self, step: ModelStep, rows: list[Row]) -> None:
        step.num_seqs = len(rows)
        step.num_tokens = sum(row.query_len for row in rows)
        step.max_query_len = max([row.query_len for row in rows], default=0)
        step.max_seq_len = max([row.end for row in rows], default=0)
        step.input_ids = [token for row in rows for token in row.sequence.tokens[row.start : row.end]]
        step.positions = [position for row in rows for position in range(row.start, row.end)]
        each = range(len(self.groups))
        step.slot_mapping = [[slot for row in rows for slot in row.slots[g]] for g in each]
        step.block_table = [[[r[g] for r in row.sequence.table] for row in rows] for g in each]
        step.seq_lens = [row.end for row in rows]
        step.query_start_loc = [0]
        for row in rows:
            step.query_start_loc.append(step.query_start_loc[-1] + row.query_len)
        step.pages = [
            [
                r[self._first_row(g, row.start) : self._blocks_for(row.end)]
                for r, row in zip(step.block_table[g], rows, strict=True)
            ]
            for g in each
        ]
        step.last_page_len = [row.end - (self._blocks_for(row.end) - 1) * self.block_size for row in rows]
        step.copies = [copy for row in rows for copy in row.copies if copy is not None]

    # Judging oneself

    def check(self) -> None:
        """Raise InvariantViolation for the first of the invariants 1 to 7 that does not hold."""
        rows = [row for step in self.steps for row in step.rows]
        waiting = [block for step in self.steps for block in step.waiting]

        named = [b for sequence in self._all_sequences() for row in sequence.table for b in row if b != GONE]
        named += [
            block for held_rows, _, _ in self.pins.values() for row in held_rows for block in row if block != GONE
        ]
        copied = [pair for step_row in rows for pair in zip(step_row.copies, step_row.lent, strict=True)]
        named += [copy[0] for copy, lent in copied if copy is not None and not lent]
        held = [block for block in range(self.num_blocks) if self.refs[block] > 0]
        for block in range(self.num_blocks):
            _require(1, self.refs[block] == named.count(block), f"the count of block {block} is wrong")
        _require(1, all(self.refs[b] == 0 for b in self.unused + self.idle + waiting), "a free block is held")
        _require(1, all(b in self.node_of for b in self.idle), "a cached block is not published")
        _require(1, not any(b in self.node_of for b in self.unused + waiting), "a free block is still published")

        everywhere = sorted(self.unused + self.idle + waiting + held)
        _require(2, everywhere == list(range(self.num_blocks)), "a block is lost or in two places")

        reachable = self._all_nodes()
        hanging = {block: node for node in reachable for block in node.blocks if block is not None}
        homes = {slot: (node, g) for node in reachable for g, slot in enumerate(node.slots) if slot is not None}
        _require(10, homes == self.home, "the tree and the host slots disagree")
        listed = self.host_slots + self.host_checkpoints + self.passed
        _require(10, sorted(self.home) == sorted(listed), "a slot hangs and is in no list")
        held_slots = [slot for fetch in self.fetches for slot in fetch.held]
        held_slots += [slot for spill in self.spills for slot in spill.slots]
        for slot in range(self.host_blocks + self.host_states):
            _require(12, self.holds[slot] == held_slots.count(slot), f"the holds of host slot {slot} are wrong")
        _require(12, all(self.holds[slot] for slot in self.passed), "an eviction passed over what nobody holds")
        _require(12, min(self._room_for_work()) >= 0, "background work holds too much")
        _require(12, self.known <= set(self.home), "a slot without a node is known outside")
        for queue in (self.block_spills, self.state_spills):
            _require(12, len(set(queue)) == len(queue), "a slot waits for two spills")
        everywhere = sorted(
            [*self.host_unused, *self.host_states_unused, *self.home, *(set(held_slots) - set(self.home))]
        )
        all_slots = list(range(self.host_blocks + self.host_states))
        _require(10, everywhere == all_slots, "a host slot is lost or in two places")
        for slot, (node, g) in self.home.items():
            _require(10, self._is_state(slot) == (g == len(self.groups)), f"host slot {slot} is of another size")
            if self._is_state(slot) and not self.holds[slot]:
                place = node.blocks[self.anchor], node.slots[self.anchor]
                _require(11, place != (None, None), f"the checkpoint in host slot {slot} has no block")
        moves = [self.moves_landed, self.moves_marked, self.moves_handed, self.moves_noted]
        _require(10, moves == sorted(moves), f"moves are done before they are handed out: {moves}")
        loading = [block for block, _ in self.loading]
        _require(10, len(set(loading)) == len(loading), "a block waits for two loads")
        _require(3, hanging == self.node_of and len(reachable) <= self.max_nodes, "the tree and the blocks disagree")
        holders = self._holders()
        for node in reachable:
            alive = node.children or node in holders or any(place is not None for place in node.blocks + node.slots)
            _require(3, bool(alive), "a node has neither block, slot, child nor holder")
            has_name = node.digest is None or node.parent is None or not node.parent.key[0] or node.parent.digest
            _require(12, bool(has_name), "a node has a digest and the one before it has none")
            _require(3, len(node.key[0]) == self.block_size and UNKNOWN not in node.key[0], "a node's tokens are wrong")
        for sequence in self._all_sequences():
            last = sequence.last_node
            for index in reversed(range(sequence.num_published)):
                assert last is not None
                key = self._block_key(sequence.tokens, sequence.extra, index)
                _require(3, last.key == key, f"the tokens of block {index} of {sequence.handle} are not its node's")
                found = [self.node_of.get(block) for block in sequence.table[index] if block != GONE]
                _require(3, all(node is last for node in found), f"block {index} of {sequence.handle} is not published")
                last = last.parent
            at_root = last is None or last.parent is None
            _require(3, at_root, f"{sequence.handle} stands deeper in the tree than it published")

        for node in reachable:
            for g, reach in enumerate(self.groups):
                child = node.blocks[g]
                if child is None or reach is not None or node.parent is None or node.parent.parent is None:
                    continue
                parent = node.parent.blocks[g]
                _require(4, parent is not None, f"the parent of block {child} is not published")
                if parent in self.idle:
                    ahead = self.idle[: self.idle.index(parent)]
                    _require(4, child in ahead, f"block {parent} would be evicted before its child {child}")

        for sequence in self._all_sequences():
            s = sequence
            ordered = 0 <= s.num_cached <= s.num_computed <= s.num_prepared <= s.reserved <= len(s.tokens)
            _require(5, ordered, f"the lengths of {s.handle} are out of order")
            enough = len(s.table) == self._blocks_for(s.reserved)
            _require(5, enough, f"{s.handle} has {len(s.table)} rows of blocks for {s.reserved} reserved tokens")
            for g in range(len(self.groups)):
                held = [index for index, blocks in enumerate(s.table) if blocks[g] != GONE]
                within = list(range(self._first_row(g, s.num_computed), len(s.table)))
                _require(5, held == within, f"{s.handle} holds {held} of group {g}, within reach are {within}")

        for row in rows:
            mine = [block for blocks in row.sequence.table for block in blocks]
            for slot in (slot for slots in row.slots for slot in slots):
                block = slot // self.block_size
                own = self.refs[block] == 1 and block in mine and block not in self.node_of
                _require(6, own, f"a step of {row.sequence.handle} writes block {block}, which is not its own")

        for step in self.steps:
            slots = [slot for row in step.rows for group in row.slots for slot in group]
            _require(7, len(set(slots)) == len(slots), f"step {step.step_id} writes a slot twice")
        if self.every:
            self._check_states(rows, reachable)

    def _check_states(self, rows: list[Row], nodes: list[Node]) -> None:
        sequences = self._all_sequences()
        named = [sequence.state for sequence in sequences] + [state for _, _, state in self.pins.values()]
        named += [row.before for row in rows]
        # Of a row that keeps drafts the sequence, or the row that came after, stands on the last slot.
        named += [slot for row in rows if row.keeps for slot in row.states[:-1]]
        named += [slot for row in rows if row.own for slot in row.states]
        hung = {node.state: node for node in nodes if node.state is not None}
        idle = [slot for slot in hung if self.state_slots[slot].refs == 0]
        _require(11, sorted(idle) == sorted(self.state_idle), "the queue of checkpoints is wrong")
        held = [slot for slot in range(self.num_states) if self.state_slots[slot].refs]
        everywhere = sorted(self.state_unused + self.state_idle + held)
        _require(11, everywhere == list(range(self.num_states)), "a slot of states is lost or in two places")
        for number, slot in enumerate(self.state_slots):
            _require(11, slot.refs == named.count(number), f"the count of state {number} is wrong")
            _require(11, slot.node is hung.get(number), f"state {number} and its node disagree")
            if slot.node is not None:
                place = slot.node.blocks[self.anchor], slot.node.slots[self.anchor]
                _require(11, place != (None, None), f"checkpoint {number} has no block")
                _require(11, slot.at == _depth(slot.node) * self.block_size, f"checkpoint {number} is not its node's")
                _require(11, slot.at % self.every == 0, f"checkpoint {number} is off the grid")
        for s in sequences:
            _require(11, s.state is None or s.num_prepared > 0, f"{s.handle} has a state too early")
            if s.state is not None and not s.lost:
                _require(11, self.state_slots[s.state].at == s.num_prepared, f"{s.handle} has another state")
        for row in rows:
            for number in row.states:
                alone = self.state_slots[number].refs == 1 and self.state_slots[number].node is None
                _require(11, alone, f"a step of {row.sequence.handle} writes state {number}, which others find")

    def observe(self) -> Any:
        """All of the state as values that can be compared: what a failed call must leave as it was."""
        return (
            list(self.unused),
            list(self.idle),
            list(self.refs),
            [(n.key, list(n.blocks), list(n.slots), n.digest, id(n.parent)) for n in self._all_nodes()],
            {handle: _fields(sequence) for handle, sequence in self.sequences.items()},
            {handle: [list(row) for row in rows] for handle, (rows, _, _) in self.pins.items()},
            list(self.free_slots),
            dict(self.generations),
            [(s.step_id, [(_fields(r.sequence), r.start, r.end) for r in s.rows], list(s.waiting)) for s in self.steps],
            self.last_step_id,
            (self.moves_noted, self.moves_handed, self.moves_marked, self.moves_landed),
            (list(self.host_unused), list(self.host_slots), list(self.loading), self.examined, set(self.slid)),
            (list(self.host_states_unused), list(self.host_checkpoints), list(self.offered)),
            (list(self.passed), list(self.holds), set(self.known), list(self.block_spills), list(self.state_spills)),
            self.num_begun,
            [(fetch.number, fetch.ended, len(fetch.path), list(fetch.held)) for fetch in self.fetches],
            [(spill.number, len(spill.tree_nodes)) for spill in self.spills],
            dict(self.counts),
            ([vars(slot).copy() for slot in self.state_slots], list(self.state_unused), list(self.state_idle)),
        )


def _fields(sequence: Seq) -> dict[str, Any]:
    return {**vars(sequence), "tokens": list(sequence.tokens), "table": [list(row) for row in sequence.table]}


def _depth(node: Node) -> int:
    return 0 if node.parent is None else 1 + _depth(node.parent)


def _extra_bytes(key: BlockKey) -> bytes:
    """The extra bytes of a block as they are compared: for each token its offset and length, the bytes, the length."""
    return b"".join(struct.pack(f"<qq{len(data)}sq", offset, len(data), data, len(data)) for offset, data in key[1])


def _descendants(node: Node) -> list[Node]:
    return [found for child in node.children.values() for found in [child, *_descendants(child)]]


def _require(invariant: int, holds: bool, message: str) -> None:
    if not holds:
        raise InvariantViolation(message, invariant)


def _int(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} is an int, not {value!r}")
    return int(value)


def _optional(name: str, value: Any) -> int | None:
    if value is not None and _int(name, value) < 0:
        raise ValueError(f"{name}={value}; it is 0 or more")
    return None if value is None else int(value)


def _checked_extra(extra: Extra, num_tokens: int) -> dict[int, bytes]:
    marks: dict[int, bytes] = {}
    last = -1
    for position, data in extra:
        if not isinstance(data, bytes):
            raise TypeError("extra is made of (position, bytes)")
        if not last < _int("position", position) < num_tokens:
            raise ValueError(f"extra position {position} is outside {last + 1}..{num_tokens - 1}")
        marks[position] = data
        last = position
    return marks


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
