"""`kvblocks.generate`: many prompts at once through a transformers model, each answer an iterator of its tokens.

What runs when is decided in `kvblocks.generation.scheduler`. Imports torch and transformers.
"""

import operator
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Self, SupportsIndex, TypeAlias, Unpack
from weakref import WeakValueDictionary

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel

from kvblocks.config import CacheConfig
from kvblocks.generation.request import Settings
from kvblocks.generation.scheduler import Request, Scheduler, blocks_needed
from kvblocks.integrations.transformers import CachedModel, PagedModel, Pool, cache_groups, served
from kvblocks.integrations.transformers.layers import one_block
from kvblocks.integrations.transformers.pool import check_pool

__all__ = ["Generation", "Stream", "generate"]

Prompt: TypeAlias = Sequence[int] | Tensor | Request


def generate(
    model: PreTrainedModel,
    prompts: Iterable[Prompt],
    *,
    max_new_tokens: int | None = None,
    stop_tokens: Iterable[int] | int | None = None,
    memory: int | str | None = None,
    host_memory: int | str | None = None,
    num_blocks: int | None = None,
    block_size: int = 16,
    layout: str = "NHD",
    max_batch_tokens: int = 512,
    max_seqs: int = 64,
    choose: Callable[[Tensor], Tensor] | None = None,
    tokenizer: Any = None,
    pool: Pool | None = None,
    attention_mask: Any = None,
    **settings: Unpack[Settings],
) -> "Generation":
    """Continue prompts with continuous batching over a paged cache, whose prefixes are computed once.

    Args:
        model: a decoder-only transformers model in evaluation mode, or what torch.compile or PEFT made of one. The
            cache gets its dtype and device, under autocast too. Attention is not compiled.
        prompts: token ids of each, or a `Request` with limits of its own. More may be added while it runs. A tensor or
            array [prompts, columns] needs `attention_mask`.
        max_new_tokens: of each prompt that is no `Request`; by default as the generation config says, else 64.
        stop_tokens: ids that end an answer; the one that does is its last token. None: the end-of-sequence ids of the
            model's generation config. An empty list: none.
        memory: for K and V, and for states, in bytes or like "64MiB"; by default what the prompts need at once, at most
            `max_seqs`: of states one for each that runs and one for its checkpoint. `Pool` says how memory is shared.
        host_memory: for blocks that have left the pool and may come back, as of `Pool`; by default none.
        num_blocks: blocks in the pool, instead of `memory`.
        block_size, layout: of the cache.
        max_batch_tokens, max_seqs, choose: as for `Scheduler`.
        pool: the model's `Pool`, whose blocks outlive this call, instead of `memory`, `host_memory`, `num_blocks`,
            `block_size` and `layout`. Without one a pool is made for this call, `Generation.pool`, which a later call
            may take up.
        attention_mask: [prompts, columns], 0 where there is padding, on either side, which is left out.
        tokenizer: transformers' of the model, where stop strings are asked for.
        settings: of each prompt that is no `Request`, named as there: `salt`, `temperature`, `top_k`, `top_p`, `min_p`,
            `seed`, `logits_processors`, `logprobs`, `stop_strings`, `priority`, `n`. A prompt of `n` answers has as
            many streams, one after the other.

    What is not given here is as the model's generation config has it, sampling and penalties too; `temperature=0` takes
    the best tokens whatever it says. What it asks for and is not served (beams, guidance) is refused.

    Returns:
        The streams of the prompts, in order. Nothing has run yet: asking a stream for tokens runs all of them.

    Raises:
        UnsupportedModel: the model cannot be served.
        ValueError, TypeError: a prompt or a number that cannot be.
        OutOfMemory: the cache does not fit.

    Example:
        >>> answers = [list(stream) for stream in kvblocks.generate(model, tokenizer(texts)["input_ids"])]

        >>> with kvblocks.generate(model, prompts, max_new_tokens=200) as run:
        ...     for token in run[0]:  # as they come; the others are computed beside it
        ...         print(token)
        ...     late = run.add([1, 2, 3])
        ...     run[1].cancel()
        ...     print(late.read(), late.finish)

    Thread-safety: one thread drives a generation.
    """
    runs = served(model)
    inner = runs.model
    limit, longest = _limits(inner, max_new_tokens)
    default = _with(Request((), limit, _stop_tokens(inner, stop_tokens)), settings)
    requests = [_request(prompt, default, longest) for prompt in _unpadded(prompts, attention_mask)]
    if memory is not None and num_blocks is not None:
        raise ValueError(f"memory={memory!r} and num_blocks={num_blocks} both say how large the cache is; give one")
    if pool is not None:
        if (memory, host_memory, num_blocks, block_size, layout) != (None, None, None, 16, "NHD"):
            sizes = "memory, host_memory, num_blocks, block_size and layout"
            raise ValueError(f"{sizes} are those of the pool; give no others")
        check_pool(pool).check(runs)
    else:
        if memory is None and num_blocks is None:
            num_blocks = _needed(block_of(runs, block_size), requests, max_seqs, max_batch_tokens)
        num_states = None
        if runs.keeps_states and memory is None:
            num_states = 2 * max(1, min(max_seqs, sum(request.n for request in requests)))
        pool = Pool(
            runs,
            memory=memory,
            num_blocks=num_blocks,
            num_states=num_states,
            host_memory=host_memory,
            block_size=block_size,
            layout=layout,
            chunks=True,
        )
    scheduler = Scheduler(
        runs,
        pool.config,
        max_batch_tokens=max_batch_tokens,
        max_seqs=max_seqs,
        choose=choose,
        tokenizer=tokenizer,
        pool=pool,
    )
    return Generation(scheduler, requests, default, longest, pool)


