# cython: auto_pickle=False, autotestdict=False
"""The block manager: which blocks hold which tokens of which sequence, and the arrays that tell a kernel.

The edge between Python and the bookkeeping in `core/`: arguments become C arrays, one call under the lock does
the work, and a fault becomes an exception. Knows no torch and moves no K or V.
"""

cimport cython
from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from core.memory cimport MAX_GROUPS, MAX_INT32, SLOT_MASK, grab, grab_zeroed, map_zeroed, unmap
from core.ints cimport as_int, at, bad_token, close_ints, copy_tokens, Ints, kvb_bits, open_ints, unopened
from core.text cimport (
    Blob, blob_drop, blob_new, borrow_text, clear_text, Extra, grow_text, Mark, note_tail, Paging, paging_of, read_text,
    Text,
)
from core.tree cimport NODE_HEAD, hash_extra, Line, node_at, Tree, tree_walk
from core.states cimport Standing, States, states_free, StateSlot
from core.host cimport (
    DIGEST_BYTES, FETCHED, FETCHING, LOAD, Host, count_moves, host_free, most_moves, Move, Shadow, Slot, SlotPool, Work,
)
from core.pool cimport Block, Pool, pool_free, pool_step, Step
from core.sequences cimport (
    BAD_ACCEPTED, BAD_COUNT, BAD_QUERY, BAD_TOKEN, BAD_TRIM, COMPUTED_UNKNOWN, EXTRA_SIZE, IN_STEP, IS_PIN,
    IS_PREEMPTED, IS_SEQUENCE, LATER_STEP, NO_BLOCKS, NO_MEMORY, NO_SLOTS, NO_STEP, NOT_ENOUGH_TOKENS, NOT_NEWEST,
    LOST_STATE, NO_STATES, NOT_OLDEST, NOT_PREEMPTED, NOT_UNKNOWN, NOTHING_TO_PIN, OUT_OF_REACH, OWN_STATE,
    SIZE_ACCEPTED, SIZE_TOKENS, STALE, STEP_BLOCKS, STEP_GROUPS, STEP_LIMIT, STEP_SEQS, STEP_STATES, STEP_TOKENS,
    TOO_LONG, TWICE, UNMOVED, WATERMARK, blocks_for, Core, core_append, core_extend, core_forget_resume, core_fork,
    core_free, core_preempt, core_reorder, core_reset, core_set_tokens, core_take_back, core_trim, core_unpin, Counters,
    Fault, find, has_room, Marks, num_loading, Seq, standing_on,
)
from core.admission cimport (
    DEVICE, HOST, Cached, core_admit, core_pin, core_resume, hit_limit, late_rows, longest_hit, most_ever,
    plan_admission,
)
from core.background cimport (
    NAMED, OF_ROOT, Begun, core_begin_fetch, core_begin_spill, core_end_fetch, core_end_spill, core_release, free_work,
)
from core.arrays cimport PADDING, PATCH_WORDS, int32_array, int64_array, max_patches, Pack, pack_step
from core.steps cimport core_abort, core_commit, core_prepare
from core.audit cimport audit_core, Finding
from kvblocks.step_arrays cimport Arrays, TableRow

import gc
import itertools
import os
import struct
import weakref
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from kvblocks.arguments import MISSING as _MISSING, check_arguments
from kvblocks.config import CacheConfig, Chunk, State, Window
from kvblocks.errors import (
    InvariantViolation, MovesPending, NoFreeBlocks, NoFreeStates, StaleSequence, TooManySequences,
)

cdef bytes _salt_mark = struct.pack("=q", -1)   # the offset of the salt, among the extra bytes of a first block

_manager_ids = itertools.count(1)
cdef dict _managers = {}    # weak references by number
cdef cython.pymutex _fork   # of whoever forks, or makes a manager
cdef bint _forking = False, _collects = False
cdef list _held = []  # managers whose locks the thread that forks has taken


def _before_fork():
    """Take every lock: a child that was copied while another thread had one would wait for ever.

    Nothing here runs an interpreter's loop, so no signal's handler comes in between: an exception would be ignored, and
    the fork made all the same.
    """
    global _forking, _collects
    _fork.acquire()
    _forking, _collects = True, gc.isenabled()
    gc.disable()    # a finalizer that frees a sequence would wait for this very thread
    for reference in list(_managers.values()):
        manager = reference()
        if manager is not None:
            _held.append(manager)
            (<BlockManager>manager).lock.acquire()


def _after_fork():
    global _forking
    if not _forking:
        return
    while _held:
        (<BlockManager>_held.pop()).lock.release()
    _forking = False
    if _collects:
        gc.enable()
    _fork.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


class Admission(IntEnum):
    """Whether a prompt can be admitted: now, once blocks come free, or never to a pool of this size.

    Only `NOW` is true, so that `if manager.can_admit(tokens):` asks what it reads like.
    """

    NOW = 0
    LATER = 1
    NEVER = 2

    def __bool__(self):
        return self is Admission.NOW


