"""Two processes with half of the heads each, over stores that are not equally fast: their managers stay in step.

Each rank keeps K and V of its own heads, in blocks and in a store. No rank tells the other which blocks it takes: both
managers get the same calls in the same order, and what a store does in its own time takes effect in `tiers.poll(agree)`
alone, once all ranks are done with it. Here rank 1's store is slow, and for one prompt slower than its deadline.

Needs torch.distributed with gloo, which talks over the loopback interface.
"""

import multiprocessing
import os
import random
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
from tiny_model import DIM, HEADS, KV_HEADS, LAYERS, TinyModel
from torch import Tensor, distributed

from kvblocks import BlockManager, CacheConfig, CacheEngine, StepBuffers, paged_attention
from kvblocks.tiers import MemoryStore, Status, Ticket, Tiers
from kvblocks.tiers.names import namespace_of, shard_name

RANKS, BLOCK, COUNT = 2, 4, 8
LATE = list(b"This one comes from a store that hangs.")
COMMON = b"Two ranks, one order of calls. "
PROMPTS = [
    list(COMMON + text) for text in (b"What is a rank?", b"Who waits for whom?", b"And if one is late?", b"Why?")
]


def agree(numbers: list[int]) -> list[int]:
    """The least of what the ranks give, one by one. This is all that they say to each other about blocks."""
    least = torch.tensor(numbers)
    distributed.all_reduce(least, distributed.ReduceOp.MIN)
    return [int(number) for number in least.tolist()]


class SlowStore(MemoryStore):
    """Takes up to `seconds` for each load; the first one hangs until `let_go` is set."""

    def __init__(self, seconds: float) -> None:
        super().__init__("16MiB")
        self.seconds, self.let_go = seconds, threading.Event()
        self.chance = random.Random(0)
        if not seconds:
            self.let_go.set()

    def load(self, keys: Sequence[str], buffers: Sequence[Any]) -> list[Status]:
        self.let_go.wait()
        time.sleep(self.chance.random() * self.seconds)
        return super().load(keys, buffers)


class Engine:
    """One rank. `tables` has the block table of each sequence after each pass that it was in."""

    def __init__(self, rank: int, store: MemoryStore) -> None:
        sizes = CacheConfig(
            num_layers=LAYERS, num_kv_heads=KV_HEADS // RANKS, head_dim=DIM, num_gpu_blocks=128, block_size=BLOCK
        )
        each, kv_each = HEADS // RANKS, KV_HEADS // RANKS
        self.heads = slice(rank * each, (rank + 1) * each)
        self.kv_heads = slice(rank * kv_each, (rank + 1) * kv_each)
        self.model = TinyModel()
        self.caches = CacheEngine(sizes, torch.float32, "cpu", layout="NHD", host_blocks=256)
        self.manager = BlockManager.for_config(sizes, host_blocks=256)
        self.step = StepBuffers.for_config(sizes, max_seqs=8, max_tokens=256, max_seq_len=sizes.max_tokens)
        self.tiers = Tiers(
            self.manager,
            self.caches,
            [store],
            namespace=namespace_of(self.caches, model="tiny", weights_version="seed 0"),
            shard=shard_name(heads=range(self.kv_heads.start, self.kv_heads.stop)),
            deadline=60,
        )
        self.tables: list[list[int]] = []

    def answer(
        self, prompts: Sequence[list[int]], deadline: float | None = None
    ) -> tuple[list[list[int]], list[Ticket]]:
        """Tokens for each prompt, and where its blocks came from. Each joins the others as soon as it was fetched."""
        tickets = [self.tiers.fetch(prompt, deadline=deadline) for prompt in prompts]
        answers: list[list[int]] = [[] for _ in prompts]
        waiting, running = list(range(len(prompts))), dict[int, int]()
        while waiting or running:
            self.tiers.poll(agree)
            for number in [number for number in waiting if tickets[number].done]:  # the same ones on both ranks
                waiting.remove(number)
                running[number], _ = self.manager.admit(prompts[number], fetched=tickets[number].fetch)
            if not running:
                time.sleep(0.001)
                continue
            for number, token in zip(list(running), self.one_pass(list(running.values())), strict=True):
                answers[number].append(token)
                if len(answers[number]) < COUNT:
                    self.manager.append([running[number]], [token])
                else:
                    self.manager.free([running.pop(number)])
        return answers, tickets

    def one_pass(self, sequences: list[int]) -> list[int]:
        lengths = self.manager.lengths(sequences)
        counts = (lengths.num_tokens - lengths.num_computed).tolist()
        step_id = self.manager.prepare(sequences, counts, self.step)
        self.caches.move(self.step)
        total = self.step.num_tokens
        logits = self.model(self.step.input_ids[:total], self.step.positions[:total], self.attend)
        self.manager.commit(step_id)
        self.tables += [self.manager.block_table(sequence).tolist() for sequence in sequences]
        best: list[int] = logits[self.step.query_start_loc[1 : len(sequences) + 1] - 1].argmax(1).tolist()
        return best

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """This rank's heads over its own blocks; the others' are gathered."""
        cache = self.caches[layer]
        cache.write(k[:, self.kv_heads].contiguous(), v[:, self.kv_heads].contiguous(), self.step)
        own = paged_attention(q[:, self.heads].contiguous(), cache, self.step)
        parts = [torch.empty_like(own) for _ in range(RANKS)]
        distributed.all_gather(parts, own)
        return torch.cat(parts, 1)


def run(rank: int, meeting: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    store = SlowStore(0.02 if rank == 1 else 0)
    first = Engine(rank, store)
    computed, _ = first.answer([LATE, *PROMPTS])
    assert first.tiers.flush(60, agree)
    assert first.tiers.close(60, agree)

    second = Engine(rank, store)  # as after a restart: nothing in its pools, everything in the store
    late, [lost] = second.answer([LATE], deadline=0.2)
    store.let_go.set()
    found, tickets = second.answer(PROMPTS)
    assert second.tiers.close(60, agree)
    assert late + found == computed == [TinyModel().greedy(prompt, COUNT) for prompt in [LATE, *PROMPTS]]
    assert lost.timed_out
    assert sum(sum(ticket.tokens_by_store) for ticket in tickets) >= len(COMMON) // BLOCK * BLOCK

    tables: list[Any] = [None] * RANKS
    distributed.all_gather_object(tables, first.tables + second.tables)
    assert tables[0] == tables[1], "the ranks took other blocks"
    if rank == 0:
        print(f"{len(LATE)} prompt tokens, too late on rank 1, and computed by both")
        for prompt, ticket in zip(PROMPTS, tickets, strict=True):
            print(f"{len(prompt)} prompt tokens, {ticket.num_tokens} of them found")
        print(f"{len(tables[0])} block tables on each rank, the same block ids: {tables[0] == tables[1]}")
    distributed.destroy_process_group()


def main() -> None:
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [context.Process(target=run, args=(rank, f"{folder}/meeting")) for rank in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit("a rank failed; what it said is above")


if __name__ == "__main__":
    main()
