"""Token ids lie in pages that forks share until one of them writes: every text says its own tokens, whoever writes."""

import random

import numpy as np
import pytest

from kvblocks import BlockManager, NoFreeBlocks, StepBuffers

PAGE = 1024  # tokens of a page in a release build with blocks of 16; the checked build has smaller ones


def run(manager: BlockManager, step: StepBuffers, seq: int, count: int) -> None:
    step_id = manager.prepare([seq], [count], step)
    manager.mark_moved(step.last_move)
    manager.commit(step_id)


@pytest.mark.parametrize("length", [1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 3 * PAGE + 17])
@pytest.mark.parametrize("block_size", [16, 5])
def test_relatives_write_apart(length: int, block_size: int) -> None:
    manager = BlockManager(4000, block_size, max_seqs=16)
    step = StepBuffers(max_seqs=1, max_tokens=4 * PAGE, max_blocks_per_seq=2000)
    prompt = [i % 997 for i in range(length)]
    parent, _ = manager.admit(prompt)
    run(manager, step, parent, length)
    child, twin = manager.fork(parent, 2)
    manager.append([child], [1])
    manager.append([parent], [2])
    grandchild = manager.fork(child)[0]
    manager.append([twin], None)  # a placeholder in a page of its own
    late = manager.fork(twin)[0]
    manager.set_tokens([twin], [3])
    manager.set_tokens([late], [4])
    manager.extend([grandchild], list(range(2 * PAGE)), [2 * PAGE])
    manager.trim(child, length // 2)
    manager.append([child], [5])
    manager.audit()
    assert manager.tokens(parent).tolist() == [*prompt, 2]
    assert manager.tokens(child).tolist() == [*prompt[: length // 2], 5]
    assert manager.tokens(grandchild).tolist() == [*prompt, 1, *range(2 * PAGE)]
    assert manager.tokens(twin).tolist() == [*prompt, 3]
    assert manager.tokens(late).tolist() == [*prompt, 4]
    manager.free([parent, child, twin, late])
    manager.audit()
    run(manager, step, grandchild, 2 * PAGE + 1)
    manager.preempt(grandchild)
    manager.resume(grandchild)
    assert manager.tokens(grandchild).tolist() == [*prompt, 1, *range(2 * PAGE)]


@pytest.mark.parametrize("seed", range(8))
def test_random_families(seed: int) -> None:
    choose = random.Random(seed)
    manager = BlockManager(3000, choose.choice([16, 7, 64]), max_seqs=16, prefix_caching=choose.random() < 0.5)
    step = StepBuffers(max_seqs=1, max_tokens=8 * PAGE, max_blocks_per_seq=2000)
    texts: dict[int, list[int]] = {}
    for _ in range(150):
        kind = choose.choice(["admit", "extend", "free", "fork", "reorder", "trim", "run", "run"])
        if kind == "admit" and len(texts) < 5:
            text = [choose.randrange(3) for _ in range(choose.choice([1, PAGE - 1, PAGE, choose.randrange(1, 3000)]))]
            try:
                seq, _ = manager.admit(text)
            except NoFreeBlocks:
                continue
            texts[seq] = text
        elif not texts:
            continue
        seq = choose.choice(list(texts))
        if kind == "extend" and len(texts[seq]) < 4 * PAGE:
            text = [choose.randrange(9) for _ in range(choose.choice([1, 1, 20, PAGE, 2 * PAGE]))]
            manager.extend([seq], text, [len(text)])
            texts[seq] += text
        elif kind == "free":
            manager.free([seq])
            del texts[seq]
        elif kind == "fork" and len(texts) < 8:
            for child in manager.fork(seq, choose.randrange(1, 3)):
                texts[child] = list(texts[seq])
        elif kind == "reorder":
            seqs = choose.sample(list(texts), choose.randrange(1, len(texts) + 1))
            parents = [choose.choice(list(texts)) for _ in seqs]
            manager.reorder(seqs, parents)
            texts |= {one: list(texts[parent]) for one, parent in zip(seqs, parents, strict=True)}
        elif kind == "trim":
            manager.trim(seq, choose.randrange(len(texts[seq]) + 1))
            texts[seq] = texts[seq][: len(manager.tokens(seq))]
        elif kind == "run" and (left := len(texts[seq]) - int(manager.lengths([seq]).num_computed[0])):
            try:
                run(manager, step, seq, left)
            except NoFreeBlocks:
                continue
        for one, text in texts.items():
            assert np.array_equal(manager.tokens(one), text)
        manager.audit()


def test_relatives_write_extra_bytes_apart() -> None:
    """Extra bytes of one block lie in one piece of memory that grows in place, unless a relative reads it too."""
    manager, step = BlockManager(64, 16), StepBuffers(max_seqs=1, max_tokens=64, max_blocks_per_seq=8)
    parent, _ = manager.admit([7] * 4, extra=[(0, b"image")])
    for _ in range(4):  # from the second one on there is room to grow
        manager.append([parent], [7], extra=[[(0, b"a")]])
    child = manager.fork(parent)[0]
    manager.append([parent, child], [7, 7], extra=[[(0, b"p")], [(0, b"c")]])
    manager.trim(child, 8)
    manager.append([child], [7], extra=[[(0, b"d")]])
    before = [(0, b"image"), *[(4 + i, b"a") for i in range(4)], (8, b"p")]
    manager.extend([parent], [7] * 7, [7])
    manager.extend([child], [7] * 7, [7])
    run(manager, step, parent, 16)
    assert manager.match([7] * 17, extra=before) == 16
    assert manager.match([7] * 17, extra=[*before[:-1], (8, b"d")]) == 0
    run(manager, step, child, 16)
    assert manager.match([7] * 17, extra=[*before[:-1], (8, b"d")]) == 16
    assert manager.match([7] * 17, extra=before) == 16
    manager.audit()
