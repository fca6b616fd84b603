"""Manager, engine and attention together over layers of different reach, against attention over all tokens there are.

Blocks start as NaN, and become NaN again when their first slot is written, so that nothing but what a step wrote or a
hit found can come out right.
"""

import math
import re
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvblocks.attention import call
from kvblocks.attention.call import paged_attention
from kvblocks.config import CacheConfig, Chunk, Group, Window
from kvblocks.engine import CacheEngine
from kvblocks.errors import MovesPending, NoFreeBlocks
from kvblocks.manager import BlockManager
from kvblocks.step.buffers import StepBuffers
from kvblocks.storage import PagedKVCache

torch.set_num_threads(1)  # these tensors are tiny, and threads would only wait for each other

HEADS, KV_HEADS, DIM = 4, 2, 8
REACHES: list[tuple[Any, ...]] = [
    (None, Window(5)),
    (Window(3), None, Window(3)),
    (None, Chunk(6)),
    (Window(1), Window(7)),
    (Chunk(4), None),
]


@cache
def of_prefix(layer: int, tokens: tuple[int, ...]) -> Tensor:
    """K, V and query of the last token, [heads, dim] of each; they depend on all before it."""
    generator = torch.Generator().manual_seed(hash((layer, *tokens)) % 2**62)
    return torch.randn(2 * KV_HEADS + HEADS, DIM, generator=generator, dtype=torch.float64)


class Model:
    """Layers whose K and V are a function of the tokens up to their own, as a model's are."""

    def __init__(self, reaches: tuple[Any, ...], num_blocks: int, block_size: int, layout: str) -> None:
        self.reaches = reaches
        # Two layers in the first group, one in the others: places that stay empty.
        ids = [(0, len(reaches)), *[(i,) for i in range(1, len(reaches))]]
        groups = [Group(reach, layers) for reach, layers in zip(reaches, ids, strict=True)]
        config = CacheConfig(
            num_layers=len(reaches) + 1,
            num_kv_heads=KV_HEADS,
            head_dim=DIM,
            num_gpu_blocks=num_blocks,
            block_size=block_size,
            groups=groups,
        )
        self.engine = CacheEngine(config, "float64", "cpu", layout=layout)
        self.manager = BlockManager(num_blocks, block_size, groups=reaches)
        self.step = StepBuffers.for_config(config, max_seqs=8, max_tokens=64, max_seq_len=128 * block_size)
        for layer in self.engine:
            layer.key_cache.fill_(math.nan)
            layer.value_cache.fill_(math.nan)

    def kv(self, layer: int, tokens: list[int], start: int) -> Tensor:
        """K, V and queries of the tokens from `start` on: [tokens, heads, dim] of each, side by side."""
        return torch.stack([of_prefix(layer, tuple(tokens[: end + 1])) for end in range(start, len(tokens))])

    def expected(self, layer: int, tokens: list[int], start: int) -> Tensor:
        rows = self.kv(layer, tokens, 0)
        keys, values = (rows[:, i * KV_HEADS : (i + 1) * KV_HEADS].repeat_interleave(2, 1) for i in range(2))
        reach = self.reaches[self.engine.group_of(layer)]
        seen = torch.zeros(len(tokens) - start, len(tokens), dtype=torch.bool)
        for position in range(start, len(tokens)):
            first = 0
            if isinstance(reach, Window):
                first = max(0, position - reach.size + 1)
            elif isinstance(reach, Chunk):
                first = position // reach.size * reach.size
            seen[position - start, first : position + 1] = True
        scores = torch.einsum("qhd,thd->hqt", rows[start:, 2 * KV_HEADS :], keys) / math.sqrt(DIM)
        return torch.einsum("hqt,thd->qhd", scores.masked_fill(~seen, -math.inf).softmax(2), values)

    def run(self, seqs: list[int], lens: list[int]) -> None:
        """One pass; every layer's attention is what it should be."""
        step_id = self.manager.prepare(seqs, lens, self.step)
        step, tokens = self.step, [self.manager.tokens(seq).tolist() for seq in seqs]
        self.engine.move(step)
        ends = step.seq_lens.tolist()
        for layer, blocks in enumerate(self.engine):
            group = self.engine.group_of(layer)
            rows = torch.cat([self.kv(layer, tokens[i][: ends[i]], ends[i] - lens[i]) for i in range(len(seqs))])
            self.poison(blocks, step.slot_mapping[group][: step.num_tokens])
            # Neither group nor reach is named: the cache knows both.
            blocks.write(rows[:, :KV_HEADS], rows[:, KV_HEADS : 2 * KV_HEADS], step)
            out = paged_attention(rows[:, 2 * KV_HEADS :].contiguous(), blocks, step)
            right = torch.cat([self.expected(layer, tokens[i][: ends[i]], ends[i] - lens[i]) for i in range(len(seqs))])
            torch.testing.assert_close(out, right)
        self.manager.commit(step_id)
        self.manager.audit()

    def poison(self, blocks: Any, slots: Tensor) -> None:
        """What was in a block before its first token is written is not there any more."""
        size = blocks.block_size
        for slot in slots.tolist():
            if slot % size == 0:
                nothing = torch.full((size, KV_HEADS, DIM), math.nan, dtype=torch.float64)
                blocks.write(nothing, nothing, list(range(slot, slot + size)))


