"""A hypothesis state machine that drives a block manager and its plain-Python model side by side.

Every call in random order, wrong ones too; after each, all that can be seen is compared. It also plays the device, so
that a sequence which would read another one's cache is seen to do so. Knows a manager only by its public calls, through
`Driver`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from random import Random
from typing import Any

import numpy as np
from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from manager_background import JUNK, Background, Content, Operation, digests
from manager_device import Device, RunRow, Truth
from manager_model import UNKNOWN, Admission, ModelManager, ModelStep, Move, Node
from manager_streams import Streams, Work

from kvblocks.config import Chunk, State, Window
from kvblocks.errors import MovesPending, NoFreeBlocks, NoFreeStates, StaleSequence, TooManySequences

EXPECTED_ERRORS = (MovesPending, ValueError, TypeError, StaleSequence, NoFreeBlocks, NoFreeStates, TooManySequences)
SALTS = (b"", b"a")
GROUPS: list[tuple[Any, ...]] = [
    *[(None,)] * 4,
    (None, Window(2)),
    (None, Window(5)),
    (Window(3), None, Window(3)),
    (None, Chunk(4)),
    (Window(1), None),
    (Window(4),),
    (Chunk(3), Window(6)),
    (None, *[Window(9)] * 6),
]
MARKS = (b"x", b"y", b"")


@dataclass(frozen=True)
class StepView:
    """The arrays of a step with their padding, as lists, and its host ints."""

    input_ids: list[int]
    positions: list[int]
    slot_mapping: list[list[int]]  # of each group, as the block tables
    block_table: list[list[list[int]]]
    kv_indptr: list[list[int]]
    kv_indices: list[list[int]]  # as far as kv_indptr names them
    kv_last_page_len: list[int]
    seq_lens: list[int]
    query_start_loc: list[int]
    copies: list[tuple[int, int]]
    moves: list[Move]
    state_slots: list[int]
    state_zero: list[int]
    state_copies: list[tuple[int, int]]
    state_drafts: list[int]
    num_seqs: int
    num_tokens: int
    max_query_len: int
    max_seq_len: int


def padded(values: list[int], size: int, pad: int) -> list[int]:
    return values + [pad] * (size - len(values))


def read_model_step(step: ModelStep) -> StepView:
    """What a StepBuffers of this size holds once the model's step is written to it."""
    empty_rows = [[-1] * step.max_blocks_per_seq] * (step.max_seqs - step.num_seqs)
    starts = [[0, *accumulate(len(row) for row in rows)] for rows in step.pages]
    return StepView(
        padded(step.input_ids, step.max_tokens, 0),
        padded(step.positions, step.max_tokens, 0),
        [padded(slots, step.max_tokens, -1) for slots in step.slot_mapping],
        [[padded(row, step.max_blocks_per_seq, -1) for row in rows] + empty_rows for rows in step.block_table],
        [padded(ends, step.max_seqs + 1, ends[-1]) for ends in starts],
        [[block for row in rows for block in row] for rows in step.pages],
        padded(step.last_page_len, step.max_seqs, 0),
        padded(step.seq_lens, step.max_seqs, 0),
        padded(step.query_start_loc, step.max_seqs + 1, step.num_tokens),
        list(step.copies),
        list(step.moves),
        padded(step.state_slots, step.max_seqs, -1),
        padded(step.state_zero, step.max_seqs, -1),
        list(step.state_copies),
        padded(step.state_drafts, step.max_tokens, -1),
        step.num_seqs,
        step.num_tokens,
        step.max_query_len,
        step.max_seq_len,
    )


@dataclass(frozen=True)
class Driver:
    """How to make a manager under test and its steps, and how to read those."""

    manager: Callable[..., Any]
    step: Callable[..., Any]  # max_seqs, max_tokens, max_blocks_per_seq, groups
    read: Callable[[Any], StepView]


MODEL = Driver(ModelManager, ModelStep, read_model_step)


@dataclass(frozen=True)
class Raised:
    kind: type[BaseException]
    numbers: tuple[Any, ...]  # what the error carries besides its message


