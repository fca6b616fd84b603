"""A process with `Tiers` on a real server that a test stops or kills: steps go on, breakers open and close.

The K of a token in a block says which token it is, so that a wrong byte is seen.
"""

import time
from collections.abc import Callable

import torch

from kvblocks import BlockManager, CacheConfig, CacheEngine, StepBuffers
from kvblocks.tiers import Store, Ticket, Tiers

PROMPTS = [[number, *range(100, 132)] for number in range(8)]
FOUND = 32  # tokens of each that a store can have
SECONDS = 40


class Process:
    """Serves prompts of `PROMPTS`, one after the other."""

    def __init__(self, store: Store, deadline: float) -> None:
        sizes = CacheConfig(num_layers=2, num_kv_heads=1, head_dim=8, num_gpu_blocks=40, block_size=4)
        self.engine = CacheEngine(sizes, torch.float32, "cpu", layout="NHD", host_blocks=256)
        self.manager = BlockManager.for_config(sizes, host_blocks=256)
        self.step = StepBuffers.for_config(sizes, max_seqs=1, max_tokens=64, max_seq_len=64)
        self.tiers = Tiers(self.manager, self.engine, [store], namespace="0" * 64, deadline=deadline)
        self.num_steps = 0

    @property
    def is_open(self) -> bool:
        return self.tiers.stats()[0].is_open

    def one_step(self) -> None:
        """A step without sequences, with all that steps do beside them."""
        self.tiers.poll()
        step_id = self.manager.prepare([], [], self.step)
        self.engine.move(self.step)
        self.manager.commit(step_id)
        self.num_steps += 1
        time.sleep(0.001)

    def fetched(self, tokens: list[int]) -> Ticket:
        """The ticket of a prompt, once it is done; steps go on meanwhile."""
        ticket = self.tiers.fetch(tokens)
        self.until(lambda: ticket.done)
        return ticket

    def finds(self, tokens: list[int]) -> bool:
        """Whether a prompt that this process has not served is found now."""
        ticket = self.fetched(tokens)
        self.tiers.release(ticket)
        return ticket.num_tokens > 0

    def until(self, done: Callable[[], bool]) -> None:
        end = time.monotonic() + SECONDS
        while not done():
            assert time.monotonic() < end, f"not so after {SECONDS} s: {self.tiers.stats()}"
            self.one_step()

    def serve(self, tokens: list[int]) -> int:
        """Answer a prompt; how many of its tokens came from the store."""
        ticket = self.fetched(tokens)
        seq, cached = self.manager.admit(tokens, fetched=ticket.fetch)
        step_id = self.manager.prepare([seq], [len(tokens) - cached], self.step)
        self.engine.move(self.step)
        values = torch.tensor(tokens, dtype=torch.float32)[:, None, None].expand(-1, 1, 8)
        for layer, cache in enumerate(self.engine):
            cache.write(values[cached:] + layer, -values[cached:], self.step)
        for layer, cache in enumerate(self.engine):
            keys, others = cache.gather(self.manager.block_table(seq), len(tokens))
            assert torch.equal(keys, values + layer)
            assert torch.equal(others, -values)
        self.manager.commit(step_id)
        self.manager.free([seq])
        return sum(ticket.tokens_by_store)

    def end(self) -> None:
        assert self.tiers.close(SECONDS)
        assert self.manager.num_background_slots == 0
        self.manager.audit()


def stores_all(store: Store) -> bool:
    """Compute all prompts in a process that ends; whether a store has them all then."""
    process = Process(store, SECONDS)
    for tokens in PROMPTS:
        process.serve(tokens)
    whole = process.tiers.flush(SECONDS)
    process.end()
    return whole


def drill(
    store: Store, fail: Callable[[], None], recover: Callable[[], None], deadline: float, *, hangs: bool, loses: bool
) -> None:
    """Let the server fail and recover beside a process that asks it all the time.

    Args:
        hangs: whether calls of it wait meanwhile.
        loses: whether the objects are gone when the server is there again.
    """
    assert stores_all(store)
    process = Process(store, deadline)
    assert process.serve(PROMPTS[0]) == FOUND
    fail()
    waiting = [process.tiers.fetch(tokens) for tokens in PROMPTS[1:5]]
    before = process.num_steps
    process.until(lambda: all(ticket.done for ticket in waiting))
    assert process.num_steps > before + 20 * hangs  # they waited for the server, and the steps did not
    assert not any(ticket.num_tokens for ticket in waiting)
    process.until(lambda: process.is_open or process.finds(PROMPTS[1]))
    assert process.is_open
    assert process.serve(PROMPTS[5]) == 0
    recover()
    if loses:
        end = time.monotonic() + SECONDS
        while not stores_all(store):
            assert time.monotonic() < end
    process.until(lambda: process.finds(PROMPTS[6]))
    assert process.serve(PROMPTS[7]) == FOUND
    process.until(lambda: not process.is_open)
    process.end()