def block_of(model: PreTrainedModel | PagedModel | CachedModel, block_size: int) -> CacheConfig:
    """The sizes of a cache of one block for a model, as its layers make K and V."""
    paged = served(model)
    groups = cache_groups(paged.model.config, chunks=paged.attends_in_blocks)
    return one_block(paged.measure(), block_size, groups)


class Stream:
    """The tokens of one request, as they come.

    Iterating runs the generation until the next token of this request is there, and ends with its last one. Each token
    is given once; `tokens` has them all.

    Attributes:
        request_id: as `Scheduler` numbers them.
        request: what was asked.
        tokens: the new ones so far.
        finish: why it ended: "stop", "length", "cancelled"; None until then.
        logprobs, top: of each token its log-probability, and the (token, log-probability) of the best ones, if the
            request asks for them.
    """

    def __init__(self, run: "_Streams", request_id: int, request: Request) -> None:
        self.request_id = request_id
        self.request = request
        self.tokens: list[int] = []
        self.finish: str | None = None
        self.logprobs: list[float] = []
        self.top: list[tuple[tuple[int, float], ...]] = []
        self._answers: tuple[Stream, ...] = ()
        self._shared = run
        self._given = 0

    @property
    def answers(self) -> tuple["Stream", ...]:
        """The streams of all n answers to its prompt, itself among them."""
        return self._answers or (self,)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> int:
        while self._given == len(self.tokens):
            if self.finish is not None:
                raise StopIteration
            self._shared.step()
        self._given += 1
        return self.tokens[self._given - 1]

    def read(self) -> list[int]:
        """All tokens, once it has ended."""
        while self.finish is None:
            self._shared.step()
        return self.tokens

    def cancel(self) -> None:
        """End it now, and give its blocks back. One that has ended stays as it is."""
        if self.finish is None:
            self._shared.cancel(self)

    def __repr__(self) -> str:
        return f"Stream(request_id={self.request_id}, new_tokens={len(self.tokens)}, finish={self.finish!r})"


