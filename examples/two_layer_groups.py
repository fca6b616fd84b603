"""Two layer groups: layers that attend to a window give back the blocks that have slid out of it.

Of four layers every second one attends to the last eight tokens only. Each group has a block table of its own over one
pool, and a cache knows its group and how far it attends, so that attention is called as for any other layer.
"""

import torch
from tiny_model import DIM, KV_HEADS, TinyModel
from torch import Tensor

from kvblocks import BlockManager, CacheConfig, CacheEngine, Group, StepBuffers, Window, paged_attention

WINDOW, COUNT = 8, 80


def main() -> None:
    model = TinyModel(windows=(None, WINDOW, None, WINDOW))
    config = CacheConfig(
        num_layers=4,
        num_kv_heads=KV_HEADS,
        head_dim=DIM,
        num_gpu_blocks=40,
        block_size=4,
        groups=[Group(None, (0, 2)), Group(Window(WINDOW), (1, 3))],
    )
    engine = CacheEngine(config, torch.float32, "cpu", layout="NHD")
    manager = BlockManager.for_config(config)
    step = StepBuffers.for_config(config, max_seqs=1, max_tokens=32, max_seq_len=128)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache = engine[layer]
        cache.write(k, v, step)
        return paged_attention(q, cache, step)

    prompt = list(b"The window slides over the text.")
    seq, _ = manager.admit(prompt)
    answer: list[int] = []
    left = len(prompt)
    while len(answer) < COUNT:
        step_id = manager.prepare([seq], [left], step)
        engine.move(step)
        logits = model(step.input_ids[:left], step.positions[:left], attend)
        manager.commit(step_id)
        answer.append(int(logits[-1].argmax()))
        manager.append([seq], answer[-1:])
        left = 1
    everything, windowed = (int((table >= 0).sum()) for table in manager.block_table(seq))
    print(f"{len(prompt) + COUNT} tokens, in blocks of {config.block_size}:")
    print(f"  layers 0 and 2, which attend to everything, hold {everything} blocks")
    print(f"  layers 1 and 3, which attend to {WINDOW} tokens, hold {windowed}")
    assert (everything, windowed <= WINDOW // 4 + 1) == (28, True)
    assert answer == model.greedy(prompt, COUNT), "not what the model says without a cache"
    manager.audit()


if __name__ == "__main__":
    main()
