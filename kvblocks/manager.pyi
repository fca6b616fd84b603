from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import Any, Literal, NamedTuple, Never, NoReturn, Protocol, Self, SupportsIndex, TypeAlias, final, overload

import numpy as np
import numpy.typing as npt
from typing_extensions import Buffer, disjoint_base

from kvblocks.config import CacheConfig, Chunk, State, Window

class _HasNumpy(Protocol):
    """A tensor: what lends its memory as a numpy array."""

    def numpy(self) -> npt.NDArray[Any]: ...

# A numpy array, a CPU tensor, another integer buffer (all three taken without a copy), a list, tuple or range, or one
# int. A `str` is none of these, nor is a list of floats.
_Ints: TypeAlias = SupportsIndex | Sequence[SupportsIndex] | npt.NDArray[np.integer[Any]] | Buffer | _HasNumpy
_Extra: TypeAlias = Sequence[tuple[int, bytes]]

class Admission(IntEnum):
    """Whether a prompt can be admitted: now, once blocks come free, or never to a pool of this size.

    Only `NOW` is true, so that `if manager.can_admit(tokens):` asks what it reads like.
    """

    NOW = 0
    LATER = 1
    NEVER = 2

    def __bool__(self) -> bool: ...

class Lengths(NamedTuple):
    """Token counts of a batch of sequences, each an int64 array [len(seqs)]."""

    num_cached: npt.NDArray[np.int64]
    num_computed: npt.NDArray[np.int64]
    reserved: npt.NDArray[np.int64]
    num_tokens: npt.NDArray[np.int64]
    num_loading: npt.NDArray[np.int64]

class Found(NamedTuple):
    """Tokens of a prefix that are found: in blocks of the device, and in host slots, from which they can be loaded."""

    device: int
    host: int

class SpilledNode(NamedTuple):
    """A block of tokens whose digest a spill asks for, and what comes before it, of which just one of three is there.

    Attributes:
        parent: the index of the block before it in `Spill.nodes`, or -1.
        parent_digest: the digest of the block before it, as `end_spill` was given it, or None.
        salt: that of its sequences where it is the first block of their prompts, else None.
        tokens: its token ids as little-endian int32.
        extra: what its tokens stand for beyond their ids, as of `block_extras`.
    """

    parent: int
    parent_digest: bytes | None
    salt: bytes | None
    tokens: bytes
    extra: bytes

class Stats(NamedTuple):
    """Totals over the successful calls of a manager: tokens for `prompt_tokens`, for `hit_tokens` and for those of them
    that came from the host, `host_hit_tokens`; blocks for `evictions`, `published`, `merged`, `copies`,
    `peak_used_blocks`, `loads`, `offloads` and `host_evictions`; slots of states for `state_copies`, for `checkpoints`
    that were left and for those of them that went for another state, `checkpoint_evictions`; else events.
    """

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