class _Streams:
    """What the streams of a generation have in common. It holds none of them: those that nobody holds are cancelled."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.owner: weakref.ref[Generation] | None = None
        self._streams: WeakValueDictionary[int, Stream] = WeakValueDictionary()
        self._dropped: deque[int] = deque()

    def start(self, request: Request) -> tuple[Stream, ...]:
        first = self.scheduler.add(request)
        answers = tuple(Stream(self, first + number, request) for number in range(request.n))
        for stream in answers:
            if request.n > 1:  # one alone must not refer to itself, so that it goes when nobody holds it
                stream._answers = answers
            self._streams[stream.request_id] = stream
            finalizer = weakref.finalize(stream, self._dropped.append, stream.request_id)
            finalizer.atexit = False
        return answers

    def step(self) -> list[Stream]:
        while self._dropped:
            self.scheduler.cancel(self._dropped.popleft())
        new = []
        for token in self.scheduler.step():
            stream = self._streams.get(token.request_id)
            if stream is None:
                continue  # dropped while the pass ran
            new.append(stream)
            stream.tokens.append(token.token)
            if token.logprob is not None:
                stream.logprobs.append(token.logprob)
                stream.top.append(token.top)
            if token.finish is not None:
                self._end(stream, token.finish)
        return new

    def cancel(self, stream: Stream) -> None:
        if stream.finish is None:
            self.scheduler.cancel(stream.request_id)
            self._end(stream, "cancelled")

    def close(self) -> None:
        for stream in list(self._streams.values()):
            self.cancel(stream)
        self.scheduler.close()

    def _end(self, stream: Stream, finish: str) -> None:
        stream.finish = finish
        self._streams.pop(stream.request_id, None)
        generation = None if self.owner is None else self.owner()
        if generation is not None:
            generation._unfinished.pop(stream.request_id, None)


class Generation:
    """Requests under way, and a stream for each; made by `generate`.

    The model attends through kvblocks inside `step` only, and may be used for anything between two. `close`, or a
    `with` block, ends the streams that are left, and those that nobody holds any more are ended with the generation. As
    a sequence it holds the streams of the prompts that it was made with. Those that `add` made later belong to who
    called it, and are let go when they have ended.

    Attributes:
        scheduler: with its manager and cache, for statistics.
        pool: whose blocks it runs on; None where `scheduler` was made without one.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        requests: Iterable[Request],
        default: Request,
        longest: int | None = None,
        pool: Pool | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.pool = pool
        self._default = default
        self._longest = longest
        self._unfinished: dict[int, Stream] = {}
        self._shared = _Streams(scheduler)
        self._shared.owner = weakref.ref(self)
        self._streams = [stream for request in requests for stream in self._start(request)]

    def add(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int | None = None,
        stop_tokens: Iterable[int] | int | None = None,
        extra: Iterable[tuple[int, bytes]] | None = None,
        **settings: Unpack[Settings],
    ) -> Stream:
        """Add a request while others run; what is not given is as for `generate`. Its stream, of n answers the first.

        Raises:
            ValueError, TypeError: as for `Scheduler.add`.
            RuntimeError: the generation is closed.
        """
        request = _request(prompt, self._default, None if max_new_tokens is not None else self._longest)
        request = _with(request, settings)
        if max_new_tokens is not None:
            request = replace(request, max_new_tokens=max_new_tokens)
        if stop_tokens is not None:
            request = replace(request, stop_tokens=_stop_tokens(None, stop_tokens))
        if extra is not None:
            request = replace(request, extra=tuple(extra))
        return self._start(request)[0]

    def reset_prefix_cache(self) -> None:
        """For new weights: compute everything anew from here on, of the streams that have not ended too."""
        self.scheduler.reset_prefix_cache()

    @property
    def num_unfinished(self) -> int:
        """Streams that have not ended."""
        return len(self._unfinished)

    def step(self) -> list[Stream]:
        """One forward pass; returns the streams that got a token: none while only prompts are computed."""
        return self._shared.step()

    def cancel(self, stream: Stream) -> None:
        """End a stream now, if it has not ended, and give its blocks back."""
        self._shared.cancel(stream)

    def run(self) -> list[list[int]]:
        """The tokens of every request, once all have ended."""
        return [stream.read() for stream in self._streams]

    def close(self) -> None:
        """Cancel what has not ended, and take no more."""
        self._shared.close()

    def _start(self, request: Request) -> tuple[Stream, ...]:
        answers = self._shared.start(request)
        self._unfinished.update((stream.request_id, stream) for stream in answers)
        return answers

    def __repr__(self) -> str:
        return f"Generation(streams={len(self)}, unfinished={self.num_unfinished}, pool={self.pool!r})"

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Iterator[Stream]:
        return iter(self._streams)

    def __getitem__(self, index: int) -> Stream:
        return self._streams[index]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _unpadded(prompts: Any, attention_mask: Any) -> Iterable[Any]:
    """The prompts, each without what its mask leaves out."""
    shape = tuple(getattr(prompts, "shape", ()))
    if attention_mask is None:
        if len(shape) == 2:
            raise ValueError(
                f"prompts is a {type(prompts).__name__} of shape {list(shape)}, which may hold padding; give "
                "attention_mask, of ones where it does not, or a list of prompts"
            )
        if len(shape) == 1:
            raise ValueError(f"prompts is a {type(prompts).__name__} of shape {list(shape)}; give a list of prompts")
        if isinstance(prompts, list | tuple) and prompts and all(type(token) is int for token in prompts):
            raise TypeError(f"prompts is one flat list of {len(prompts)} ids; give a list of prompts: [ids]")
        if isinstance(prompts, str) or not isinstance(prompts, Iterable):
            raise TypeError(
                f"prompts is the {type(prompts).__name__} {prompts!r}; give a list of prompts, as token ids"
            )
        return prompts
    mask = np.asarray(attention_mask.tolist() if hasattr(attention_mask, "tolist") else attention_mask)
    ids = np.asarray(prompts.tolist() if hasattr(prompts, "tolist") else prompts)
    if ids.ndim != 2 or mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)} and prompts {list(ids.shape)}; give both [prompts, columns]"
        )
    held = mask != 0
    for number, line in enumerate(held):
        inside = line[line.argmax() : len(line) - line[::-1].argmax()]
        if line.any() and not inside.all():
            raise ValueError(f"row {number} of attention_mask has a 0 between two 1; pad on the left or on the right")
    return [row[line].tolist() for row, line in zip(ids, held, strict=True)]


