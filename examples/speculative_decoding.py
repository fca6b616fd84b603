"""Speculative decoding: guess the next tokens, compute them in one pass, and keep those that were right.

The guesses are what followed the last two tokens when they came before. One pass then checks all of them: `commit` is
told how many were right, and what was computed for the wrong ones is dropped.
"""

import torch
from tiny_model import DIM, KV_HEADS, LAYERS, TinyModel
from torch import Tensor

from kvblocks import BlockManager, CacheConfig, CacheEngine, StepBuffers, paged_attention

GUESSES, COUNT = 4, 60


def guess(tokens: list[int]) -> list[int]:
    """What followed the last two tokens the last time they came."""
    for i in range(len(tokens) - 3, -1, -1):
        if tokens[i : i + 2] == tokens[-2:]:
            return tokens[i + 2 : i + 2 + GUESSES]
    return []


def main() -> None:
    model = TinyModel(seed=5)
    config = CacheConfig(num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=DIM, num_gpu_blocks=64, block_size=4)
    engine = CacheEngine(config, torch.float32, "cpu", layout="NHD")
    manager = BlockManager.for_config(config)
    step = StepBuffers.for_config(config, max_seqs=1, max_tokens=64, max_seq_len=200)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        engine[layer].write(k, v, step)
        return paged_attention(q, engine[layer], step)

    def one_pass(count: int) -> tuple[int, list[int]]:
        """The step's id, and the most likely token after each of the last `count` tokens."""
        step_id = manager.prepare([seq], [count], step)
        engine.move(step)
        logits = model(step.input_ids[: step.num_tokens], step.positions[: step.num_tokens], attend)
        return step_id, logits.argmax(1).tolist()

    tokens = list(b"one two one two one ")
    prompt = len(tokens)
    seq, _ = manager.admit(tokens)
    step_id, best = one_pass(prompt)
    manager.commit(step_id)
    tokens.append(best[-1])
    num_passes = 1
    while len(tokens) - prompt < COUNT:
        guesses = guess(tokens)
        manager.extend([seq], [tokens[-1], *guesses], [1 + len(guesses)])
        step_id, best = one_pass(1 + len(guesses))
        right = 0
        while right < len(guesses) and guesses[right] == best[right]:
            right += 1
        # The token that was known counts, and the guesses that were right; the sequence is cut after them.
        manager.commit(step_id, accepted=[1 + right])
        tokens += best[: right + 1]  # the first wrong guess is replaced by what the model says instead
        num_passes += 1
    answer = tokens[prompt : prompt + COUNT]
    print(f"{COUNT} tokens in {num_passes} passes of the model, instead of {COUNT}")
    print("the same tokens as one at a time:", answer == model.greedy(tokens[:prompt], COUNT))
    assert answer == model.greedy(tokens[:prompt], COUNT)
    assert num_passes < COUNT
    manager.audit()


if __name__ == "__main__":
    main()
