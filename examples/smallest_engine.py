"""A whole inference engine: requests arrive, share passes, find each other's prefixes, and give way when memory ends.

What makes it an engine: continuous batching (a pass holds prompts in chunks beside tokens that are decoded), a prefix
cache, and preemption. The pool here is too small for all requests at once, on purpose.
"""

from collections import deque
from dataclasses import dataclass, field

import torch
from tiny_model import DIM, KV_HEADS, LAYERS, TinyModel
from torch import Tensor

from kvblocks import BlockManager, CacheConfig, CacheEngine, NoFreeBlocks, StepBuffers, paged_attention


@dataclass
class Request:
    """What was asked, and what came of it."""

    prompt: list[int]
    max_new_tokens: int
    answer: list[int] = field(default_factory=list)
    seq: int = -1  # the manager's handle, from the first admission on
    num_cached: int = 0
    num_preempted: int = 0


class Engine:
    """Answers requests, several in each pass of the model."""

    def __init__(self, model: TinyModel, num_blocks: int, max_seqs: int = 8, max_tokens: int = 48) -> None:
        config = CacheConfig(
            num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=DIM, num_gpu_blocks=num_blocks, block_size=4
        )
        self.model, self.max_tokens, self.max_seqs = model, max_tokens, max_seqs
        self.caches = CacheEngine(config, torch.float32, "cpu", layout="NHD")
        self.manager = BlockManager.for_config(config)
        self.step = StepBuffers.for_config(
            config, max_seqs=max_seqs, max_tokens=max_tokens, max_seq_len=config.max_tokens
        )
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_passes = 0

    def add(self, request: Request) -> None:
        self.waiting.append(request)

    def run(self) -> None:
        """Passes until every request is answered."""
        while self.waiting or self.running:
            self.admit()
            self.one_pass()

    def admit(self) -> None:
        """Let the first of those who wait in, as long as there are blocks for all of its tokens."""
        while self.waiting and len(self.running) < self.max_seqs:
            request = self.waiting[0]
            try:
                if request.num_preempted:
                    self.manager.resume(request.seq)
                else:
                    request.seq, request.num_cached = self.manager.admit(request.prompt)
            except NoFreeBlocks:
                if not self.running:
                    raise  # alone, and still too large for the pool
                return
            self.running.append(self.waiting.popleft())

    def one_pass(self) -> None:
        """Run the model over what each sequence has left to compute, as far as it fits into one pass."""
        while True:
            batch = self.batch()
            seqs, counts = [request.seq for request, _, _ in batch], [count for _, count, _ in batch]
            try:
                step_id = self.manager.prepare(seqs, counts, self.step)
                break
            except NoFreeBlocks:
                self.preempt_newest()
        step = self.step
        self.caches.move(step)
        logits = self.model(step.input_ids[: step.num_tokens], step.positions[: step.num_tokens], self.attend)
        self.manager.commit(step_id)
        self.num_passes += 1
        best = logits[step.query_start_loc[1 : len(batch) + 1] - 1].argmax(1).tolist()
        for (request, _, whole), token in zip(batch, best, strict=True):
            if whole:  # of a prompt that is not through yet the logits mean nothing
                self.accept(request, token)

    def batch(self) -> list[tuple[Request, int, bool]]:
        """Of each request how many tokens the next pass computes, and whether these are all it has."""
        lengths = self.manager.lengths([request.seq for request in self.running])
        batch, room = [], self.max_tokens
        for request, left in zip(self.running, lengths.num_tokens - lengths.num_computed, strict=True):
            count = min(int(left), room)
            if count:
                batch.append((request, count, count == left))
                room -= count
        return batch

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = self.caches[layer]
        cache.write(k, v, self.step)
        return paged_attention(q, cache, self.step)

    def accept(self, request: Request, token: int) -> None:
        request.answer.append(token)
        if len(request.answer) < request.max_new_tokens:
            self.manager.append([request.seq], [token])
        else:
            self.manager.free([request.seq])
            self.running.remove(request)

    def preempt_newest(self) -> None:
        """Take the newest request's blocks away; it keeps its tokens, and is the next to be resumed."""
        request = self.running.pop()
        if not self.running:
            raise RuntimeError("one sequence alone does not fit into the pool; give it more blocks")
        self.manager.preempt(request.seq)
        request.num_preempted += 1
        self.waiting.appendleft(request)


def main() -> None:
    model = TinyModel()
    engine = Engine(model, num_blocks=26)
    common = list(b"A block is the K and V of four tokens. ")
    requests = [Request(common + list(text), 24) for text in (b"What is a slot?", b"Who frees it?", b"Why?", b"When?")]
    for request in requests:
        engine.add(request)
    engine.run()
    for request in requests:
        print(
            f"{len(request.prompt)} prompt tokens, {request.num_cached} of them found in the prefix cache, "
            f"preempted {request.num_preempted} times, answer {request.answer[:6]}..."
        )
        assert request.answer == model.greedy(request.prompt, 24), "not what the model says without a cache"
    print(f"{engine.num_passes} passes for {sum(len(r.answer) for r in requests)} tokens; all as without a cache")
    assert any(request.num_cached for request in requests)
    assert any(request.num_preempted for request in requests)
    assert engine.manager.num_free_blocks == 26


if __name__ == "__main__":
    main()