@given(
    reaches=st.sampled_from(REACHES),
    block_size=st.integers(1, 4),
    layout=st.sampled_from(["HDN", "NHD", "HND", "X"]),
    data=st.data(),
)
def test_attention_reads_what_it_should(reaches: tuple[Any, ...], block_size: int, layout: str, data: Any) -> None:
    model = Model(reaches, 12 * len(reaches), block_size, layout)
    manager = model.manager
    live: list[int] = []
    hits = data.draw(st.lists(st.integers(0, 1), min_size=24, max_size=24), label="a common prompt")
    for _ in range(data.draw(st.integers(3, 10), label="actions")):
        action = data.draw(st.sampled_from(["admit", "admit", "decode", "fork", "free", "preempt", "drafts"]))
        try:
            if action == "admit" and len(live) < 6:
                tokens = hits[: data.draw(st.integers(1, 24))] + data.draw(st.lists(st.integers(0, 1), max_size=4))
                seq, cached = manager.admit(tokens, reserve=0)
                live.append(seq)
                while cached < len(tokens):
                    chunk = data.draw(st.integers(1, min(len(tokens) - cached, 9)))
                    model.run([seq], [chunk])
                    cached += chunk
            elif live and action == "decode":
                for _ in range(data.draw(st.integers(1, 8))):
                    manager.append(live, [1] * len(live))
                    lengths = manager.lengths(live)
                    model.run(live, (lengths.num_tokens - lengths.num_computed).tolist())
            elif live and action == "fork" and len(live) < 6:
                live += manager.fork(live[0])
            elif live and action == "free":
                manager.free(live.pop(data.draw(st.integers(0, len(live) - 1))))
            elif live and action == "drafts":
                manager.extend(live[:1], [0, 0, 1], [3])
                lengths = manager.lengths(live[:1])
                left = int(lengths.num_tokens[0] - lengths.num_computed[0])
                step_id = manager.prepare(live[:1], [left], model.step)
                model.engine.move(model.step)
                manager.abort(step_id) if left % 2 else manager.commit(step_id, [0])
            elif live and action == "preempt":
                manager.preempt(live[-1])
                cached = manager.resume(live[-1], reserve=0)
                left = int(manager.lengths(live[-1:]).num_tokens[0]) - cached
                model.run(live[-1:], [left])
        except NoFreeBlocks:
            manager.free(live)
            live = []


def prepared(reaches: tuple[Any, ...]) -> tuple[Model, Tensor]:
    """A model with a step of one sequence that has slid out of its windows, and a query for it."""
    model = Model(reaches, 40, 2, "NHD")
    seq, _ = model.manager.admit(list(range(20)), reserve=0)
    for _ in range(19):
        model.run([seq], [1])
    model.manager.prepare([seq], [1], model.step)
    model.engine.move(model.step)
    nothing = torch.zeros(1, KV_HEADS, DIM, dtype=torch.float64)
    for blocks in model.engine:
        blocks.write(nothing, nothing, model.step)
    return model, torch.zeros(1, HEADS, DIM, dtype=torch.float64)