def plain(value: Any) -> Any:
    """A returned value as lists, tuples and ints."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    return value


def triples(blocks: Any) -> list[list[int]]:
    """The rows of a fetch or a spill."""
    rows: list[list[int]] = np.reshape(np.array(blocks, np.int64), (-1, 3)).tolist()
    return rows


def outcome(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return plain(call(*args, **kwargs))
    except EXPECTED_ERRORS as error:
        numbers = (getattr(error, name, None) for name in ("needed", "free", "max_seqs", "handle"))
        return Raised(type(error), tuple(numbers))


@dataclass(frozen=True)
class Action:
    name: str
    weight: int
    when: Callable[[Any], Any]
    states: bool  # only where sequences have a state


ACTIONS: list[Action] = []
Rule = Callable[[Any], None]


def action(
    weight: int, when: Callable[[Any], Any] = lambda machine: True, states: bool = False
) -> Callable[[Rule], Rule]:
    """A method of the machine that is done in about `weight` of the steps in which `when` holds.

    Not a `@rule` each: hypothesis leaves some out of a run, and without `admit` or `commit` there is little to see.
    """

    def register(method: Rule) -> Rule:
        ACTIONS.append(Action(method.__name__, weight, when, states))
        return method

    return register


class ManagerMachine(RuleBasedStateMachine):
    """Subclass with `driver`; see `machine_for`."""

    driver: Driver
    reference: Callable[..., ModelManager]
    streams: Streams
    patience = 0.5  # how often the device has done everything when a fetch begins
    tiers: bool | None = None  # whether managers that cache have host slots; None: half of them have
    states: bool | None = None  # whether sequences have a state; None: a third of the managers keep one

    @rule(seed=st.integers(0, 2**32 - 1))
    def act(self, seed: int) -> None:
        """One action; what it is and all its arguments follow from the seed, which is quick, and evenly spread."""
        self.finished = False
        self.rng = self.streams.rng = Random(seed)
        self.background.rng = self.rng
        self.streams.run_some()
        self.background.run_some()
        names = [a.name for a in ACTIONS for _ in range(self.weight(a)) if self.can(a)]
        getattr(self, self.rng.choice(names))()
        self.finished = True

    def can(self, a: Action) -> bool:
        return (self.stateful or not a.states) and bool(a.when(self))

    def weight(self, a: Action) -> int:
        return a.weight * (4 if a.name in self.favourites else 1)

    @initialize(seed=st.integers(0, 2**32 - 1))
    def start(self, seed: int) -> None:
        self.rng = Random(seed)
        choice = self.rng.choice
        self.groups = choice(GROUPS)
        self.large = choice([*[False] * 9, True])  # prompts of many blocks, which are hashed and evicted in runs
        num_blocks = choice([90, 60] if self.large else [8, 10, 6, 12, 7, 5, 4, 3, 2]) * len(self.groups)
        self.block_size = choice([2, 2, 1, 1, 3, 4])
        self.vocabulary = choice([2, 3])
        # A liar sets placeholders to other tokens than were computed; the bookkeeping must stand it, the K/V cannot.
        self.honest = choice([True, True, True, False])
        self.favourites = self.rng.sample([a.name for a in ACTIONS if not a.states], choice([0, 1, 2, 3]))
        config: dict[str, Any] = {
            "groups": self.groups,
            "max_seqs": choice([8, 8, 6, 3]),
            "max_nodes": choice([None, None, None, 1, 3]),
            "max_open_steps": choice([3, 8, 1]),
            "prefix_caching": choice([*[True] * 9, False]),
            "watermark": choice([0.0, 0.0, 0.0, 0.1, 0.3]),
        }
        if config["prefix_caching"] and (choice([True, False]) if self.tiers is None else self.tiers):
            config["host_blocks"] = choice([1, 8, 12, 16, 24, 24, 32, num_blocks, 2 * num_blocks])
            config["max_nodes"] = choice([None, None, None, config["max_nodes"]])
            config["write_ahead"] = choice([256, 256, 2, 1])
        if self.states or (self.states is None and choice([True, False, False])):
            config["groups"] = (*self.groups, State(self.block_size * choice([1, 1, 2, 3])))
            config["num_states"] = choice([1, 3, 5, 9, 20, 40])
            if "host_blocks" in config:
                config["num_states"] = choice([1, 2, 3, 3, 5, 9, 40])
                config["host_states"] = choice([0, 1, 4, 8, 16, 40])
        self.open(num_blocks, config)

    def open(self, num_blocks: int, config: dict[str, Any]) -> None:
        """Make both managers, and all that surrounds them."""
        self.stateful = "num_states" in config
        note(f"manager({num_blocks}, {self.block_size}, {config}); honest: {self.honest}")
        self.caching = config.get("prefix_caching", True)
        self.host = "host_blocks" in config
        self.host_states = config.get("host_states", 0) > 0
        self.max_seqs = config["max_seqs"]
        self.model = type(self).reference(num_blocks, self.block_size, **config)
        self.subject = self.driver.manager(num_blocks, self.block_size, **config)
        # Reused over many steps of different size, as engines do; the small one is there to be overfilled.
        sizes = [(8, 256, 80)] * 2 if self.large else [(8, 64, 24)] * 2
        sizes += [(2, 6, 4)]
        each = len(self.groups)
        self.steps = [(self.driver.step(*size, each), ModelStep(*size, each)) for size in sizes]
        self.max_prompt = max(2, min(50 if self.large else 14, num_blocks // each * self.block_size // 2))
        self.prompts: list[tuple[list[int], bytes, list[tuple[int, bytes]]]] = []
        self.visits: list[tuple[list[int], dict[str, Any]]] = []
        self.stored: list[tuple[list[int], dict[str, Any]]] = []  # prompts whose blocks were spilled
        self.gone: list[int] = []
        self.device = Device(self.block_size, self.groups)
        self.weights = 0
        self.truths: dict[int, Truth] = {}
        self.runs: list[tuple[int, list[RunRow]]] = []
        self.streams = Streams(self.rng)
        self.background = Background(self.rng)
        self.passes: dict[int, Work] = {}  # of open steps
        self.closed: list[Work] = []  # what was launched for steps that were committed or aborted, until it is done
        self.compare()

    # Both managers

    def both(self, name: str, *args: Any, also: tuple[type[BaseException], ...] = (), **kwargs: Any) -> Any:
        """Call both, compare; `also` are errors that the call may raise in place of the model's."""
        expected = outcome(getattr(self.model, name), *args, **kwargs)
        got = outcome(getattr(self.subject, name), *args, **kwargs)
        self.same(f"{name}{args}{kwargs or ''}", expected, got, also)
        self.compare()
        return expected

    def same(self, call: str, expected: Any, got: Any, also: tuple[type[BaseException], ...]) -> None:
        note(f"{call} -> {got}")
        if isinstance(expected, Raised) and isinstance(got, Raised) and got.kind in also:
            return
        assert got == expected, f"{call}: expected {expected}, got {got}"

    def both_uncopied(self, name: str, *args: Any) -> Any:
        """`both` where copies are due: until they are made, what blocks hold is not what tables say."""
        expected = outcome(getattr(self.model, name), *args)
        self.same(f"{name}{args}", expected, outcome(getattr(self.subject, name), *args), ())
        return expected

    def compare(self) -> None:
        model, subject = self.model, self.subject
        assert subject.num_free_blocks == model.num_free_blocks, f"{model.num_free_blocks} blocks are free in the model"
        assert subject.num_sequences == model.num_sequences, (
            f"expected {model.num_sequences}, got {subject.num_sequences}"
        )
        assert abs(subject.usage - model.usage) < 1e-9
        assert subject.num_free_host_blocks == model.num_free_host_blocks
        assert subject.num_free_host_states == model.num_free_host_states
        assert subject.num_background_slots == model.num_background_slots
        assert tuple(subject.stats()) == tuple(model.stats()), f"expected {model.stats()}, got {subject.stats()}"
        handles = list(model.sequences)
        assert plain(tuple(subject.lengths(handles))) == tuple(model.lengths(handles))
        for handle in handles:
            table, tokens = model.block_table(handle), model.tokens(handle)
            assert plain(subject.block_table(handle)) == table, f"the table of {handle} is {table} in the model"
            assert plain(subject.tokens(handle)) == tokens
            if self.honest:
                truth = self.truths[handle]
                assert all(token in (UNKNOWN, true) for token, true in zip(tokens, truth.tokens, strict=True))
                if self.streams.passes or model.sequences[handle].needs > self.streams.landed:
                    continue  # on its way
                computed = int(subject.lengths([handle]).num_computed[0])
                contents = self.device.identities(truth)[:computed]
                tables = plain(subject.block_table(handle))
                self.device.check(
                    tables if len(self.groups) > 1 else [tables], contents, computed, f"sequence {handle}"
                )
        if self.honest:
            self.check_host()
        if self.stateful:
            assert subject.num_free_states == model.num_free_states
            checkpoints = [subject.next_checkpoint(handle) for handle in handles]
            assert checkpoints == [model.next_checkpoint(handle) for handle in handles]
            assert [subject.state_slot(h) for h in handles] == [model.state_slot(h) for h in handles]
            if self.honest:
                self.check_states()
        subject.audit()

    def check_states(self) -> None:
        """The slots of sequences and of checkpoints hold what they are said to, once all passes have run."""
        if self.streams.passes:
            return
        loads = self.model.load_of_block[self.model.num_blocks :]
        for handle, sequence in self.model.sequences.items():
            if sequence.state is not None and not sequence.lost and sequence.needs <= self.streams.landed:
                contents = self.device.identities(self.truths[handle])
                self.device.check_state(sequence.state, contents, sequence.num_prepared, f"sequence {handle}")
        for slot, state in enumerate(self.model.state_slots):
            if state.node is not None and loads[slot] <= self.streams.landed:
                contents = self.device.identities(self.truth_of(state.node))
                self.device.check_state(slot, contents, len(contents), "a checkpoint")

    def truth_of(self, node: Node) -> Truth:
        """The prefix that a node stands for."""
        blocks, salts = [], {id(root): salt for salt, root in self.model.roots.items()}
        while node.parent is not None:
            blocks.append(node.key)
            node = node.parent
        truth = Truth(salts[id(node)], [], {}, self.weights)
        for tokens, extra in reversed(blocks):
            truth.extra |= {len(truth.tokens) + place: data for place, data in extra}
            truth.tokens += tokens
        return truth

    def check_host(self) -> None:
        """What lies in host slots, as whoever takes it further would find it, is what their nodes say."""
        for slot, (node, g) in self.model.home.items():
            if self.model.move_of_slot[slot] <= self.streams.landed:
                expected = self.content_of(node, g)
                assert self.in_host_slot(slot) == expected, f"host slot {slot} holds another prefix"

    def in_host_slot(self, slot: int) -> Content:
        """What lies in a host slot. Those for states come after those for blocks."""
        first = self.model.host_blocks
        if slot < first:
            return self.device.host.get(slot, JUNK)
        return [(len(self.groups), self.device.host_states.get(slot - first, -2))]

    def write_host_slot(self, slot: int, content: Content) -> None:
        first = self.model.host_blocks
        if slot < first:
            self.device.host[slot] = content
        else:
            self.device.host_states[slot - first] = content[-1][1]

    def content_of(self, node: Node, g: int) -> Content:
        """What a block or a slot of a node holds; of a state that is the last token that it has seen."""
        size = self.block_size if g < len(self.groups) else 1
        return [(g, name) for name in self.device.identities(self.truth_of(node))[-size:]]

    def compare_steps(self, subject_step: Any, model_step: ModelStep) -> None:
        got, expected = self.driver.read(subject_step), read_model_step(model_step)
        for name in StepView.__dataclass_fields__.keys() - {"moves"}:
            ours, theirs = getattr(expected, name), getattr(got, name)
            assert theirs == ours, f"step.{name}: expected {ours}, got {theirs}"

    # What to draw from

    @property
    def handles(self) -> list[int]:
        return list(self.model.sequences)

    @property
    def pins(self) -> list[int]:
        return list(self.model.pins)

    def in_step(self, handle: int) -> bool:
        return any(row.handle == handle for _, rows in self.runs for row in rows)

    @property
    def resting(self) -> list[int]:
        return [h for h in self.handles if not self.in_step(h) and not self.model.sequences[h].preempted]

    @property
    def computed(self) -> list[int]:
        """Those at rest with something to share or to go back to."""
        return [h for h in self.resting if self.model.sequences[h].num_computed > 0]

    @property
    def preempted(self) -> list[int]:
        return [h for h in self.handles if self.model.sequences[h].preempted]

    @property
    def runnable(self) -> list[int]:
        """Those with tokens that no step has taken yet."""
        sequences = self.model.sequences.items()
        return [h for h, s in sequences if not s.preempted and not s.lost and s.num_prepared < len(s.tokens)]

    @property
    def unknown(self) -> list[int]:
        return [h for h, s in self.model.sequences.items() if UNKNOWN in s.tokens]

    def some(self, handles: list[int]) -> list[int]:
        """A random batch of at least one, in random order."""
        return self.rng.sample(handles, self.rng.randint(1, len(handles)))

    def coin(self) -> bool:
        return self.rng.random() < 0.5

    def a_token(self) -> int:
        return self.rng.randrange(self.vocabulary)

    def some_tokens(self, count: int) -> list[int]:
        return [self.a_token() for _ in range(count)]

    def a_prompt(self) -> tuple[list[int], dict[str, Any]]:
        """Tokens and identity; often those of an earlier sequence, cut or continued, so that prefixes collide."""
        salt = b""
        extra: list[tuple[int, bytes]] = []
        known = self.prompts + [
            (s.tokens, s.salt, sorted(s.extra.items()))
            for s in self.model.sequences.values()
            if UNKNOWN not in s.tokens
        ]
        known = [prompt for prompt in known if prompt[0]]
        if known and self.rng.randint(0, 3) > 0:
            old, salt, extra = self.rng.choice(known)
            kept = len(old) if self.coin() else self.rng.randint(1, len(old))
            more = self.rng.randint(0, self.block_size + 1)
            tokens = old[:kept] + self.some_tokens(min(more, max(0, self.max_prompt - kept)))
        else:
            most = self.max_prompt if self.large else min(self.max_prompt, 3 * self.block_size + 1)
            tokens = self.some_tokens(self.rng.choice(range(most, 0, -1)))
        if self.rng.randint(0, 4) == 0:
            salt = self.rng.choice(SALTS)
        if self.rng.randint(0, 2) == 0:
            places = sorted(self.rng.sample(range(len(tokens)), min(len(tokens), self.rng.randint(0, 2))))
            extra = [(place, self.rng.choice(MARKS)) for place in places]
        return tokens, {"salt": salt, "extra": [(place, mark) for place, mark in extra if place < len(tokens)]}

    def a_reserve(self) -> int | None:
        return self.rng.choice([None, None, 0, 1, 2, 5, 10**6])

    def bounds(self) -> dict[str, Any]:
        """How much of a sequence is reserved and may be hit when it comes."""
        bounds = {"reserve": self.a_reserve(), "max_hit": self.rng.choice([None, None, None, 0, 3, 8])}
        return bounds | ({"host": False} if self.rng.randint(0, 5) == 0 else {})

    def some_extra(self, count: int) -> list[tuple[int, bytes]]:
        """Extra bytes for some of `count` tokens that are added."""
        places = [place for place in range(count) if self.rng.randint(0, 3) == 0]
        return [(place, self.rng.choice(MARKS)) for place in places]

    def as_input(self, values: list[int], dtypes: tuple[type, ...] = (np.int64,)) -> Any:
        """The same ints as a list, an array, or a view with a stride."""
        kind = self.rng.choice(["list", "array", "strided"])
        if kind == "list":
            return values
        dtype = self.rng.choice(dtypes)
        if kind == "array":
            return np.array(values, dtype)
        return np.repeat(np.array(values, dtype), 2)[::2]

    def token_input(self, tokens: list[int]) -> Any:
        return self.as_input(tokens, (np.int32, np.int64))

    # Coming and going

    @action(3)
    def admit(self) -> None:
        tokens, identity = self.a_prompt()
        given = self.token_input(tokens)
        bounds = self.bounds()
        new = self.rng.choice([1, 1, 2, self.block_size, 4 * self.block_size])
        can = self.both("can_admit", given, **identity, **bounds, max_new_tokens=new)
        result = self.both_admit(given, identity, bounds)
        assert can == Admission.NEVER or (can == Admission.NOW) == (not isinstance(result, Raised))

    @action(6, when=lambda self: self.model.free_slots)
    def serve(self) -> None:
        """The common case: admitted and computed in one step. Twins may come together, and steps be prepared ahead."""
        tokens, identity = self.a_prompt()
        batch: list[int] = []
        for _ in range(self.rng.choice([1, 1, 2])):
            admitted = self.both_admit(self.token_input(tokens), identity, self.bounds())
            if not isinstance(admitted, Raised):
                batch.append(admitted[0])
        ahead = self.rng.choice([0, 0, 1, 2])
        for which in range(ahead + 1):
            sequences = [self.model.sequences[handle] for handle in batch]
            lens = [len(s.tokens) - s.num_prepared for s in sequences]
            if not batch or isinstance(self.run(batch, lens, which % 2), Raised):
                break
            if which < ahead:
                self.append_to(batch)
        if self.runs:
            self.close("commit", 0)

    @action(3, when=lambda self: self.computed and self.model.free_slots)
    def sample(self) -> None:
        """Several continuations of one sequence: forked, then each writes its own next token."""
        parent = self.rng.choice(self.computed)
        if not self.runs and self.coin():
            self.run_ahead(parent)
        if parent in self.unknown and self.coin():
            self.learn([parent], [self.model.tokens(parent).count(UNKNOWN)])
        children = self.both_fork(parent, self.rng.randint(1, 2))
        if isinstance(children, Raised):
            return
        batch = [parent, *children][self.rng.randint(0, 1) :]
        self.append_to(batch)
        self.run(batch, [1] * len(batch), self.rng.randint(0, 1))

    def run_ahead(self, handle: int) -> None:
        """A block or so of tokens is computed before anybody knows them."""
        tokens = self.some_tokens(self.rng.randint(1, self.block_size + 1))
        self.truths[handle].tokens += tokens
        self.both("extend", handle, None, len(tokens))
        sequence = self.model.sequences[handle]
        if not isinstance(self.run(handle, len(sequence.tokens) - sequence.num_prepared), Raised):
            self.close("commit", 0)

    def both_admit(
        self, tokens: Any, identity: dict[str, Any], bounds: dict[str, Any], fetched: Operation | None = None
    ) -> Any:
        ours, theirs = ({}, {}) if fetched is None else ({"fetched": fetched.ours}, {"fetched": fetched.theirs})
        expected = outcome(self.model.admit, tokens, **identity, **bounds, **ours)
        got = outcome(self.subject.admit, tokens, **identity, **bounds, **theirs)
        self.same(f"admit({tokens}, {identity}, {bounds})", expected, got, (TooManySequences, NoFreeBlocks))
        ids: list[int] = plain(np.asarray(tokens))
        self.prompts = [*self.prompts[-5:], (ids, identity["salt"], identity["extra"])]
        if not isinstance(expected, Raised):
            handle, cached = expected
            self.truths[handle] = Truth(identity["salt"], list(ids), dict(identity["extra"]), self.weights, cached)
            if not self.caching:
                assert cached == 0
        self.compare()
        return expected

    @action(1, when=lambda self: self.model.node_of)
    def match(self) -> None:
        tokens, identity = self.a_prompt()
        bounds = self.bounds()
        self.both("match", self.token_input(tokens), **identity, max_hit=bounds["max_hit"], tiers=self.coin())
        self.both("can_admit", tokens, **identity, **bounds)

    @action(3, when=lambda self: len(self.handles) > 1)
    def free(self) -> None:
        batch = self.some(self.handles)[:2]
        given = batch[0] if len(batch) == 1 and self.coin() else self.as_input(batch)
        for handle in batch:
            del self.truths[handle]
        self.both("free", given)
        self.gone = [*self.gone[-5:], *batch]

    @action(8, when=lambda self: self.handles and 3 * self.model.num_free_blocks < self.model.num_blocks)
    def make_room(self) -> None:
        """Something leaves a crowded pool, or most of what follows would be refused."""
        if not self.handles:
            return
        self.free() if self.coin() or not self.resting else self.preempt()

    @action(1, when=lambda self: self.resting)
    def preempt(self) -> None:
        handle = self.rng.choice(self.resting)
        self.truths[handle].written = 0
        self.both("preempt", handle)

    @action(3, when=lambda self: self.preempted)
    def resume(self) -> None:
        self.both_resume(self.rng.choice(self.preempted), self.bounds())

    def both_resume(self, handle: int, bounds: dict[str, Any]) -> bool:
        self.truths[handle].weights = self.weights
        cached = self.both("resume", handle, **bounds)
        if isinstance(cached, Raised):
            return False
        self.truths[handle].written = cached
        return True

    @action(3, when=lambda self: self.resting and self.model.free_slots)
    def fork(self) -> None:
        parent = self.rng.choice(self.resting)
        count = self.rng.randint(1, 3)
        self.both_fork(parent, count)

    def both_fork(self, parent: int, count: int) -> Any:
        expected = outcome(self.model.fork, parent, count)
        got = outcome(self.subject.fork, parent, count)
        self.same(f"fork({parent}, {count})", expected, got, ())
        if not isinstance(expected, Raised):
            for child in expected:
                self.truths[child] = self.truths[parent].copy()
        self.compare()
        return expected

    @action(2, when=lambda self: self.resting)
    def reorder(self) -> None:
        batch = self.some(self.resting)
        parents = [self.rng.choice(self.resting) for _ in batch]
        news = {handle: self.truths[parent].copy() for handle, parent in zip(batch, parents, strict=True)}
        expected = outcome(self.model.reorder, batch, parents)
        got = outcome(self.subject.reorder, self.as_input(batch), self.as_input(parents))
        self.same(f"reorder({batch}, {parents})", expected, got, ())
        if not isinstance(expected, Raised):
            self.truths.update(news)
        self.compare()

    # Tokens

    @action(2, when=lambda self: self.handles)
    def append(self) -> None:
        self.append_to(self.some(self.handles))

    def append_to(self, batch: list[int]) -> None:
        """One more token for each, in a third of the cases a placeholder."""
        tokens = self.some_tokens(len(batch))
        extra = self.extra_for(batch, [1] * len(batch))
        for handle, token in zip(batch, tokens, strict=True):
            self.truths[handle].tokens.append(token)
        unknown = self.rng.randint(0, 2) == 0
        self.both("append", self.as_input(batch), None if unknown else self.token_input(tokens), extra=extra)

    def extra_for(self, batch: list[int], counts: list[int]) -> list[list[tuple[int, bytes]]] | None:
        """Extra bytes for tokens that are about to be added to each of a batch; most often None."""
        if self.rng.randint(0, 2):
            return None
        extra = [self.some_extra(count) for count in counts]
        for handle, pairs in zip(batch, extra, strict=True):
            truth = self.truths[handle]
            truth.extra |= {len(truth.tokens) + place: data for place, data in pairs}
        return extra

    @action(2, when=lambda self: self.handles)
    def extend(self) -> None:
        batch = self.some(self.handles)
        counts = [self.rng.randint(0, self.block_size + 1) for _ in batch]
        tokens = self.some_tokens(sum(counts))
        extra = self.extra_for(batch, counts)
        taken = 0
        for handle, count in zip(batch, counts, strict=True):
            self.truths[handle].tokens += tokens[taken : taken + count]
            taken += count
        unknown = self.rng.randint(0, 2) == 0
        given = None if unknown else self.token_input(tokens)
        self.both("extend", self.as_input(batch), given, self.as_input(counts), extra=extra)

    @action(3, when=lambda self: self.unknown)
    def set_tokens(self) -> None:
        batch = self.some(self.unknown)
        self.learn(batch, [self.rng.randint(1, self.model.tokens(handle).count(UNKNOWN)) for handle in batch])

    def learn(self, batch: list[int], counts: list[int]) -> None:
        """The first unknown tokens of each become known, as they were computed unless this is a liar."""
        tokens: list[int] = []
        for handle, count in zip(batch, counts, strict=True):
            truth = self.truths[handle]
            gaps = [i for i, token in enumerate(self.model.tokens(handle)) if token == UNKNOWN]
            for position in gaps[:count]:
                if position >= truth.written or not self.honest:
                    truth.tokens[position] = self.a_token()
                tokens.append(truth.tokens[position])
        given = None if counts == [1] * len(batch) and self.coin() else counts
        self.both("set_tokens", self.as_input(batch), self.token_input(tokens), given)

    @action(2, when=lambda self: [h for h in self.handles if not self.in_step(h)])
    def trim(self) -> None:
        handle = self.rng.choice([h for h in self.handles if not self.in_step(h)])
        length = len(self.truths[handle].tokens)
        self.cut_back(handle, self.rng.randint(max(0, length - 2 * self.block_size), length))

    def cut_back(self, handle: int, target: int) -> bool:
        """Trim; where that is refused, as what it needs has slid out of a window, in the way that the error names."""
        trimmed = self.both_trim(handle, target)
        if trimmed and self.model.sequences[handle].preempted:  # its state could not go back
            return target > 0 and self.coin() and self.both_resume(handle, self.bounds())
        if trimmed or not self.coin():
            return trimmed
        self.truths[handle].written = 0
        self.both("preempt", handle)
        assert self.both_trim(handle, target)
        if target == 0:
            return False
        return self.both_resume(handle, {})

    def both_trim(self, handle: int, target: int) -> bool:
        expected = outcome(self.model.trim, handle, target)
        self.same(f"trim({handle}, {target})", expected, outcome(self.subject.trim, handle, target), ())
        if not isinstance(expected, Raised):
            self.truths[handle].cut(target)
            if self.model.sequences[handle].preempted:
                self.truths[handle].written = 0
        self.compare()
        return not isinstance(expected, Raised)

    @action(6, when=lambda self: self.computed)
    def rewind(self) -> None:
        """An edited conversation: cut back to anywhere, continued with the same tokens or others, and computed.

        Then the old one is asked for again.
        """
        handle = self.rng.choice(self.computed)
        truth = self.truths[handle]
        old, identity = [*truth.tokens, 0], {"salt": truth.salt, "extra": sorted(truth.extra.items())}
        target = self.rng.randint(0, len(truth.tokens))
        more = truth.tokens[target:]
        if self.coin():
            more = [1 - token % 2 for token in more[:1]] + self.some_tokens(self.rng.randint(0, self.block_size))
        if not self.cut_back(handle, target):
            return
        truth = self.truths[handle]
        truth.tokens += more
        self.both("extend", [handle], more, [len(more)])
        sequence = self.model.sequences[handle]
        left = len(sequence.tokens) - sequence.num_prepared
        if left > 0 and not isinstance(self.run([handle], [left]), Raised) and self.coin():
            self.close("commit", 0)
        self.both_admit(old, identity, {"reserve": 0})

    # Steps

    def run(self, seqs: Any, lens: Any, which: int = 0, keep: bool = False, own: bool = False) -> Any:
        """Prepare in both; where it succeeds, launch the device's part: moves, copies, then the pass."""
        subject_step, model_step = self.steps[which]
        if self.stateful and not keep and not own and any(self.is_own(seq) for seq in np.atleast_1d(seqs).tolist()):
            own = self.rng.randint(0, 5) > 0
        more: dict[str, Any] = {"keep_state": True} if keep else {"own_state": True} if own else {}
        expected = outcome(self.model.prepare, seqs, lens, model_step, **more)
        got = outcome(self.subject.prepare, seqs, lens, subject_step, **more)
        self.same(f"prepare({seqs}, {lens}, {more})", expected, got, (NoFreeBlocks, NoFreeStates, ValueError))
        self.compare_steps(subject_step, model_step)
        if not isinstance(expected, Raised):
            assert subject_step.needs == model_step.needs
            assert subject_step.last_move == model_step.last_move
            view, after = self.driver.read(subject_step), list(self.closed)
            assert view.moves == model_step.moves, f"moves: expected {model_step.moves}, got {view.moves}"
            aborted = False
            if model_step.last_move:
                self.forget_to_move(expected, which)
                aborted = self.rng.randint(0, 9) == 0
                if aborted:
                    self.note_preempted(self.both_uncopied("abort", expected))
                    self.next_is_refused(which)
                if self.host or not aborted:
                    self.launch_moves(view, model_step.last_move, after, model_step.needs, aborted)
                    self.both_uncopied("mark_moved", model_step.last_move)
            if aborted:  # the pass was not launched, and the copies that it was to read go nowhere
                self.compare()
                return Raised(ValueError, ())
            self.play(expected, plain(np.atleast_1d(np.asarray(seqs))), view, subject_step.needs, own)
        self.compare()
        return expected

    def launch_moves(self, step: StepView, last_move: int, after: list[Work], needs: int, aborted: bool) -> None:
        """Loads first, which are numbered before copies-on-write, and offloads last."""
        first_offload = last_move + 1 - sum(not move.loads for move in step.moves)
        number = self.model.moves_marked
        for move in step.moves:
            if move.loads:
                open_rows = [row for _, rows in self.runs for row in rows]
                named = {block for row in open_rows for block in self.device.reached(row.tables, row.start)}
                if move.group == len(self.groups):
                    named = {slot for row in open_rows for slot in [row.state, *row.drafts]}
                assert move.target not in named, f"a load writes {move}, which an open step names"
            first, last = (number + 1, number) if move.loads else (first_offload, first_offload)
            self.streams.launch_move(partial(self.device.move, move), after, first, last)
            first_offload += not move.loads
        self.streams.launch_move(lambda: None, after, last_move, last_move)
        if self.stateful:
            zeroed = [slot for slot in step.state_zero if slot >= 0]
            work = self.streams.launch_pass(partial(self.device.copy_states, zeroed, step.state_copies), needs)
            if aborted:  # no pass comes after it
                self.closed.append(work)

    @action(2, when=lambda self: self.host)
    def landed(self) -> None:
        self.both("landed", self.rng.choice([self.streams.landed] * 4 + [0, self.streams.landed // 2]))

    @action(14, when=lambda self: self.host and self.model.free_slots)
    def visit(self) -> None:
        """Conversations come, are answered and leave, until the first of them has to come back from the host."""
        for _ in range(self.rng.randint(1, 4)):
            if self.visits and self.coin():
                tokens, identity = self.rng.choice(self.visits)
                tokens = tokens + self.some_tokens(self.rng.randint(0, 2))
                self.both("match", tokens, **identity, tiers=True)
            else:
                tokens, identity = self.a_prompt()
            admitted = self.both_admit(tokens, identity, self.bounds())
            if isinstance(admitted, Raised):
                self.make_room()
                continue
            handle, cached = admitted
            self.visits = [*self.visits[-7:], (tokens, identity)]
            if self.rng.randint(0, 3) and not isinstance(self.run([handle], [len(tokens) - cached]), Raised):
                self.close("commit", 0)
            if self.rng.randint(0, 3):
                del self.truths[handle]
                self.both("free", handle)

    def forget_to_move(self, step_id: int, which: int) -> None:
        """Before its copies are marked as made the step cannot be committed, and no other one prepared."""
        if len(self.model.steps) == 1:
            assert self.both_uncopied("commit", step_id) == Raised(MovesPending, (None,) * 4)
        self.next_is_refused(which)

    def next_is_refused(self, which: int) -> None:
        """While moves are not on their way; but for an abort that has taken copies back where there are no others."""
        ready = [handle for handle in self.runnable if len(self.model.steps) < self.model.max_open_steps]
        if ready and self.model.moves_handed > self.model.moves_marked:
            subject_step, model_step = self.steps[which - 1]
            expected = outcome(self.model.prepare, ready[:1], [1], model_step)
            got = outcome(self.subject.prepare, ready[:1], [1], subject_step)
            self.same(f"prepare({ready[:1]}, [1])", expected, got, ())
            assert isinstance(expected, Raised)
            assert expected.kind in (MovesPending, NoFreeBlocks, NoFreeStates, ValueError)
            self.compare_steps(subject_step, model_step)

    def is_own(self, handle: int) -> bool:
        """Whether the state of a sequence is its caller's."""
        sequence = self.model.sequences.get(handle)
        return sequence is not None and sequence.state is None and sequence.num_prepared > 0

    def play(self, step_id: int, handles: list[int], step: StepView, needs: int, own: bool = False) -> None:
        """Launch a pass: what it reads is checked when it runs, which is at once unless there are moves to wait for."""
        written = {slot // self.block_size for slots in step.slot_mapping for slot in slots[: step.num_tokens]}
        written |= {target for _, target in step.copies}
        for _, rows in self.runs:
            for row in rows:
                if row.handle not in handles:
                    named = set(self.device.reached(row.tables, row.start))
                    assert not written & named, f"step {step_id} writes what an open step still names"
        rows, writes = [], []
        for i, handle in enumerate(handles):
            first, last = step.query_start_loc[i], step.query_start_loc[i + 1]
            end = step.seq_lens[i]
            start = end - (last - first)
            tables = [table[i][: -(-end // self.block_size)] for table in step.block_table]
            contents = self.device.identities(self.truths[handle])[:end]
            for g, slots in enumerate(step.slot_mapping):
                writes += [
                    (slot, (g, contents[position]))
                    for slot, position in zip(slots[first:last], range(start, end), strict=True)
                ]
            self.truths[handle].written = end
            states = [step.state_drafts[j] for j in range(first, last) if step.state_drafts[j] >= 0]
            rows.append(RunRow(handle, start, end, tables, contents, step.state_slots[i], states))

        def run() -> None:
            self.device.copy_blocks(step.copies)
            for row in rows if self.stateful else []:
                if self.honest and row.state >= 0:
                    what = f"sequence {row.handle} in step {step_id}"
                    self.device.check_state(row.state, row.contents, row.start, what)
                if own:
                    self.device.states.update(dict.fromkeys(row.drafts, row.contents[-1]))
                    continue
                self.device.states.update(zip(row.drafts, row.contents[row.start :], strict=bool(row.drafts)))
                if not row.drafts:
                    self.device.states[row.state] = row.contents[-1]
            for row in rows if self.honest else []:
                what = f"sequence {row.handle} in step {step_id}"
                self.device.check(row.tables, row.contents[: row.start], row.start, what)
            self.device.slots.update(writes)
            for row in rows if self.honest else []:
                what = f"sequence {row.handle} in step {step_id}, all written"
                self.device.check(row.tables, row.contents, row.start, what)

        self.passes[step_id] = self.streams.launch_pass(run, needs)
        self.runs.append((step_id, rows))
        if self.host:
            self.streams.run_some()
        else:
            self.streams.finish()

    def close(self, name: str, index: int, accepted: list[int] | None = None, given: Any = None) -> None:
        """Commit or abort; until then nothing may have been written over what the step reads."""
        step_id, rows = self.runs[index]
        launched = self.passes.pop(step_id)
        self.closed = [work for work in [*self.closed, launched] if not work.done]
        if self.honest and launched.done:
            for row in rows:
                what = f"sequence {row.handle} in step {step_id}, at {name}"
                self.device.check(row.tables, row.contents, row.start, what)
        self.runs.pop(index)
        for i, row in enumerate(rows):
            truth = self.truths.get(row.handle)
            if truth is None:
                continue
            kept = row.end - row.start if accepted is None else accepted[i]
            if name == "abort":
                truth.written = row.start
            elif row.start + kept < row.end:
                truth.cut(row.start + kept)
        args = (step_id,) if given is None else (step_id, given)
        result = self.both_uncopied(name, *args)
        self.note_preempted(result)
        self.compare()
        assert not isinstance(result, Raised), f"{name} of step {step_id} failed: {result}"

    def note_preempted(self, handles: Any) -> None:
        """Those whose state was lost start again."""
        for handle in handles if isinstance(handles, list) else []:
            self.truths[handle].written = 0

    def query_lens(self, batch: list[int], most: int = 6) -> list[int]:
        lens = []
        for handle in batch:
            s = self.model.sequences[handle]
            lens.append(self.rng.randint(1, min(most, len(s.tokens) - s.num_prepared)))
        return lens

    @action(4, when=lambda self: self.runnable)
    def prepare(self) -> None:
        batch = self.some(self.runnable)
        lens = self.query_lens(batch)
        which = self.rng.choice([0, 0, 1, 1, 2])
        self.run(self.as_input(batch), self.as_input(lens), which)

    @action(5, when=lambda self: self.runnable, states=True)
    def prefill_to_checkpoint(self) -> None:
        """Chunks that end where the next checkpoint is to be, and then the rest."""
        batch = self.some(self.runnable)
        for which in range(self.rng.randint(1, 2)):
            batch = [handle for handle in batch if handle in self.runnable]
            if not batch or isinstance(self.run_to_checkpoint(batch, which), Raised):
                break
        if self.runs and self.rng.randint(0, 3):
            self.close("commit", 0)

    def run_to_checkpoint(self, batch: list[int], which: int = 0) -> Any:
        sequences = [self.model.sequences[handle] for handle in batch]
        ends = [self.model.next_checkpoint(s.handle) or len(s.tokens) for s in sequences]
        return self.run(batch, [end - s.num_prepared for end, s in zip(ends, sequences, strict=True)], which)

    @property
    def going(self) -> list[int]:
        """Those that a step may take once they have a token more."""
        return [h for h, s in self.model.sequences.items() if not s.preempted and not s.lost]

    def with_more(self) -> list[int]:
        """A small batch whose sequences all have tokens that no step has taken."""
        batch = self.some(self.going)[:2]
        for _ in range(self.rng.randint(1, 3)):
            self.append_to(batch)
        return batch

    @action(5, when=lambda self: self.going, states=True)
    def draft(self) -> None:
        """Drafted tokens, whose states are kept one by one until it is known how many were right."""
        batch = self.with_more()
        result = self.run(batch, self.query_lens(batch, 4), self.rng.randint(0, 1), keep=self.rng.randint(0, 3) > 0)
        if not isinstance(result, Raised) and len(self.runs) == 1 and self.rng.randint(0, 3):
            self.commit_part()

    @action(5, when=lambda self: self.runnable, states=True)
    def carry(self) -> None:
        """Passes over sequences whose states the caller keeps, to a checkpoint or not, of which not all counts."""
        batch = self.some(self.runnable)
        sequences = [self.model.sequences[handle] for handle in batch]
        ends = [self.model.next_checkpoint(s.handle) or len(s.tokens) for s in sequences]
        to_checkpoint = [end - s.num_prepared for end, s in zip(ends, sequences, strict=True)]
        lens = self.query_lens(batch) if self.coin() else to_checkpoint
        if isinstance(self.run(batch, lens, self.rng.randint(0, 1), own=True), Raised) or self.coin():
            return
        if self.coin():
            self.close("abort", -1)
        elif len(self.runs) == 1:
            self.commit_part()

    @action(5, when=lambda self: self.going, states=True)
    def waver(self) -> None:
        """A pass is aborted, perhaps while the one before it is open, and what is left of the batch goes on."""
        batch = self.with_more()
        if isinstance(self.run(batch, self.query_lens(batch), 0), Raised):
            return
        self.close("abort", -1)
        batch = [handle for handle in batch if handle in self.runnable]
        if batch and self.coin():
            self.run(batch, self.query_lens(batch), 1)

    @action(4, when=lambda self: self.computed and self.model.free_slots, states=True)
    def beam(self) -> None:
        """Children of one sequence go on with it in one pass, which may have to be taken back."""
        parent = self.rng.choice(self.computed)
        children = self.both_fork(parent, self.rng.randint(1, 2))
        if isinstance(children, Raised):
            return
        batch = [parent, *children]
        self.append_to(batch)
        self.rng.shuffle(batch)
        if not isinstance(self.run(batch, [1] * len(batch)), Raised) and self.coin():
            self.close("abort", -1)
            batch = [handle for handle in batch if handle in self.runnable]
            if batch:
                self.run(batch, [1] * len(batch), 1)

    @action(3, when=lambda self: len(self.model.free_slots) > 1 and not self.runs, states=True)
    def converse(self) -> None:
        """A conversation leaves checkpoints, and others begin as it did."""
        tokens, identity = self.a_prompt()
        first = self.both_admit(tokens, identity, {})
        for more in range(self.rng.randint(1, 3)):
            if isinstance(first, Raised) or first[0] not in self.runnable:
                return
            if isinstance(self.run_to_checkpoint([first[0]]), Raised):
                return
            self.close("commit", 0)
            if self.coin() and self.model.free_slots:
                second = self.both_admit([*tokens, *self.some_tokens(2)], identity, {})
                if not isinstance(second, Raised) and self.coin():
                    del self.truths[second[0]]
                    self.both("free", second[0])
            added = self.some_tokens(self.rng.randint(1, self.model.every))
            self.truths[first[0]].tokens += added
            self.both("extend", [first[0]], added, [len(added)])
            self.both("match", [*tokens, 0, *added[:more]], **identity)
            known = self.truths[first[0]].tokens
            self.both("match", [*known[: self.rng.randint(1, len(known))], 0], **identity)

    @action(10, when=lambda self: self.host and self.model.free_slots, states=True)
    def come_back(self) -> None:
        """A conversation leaves a checkpoint, others push it out of the device, and it goes on."""
        tokens, identity = self.rng.choice(self.visits) if self.visits and self.coin() else self.a_prompt()
        tokens = [*tokens, *self.some_tokens(max(0, self.model.every - len(tokens)))]
        self.visits = [*self.visits[-7:], (tokens, identity)]
        self.answer(tokens, identity)
        self.flush()
        for _ in range(self.rng.choice([0, 1, 2, min(self.model.num_states, 6)])):
            mark = {"salt": b"", "extra": [(0, self.rng.randbytes(2))]}
            self.answer(self.some_tokens(min(self.max_prompt, self.model.every + 1)), mark)
        if self.coin():
            self.time_passes()
        self.both("match", [*tokens, 0], **identity, tiers=self.coin())
        self.answer([*tokens, *self.some_tokens(self.rng.randint(1, self.block_size))], identity)

    def answer(self, tokens: list[int], identity: dict[str, Any]) -> None:
        """A prompt is computed, with a stop at its last grid point, and most often leaves."""
        admitted = self.both_admit(tokens, identity, self.bounds() if self.coin() else {})
        if isinstance(admitted, Raised):
            self.make_room()
            return
        handle, _ = admitted
        for which in range(2 if self.rng.randint(0, 5) else 0):
            if handle not in self.runnable or isinstance(self.run_to_checkpoint([handle], which), Raised):
                break
            self.close(*(("abort", -1) if self.rng.randint(0, 7) == 0 else ("commit", 0)))
        if self.rng.randint(0, 4) and handle in self.handles:
            del self.truths[handle]
            self.both("free", handle)

    @action(6, when=lambda self: self.runnable)
    def prefill(self) -> None:
        """The whole of what is left of one or more sequences, at once; then the oldest step is done."""
        batch = self.some(self.runnable)
        sequences = [self.model.sequences[handle] for handle in batch]
        lens = [len(s.tokens) - s.num_prepared for s in sequences]
        if not isinstance(self.run(batch, lens), Raised):
            self.close("commit", 0)

    @action(4, when=lambda self: self.handles)
    def decode(self) -> None:
        """The next token of each, known or not, in a step that stays open."""
        lost = [h for h, s in self.model.sequences.items() if s.lost]
        batch = [h for h in self.handles if h not in self.runnable and h not in self.preempted + lost]
        if not batch:
            return
        batch = self.some(batch)
        self.append_to(batch)
        self.run(batch, [1] * len(batch), self.rng.randint(0, 1))

    @action(6, when=lambda self: self.runs)
    def commit(self) -> None:
        self.close("commit", 0)

    @action(2, when=lambda self: self.runs)
    def commit_part(self) -> None:
        step_id, rows = self.runs[0]
        accepted = [self.rng.randint(0, row.end - row.start) for row in rows]
        later = {row.handle for _, others in self.runs[1:] for row in others}
        refused = any(
            row.handle in later and count < row.end - row.start for row, count in zip(rows, accepted, strict=True)
        )
        given = self.as_input(accepted)
        if refused:
            result = self.both("commit", step_id, given)
            assert isinstance(result, Raised)
            assert result.kind is ValueError
        else:
            self.close("commit", 0, accepted, given)

    @action(1, when=lambda self: self.runs)
    def abort(self) -> None:
        self.close("abort", -1)

    @action(1, when=lambda self: self.host)
    def flush(self) -> None:
        """A step without rows, for its moves alone."""
        if not isinstance(self.run([], []), Raised) and self.coin():
            self.close("commit", 0)

    # Work in the background

    @action(8, when=lambda self: self.host)
    def turn_over(self) -> None:
        """What is cached goes outside, others push it out of both pools, and it is wanted again."""
        while self.runs:
            self.close("commit", 0)
        while len(self.handles) > 1 or (self.handles and self.coin()):
            self.free()
        self.end_all(self.rng.choice([0, 0, 1, 3]))
        for _ in range(self.rng.randint(1, 3)):
            if self.host_states and self.model.free_slots and self.coin():
                self.come_back()
            self.visit()
            self.flush()
            if self.rng.randint(0, 3):
                self.time_passes()
            while self.spill(10**6).ours.blocks:
                self.end_spill()
        for _ in range(self.rng.choice([0, 8, 24])):
            if not self.missed():
                self.pass_by()
        if self.coin():
            self.flush()
        self.begin_fetch()

    def end_all(self, but: int = 0) -> None:
        """Work in the background ends, all of it but so many operations."""
        background = self.background
        while len(background.fetches) + len(background.spills) + len(background.fetched) > but:
            end = self.end_fetch if background.fetches else self.end_spill if background.spills else self.release
            end()

    def pass_by(self) -> None:
        """A long prompt that nobody asks for again."""
        tokens = self.some_tokens(self.max_prompt)
        admitted = self.both_admit(tokens, {"salt": b"", "extra": [(0, self.rng.randbytes(2))]}, {"host": False})
        if not isinstance(admitted, Raised):
            handle, cached = admitted
            if not isinstance(self.run([handle], [len(tokens) - cached]), Raised):
                self.close("commit", 0)
            del self.truths[handle]
            self.both("free", handle)

    def time_passes(self) -> None:
        """The device has done all that was launched, and the managers know it."""
        self.streams.finish()
        self.both("landed", self.streams.landed)

    def names_of(self, tokens: list[int], identity: dict[str, Any]) -> list[bytes]:
        """The digests of the full blocks of a prompt."""
        count = len(tokens) // self.block_size
        extras = self.model.block_extras(identity["extra"], count)
        assert self.subject.block_extras(identity["extra"], count) == extras
        raw = np.array(tokens, "<i4").tobytes()
        size = 4 * self.block_size
        blocks = [(raw[i * size : (i + 1) * size], extra) for i, extra in enumerate(extras)]
        return list(digests((self.weights, identity["salt"]), blocks))

    def num_stored(self, names: list[bytes]) -> int:
        """Leading blocks of a prompt that are outside in every group; a state need not be."""
        groups = range(len(self.groups))
        missing = (i for i, name in enumerate(names) if any((name, g) not in self.background.store for g in groups))
        return next(missing, len(names))

    def states_stored(self, names: list[bytes], num_blocks: int) -> list[int]:
        """After which numbers of blocks of a prompt, up to `num_blocks`, the state is outside."""
        ends = range(1, min(num_blocks, len(names)) + 1) if self.host_states else ()
        return [n for n in ends if (names[n - 1], len(self.groups)) in self.background.store]

    def num_useful(self, tokens: list[int], identity: dict[str, Any]) -> int:
        """Leading tokens of a prompt that could be had from outside."""
        names = self.names_of(tokens, identity)
        blocks = self.num_stored(names)
        if self.host_states:
            blocks = max(self.states_stored(names, blocks), default=0)
        return blocks * self.block_size

    def missed(self) -> list[tuple[list[int], dict[str, Any]]]:
        """Prompts of which more is outside than here."""
        return [
            (tokens, identity)
            for tokens, identity in self.stored
            if self.model.match([*tokens, 0], **identity) < self.num_useful(tokens, identity)
        ]

    @action(4, when=lambda self: self.host)
    def begin_fetch(self) -> None:
        """Half of what the store has is asked for; now and then it is believed to have more than it has."""
        if self.rng.random() < self.patience:
            self.time_passes()
        store = self.background.store
        tokens, identity = self.rng.choice(self.missed() or [self.a_prompt(), *self.stored])
        names = self.names_of(tokens, identity)
        there = self.num_stored(names)
        believed = self.rng.choice([there, there, there, there + 1, there // 2, 10**6, 0])
        tokens = [*tokens, *self.some_tokens(self.rng.randint(0, 2))]
        ends = self.states_stored(names, believed)
        if self.host_states and self.rng.randint(0, 3) == 0:  # fewer, or some that nobody has
            each = self.model.every // self.block_size
            grid = range(each, min(believed, len(tokens)) + 1, each)
            ends = sorted(self.rng.sample(grid, self.rng.randint(0, len(grid))))
        bounds = {"num_blocks": believed, **({"checkpoints": ends} if ends or self.coin() else {})}
        call = f"begin_fetch({tokens}, {identity}, {bounds})"
        expected = outcome(self.model.begin_fetch, tokens, **identity, **bounds)
        got = outcome(self.subject.begin_fetch, self.token_input(tokens), **identity, **bounds)
        for name in ("number", "num_local", "num_tokens"):
            assert getattr(got, name) == getattr(expected, name), f"{call}: {name}"
        assert triples(got.blocks) == triples(expected.blocks), f"{call} -> {expected.blocks}"
        note(f"{call} -> {expected.number}: {expected.num_local}, {expected.num_tokens}, {expected.blocks}")
        operation = Operation(expected, got, hangs=self.rng.randint(0, 7) == 0)
        for (index, g, _), slot in zip(expected.blocks, expected.taken, strict=True):
            content = store.get((names[index], g)) if index < len(names) else None
            if content is not None and operation.num_whole == len(operation.left):
                operation.num_whole += 1
            content = JUNK if content is None or operation.hangs else content
            operation.left.append(partial(self.write_host_slot, slot, content))
        self.background.fetches.append(operation)
        self.compare()

    @action(6, when=lambda self: self.background.fetches)
    def end_fetch(self) -> None:
        operation = self.rng.choice(self.background.fetches)
        self.background.finish(operation)
        whole = 0 if operation.hangs else operation.num_whole
        self.both_end(operation, self.rng.choice([whole, whole, whole, 0, whole // 2]))

    def both_end(self, operation: Operation, num_ok: int) -> None:
        expected = outcome(self.model.end_fetch, operation.ours, num_ok)
        got = outcome(self.subject.end_fetch, operation.theirs, num_ok)
        self.same(f"end_fetch({operation.ours.number}, {num_ok})", expected, got, ())
        self.background.fetches.remove(operation)
        self.background.fetched.append(operation)
        self.compare()
        self.bad_operation(operation, lambda manager, fetch: manager.end_fetch(fetch, 0))

    @action(6, when=lambda self: self.background.fetched)
    def admit_fetched(self) -> None:
        operation = self.rng.choice(self.background.fetched)
        tokens, identity = self.rng.choice(self.visits) if self.visits and self.coin() else self.a_prompt()
        if not isinstance(self.both_admit(self.token_input(tokens), identity, self.bounds(), operation), Raised):
            self.background.fetched.remove(operation)
            self.bad_operation(operation, lambda manager, fetch: manager.release(fetch))

    @action(2, when=lambda self: self.background.fetched)
    def release(self) -> None:
        operation = self.rng.choice(self.background.fetched)
        self.background.fetched.remove(operation)
        self.both_call(f"release({operation.ours.number})", operation, lambda manager, fetch: manager.release(fetch))
        self.bad_operation(operation, lambda manager, fetch: manager.admit([1], fetched=fetch))

    def both_call(self, call: str, operation: Operation, do: Callable[[Any, Any], Any]) -> Any:
        expected = outcome(do, self.model, operation.ours)
        self.same(call, expected, outcome(do, self.subject, operation.theirs), (TooManySequences,))
        self.compare()
        return expected

    def bad_operation(self, operation: Operation, do: Callable[[Any, Any], Any]) -> None:
        if self.rng.randint(0, 3) == 0:
            assert isinstance(self.both_call("a wrong call", operation, do), Raised)

    @action(6, when=lambda self: self.host)
    def begin_spill(self) -> None:
        if self.rng.randint(0, 3):
            self.time_passes()
        self.spill(self.rng.choice([1, 2, 5, 10**6, 0]), self.rng.choice([None, None, 0, 1]))

    def spill(self, most: int, states: int | None = None) -> Operation:
        options = {} if states is None else {"max_states": states}
        expected, got = self.model.begin_spill(most, **options), self.subject.begin_spill(most, **options)
        note(f"begin_spill({most}, {options}) -> {expected.number}: {expected.blocks}")
        assert got.number == expected.number
        assert triples(got.blocks) == triples(expected.blocks), f"begin_spill({most}) -> {expected.blocks}"
        ours, theirs = [tuple(node) for node in expected.nodes], [tuple(node) for node in got.nodes]
        assert theirs == ours, f"begin_spill({most}) has nodes {theirs}, expected {ours}"
        operation = Operation(expected, got)
        for parent, parent_digest, salt, tokens, extra in expected.nodes:
            above = operation.names[parent] if parent >= 0 else parent_digest
            if above is None:
                operation.names += digests((self.weights, salt), [(tokens, extra)])
            else:
                operation.names.append(next(digests(above, [(tokens, extra)])))
        for row, (slot, (_, g, index)) in enumerate(zip(expected.slots, expected.blocks, strict=True)):
            right = self.content_of(expected.tree_nodes[index], g)
            prefix = self.truth_of(expected.tree_nodes[index])
            prompt = prefix.tokens, {"salt": prefix.salt, "extra": sorted(prefix.extra.items())}
            self.stored = [*[other for other in self.stored if other != prompt], prompt][-20:]
            operation.left.append(partial(self.read_slot, operation, row, slot, right))
        self.background.spills.append(operation)
        self.compare()
        return operation

    def read_slot(self, operation: Operation, row: int, slot: int, right: Content) -> None:
        content = self.in_host_slot(slot)
        if self.honest:
            assert content == right, f"spill {operation.ours.number} reads another prefix in host slot {slot}"
        operation.read[row] = content

    @action(6, when=lambda self: self.background.spills)
    def end_spill(self) -> None:
        """What was read is in the store, also where the manager is not told so."""
        operation = self.rng.choice(self.background.spills)
        self.background.spills.remove(operation)
        self.background.finish(operation)
        spill, names = operation.ours, operation.names
        for row, (_, g, index) in enumerate(spill.blocks):
            self.background.store[names[index], g] = operation.read[row]
        ok = [self.rng.randint(0, 3) > 0 for _ in spill.blocks]
        said = names if self.rng.randint(0, 3) else None
        self.bad_operation(operation, lambda manager, spill: manager.end_spill(spill, [*ok, True]))
        self.both_call(
            f"end_spill({spill.number}, {ok})", operation, lambda manager, spill: manager.end_spill(spill, ok, said)
        )
        self.bad_operation(operation, lambda manager, spill: manager.end_spill(spill, ok))

    # The prefix cache from outside

    @action(1, when=lambda self: self.model.node_of)
    def pin(self) -> None:
        tokens, identity = self.a_prompt()
        self.both("pin", self.token_input(tokens), **identity, also=(ValueError, TooManySequences))

    @action(1, when=lambda self: self.pins)
    def unpin(self) -> None:
        handle = self.rng.choice(self.pins)
        self.both("unpin", handle)
        self.gone = [*self.gone[-5:], handle]

    @action(1, when=lambda self: self.model.node_of)
    def reset_prefix_cache(self) -> None:
        if self.coin():
            self.weights += 1
            self.stored.clear()
            self.both("reset_prefix_cache")

    # Wrong calls: one action, so that they do not crowd out the right ones

    @action(3, when=lambda self: self.handles)
    def wrong_call(self) -> None:
        kinds = [self.no_such_sequence, self.not_now, self.bad_batch, self.bad_close, self.bad_prompt]
        kinds += [self.bad_step] * bool(self.runnable) + [self.bad_types] * bool(self.resting)
        kinds += [self.pin_for_a_sequence] * bool(self.pins) + [self.nothing_at_all]
        self.rng.choice(kinds)()

    def with_fault(self, right: list[int], wrong: int) -> list[int]:
        """A batch that is right but for one item, so that a call which fails halfway is seen."""
        place = self.rng.randint(0, len(right))
        return [*right[:place], wrong, *right[place:]]

    def no_such_sequence(self) -> None:
        garbage = [0, -1, 1, 1 << 24, (1 << 24) + self.max_seqs, 9 << 24, 2**63 - 1, -(2**63)]
        handle = self.rng.choice(self.gone if self.gone and self.coin() else garbage)
        if handle in self.handles or handle in self.pins:
            return
        batch = self.with_fault(self.resting, handle)
        ones = [1] * len(batch)
        fine = self.resting[:1] or [handle]
        calls: dict[str, Callable[[], Any]] = {
            "append": lambda: self.both("append", batch, ones),
            "append unknown": lambda: self.both("append", batch),
            "extend": lambda: self.both("extend", batch, ones, ones),
            "set_tokens": lambda: self.both("set_tokens", batch, ones, also=(ValueError,)),
            "trim": lambda: self.both("trim", handle, 0),
            "fork": lambda: self.both("fork", handle, 1, also=(TooManySequences,)),
            "reorder": lambda: self.both("reorder", batch, batch),
            "parents": lambda: self.both("reorder", fine, [handle]),
            "free": lambda: self.both("free", batch),
            "preempt": lambda: self.both("preempt", handle),
            "resume": lambda: self.both("resume", handle),
            "unpin": lambda: self.both("unpin", handle),
            "block_table": lambda: self.both("block_table", handle),
            "tokens": lambda: self.both("tokens", handle),
            "lengths": lambda: self.both("lengths", batch),
            "prepare": lambda: self.failing_prepare(batch, ones),
        }
        result = calls[self.rng.choice(sorted(calls))]()
        assert isinstance(result, Raised)

    def failing_prepare(self, seqs: Any, lens: Any) -> Any:
        result = self.run(seqs, lens)
        assert isinstance(result, Raised)
        return result

    def pin_for_a_sequence(self) -> None:
        pin = self.rng.choice(self.pins)
        batch = self.with_fault(self.resting, pin)
        name = self.rng.choice(["free", "append", "lengths", "trim", "preempt", "resume", "fork", "tokens"])
        args: tuple[Any, ...] = (batch,) if name in ("free", "append", "lengths") else (pin,)
        result = self.both(name, *args, *([0] if name == "trim" else []), also=(TooManySequences,))
        assert isinstance(result, Raised)

    def not_now(self) -> None:
        """Right calls on a sequence in the wrong state."""
        handle = self.rng.choice(self.handles)
        if handle not in self.preempted:
            self.both("resume", handle)
        else:
            self.failing_prepare([handle], [1])
        if handle not in self.resting:
            self.both("preempt", handle)
            self.both("fork", handle, 1, also=(TooManySequences,))
            self.both("reorder", [handle], self.handles[:1])
            self.both("reorder", self.handles[:1], [handle])
        if self.in_step(handle):
            self.both("trim", handle, 0)
        self.both("unpin", handle)

    def bad_batch(self) -> None:
        batch = self.some(self.handles)
        twice = self.with_fault(batch, batch[0])
        token = self.rng.choice([-1, 2**31, 2**40, -(2**31)])
        bad = [*self.some_tokens(len(batch) - 1), token]
        n = len(batch)
        unknowns = max(len(s.tokens) for s in self.model.sequences.values()) + 1
        calls: dict[str, Callable[[], Any]] = {
            "append twice": lambda: self.both("append", twice, [0] * len(twice)),
            "extend twice": lambda: self.both("extend", twice, [0] * len(twice), [1] * len(twice)),
            "free twice": lambda: self.both("free", twice),
            "append too few": lambda: self.both("append", batch, [0] * (n - 1)),
            "append too many": lambda: self.both("append", batch, [0] * (n + 1)),
            "extend counts": lambda: self.both("extend", batch, [0] * n, [1] * (n + 1)),
            "extend sum": lambda: self.both("extend", batch, [0] * (n + 1), [1] * n),
            "extend negative": lambda: self.both("extend", [*batch], [0] * n, [*[1] * (n - 1), -1]),
            "extend unknown negative": lambda: self.both("extend", [*batch], None, [*[1] * (n - 1), -1]),
            "append bad token": lambda: self.both("append", batch, bad),
            "extend bad token": lambda: self.both("extend", batch, bad, [1] * n),
            "set bad token": lambda: self.both("set_tokens", batch, bad),
            "set too many": lambda: self.both(
                "set_tokens", batch, [0] * (n - 1 + unknowns), [*[1] * (n - 1), unknowns]
            ),
            "reorder lengths": lambda: self.both("reorder", batch, batch[:-1]),
        }
        result = calls[self.rng.choice(sorted(calls))]()
        assert isinstance(result, Raised)

    def bad_step(self) -> None:
        batch = self.some(self.runnable)
        last = self.model.sequences[batch[-1]]
        too_long = len(last.tokens) - last.num_prepared + 1
        n = len(batch)
        calls: dict[str, Callable[[], Any]] = {
            "empty": lambda: self.host or self.failing_prepare([], []),
            "nothing": lambda: self.failing_prepare(batch, [*[1] * (n - 1), 0]),
            "negative": lambda: self.failing_prepare(batch, [*[1] * (n - 1), -1]),
            "too long": lambda: self.failing_prepare(batch, [*[1] * (n - 1), too_long]),
            "twice": lambda: self.failing_prepare([*batch, batch[0]], [1] * (n + 1)),
            "too few lengths": lambda: self.failing_prepare(batch, [1] * (n - 1)),
            "a float": lambda: self.failing_prepare(batch, [1.5] * n),
        }
        calls[self.rng.choice(sorted(calls))]()

    def bad_close(self) -> None:
        ids = [step_id for step_id, _ in self.runs]
        wrong = [0, -1, 10**9, self.model.last_step_id + 1, *range(1, (ids or [1])[0])[-2:]]
        for name, right in (("commit", ids[:1]), ("abort", ids[-1:])):
            candidates = [step_id for step_id in wrong + ids if step_id not in right]
            result = self.both(name, self.rng.choice(candidates))
            assert isinstance(result, Raised)
        if self.runs and self.runs[0][1]:
            step_id, rows = self.runs[0]
            full = [row.end - row.start for row in rows]
            for accepted in ([*full[:-1], full[-1] + 1], [*full[:-1], -1], full[:-1], [*full, 1], [0.5] * len(rows)):
                assert isinstance(self.both("commit", step_id, accepted), Raised)

    def bad_prompt(self) -> None:
        tokens, identity = self.a_prompt()
        n = len(tokens)
        bad: list[tuple[Any, dict[str, Any]]] = [
            ([], {}),
            ([*tokens, -1], {}),
            ([2**31, *tokens], {}),
            ("abc", {}),
            ([1.5], {}),
            (None, {}),
            (np.array([tokens]), {}),
            (np.array(tokens, np.float32), {}),
            (tokens, {"salt": "text"}),
            (tokens, {"salt": None}),
        ]
        bad += [
            (tokens, {"extra": [(n, b"x")]}),
            (tokens, {"extra": [(-1, b"x")]}),
            (tokens, {"extra": [(0, b"x"), (0, b"y")]}),
            ([*tokens, 0], {"extra": [(1, b"x"), (0, b"y")]}),
            (tokens, {"extra": [(0, "x")]}),
        ]
        wrong, how = self.rng.choice(bad)
        for name in ("admit", "match", "can_admit", "pin"):
            assert isinstance(self.both(name, wrong, **how, also=()), Raised)
        for reserve in (-1, 1.5):
            for name in ("admit", "can_admit"):
                assert isinstance(self.both(name, tokens, **identity, reserve=reserve), Raised)

    def bad_types(self) -> None:
        handle = self.rng.choice(self.resting)
        length = len(self.truths[handle].tokens)
        calls: list[tuple[Any, ...]] = [
            ("append", [0.5], [1]),
            ("append", "ab", [1]),
            ("append", [handle], [0.5]),
            ("append", np.array([[handle]]), [1]),
            ("extend", [handle], [1], [1.0]),
            ("extend", [handle], [1], None),
            ("set_tokens", [handle], "a"),
            ("trim", handle, 0.5),
            ("trim", handle, -1),
            ("trim", handle, length + 1),
            ("trim", "a", 0),
            ("fork", handle, 1.5),
            ("fork", handle, -1),
            ("free", 1.5),
            ("free", None),
            ("reorder", [handle], None),
            ("preempt", None),
            ("resume", 0.5),
            ("unpin", None),
            ("tokens", None),
            ("block_table", 0.5),
            ("lengths", "a"),
            ("commit", None),
            ("commit", 0.5),
            ("abort", "a"),
        ]
        name, *args = self.rng.choice(calls)
        assert isinstance(self.both(name, *args), Raised)

    def nothing_at_all(self) -> None:
        """Empty batches are no error and no change, but for a step."""
        for name, args in (("append", ([],)), ("extend", ([], [], [])), ("free", ([],)), ("reorder", ([], []))):
            assert self.both(name, *args) is None

    def teardown(self) -> None:
        """Whatever happened, everything can be closed and given back."""
        if not getattr(self, "finished", False):
            return  # the step before failed, or was cut short
        while self.runs:
            self.close("commit", 0)
        self.streams.finish()
        self.end_all()
        self.compare()
        assert self.subject.num_background_slots == 0
        for handle in self.pins:
            self.both("unpin", handle)
        handles = self.handles
        self.truths.clear()
        self.both("free", handles)
        assert self.subject.num_free_blocks == self.model.num_blocks
        assert not self.stateful or self.subject.num_free_states == self.model.num_states


def machine_for(
    driver: Driver,
    reference: Callable[..., ModelManager] = ModelManager,
    tiers: bool | None = None,
    states: bool | None = None,
) -> type[ManagerMachine]:
    parts = {"driver": driver, "reference": staticmethod(reference), "tiers": tiers, "states": states}
    return type("Machine", (ManagerMachine,), parts)
