"""The worked example: a whole engine for generation with continuous batching over the paged cache.

Read it to write your own. Policy lives here: who runs, who waits, who gives way. Blocks and slots are the manager's, K
and V the cache's, and `kvblocks.integrations.transformers` brings them to the model's layers.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvblocks.config import CacheConfig
from kvblocks.engine import CacheEngine
from kvblocks.errors import NoFreeBlocks
from kvblocks.integrations.transformers import PagedModel, longest_sequence, placeholder_tokens
from kvblocks.manager import BlockManager
from kvblocks.step.buffers import StepBuffers

__all__ = ["Generator", "Request", "Token", "blocks_needed", "most_tokens"]

LONGEST = 2**31 - 1  # tokens of a sequence, as far as the arrays of a step can say
_WORTH_WAITING = 64  # tokens: a prompt waits a pass or more for as many that another is about to compute


@dataclass(frozen=True)
class Request:
    """A prompt to be continued.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: at least 1.
        stop_tokens: ids that end the request; the one that does is its last token.
        salt: what decides the K and V beside the ids: an adapter, a tenant. Requests of another salt share nothing.
        extra: the (position in the prompt, bytes) of what the ids do not say, in order.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    stop_tokens: frozenset[int] = frozenset()
    salt: bytes = b""
    extra: tuple[tuple[int, bytes], ...] = ()


class Token(NamedTuple):
    """One new token of a request. With the last one, `finish` says why it is: "stop" or "length"."""

    request_id: int
    token: int
    finish: str | None


@dataclass(eq=False)
class _Sequence:
    """A request on its way. Its tokens and how many are computed is for the manager to know, not noted here again."""

    request_id: int
    request: Request
    prompt: npt.NDArray[np.int64]
    handle: int = 0  # the manager's; 0 until the first admission, kept through preemption
    num_new: int = 0


@dataclass(eq=False)
class _Row:
    """What one sequence does in one forward pass; `samples` once all of its known tokens are in."""

    sequence: _Sequence
    query_len: int
    samples: bool