def test_a_cache_knows_its_group_and_how_far_it_attends() -> None:
    model = Model((None, Window(5), Chunk(6)), 12, 4, "NHD")
    assert [(cache.group, cache.num_groups, cache.reach) for cache in model.engine] == [
        (0, 3, None),
        (1, 3, Window(5)),
        (2, 3, Chunk(6)),
        (0, 3, None),
    ]


@pytest.mark.parametrize(
    ("reach", "options"),
    [
        (Window(5), {"window": 6}),
        (Window(5), {"chunk": 6}),
        (Chunk(6), {"window": 6}),
        (Chunk(6), {"window": 2}),
        (Chunk(6), {"chunk": 4}),
        (Chunk(6), {"chunk": 12}),
    ],
)
def test_attending_further_than_the_group_keeps_is_an_error(reach: Any, options: dict[str, Any]) -> None:
    """Out there the table is padding, and the blocks are other sequences'."""
    model, query = prepared((None, reach))
    with pytest.raises(ValueError, match=rf"reach further than {re.escape(str(reach))}, for which .* keeps blocks"):
        paged_attention(query, model.engine[1], model.step, **options)


@pytest.mark.parametrize(
    ("reach", "options"),
    [
        (Window(5), {"window": 5}),
        (Window(5), {"window": 3}),
        (Window(5), {"chunk": 4}),
        (Chunk(6), {"chunk": 6}),
        (Chunk(6), {"chunk": 3}),
        (Chunk(6), {"window": 1}),
        (Chunk(6), {"chunk": 6, "window": 9}),
        (None, {"window": 3}),
        (None, {"chunk": 4}),
    ],
)
def test_attending_less_far_is_allowed(reach: Any, options: dict[str, Any]) -> None:
    model, query = prepared((reach, None))
    assert paged_attention(query, model.engine[0], model.step, **options).isfinite().all()


def test_a_wrong_group_is_an_error() -> None:
    model, query = prepared((None, Window(5)))
    for group in (0, 2, -1, True):
        with pytest.raises(ValueError, match=f"group={group} is not this cache's, 1"):
            paged_attention(query, model.engine[1], model.step, group=group)
    right = paged_attention(query, model.engine[1], model.step, group=1)
    assert torch.equal(right, paged_attention(query, model.engine[1], model.step))
    alone = PagedKVCache(4, KV_HEADS, DIM, 2, "float64", "cpu")
    with pytest.raises(ValueError, match="2 layer groups, and a cache that was made alone is of none; give group="):
        paged_attention(query, alone, model.step)
    step, manager = StepBuffers(1, 4, 2), BlockManager(4, 2)
    manager.prepare([manager.admit([1])[0]], [1], step)
    with pytest.raises(ValueError, match="the step has 1 layer groups, and the engine of this cache 2"):
        paged_attention(query, model.engine[0], step)


def test_writing_takes_the_slots_of_the_caches_group_from_a_step() -> None:
    model = Model((None, Window(5)), 12, 4, "NHD")
    seqs = [model.manager.admit([1, 2, 3])[0], model.manager.admit([4, 5])[0]]
    model.manager.prepare(seqs, [3, 2], model.step)
    rows = torch.randn(7, KV_HEADS, DIM, dtype=torch.float64)  # two more than there are tokens, for a fixed shape
    for blocks in model.engine:
        blocks.write(rows, -rows, model.step)
        table = model.step.block_table[blocks.group]
        for first, count, row in ((0, 3, 0), (3, 2, 1)):
            keys, values = blocks.gather(table[row, :1], count)
            assert torch.equal(keys, rows[first : first + count])
            assert torch.equal(values, -rows[first : first + count])
        assert not torch.isin(rows[5:], blocks.key_cache).any()


