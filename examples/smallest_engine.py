"""A whole inference engine: requests arrive, share passes, find each other's prefixes, and give way when memory ends.

What makes it an engine: continuous batching (a pass holds prompts in chunks beside tokens that are decoded), a prefix
cache, and preemption. The pool here is too small for all requests at once, on purpose.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from tiny_model import DIM, KV_HEADS, LAYERS, TinyModel
from torch import Tensor

from kvblocks import BlockManager, CacheConfig, CacheEngine, NoFreeBlocks, StepBuffers, paged_attention

SEQS, TOKENS = 8, 48  # of one pass, at most


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

    def __init__(self, model: TinyModel, blocks: int) -> None:
        sizes = CacheConfig(num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=DIM, num_gpu_blocks=blocks, block_size=4)
        self.model = model
        self.caches = CacheEngine(sizes, torch.float32, "cpu", layout="NHD")
        self.manager = BlockManager.for_config(sizes)
        self.step = StepBuffers.for_config(sizes, max_seqs=SEQS, max_tokens=TOKENS, max_seq_len=sizes.max_tokens)
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_passes = 0

    def run(self) -> None:
        """Passes until every request is answered."""
        while self.waiting or self.running:
            self.admit()
            self.one_pass()

    def admit(self) -> None:
        """Let the first of those who wait in, as long as there are blocks for all of its tokens."""
        while self.waiting and len(self.running) < SEQS:
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
            lengths = self.manager.lengths([request.seq for request in self.running])
            left = lengths.num_tokens - lengths.num_computed
            counts = np.diff(np.minimum(left.cumsum(), TOKENS), prepend=0)  # in order, until the pass is full
            batch = [row for row in zip(self.running, counts.tolist(), left.tolist(), strict=True) if row[1]]
            try:
                step_id = self.manager.prepare([row[0].seq for row in batch], [row[1] for row in batch], self.step)
                break
            except NoFreeBlocks:
                if len(self.running) == 1:
                    raise  # as above
                newest = self.running.pop()  # it keeps its tokens, and is the next to be resumed
                self.manager.preempt(newest.seq)
                newest.num_preempted += 1
                self.waiting.appendleft(newest)
        step = self.step
        self.caches.move(step)
        logits = self.model(step.input_ids[: step.num_tokens], step.positions[: step.num_tokens], self.attend)
        self.manager.commit(step_id)
        self.num_passes += 1
        best = logits[step.query_start_loc[1 : len(batch) + 1] - 1].argmax(1).tolist()
        for (request, count, missing), token in zip(batch, best, strict=True):
            if count == missing:  # of a prompt that is not through yet the logits mean nothing
                self.accept(request, token)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.caches[layer].write(k, v, self.step)
        return paged_attention(q, self.caches[layer], self.step)

    def accept(self, request: Request, token: int) -> None:
        request.answer.append(token)
        if len(request.answer) < request.max_new_tokens:
            self.manager.append([request.seq], [token])
        else:
            self.manager.free([request.seq])
            self.running.remove(request)


def main() -> None:
    model = TinyModel()
    engine = Engine(model, blocks=26)
    common = b"A block is the K and V of four tokens. "
    requests = [Request(list(common + text), 24) for text in (b"What is a slot?", b"Who frees it?", b"Why?", b"When?")]
    engine.waiting.extend(requests)
    engine.run()
    for r in requests:
        assert r.answer == model.greedy(r.prompt, 24), "not what the model says without a cache"
        print(f"{len(r.prompt)} prompt tokens, {r.num_cached} cached, preempted {r.num_preempted} times")
    print(f"{engine.num_passes} passes for {4 * 24} tokens; all as without a cache")
    assert all(any(numbers) for numbers in zip(*[(r.num_cached, r.num_preempted) for r in requests], strict=True))
    assert engine.manager.num_free_blocks == 26


if __name__ == "__main__":
    main()
