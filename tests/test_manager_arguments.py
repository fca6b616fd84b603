"""Integers from wherever they come, and objects that were not made in the ordinary way."""

import ctypes
from itertools import combinations
from time import process_time
from typing import Any

import numpy as np
import pytest
import torch
from without_memory import WITHOUT_MEMORY

from kvblocks.config import CacheConfig, Group, Window
from kvblocks.errors import OutOfMemory
from kvblocks.manager import BlockManager, StepArrays
from kvblocks.step.buffers import StepBuffers

TOKENS = [5, 1, 7, 1]

BUFFERS: dict[str, Any] = {
    "ctypes": (ctypes.c_int32 * 4)(*TOKENS),
    "ctypes, narrow": (ctypes.c_int8 * 4)(*TOKENS),
    "unaligned": np.frombuffer(b"x" + np.array(TOKENS, np.int64).tobytes(), np.int64, offset=1),
    "reversed": np.array(TOKENS[::-1], np.int16)[::-1],
    "strided": np.array([[token, 0] for token in TOKENS], np.int64)[:, 0],
    "unsigned": np.array(TOKENS, np.uint64),
    "bytes": bytes(TOKENS),
    "tensor": torch.tensor(TOKENS),
}


@pytest.mark.parametrize("kind", BUFFERS)
def test_any_integer_buffer_is_read(kind: str) -> None:
    manager = BlockManager(8, 2)
    seq, _ = manager.admit(BUFFERS[kind])
    assert manager.tokens(seq).tolist() == TOKENS


@pytest.mark.parametrize("length", [2, np.int64(2), np.array(2, np.int32), torch.tensor(2), np.uint8(2)])
def test_one_query_length_serves_all(length: Any) -> None:
    manager, step = BlockManager(8, 2), StepBuffers(4, 16, 8)
    seqs = [manager.admit(TOKENS)[0] for _ in range(3)]
    manager.prepare(seqs, length, step)
    assert step.seq_lens.tolist() == [2, 2, 2, 0]


@pytest.mark.parametrize("kind", WITHOUT_MEMORY)
def test_tensors_without_memory_are_refused(kind: str) -> None:
    manager, step = BlockManager(8, 2), StepBuffers(4, 16, 8)
    seq, _ = manager.admit(TOKENS)
    for dtype in (torch.int64, torch.int32):
        wrong = WITHOUT_MEMORY[kind]((4,), dtype)
        calls: dict[str, Any] = {
            "tokens": lambda wrong=wrong: manager.admit(wrong),
            "seqs": lambda wrong=wrong: manager.lengths(wrong),
            "counts": lambda wrong=wrong: manager.extend([seq] * 4, TOKENS, wrong),
            "query_lens": lambda wrong=wrong: manager.prepare([seq] * 4, wrong, step),
        }
        for name, call in calls.items():
            with pytest.raises(TypeError, match=rf"^{name} is a .*(no array|without memory)"):
                call()
    assert manager.tokens(seq).tolist() == TOKENS


def test_a_tensor_that_takes_part_of_its_storage_is_read() -> None:
    parts = torch.tensor([[9, 5, 9, 1], [9, 7, 9, 1]])[:, 1::2]
    manager = BlockManager(8, 2)
    seq, _ = manager.admit(parts[:, 0])
    manager.append(seq, parts[1, 1])
    assert manager.tokens(seq).tolist() == [5, 7, 1]


