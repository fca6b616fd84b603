"""Replay a request trace through a BlockManager: bookkeeping only, no model.

A trace is JSON lines: `timestamp` (ms, not used), `input_length`, `output_length` (tokens) and `hash_ids`, one id for
each 512 tokens of the prompt; equal ids mean equal tokens after an equal prefix (the format of the Mooncake traces).
Imports the compiled manager and numpy.
"""

import hashlib
import itertools
import json
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from kvblocks.errors import NoFreeBlocks
from kvblocks.manager import BlockManager, StepArrays

__all__ = ["Replay", "Sample", "StoredBlocks", "Tally", "TraceRequest", "host_step", "read_trace", "small_trace"]

TOKENS_PER_ID = 512
VOCABULARY = 151_000
MAX_LENGTH = 2**30  # prompt and output together stay below 2**31 tokens
MAX_HASH_ID = 2**54 - 1  # id * TOKENS_PER_ID stays below 2**63
_SPILLED = 4096  # blocks of one spill
SAMPLE_STEPS = 16  # decode steps between two samples of the pool's use


class TraceRequest(NamedTuple):
    """One line of a trace: lengths in tokens."""

    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]

    def prompt(self) -> npt.NDArray[np.int32]:
        """The prompt's token ids, a fixed function of its hash ids: int32 [input_length]."""
        first = np.asarray(self.hash_ids, np.uint64) * np.uint64(TOKENS_PER_ID)
        tokens: npt.NDArray[np.uint64] = np.add.outer(first, np.arange(TOKENS_PER_ID, dtype=np.uint64))
        return _mix(tokens.ravel()[: self.input_length])


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
    """splitmix64's finaliser, reduced to token ids: without it, ids would repeat and make hits that are not there."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) % np.uint64(VOCABULARY)).astype(np.int32)


def read_trace(path: Path, limit: int | None = None) -> list[TraceRequest]:
    """Read the first `limit` requests of a trace file, by default all.

    Raises:
        ValueError: a line is not a request; the message names the line and the field.
        OSError: the file cannot be read.
    """
    with path.open("rb") as lines:
        return list(itertools.islice(_parse(lines, path.name), limit))


def _parse(lines: Iterable[bytes], name: str) -> Iterator[TraceRequest]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield _request(line)
            except ValueError as error:
                raise ValueError(f"{name}:{number}: {error}") from None


def _request(line: bytes) -> TraceRequest:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise ValueError(f"a request is a JSON object, not {type(entry).__name__}")
    for name in ("input_length", "output_length", "hash_ids"):
        if name not in entry:
            raise ValueError(f"field {name} is missing")
    output_length = _whole(entry["output_length"], "output_length", 0, MAX_LENGTH)
    ids = entry["hash_ids"]
    if not isinstance(ids, list) or not ids:
        raise ValueError(f"field hash_ids is {_shown(ids)}; it must be a list of whole numbers, at least one")
    hash_ids = tuple(_whole(value, f"hash_ids[{i}]", 0, MAX_HASH_ID) for i, value in enumerate(ids))
    # Ids past the prompt's end would make no tokens; too few of them could not make all.
    longest = min(TOKENS_PER_ID * len(hash_ids), MAX_LENGTH)
    input_length = _whole(entry["input_length"], "input_length", 1, longest, f" ({len(hash_ids)} hash_ids)")
    return TraceRequest(input_length, output_length, hash_ids)


def _whole(value: object, name: str, low: int, high: int, why: str = "") -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"field {name} is {_shown(value)}; it must be a whole number")
    if not low <= value <= high:
        raise ValueError(f"field {name} is {_shown(value)}; it must be {low} to {high}{why}")
    return value


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def small_trace(num_requests: int = 200, seed: int = 0) -> list[TraceRequest]:
    """A generated trace: chats of several turns, each prompt the one before and more, over a few system prompts."""
    rng = np.random.default_rng(seed)
    fresh = iter(range(8, 1 << 40))
    chats: list[tuple[int, ...]] = []
    requests = []
    for _ in range(num_requests):
        goes_on = chats and rng.random() < 0.6
        before = chats.pop(int(rng.integers(len(chats)))) if goes_on else (int(rng.integers(8)),)
        ids = before + tuple(next(fresh) for _ in range(int(rng.integers(1, 8))))
        chats.append(ids)
        length = TOKENS_PER_ID * len(ids) - int(rng.integers(TOKENS_PER_ID))
        requests.append(TraceRequest(length, int(rng.integers(1, 300)), ids))
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


class Sample(NamedTuple):
    """The pool at one moment of a replay."""

    step: int  # decode steps so far
    usage: float  # share of the blocks that sequences hold
    hit_rate: float  # of all prompt tokens so far, how many were cached
    host_rate: float  # how many of all came from the host pool
    store_rate: float  # and how many from the store


@dataclass
class Tally:
    """What a replay did, and how long its calls took (seconds inside them).

    Preempted sequences: their tokens count once, when first decoded; computing them again counts as `prefill`.
    """

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    host_tokens: int = 0  # of the cached ones, those that came from the host pool
    store_tokens: int = 0  # and those that came from the store, by way of the host pool
    decoded_tokens: int = 0
    decode_steps: int = 0
    admits: int = 0
    refused: int = 0  # admits and resumes that found too few free blocks
    preemptions: int = 0
    resumed: int = 0
    frees: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("admit", "prefill", "decode", "free"), 0.0)
    )
    samples: list[Sample] = field(default_factory=list)

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def host_rate(self) -> float:
        return self.host_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def store_rate(self) -> float:
        return self.store_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


class StoredBlocks:
    """A store below the host pool that holds no bytes: the digests of its blocks, the least recently used first.

    Args:
        manager: with host blocks.
        capacity: blocks.
    """

    def __init__(self, manager: BlockManager, capacity: int) -> None:
        self.manager = manager
        self.capacity = capacity
        self.num_stored = 0  # blocks that came, those that were there already not counted
        self._digests: OrderedDict[bytes, None] = OrderedDict()

    def fetch(self, prompt: npt.NDArray[np.int32]) -> Any:
        """The fetch of what the store has of a prompt, all of it there; None where that is nothing more."""
        size = self.manager.block_size
        local = self.manager.match(prompt) // size
        found = local
        for index, digest in enumerate(_digests(prompt[: (len(prompt) - 1) // size * size], size)):
            if index >= local:
                if digest not in self._digests:
                    break
                self._digests.move_to_end(digest)
                found = index + 1
        if found == local:
            return None
        fetch = self.manager.begin_fetch(prompt, num_blocks=found)
        self.manager.end_fetch(fetch, len(fetch.blocks))
        return fetch

    def spill(self) -> None:
        """Take all that has landed in the host pool."""
        while True:
            spill = self.manager.begin_spill(_SPILLED)
            digests: list[bytes] = []
            for node in spill.nodes:
                above = digests[node.parent] if node.parent >= 0 else node.parent_digest or b""
                digests.append(_digest(above, node.tokens))
            for _, _, node in spill.blocks.tolist():
                self._put(digests[node])
            self.manager.end_spill(spill, [True] * len(spill.blocks), digests)
            if not len(spill.blocks):
                return

    def _put(self, digest: bytes) -> None:
        self.num_stored += digest not in self._digests
        self._digests[digest] = None
        self._digests.move_to_end(digest)
        if len(self._digests) > self.capacity:
            self._digests.popitem(last=False)


def _digests(tokens: npt.NDArray[np.int32], block_size: int) -> Iterator[bytes]:
    """The digest of each full block."""
    raw, step, above = tokens.tobytes(), 4 * block_size, b""
    for start in range(0, len(raw), step):
        above = _digest(above, raw[start : start + step])
        yield above


def _digest(above: bytes, tokens: bytes) -> bytes:
    return hashlib.sha256(above + tokens).digest()


class Replay:
    """Run requests through a manager, at most `concurrency` at once, in order of arrival.

    A request is admitted with all of its prompt, prefilled in chunks of `step.max_tokens`, then decoded one token a
    step together with all others: append, prepare, commit. When blocks run out, the newest sequence is preempted, and
    resumed before anything new is admitted, once another has ended.

    With a host pool, moves count as made as soon as they are handed out: no byte is moved. With a store, so do fetches
    and spills.

    Args:
        store: of the same manager.
    """

    def __init__(
        self, manager: BlockManager, step: StepArrays, concurrency: int, store: StoredBlocks | None = None
    ) -> None:
        if not 1 <= concurrency <= min(step.max_seqs, step.max_tokens):
            raise ValueError(
                f"concurrency={concurrency} must be 1 to {min(step.max_seqs, step.max_tokens)}, what the step holds"
            )
        self.manager = manager
        self.step = step
        self.concurrency = concurrency
        self.store = store
        self._store_seconds = 0.0  # spent on spills, which count for nothing
        self.tally = Tally()
        self._left: dict[int, int] = {}  # tokens still to decode, in order of admission
        self._batch: list[int] = []  # the same sequences; the last fills a gap, so that few rows of the step change
        self._waiting: deque[tuple[int, int]] = deque()  # preempted: sequence, tokens still to decode
        self._ended = False  # since the last preemption
        self._noise = 0
        self._host_hit_tokens = manager.stats().host_hit_tokens

    def check(self, request: TraceRequest) -> None:
        """Raises ValueError when a request could not run even alone."""
        size = self.manager.block_size
        tokens = request.input_length + request.output_length
        needed = -(-tokens // size)
        for most, what in ((self.manager.num_blocks, "the pool has"), (self.step.max_blocks_per_seq, "the step takes")):
            if needed > most:
                raise ValueError(
                    f"a request of {tokens} tokens ({request.input_length} in, {request.output_length} out) needs "
                    f"{needed} blocks of {size}, and {what} {most}"
                )

    def run(self, requests: Iterable[TraceRequest], on_request: Callable[[], Any] | None = None) -> Tally:
        """Replay all requests to their end; `on_request` is called after each admission.

        Raises:
            ValueError: a request does not fit the pool or the step, as `check` says.
        """
        for request in requests:
            self.check(request)
            while len(self._left) >= self.concurrency or self._waiting:
                self._decode()
            prompt = request.prompt()
            while not self._admit(prompt, request.output_length):
                self._decode()
            if on_request is not None:
                on_request()
        while self._left or self._waiting:
            self._decode()
        self._sample()
        return self.tally

    def _admit(self, prompt: npt.NDArray[np.int32], output_length: int) -> bool:
        tally, clock = self.tally, time.perf_counter
        fetch = None if self.store is None else self.store.fetch(prompt)
        start = clock()
        try:
            seq, cached = self.manager.admit(prompt, fetched=fetch)
        except NoFreeBlocks:
            tally.seconds["admit"] += clock() - start
            if fetch is not None:
                self.manager.release(fetch)
            if not self._left:
                raise
            tally.refused += 1
            return False
        tally.seconds["admit"] += clock() - start
        tally.admits += 1
        tally.requests += 1
        tally.prompt_tokens += len(prompt)
        tally.cached_tokens += cached
        host_hit_tokens = self.manager.stats().host_hit_tokens
        from_store = 0 if fetch is None else max(0, min(cached, fetch.num_tokens) - fetch.num_local)
        tally.store_tokens += from_store
        tally.host_tokens += host_hit_tokens - self._host_hit_tokens - from_store
        self._host_hit_tokens = host_hit_tokens
        self._prefill(seq, len(prompt) - cached)
        self._enter(seq, output_length)
        self._sample()
        return True

    def _prefill(self, seq: int, num_tokens: int) -> None:
        manager, step, clock = self.manager, self.step, time.perf_counter
        start = clock() - self._store_seconds
        while num_tokens:
            chunk = min(num_tokens, step.max_tokens)
            self._close(manager.prepare(seq, chunk, step))
            num_tokens -= chunk
        self.tally.seconds["prefill"] += clock() - self._store_seconds - start

    def _close(self, step_id: int) -> None:
        manager, last_move = self.manager, self.step.last_move
        if last_move:
            manager.mark_moved(last_move)
            manager.landed(last_move)
        manager.commit(step_id)
        if self.store is not None and last_move:
            start = time.perf_counter()
            self.store.spill()
            self._store_seconds += time.perf_counter() - start

    def _resume(self) -> None:
        tally, clock = self.tally, time.perf_counter
        while self._waiting and (self._ended or not self._left):
            seq, left = self._waiting[0]
            start = clock()
            try:
                cached = self.manager.resume(seq)
            except NoFreeBlocks:
                tally.seconds["admit"] += clock() - start
                if not self._left:
                    raise
                tally.refused += 1
                self._ended = False
                return
            tally.seconds["admit"] += clock() - start
            tally.resumed += 1
            self._waiting.popleft()
            self._host_hit_tokens = self.manager.stats().host_hit_tokens
            self._prefill(seq, int(self.manager.lengths(seq).num_tokens[0]) - cached)
            self._enter(seq, left)

    def _enter(self, seq: int, left: int) -> None:
        if left:
            self._left[seq] = left
            self._batch.append(seq)
        else:
            self._free([seq])

    def _leave(self, seq: int) -> int:
        last = self._batch.pop()
        if last != seq:
            self._batch[self._batch.index(seq)] = last
        return self._left.pop(seq)

    def _decode(self) -> None:
        """One step of every live sequence."""
        self._resume()
        if not self._batch:
            return
        manager, tally, clock = self.manager, self.tally, time.perf_counter
        seqs = np.array(self._batch, np.int64)
        self._noise += len(seqs)
        tokens = _mix(np.arange(self._noise, self._noise + len(seqs), dtype=np.uint64) << np.uint64(20))
        start = clock() - self._store_seconds
        manager.append(seqs, tokens)
        tally.decoded_tokens += len(seqs)
        while True:
            try:
                step_id = manager.prepare(seqs, 1, self.step)
                break
            except NoFreeBlocks:
                if len(self._batch) == 1:
                    raise
                newest = next(reversed(self._left))
                manager.preempt(newest)
                tally.preemptions += 1
                self._ended = False
                # The token it was just given is computed when it is resumed.
                self._waiting.appendleft((newest, self._leave(newest) - 1))
                seqs = np.array(self._batch, np.int64)
        self._close(step_id)
        tally.seconds["decode"] += clock() - self._store_seconds - start
        tally.decode_steps += 1
        if tally.decode_steps % SAMPLE_STEPS == 0:
            self._sample()
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
        self._ended = True

    def _sample(self) -> None:
        tally = self.tally
        tally.samples.append(
            Sample(tally.decode_steps, self.manager.usage, tally.hit_rate, tally.host_rate, tally.store_rate)
        )