def test_what_layers_ask_of_a_step_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, query = prepared((None, Window(5)))
    model.step.derived.clear()
    asked: list[str] = []

    def counting(name: str, made: Any) -> Any:
        def counted(*given: Any) -> Any:
            asked.append(name)
            return made(*given)

        return counted

    monkeypatch.setattr(call, "_listed", counting("rows", call._listed))
    monkeypatch.setattr(PagedKVCache, "_indices", counting("slots", PagedKVCache._indices))
    monkeypatch.setattr(
        PagedKVCache, "gather", lambda self, table, count: self._mover.gather(table.long(), count, None)
    )
    nothing = torch.zeros(1, KV_HEADS, DIM, dtype=torch.float64)
    for layer in [*model.engine, *model.engine]:
        layer.write(nothing, nothing, model.step)
        paged_attention(query, layer, model.step)
    assert sorted(asked) == ["rows", "rows", "slots", "slots"]  # for each of the two groups


def test_a_step_that_does_not_fit_is_not_written() -> None:
    model = Model((None, Window(5)), 12, 4, "NHD")
    cache, rows = model.engine[1], torch.zeros(3, KV_HEADS, DIM, dtype=torch.float64)
    model.manager.prepare([model.manager.admit([1, 2, 3])[0]], [3], model.step)
    for count in (2, 65):
        some = torch.zeros(count, KV_HEADS, DIM, dtype=torch.float64)
        with pytest.raises(ValueError, match=f"have {count} rows; the step has num_tokens=3, and no more than 64"):
            cache.write(some, some, model.step)
    alone = PagedKVCache(12, KV_HEADS, DIM, 4, "float64", "cpu")
    with pytest.raises(ValueError, match="the step has 2 layer groups, and this cache is of 1; take the cache of"):
        alone.write(rows, rows, model.step)
    model.step.slot_mapping[1, 2] = 48  # what the first layer of a pass would write is checked
    with pytest.raises(ValueError, match=r"step.slot_mapping\[2\]=48 is outside -1..47"):
        cache.write(rows, rows, model.step)
    assert all(layer.key_cache.isnan().all() for layer in model.engine)


def test_a_step_whose_blocks_were_not_moved_is_not_written() -> None:
    config = CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_gpu_blocks=4)
    engine, manager, step = CacheEngine(config, "float32", "cpu"), BlockManager.for_config(config), StepBuffers(2, 8, 1)
    seq, _ = manager.admit([1, 2])
    step_id = manager.prepare([seq], [2], step)
    engine.move(step)
    manager.commit(step_id)
    [fork] = manager.fork(seq)
    manager.append([seq, fork], [3, 4])
    manager.prepare([fork], [1], step)
    assert step.num_copies == 1
    row = torch.ones(1, 1, 8)
    with pytest.raises(MovesPending, match=r"call engine.move\(step\) first"):
        engine[0].write(row, row, step)
    assert not engine[0].key_cache.any()
    engine.move(step)
    engine[0].write(row, row, step)
    assert engine[0].key_cache.sum() == 8


@pytest.mark.parametrize(
    ("num_blocks", "block_size", "groups", "message"),
    [
        (12, 4, (None, Window(4)), "layer groups are .*size=4.* and the engine's .*size=5"),
        (12, 2, (None, Window(5)), "12 blocks of 2 tokens and the engine 12 of 4"),
        (13, 4, (None, Window(5)), "13 blocks of 4 tokens and the engine 12 of 4"),
    ],
)
def test_a_manager_of_other_blocks_is_an_error(
    num_blocks: int, block_size: int, groups: tuple[Any, ...], message: str
) -> None:
    """A narrower window in the manager than in the engine gives blocks back that are still read."""
    model = Model((None, Window(5)), 12, 4, "NHD")
    manager = BlockManager(num_blocks, block_size, groups=groups)
    seq, _ = manager.admit([1, 2, 3])
    manager.prepare([seq], [3], model.step)
    with pytest.raises(ValueError, match=message):
        model.engine.move(model.step)