@pytest.mark.parametrize(
    ("made", "args", "options", "said"),
    [
        (CacheConfig, (1, 2, 3, 4), {}, "takes no positional arguments, and 4 were given; it needs num_layers, num_kv"),
        (CacheConfig, (), {"num_layers": 1, "head_dim": 3}, "needs num_kv_heads, num_gpu_blocks"),
        (BlockManager, (1,), {}, "needs block_size"),
        (BlockManager, (1, 2, (None,)), {}, "takes 2 positional arguments, and 3 were given"),
        (BlockManager, (1, 2), {"blocks": 3}, "has no argument blocks"),
        (
            StepArrays,
            (np.zeros(1),),
            {},
            "needs positions, slot_mapping, block_table, seq_lens, query_start_loc, copies",
        ),
    ],
)
def test_a_call_with_wrong_arguments_names_the_class_and_what_is_wrong(
    made: Any, args: tuple[Any, ...], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(TypeError, match=rf"^{made.__name__}\(\) {said}"):
        made(*args, **options)


def test_a_manager_cannot_be_had_unmade() -> None:
    with pytest.raises(TypeError):
        BlockManager.__new__(BlockManager)  # type: ignore[call-arg]


def test_step_arrays_are_made_once_and_refuse_use_before() -> None:
    manager, step = BlockManager(8, 2), StepBuffers(4, 16, 8)
    seq, _ = manager.admit(TOKENS)
    with pytest.raises(RuntimeError, match="once"):
        StepArrays.__init__(step, *[np.zeros(1, np.int64)] * 7)
    with pytest.raises(ValueError, match="max_seqs=0"):
        manager.prepare([seq], 1, StepArrays.__new__(StepArrays))
    manager.prepare([seq], 4, step)
    assert step.num_tokens == 4


def test_step_buffers_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="max_seqs=0"):
        StepBuffers(0, 1, 1)
    with pytest.raises(TypeError, match="max_tokens"):
        StepBuffers(1, 1.5, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="meta"):
        StepBuffers(1, 1, 1, device="meta")
    with pytest.raises(OutOfMemory):
        StepBuffers(2**31 - 1, 1, 2**31 - 1)
    assert StepBuffers(100, 1, 1, groups=np.int8(2)).slot_mapping.shape == (2, 1)  # 2 * 100 is past an int8
    with torch.device("meta"):  # a default device is for models, not for the host's side of a step
        assert StepBuffers(1, 1, 1).input_ids.is_cpu


def test_step_buffers_for_a_config() -> None:
    groups = [Group(None, (0, 1)), Group(Window(8), (2,))]
    config = CacheConfig(
        num_layers=3, num_kv_heads=2, head_dim=4, num_gpu_blocks=9, block_size=4, v_head_dim=2, groups=groups
    )
    for max_seq_len, columns in ((1, 1), (4, 1), (5, 2), (33, 9)):
        step = StepBuffers.for_config(config, max_seqs=3, max_tokens=7, max_seq_len=max_seq_len)
        assert (step.max_seqs, step.max_tokens, step.max_blocks_per_seq, step.num_groups) == (3, 7, columns, 2)
        assert (step.block_table.shape, step.kv_indptr) == ((2, 3, columns), None)
    step = StepBuffers.for_config(
        config.replace(groups=None), max_seqs=1, max_tokens=1, max_seq_len=np.int64(5), kv_indices=True
    )
    assert (step.block_table.shape, step.kv_indptr is None) == ((1, 2), False)


def test_step_buffers_for_no_config_are_an_error() -> None:
    config: Any = CacheConfig(num_layers=1, num_kv_heads=1, head_dim=1, num_gpu_blocks=1)
    sizes: dict[str, Any] = {"max_seqs": 1, "max_tokens": 1, "max_seq_len": 1}
    with pytest.raises(TypeError, match="config is a BlockManager; give a CacheConfig"):
        StepBuffers.for_config(BlockManager(1, 16), **sizes)  # type: ignore[arg-type]
    for size in sizes:
        with pytest.raises(ValueError, match=f"{size}=0"):
            StepBuffers.for_config(config, **{**sizes, size: 0})
        with pytest.raises(TypeError, match=size):
            StepBuffers.for_config(config, **{**sizes, size: 2.0})
    with pytest.raises(TypeError, match="positional"):
        StepBuffers.for_config(config, 1, 1, 1)  # type: ignore[call-arg]


def test_the_largest_block_is_a_block() -> None:
    started = process_time()
    BlockManager(1, 2**27)
    assert process_time() - started < 0.5  # the key of its hash alone, made at once, takes four times as long
    for caching in (False, True):
        manager = BlockManager(1, 2**31 - 1, prefix_caching=caching)
        assert manager.can_admit(TOKENS).name == "NOW"


def test_a_block_of_many_tokens_is_found_by_all_of_them() -> None:
    """The key of its hash is made when the first one is full."""
    size = 70_001
    manager, step = BlockManager(4, size), StepBuffers(1, size, 4)
    text = np.arange(size + 1)
    seq, _ = manager.admit(text, reserve=size)
    manager.commit(manager.prepare([seq], size, step))
    assert manager.match(text) == size
    text[size - 2] += 1
    assert manager.match(text) == 0
    manager.audit()


class Rounds:
    """An integer for `int`, and none for `__index__`."""

    def __int__(self) -> int:
        return 3


class Counts:
    def __index__(self) -> int:
        return 3


