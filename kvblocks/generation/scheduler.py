"""The worked example: a whole engine for generation with continuous batching over the paged cache.

Read it to write your own. Policy lives here: who runs, who waits, who gives way. Blocks and slots are the manager's, K
and V the cache's, and `kvblocks.integrations.transformers` brings them to the model's layers.
"""

import weakref
from bisect import insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush, nsmallest
from itertools import accumulate
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvblocks.config import CacheConfig
from kvblocks.engine import CacheEngine
from kvblocks.errors import NoFreeBlocks, NoFreeStates
from kvblocks.generation.request import Request, Token, check_request
from kvblocks.generation.sampling import Choice, Chooser, Choosers
from kvblocks.integrations.transformers import (
    CachedModel,
    PagedModel,
    Pool,
    longest_sequence,
    placeholder_tokens,
    served,
)
from kvblocks.integrations.transformers.backend import adapters
from kvblocks.manager import BlockManager
from kvblocks.step.buffers import StepBuffers
from kvblocks.tiers import Ticket, Tiers

__all__ = ["Request", "Scheduler", "Token", "blocks_needed", "most_tokens"]

LONGEST = 2**31 - 1  # tokens of a sequence, as far as the arrays of a step can say
_MOST_HELD = 65536  # sequences that have begun and not ended, preempted ones included
_FETCHED_AHEAD = 8  # waiting prompts that stores are asked for
_WORTH_WAITING = 64  # tokens: a prompt waits a pass or more for as many that another is about to compute


@dataclass(eq=False)
class _Sequence:
    """A request on its way. Its tokens and how many are computed is for the manager to know, not noted here again."""

    request_id: int
    request: Request
    prompt: npt.NDArray[np.int64]
    chooser: Chooser | None = None
    handle: int = 0  # the manager's; 0 until the first admission, kept through preemption
    num_new: int = 0
    running: bool = False
    ended: bool = False
    leader: "_Sequence | None" = None  # who computes the prompt for this one too
    followers: "list[_Sequence]" = field(default_factory=list)
    ticket: Ticket | None = None  # of its blocks that stores below the pool have, until it is admitted


@dataclass(eq=False)
class _Scheduled:
    """What one sequence does in one forward pass; `samples` once all of its known tokens are in."""

    sequence: _Sequence
    query_len: int
    samples: bool


