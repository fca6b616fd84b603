"""Beam search: beams share every block of what they have in common, and one call makes a beam step.

A beam that another one continues keeps the blocks; only the last block, which both go on to write, is copied, and
`engine.move` does it.
"""

import torch
from tiny_model import DIM, KV_HEADS, LAYERS, TinyModel
from torch import Tensor

from kvblocks import BlockManager, CacheConfig, CacheEngine, StepBuffers, paged_attention

WIDTH, COUNT = 4, 20


def best(scores: Tensor, logits: Tensor) -> tuple[Tensor, list[int], list[int]]:
    """The best continuations of all beams: their scores, the beam each goes on from, and its token."""
    totals = scores[:, None] + logits.log_softmax(1)
    kept, places = totals.flatten().topk(WIDTH)
    return kept, (places // logits.shape[1]).tolist(), (places % logits.shape[1]).tolist()


def without_cache(model: TinyModel, prompt: list[int]) -> list[list[int]]:
    """The beams when every one is computed anew for each token."""
    scores, parents, tokens = best(torch.zeros(1), model.logits(prompt)[None])
    beams = [[token] for token in tokens]
    for _ in range(COUNT - 1):
        logits = torch.stack([model.logits(prompt + beam) for beam in beams])
        scores, parents, tokens = best(scores, logits)
        beams = [[*beams[parent], token] for parent, token in zip(parents, tokens, strict=True)]
    return beams


def main() -> None:
    model = TinyModel()
    config = CacheConfig(num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=DIM, num_gpu_blocks=64, block_size=4)
    engine = CacheEngine(config, torch.float32, "cpu", layout="NHD")
    manager = BlockManager.for_config(config)
    step = StepBuffers.for_config(config, max_seqs=WIDTH, max_tokens=64, max_seq_len=100)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        engine[layer].write(k, v, step)
        return paged_attention(q, engine[layer], step)

    def one_pass(seqs: list[int], count: int) -> Tensor:
        step_id = manager.prepare(seqs, count, step)
        engine.move(step)
        logits = model(step.input_ids[: step.num_tokens], step.positions[: step.num_tokens], attend)
        manager.commit(step_id)
        return logits[step.query_start_loc[1 : len(seqs) + 1] - 1]

    prompt = list(b"All beams begin with this, and hold it once.")
    first, _ = manager.admit(prompt)
    scores, _, tokens = best(torch.zeros(1), one_pass([first], len(prompt)))
    seqs = [first, *manager.fork(first, WIDTH - 1)]
    beams = [[token] for token in tokens]
    for _ in range(COUNT - 1):
        manager.append(seqs, tokens)
        scores, parents, tokens = best(scores, one_pass(seqs, 1))
        manager.reorder(seqs, [seqs[parent] for parent in parents])
        beams = [[*beams[parent], token] for parent, token in zip(parents, tokens, strict=True)]
    held = config.num_gpu_blocks - manager.num_free_blocks
    alone = WIDTH * config.num_blocks_for(len(prompt) + COUNT - 1)
    print(f"{WIDTH} beams hold {held} blocks; without sharing they would hold {alone}")
    print(f"the best beam: {beams[0]}")
    assert held < alone
    assert beams == without_cache(model, prompt), "not the beams of a search without a cache"
    manager.audit()


if __name__ == "__main__":
    main()
