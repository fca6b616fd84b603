"""Replay a request trace through a BlockManager: bookkeeping only, no model.

A trace is JSON lines: `timestamp` (ms), `input_length`, `output_length` (tokens) and `hash_ids`, one id for each 512 tokens
of the prompt; equal ids mean equal tokens after an equal prefix (the format of the Mooncake traces). Imports the compiled
manager and numpy.
"""

import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvblocks.errors import NoFreeBlocks
from kvblocks.manager import BlockManager, StepArrays

__all__ = ["Replay", "Request", "Tally", "host_step", "read_trace", "small_trace"]

TOKENS_PER_ID = 512
VOCABULARY = 151_000


class Request(NamedTuple):
    """One line of a trace: lengths in tokens."""

    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]

    def prompt(self) -> npt.NDArray[np.int32]:
        """The prompt's token ids, a fixed function of its hash ids: int32 [input_length]."""
        ids = np.asarray(self.hash_ids, np.uint64)[:, None] * np.uint64(TOKENS_PER_ID)
        return _mix(ids + np.arange(TOKENS_PER_ID, dtype=np.uint64)).ravel()[: self.input_length]


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
    """splitmix64's finaliser, reduced to token ids: without it, ids would repeat and make hits that are not there."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) % np.uint64(VOCABULARY)).astype(np.int32)


def read_trace(path: Path, limit: int | None = None) -> list[Request]:
    """Read a trace file.

    Raises:
        ValueError: a line is not a request; the message names the line and the field.
    """
    with path.open(encoding="utf-8") as lines:
        return list(_parse(lines, path.name, limit))


def _parse(lines: Iterable[str], name: str, limit: int | None) -> Iterator[Request]:
    count = 0
    for number, line in enumerate(lines, 1):
        if count == limit:
            return
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            request = Request(int(entry["input_length"]), int(entry["output_length"]), tuple(map(int, entry["hash_ids"])))
        except KeyError as error:
            raise ValueError(f"{name}:{number}: no field {error}") from None
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}:{number}: not a request: {error}") from None
        if not 1 <= request.input_length <= TOKENS_PER_ID * len(request.hash_ids) or request.output_length < 0:
            raise ValueError(
                f"{name}:{number}: input_length={request.input_length} must be 1 to {TOKENS_PER_ID} times the "
                f"{len(request.hash_ids)} hash_ids, output_length={request.output_length} at least 0"
            )
        if min(request.hash_ids) < 0:
            raise ValueError(f"{name}:{number}: hash_ids must not be negative")
        yield request
        count += 1


def small_trace(num_requests: int = 200, seed: int = 0) -> list[Request]:
    """A generated trace: chats of several turns, each prompt the one before and more, over a few system prompts."""
    rng = np.random.default_rng(seed)
    fresh = iter(range(8, 1 << 40))
    chats: list[tuple[int, ...]] = []
    requests = []
    for _ in range(num_requests):
        if chats and rng.random() < 0.6:
            before = chats.pop(int(rng.integers(len(chats))))
        else:
            before = (int(rng.integers(8)),)
        ids = before + tuple(next(fresh) for _ in range(int(rng.integers(1, 8))))
        chats.append(ids)
        length = TOKENS_PER_ID * len(ids) - int(rng.integers(TOKENS_PER_ID))
        requests.append(Request(length, int(rng.integers(1, 300)), ids))
    return requests


def host_step(max_seqs: int, max_tokens: int, max_blocks_per_seq: int) -> StepArrays:
    """Step arrays in plain host memory."""
    return StepArrays(
        np.empty(max_tokens, np.int64),
        np.empty(max_tokens, np.int64),
        np.empty(max_tokens, np.int64),
        np.empty((max_seqs, max_blocks_per_seq), np.int32),
        np.empty(max_seqs, np.int32),
        np.empty(max_seqs + 1, np.int32),
        np.empty((max_seqs, 2), np.int64),
    )


@dataclass
class Tally:
    """What a replay did and how long its calls took (seconds inside them)."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    decoded_tokens: int = 0
    decode_steps: int = 0
    admits: int = 0
    frees: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("admit", "prefill", "decode", "free"), 0.0))
    usage: list[tuple[int, float, float]] = field(default_factory=list)

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