@disjoint_base
class StepArrays:
    """The host arrays that `BlockManager.prepare` fills for one forward pass.

    Args:
        input_ids, positions: int64 [max_tokens]; pads 0.
        slot_mapping: int64 [max_tokens]; pads -1.
        block_table: int32 [max_seqs, max_blocks_per_seq]; pads -1.
        seq_lens: int32 [max_seqs]: tokens of each row, this step's included; pads 0.
        query_start_loc: int32 [max_seqs + 1]; pads repeat `num_tokens`.
        copies: int64 [max_seqs * groups, 2]: (source, target) blocks, the first `num_copies` rows.
        kv_indptr, kv_indices, kv_last_page_len: int32 [max_seqs + 1], [max_seqs * max_blocks_per_seq] and [max_seqs]:
            the blocks of all rows one after the other, where each row's start, and the tokens in its last; all or none.
            Blocks that a group does not reach are left out.
        state_slots, state_zero, state_copies, state_drafts: int64 [max_seqs], [max_seqs], [max_seqs, 2] and
            [max_tokens], pads -1, for a manager that keeps states: the slot of each row; slots that begin at zero;
            (source, target) slots, the first `num_state_copies` rows; and where drafts are kept the slot for the state
            after each token. All or none.
        uploads: whether `prepare` calls `_upload` when it has filled them.

    Raises:
        TypeError: an array is not writable, contiguous or of its dtype.
        ValueError: the sizes of the arrays disagree.

    With several layer groups `block_table`, `slot_mapping`, `kv_indptr` and `kv_indices` have one more dimension in
    front, [groups, ...]; the number of dimensions of `block_table` says which it is.

    `kvblocks.StepBuffers` makes them, and carries them to a device.
    """

    num_groups: int
    max_seqs: int
    max_tokens: int
    max_blocks_per_seq: int
    num_seqs: int
    num_tokens: int
    num_copies: int
    manager: BlockManager | None
    @property
    def needs(self) -> int:
        """The number of the newest move that the pass waits for, 0 for none."""
    @property
    def first_move(self) -> int:
        """The number after that of the newest move that was handed out before this step."""
    @property
    def last_move(self) -> int:
        """The number of the newest move that was handed out with this step, 0 for none: `mark_moved` takes it."""
    @property
    def moves(self) -> npt.NDArray[np.int32]:
        """Moves between device and host that come with this step, in the order in which they are to be done.

        int32 [n, 4]: kind (0: from a device block to a host slot, 1: from a host slot to a device block), layer group,
        source, target. The number after that of the last group stands for states: source and target are then slots
        for states, of the device and of the host, each numbered from 0. None once they are marked. They are the
        manager's: an aborted step's are to be done as well.
        """
    @property
    def fills(self) -> int:
        """How often `prepare` has filled the arrays: while it stays, what was read off them holds."""
    @property
    def waits(self) -> bool:
        """Whether the pass waits for moves that nobody has marked as made."""
    num_state_copies: int
    num_state_zero: int
    max_query_len: int
    max_seq_len: int
    def __init__(
        self,
        input_ids: Any,
        positions: Any,
        slot_mapping: Any,
        block_table: Any,
        seq_lens: Any,
        query_start_loc: Any,
        copies: Any,
        kv_indptr: Any = None,
        kv_indices: Any = None,
        kv_last_page_len: Any = None,
        *,
        state_slots: Any = None,
        state_zero: Any = None,
        state_copies: Any = None,
        state_drafts: Any = None,
        uploads: bool = False,
    ) -> None: ...
    def _upload(self) -> None:
        """Carry the arrays to the device; called by `prepare` after it has filled them, where there is one."""
    def _pack(self, image: int, out: int) -> tuple[int, int, int, int]:
        """Write what changed in the arrays since the last call to `out`, the words first, then the list of patches.

        A patch is three int64: the first int32 of the image that it changes, where its words start in `out`, and how
        many int32 they are. At most `_pack_bytes(image bytes)` are written.

        Args:
            image: address that positions count from; all arrays lie after it as they do in the device's image.
            out: address of memory, a multiple of 8.

        Returns:
            bytes written, the int32 at which the patches start, their number, and the words of the longest.
        """
    def _pack_bytes(self, image_bytes: int) -> int:
        """Bytes that `_pack` writes at most for arrays that lie in `image_bytes`."""
    def _forget(self) -> None:
        """Let the next `_pack` bring everything: nothing is known of what the device holds."""

