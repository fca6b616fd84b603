"""Asynchronous decode: the next step is prepared before the host has seen the tokens of this one.

A token that is not known yet is a placeholder. It has a slot, so that the next pass can be launched. Its id goes from
the device into the step's input, and the manager learns it one step later, while the device is busy.
"""

import torch
from tiny_model import DIM, KV_HEADS, LAYERS, TinyModel
from torch import Tensor

from kvblocks import BlockManager, CacheConfig, CacheEngine, StepBuffers, paged_attention

COUNT = 24


def main() -> None:
    model = TinyModel()
    config = CacheConfig(num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=DIM, num_gpu_blocks=64, block_size=4)
    engine = CacheEngine(config, torch.float32, "cpu", layout="NHD")
    manager = BlockManager.for_config(config)
    # Two, as one may still be read by the device while the other is filled.
    buffers = [StepBuffers.for_config(config, max_seqs=2, max_tokens=64, max_seq_len=100) for _ in range(2)]

    def launch(step: StepBuffers) -> Tensor:
        """The most likely token after each sequence, on the device; nothing waits for it."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            engine[layer].write(k, v, step)
            return paged_attention(q, engine[layer], step)

        engine.move(step)
        logits = model(step.input_ids[: step.num_tokens], step.positions[: step.num_tokens], attend)
        return logits[step.query_start_loc[1 : step.num_seqs + 1] - 1].argmax(1)

    prompts = [list(b"Once upon a time"), list(b"Who holds the lock?")]
    seqs = [manager.admit(prompt)[0] for prompt in prompts]
    open_step = manager.prepare(seqs, [len(prompt) for prompt in prompts], buffers[0])
    on_device = launch(buffers[0])
    answers: list[list[int]] = [[] for _ in prompts]
    for i in range(1, COUNT):
        manager.append(seqs)  # placeholders: their ids are on the device only
        step = buffers[i % 2]
        step_id = manager.prepare(seqs, 1, step)  # the step before is still open
        step.input_ids[: len(seqs)] = on_device  # from device to device
        before, on_device = on_device, launch(step)
        # While the device runs that pass, the host reads the ids of the one before and closes it.
        manager.commit(open_step)
        ids = before.tolist()
        manager.set_tokens(seqs, ids)
        for answer, token in zip(answers, ids, strict=True):
            answer.append(token)
        open_step = step_id
    manager.commit(open_step)
    for answer, token in zip(answers, on_device.tolist(), strict=True):
        answer.append(token)
    for prompt, answer, seq in zip(prompts, answers, seqs, strict=True):
        right = model.greedy(prompt, COUNT)
        print(f"{bytes(prompt).decode()!r}: {answer[:8]}..., as one step at a time: {answer == right}")
        assert answer == right
        # The last token was never appended: it is in no slot.
        assert manager.tokens(seq).tolist() == prompt + answer[:-1]
    manager.audit()


if __name__ == "__main__":
    main()