class Replay:
    """Run requests through a manager, at most `concurrency` at once, in order of arrival.

    A request is admitted with all of its prompt, prefilled in chunks of `step.max_tokens`, then decoded one token a step
    together with all others: append, prepare, commit. When blocks run out, the newest sequence is preempted.

    Raises:
        ValueError: a request is longer than the pool or the step.
    """

    def __init__(self, manager: BlockManager, step: StepArrays, concurrency: int) -> None:
        self.manager = manager
        self.step = step
        self.concurrency = concurrency
        self.tally = Tally()
        self._left: dict[int, int] = {}  # tokens still to decode, in order of admission
        self._batch: list[int] = []  # the same sequences; the last fills a gap, so that few rows of the step change
        self._waiting: deque[tuple[int, int]] = deque()  # preempted
        self._noise = 0

    def run(self, requests: Iterable[Request], on_request: Callable[[], Any] | None = None) -> Tally:
        """Replay all requests to their end; `on_request` is called after each admission."""
        for request in requests:
            while len(self._left) >= self.concurrency or self._waiting:
                self._decode()
            self._check(request)
            prompt = request.prompt()
            while not self._admit(prompt, request.output_length):
                self._decode()
            if on_request is not None:
                on_request()
        while self._left or self._waiting:
            self._decode()
        return self.tally

    def _check(self, request: Request) -> None:
        most = min(self.manager.num_blocks, self.step.max_blocks_per_seq)
        longest = request.input_length + request.output_length
        if -(-longest // self.manager.block_size) > most:
            raise ValueError(f"a request of {longest} tokens does not fit {most} blocks of {self.manager.block_size}")

    def _admit(self, prompt: npt.NDArray[np.int32], output_length: int) -> bool:
        tally, clock = self.tally, time.perf_counter
        start = clock()
        try:
            seq, cached = self.manager.admit(prompt)
        except NoFreeBlocks:
            tally.seconds["admit"] += clock() - start
            if not self._left:
                raise
            return False
        tally.seconds["admit"] += clock() - start
        tally.admits += 1
        tally.requests += 1
        tally.prompt_tokens += len(prompt)
        tally.cached_tokens += cached
        self._prefill(seq, len(prompt) - cached)
        if output_length:
            self._enter(seq, output_length)
        else:
            self._free([seq])
        tally.usage.append((tally.decode_steps, self.manager.usage, tally.cached_tokens / tally.prompt_tokens))
        return True

    def _prefill(self, seq: int, num_tokens: int) -> None:
        manager, step, clock = self.manager, self.step, time.perf_counter
        start = clock()
        while num_tokens:
            chunk = min(num_tokens, step.max_tokens)
            manager.commit(manager.prepare(seq, chunk, step))
            num_tokens -= chunk
        self.tally.seconds["prefill"] += clock() - start

    def _resume(self) -> None:
        while self._waiting and len(self._left) < self.concurrency:
            seq, left = self._waiting[0]
            start = time.perf_counter()
            try:
                cached = self.manager.resume(seq)
            except NoFreeBlocks:
                if not self._left:
                    raise
                return
            finally:
                self.tally.seconds["admit"] += time.perf_counter() - start
            self._waiting.popleft()
            self._prefill(seq, int(self.manager.lengths(seq).num_tokens[0]) - cached)
            self._enter(seq, left)

    def _enter(self, seq: int, left: int) -> None:
        self._left[seq] = left
        self._batch.append(seq)

    def _leave(self, seq: int) -> int:
        last = self._batch.pop()
        if last != seq:
            self._batch[self._batch.index(seq)] = last
        return self._left.pop(seq)

    def _decode(self) -> None:
        """One step of every live sequence."""
        if self._waiting:
            self._resume()
        manager, tally, clock = self.manager, self.tally, time.perf_counter
        seqs = np.array(self._batch, np.int64)
        self._noise += len(seqs)
        tokens = _mix(np.arange(self._noise, self._noise + len(seqs), dtype=np.uint64) << np.uint64(20))
        start = clock()
        manager.append(seqs, tokens)
        while True:
            try:
                step_id = manager.prepare(seqs, 1, self.step)
                break
            except NoFreeBlocks:
                if len(self._batch) == 1:
                    raise
                newest = next(reversed(self._left))
                manager.preempt(newest)
                self._waiting.appendleft((newest, self._leave(newest) - 1))
                seqs = np.array(self._batch, np.int64)
        manager.commit(step_id)
        tally.seconds["decode"] += clock() - start
        tally.decode_steps += 1
        tally.decoded_tokens += len(seqs)
        done = []
        for seq in seqs.tolist():
            self._left[seq] -= 1
            if not self._left[seq]:
                done.append(seq)
                self._leave(seq)
        if done:
            self._free(done)

    def _free(self, seqs: list[int]) -> None:
        start = time.perf_counter()
        self.manager.free(seqs)
        self.tally.seconds["free"] += time.perf_counter() - start
        self.tally.frees += len(seqs)