class Generator:
    """Continue many prompts at once with one model and one paged cache.

    The life of a request::

        add ──> waiting ──admit / resume──> running ──last token, cancel──> freed
                   ^                           │
                   └──────────preempt──────────┘

    Both queues keep the order of arrival, and who runs came before who waits. The oldest request always gets on, so all
    of them end. A prompt that begins as one does that is being computed waits until it can take over what they share.

    Args:
        model: a decoder-only transformers model; the cache gets its dtype and device.
        config: sizes of the cache, as `kvblocks.integrations.transformers.cache_config` gives them.
        layout: of the cache.
        max_batch_tokens: tokens of one forward pass. A prompt longer than what is left of them goes in chunks.
        max_seqs: sequences that run at once; never more than `max_batch_tokens`, as each takes one to decode.
        watermark: share of the pool that an admission leaves free, for those who run to grow into.
        choose: the next tokens [n], int64, from their logits [n, vocabulary]; by default the best ones.

    Raises:
        ValueError: a model that cannot be served, or a number out of range.
        OutOfMemory: the cache does not fit.

    The model's layers attend through kvblocks for the length of a pass. Between passes the model may be used for
    anything, by other generators too.

    Thread-safety: one thread drives a generator.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: CacheConfig,
        *,
        layout: str = "NHD",
        max_batch_tokens: int = 512,
        max_seqs: int = 64,
        watermark: float = 0.01,
        choose: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if max_seqs < 1 or max_batch_tokens < 1:
            raise ValueError(f"max_seqs={max_seqs} and max_batch_tokens={max_batch_tokens} must be at least 1")
        self.model = model
        limit = longest_sequence(model.config)
        self.max_batch_tokens = max_batch_tokens
        fits = most_tokens(config)
        self.max_seq_len = fits if limit is None else min(limit, fits)
        self.max_seqs = min(max_seqs, max_batch_tokens)
        self._choose = choose
        self._has_windows = any(group.reach is not None for group in config.groups)
        self._placeholders = placeholder_tokens(model.config)
        self._paged = PagedModel(model)
        self._closed = False
        self.engine = CacheEngine(config, model.dtype, model.device, layout=layout)
        self.manager = BlockManager(
            config.num_gpu_blocks,
            config.block_size,
            groups=[group.reach for group in config.groups],
            max_seqs=self.max_seqs,
            watermark=watermark,
        )
        self.buffers = self._buffers_for(1)
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._num_added = 0

    def add(self, request: Request) -> int:
        """Queue a request; returns its id: 0, 1, 2, ...

        Raises:
            ValueError: the prompt is empty or has a token that the model does not know, `max_new_tokens` is below 1, or
                even alone the sequence would not fit.
            RuntimeError: the generator is closed.
        """
        self._check_open()
        if type(request.max_new_tokens) is not int:
            raise TypeError(f"max_new_tokens={request.max_new_tokens!r} must be an int")
        if any(not hasattr(token, "__index__") for token in request.prompt):
            raise TypeError("the prompt of a request is token ids, as ints")
        for stop in request.stop_tokens:
            if type(stop) is not int:
                raise TypeError(f"stop_tokens holds {stop!r} of type {type(stop).__name__}; give token ids, as int")
        _check_keys(request)
        if not request.prompt or request.max_new_tokens < 1:
            raise ValueError(
                f"a request of {len(request.prompt)} prompt tokens and max_new_tokens={request.max_new_tokens}; "
                "both must be at least 1"
            )
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
        if longest > self.buffers.max_blocks_per_seq * self.manager.block_size:
            self.buffers = self._buffers_for(longest)
        self._waiting.append(_Sequence(self._num_added, request, np.array(request.prompt)))
        self._num_added += 1
        return self._waiting[-1].request_id

    def cancel(self, request_id: int) -> bool:
        """Drop a request that waits or runs, and give its blocks back; False where it does neither.

        Raises:
            RuntimeError: the generator is closed.
        """
        self._check_open()
        for queue in (self._waiting, self._running):
            for sequence in queue:
                if sequence.request_id == request_id:
                    queue.remove(sequence)
                    if sequence.handle:
                        self.manager.free([sequence.handle])
                    return True
        return False

    @property
    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        return len(self._waiting) + len(self._running)

    def stream(self) -> Iterator[Token]:
        """The tokens of all requests, as they come, until all are finished. More may be added meanwhile."""
        while self.num_unfinished:
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """One forward pass: at most one new token for each running sequence, none for those still in their prompt.

        If the pass fails, the step is aborted: no sequence has moved, and the call may be repeated.

        Raises:
            RuntimeError: the generator is closed.
        """
        self._check_open()
        self._admit()
        if not self._running:
            return []
        rows, step_id = self._prepare(self._schedule())
        try:
            self.engine.move(self.buffers)
            ends = accumulate(row.query_len for row in rows)
            last_tokens = [end - 1 for row, end in zip(rows, ends, strict=True) if row.samples]
            wanted = torch.tensor(last_tokens, dtype=torch.int64, device=self.model.device)
            logits = self._paged.forward(self.engine, self.buffers, wanted)
            tokens = self._chosen(logits) if last_tokens else []
        except BaseException:
            self.manager.abort(step_id)
            raise
        # From here on the K and V of this pass count, and full blocks can be hit by other prompts.
        self.manager.commit(step_id)
        return self._append([row.sequence for row in rows if row.samples], tokens)

    def reset_prefix_cache(self) -> None:
        """For new weights: compute everything anew from here on, of the requests that run too.

        The tokens that these have got stay as they are.
        """
        self._check_open()
        for sequence in reversed(self._running):
            self.manager.preempt(sequence.handle)
            self._waiting.appendleft(sequence)
        self._running = []
        self.manager.reset_prefix_cache()

    def close(self) -> None:
        """Take no more requests and run none. The cache goes with the generator."""
        self._closed = True

    def _buffers_for(self, num_tokens: int) -> StepBuffers:
        """Step buffers for sequences of so many tokens: twice as wide, so that they seldom have to be made anew."""
        config = self.engine.config
        widest = -(-max(1, self.max_seq_len) // config.block_size)
        return StepBuffers(
            self.max_seqs,
            self.max_batch_tokens,
            min(widest, max(16, -(-2 * num_tokens // config.block_size))),
            device=self.model.device,
            groups=len(config.groups),
        )

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the generator is closed; make a new one")

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
        while self._waiting and len(self._running) < self.max_seqs:
            sequence = self._waiting[0]
            if not sequence.handle and self._awaits(sequence):
                return
            try:
                self._let_in(sequence, reserve)
            except NoFreeBlocks:
                if self._running:
                    return
                if not self._has_windows:
                    raise
                self._let_in(sequence, 1)  # a pool that holds little more than the windows; it goes in small chunks
            self._running.append(self._waiting.popleft())

    def _let_in(self, sequence: _Sequence, reserve: int | None) -> None:
        if sequence.handle:
            self.manager.resume(sequence.handle, reserve=reserve)
        else:
            salt, extra = sequence.request.salt, sequence.request.extra
            sequence.handle, _ = self.manager.admit(sequence.prompt, salt=salt, extra=extra, reserve=reserve)

    def _awaits(self, waiting: _Sequence) -> bool:
        """Whether a sequence that runs is about to compute much that this one's prompt begins with."""
        alike = max((_common(waiting, sequence) for sequence in self._running if not sequence.num_new), default=0)
        useful = min(alike, len(waiting.prompt) - 1) // self.manager.block_size * self.manager.block_size
        if useful < _WORTH_WAITING:
            return False
        there = self.manager.match(waiting.prompt, salt=waiting.request.salt, extra=waiting.request.extra)
        return useful - there >= _WORTH_WAITING

    def _schedule(self) -> list[_Row]:
        """Share the tokens of a pass out: one to each who decodes, what is left to prompts, the oldest first."""
        lengths = self.manager.lengths([sequence.handle for sequence in self._running])
        missing = (lengths.num_tokens - lengths.num_computed).tolist()
        budget = self.max_batch_tokens - missing.count(1)
        rows = []
        for sequence, num_missing in zip(self._running, missing, strict=True):
            query_len = num_missing
            if num_missing > 1:
                query_len = min(num_missing, budget)
                budget -= query_len
            if query_len:
                rows.append(_Row(sequence, query_len, samples=query_len == num_missing))
        return rows

    def _prepare(self, rows: list[_Row]) -> tuple[list[_Row], int]:
        """Get slots for the rows, from the newest sequences if need be, and the last one in smaller chunks.

        `prepare` that fails has changed nothing.
        """
        while True:
            try:
                handles = [row.sequence.handle for row in rows]
                return rows, self.manager.prepare(handles, [row.query_len for row in rows], self.buffers)
            except NoFreeBlocks:
                if len(self._running) == 1:
                    [row] = rows
                    if not self._has_windows or row.query_len == 1:
                        raise
                    rows = [_Row(row.sequence, row.query_len // 2, samples=False)]
                    continue
                newest = self._running.pop()
                self.manager.preempt(newest.handle)
                self._waiting.appendleft(newest)
                rows = [row for row in rows if row.sequence is not newest]

    def _chosen(self, logits: Tensor) -> list[int]:
        if self._choose is None:
            best: list[int] = logits.argmax(-1).tolist()
            return best
        tokens: Any = self._choose(logits)
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

    def _append(self, sequences: list[_Sequence], tokens: list[int]) -> list[Token]:
        """Hand the sampled tokens to the manager; who is finished gives all blocks back."""
        news, ended, handles, ongoing = [], [], [], []
        for sequence, token in zip(sequences, tokens, strict=True):
            if sequence not in self._running:
                continue  # `choose` cancelled it
            sequence.num_new += 1
            finish = None
            if token in sequence.request.stop_tokens:
                finish = "stop"
            elif sequence.num_new == sequence.request.max_new_tokens:
                finish = "length"
            news.append(Token(sequence.request_id, token, finish))
            if finish is None:
                handles.append(sequence.handle)
                ongoing.append(token)
            else:
                ended.append(sequence)
        if handles:
            self.manager.append(handles, ongoing)
        if ended:
            self.manager.free([sequence.handle for sequence in ended])
            self._running = [sequence for sequence in self._running if sequence not in ended]
        return news


def blocks_needed(config: CacheConfig, num_tokens: int, max_batch_tokens: int) -> int:
    """The blocks that a sequence holds at most, alone: in a group with a window what that and one pass take."""
    needed = 0
    for group in config.groups:
        kept = num_tokens
        if group.reach is not None:
            kept = min(num_tokens, group.reach.size - 1 + max_batch_tokens + config.block_size - 1)
        needed += -(-kept // config.block_size)
    return needed


def most_tokens(config: CacheConfig) -> int:
    """Tokens of the longest sequence that can be run, in passes as small as need be.

    Where every layer has a window or a chunk, that may be far more than the pool holds at once.
    """
    low, high = 0, LONGEST
    while low < high:
        middle = (low + high + 1) // 2
        if blocks_needed(config, middle, 1) <= config.num_gpu_blocks:
            low = middle
        else:
            high = middle - 1
    return low


def _check_keys(request: Request) -> None:
    """Stop what the manager would refuse only once the request is admitted."""
    if not isinstance(request.salt, bytes):
        raise TypeError(f"salt is a {type(request.salt).__name__}; give bytes")
    before = -1
    for pair in request.extra:
        if not isinstance(pair, tuple) or len(pair) != 2 or type(pair[0]) is not int or not isinstance(pair[1], bytes):
            raise TypeError(f"extra holds {pair!r}; give (position, bytes) pairs")
        if not before < pair[0] < len(request.prompt):
            raise ValueError(
                f"extra names position {pair[0]}; the next must be above {before} and below {len(request.prompt)}"
            )
        before = pair[0]


def _common(first: _Sequence, second: _Sequence) -> int:
    """How many tokens two prompts have in common from the start, with all that decides their K and V."""
    if first.request.salt != second.request.salt:
        return 0
    size = min(len(first.prompt), len(second.prompt))
    if first.request.extra != second.request.extra:
        size = min(size, *(position for position, _ in {*first.request.extra} ^ {*second.request.extra}))
    differ = first.prompt[:size] != second.prompt[:size]
    return int(differ.argmax()) if differ.any() else size