def test_integers_are_what_has_an_index() -> None:
    manager = BlockManager(8, 4)
    for wrong in (torch.tensor(3.7), torch.tensor(True), torch.tensor([1, 2]), np.float64(3), np.bool_(True), Rounds()):
        with pytest.raises(TypeError, match=r"tokens\[1\]"):
            manager.admit([1, wrong])  # type: ignore[list-item]
        with pytest.raises(TypeError, match="reserve"):
            manager.admit([1, 2], reserve=wrong)  # type: ignore[arg-type]
    assert manager.num_sequences == 0
    seq, _ = manager.admit([Counts(), torch.tensor(4), np.int8(5)], reserve=Counts())
    assert manager.tokens(seq).tolist() == [3, 4, 5]


class Odd(Window):
    """A window that says another size each time it is asked."""

    size = -7


def test_a_window_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"groups\[0\].size=-7"):
        BlockManager(8, 4, groups=(object.__new__(Odd),))


SIZES = {  # elements of a step's arrays for four sequences, eight tokens and eight blocks of each sequence
    "input_ids": 8,
    "positions": 8,
    "slot_mapping": 8,
    "block_table": 32,
    "seq_lens": 4,
    "query_start_loc": 5,
    "copies": 8,
    "kv_indptr": 5,
    "kv_indices": 32,
    "kv_last_page_len": 4,
}
LENGTHS = ["seq_lens", "query_start_loc", "kv_indptr", "kv_last_page_len"]


def step_memory() -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
    """One piece of memory, and the arrays of a step in it, one after the other."""
    memory = np.zeros(1024, np.uint8)
    arrays: dict[str, Any] = {}
    start = 0
    for name, size in SIZES.items():
        dtype = np.dtype(np.int64 if name in ("input_ids", "positions", "slot_mapping", "copies") else np.int32)
        end = start + size * dtype.itemsize
        arrays[name], start = memory[start:end].view(dtype), -(-end // 8) * 8
    arrays["block_table"] = arrays["block_table"].reshape(4, 8)
    return memory, arrays


def two_steps(step: StepArrays) -> None:
    """Two sequences, of which a window hides the beginning, compute four tokens each, then two and one."""
    manager = BlockManager(16, 2, groups=(Window(3),))
    seqs = [manager.admit([token] * 5)[0] for token in (1, 2)]
    manager.commit(manager.prepare(seqs, 4, step))
    manager.append(seqs, [3, 4])
    manager.prepare(seqs, [2, 1], step)
    manager.audit()


@pytest.mark.parametrize(("one", "other"), list(combinations(LENGTHS, 2)))
def test_lengths_in_memory_of_the_user_decide_nothing(one: str, other: str) -> None:
    """Where two arrays lie over each other what they say is torn; all others say what they say otherwise."""
    (_, plain), (_, torn) = step_memory(), step_memory()
    torn[one] = np.zeros(5, np.int32)[: SIZES[one]]
    torn[other] = torn[one].base[: SIZES[other]]
    two_steps(StepArrays(**plain))
    two_steps(StepArrays(**torn))
    for name in SIZES.keys() - {one, other}:
        assert torn[name].tolist() == plain[name].tolist(), name


def test_what_is_carried_to_a_device_is_as_long_as_the_manager_knows() -> None:
    """Whoever writes into the arrays of a step before they are carried changes what is in them, and no length."""

    class Carried(StepArrays):
        packed: tuple[int, ...] = ()
        more = 0

        def _upload(self) -> None:
            for name in LENGTHS:
                arrays[name] += self.more
            out = np.zeros(self._pack_bytes(len(memory)) // 8, np.int64)
            self.packed = self._pack(memory.ctypes.data, out.ctypes.data)

    lengths = []
    for more in (0, 3):
        memory, arrays = step_memory()
        step = Carried(**arrays, uploads=True)
        step.more = more
        two_steps(step)
        lengths.append(step.packed)
    assert lengths[0] == lengths[1]
    assert lengths[0][0] > 0


def test_extra_bytes_are_read_before_anything_that_their_iterator_could_change() -> None:
    manager = BlockManager(64, 4)
    seq, _ = manager.admit([1, 2, 3])
    for first, position in [(2**62, 2**40), (50, 40)]:
        counts = np.array([first])

        def pairs(counts: Any = counts, position: int = position) -> Any:
            yield position, b"x"
            counts[0] = 1

        with pytest.raises(ValueError, match=r"must be below the number of tokens \(1\)"):
            manager.extend([seq], [7], counts, extra=[pairs()])
    assert manager.tokens(seq).tolist() == [1, 2, 3]
    manager.audit()