class Lengths(NamedTuple):
    """Token counts of a batch of sequences, each an int64 array [len(seqs)]."""

    num_cached: np.ndarray
    num_computed: np.ndarray
    reserved: np.ndarray
    num_tokens: np.ndarray
    num_loading: np.ndarray


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
    that were left and for those of them that went for another state, `checkpoint_evictions`; else events."""

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


cdef struct Prompt:     # what `admit` and its like were given
    Ints tokens
    Text text           # emptied once a sequence has taken it over


cdef int64_t bounded(object value, str name, int64_t low, int64_t high) except? -1:
    cdef int64_t number = as_int(value, name)
    if number < low or number > high:
        raise ValueError(f"{name}={number} must be {low} to {high}")
    return number


cdef class StepArrays:
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

    def __init__(
        self, input_ids=_MISSING, positions=_MISSING, slot_mapping=_MISSING, block_table=_MISSING, seq_lens=_MISSING,
        query_start_loc=_MISSING, copies=_MISSING, kv_indptr=None, kv_indices=None, kv_last_page_len=None, *more,
        state_slots=None, state_zero=None, state_copies=None, state_drafts=None, uploads=False, **unknown,
    ):
        needed = {
            "input_ids": input_ids, "positions": positions, "slot_mapping": slot_mapping, "block_table": block_table,
            "seq_lens": seq_lens, "query_start_loc": query_start_loc, "copies": copies,
        }
        check_arguments(type(self).__name__, needed, more, unknown, 10)
        if self._begun:
            raise RuntimeError("StepArrays is initialised once")
        cdef Arrays* a = &self.arrays
        self._begun = True  # a buffer's owner may run any code, this one too
        cdef list views = []
        table = memoryview(block_table)
        if table.ndim != 2 and table.ndim != 3:
            raise ValueError(f"block_table must have two dimensions, or three with groups, not {table.ndim}")
        cdef Py_ssize_t groups = table.shape[0] if table.ndim == 3 else 1
        cdef Py_ssize_t max_seqs = table.shape[table.ndim - 2], max_blocks = table.shape[table.ndim - 1]
        cdef Py_ssize_t max_tokens = len(input_ids)
        if not 1 <= groups <= MAX_GROUPS:
            raise ValueError(f"{groups=} must be 1 to {MAX_GROUPS}")
        if not (1 <= max_seqs <= MAX_INT32 and 1 <= max_blocks <= MAX_INT32 and 1 <= max_tokens <= MAX_INT32):
            raise ValueError(f"{max_seqs=}, {max_blocks=} and {max_tokens=} must be 1 to {MAX_INT32}")
        a.input_ids = int64_array(input_ids, "input_ids", max_tokens, views)
        a.positions = int64_array(positions, "positions", max_tokens, views)
        a.slot_mapping = int64_array(slot_mapping, "slot_mapping", groups * max_tokens, views)
        a.block_table = int32_array(block_table, "block_table", groups * max_seqs * max_blocks, views)
        a.seq_lens = int32_array(seq_lens, "seq_lens", max_seqs, views)
        a.query_start_loc = int32_array(query_start_loc, "query_start_loc", max_seqs + 1, views)
        a.copies = int64_array(copies, "copies", groups * max_seqs * 2, views)
        if kv_indices is not None:
            a.kv_indptr = int32_array(kv_indptr, "kv_indptr", groups * (max_seqs + 1), views)
            a.kv_indices = int32_array(kv_indices, "kv_indices", groups * max_seqs * max_blocks, views)
            a.kv_last_page_len = int32_array(kv_last_page_len, "kv_last_page_len", max_seqs, views)
        else:
            a.kv_indices = NULL
        if state_slots is not None:
            a.state_slots = int64_array(state_slots, "state_slots", max_seqs, views)
            a.state_zero = int64_array(state_zero, "state_zero", max_seqs, views)
            a.state_copies = int64_array(state_copies, "state_copies", max_seqs * 2, views)
            a.state_drafts = int64_array(state_drafts, "state_drafts", max_tokens, views)
        else:
            a.state_slots = NULL
        self._uploads = uploads
        a.rows = <TableRow*>grab_zeroed(max_seqs, sizeof(TableRow))
        if a.rows == NULL:
            raise MemoryError(f"no memory for {max_seqs} rows")
        if uploads:
            a.sent = <TableRow*>grab_zeroed(max_seqs, sizeof(TableRow))
            a.sent_zeros = <int32_t*>grab_zeroed(groups * max_seqs, sizeof(int32_t))
            a.patches = <int64_t*>grab(max_patches(groups, max_seqs) * PATCH_WORDS * sizeof(int32_t))
            if a.sent == NULL or a.sent_zeros == NULL or a.patches == NULL:
                raise MemoryError(f"no memory for {max_seqs} rows")
        a.sent_seqs = a.sent_tokens = a.sent_state_rows = a.sent_state_zero = a.sent_state_drafts = 0
        a.num_state_rows = a.num_state_zero = a.num_state_copies = a.num_state_drafts = a.last_state_zero = 0
        self._views = views
        a.num_groups = <int32_t>groups
        a.max_seqs, a.max_blocks_per_seq, a.max_tokens = max_seqs, max_blocks, max_tokens
        a.num_seqs = a.num_tokens = a.num_copies = a.max_query_len = a.max_seq_len = 0
        a.needs = a.first_move = a.last_move = a.fills = 0
        self.manager = None
        cdef Py_ssize_t i
        memset(a.input_ids, 0, max_tokens * sizeof(int64_t))
        memset(a.positions, 0, max_tokens * sizeof(int64_t))
        for i in range(groups * max_tokens):
            a.slot_mapping[i] = -1
        memset(a.block_table, PADDING, groups * max_seqs * max_blocks * sizeof(int32_t))
        memset(a.seq_lens, 0, max_seqs * sizeof(int32_t))
        memset(a.query_start_loc, 0, (max_seqs + 1) * sizeof(int32_t))
        if a.kv_indices != NULL:
            memset(a.kv_indptr, 0, groups * (max_seqs + 1) * sizeof(int32_t))
            memset(a.kv_indices, 0, groups * max_seqs * max_blocks * sizeof(int32_t))
            memset(a.kv_last_page_len, 0, max_seqs * sizeof(int32_t))
        if a.state_slots != NULL:
            memset(a.state_slots, PADDING, max_seqs * sizeof(int64_t))
            memset(a.state_zero, PADDING, max_seqs * sizeof(int64_t))
            memset(a.state_copies, PADDING, 2 * max_seqs * sizeof(int64_t))
            memset(a.state_drafts, PADDING, max_tokens * sizeof(int64_t))

    def __dealloc__(self):
        free(self.arrays.rows)
        free(self.arrays.sent)
        free(self.arrays.sent_zeros)
        free(self.arrays.patches)

    @property
    def num_groups(self):
        return self.arrays.num_groups

    @property
    def max_seqs(self):
        return self.arrays.max_seqs

    @property
    def max_tokens(self):
        return self.arrays.max_tokens

    @property
    def max_blocks_per_seq(self):
        return self.arrays.max_blocks_per_seq

    @property
    def num_seqs(self):
        return self.arrays.num_seqs

    @property
    def num_tokens(self):
        return self.arrays.num_tokens

    @property
    def num_copies(self):
        return self.arrays.num_copies

    @property
    def num_state_copies(self):
        return self.arrays.num_state_copies

    @property
    def num_state_zero(self):
        return self.arrays.num_state_zero

    @property
    def max_query_len(self):
        return self.arrays.max_query_len

    @property
    def max_seq_len(self):
        return self.arrays.max_seq_len

    @property
    def needs(self):
        """The number of the newest move that the pass waits for, 0 for none."""
        return self.arrays.needs

    @property
    def first_move(self):
        """The number after that of the newest move that was handed out before this step."""
        return self.arrays.first_move

    @property
    def last_move(self):
        """The number of the newest move that was handed out with this step, 0 for none: `mark_moved` takes it."""
        return self.arrays.last_move

    @property
    def moves(self):
        """Moves between device and host that come with this step, in the order in which they are to be done.

        int32 [n, 4]: kind (0: from a device block to a host slot, 1: from a host slot to a device block), layer group,
        source, target. The number after that of the last group stands for states: source and target are then slots
        for states, of the device and of the host, each numbered from 0. None once they are marked. They are the
        manager's: an aborted step's are to be done as well.
        """
        return (<BlockManager>self.manager).handed_out(self.arrays.last_move) if self.manager is not None else (
            np.empty((0, 4), np.int32)
        )

    @property
    def fills(self):
        """How often `prepare` has filled the arrays: while it stays, what was read off them holds."""
        return self.arrays.fills

    @property
    def waits(self):
        """Whether the pass waits for moves that nobody has marked as made."""
        return self.manager is not None and self.arrays.last_move > self.manager.moves_marked

    def _upload(self):
        """Carry the arrays to the device; called by `prepare` after it has filled them, where there is one."""

    def _pack(self, size_t image, size_t out):
        """Write what changed in the arrays since the last call to `out`, the words first, then the list of patches.

        A patch is three int64: the first int32 of the image that it changes, where its words start in `out`, and how
        many int32 they are. At most `_pack_bytes(image bytes)` are written.

        Args:
            image: address that positions count from; all arrays lie after it as they do in the device's image.
            out: address of memory, a multiple of 8.

        Returns:
            bytes written, the int32 at which the patches start, their number, and the words of the longest.
        """
        cdef Pack pack
        if self.arrays.sent == NULL:
            raise RuntimeError("these StepArrays were made without uploads=True")
        with nogil:
            pack_step(&self.arrays, <char*>image, <int32_t*>out, &pack)
        return (pack.words + pack.count * PATCH_WORDS) * sizeof(int32_t), pack.words, pack.count, pack.longest

    def _pack_bytes(self, Py_ssize_t image_bytes):
        """Bytes that `_pack` writes at most for arrays that lie in `image_bytes`."""
        cdef const Arrays* a = &self.arrays
        return image_bytes + 8 + max_patches(a.num_groups, a.max_seqs) * PATCH_WORDS * sizeof(int32_t)

    def _forget(self):
        """Let the next `_pack` bring everything: nothing is known of what the device holds."""
        cdef Arrays* a = &self.arrays
        cdef Py_ssize_t i
        a.sent_seqs, a.sent_tokens = a.max_seqs, a.max_tokens
        a.sent_state_rows = a.sent_state_zero = a.max_seqs
        a.sent_state_drafts = a.max_tokens
        for i in range(a.max_seqs if a.sent != NULL else 0):
            a.sent[i].manager, a.sent[i].length = -1, <int32_t>a.max_blocks_per_seq


@cython.final
cdef class Fetch:
    """Blocks that come from outside of this process into host slots: see `BlockManager.begin_fetch`.

    Attributes:
        number: counts fetches and spills of the manager in the order of their begins, from 1.
        num_local: tokens of the prompt that this process could serve by itself, from both pools.
        num_tokens: tokens that it could serve once all `blocks` have come, at least `num_local`.
        blocks: what is to be brought, int32 [n, 3], read-only: index of the block in the prompt, layer group, host
            slot. In order of the index, then of the group. The group after the last one is that of states: such a row
            is the state after the last block of the planned length, and its slot one of those for checkpoints.
    """

    cdef Work* work     # NULL once it is released
    cdef BlockManager manager
    cdef readonly int64_t number, num_local, num_tokens
    cdef readonly object blocks

    def __init__(self):
        raise TypeError("a Fetch is made by BlockManager.begin_fetch")

    def __reduce__(self):
        raise TypeError("a Fetch cannot be pickled or copied: it holds slots of its manager")

    def __repr__(self):
        return f"Fetch(number={self.number}, num_tokens={self.num_tokens}, blocks={len(self.blocks)})"


@cython.final
cdef class Spill:
    """Host slots that are copied out of this process: see `BlockManager.begin_spill`.

    Attributes:
        number: counts fetches and spills of the manager in the order of their begins, from 1.
        blocks: what is to be copied, int32 [n, 3], read-only: host slot, layer group, index into `nodes`. In rows of
            the group after the last one the slot is one of those for checkpoints: it has the state after the node's
            tokens.
        nodes: a `SpilledNode` for each block of tokens among them, and for those before it whose digests are not known
            yet; parents come before children.
    """

    cdef Work* work     # NULL once it has ended
    cdef BlockManager manager
    cdef readonly int64_t number
    cdef readonly object blocks
    cdef readonly list nodes

    def __init__(self):
        raise TypeError("a Spill is made by BlockManager.begin_spill")

    def __reduce__(self):
        raise TypeError("a Spill cannot be pickled or copied: it holds slots of its manager")

    def __repr__(self):
        return f"Spill(number={self.number}, blocks={len(self.blocks)}, nodes={len(self.nodes)})"


@cython.final
cdef class BlockManager:
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

    cdef object __weakref__

    cdef Core core
    cdef readonly tuple groups
    cdef readonly int64_t num_resets  # calls of reset_prefix_cache
    cdef int32_t slots  # as many as were mapped; core.max_seqs shrinks when one is retired
    cdef cython.pymutex lock

    def __cinit__(
        self, num_blocks=_MISSING, block_size=_MISSING, *more, groups=(None,), max_seqs=65536, max_nodes=None,
        max_open_steps=8, prefix_caching=True, watermark=0.0, host_blocks=0, write_ahead=256,
        num_states=0, host_states=0, **unknown,
    ):
        check_arguments("BlockManager", {"num_blocks": num_blocks, "block_size": block_size}, more, unknown, 2)
        cdef Core* c = &self.core
        cdef Pool* p = &c.pool
        cdef Tree* t = &p.tree
        cdef int32_t blocks = <int32_t>bounded(num_blocks, "num_blocks", 1, MAX_INT32 - 1)
        cdef int32_t size = <int32_t>bounded(block_size, "block_size", 1, MAX_INT32)
        cdef int32_t slots = <int32_t>bounded(host_blocks, "host_blocks", 0, MAX_INT32 - 1)
        cdef int32_t ahead = <int32_t>bounded(write_ahead, "write_ahead", 1, 1 << 20)
        cdef int32_t nodes = <int32_t>min(<int64_t>blocks + slots, MAX_INT32 - 1)
        if max_nodes is not None:
            nodes = <int32_t>bounded(max_nodes, "max_nodes", 0, MAX_INT32 - 1)
        cdef int32_t states = <int32_t>bounded(num_states, "num_states", 0, MAX_INT32 - 1)
        cdef int32_t checkpoints = <int32_t>bounded(host_states, "host_states", 0, MAX_INT32 - 1)
        self.groups = checked_groups(groups, c, states, size)
        if isinstance(watermark, bool) or not isinstance(watermark, (int, float)):
            raise TypeError(f"watermark must be a number, not {type(watermark).__name__}")
        if not 0.0 <= watermark <= 1.0:
            raise ValueError(f"watermark={watermark} must be 0 to 1")
        cdef bint caching = boolean(prefix_caching, "prefix_caching")
        if slots and not caching:
            raise ValueError(f"{host_blocks=} needs prefix_caching=True: host slots keep published blocks")
        if checkpoints and not (slots and states):
            raise ValueError(
                f"{host_states=} needs num_states= and host_blocks=, each at least 1: checkpoints of the device are "
                "copied there, and go with their blocks"
            )
        if checkpoints and max(<int64_t>blocks + states, <int64_t>slots + checkpoints) > MAX_INT32 - 1:
            raise ValueError(
                f"{num_blocks=} and {num_states=}, or {host_blocks=} and {host_states=}, are more than {MAX_INT32 - 1} "
                "together"
            )
        self.slots = c.max_seqs = <int32_t>bounded(max_seqs, "max_seqs", 1, SLOT_MASK + 1)
        p.max_steps = <int32_t>bounded(max_open_steps, "max_open_steps", 1, 1024)
        c.block_size = t.block_size = size
        t.paging = paging_of(size)
        c.shift = (<object>size).bit_length() - 1 if size & (size - 1) == 0 else -1
        c.caching = caching
        c.watermark = <int32_t>(watermark * blocks)
        c.uid = next(_manager_ids)
        c.unused_seq = -1
        t.max_nodes = nodes if caching else 0
        t.fresh = 1
        t.seal, t.seed = struct.unpack("QQ", os.urandom(16))
        t.num_groups = c.num_groups
        t.width = (NODE_HEAD + c.num_groups * sizeof(int32_t) + 7) & ~<size_t>7
        t.num_lines = <uint32_t>t.max_nodes // 6 + 1
        p.queue_mask = 1
        # Room for holes too, as far as an index of the queue still is an int32.
        while p.queue_mask < MAX_INT32 and p.queue_mask < <uint32_t>blocks + <uint32_t>blocks // 2:
            p.queue_mask = 2 * p.queue_mask + 1
        # Zeroed memory that is not touched before it is used: a large pool costs nothing until it fills.
        p.num_blocks = blocks
        p.blocks = <Block*>map_zeroed(blocks, sizeof(Block))
        p.queue = <int32_t*>map_zeroed(<size_t>p.queue_mask + 1, sizeof(int32_t))
        p.stack = <int32_t*>map_zeroed(blocks, sizeof(int32_t))
        p.steps = <Step*>grab_zeroed(p.max_steps, sizeof(Step))
        c.seqs = <Seq*>map_zeroed(c.max_seqs, sizeof(Seq))
        t.nodes = <char*>map_zeroed(<size_t>t.max_nodes + 1, t.width)
        t.tokens = <int32_t*>map_zeroed(<size_t>t.max_nodes + 1, size * sizeof(int32_t))
        t.lines = <Line*>map_zeroed(t.num_lines, sizeof(Line))
        t.key = <uint32_t*>map_zeroed(<size_t>size + 2, sizeof(uint32_t))
        if (
            p.blocks == NULL or p.stack == NULL or p.queue == NULL or p.steps == NULL or c.seqs == NULL
            or t.nodes == NULL or t.tokens == NULL or t.lines == NULL or t.key == NULL
        ):
            beside = f" and host_blocks={slots} slots" if slots else ""
            raise MemoryError(
                f"no memory to keep books of num_blocks={blocks} blocks of block_size={size} tokens{beside}"
            )
        if slots:
            open_host(c, slots, checkpoints, states if checkpoints else 0, ahead)
        if states:
            open_states(c, states, checkpoints > 0)
        node_at(t, 0).hash = t.seal
        node_at(t, 0).uses = 1
        # A block that is larger is hashed only once a text has filled it: then `make_key` makes the rest.
        t.key_made = min(<int64_t>size + 2, 65536)
        cdef bytes key = os.urandom(t.key_made * sizeof(uint32_t))
        memcpy(t.key, PyBytes_AS_STRING(key), PyBytes_GET_SIZE(key))
        t.key_seed[0], t.key_seed[1], t.key_seed[2], t.key_seed[3] = struct.unpack("QQQQ", os.urandom(32))
        uid = c.uid
        reference = weakref.ref(self, lambda _: _managers.pop(uid, None))
        with _fork:
            _managers[uid] = reference

    @classmethod
    def for_config(cls, config, *, every=256, **options):
        """A manager of the blocks of a cache: `num_blocks`, `block_size` and `groups` are the config's.

        Args:
            config: the `CacheConfig` of the engine.
            every: of the `State`, where layers keep tensors for a sequence; give `num_states` then.
            options: any other argument of `BlockManager`.
        """
        if not isinstance(config, CacheConfig):
            raise TypeError(f"config is a {type(config).__name__}; give the CacheConfig of the engine")
        groups = [group.reach for group in config.groups]
        if config.state_bytes("float64"):
            groups.append(State(every))
        return cls(config.num_gpu_blocks, config.block_size, groups=groups, **options)

    def __dealloc__(self):
        cdef Core* c = &self.core
        cdef int32_t i
        if c.seqs != NULL:
            for i in range(c.fresh_seq):
                clear_text(&c.seqs[i].text)
                free(c.seqs[i].table)
        if c.pool.tree.nodes != NULL:
            for i in range(1, c.pool.tree.fresh):
                blob_drop(node_at(&c.pool.tree, i).blob)
        if c.pool.steps != NULL:
            for i in range(c.pool.max_steps):
                free(c.pool.steps[i].rows)
                free(c.pool.steps[i].sources)
                free(c.pool.steps[i].states)
                free(c.pool.steps[i].drafts)
        unmap(c.seqs, self.slots, sizeof(Seq))
        unmap(c.pool.blocks, c.pool.num_blocks, sizeof(Block))
        unmap(c.pool.queue, <size_t>c.pool.queue_mask + 1, sizeof(int32_t))
        unmap(c.pool.stack, c.pool.num_blocks, sizeof(int32_t))
        unmap(c.pool.tree.nodes, <size_t>c.pool.tree.max_nodes + 1, c.pool.tree.width)
        unmap(c.pool.tree.tokens, <size_t>c.pool.tree.max_nodes + 1, c.block_size * sizeof(int32_t))
        unmap(c.pool.tree.lines, c.pool.tree.num_lines, sizeof(Line))
        cdef Work* work = c.pool.host.works
        while work != NULL:
            c.pool.host.works = work.older
            free_work(work)
            work = c.pool.host.works
        close_host(c, self.slots)
        close_states(c, self.slots)
        free(c.pool.steps)
        unmap(c.pool.tree.key, <size_t>c.block_size + 2, sizeof(uint32_t))

    def __reduce__(self):
        raise TypeError("a BlockManager cannot be pickled or copied: its handles name this one")

    def __repr__(self):
        return (
            f"BlockManager(num_blocks={self.num_blocks}, block_size={self.block_size}, "
            f"free={self.num_free_blocks}, sequences={self.num_sequences})"
        )

    @property
    def num_blocks(self):
        """Blocks in the pool."""
        return self.core.pool.num_blocks

    @property
    def block_size(self):
        """Tokens in a block."""
        return self.core.block_size

    @property
    def moves_marked(self):
        """Number of the newest move that is marked as made, or ordered before whatever reads the blocks."""
        return self.core.pool.moves.marked

    @property
    def host_blocks(self):
        """Slots for blocks in the host pool."""
        return self.core.pool.host.blocks.num_slots

    @property
    def host_states(self):
        """Slots for checkpoints in the host pool."""
        return self.core.pool.host.checkpoints.num_slots

    @property
    def state_every(self):
        """`State.every` of the group that keeps a state, 0 where none does."""
        return self.core.pool.states.every

    @property
    def num_states(self):
        """Slots for states."""
        return self.core.pool.states.num_slots

    @property
    def num_free_states(self):
        """Slots for states that a step can have now, checkpoints that nobody holds included."""
        with self.lock:
            return states_free(&self.core.pool.states)

    def next_checkpoint(self, seq):
        """Where a pass over a prompt should end: the last multiple of `State.every` among the tokens of a sequence.

        Only the newest checkpoint of a sequence is kept, and a pass that ends elsewhere leaves none. 0 where no such
        position lies past the prepared tokens, or no group keeps a state.
        """
        cdef Fault f
        cdef int64_t handle = as_int(seq, "seq"), last = 0
        cdef const Seq* found
        with self.lock:
            found = find(&self.core, handle, 0, &f)
            if found != NULL and self.core.pool.states.num_slots:
                last = found.text.num_tokens - found.text.num_tokens % self.core.pool.states.every
                if last <= found.num_prepared:
                    last = 0
        if found == NULL:
            raise self.error(&f)
        return last

    def state_slot(self, seq):
        """The slot on which a sequence stands, -1 for none: before its first pass, where the caller keeps its state,
        and where no group keeps one."""
        cdef Fault f
        cdef int64_t handle = as_int(seq, "seq")
        cdef int32_t slot = -1
        cdef const Seq* found
        with self.lock:
            found = find(&self.core, handle, 0, &f)
            if found != NULL and self.core.pool.states.num_slots:
                slot = standing_on(&self.core, found) - 1
        if found == NULL:
            raise self.error(&f)
        return slot

    @property
    def num_free_host_blocks(self):
        """Host slots that hold no block."""
        with self.lock:
            return host_free(&self.core.pool.host.blocks)

    @property
    def num_free_host_states(self):
        """Host slots for checkpoints that hold none."""
        with self.lock:
            return host_free(&self.core.pool.host.checkpoints)

    @property
    def num_background_slots(self):
        """Host slots that fetches and spills hold, at most a quarter of those of blocks and of those of checkpoints."""
        with self.lock:
            return self.core.pool.host.blocks.num_held + self.core.pool.host.checkpoints.num_held

    @property
    def num_free_blocks(self):
        """Blocks that a call can have now, cached ones included."""
        with self.lock:
            return pool_free(&self.core.pool)

    @property
    def num_sequences(self):
        """Sequences that were admitted or forked and not freed, preempted ones included; pins are none."""
        with self.lock:
            return self.core.num_seqs

    @property
    def usage(self):
        """Share of the blocks that are not free, 0 to 1."""
        return 1.0 - self.num_free_blocks / self.core.pool.num_blocks

    # Admission

    def admit(
        self, tokens, *, salt=b"", extra=(), reserve=None, max_hit=None, host=True, Fetch fetched=None
    ):
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
        cdef Prompt prompt
        cdef Fault f
        cdef Cached cached
        cdef Work* work
        cdef int64_t seq, needed, limit = optional(reserve, "reserve"), longest = optional(max_hit, "max_hit")
        cdef int64_t num_tokens
        cdef bint loads = boolean(host, "host")
        if fetched is not None:
            self.check_fetch(fetched, True)
        try:
            self.open_prompt(tokens, salt, extra, &prompt, False)
            num_tokens = prompt.text.num_tokens
            with nogil, self.lock:
                seq = core_admit(&self.core, &prompt.text, limit, longest, loads, &f, &cached)
        finally:
            self.close_prompt(&prompt)
        if seq == 0:
            with nogil:
                needed = most_ever(&self.core, num_tokens, 1, limit)
            raise self.error(&f, needed)
        try:
            admitted = seq, cached.tokens
        except MemoryError:
            with self.lock:
                core_take_back(&self.core, seq, True)
                self.core.pool.host.hit_tokens -= cached.loaded
            raise
        if fetched is not None:
            with self.lock:
                work, fetched.work = fetched.work, NULL
                if work != NULL:    # else another thread has released it since
                    core_release(&self.core, work)
        return admitted

    def match(self, tokens, *, salt=b"", extra=(), max_hit=None, tiers=False):
        """Tokens that are found in the prefix cache now, in host slots too. No effect.

        Args:
            tiers: whether to say how many tokens lie where, as a `Found`.

        `admit` finds as many, or fewer where windows or chunks let a prompt be longer than the pool and what follows
        the longest hit would not fit, and where no slot is free into which its checkpoint could be loaded.
        """
        cdef int64_t longest = optional(max_hit, "max_hit")
        cdef Prompt prompt
        cdef int32_t hit = 0, late = 0
        cdef int32_t* path = NULL
        cdef bint apart = boolean(tiers, "tiers"), host = self.core.pool.host.num_slots > 0
        try:
            self.open_prompt(tokens, salt, extra, &prompt, True)
            path = <int32_t*>grab(<size_t>blocks_for(prompt.text.num_tokens, self.core.block_size) * sizeof(int32_t))
            if path == NULL:
                raise MemoryError(f"no memory to match {prompt.text.num_tokens} tokens")
            with nogil, self.lock:
                hit = tree_walk(&self.core.pool.tree, &prompt.text, hit_limit(&self.core, &prompt.text, longest), path)
                hit = longest_hit(&self.core, path, hit, HOST if host else DEVICE)
                late = late_rows(&self.core, path, hit) if apart and host else 0
        finally:
            free(path)
            self.close_prompt(&prompt)
        if apart:
            return Found((hit - late) * self.core.block_size, late * self.core.block_size)
        return hit * self.core.block_size

    def blocks_needed(self, num_tokens, *, reserve=None, max_new_tokens=1):
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
        cdef int64_t n = bounded(num_tokens, "num_tokens", 1, MAX_INT32), limit = optional(reserve, "reserve"), needed
        cdef int64_t new = bounded(max_new_tokens, "max_new_tokens", 1, MAX_INT32)
        if n + new - 1 > MAX_INT32:
            raise ValueError(f"{n} tokens and max_new_tokens={new} pass {MAX_INT32} tokens in one sequence")
        with nogil:
            needed = most_ever(&self.core, n, new, limit)
        return needed

    def can_admit(self, tokens, *, salt=b"", extra=(), reserve=None, max_hit=None, host=True, max_new_tokens=1):
        """Whether a prompt can be served NOW, LATER or NEVER.

        NEVER: `blocks_needed` of it is more than the pool has, so that even alone it could not be computed and answered
        with `max_new_tokens` tokens in steps of at most `reserve`. NOW: `admit` with the same arguments succeeds now.
        LATER: once blocks or sequences are freed.
        """
        cdef Prompt prompt
        cdef Fault f
        cdef int64_t limit = optional(reserve, "reserve"), longest = optional(max_hit, "max_hit"), needed
        cdef int64_t new = bounded(max_new_tokens, "max_new_tokens", 1, MAX_INT32)
        cdef int32_t hit, target
        cdef int32_t* path = NULL
        cdef bint now = False, loads = boolean(host, "host")
        try:
            self.open_prompt(tokens, salt, extra, &prompt, True)
            with nogil:
                needed = most_ever(&self.core, prompt.text.num_tokens, new, limit)
            if needed > self.core.pool.num_blocks or prompt.text.num_tokens + new - 1 > MAX_INT32:
                return Admission.NEVER
            path = <int32_t*>grab(<size_t>blocks_for(prompt.text.num_tokens, self.core.block_size) * sizeof(int32_t))
            if path == NULL:
                raise MemoryError(f"no memory to match {prompt.text.num_tokens} tokens")
            with nogil, self.lock:
                now = has_room(&self.core, 1, &f) and plan_admission(
                    &self.core, &prompt.text, limit, longest, loads, path, &hit, &target, &f, True
                )
        finally:
            free(path)
            self.close_prompt(&prompt)
        return Admission.NOW if now else Admission.LATER

    def preempt(self, seq):
        """Give back all blocks of a sequence in no open step; its tokens stay, for `resume`.

        Raises:
            ValueError: it is in an open step, or preempted already.
        """
        cdef Fault f
        cdef int64_t handle = as_int(seq, "seq")
        cdef bint ok
        with self.lock:
            ok = core_preempt(&self.core, handle, &f)
        if not ok:
            raise self.error(&f)

    def resume(self, seq, *, reserve=None, max_hit=None, host=True):
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
        cdef Fault f
        cdef int64_t handle = as_int(seq, "seq"), limit = optional(reserve, "reserve")
        cdef int64_t longest = optional(max_hit, "max_hit")
        cdef Cached cached
        cdef bint ok, loads = boolean(host, "host")
        with nogil, self.lock:
            ok = core_resume(&self.core, handle, limit, longest, loads, &f, &cached)
        if not ok:
            raise self.error(&f)
        try:
            return cached.tokens
        except MemoryError:
            with self.lock:
                if core_preempt(&self.core, handle, &f):
                    core_forget_resume(&self.core, handle, cached.tokens)
                    self.core.pool.host.hit_tokens -= cached.loaded
            raise

    def pin(self, tokens, *, salt=b"", extra=()):
        """Keep the longest published prefix of `tokens`, in whole blocks, from eviction.

        Where a group keeps a state, the prefix ends at a checkpoint.

        Returns:
            A handle for `unpin`.

        Raises:
            ValueError: no block of it is published, or no checkpoint is there.
        """
        cdef Prompt prompt
        cdef Fault f
        cdef int64_t handle = 0
        try:
            self.open_prompt(tokens, salt, extra, &prompt, True)
            with nogil, self.lock:
                handle = core_pin(&self.core, &prompt.text, &f)
        finally:
            self.close_prompt(&prompt)
        if handle == 0:
            raise self.error(&f)
        try:
            return handle
        except MemoryError:
            with self.lock:
                core_unpin(&self.core, handle, &f)
            raise

    def unpin(self, handle):
        """Let go of a pin."""
        cdef Fault f
        cdef int64_t pin = as_int(handle, "handle")
        cdef bint ok
        with self.lock:
            ok = core_unpin(&self.core, pin, &f)
        if not ok:
            raise self.error(&f)

    # Tokens

    def append(self, seqs, tokens=None, *, extra=None):
        """Add one token to each sequence; without `tokens`, a placeholder whose id `set_tokens` gives later.

        Args:
            extra: as of `extend`; the only position is 0.
        """
        self.add_tokens(seqs, tokens, None, extra)

    def extend(self, seqs, tokens, counts, *, extra=None):
        """Add `counts[i]` tokens to sequence i, taken from `tokens` [sum(counts)] in order; None: placeholders.

        Args:
            extra: what added tokens stand for beyond their ids, as of `admit`: for each sequence a list of (position,
                bytes) pairs, positions rising, counted from its first added token.

        Raises:
            ValueError: the numbers do not agree, a token or a position is out of range, or a sequence comes twice.
        """
        if counts is None:
            raise TypeError("counts must be integers, not None")
        self.add_tokens(seqs, tokens, counts, extra)

    def set_tokens(self, seqs, tokens, counts=None):
        """Give the first `counts[i]` placeholders of sequence i (by default one) their ids, from left to right.

        Raises:
            ValueError: a sequence has fewer placeholders.
        """
        cdef Ints s = unopened(), t = unopened(), n = unopened()
        cdef Fault f
        cdef bint ok
        try:
            open_ints(seqs, "seqs", &s)
            open_ints(tokens, "tokens", &t)
            if counts is not None:
                open_counts(counts, s.size, &n)
            with self.lock:
                ok = core_set_tokens(&self.core, &s, &t, &n if counts is not None else NULL, &f)
        finally:
            close_ints(&s)
            close_ints(&t)
            close_ints(&n)
        if not ok:
            raise self.error(&f)

    def trim(self, seq, num_tokens):
        """Drop tokens from the end until `num_tokens` are left, and blocks that none of them needs.

        Where a group keeps a state, which cannot go back, a sequence that loses computed tokens is preempted, unless
        the caller keeps its state (see `prepare`).

        Raises:
            ValueError: `num_tokens` is not 0 to the present number, or the sequence is in an open step.
        """
        cdef Fault f
        cdef int64_t handle = as_int(seq, "seq"), n = as_int(num_tokens, "num_tokens")
        cdef bint ok
        with self.lock:
            ok = core_trim(&self.core, handle, n, &f)
        if not ok:
            raise self.error(&f)

    # Steps

    def prepare(self, seqs, query_lens, StepArrays step not None, *, keep_state=False, own_state=False):
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
        cdef Ints s = unopened(), q = unopened()
        cdef Fault f
        cdef int64_t step_id = 0
        cdef bint closed, keep = boolean(keep_state, "keep_state"), own = boolean(own_state, "own_state")
        try:
            open_ints(seqs, "seqs", &s)
            open_ints(query_lens, "query_lens", &q)
            if s.size == 0 and self.core.pool.host.num_slots == 0:
                raise ValueError("seqs is empty: a step needs at least one sequence")
            if not q.scalar and q.size != s.size:
                raise ValueError(f"query_lens has {q.size} elements for {s.size} seqs")
            if (keep or own) and self.core.pool.states.num_slots == 0:
                raise ValueError(f"{keep_state=}, {own_state=}, but no group of the manager is a State")
            if keep and own:
                raise ValueError("keep_state=True keeps states in slots, and own_state=True does not; give one")
            with self.lock:
                step_id = core_prepare(&self.core, &s, &q, &step.arrays, keep, own, &f)
        finally:
            close_ints(&s)
            close_ints(&q)
        if step_id == 0:
            raise self.error(&f)
        step.manager = self
        if step._uploads:
            try:
                step._upload()
            except BaseException as error:
                with self.lock:
                    closed = core_abort(&self.core, step_id, False, &f)
                    if closed:
                        take_back_step(&self.core, &step.arrays)
                if not closed:
                    error.add_note(f"step {step_id} stays open, as another thread has prepared a later one: abort both")
                raise
        try:
            return step_id
        except MemoryError:
            with self.lock:
                if core_abort(&self.core, step_id, False, &f):
                    take_back_step(&self.core, &step.arrays)
            raise

    def mark_moved(self, number):
        """Say that all moves up to `number`, a step's `last_move`, are made, or ordered before what reads the blocks.

        `engine.move(step)` does it; this is for those who keep K and V in tensors of their own.

        Raises:
            ValueError: there is no such move yet.
        """
        cdef int64_t last = as_int(number, "number"), noted
        with self.lock:
            noted = self.core.pool.moves.handed
            if self.core.pool.moves.marked < last <= noted:
                self.core.pool.moves.marked = last
                if last == noted:
                    self.core.pool.host.num_moves = 0
        if not 0 <= last <= noted:
            raise ValueError(f"number={last} must be 0 to {noted}, the newest move")

    def landed(self, number):
        """Say that all moves up to `number` are done: nothing that names their blocks or slots has to wait for them.

        Called now and then with what `engine.landed()` gives. Until then steps say that they wait for these moves.

        Raises:
            ValueError: the move is not marked as made.
        """
        cdef int64_t last = as_int(number, "number"), marked
        with self.lock:
            marked = self.core.pool.moves.marked
            if 0 <= last <= marked:
                self.core.pool.moves.landed = max(self.core.pool.moves.landed, last)
        if not 0 <= last <= marked:
            raise ValueError(f"number={last} must be 0 to {marked}, the newest move that is marked as made")

    def commit(self, step_id, accepted=None):
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
        cdef Ints a = unopened()
        cdef Fault f
        cdef int64_t step = as_int(step_id, "step_id")
        cdef bint ok
        preempted = []
        try:
            if accepted is not None:
                open_ints(accepted, "accepted", &a)
            if self.core.pool.states.num_slots:
                return self.close(step, &a if accepted is not None else NULL, True)
            with self.lock:
                ok = core_commit(&self.core, step, &a if accepted is not None else NULL, &f)
        finally:
            close_ints(&a)
        if not ok:
            raise self.error(&f)
        return preempted

    def abort(self, step_id):
        """Take back the newest open step, as if it had never been prepared: sequences and their blocks are as before.

        What `prepare` evicted stays evicted, since the pass may have begun to write there; `stats` keep their counts.

        Returns:
            Handles of sequences that were preempted, where groups keep a state: those whose only slot the pass may have
            written. A sequence that an older open step has too is preempted when that closes, unless it is aborted and
            goes back further; until then it cannot be prepared.

        Raises:
            ValueError: it is not the newest open step.
        """
        cdef Fault f
        cdef int64_t step = as_int(step_id, "step_id")
        cdef bint ok
        preempted = []
        if self.core.pool.states.num_slots:
            return self.close(step, NULL, False)
        with self.lock:
            ok = core_abort(&self.core, step, True, &f)
        if not ok:
            raise self.error(&f)
        return preempted

    # Work in the background

    def begin_fetch(self, tokens, *, num_blocks, checkpoints=(), salt=b"", extra=()):
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
        cdef Prompt prompt
        cdef Ints ends = unopened()
        cdef Fault f
        cdef Begun begun
        cdef Work* work = NULL
        cdef int64_t below = bounded(num_blocks, "num_blocks", 0, MAX_INT32)
        cdef int32_t[:, ::1] out
        cdef int32_t i
        cdef Fetch fetch = Fetch.__new__(Fetch)
        self.check_host("begin_fetch")
        try:
            open_ints(checkpoints, "checkpoints", &ends)
            self.check_ends(&ends, below)
            try:
                self.open_prompt(tokens, salt, extra, &prompt, True)
                with nogil, self.lock:
                    work = core_begin_fetch(&self.core, &prompt.text, below, &ends, &begun, &f)
            finally:
                self.close_prompt(&prompt)
        finally:
            close_ints(&ends)
        if work == NULL:
            raise self.error(&f)
        fetch.work, fetch.manager, fetch.number = work, self, work.number
        fetch.num_local, fetch.num_tokens = begun.local, begun.most
        try:
            fetch.blocks = np.empty((work.num_rows, 3), np.int32)
            out = fetch.blocks
            for i in range(work.num_rows):
                out[i, 0], out[i, 1], out[i, 2] = work.rows[i].index, work.rows[i].group, self.numbered(work.slots[i])
            fetch.blocks.flags.writeable = False
        except MemoryError:
            with self.lock:
                core_end_fetch(&self.core, work, 0)
                core_release(&self.core, work)
            raise
        return fetch

    def end_fetch(self, Fetch fetch not None, num_ok):
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
        cdef int64_t ok = as_int(num_ok, "num_ok"), served = 0
        cdef bint known
        self.check_fetch(fetch, False)
        if not 0 <= ok <= len(fetch.blocks):
            raise ValueError(f"num_ok={ok} must be 0 to {len(fetch.blocks)}, the blocks of the fetch")
        with nogil, self.lock:
            known = fetch.work != NULL and fetch.work.kind == FETCHING
            if known:
                served = core_end_fetch(&self.core, fetch.work, ok)
        if not known:
            self.check_fetch(fetch, False)
        return served

    def release(self, Fetch fetch not None):
        """Let go of an ended fetch without admitting a sequence: what it brought may be evicted.

        Raises:
            ValueError: it has not ended, was released before, or is another manager's.
        """
        cdef Work* work = NULL
        self.check_fetch(fetch, True)
        with nogil, self.lock:
            if fetch.work != NULL and fetch.work.kind == FETCHED:
                work, fetch.work = fetch.work, NULL
                core_release(&self.core, work)
        if work == NULL:
            self.check_fetch(fetch, True)

    def begin_spill(self, max_blocks, *, max_states=None):
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
        cdef Fault f
        cdef Work* work
        cdef int64_t most = bounded(max_blocks, "max_blocks", 0, MAX_INT32)
        cdef int64_t states = most if max_states is None else bounded(max_states, "max_states", 0, MAX_INT32)
        cdef int32_t[:, ::1] out
        cdef int32_t i
        cdef Spill spill = Spill.__new__(Spill)
        self.check_host("begin_spill")
        with nogil, self.lock:
            work = core_begin_spill(&self.core, most, states, &f)
        if work == NULL:
            raise self.error(&f)
        spill.work, spill.manager, spill.number = work, self, work.number
        try:
            spill.blocks = np.empty((work.num_rows, 3), np.int32)
            out = spill.blocks
            for i in range(work.num_rows):
                out[i, 0], out[i, 1], out[i, 2] = self.numbered(work.slots[i]), work.rows[i].group, work.rows[i].index
            spill.blocks.flags.writeable = False
            spill.nodes = nodes_of(work, self.core.block_size)
        except MemoryError:
            untouched = bytearray(work.num_rows)
            with self.lock:
                core_end_spill(&self.core, work, <const uint8_t*>PyByteArray_AS_STRING(untouched), NULL)
            raise
        return spill

    def end_spill(self, Spill spill not None, ok, digests=None):
        """Let go of the slots of a spill.

        Args:
            ok: a bool for each row of `spill.blocks`: whether the block is there outside now. It is not spilled again
                as long as its slot keeps it and the prefix cache is not reset. The others go to the queue's end.
            digests: bytes [32] for each of `spill.nodes`, kept with them, so that later spills need not ask; or None.

        Raises:
            ValueError: `ok` or `digests` has another length; the spill has ended, or is another manager's.
            TypeError: they are not bools or bytes.
        """
        cdef Work* work = NULL
        cdef bytes done = bools(ok), names = None if digests is None else joined(digests)
        cdef const char* kept = NULL
        if self is not spill.manager:
            raise ValueError(f"spill {spill.number} belongs to another manager")
        if len(done) != len(spill.blocks):
            raise ValueError(f"ok has {len(done)} elements for {len(spill.blocks)} blocks")
        if names is not None:
            if len(names) != len(spill.nodes) * DIGEST_BYTES:
                raise ValueError(f"there are {len(names) // DIGEST_BYTES} digests for {len(spill.nodes)} nodes")
            kept = PyBytes_AS_STRING(names)
        cdef const uint8_t* flags = <const uint8_t*>PyBytes_AS_STRING(done)
        with nogil, self.lock:
            work, spill.work = spill.work, NULL
            if work != NULL:
                core_end_spill(&self.core, work, flags, kept)
        if work == NULL:
            raise ValueError(f"spill {spill.number} has ended before")

    def block_extras(self, extra, num_blocks):
        """The extra bytes of each of the first blocks of a prompt as `SpilledNode.extra` has them, b"" for none.

        For each token that has some: its offset in the block and their length, as int64, the bytes, the length again.

        Args:
            extra: (position, bytes) pairs, as of `admit`.
            num_blocks: how many blocks; pairs after them are left out.
        """
        cdef int64_t n = bounded(num_blocks, "num_blocks", 0, MAX_INT32)
        parts = extra_parts(rising_extra(extra), self.core.block_size)
        return [b"".join(parts.get(i, ())) for i in range(n)]

    # Sharing and leaving

    def fork(self, seq, n=1):
        """Make n children of a sequence in no open step. They share every block that holds computed tokens.

        Raises:
            ValueError: it is in an open step, is preempted, or has computed placeholders.
            TooManySequences: `max_seqs` would be passed.
        """
        cdef Fault f
        cdef int64_t handle = as_int(seq, "seq"), count = bounded(n, "n", 1, MAX_INT32)
        cdef bint ok
        cdef int64_t i, room = min(count, self.core.max_seqs)
        cdef int64_t* children = <int64_t*>grab(<size_t>room * sizeof(int64_t))
        if children == NULL:
            raise MemoryError(f"no memory for {count} handles")
        try:
            handles = [None] * room
            with self.lock:
                ok = core_fork(&self.core, handle, count, children, &f)
            if not ok:
                raise self.error(&f)
            try:
                for i in range(room):
                    handles[i] = children[i]
            except MemoryError:
                with self.lock:
                    for i in range(room - 1, -1, -1):
                        core_take_back(&self.core, children[i], False)
                raise
            return handles
        finally:
            free(children)

    def reorder(self, seqs, parents):
        """Make each `seqs[i]` a child of `parents[i]` as it is before the call, keeping its handle: one beam step.

        Raises:
            ValueError: a sequence comes twice in `seqs`, or one of either is in an open step, preempted, or (a parent)
                has computed placeholders.
        """
        cdef Ints s = unopened(), p = unopened()
        cdef Fault f
        cdef bint ok
        try:
            open_ints(seqs, "seqs", &s)
            open_ints(parents, "parents", &p)
            if p.size != s.size:
                raise ValueError(f"parents has {p.size} elements for {s.size} seqs")
            with self.lock:
                ok = core_reorder(&self.core, &s, &p, &f)
        finally:
            close_ints(&s)
            close_ints(&p)
        if not ok:
            raise self.error(&f)

    def free(self, seqs):
        """End sequences. One in an open step keeps its blocks until that step closes; its handle is stale at once."""
        cdef Ints s = unopened()
        cdef Fault f
        cdef bint ok
        try:
            open_ints(seqs, "seqs", &s)
            with self.lock:
                ok = core_free(&self.core, &s, &f)
        finally:
            close_ints(&s)
        if not ok:
            raise self.error(&f)

    def reset_prefix_cache(self):
        """Unpublish every block, held ones too (new weights).

        Sequences admitted before never publish again, and pins hold nothing any more: nobody could reach it. Fetches
        that have not ended bring nothing, and what is known to be outside is forgotten.
        """
        with nogil, self.lock:
            core_reset(&self.core)
            self.num_resets += 1

    # Looking in

    def block_table(self, seq):
        """The blocks of a sequence in order, int32 [blocks], with several groups [groups, blocks]; -1: out of reach."""
        cdef int64_t handle = as_int(seq, "seq")
        table = self.read(handle, True)
        groups = self.core.num_groups
        return table if groups == 1 else np.ascontiguousarray(table.reshape(-1, groups).T)

    def tokens(self, seq):
        """The token ids of a sequence, -1 for placeholders: int32 [num_tokens]."""
        cdef int64_t handle = as_int(seq, "seq")
        return self.read(handle, False)

    def lengths(self, seqs):
        """`Lengths` of a batch: five int64 arrays [n]. Of the cached tokens `num_loading` are on their way from the
        host, as far as `landed` was told."""
        cdef Ints s = unopened()
        cdef Fault f
        cdef Seq* seq = NULL
        cdef Py_ssize_t i
        cdef int64_t[:, ::1] out
        try:
            open_ints(seqs, "seqs", &s)
            columns = np.empty((5, s.size), np.int64)
            if s.size:
                out = columns
            with self.lock:
                for i in range(s.size):
                    seq = find(&self.core, at(&s, i), i, &f)
                    if seq == NULL:
                        break
                    out[0, i], out[1, i] = seq.num_cached, seq.num_computed
                    out[2, i], out[3, i], out[4, i] = seq.reserved, seq.text.num_tokens, num_loading(&self.core, seq)
        finally:
            close_ints(&s)
        if seq == NULL and len(columns[0]):
            raise self.error(&f)
        return Lengths(*columns)

    def stats(self):
        """`Stats` of the manager so far."""
        cdef Counters n
        cdef Host h
        cdef States s
        cdef int64_t evictions
        with self.lock:
            n = self.core.counters
            h = self.core.pool.host
            s = self.core.pool.states
            evictions = self.core.pool.evictions
        return Stats(
            n.admitted, n.prompt_tokens, n.hit_tokens, evictions, n.preemptions, n.resumed, n.published, n.merged,
            n.copies, n.peak_used, h.num_loaded, h.num_offloaded, h.evictions, h.hit_tokens,
            s.copies, s.checkpoints, s.evictions,
        )

    def audit(self):
        """Derive the whole state again, in O(blocks + nodes + tokens held).

        Raises:
            InvariantViolation: the first broken invariant, by number, and where.
        """
        cdef Finding finding
        cdef bint ok
        with nogil, self.lock:
            ok = audit_core(&self.core, &finding)
        if not ok:
            if finding.invariant == 0:
                raise MemoryError(f"no memory to audit {finding.where} blocks")
            raise InvariantViolation(
                f"invariant {finding.invariant}: {finding.what.decode()} {finding.where}", finding.invariant
            )

    # Edge

    cdef list close(self, int64_t step_id, const Ints* accepted, bint commits):
        """Commit or abort a step where there are states; the handles of the sequences that this has preempted."""
        cdef Fault f
        cdef States* s = &self.core.pool.states
        cdef Pool* p = &self.core.pool
        cdef int64_t* handles = NULL
        cdef Py_ssize_t i, n = 0, room = -1
        cdef bint ok = False
        cdef list preempted = []
        try:
            while n > room:
                room = n
                free(handles)
                handles = <int64_t*>grab(<size_t>(room or 1) * sizeof(int64_t))
                if handles == NULL:
                    raise MemoryError(f"no memory for {room} handles")
                with self.lock:
                    if p.num_steps:
                        n = pool_step(p, 0 if commits else p.num_steps - 1).num_rows
                    if n <= room:
                        if commits:
                            ok = core_commit(&self.core, step_id, accepted, &f)
                        else:
                            ok = core_abort(&self.core, step_id, True, &f)
                        n = s.num_preempted if ok else 0
                        if n:
                            memcpy(handles, s.preempted, n * sizeof(int64_t))
            if not ok:
                raise self.error(&f)
            for i in range(n):
                preempted.append(handles[i])
        finally:
            free(handles)
        return preempted

    cdef int check_host(self, str call) except -1:
        if self.core.pool.host.num_slots == 0:
            raise ValueError(f"{call} needs host slots: this manager was made with host_blocks=0")
        return 0

    cdef int check_fetch(self, Fetch fetch, bint ended) except -1:
        """Raise unless a fetch of this manager is under way, or with `ended`, has ended and is not released."""
        cdef Work* work
        cdef bint fetching = False
        if fetch.manager is not self:
            raise ValueError(f"fetch {fetch.number} belongs to another manager")
        with self.lock:
            work = fetch.work
            if work != NULL:
                fetching = work.kind == FETCHING
        if work == NULL:
            raise ValueError(f"fetch {fetch.number} was released before")
        if fetching and ended:
            raise ValueError(f"fetch {fetch.number} has not ended; call end_fetch first")
        if not fetching and not ended:
            raise ValueError(f"fetch {fetch.number} has ended before")
        return 0

    cdef int32_t numbered(self, int32_t slot) noexcept nogil:
        """The number that a host slot has among those of its pool."""
        cdef const Host* h = &self.core.pool.host
        return slot - h.checkpoints.first if slot >= h.checkpoints.first else slot

    cdef int check_ends(self, const Ints* ends, int64_t num_blocks) except -1:
        """Raise where these are not numbers of blocks, of so many, after which a state can be outside."""
        cdef Py_ssize_t i
        cdef int64_t n, before = 0, every = self.core.pool.states.every
        if ends.size and not self.core.pool.host.checkpoints.num_slots:
            raise ValueError(
                f"{ends.size} checkpoints are given, for which this manager has no slots in host memory; make it with "
                "host_states="
            )
        for i in range(ends.size):
            n = at(ends, i)
            if not 1 <= n <= num_blocks:
                raise ValueError(f"checkpoints[{i}]={n} must be at least 1 and at most num_blocks={num_blocks}")
            if n * self.core.block_size % every:
                raise ValueError(
                    f"checkpoints[{i}]={n} blocks are {n * self.core.block_size} tokens, no multiple of {every=}"
                )
            if n <= before:
                raise ValueError(f"checkpoints[{i}]={n} must be more than the {before} before it")
            before = n
        return 0

    cdef object handed_out(self, int64_t last_move):
        """The moves of the step whose newest move this is, int32 [n, 4]; none once they are marked."""
        cdef const Host* h = &self.core.pool.host
        cdef const Move* move
        cdef int32_t i, n = 0, room = -1
        cdef int32_t[:, ::1] out
        while n > room:
            room = n
            array = np.empty((room, 4), np.int32)
            out = array
            with self.lock:
                n = h.num_moves if self.core.pool.moves.marked < last_move == self.core.pool.moves.handed else 0
                for i in range(n if n <= room else 0):
                    move = &h.moves[i]
                    out[i, 0], out[i, 1], out[i, 2], out[i, 3] = move.kind, move.group, move.source, move.target
                    if move.group == self.core.num_groups:
                        out[i, 2] -= h.checkpoints.first if move.kind == LOAD else h.first_state
                        out[i, 3] -= h.first_state if move.kind == LOAD else h.checkpoints.first
        return array[:n]

    cdef int add_tokens(self, seqs, tokens, counts, extra) except -1:
        cdef Ints s = unopened(), t = unopened(), n = unopened()
        cdef Marks m
        cdef Fault f
        cdef bint ok, given = tokens is not None, counted = counts is not None, marked = extra is not None
        cdef list pairs = None
        memset(&m, 0, sizeof(Marks))
        if marked:      # first of all: iterators may run any code
            pairs = []
            for one in extra:
                pairs.append(rising_extra(one))
        try:
            open_ints(seqs, "seqs", &s)
            if given:
                open_ints(tokens, "tokens", &t)
            if counted:
                open_counts(counts, s.size, &n)
            if marked:
                open_marks(pairs, &n if counted else NULL, s.size, &m)
            if counted or marked:
                with nogil, self.lock:
                    ok = core_extend(
                        &self.core, &s, &t if given else NULL, &n if counted else NULL, &m if marked else NULL, &f
                    )
            else:
                with self.lock:
                    ok = core_append(&self.core, &s, &t if given else NULL, &f)
        finally:
            close_ints(&s)
            close_ints(&t)
            close_ints(&n)
            free(m.marks)
            free(m.counts)
            free(m.made)
        if not ok:
            raise self.error(&f)
        return 0

    cdef object read(self, int64_t handle, bint blocks):
        """A copy of a sequence's table or tokens, made without a Python object under the lock."""
        cdef Fault f
        cdef Seq* seq
        cdef int64_t n = 0, room = -1
        cdef int32_t[::1] out = None
        array = None
        while n > room:
            room = n
            array = np.empty(room, np.int32)
            out = array
            with self.lock:
                seq = find(&self.core, handle, 0, &f)
                if seq != NULL:
                    n = <int64_t>seq.num_rows * self.core.num_groups if blocks else seq.text.num_tokens
                    if n and n <= room:
                        if blocks:
                            memcpy(&out[0], seq.table, n * sizeof(int32_t))
                        else:
                            read_text(&self.core.pool.tree.paging, &seq.text, &out[0])
            if seq == NULL:
                raise self.error(&f)
        return array[:n]

    cdef int open_prompt(self, tokens, salt, extra, Prompt* out, bint borrow) except -1:
        """Take a prompt out of Python, as `open_text` does; closed with `close_prompt`, also after an error."""
        out.tokens = unopened()
        memset(&out.text, 0, sizeof(Text))
        open_ints(tokens, "tokens", &out.tokens)
        return self.open_text(&out.tokens, salt, extra, &out.text, borrow)

    cdef int open_text(self, const Ints* t, salt, extra, Text* out, bint borrow) except -1:
        """Take tokens and extra bytes out of Python. Where `borrow` allows it, tokens of 32 bits are read in place, as
        long as `t` is open."""
        cdef const Paging* p = &self.core.pool.tree.paging
        cdef Py_ssize_t start, bad
        cdef int32_t i
        cdef int64_t bits = 0
        if not isinstance(salt, bytes):
            raise TypeError(f"salt must be bytes, not {type(salt).__name__}")
        if t.size == 0:
            raise ValueError("tokens is empty: a sequence needs at least one token")
        if t.size > MAX_INT32:
            raise ValueError(f"{t.size} tokens are more than {MAX_INT32}")
        borrow = borrow and not t.wide
        if not (borrow_text(p, <int32_t*>t.data, t.size, out) if borrow else grow_text(p, out, t.size)):
            raise MemoryError(f"no memory for {t.size} tokens")
        if borrow:
            bits = kvb_bits(<const int32_t*>t.data, t.size)
        for i in range(0 if borrow else out.num_pages):
            start = i * p.page_size
            bits |= copy_tokens(t, start, min(t.size - start, p.page_size), out.pages[i])
        bad = bad_token(t, bits)
        if bad >= 0:
            raise ValueError(f"tokens[{bad}]={at(t, bad)} must be 0 to {MAX_INT32}")
        out.num_tokens = out.known = <int32_t>t.size
        if not borrow:
            note_tail(p, out)
        if salt or extra is not ():
            self.open_extras(salt, extra, out)
        return 0

    cdef int open_extras(self, bytes salt, extra, Text* out) except -1:
        """One blob for each block with extra bytes: an entry for each, the salt first in block 0."""
        cdef dict parts = extra_parts(checked_extra(rising_extra(extra), out.num_tokens), self.core.block_size)
        cdef bytes data
        cdef Blob* blob
        cdef Extra* item
        if salt:
            size = struct.pack("=q", len(salt))
            parts[0] = [_salt_mark, size, salt, size, *parts.get(0, ())]
        if not parts:
            return 0
        out.extras = <Extra*>grab(len(parts) * sizeof(Extra))
        if out.extras == NULL:
            raise MemoryError(f"no memory for {len(parts)} extras")
        for index in sorted(parts):
            data = b"".join(parts[index])
            if len(data) > MAX_INT32:
                raise ValueError(f"{len(data)} extra bytes in block {index} are more than {MAX_INT32}")
            blob = blob_new(PyBytes_GET_SIZE(data))
            if blob == NULL:
                raise MemoryError(f"no memory for {len(data)} extra bytes")
            memcpy(blob.bytes, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
            item = &out.extras[out.num_extras]
            item.index, item.size, item.blob = index, <int32_t>len(data), blob
            hash_extra(&self.core.pool.tree, item)
            out.num_extras += 1
        return 0

    cdef void close_prompt(self, Prompt* prompt) noexcept:
        if prompt.text.num_extras:
            with self.lock:
                clear_text(&prompt.text)
        else:
            clear_text(&prompt.text)
        close_ints(&prompt.tokens)

    cdef object error(self, const Fault* f, int64_t whole=0):
        """The exception of a fault; `whole` blocks are held once all is done, where that is known."""
        cdef Py_ssize_t i = f.index
        cdef int64_t v = f.value, b = f.bound
        problem = f.problem
        if problem in (NO_BLOCKS, WATERMARK) and max(v, whole) > self.core.pool.num_blocks:
            return NoFreeBlocks(
                f"{max(v, whole)} blocks needed at once, and the pool has {self.core.pool.num_blocks}: it never fits, "
                "whatever is freed; make the pool larger, or ask for slots for fewer tokens (reserve, query_lens)",
                v,
                b,
            )
        if problem == NO_BLOCKS:
            return NoFreeBlocks(
                f"{v} blocks needed, {b} of {self.core.pool.num_blocks} free; free or preempt sequences", v, b
            )
        if problem == WATERMARK:
            return NoFreeBlocks(
                f"{v} blocks needed, {b} to be had: while sequences run, the watermark keeps {self.core.watermark} of "
                f"{self.core.pool.num_blocks} blocks free; free or preempt sequences",
                v,
                b,
            )
        if problem == NO_STATES:
            return NoFreeStates(
                f"{v} slots for states needed, {b} of {self.core.pool.states.num_slots} free; free or preempt "
                "sequences",
                v,
                b,
            )
        if problem == UNMOVED:
            return MovesPending(
                f"blocks up to move {v} have to be copied, and only {b} were: call engine.move(step) right after "
                f"prepare, or copy those of step.moves and step.copies and call mark_moved(step.last_move)",
                v,
            )
        if problem == STALE:
            return StaleSequence(f"handle {v} (at {i}) names no sequence, or one that was freed", v)
        if problem == NO_SLOTS:
            return TooManySequences(f"{v} of max_seqs={b} sequences and pins exist: no room for more", b)
        if problem == NO_MEMORY:
            return MemoryError("no memory for the tokens or the block table of a sequence")
        return ValueError({
            IS_PIN: f"handle {v} (at {i}) is a pin, not a sequence; use unpin",
            IS_SEQUENCE: f"handle {v} is a sequence, not a pin; use free",
            TWICE: f"sequence {v} comes twice in seqs (again at {i})",
            IS_PREEMPTED: f"sequence {v} (at {i}) is preempted; resume it first",
            NOT_PREEMPTED: f"sequence {v} is not preempted",
            IN_STEP: f"sequence {v} (at {i}) is in open step {b}; commit or abort it first",
            EXTRA_SIZE: f"{v} extra bytes in one block of sequence at {i} are more than {b}",
            BAD_TOKEN: f"tokens[{i}]={v} must be 0 to {MAX_INT32}",
            BAD_COUNT: f"counts[{i}]={v} must not be negative",
            TOO_LONG: f"{v} more tokens than {b} would pass {MAX_INT32} in one sequence (at {i})",
            SIZE_TOKENS: f"tokens has {b} elements, the counts ask for {v}" + (" or more" if i >= 0 else ""),
            BAD_QUERY: f"query_lens[{i}]={v} must be at least 1",
            NOT_ENOUGH_TOKENS: f"query_lens[{i}]={v}, but the sequence has {b} tokens that are not prepared yet",
            STEP_SEQS: f"{v} seqs do not fit a step of max_seqs={b}",
            STEP_TOKENS: f"{v} tokens do not fit a step of max_tokens={b}",
            STEP_BLOCKS: f"sequence at {i} has {v} blocks, which do not fit max_blocks_per_seq={b} of the step; make "
            f"it for sequences of {v * self.core.block_size} tokens (max_seq_len of StepBuffers.for_config) or more",
            STEP_GROUPS: f"the step has arrays for {b} layer groups, the manager has {v}",
            STEP_STATES: f"the step has no arrays for states, and the manager has {v} slots; make it with states=True",
            LOST_STATE: f"the state of sequence {v} (at {i}) was lost with a pass that was aborted; it is preempted "
            f"once open step {b} is closed",
            OWN_STATE: f"the state of sequence {v} (at {i}) is kept by the caller, and in no slot; give own_state=True",
            STEP_LIMIT: f"{v} steps are open, of max_open_steps={b}; commit or abort one",
            COMPUTED_UNKNOWN: f"sequence {v} (at {i}) has a computed placeholder at {b}; set_tokens first",
            NO_STEP: f"step {v} is not open; none is",
            NOT_OLDEST: f"step {v} is not the oldest open step, which is {b}",
            NOT_NEWEST: f"step {v} is not the newest open step, which is {b}",
            SIZE_ACCEPTED: f"accepted has {v} elements for {b} rows",
            BAD_ACCEPTED: f"accepted[{i}]={v} must be 0 to {b}",
            LATER_STEP: f"accepted[{i}]={v} cuts a sequence that is in the later open step {b}; abort that one first",
            NOT_UNKNOWN: f"{v} placeholders to set, but the sequence at {i} has {b}",
            BAD_TRIM: f"num_tokens={v} must be 0 to {b}",
            OUT_OF_REACH: f"num_tokens={v} is too few: in group {i} the tokens before {b} slid out of reach; preempt "
            "the sequence, trim and resume it",
            NOTHING_TO_PIN: f"no block of these {v} tokens is published (blocks of {b})",
        }[problem])


cdef tuple checked_groups(object given, Core* c, int32_t num_states, int32_t block_size):
    """The reaches of the layer groups that keep blocks, and the same in `c`, with what it keeps of states."""
    cdef int32_t g, every = 0
    cdef list found = []
    for group in given:
        if not isinstance(group, State):
            found.append(group)
            continue
        if every:
            raise ValueError("groups has two States; one slot holds the state of all layers")
        every = <int32_t>bounded(group.every, "State.every", 1, MAX_INT32)
        if every % block_size:
            raise ValueError(f"State.every={every} must be a multiple of {block_size=}")
    if every and num_states == 0:
        raise ValueError("a State among the groups needs num_states= slots, at least 1")
    if num_states and not every:
        raise ValueError(f"{num_states=} slots for states need a State among the groups")
    c.pool.states.every = every
    groups = tuple(found)
    if not 1 <= len(groups) <= MAX_GROUPS:
        raise ValueError(f"groups={groups!r} has {len(groups)} layer groups; give 1 to {MAX_GROUPS}")
    c.num_groups = <int32_t>len(groups)
    for g in range(c.num_groups):
        reach = groups[g]
        if isinstance(reach, Window):
            c.reaches[g].window = <int32_t>bounded(reach.size, f"groups[{g}].size", 1, MAX_INT32)
        elif isinstance(reach, Chunk):
            c.reaches[g].chunk = <int32_t>bounded(reach.size, f"groups[{g}].size", 1, MAX_INT32)
        elif reach is not None:
            raise TypeError(f"groups[{g}]={reach!r}; give None, a Window, a Chunk or one State")
        c.reach_ends = c.reach_ends or reach is not None
    c.pool.states.anchor = groups.index(None) if None in groups else 0
    return groups


cdef int open_states(Core* c, int32_t slots, bint offers) except -1:
    """Map what slots for states need, untouched; `close_states` gives it back, also after an error."""
    cdef States* s = &c.pool.states
    s.num_slots, s.oldest, s.newest, s.reaches = slots, -1, -1, c.reaches
    s.slots = <StateSlot*>map_zeroed(slots, sizeof(StateSlot))
    s.stack = <int32_t*>map_zeroed(slots, sizeof(int32_t))
    s.of_node = <int32_t*>map_zeroed(<size_t>c.pool.tree.max_nodes + 1, sizeof(int32_t))
    s.standing = <Standing*>map_zeroed(c.max_seqs, sizeof(Standing))
    s.preempted = <int64_t*>map_zeroed(c.max_seqs, sizeof(int64_t))
    s.offers = <int32_t*>map_zeroed(slots, sizeof(int32_t)) if offers else NULL
    if (
        s.slots == NULL or s.stack == NULL or s.of_node == NULL or s.standing == NULL or s.preempted == NULL
        or offers and s.offers == NULL
    ):
        raise MemoryError(f"no memory to keep books of num_states={slots} slots")
    c.pool.host.states = s
    return 0


cdef void close_states(Core* c, int32_t max_seqs) noexcept:
    cdef States* s = &c.pool.states
    if s.num_slots == 0:
        return
    unmap(s.slots, s.num_slots, sizeof(StateSlot))
    unmap(s.stack, s.num_slots, sizeof(int32_t))
    unmap(s.of_node, <size_t>c.pool.tree.max_nodes + 1, sizeof(int32_t))
    unmap(s.standing, max_seqs, sizeof(Standing))
    unmap(s.preempted, max_seqs, sizeof(int64_t))
    unmap(s.offers, s.num_slots, sizeof(int32_t))


cdef int open_pool(SlotPool* p, int32_t first, int32_t slots) except -1:
    p.first = p.fresh = first
    p.num_slots, p.oldest, p.newest = slots, -1, -1
    if slots == 0:
        return 0
    p.stack = <int32_t*>map_zeroed(slots, sizeof(int32_t))
    p.spills = <int32_t*>map_zeroed(slots, sizeof(int32_t))
    if p.stack == NULL or p.spills == NULL:
        raise MemoryError(f"no memory to keep books of {slots} host slots")
    return 0


cdef int open_host(Core* c, int32_t blocks, int32_t checkpoints, int32_t states, int32_t write_ahead) except -1:
    """Map what a host pool for `blocks` and `checkpoints` needs, the latter from so many `states` of the device,
    untouched; `close_host` gives it back, also after an error."""
    cdef Host* h = &c.pool.host
    cdef int32_t slots = blocks + checkpoints, on_device = c.pool.num_blocks + states
    h.num_slots, h.write_ahead = slots, write_ahead
    h.width = c.num_groups + (checkpoints > 0)
    h.first_state, h.num_states = c.pool.num_blocks, states
    h.horizon = max(8192, c.pool.num_blocks // 16)
    open_pool(&h.blocks, 0, blocks)
    open_pool(&h.checkpoints, blocks, checkpoints)
    h.slots = <Slot*>map_zeroed(slots, sizeof(Slot))
    h.slot_of = <int32_t*>map_zeroed((<size_t>c.pool.tree.max_nodes + 1) * h.width, sizeof(int32_t))
    h.shadows = <Shadow*>map_zeroed(on_device, sizeof(Shadow))
    h.loads = <int32_t*>map_zeroed(on_device, sizeof(int32_t))
    h.moves = <Move*>map_zeroed(most_moves(h, on_device), sizeof(Move))
    h.needs = <int64_t*>map_zeroed(c.max_seqs, sizeof(int64_t))
    h.places = <int32_t*>map_zeroed(<size_t>c.pool.tree.max_nodes + 1, sizeof(int32_t))
    h.digests = <char*>map_zeroed(<size_t>c.pool.tree.max_nodes + 1, DIGEST_BYTES)
    c.pool.tree.named = <uint8_t*>map_zeroed(<size_t>c.pool.tree.max_nodes + 1, 1)
    if (
        h.slots == NULL or h.slot_of == NULL or h.shadows == NULL or h.loads == NULL
        or h.moves == NULL or h.needs == NULL or h.places == NULL or h.digests == NULL or c.pool.tree.named == NULL
    ):
        raise MemoryError(f"no memory to keep books of host_blocks={blocks} and host_states={checkpoints} slots")
    return 0


cdef void close_host(Core* c, int32_t max_seqs) noexcept:
    cdef Host* h = &c.pool.host
    cdef size_t on_device = <size_t>c.pool.num_blocks + h.num_states
    if h.num_slots == 0:
        return
    unmap(h.slots, h.num_slots, sizeof(Slot))
    unmap(h.blocks.stack, h.blocks.num_slots, sizeof(int32_t))
    unmap(h.checkpoints.stack, h.checkpoints.num_slots, sizeof(int32_t))
    unmap(h.slot_of, (<size_t>c.pool.tree.max_nodes + 1) * h.width, sizeof(int32_t))
    unmap(h.shadows, on_device, sizeof(Shadow))
    unmap(h.loads, on_device, sizeof(int32_t))
    unmap(h.moves, most_moves(h, on_device), sizeof(Move))
    unmap(h.needs, max_seqs, sizeof(int64_t))
    unmap(h.blocks.spills, h.blocks.num_slots, sizeof(int32_t))
    unmap(h.checkpoints.spills, h.checkpoints.num_slots, sizeof(int32_t))
    unmap(h.places, <size_t>c.pool.tree.max_nodes + 1, sizeof(int32_t))
    unmap(h.digests, <size_t>c.pool.tree.max_nodes + 1, DIGEST_BYTES)
    unmap(c.pool.tree.named, <size_t>c.pool.tree.max_nodes + 1, 1)


cdef void take_back_step(Core* c, Arrays* a) noexcept:
    """After the abort of a step that never came to be: its arrays ask for nothing, it counts for nothing, and the next
    step hands out the moves between device and host that came with it."""
    a.needs = a.last_move = 0
    c.counters.copies -= a.num_copies
    c.pool.states.copies -= a.num_state_copies
    if c.pool.host.num_slots:
        count_moves(&c.pool.host, -1)
        c.pool.moves.handed = c.pool.moves.marked


cdef bint boolean(object value, str name) except? -1:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, not {type(value).__name__}")
    return value


cdef int64_t optional(object value, str name) except? -1:
    """A number of tokens, -1 for None."""
    return -1 if value is None else bounded(value, name, 0, MAX_INT32)


cdef list rising_extra(object extra):
    """The (position, bytes) pairs of a sequence, positions rising from 0."""
    cdef int64_t position, previous = -1
    cdef list pairs = []
    for pair in extra:
        try:
            where, value = pair
        except (TypeError, ValueError):
            raise TypeError(f"extra must be (position, bytes) pairs, not {pair!r}") from None
        position = as_int(where, "extra position")
        if not isinstance(value, bytes):
            raise TypeError(f"extra at position {position} must be bytes, not {type(value).__name__}")
        if position <= previous:
            raise ValueError(f"extra position {position} must be above the one before it ({previous})")
        previous = position
        pairs.append((position, value))
    return pairs


cdef list checked_extra(list pairs, int64_t num_tokens):
    """The same pairs, of so many tokens."""
    if pairs:
        last, _ = pairs[len(pairs) - 1]
        if last >= num_tokens:
            raise ValueError(f"extra position {last} must be below the number of tokens ({num_tokens})")
    return pairs


cdef dict extra_parts(list pairs, int64_t block_size):
    """For each block with extra bytes the parts of what is compared: an entry for each token."""
    cdef dict parts = {}
    for position, value in pairs:
        offset, size = struct.pack("=q", position % block_size), struct.pack("=q", len(value))
        parts.setdefault(position // block_size, []).extend((offset, size, value, size))
    return parts


cdef list nodes_of(const Work* work, int64_t block_size):
    """What a spill says of its nodes, out of the memory that it was written to under the lock."""
    cdef const char* said = work.said
    cdef Py_ssize_t i, size = block_size * sizeof(int32_t)
    cdef bytes tokens, extra, salt, digest
    cdef list nodes = []
    for i in range(work.num_nodes):
        tokens, said = PyBytes_FromStringAndSize(said, size), said + size
        extra, said = PyBytes_FromStringAndSize(said, work.sizes[i]), said + work.sizes[i]
        salt = digest = None
        if work.parents[i] == NAMED:
            digest, said = PyBytes_FromStringAndSize(said, DIGEST_BYTES), said + DIGEST_BYTES
        elif work.parents[i] == OF_ROOT:
            salt = b""
            if extra.startswith(_salt_mark):
                length = struct.unpack_from("=q", extra, 8)[0]
                salt, extra = extra[16 : 16 + length], extra[24 + length :]
        nodes.append(SpilledNode(max(work.parents[i], -1), digest, salt, tokens, extra))
    return nodes


cdef bytes bools(object given):
    """Truths as bytes of 0 or 1."""
    array = np.asarray(given)
    if array.ndim != 1 or array.dtype != bool and array.size:
        raise TypeError(f"ok must be one bool for each block, not {given!r:.60}")
    return array.astype(bool).tobytes()


cdef bytes joined(object digests):
    cdef list given = list(digests)
    for i, digest in enumerate(given):
        if not isinstance(digest, bytes):
            raise TypeError(f"digests[{i}] must be bytes, not {type(digest).__name__}")
        if len(digest) != DIGEST_BYTES:
            raise ValueError(f"digests[{i}] has {len(digest)} bytes; a digest has {DIGEST_BYTES}")
    return b"".join(given)


cdef int open_marks(list extra, const Ints* counts, Py_ssize_t num_seqs, Marks* out) except -1:
    """Take one list of pairs for each sequence into C. No code of the user runs here: counts are what they were."""
    cdef Py_ssize_t i, n = 0
    if len(extra) != num_seqs:
        raise ValueError(f"extra has {len(extra)} lists of (position, bytes) for {num_seqs} seqs")
    for i in range(num_seqs):
        n += len(checked_extra(extra[i], 1 if counts == NULL else at(counts, i)))
    out.marks = <Mark*>grab_zeroed(n or 1, sizeof(Mark))
    out.counts = <int32_t*>grab_zeroed(num_seqs or 1, sizeof(int32_t))
    out.made = <Text*>grab_zeroed(num_seqs or 1, sizeof(Text))
    if out.marks == NULL or out.counts == NULL or out.made == NULL:
        raise MemoryError(f"no memory for {n} extras")
    n = 0
    for i in range(num_seqs):
        out.counts[i] = <int32_t>len(extra[i])
        for position, value in extra[i]:
            out.marks[n].position, out.marks[n].size = position, PyBytes_GET_SIZE(value)
            out.marks[n].bytes = PyBytes_AS_STRING(value)
            n += 1
    return 0


cdef int open_counts(object counts, Py_ssize_t size, Ints* out) except -1:
    open_ints(counts, "counts", out)
    if out.size != size:
        raise ValueError(f"counts has {out.size} elements for {size} seqs")
    return 0


include "hooks.pxi"     # of pyx/hooks/checked or pyx/hooks/release: setup.py says which
