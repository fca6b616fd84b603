"""What the types refuse, the compiled modules refuse too, and what they take is taken.

mypy reads this file: a call that its types would accept makes the `type: ignore` beside it unused, which is an error.
"""

import array

import numpy as np
import pytest
import torch

from kvblocks import BlockManager, CacheConfig, StepBuffers, Window


def test_integers_come_in_these_forms() -> None:
    manager, step = BlockManager(64, 4), StepBuffers(8, 64, 16)
    manager.match(5)
    manager.match([1, 2, 3])
    manager.match((1, np.int32(2), 3))
    manager.match(range(3))
    manager.match(np.arange(3))
    manager.match(torch.arange(3))
    manager.match(array.array("i", [1, 2, 3]))
    manager.match(memoryview(array.array("q", [1, 2, 3])))
    manager.match(bytes([1, 2, 3]))
    seq, num_cached = manager.admit(torch.arange(3), reserve=np.int64(3))
    manager.prepare([seq], np.array([3 - num_cached]), step)


def test_other_things_are_refused_by_types_and_at_run_time() -> None:
    manager, step = BlockManager(64, 4), StepBuffers(8, 64, 16)
    seq, _ = manager.admit([1, 2, 3])
    with pytest.raises(TypeError):
        manager.append("x", object())  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        manager.append([seq], "x")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        manager.append([seq], object())  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        manager.append([seq], [1.5])  # type: ignore[list-item]
    with pytest.raises(TypeError):
        manager.append([seq], {1})  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        manager.admit(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        manager.admit(["1"])  # type: ignore[list-item]
    with pytest.raises(TypeError):
        manager.admit([1], salt="tenant")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        manager.extend([seq], [7], None)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        manager.prepare([seq], 1.0, step)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        manager.prepare([seq], 1, {})  # type: ignore[arg-type]
    assert manager.tokens(seq).tolist() == [1, 2, 3]
    with pytest.raises(TypeError):
        BlockManager(8, 4, groups=(8,))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        Window("8")  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        CacheConfig(1, 2, 3, 4)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        CacheConfig(num_layers=1.0, num_kv_heads=1, head_dim=1, num_gpu_blocks=1)  # type: ignore[arg-type]