def _with(request: Request, settings: Settings) -> Request:
    """The request with settings, each of which it has."""
    given: dict[str, Any] = dict(settings)
    known = Settings.__annotations__
    for name in given.keys() - known.keys():
        raise TypeError(f"{name}={given[name]!r} is no setting of a request; there are {', '.join(sorted(known))}")
    for name in given.keys() & {"stop_strings", "logits_processors"}:
        value = given[name]
        given[name] = (value,) if isinstance(value, str) or callable(value) else tuple(value)
    return replace(request, **given)


def _limits(model: PreTrainedModel, max_new_tokens: int | None) -> tuple[int, int | None]:
    """The new tokens of a prompt, and the length of prompt and answer together where that is what limits it."""
    if max_new_tokens is not None:
        return max_new_tokens, None
    config: Any = getattr(model, "generation_config", None)
    new, whole = getattr(config, "max_new_tokens", None), getattr(config, "max_length", None)
    return new or 64, None if new else whole


def _request(prompt: Any, default: Request, longest: int | None) -> Request:
    if isinstance(prompt, Request):
        return prompt
    if isinstance(prompt, str):
        raise TypeError(f'a prompt is the str {prompt[:40]!r}; give token ids: tokenizer(text)["input_ids"]')
    ids = prompt.tolist() if hasattr(prompt, "tolist") else list(prompt)
    for token in ids:
        if type(token) is not int and (isinstance(token, bool) or not isinstance(token, SupportsIndex)):
            raise TypeError(
                f"a prompt holds {token!r:.40} of type {type(token).__name__}; give token ids, one flat list a prompt"
            )
    request = replace(default, prompt=tuple(map(int, ids)))
    if longest is None:
        return request
    if len(ids) >= longest:
        raise ValueError(
            f"a prompt of {len(ids)} tokens, and the model's generation_config has max_length={longest}, which counts "
            "the prompt too; give max_new_tokens"
        )
    return replace(request, max_new_tokens=longest - len(ids))


def _stop_tokens(model: PreTrainedModel | None, given: Iterable[int] | int | None) -> frozenset[int]:
    if given is None and model is not None:
        given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if given is None:
        return frozenset()
    ids: Any = given.tolist() if hasattr(given, "tolist") else given
    tokens = [ids] if isinstance(ids, int) else list(ids)
    return frozenset(operator.index(token) if isinstance(token, SupportsIndex) else token for token in tokens)


def _needed(config: CacheConfig, requests: Sequence[Request], max_seqs: int, max_batch_tokens: int) -> int:
    """Blocks for the longest of the requests that can run at once, and what an admission keeps free."""
    if not requests:
        raise ValueError("no prompt says how large the cache must be; give memory or num_blocks")
    blocks = sorted(
        blocks_needed(config, max(1, len(request.prompt) + request.max_new_tokens - 1), max_batch_tokens)
        for request in requests
        for _ in range(request.n)
    )
    needed = sum(blocks[-max(1, max_seqs) :])
    return needed + needed // 64 + 1