@final
class Fetch:
    """Blocks that come from outside of this process into host slots: see `BlockManager.begin_fetch`.

    Attributes:
        number: counts fetches and spills of the manager in the order of their begins, from 1.
        num_local: tokens of the prompt that this process could serve by itself, from both pools.
        num_tokens: tokens that it could serve once all `blocks` have come, at least `num_local`.
        blocks: what is to be brought, int32 [n, 3], read-only: index of the block in the prompt, layer group, host
            slot. In order of the index, then of the group. The group after the last one is that of states: such a row
            is the state after the last block of the planned length, and its slot one of those for checkpoints.
    """
    @property
    def number(self) -> int: ...
    @property
    def num_local(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def blocks(self) -> npt.NDArray[np.int32]: ...
    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    def __reduce__(self) -> NoReturn: ...

@final
class Spill:
    """Host slots that are copied out of this process: see `BlockManager.begin_spill`.

    Attributes:
        number: counts fetches and spills of the manager in the order of their begins, from 1.
        blocks: what is to be copied, int32 [n, 3], read-only: host slot, layer group, index into `nodes`. In rows of
            the group after the last one the slot is one of those for checkpoints: it has the state after the node's
            tokens.
        nodes: a `SpilledNode` for each block of tokens among them, and for those before it whose digests are not known
            yet; parents come before children.
    """
    @property
    def number(self) -> int: ...
    @property
    def blocks(self) -> npt.NDArray[np.int32]: ...
    @property
    def nodes(self) -> list[SpilledNode]: ...
    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    def __reduce__(self) -> NoReturn: ...

@final
class BlockManager:
    """Blocks, sequences and the prefix cache of one pool.

    Args:
        num_blocks: blocks in the pool, 1 to 2**31 - 2.
        block_size: tokens in a block.
        groups: the reach of each layer group, 1 to 64 of them: None for everything, a `Window` or a `Chunk`. Each
            sequence has one block table for each; all draw from one pool. A block that nothing in its group's reach
            needs any more is given back at `commit`. Beside them one `State`, whose `every` is a multiple of
            `block_size`, where layers keep a state for each sequence; the groups number from 0 without it.
        max_seqs: sequences and pins that may exist at once, at most 2**24.
        max_nodes: nodes of the prefix tree that may exist at once, by default `num_blocks + host_blocks`. Each
            published block has one, and each used host slot. A prefix of which only a window is kept keeps the nodes
            of its ancestors too. When no node is left, host slots are given up, then sequences stop publishing.
        max_open_steps: steps that may be prepared and not yet committed or aborted.
        prefix_caching: whether computed blocks are published and hit.
        watermark: share of the blocks, 0 to 1, that `admit` leaves free while sequences run. Pins and preempted
            sequences do not run.
        host_blocks: slots of a second pool in host memory, 0 to 2**31 - 2, each of one block of one group; needs
            `prefix_caching`. Blocks that are about to be evicted are copied there, and hits bring them back: see
            `StepArrays.moves`. 0: there is none, and nothing is spent on it.
        write_ahead: blocks that one `prepare` has copied to the host at most, 1 to 2**20.
        num_states: slots for states, 0 to 2**31 - 2, where one of the groups is a `State`: a sequence takes one at its
            first `prepare`, and what is left keeps checkpoints. 0 elsewhere.
        host_states: slots for checkpoints in host memory, beside `host_blocks`. What a sequence leaves, or what was
            hit, is copied there, and goes with its block as it does on the device; a hit loads it back.

    With a `State` a sequence that stands at a multiple of `every` tokens goes on in a copy of its state, as far as
    there are slots, and what it leaves behind is a checkpoint of that prefix once its blocks are published: hits end at
    checkpoints. The newest of a sequence frees the one before it, unless that was hit. Passes have to run in the order
    in which their steps were prepared, each launched before the moves of the next step.

    A hit needs every block of a full group, and of a group with a window or chunks those that its next token reaches.

    Sequences and pins are int handles that are never used twice. Arrays of integers may be numpy arrays, CPU tensors,
    other integer buffers (read in place: nobody may write them during the call), lists, or one int.

    A call that raises has changed nothing. There is one exception: where Python has no memory for what a call returns,
    the blocks that the call has evicted stay evicted, and a step whose sequences it was to name is closed.
    `NoFreeBlocks` carries `.needed` and `.free`; a handle that is not valid (any more) is `StaleSequence`.

    Thread-safety: every method may be called from any thread; concurrent callers see each call as one step. A child
    that `os.fork` makes has a copy of its own, as it was between two calls.
    """
    def __new__(
        cls,
        num_blocks: int,
        block_size: int,
        *,
        groups: Sequence[Window | Chunk | State | None] = (None,),
        max_seqs: int = 65536,
        max_nodes: int | None = None,
        max_open_steps: int = 8,
        prefix_caching: bool = True,
        watermark: float = 0.0,
        host_blocks: int = 0,
        write_ahead: int = 256,
        num_states: int = 0,
        host_states: int = 0,
    ) -> Self: ...
    @classmethod
    def for_config(
        cls,
        config: CacheConfig,
        *,
        every: int = 256,
        max_seqs: int = 65536,
        max_nodes: int | None = None,
        max_open_steps: int = 8,
        prefix_caching: bool = True,
        watermark: float = 0.0,
        host_blocks: int = 0,
        write_ahead: int = 256,
        num_states: int = 0,
        host_states: int = 0,
    ) -> Self:
        """A manager of the blocks of a cache: `num_blocks`, `block_size` and `groups` are the config's.

        Args:
            config: the `CacheConfig` of the engine.
            every: of the `State`, where layers keep tensors for a sequence; give `num_states` then.
            options: any other argument of `BlockManager`.
        """
    @property
    def num_resets(self) -> int: ...
    @property
    def moves_marked(self) -> int:
        """Number of the newest move that is marked as made, or ordered before whatever reads the blocks."""
    @property
    def host_blocks(self) -> int:
        """Slots for blocks in the host pool."""
    @property
    def host_states(self) -> int:
        """Slots for checkpoints in the host pool."""
    @property
    def num_free_host_blocks(self) -> int:
        """Host slots that hold no block."""
    @property
    def num_free_host_states(self) -> int:
        """Host slots for checkpoints that hold none."""
    @property
    def state_every(self) -> int:
        """`State.every` of the group that keeps a state, 0 where none does."""
    @property
    def num_states(self) -> int:
        """Slots for states."""
    @property
    def num_free_states(self) -> int:
        """Slots for states that a step can have now, checkpoints that nobody holds included."""
    def next_checkpoint(self, seq: int) -> int:
        """Where a pass over a prompt should end: the last multiple of `State.every` among the tokens of a sequence.

        Only the newest checkpoint of a sequence is kept, and a pass that ends elsewhere leaves none. 0 where no such
        position lies past the prepared tokens, or no group keeps a state.
        """
    def state_slot(self, seq: int) -> int:
        """The slot on which a sequence stands, -1 for none: before its first pass, where the caller keeps its state,
        and where no group keeps one.
        """
    @property
    def num_background_slots(self) -> int:
        """Host slots that fetches and spills hold, at most a quarter of those of blocks and of those of checkpoints."""
    @property
    def groups(self) -> tuple[Window | Chunk | None, ...]: ...
    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
    @property
    def block_size(self) -> int:
        """Tokens in a block."""
    @property
    def num_free_blocks(self) -> int:
        """Blocks that a call can have now, cached ones included."""
    @property
    def num_sequences(self) -> int:
        """Sequences that were admitted or forked and not freed, preempted ones included; pins are none."""
    @property
    def usage(self) -> float:
        """Share of the blocks that are not free, 0 to 1."""
    def admit(
        self,
        tokens: _Ints,
        *,
        salt: bytes = b"",
        extra: _Extra = (),
        reserve: SupportsIndex | None = None,
        max_hit: SupportsIndex | None = None,
        host: bool = True,
        fetched: Fetch | None = None,
    ) -> tuple[int, int]:
        """Start a sequence: hold the longest prefix hit and reserve slots for the tokens after it.

        Args:
            tokens: token ids [n], n >= 1, each 0 to 2**31 - 1.
            salt: only sequences of the same salt share blocks (a tenant, an adapter).
            extra: (position, bytes) pairs, positions rising: what a token stands for beyond its id (an image's hash).
            reserve: tokens after the hit to reserve slots for now; by default all.
            max_hit: tokens that the hit may have at most; by default all but the last. For whoever needs the logits or
                the hidden states of the prompt's last tokens again.
            host: whether the hit may go on over what lies in host slots. It is loaded by the moves of the next step,
                into blocks that count as needed; where these are not there the hit is cut until they are.
            fetched: an ended fetch, most often of this prompt: it is released once the sequence has its hit.

        Returns:
            (seq, num_cached): the handle, and the tokens whose K and V are there already, or on their way from the
            host: a multiple of `block_size`, and less than n.

        Raises:
            NoFreeBlocks: `.needed` new blocks, `.free` to be had.
            TooManySequences: `max_seqs` are there.
            ValueError, TypeError: `tokens`, `extra`, `reserve`, `max_hit` or `fetched` is not as above.
        """
    @overload
    def match(
        self,
        tokens: _Ints,
        *,
        salt: bytes = b"",
        extra: _Extra = (),
        max_hit: SupportsIndex | None = None,
        tiers: Literal[False] = False,
    ) -> int:
        """Tokens that are found in the prefix cache now, in host slots too. No effect.

        Args:
            tiers: whether to say how many tokens lie where, as a `Found`.

        `admit` finds as many, or fewer where windows or chunks let a prompt be longer than the pool and what follows
        the longest hit would not fit, and where no slot is free into which its checkpoint could be loaded.
        """
    @overload
    def match(
        self,
        tokens: _Ints,
        *,
        salt: bytes = b"",
        extra: _Extra = (),
        max_hit: SupportsIndex | None = None,
        tiers: Literal[True],
    ) -> Found:
        """Tokens that are found in the prefix cache now, in host slots too. No effect.

        Args:
            tiers: whether to say how many tokens lie where, as a `Found`.

        `admit` finds as many, or fewer where windows or chunks let a prompt be longer than the pool and what follows
        the longest hit would not fit, and where no slot is free into which its checkpoint could be loaded.
        """
    def blocks_needed(self, num_tokens: int, *, reserve: SupportsIndex | None = None, max_new_tokens: int = 1) -> int:
        """Blocks that a prompt needs to be computed and answered, alone and with nothing cached.

        The prompt is computed in steps of `reserve` tokens (None: in one), then new tokens one by one. The K and V of
        the last new token are never computed: they count for nothing. Blocks out of every group's reach are given back
        on the way, so with windows and chunks this is less than all tokens take.

        Args:
            num_tokens: length of the prompt, 1 to 2**31 - 1.
            reserve: as of `admit`, and the most tokens in a step. 0 counts as 1.
            max_new_tokens: tokens that the answer may have, at least 1.

        Raises:
            ValueError: a number is out of range, or prompt and answer pass 2**31 - 1 tokens.
        """
    def can_admit(
        self,
        tokens: _Ints,
        *,
        salt: bytes = b"",
        extra: _Extra = (),
        reserve: SupportsIndex | None = None,
        max_hit: SupportsIndex | None = None,
        host: bool = True,
        max_new_tokens: int = 1,
    ) -> Admission:
        """Whether a prompt can be served NOW, LATER or NEVER.

        NEVER: `blocks_needed` of it is more than the pool has, so that even alone it could not be computed and answered
        with `max_new_tokens` tokens in steps of at most `reserve`. NOW: `admit` with the same arguments succeeds now.
        LATER: once blocks or sequences are freed.
        """
    def append(self, seqs: _Ints, tokens: _Ints | None = None, *, extra: Iterable[_Extra] | None = None) -> None:
        """Add one token to each sequence; without `tokens`, a placeholder whose id `set_tokens` gives later.

        Args:
            extra: as of `extend`; the only position is 0.
        """
    def extend(
        self, seqs: _Ints, tokens: _Ints | None, counts: _Ints, *, extra: Iterable[_Extra] | None = None
    ) -> None:
        """Add `counts[i]` tokens to sequence i, taken from `tokens` [sum(counts)] in order; None: placeholders.

        Args:
            extra: what added tokens stand for beyond their ids, as of `admit`: for each sequence a list of (position,
                bytes) pairs, positions rising, counted from its first added token.

        Raises:
            ValueError: the numbers do not agree, a token or a position is out of range, or a sequence comes twice.
        """
    def set_tokens(self, seqs: _Ints, tokens: _Ints, counts: _Ints | None = None) -> None:
        """Give the first `counts[i]` placeholders of sequence i (by default one) their ids, from left to right.

        Raises:
            ValueError: a sequence has fewer placeholders.
        """
    def prepare(
        self, seqs: _Ints, query_lens: _Ints, step: StepArrays, *, keep_state: bool = False, own_state: bool = False
    ) -> int:
        """Reserve the next `query_lens[i]` tokens of sequence i and fill `step` for one forward pass over them.

        Args:
            seqs: handles [n], 1 <= n <= step.max_seqs, each once; row i of the step is sequence i. Where there are host
                slots n may be 0: the step is there for its moves, which bring cached blocks to the host, up to
                `write_ahead` of all that have no copy there.
            query_lens: [n], or one int for all; each at least 1.
            step: the arrays to fill. Where `step.last_move` is not 0 blocks have to be copied, those of `step.copies`
                and `step.moves`: `engine.move(step)` does it, and marks it. The pass waits for the moves up to
                `step.needs`. Where a group keeps a state, `step.state_slots` says where that of each row lies, after
                the copies of `step.state_copies` and with zeros in the slots of `step.state_zero`.
            keep_state: give each prepared token a slot for the state after it, in `step.state_drafts`, so that `commit`
                can keep the state after the last accepted one. The pass reads the slot of `step.state_slots` first,
                and writes to none but those of its tokens.
            own_state: the caller keeps the states of all rows outside of the slots, from here on as long as they run:
                no `abort`, `trim` or rejected token takes one along, and no row waits for a slot. `step.state_slots`
                says from which slot a row goes on, -1 where the caller has its state or there is none yet. Where the
                pass of a row ends on a multiple of `every`, and a slot can be had, `step.state_drafts` has it at the
                row's last token: the caller writes the state there before `commit`, which makes it a checkpoint.

        Returns:
            The step's id, for `commit` or `abort`.

        Raises:
            NoFreeBlocks: `.needed` by the whole batch, `.free` to be had.
            NoFreeStates: the same for slots of states.
            MovesPending: what an earlier step has to move was not moved.
            ValueError: a sequence has not as many tokens left, is preempted, or comes twice; the caller keeps its
                state, and `own_state` was left out; the step is too small; or `max_open_steps` are open.
        """
    def landed(self, number: int) -> None:
        """Say that all moves up to `number` are done: nothing that names their blocks or slots has to wait for them.

        Called now and then with what `engine.landed()` gives. Until then steps say that they wait for these moves.

        Raises:
            ValueError: the move is not marked as made.
        """
    def mark_moved(self, number: int) -> None:
        """Say that all moves up to `number`, a step's `last_move`, are made, or ordered before what reads the blocks.

        `engine.move(step)` does it; this is for those who keep K and V in tensors of their own.

        Raises:
            ValueError: there is no such move yet.
        """
    def commit(self, step_id: int, accepted: _Ints | None = None) -> list[int]:
        """Close the oldest open step: its pass is done, or ordered before whatever reads the blocks.

        Args:
            step_id: what `prepare` returned.
            accepted: [rows]: how many of a row's prepared tokens count as computed, by default all. Where fewer do, the
                sequence is cut after them.

        Returns:
            Handles of sequences that were preempted, as their state has seen tokens that do not count: where groups
            keep a state, those of which not all tokens were accepted though `prepare` was called without `keep_state`,
            and those of which a later step was aborted; none with `own_state`. `resume` starts them again at
            their newest checkpoint.

        Raises:
            MovesPending: what the step has to move was not moved.
            ValueError: it is not the oldest open step; `accepted` is out of range; or it cuts a sequence that a later
                open step has prepared too (abort that one first).
        """
    def abort(self, step_id: int) -> list[int]:
        """Take back the newest open step, as if it had never been prepared: sequences and their blocks are as before.

        What `prepare` evicted stays evicted, since the pass may have begun to write there; `stats` keep their counts.

        Returns:
            Handles of sequences that were preempted, where groups keep a state: those whose only slot the pass may have
            written. A sequence that an older open step has too is preempted when that closes, unless it is aborted and
            goes back further; until then it cannot be prepared.

        Raises:
            ValueError: it is not the newest open step.
        """
    def trim(self, seq: int, num_tokens: int) -> None:
        """Drop tokens from the end until `num_tokens` are left, and blocks that none of them needs.

        Where a group keeps a state, which cannot go back, a sequence that loses computed tokens is preempted, unless
        the caller keeps its state (see `prepare`).

        Raises:
            ValueError: `num_tokens` is not 0 to the present number, or the sequence is in an open step.
        """
    def begin_fetch(
        self,
        tokens: _Ints,
        *,
        num_blocks: SupportsIndex,
        checkpoints: _Ints = (),
        salt: bytes = b"",
        extra: _Extra = (),
    ) -> Fetch:
        """Take host slots for blocks of a prompt that are to be brought from outside of this process.

        One length is planned that every layer group can serve, from what is in this process and what is brought: the
        longest for which there are slots. Slots are taken for what is in neither pool; they are free, or evicted, and
        no move names them. Nobody finds them before `end_fetch`: until then they are the caller's to write. The host
        slots that the prompt's hit has already are kept from eviction. Fetches and spills together hold at most a
        quarter of the host slots for blocks, and of those for checkpoints; where that does not suffice the length is
        shorter.

        Where sequences have a state a hit ends at a checkpoint. So the planned length ends at one that is in this
        process, or at one of `checkpoints`: then a slot for it is taken too.

        A fetch that never ends keeps its slots, so that a read that hangs can do no harm.

        Args:
            tokens, salt, extra: as of `admit`; the last token is never served.
            num_blocks: leading blocks of the prompt that are believed to be there outside, in every group.
            checkpoints: [n] ascending numbers of blocks, up to `num_blocks`, after which the state is believed to be
                there too; each is a multiple of `every` tokens.

        Returns:
            A `Fetch`, also where nothing is to be brought: each is to be ended and released.

        Raises:
            ValueError: there is no host pool, or none for checkpoints, and some are given; a number is out of range,
                or no multiple of `every`; they do not ascend.
        """
    def end_fetch(self, fetch: Fetch, num_ok: SupportsIndex) -> int:
        """Say how much of a fetch is there: no call writes to its slots any more.

        What is whole is found from now on, as far as every group can serve; the other slots are free. It stays held
        until `admit(..., fetched=fetch)` or `release(fetch)`.

        Args:
            num_ok: leading rows of `fetch.blocks` that are whole and verified.

        Returns:
            Tokens of the prompt that can now be served, up to the planned length. 0 where the prefix cache was reset
            since the fetch began: what it brought belongs to nobody.

        Raises:
            ValueError: `num_ok` is out of range; the fetch has ended, or is another manager's.
        """
    def release(self, fetch: Fetch) -> None:
        """Let go of an ended fetch without admitting a sequence: what it brought may be evicted.

        Raises:
            ValueError: it has not ended, was released before, or is another manager's.
        """
    def begin_spill(self, max_blocks: SupportsIndex, *, max_states: SupportsIndex | None = None) -> Spill:
        """Hold host slots whose blocks or states are to be copied out of this process, and say what they are.

        They are taken from two queues, that of checkpoints before that of blocks, the first filled first: of slots that
        hang in the prefix tree, that no move names any more, and that are not known to be outside. They may be read
        until `end_spill`, and are not evicted. Fetches and spills together hold at most a quarter of each kind.

        Args:
            max_blocks: slots to hold at most, of both kinds. There may be fewer, or none.
            max_states: of these, slots of checkpoints; None for no other bound.

        Raises:
            ValueError: there is no host pool; a number is negative.
        """
    def end_spill(
        self,
        spill: Spill,
        ok: Sequence[bool] | npt.NDArray[np.bool_],
        digests: Iterable[bytes] | None = None,
    ) -> None:
        """Let go of the slots of a spill.

        Args:
            ok: a bool for each row of `spill.blocks`: whether the block is there outside now. It is not spilled again
                as long as its slot keeps it and the prefix cache is not reset. The others go to the queue's end.
            digests: bytes [32] for each of `spill.nodes`, kept with them, so that later spills need not ask; or None.

        Raises:
            ValueError: `ok` or `digests` has another length; the spill has ended, or is another manager's.
            TypeError: they are not bools or bytes.
        """
    def block_extras(self, extra: _Extra, num_blocks: SupportsIndex) -> list[bytes]:
        """The extra bytes of each of the first blocks of a prompt as `SpilledNode.extra` has them, b"" for none.

        For each token that has some: its offset in the block and their length, as int64, the bytes, the length again.

        Args:
            extra: (position, bytes) pairs, as of `admit`.
            num_blocks: how many blocks; pairs after them are left out.
        """
    def fork(self, seq: int, n: int = 1) -> list[int]:
        """Make n children of a sequence in no open step. They share every block that holds computed tokens.

        Raises:
            ValueError: it is in an open step, is preempted, or has computed placeholders.
            TooManySequences: `max_seqs` would be passed.
        """
    def reorder(self, seqs: _Ints, parents: _Ints) -> None:
        """Make each `seqs[i]` a child of `parents[i]` as it is before the call, keeping its handle: one beam step.

        Raises:
            ValueError: a sequence comes twice in `seqs`, or one of either is in an open step, preempted, or (a parent)
                has computed placeholders.
        """
    def free(self, seqs: _Ints) -> None:
        """End sequences. One in an open step keeps its blocks until that step closes; its handle is stale at once."""
    def preempt(self, seq: int) -> None:
        """Give back all blocks of a sequence in no open step; its tokens stay, for `resume`.

        Raises:
            ValueError: it is in an open step, or preempted already.
        """
    def resume(
        self,
        seq: int,
        *,
        reserve: SupportsIndex | None = None,
        max_hit: SupportsIndex | None = None,
        host: bool = True,
    ) -> int:
        """Admit a preempted sequence again with the tokens it has; the watermark does not apply.

        Args:
            reserve: as of `admit`. By default all tokens, and where groups with windows or chunks let a sequence be
                longer than the pool, the first one after the hit.
            max_hit, host: as of `admit`.

        Returns:
            num_cached: tokens whose K and V are still there, or on their way from the host.

        Raises:
            NoFreeBlocks: as `admit`.
            ValueError: it is not preempted.
        """
    def pin(self, tokens: _Ints, *, salt: bytes = b"", extra: _Extra = ()) -> int:
        """Keep the longest published prefix of `tokens`, in whole blocks, from eviction.

        Where a group keeps a state, the prefix ends at a checkpoint.

        Returns:
            A handle for `unpin`.

        Raises:
            ValueError: no block of it is published, or no checkpoint is there.
        """
    def unpin(self, handle: int) -> None:
        """Let go of a pin."""
    def block_table(self, seq: int) -> npt.NDArray[np.int32]:
        """The blocks of a sequence in order, int32 [blocks], with several groups [groups, blocks]; -1: out of reach."""
    def tokens(self, seq: int) -> npt.NDArray[np.int32]:
        """The token ids of a sequence, -1 for placeholders: int32 [num_tokens]."""
    def lengths(self, seqs: _Ints) -> Lengths:
        """`Lengths` of a batch: five int64 arrays [n]. Of the cached tokens `num_loading` are on their way from the
        host, as far as `landed` was told.
        """
    def stats(self) -> Stats:
        """`Stats` of the manager so far."""
    def reset_prefix_cache(self) -> None:
        """Unpublish every block, held ones too (new weights).

        Sequences admitted before never publish again, and pins hold nothing any more: nobody could reach it. Fetches
        that have not ended bring nothing, and what is known to be outside is forgotten.
        """
    def audit(self) -> None:
        """Derive the whole state again, in O(blocks + nodes + tokens held).

        Raises:
            InvariantViolation: the first broken invariant, by number, and where.
        """
    def __reduce__(self) -> NoReturn: ...