class Scheduler:
    """Continue many prompts at once with one model and one paged cache.

    The life of a request::

        add ──> waiting ──admit / resume──> running ──last token, cancel──> freed
                   ^                           │
                   └──────────preempt──────────┘

    Both queues go by priority, then by arrival. The first request always gets on, so all of them end. A prompt that
    begins as one does that is being computed waits until it can take over what they share.

    Of a model that keeps states (linear attention, Mamba, convolutions) each running sequence has a slot of the pool,
    so no more run at once than there are slots. A pass over a prompt ends where its state is kept as a checkpoint, at
    the prompt's last multiple of `manager.state_every` tokens: there later prompts that begin alike go on, and this one
    if it was preempted.

    Args:
        model: a decoder-only transformers model, what torch.compile or PEFT made of one, or what `served` made of
            either; the cache gets its dtype and device. Requests share K and V only under the same adapters, which must
            not change while they run.
        config: sizes of the cache, as `kvblocks.integrations.transformers.cache_config` gives them.
        layout: of the cache; NHD, as it is what attention kernels read.
        max_batch_tokens: tokens of one forward pass. A prompt longer than what is left of them goes in chunks.
        max_seqs: sequences that run at once; never more than `max_batch_tokens`, as each takes one to decode.
        watermark: share of the pool that an admission leaves free, for those who run to grow into.
        choose: the next tokens [n], int64, from their logits [n, vocabulary], in place of the requests' settings and of
            the model's generation config.
        tokenizer: transformers' of the model, where stop strings are asked for.
        pool: whose engine and manager to use; `config` is its `config` then, and `layout` and `watermark` are its own.
            A model that keeps states needs one.

    Raises:
        ValueError: a model that cannot be served, or a number out of range.
        OutOfMemory: the cache does not fit.

    The model's layers attend through kvblocks for the length of a pass. Between passes the model may be used for
    anything, by other schedulers too.

    Thread-safety: one thread drives a scheduler.
    """

    def __init__(
        self,
        model: PreTrainedModel | PagedModel | CachedModel,
        config: CacheConfig,
        *,
        layout: str = "NHD",
        max_batch_tokens: int = 512,
        max_seqs: int = 64,
        watermark: float = 0.01,
        choose: Callable[[Tensor], Tensor] | None = None,
        tokenizer: Any = None,
        pool: Pool | None = None,
    ) -> None:
        if max_seqs < 1 or max_batch_tokens < 1:
            raise ValueError(f"max_seqs={max_seqs} and max_batch_tokens={max_batch_tokens} must be at least 1")
        self._paged = served(model)
        self.model = model = self._paged.model
        limit = longest_sequence(model.config)
        self.max_batch_tokens = max_batch_tokens
        fits = most_tokens(config)
        self.max_seq_len = fits if limit is None else min(limit, fits)
        self.max_seqs = min(max_seqs, max_batch_tokens)
        self._adapted = bool(adapters(model))
        # What the model hands to caches may be other K and V than what attention gets; then neither finds the other's.
        self._salt = b"" if self._paged.as_cached() else b"attention:"
        self._choose = choose
        self._choosers = None if choose is not None else Choosers(model, tokenizer)
        self._has_windows = any(group.reach is not None for group in config.groups)
        self._placeholders = placeholder_tokens(model.config)
        self._closed = False
        if pool is not None:
            pool.check(self._paged)
            self.engine, self.manager = pool.engine, pool.manager
            self._tiers = pool.tiers
        else:
            if self._paged.keeps_states:
                raise ValueError(f"{type(model).__name__} keeps states, for which a pool has slots: give pool=")
            self.engine = CacheEngine(config, model.dtype, model.device, layout=layout)
            self.manager = BlockManager.for_config(config, max_seqs=_MOST_HELD, watermark=watermark)
            self._tiers = None
        if self.manager.num_states:
            self.max_seqs = min(self.max_seqs, self.manager.num_states)
        self._pool = pool
        self.buffers = self._buffers_for(1)
        self._waiting: list[tuple[tuple[int, int], _Sequence]] = []  # a heap; who was cancelled is skipped
        self._running: list[_Sequence] = []  # in the same order
        self._unfinished: dict[int, _Sequence] = {}
        self._finalizer = weakref.finalize(self, _give_back, self.manager, self._unfinished, self._tiers)
        self.num_held = 0  # sequences that have a handle in the manager, and those that will be forked from them
        self.num_hit = self.num_hit_again = 0  # tokens found, at the first admission and at those after a preemption
        self.num_hit_by_store = [0] * (len(self._tiers.stats()) if self._tiers is not None else 0)  # part of num_hit
        self._num_following = 0  # behind those that run
        self._num_added = 0

    def add(self, request: Request) -> int:
        """Queue a request; returns its id: 0, 1, 2, ... Where it asks for n answers, the ids of the others follow it.

        Raises:
            ValueError: the prompt is empty or has a token that the model does not know, `max_new_tokens` is below 1, or
                even alone the sequence would not fit.
            RuntimeError: the scheduler is closed.
        """
        self._check_open()
        check_request(request)
        # The last new token is never fed back, so it needs no slot.
        longest = len(request.prompt) + request.max_new_tokens - 1
        if longest > self.max_seq_len:
            raise ValueError(
                f"{len(request.prompt)} prompt tokens and max_new_tokens={request.max_new_tokens} need {longest} "
                f"slots; the cache and the model have {self.max_seq_len} for one sequence"
            )
        embeddings: Any = self.model.get_input_embeddings()
        known = len(embeddings.weight)
        for token in request.prompt:
            if not 0 <= token < known:
                raise ValueError(f"token {token} is in the prompt; the model knows 0 to {known - 1}")
            if token in self._placeholders:
                raise ValueError(
                    f"token {token} is in the prompt, the config's {self._placeholders[token]}; pixels and sounds are "
                    "not taken here: use model.generate with kvblocks.integrations.transformers.PagedCache"
                )
        if request.n > min(self.max_seqs, _MOST_HELD):
            few = self.max_seqs == self.manager.num_states
            states = f", with {self.manager.num_states} slots for states" if few else ""
            raise ValueError(f"n={request.n} answers run together, and max_seqs={self.max_seqs} sequences can{states}")
        if self._choosers is not None:
            choosers: Sequence[Chooser | None] = self._choosers.make(request) or [None]
        else:
            _check_unsampled(request)
            choosers = [None] * request.n
        if longest > self.buffers.max_blocks_per_seq * self.manager.block_size:
            self.buffers = self._buffers_for(longest)
        salt = self._salt + (self._adapters() if self._adapted else b"")
        if salt:
            request = replace(request, salt=salt + request.salt)
        prompt = np.array(request.prompt)
        first, *others = [
            _Sequence(self._num_added + number, request, prompt, chooser) for number, chooser in enumerate(choosers)
        ]
        first.followers = others
        for sequence in others:
            sequence.leader = first
        for sequence in (first, *others):
            self._unfinished[sequence.request_id] = sequence
        self._num_added += request.n
        self._queue(first)
        return first.request_id

    def cancel(self, request_id: int) -> bool:
        """Drop a request that waits or runs, and give its blocks back; False where it does neither.

        Raises:
            RuntimeError: the scheduler is closed.
        """
        self._check_open()
        sequence = self._unfinished.pop(request_id, None)
        if sequence is None:
            return False
        sequence.ended = True
        if sequence.ticket is not None and not sequence.followers:
            self._release(sequence)
        if sequence.leader is not None:
            leader = sequence.leader
            leader.followers.remove(sequence)
            self.num_held -= leader.handle > 0
            self._num_following -= leader.running
        elif sequence.followers:
            self.num_held -= sequence.handle > 0
            self._num_following -= sequence.running
            self._hand_over(sequence)
        elif sequence.handle:
            if sequence.running:
                self._running.remove(sequence)
            self.num_held -= 1
            self.manager.free(sequence.handle)
        return True

    @property
    def num_unfinished(self) -> int:
        """Answers that wait or run."""
        return len(self._unfinished)

    def stream(self) -> Iterator[Token]:
        """The tokens of all requests, as they come, until all are finished. More may be added meanwhile."""
        while self.num_unfinished:
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """One forward pass: at most one new token for each running sequence, none for those still in their prompt.

        If the pass fails, the step is aborted: no sequence has moved, and the call may be repeated. One whose state the
        pass may have written is preempted, and goes on from its checkpoint.

        Raises:
            RuntimeError: the scheduler is closed.
        """
        self._check_open()
        if self._pool is not None:
            self._pool.blocks.begin(None)  # steps are committed in order, and caches may have one open
        if self._tiers is not None:
            self._tiers.poll()
            self._fetch_ahead(self._tiers)
        self._admit()
        if not self._running:
            return []
        scheduled, step_id = self._prepare(self._schedule())
        try:
            self.engine.move(self.buffers)
            if self.engine.arena is not None and self._tiers is None:
                self.manager.landed(self.engine.landed())
            ends = accumulate(each.query_len for each in scheduled)
            last_tokens = [end - 1 for each, end in zip(scheduled, ends, strict=True) if each.samples]
            wanted = torch.tensor(last_tokens, dtype=torch.int64, device=self.model.device)
            logits = self._paged.forward(self.engine, self.buffers, wanted)
            leaders = [each.sequence for each in scheduled if each.samples]
            answers = [sequence for leader in leaders for sequence in (leader, *leader.followers)]
            if len(answers) > len(leaders):
                counts = torch.tensor([1 + len(leader.followers) for leader in leaders], device=logits.device)
                logits = logits.repeat_interleave(counts, 0)
            choices = self._chosen(logits, answers) if answers else []
        except BaseException:
            self._put_back(self.manager.abort(step_id))
            raise
        # From here on the K and V of this pass count, and full blocks can be hit by other prompts.
        self.manager.commit(step_id)
        for sequence in answers:
            self._fork(sequence)
        return self._append(answers, choices)

    def reset_prefix_cache(self) -> None:
        """For new weights: compute everything anew from here on, of the requests that run too.

        The tokens that these have got stay as they are.
        """
        self._check_open()
        while self._running:
            self._preempt()
        self.manager.reset_prefix_cache()

    def close(self) -> None:
        """Take no more requests and run none; what has not ended gives its blocks back."""
        self._closed = True
        self._finalizer()

    def _buffers_for(self, num_tokens: int) -> StepBuffers:
        """Step buffers for sequences of so many tokens: twice as wide, so that they seldom have to be made anew."""
        config = self.engine.config
        return StepBuffers.for_config(
            config,
            max_seqs=self.max_seqs,
            max_tokens=self.max_batch_tokens,
            max_seq_len=min(max(1, self.max_seq_len), max(16 * config.block_size, 2 * num_tokens)),
            device=self.model.device,
        )

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the scheduler is closed; make a new one")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _admit(self) -> None:
        """Let in who waits, in order, as long as there are blocks for the whole of a prompt.

        Reserving a part with `admit(reserve=...)` would let more in and preempt more. Where layers have windows it is
        done, as there the whole of a prompt is never held.
        """
        reserve = self.max_batch_tokens if self._has_windows else None
        if not self._waiting:
            return
        computing: dict[tuple[bytes, bytes], list[_Sequence]] = {}
        for sequence in self._running:
            if not sequence.num_new:
                computing.setdefault(_beginning(sequence), []).append(sequence)
        while self._waiting:
            sequence = self._waiting[0][1]
            if sequence.ended:
                heappop(self._waiting)
                continue
            if not sequence.handle:
                if self.num_held + 1 + len(sequence.followers) > _MOST_HELD:
                    return
                if self._awaits(sequence, computing):
                    return
            if not self._has_fetched(sequence):
                return
            without_state = self._running and self.manager.num_states and not self.manager.num_free_states
            if without_state or self._num_rows() + len(sequence.followers) >= self.max_seqs:
                if not self._gives_way(sequence):
                    return
                continue
            try:
                self._let_in(sequence, reserve)
            except NoFreeBlocks:
                if self._running:
                    if not self._gives_way(sequence):
                        return
                    continue
                if not self._has_windows:
                    raise
                self._let_in(sequence, 1)  # a pool that holds little more than the windows; it goes in small chunks
            heappop(self._waiting)
            sequence.running = True
            self._num_following += len(sequence.followers)
            insort(self._running, sequence, key=_order)
            if not sequence.num_new:
                computing.setdefault(_beginning(sequence), []).append(sequence)

    def _num_rows(self) -> int:
        """Rows of a pass, once each running sequence has forked for those that follow it."""
        return len(self._running) + self._num_following

    def _gives_way(self, sequence: _Sequence) -> bool:
        """Preempt the last of those who run, if it has a lower priority."""
        if not self._running or self._running[-1].request.priority >= sequence.request.priority:
            return False
        self._preempt()
        return True

    def _preempt(self) -> _Sequence:
        """Let the last of those who run wait."""
        last = self._running[-1]
        self.manager.preempt(last.handle)
        self._put_back([last.handle])
        return last

    def _put_back(self, handles: Sequence[int]) -> None:
        """Let sequences that ran wait again: the manager has preempted them."""
        for sequence in [sequence for sequence in self._running if sequence.handle in handles]:
            self._running.remove(sequence)
            sequence.running = False
            self._num_following -= len(sequence.followers)
            self._queue(sequence)

    def _queue(self, sequence: _Sequence) -> None:
        heappush(self._waiting, (_order(sequence), sequence))

    def _let_in(self, sequence: _Sequence, reserve: int | None) -> None:
        if sequence.handle:
            self.num_hit_again += self.manager.resume(sequence.handle, reserve=reserve)
        else:
            salt, extra = sequence.request.salt, sequence.request.extra
            fetched = None if sequence.ticket is None else sequence.ticket.fetch
            sequence.handle, hit = self.manager.admit(
                sequence.prompt, salt=salt, extra=extra, reserve=reserve, fetched=fetched
            )
            self.num_hit += hit
            self.num_held += 1 + len(sequence.followers)
            if sequence.ticket is not None:
                left = hit - sequence.ticket.num_local  # what was fetched counts as far as it was hit
                for number, tokens in enumerate(sequence.ticket.tokens_by_store):
                    counted = max(0, min(tokens, left))
                    self.num_hit_by_store[number] += counted
                    left -= counted
                sequence.ticket = None

    def _fetch_ahead(self, tiers: Tiers) -> None:
        """Look in the stores for prompts that are about to be admitted, as many as the host slots have room for."""
        manager, groups = self.manager, len(self.manager.groups)
        room = manager.host_blocks // 4 - manager.num_background_slots
        states = manager.host_states // 8  # one for each prompt, of half of what may be held at once
        for number, (_, sequence) in enumerate(nsmallest(_FETCHED_AHEAD, self._waiting)):
            needed = len(sequence.prompt) // manager.block_size * groups
            if sequence.ticket is not None:
                room -= 0 if sequence.ticket.done else needed
                states -= 1
            elif sequence.handle or sequence.ended:
                continue
            elif number == 0 or (needed <= room and (states > 0 or not manager.num_states)):
                room -= needed
                states -= 1
                salt, extra = sequence.request.salt, sequence.request.extra
                sequence.ticket = tiers.fetch(sequence.prompt, salt=salt, extra=extra)

    def _has_fetched(self, sequence: _Sequence) -> bool:
        """Whether a sequence need not wait for stores. Where nothing else runs it is waited for, up to the deadline."""
        if self._tiers is None or sequence.handle:
            return True
        if sequence.ticket is None:
            salt, extra = sequence.request.salt, sequence.request.extra
            sequence.ticket = self._tiers.fetch(sequence.prompt, salt=salt, extra=extra)
        if not sequence.ticket.done and not self._running:
            self._tiers.wait([sequence.ticket])
        return sequence.ticket.done

    def _release(self, sequence: _Sequence) -> None:
        if self._tiers is not None and sequence.ticket is not None:
            self._tiers.release(sequence.ticket)
            sequence.ticket = None

    def _adapters(self) -> bytes:
        return adapters(self.model) if self._pool is None else self._pool.adapters()

    def _awaits(self, waiting: _Sequence, computing: Mapping[tuple[bytes, bytes], Sequence[_Sequence]]) -> bool:
        """Whether a sequence that runs is about to compute much that this one's prompt begins with."""
        useful = max(
            (self._shared(waiting, other) for other in computing.get(_beginning(waiting), ()) if other.running),
            default=0,
        )
        if useful < _WORTH_WAITING:
            return False
        there = self.manager.match(waiting.prompt, salt=waiting.request.salt, extra=waiting.request.extra)
        return useful - there >= _WORTH_WAITING

    def _shared(self, waiting: _Sequence, other: _Sequence) -> int:
        """How many tokens of a sequence can be found once another one's prompt is computed."""
        alike = min(_common(waiting, other), len(waiting.prompt) - 1)
        if self.manager.num_states:
            checkpoint = self.manager.next_checkpoint(other.handle)
            return checkpoint if checkpoint <= alike else 0
        return alike // self.manager.block_size * self.manager.block_size

    def _schedule(self) -> list[_Scheduled]:
        """Share the tokens of a pass out: one to each who decodes, what is left to prompts, the oldest first.

        A prompt goes as far as its checkpoint first, where layers keep states.
        """
        lengths = self.manager.lengths([sequence.handle for sequence in self._running])
        missing = (lengths.num_tokens - lengths.num_computed).tolist()
        budget = self.max_batch_tokens - missing.count(1)
        scheduled = []
        for sequence, num_missing, computed in zip(self._running, missing, lengths.num_computed.tolist(), strict=True):
            query_len = num_missing
            if num_missing > 1:
                checkpoint = self.manager.next_checkpoint(sequence.handle)
                query_len = min(num_missing, budget, checkpoint - computed if checkpoint else budget)
                budget -= query_len
            if query_len:
                scheduled.append(_Scheduled(sequence, query_len, samples=query_len == num_missing))
        return scheduled

    def _prepare(self, scheduled: list[_Scheduled]) -> tuple[list[_Scheduled], int]:
        """Get slots for the scheduled, from the newest sequences if need be, and the last one in smaller chunks.

        `prepare` that fails has changed nothing.
        """
        while True:
            try:
                handles = [each.sequence.handle for each in scheduled]
                return scheduled, self.manager.prepare(handles, [each.query_len for each in scheduled], self.buffers)
            except (NoFreeBlocks, NoFreeStates) as error:
                if len(self._running) == 1:
                    [only] = scheduled
                    if not self._has_windows or only.query_len == 1 or isinstance(error, NoFreeStates):
                        raise
                    scheduled = [_Scheduled(only.sequence, only.query_len // 2, samples=False)]
                    continue
                newest = self._preempt()
                scheduled = [each for each in scheduled if each.sequence is not newest]

    def _chosen(self, logits: Tensor, sequences: list[_Sequence]) -> list[Choice]:
        """A token for each sequence, by its row of the logits [n, vocabulary]."""
        if self._choose is not None:
            return [Choice(token) for token in self._checked(self._choose(logits), logits)]
        best: list[int] = logits.argmax(-1).tolist()
        rngs = [sequence.chooser.rng for sequence in sequences if sequence.chooser and sequence.chooser.rng]
        states = [rng.get_state() for rng in rngs]
        try:
            return [
                Choice(token)
                if sequence.chooser is None
                else sequence.chooser.choose(self.manager.tokens(self._owner(sequence).handle), row)
                for sequence, row, token in zip(sequences, logits, best, strict=True)
            ]
        except BaseException:
            for rng, state in zip(rngs, states, strict=True):
                rng.set_state(state)  # a pass that is repeated draws the same tokens
            raise

    def _checked(self, tokens: Any, logits: Tensor) -> list[int]:
        if not isinstance(tokens, Tensor) or tokens.shape != logits.shape[:1] or tokens.dtype != torch.int64:
            shape = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
            raise TypeError(
                f"choose returned {shape}; for logits {list(logits.shape)} it must be int64 [{len(logits)}]"
            )
        chosen: list[int] = tokens.tolist()
        for token in chosen:
            if not 0 <= token < logits.shape[1]:
                raise ValueError(
                    f"choose returned token {token}; for logits {list(logits.shape)} it must be 0 to "
                    f"{logits.shape[1] - 1}"
                )
        return chosen

    @staticmethod
    def _owner(sequence: _Sequence) -> _Sequence:
        """Whose handle in the manager a sequence goes by: until its prompt is computed that of its leader."""
        return sequence if sequence.leader is None else sequence.leader

    def _hand_over(self, leader: _Sequence) -> None:
        """Let the first of those that follow lead, in the queue and in the manager."""
        heir, *rest = leader.followers
        heir.leader, heir.followers = None, rest
        for sequence in rest:
            sequence.leader = heir
        heir.handle, heir.running = leader.handle, leader.running
        heir.ticket, leader.ticket = leader.ticket, None
        leader.followers = []
        if leader.running:
            self._running[self._running.index(leader)] = heir
        else:
            self._queue(heir)

    def _fork(self, leader: _Sequence) -> None:
        """The prompt is computed: give each that follows a sequence of its own, which shares every block."""
        if not leader.followers:
            return
        handles = self.manager.fork(leader.handle, len(leader.followers))
        for sequence, handle in zip(leader.followers, handles, strict=True):
            sequence.leader, sequence.handle, sequence.running = None, handle, True
            insort(self._running, sequence, key=_order)
        self._num_following -= len(handles)
        leader.followers = []

    def _append(self, sequences: list[_Sequence], choices: list[Choice]) -> list[Token]:
        """Hand the chosen tokens to the manager; who is finished gives all blocks back."""
        news, ended, handles, ongoing = [], [], [], []
        for sequence, choice in zip(sequences, choices, strict=True):
            if sequence.ended:
                continue  # it was cancelled while tokens were chosen
            sequence.num_new += 1
            finish = None
            if choice.stops or choice.token in sequence.request.stop_tokens:
                finish = "stop"
            elif sequence.num_new == sequence.request.max_new_tokens:
                finish = "length"
            news.append(Token(sequence.request_id, choice.token, finish, choice.logprob, choice.top))
            if finish is None:
                handles.append(sequence.handle)
                ongoing.append(choice.token)
            else:
                ended.append(sequence)
        if handles:
            self.manager.append(handles, ongoing)
        if ended:
            self.manager.free([sequence.handle for sequence in ended])
            self.num_held -= len(ended)
            for sequence in ended:
                sequence.ended = True
                del self._unfinished[sequence.request_id]
            self._running = [sequence for sequence in self._running if not sequence.ended]
        return news


def blocks_needed(config: CacheConfig, num_tokens: int, max_batch_tokens: int) -> int:
    """The blocks that a sequence holds at most, alone, in passes of up to so many tokens; the manager's answer."""
    manager = _asked(config)
    return max(manager.blocks_needed(num_tokens, reserve=reserve) for reserve in (1, max_batch_tokens))


def most_tokens(config: CacheConfig) -> int:
    """Tokens of the longest sequence that can be run, in passes as small as need be.

    Where every layer has a window or a chunk, that may be far more than the pool holds at once.
    """
    manager = _asked(config)
    low, high = 0, LONGEST
    while low < high:
        middle = (low + high + 1) // 2
        if manager.blocks_needed(middle, reserve=1) <= config.num_gpu_blocks:
            low = middle
        else:
            high = middle - 1
    return low


def _asked(config: CacheConfig) -> BlockManager:
    """A manager that is only asked how many blocks are needed."""
    return BlockManager(1, config.block_size, groups=[group.reach for group in config.groups], max_seqs=1)


def _give_back(manager: BlockManager, unfinished: dict[int, _Sequence], tiers: Tiers | None) -> None:
    """Free what sequences hold, when their scheduler is closed or gone."""
    handles = [sequence.handle for sequence in unfinished.values() if sequence.handle]
    for sequence in unfinished.values():
        if tiers is not None and sequence.ticket is not None:
            tiers.release(sequence.ticket)
    unfinished.clear()
    if handles:
        manager.free(handles)


def _beginning(sequence: _Sequence) -> tuple[bytes, bytes]:
    """What two prompts must have in common for one to wait for the other."""
    return sequence.request.salt, sequence.prompt[:_WORTH_WAITING].tobytes()


def _order(sequence: _Sequence) -> tuple[int, int]:
    """Who comes first: by priority, then by arrival."""
    return -sequence.request.priority, sequence.request_id


def _check_unsampled(request: Request) -> None:
    """`choose` takes the place of all that says how tokens are chosen."""
    for name in ("temperature", "top_k", "top_p", "min_p", "seed", "logprobs"):
        if getattr(request, name) is not None:
            raise ValueError(f"{name}={getattr(request, name)} has no effect with choose, which decides every token")
    for name in ("logits_processors", "stop_strings"):
        if getattr(request, name):
            raise ValueError(f"{name} have no effect with choose, which decides every token")


def _common(first: _Sequence, second: _Sequence) -> int:
    """How many tokens two prompts have in common from the start, with all that decides their K and V."""
    if first.request.salt != second.request.salt:
        return 0
    size = min(len(first.prompt), len(second.prompt))
    if first.request.extra != second.request.extra:
        size = min(size, *(position for position, _ in {*first.request.extra} ^ {*second.request.extra}))
    differ = first.prompt[:size] != second.prompt[:size]
    return int(differ.argmax()) if differ.any() else size
