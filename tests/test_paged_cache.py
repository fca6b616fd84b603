"""PagedCache beside DynamicCache: the same K and V for any calls, and what only a cache of blocks has."""

import copy
import gc
import hashlib
import itertools
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, PreTrainedModel

from kvblocks import BlockManager, CacheConfig, CacheEngine
from kvblocks.errors import NoFreeBlocks
from kvblocks.integrations.transformers import PagedCache, UnsupportedModel
from kvblocks.integrations.transformers.blocks import _unknown_ids

# These tensors are tiny, and threads would only wait for each other.
torch.set_num_threads(1)

WINDOW = 9


def examples(count: int) -> int:
    """So many in an ordinary run, and twenty times as many where hypothesis is told to search for long."""
    return count * 20 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else count


def llama_config(**fields: Any) -> LlamaConfig:
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    return LlamaConfig(**(sizes | heads | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | fields))


def sliding_config() -> Any:
    """Layers of both kinds, over K and V of the same sizes as in `llama_config`."""
    kinds = ["full_attention", "sliding_attention"]
    return transformers.Gemma2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=WINDOW,
        layer_types=kinds,
        pad_token_id=0,
    )


CONFIGS: dict[str, Callable[[], Any]] = {"full": llama_config, "sliding": sliding_config}


@cache
def model(kind: str) -> PreTrainedModel:
    """One whose tokens depend on what came long before."""
    return tiny_models.sharp(kind)


def prompts(*lengths: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A batch of prompts padded on the left, and its mask. Those of a seed begin alike."""
    columns = max(lengths)
    ids, mask = torch.zeros(len(lengths), columns, dtype=torch.int64), torch.zeros(len(lengths), columns).long()
    text = torch.randint(3, 97, (columns,), generator=torch.Generator().manual_seed(seed))
    for row, length in enumerate(lengths):
        ids[row, columns - length :] = text[:length]
        mask[row, columns - length :] = 1
    return ids, mask


def generate(kind: str, ids: Tensor, mask: Tensor, past: Any, **options: Any) -> Tensor:
    torch.manual_seed(0)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False} | options
    made: Any = model(kind)
    out: Tensor = made.generate(ids, attention_mask=mask, past_key_values=past, **options)
    return out


def dynamic(kind: str) -> DynamicCache:
    return DynamicCache(config=model(kind).config)


def paged(kind: str, **options: Any) -> PagedCache:
    return PagedCache(model(kind).config, **({"num_blocks": 200, "block_size": 4} | options))


def check_all_given_back(*caches: PagedCache) -> None:
    for held in caches:
        held.close()
        held.manager.audit()
    assert caches[0].manager.num_free_blocks == caches[0].manager.num_blocks
    assert caches[0].manager.num_sequences == 0


# The same K and V, whatever is called


def states(rows: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 2, count, 8, generator=generator), torch.randn(rows, 2, count, 8, generator=generator)


def feed(caches: Sequence[Any], rows: int, count: int, generator: torch.Generator) -> None:
    """One pass through each; each layer must get the same back, and have said before how much that is."""
    for layer in range(2):
        keys, values = states(rows, count, generator)
        sizes = {held.get_mask_sizes(count, layer) for held in caches}
        assert len(sizes) == 1
        got = [held.update(keys.clone(), values.clone(), layer) for held in caches]
        assert got[0][0].shape[2] == sizes.pop()[0]
        for mine, theirs in zip(got[0], got[1], strict=True):
            assert torch.equal(mine, theirs)
        assert len({held.get_seq_length(layer) for held in caches}) == 1


@pytest.mark.parametrize("kind", CONFIGS)
@settings(max_examples=examples(40))
@given(st.data())
def test_any_calls_give_what_dynamic_cache_gives(kind: str, data: st.DataObject) -> None:
    config = CONFIGS[kind]()
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    mine = PagedCache(config, num_blocks=4000, block_size=data.draw(st.sampled_from([1, 2, 3, 4, 16])))
    pair: list[Any] = [mine, DynamicCache(config=config)]
    rows = data.draw(st.integers(1, 4))
    others: list[PagedCache] = []
    records = False
    recorded = 0  # columns since passes can be cut
    for _ in range(data.draw(st.integers(1, 10))):
        columns = pair[0].get_seq_length()
        calls = ["pass", "pass", "record", "reorder", "repeat", "select", "crop", "reset", "fork"]
        call = data.draw(st.sampled_from(calls))
        if call == "record":
            records = True
            for held in pair:
                held.activate_past_recording()
            for _ in range(data.draw(st.integers(1, 3))):
                count = data.draw(st.integers(1, WINDOW))
                feed(pair, rows, count, generator)
                recorded += count
        if call in ("record", "crop") and recorded:
            count = data.draw(st.integers(0, min(recorded, pair[0].get_seq_length() - 1)))
            for held in pair:
                held.crop(-count)
        recorded = 0
        if call == "record":
            continue
        if call == "pass" or not columns:
            feed(pair, rows, data.draw(st.integers(1, 2 * WINDOW)), generator)
            for held in pair if records else []:
                held.crop(0)
        elif call == "reorder":
            indices = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows)))
            for held in pair:
                held.reorder_cache(indices)
        elif call == "repeat" and rows < 4:
            for held in pair:
                held.batch_repeat_interleave(2)
            rows *= 2
        elif call == "select":
            indices = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=4)))
            for held in pair:
                held.batch_select_indices(indices)
            rows = len(indices)
        elif call == "crop" and (kind == "full" or columns < WINDOW - 1):
            count = data.draw(st.integers(0, columns - 1))
            for held in pair:
                held.crop(-count)
        elif call == "reset":
            for held in pair:
                held.reset()
        elif call == "fork":
            others.append(pair[0])
            pair = [pair[0].fork(), copy.deepcopy(pair[1])]
        mine.manager.audit()
    for held in (pair[0], *others):
        held.close()
    check_all_given_back(mine)


@cache
def told_state(layer: int, ids: tuple[int, ...]) -> float:
    """What K of the last of these tokens is: it depends on all of them."""
    digest = hashlib.blake2b(repr((layer, *ids)).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") / 2**32


def told_pass(held: PagedCache, ids: np.ndarray[Any, Any], pads: Sequence[int], before: int, after: int) -> None:
    """Run columns `before` to `after` of a batch through both layers, and check every column within reach."""
    for layer in range(2):
        keys = torch.zeros(len(ids), 2, after - before, 8)
        for row, pad in enumerate(pads):
            for column in range(max(before, pad), after):
                keys[row, :, column - before] = told_state(layer, tuple(ids[row, pad : column + 1].tolist()))
        got, values = held.update(keys, keys + 1, layer)
        first = after - got.shape[2]
        for row, pad in enumerate(pads):
            for column in range(max(first, pad), after):
                expected = told_state(layer, tuple(ids[row, pad : column + 1].tolist()))
                assert got[row, 0, column - first, 3] == pytest.approx(expected, abs=1e-6)
                assert values[row, 1, column - first, 7] == pytest.approx(expected + 1, abs=1e-6)
            assert not got[row, :, : max(0, pad - first)].any()


@settings(max_examples=examples(25))
@given(st.data())
def test_whatever_was_told_is_found_again_and_nothing_else(data: st.DataObject) -> None:
    held = PagedCache(sliding_config(), num_blocks=300, block_size=data.draw(st.sampled_from([1, 2, 4])))
    told: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 4))):
        lengths = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
        columns, alphabet = max(lengths) + data.draw(st.sampled_from([0, 0, 3])), st.integers(5, 6)
        pads = [columns - length for length in lengths]
        ids = np.zeros((len(lengths), columns + 8), np.int64)
        for row, pad in enumerate(pads):
            start = data.draw(st.sampled_from([[], *told]))[: columns - pad]
            rest = data.draw(
                st.lists(alphabet, min_size=columns - pad - len(start), max_size=columns - pad - len(start))
            )
            ids[row, pad:columns] = [*start, *rest]
            told.append([*start, *rest])
        mask = (np.arange(columns) >= np.array(pads)[:, None]).astype(np.int64)
        there = held.begin(ids[:, :columns], mask, reuse=data.draw(st.sampled_from([True, True, False])))
        assert there == held.get_seq_length() < columns
        steps = sorted({there, columns, *data.draw(st.lists(st.integers(there, columns), max_size=2))})
        for before, after in itertools.pairwise(steps):
            told_pass(held, ids, pads, before, after)
        for column in range(columns, columns + data.draw(st.integers(0, 8))):
            ids[:, column] = data.draw(st.lists(alphabet, min_size=len(ids), max_size=len(ids)))
            told_pass(held, ids, pads, column, column + 1)
        held.manager.audit()
        if data.draw(st.booleans()):
            held.tell(ids[:, : held.get_seq_length()])
    check_all_given_back(held)


# Through `generate`


KINDS = ["llama", "gemma2", "llama4_text", "deepseek_v3", "gemma3n_text", "gpt_oss"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_batch(kind: str) -> None:
    ids, mask = prompts(21, 15, 1)
    ids[0, 0], ids[1, 6], ids[2, 20] = 90, 91, 92
    expected = generate(kind, ids, mask, dynamic(kind))
    with paged(kind) as held:
        assert torch.equal(generate(kind, ids, mask, held), expected)
        held.begin(ids, mask)
        assert torch.equal(generate(kind, ids, mask, held), expected)
        used = held.num_held_blocks
    check_all_given_back(held)
    # Padding takes no slot; the last new token is never written. What has a window holds that and no more.
    full = sum(-(-(length + 11) // 4) for length in (21, 15, 1))
    if len(held.manager.groups) == 1:
        assert used == full
    else:
        assert used <= full + 3 * (WINDOW // 4 + 2) < 2 * full


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_call_computes_only_what_is_new(kind: str) -> None:
    first, first_mask = prompts(32)
    held = paged(kind)
    assert held.begin(first, first_mask) == 0
    generate(kind, first, first_mask, held)
    held.begin(*prompts(3, seed=1))  # what the first left behind is in no row any more
    # Rows that have 28, 17 and 9 of those tokens. Whole blocks are found, and the last token is always computed.
    ids, mask = prompts(30, 17, 9)
    ids[0, -2:] = 3
    there = held.begin(ids, mask)
    # Where layers have windows, those of all rows must reach back from the same column.
    assert there == min(0 + 28, 13 + 16, 21 + 8) if len(held.manager.groups) == 1 else 0 < there <= 28
    assert torch.equal(generate(kind, ids, mask, held), generate(kind, ids, mask, dynamic(kind)))
    ids, mask = prompts(30, 9)
    assert held.begin(ids, mask, reuse=False) == 0
    assert torch.equal(generate(kind, ids, mask, held), generate(kind, ids, mask, dynamic(kind)))
    check_all_given_back(held)


def test_after_a_reset_rows_are_computed_anew_too() -> None:
    held = paged("llama")
    ids, mask = prompts(22)
    held.begin(ids, mask)
    generate("llama", ids, mask, held)
    assert held.begin(ids, mask) == 21  # the row itself still has them
    generate("llama", ids, mask, held)
    held.manager.reset_prefix_cache()
    assert held.begin(ids, mask) == 0
    assert torch.equal(generate("llama", ids, mask, held), generate("llama", ids, mask, dynamic("llama")))
    assert held.begin(ids, mask) == 21
    check_all_given_back(held)


def test_the_shortest_hit_decides() -> None:
    held = paged("llama")
    first, mask = prompts(20)
    held.begin(first, mask)
    generate("llama", first, mask, held)
    ids, mask = prompts(20, 20)
    ids[1, 9:] = 5
    assert held.begin(ids, mask) == 8
    assert torch.equal(generate("llama", ids, mask, held), generate("llama", ids, mask, dynamic("llama")))


def test_a_chat_goes_on_from_its_answers() -> None:
    held = paged("llama")
    ids, mask = prompts(10, 7)
    held.begin(ids, mask)
    for _ in range(3):
        ids = generate("llama", ids, mask, held)
        mask = torch.cat([mask, torch.ones(2, ids.shape[1] - mask.shape[1], dtype=mask.dtype)], 1)
        held.tell(ids)
        there = held.get_seq_length()
        ids = torch.cat([ids, torch.tensor([[7, 8, 9]] * 2)], 1)
        mask = torch.cat([mask, torch.ones(2, 3, dtype=mask.dtype)], 1)
        assert held.begin(ids, mask) == there
        expected = generate("llama", ids, mask, dynamic("llama"))
    assert torch.equal(generate("llama", ids, mask, held), expected)
    check_all_given_back(held)


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3n_text"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 4},
        {"num_beams": 3, "num_return_sequences": 3, "do_sample": True},
        {"num_return_sequences": 3, "do_sample": True},
        {"prefill_chunk_size": 4},
    ],
    ids=["beams", "sampled beams", "return sequences", "chunked prefill"],
)
def test_ways_to_generate(options: dict[str, Any], kind: str, begin: bool) -> None:
    ids, mask = prompts(14, 9)
    expected = generate(kind, ids, mask, dynamic(kind), **options)
    held = paged(kind)
    if begin:
        held.begin(ids, mask)
    assert torch.equal(generate(kind, ids, mask, held, **options), expected)
    check_all_given_back(held)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "llama4_text"])
def test_assisted_generation(kind: str) -> None:
    ids, mask = prompts(30)
    ids[0, 10:20] = ids[0, :10]
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 4, "max_new_tokens": 30}
    expected = generate(kind, ids, mask, dynamic(kind), **options)
    assert torch.equal(generate(kind, ids, mask, paged(kind), **options), expected)
    held = paged(kind)
    for _ in range(2):
        held.begin(ids, mask, reuse=False)
        assert torch.equal(generate(kind, ids, mask, held, **options), expected)
    assert held.begin(ids, mask) > 0
    with pytest.raises(ValueError, match="reuse=False"):  # it computes the prompt whole whatever is there
        generate(kind, ids, mask, held, **options)
    held.begin(ids, mask, reuse=False)
    assert torch.equal(generate(kind, ids, mask, held, **options), expected)
    options = {"assistant_model": model("qwen2"), "max_new_tokens": 20}
    expected = generate(kind, ids, mask, dynamic(kind), **options)
    held.reset()
    assert torch.equal(generate(kind, ids, mask, held, **options), expected)
    check_all_given_back(held)


def test_beams_hold_little_more_than_one_sequence() -> None:
    ids, mask = prompts(100)
    with paged("llama") as one:
        generate("llama", ids, mask, one)
        alone = one.num_held_blocks
    for begin in (False, True):
        held = paged("llama")
        if begin:
            held.begin(ids, mask)
        generate("llama", ids, mask, held, num_beams=4)
        # What beams do not share are their new tokens, 11 in blocks of 4, and the block where they part.
        assert held.num_rows == 4
        assert held.num_held_blocks <= alone + 3 * (11 // 4 + 2)
        assert held.manager.stats().peak_used_blocks <= (4 * 25 if not begin else 25) + 4 * (11 // 4 + 2)
        check_all_given_back(held)


# What fails leaves nothing behind


def snapshot(held: PagedCache) -> tuple[object, ...]:
    rows = held._state.rows
    return (
        [
            (replace(row), held.manager.block_table(row.handle).tolist(), held.manager.tokens(row.handle).tolist())
            for row in rows.rows
        ],
        rows.columns,
        held.manager.num_free_blocks,
        held.manager.num_sequences,
        held.get_seq_length(0),
        held.get_seq_length(1),
    )


def test_no_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    held = PagedCache(llama_config(), num_blocks=6, block_size=4)
    with pytest.raises(NoFreeBlocks):
        held.update(*states(2, 13, generator), 0)
    assert snapshot(held) == ([], 0, 6, 0, 0, 0)
    pair = [held, DynamicCache(config=llama_config())]
    feed(pair, 2, 9, generator)
    before = snapshot(held)
    with pytest.raises(NoFreeBlocks):
        held.update(*states(2, 4, generator), 0)
    assert snapshot(held) == before
    feed(pair, 2, 3, generator)
    check_all_given_back(held)


def test_begin_without_room_leaves_an_empty_cache() -> None:
    held = PagedCache(llama_config(), num_blocks=6, block_size=4)
    held.begin(*prompts(9))
    with pytest.raises(NoFreeBlocks):
        held.begin(*prompts(13, 13))
    assert held.num_rows == held.get_seq_length() == 0
    check_all_given_back(held)


@pytest.mark.parametrize("layer", [0, 1])
def test_states_that_do_not_fit(layer: int) -> None:
    generator = torch.Generator().manual_seed(0)
    held = PagedCache(llama_config(), num_blocks=20, block_size=4)
    pair = [held, DynamicCache(config=llama_config())]
    feed(pair, 2, 5, generator)
    before = snapshot(held)
    wrong: list[tuple[Any, type[Exception], str]] = [
        ((torch.zeros(3, 2, 1, 8), torch.zeros(3, 2, 1, 8)), ValueError, "3 rows"),
        ((torch.zeros(2, 2, 1, 8).half(), torch.zeros(2, 2, 1, 8).half()), ValueError, "makes torch.float16 on cpu"),
        ((torch.zeros(2, 3, 1, 8), torch.zeros(2, 3, 1, 8)), UnsupportedModel, "makes 3 heads"),
        ((torch.zeros(2, 2, 1, 9), torch.zeros(2, 2, 1, 8)), UnsupportedModel, r"of K \[9\]"),
        ((torch.zeros(2, 2, 8), torch.zeros(2, 2, 8)), UnsupportedModel, r"makes K \[2, 2, 8\]"),
        ((torch.zeros(2, 2, 1, 8, requires_grad=True), torch.zeros(2, 2, 1, 8)), RuntimeError, "no gradient"),
    ]
    for given_states, kind, message in wrong:
        for earlier in range(layer):
            held.update(*states(2, 1, generator), earlier)
        with pytest.raises(kind, match=message):
            held.update(*given_states, layer)
        assert snapshot(held) == before
    feed(pair, 2, 3, generator)
    check_all_given_back(held)


def test_layers_that_disagree() -> None:
    held = PagedCache(llama_config(), num_blocks=20)
    generator = torch.Generator().manual_seed(0)
    held.update(*states(2, 3, generator), 0)
    with pytest.raises(UnsupportedModel, match="layer 1 adds 2 columns to 2 rows, the layers before it 3 to 2"):
        held.update(*states(2, 2, generator), 1)
    assert held.num_rows == 0
    assert held.manager.num_sequences == 0


def test_a_pass_that_fails_in_the_model() -> None:
    ids, mask = prompts(9, 6)
    expected = generate("llama", ids, mask, dynamic("llama"))
    held, made = paged("llama"), model("llama")
    held.begin(ids, mask)

    def stumble(*_: Any) -> None:
        raise RuntimeError("device lost")

    hook = made.get_submodule("model.layers.2").register_forward_pre_hook(stumble)
    with pytest.raises(RuntimeError, match="device lost"):
        generate("llama", ids, mask, held)
    hook.remove()
    for call in (
        lambda: held.crop(-1),
        lambda: held.tell(ids),
        held.fork,
        lambda: held.reorder_cache(torch.tensor([1])),
    ):
        with pytest.raises(RuntimeError, match=r"inside a pass, 2 of 4 layers have written. If it failed, call abort"):
            call()
    with pytest.raises(RuntimeError, match="layer 0 begins a pass, but the one before has not ended: 2 of 4 layers"):
        generate("llama", ids, mask, held)
    held.abort()
    assert held.get_seq_length() == 0
    assert torch.equal(generate("llama", ids, mask, held), expected)
    check_all_given_back(held)


# Sharing and leaving


def test_collected_or_closed_no_block_is_lost() -> None:
    ids, mask = prompts(9, 6)
    held = paged("llama")
    manager, engine = held.manager, held.engine
    generate("llama", ids, mask, held)
    other = PagedCache(model("llama").config, manager=manager, engine=engine)
    other.begin(ids, mask)
    other.update(torch.zeros(2, 2, 9, 16), torch.zeros(2, 2, 9, 16), 0)
    assert manager.num_free_blocks < manager.num_blocks
    del other  # in the middle of a pass
    gc.collect()
    held.manager.audit()
    held.fork().batch_repeat_interleave(3)
    gc.collect()
    with held:
        pass
    assert manager.num_free_blocks == manager.num_blocks
    assert manager.num_sequences == 0
    generate("llama", ids, mask, held)
    del held
    gc.collect()
    assert manager.num_free_blocks == manager.num_blocks
    manager.audit()


def test_caches_share_one_pool() -> None:
    ids, mask = prompts(20, 13)
    first = paged("llama")
    second = PagedCache(model("llama").config, manager=first.manager, engine=first.engine)
    first.begin(ids, mask)
    expected = generate("llama", ids, mask, dynamic("llama"))
    assert torch.equal(generate("llama", ids, mask, first), expected)
    assert second.begin(ids, mask) > 0
    assert torch.equal(generate("llama", ids, mask, second), expected)
    assert first.get_seq_length() == second.get_seq_length()
    second.close()
    first.begin(ids, mask)
    assert torch.equal(generate("llama", ids, mask, first), expected)
    check_all_given_back(first)


def test_a_pool_that_keeps_less_than_a_layer_reads_is_refused() -> None:
    """Else it would read blocks that have been given back."""
    ids, mask = prompts(30)
    config = model("gemma2").config
    narrow = PagedCache(config, num_blocks=200, block_size=4)
    generate("gemma2", ids, mask, narrow)
    wider = copy.deepcopy(config)
    wider.sliding_window = 2 * config.sliding_window
    with pytest.raises(ValueError, match=r"layer 0 attends to 18 tokens, and its group keeps Window\(size=9\)"):
        PagedCache(wider, manager=narrow.manager, engine=narrow.engine)
    check_all_given_back(narrow)


def test_rows_that_nobody_told_are_not_taken_for_copies() -> None:
    ids, mask = prompts(12, 12)
    ids[1] = ids[1].flip(0)
    held = paged("llama")
    held.begin(ids[:1], mask[:1])
    with pytest.raises(ValueError, match="begin was told 1 prompts, but rows that stand for one prompt differ"):
        generate("llama", ids, mask, held)
    held.abort()
    check_all_given_back(held)


@pytest.mark.parametrize("kind", ["falcon", "mimo_v2_flash"])
def test_memory_is_counted_in_the_heads_that_are_cached(kind: str) -> None:
    config, built = tiny_models.build(kind)
    made: Any = built
    ids = torch.arange(3, 15)[None]
    expected = made.generate(ids, do_sample=False, max_new_tokens=6, past_key_values=DynamicCache(config=config))
    held = PagedCache(config, memory="1MiB", block_size=4)
    got = made.generate(ids, do_sample=False, max_new_tokens=6, past_key_values=held)
    assert torch.equal(got, expected)
    check_all_given_back(held)


def test_a_pass_that_another_cache_overtakes_is_dropped() -> None:
    generator = torch.Generator().manual_seed(0)
    first = PagedCache(llama_config(), num_blocks=20, block_size=4)
    pair = [first, DynamicCache(config=llama_config())]
    feed(pair, 1, 5, generator)
    first.fork().close()
    before = snapshot(first)
    second = first.fork()
    other = [second, copy.deepcopy(pair[1])]
    first.update(*states(1, 2, generator), 0)
    feed(other, 1, 3, generator)
    with pytest.raises(RuntimeError, match="another cache on the same blocks began one meanwhile"):
        first.update(*states(1, 2, generator), 1)
    first.abort()
    second.close()
    assert snapshot(first) == before
    feed(pair, 1, 2, generator)
    check_all_given_back(first)


def test_a_prompt_computed_once_serves_many_copies() -> None:
    ids, mask = prompts(30)
    held = paged("llama")
    held.begin(ids, mask)
    generate("llama", ids, mask, held, max_new_tokens=1, min_new_tokens=1)
    copies = [copy.deepcopy(held) for _ in range(3)]
    used = held.manager.num_blocks - held.manager.num_free_blocks
    assert used == -(-30 // 4)
    for number, made in enumerate(copies):
        more = torch.cat([ids, torch.tensor([[5 + number, 6]])], 1)
        mask_of_more = torch.ones_like(more)
        expected = generate("llama", more, mask_of_more, dynamic("llama"))
        assert torch.equal(generate("llama", more, mask_of_more, made), expected)
    check_all_given_back(held, *copies)


def test_ids_of_what_nobody_told_start_again_without_a_false_hit(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = prompts(9)
    held = paged("llama")
    held.begin(ids, mask)
    expected = generate("llama", ids, mask, dynamic("llama"), num_beams=3)
    assert torch.equal(generate("llama", ids, mask, held, num_beams=3), expected)
    assert held.begin(ids, mask) == 8
    monkeypatch.setattr(_unknown_ids, "_round", _unknown_ids._round)  # put back: it tells later managers to forget
    monkeypatch.setattr(_unknown_ids, "_next", _unknown_ids.END - 1)
    assert torch.equal(generate("llama", ids, mask, held, num_beams=3), expected)
    held.reset()
    assert held.begin(ids, mask) == 0  # all was forgotten
    assert torch.equal(generate("llama", ids, mask, held, num_beams=3), expected)
    check_all_given_back(held)


# Wrong calls


def test_begin_refuses_what_cannot_be() -> None:
    held = paged("llama")
    ids, mask = prompts(9, 6)
    held.begin(ids, mask)
    before = snapshot(held)
    right = torch.ones_like(mask)
    right[0, -1] = 0
    hole = torch.ones_like(mask)
    hole[0, 4] = 0
    wrong: list[tuple[Any, type[Exception], str]] = [
        ((ids[0],), ValueError, r"input_ids has shape \[9\]; give \[rows, columns\]"),
        ((ids[:, :0],), ValueError, r"input_ids has shape \[2, 0\]"),
        ((ids.float(),), TypeError, "input_ids is of float32; give integers"),
        ((ids, mask[:1]), ValueError, r"attention_mask has shape \[1, 9\], input_ids \[2, 9\]"),
        ((ids, right), ValueError, "row 0 of attention_mask has a 0 to the right of a 1"),
        ((ids, hole), ValueError, "row 0 of attention_mask has a 0 to the right of a 1"),
        ((ids, mask * 0), ValueError, "row 0 of attention_mask has a 0"),
        ((ids * 0 - 2, mask), ValueError, "input_ids holds -2; ids are 0 to"),
        ((ids + (1 << 30), mask), ValueError, "ids are 0 to 1073741823"),
    ]
    for arguments, kind, message in wrong:
        with pytest.raises(kind, match=message):
            held.begin(*arguments)
    with pytest.raises(ValueError, match="extra is for 1 rows, input_ids has 2"):
        held.begin(ids, mask, extra=[[]])
    with pytest.raises(TypeError, match=r"extra of row 1 holds \(3, 'cat'\); give \(column, bytes\) pairs"):
        held.begin(ids, mask, extra=[[], [(3, "cat")]])  # type: ignore[list-item]
    for columns in ((2,), (5, 5), (9,)):
        with pytest.raises(ValueError, match=f"extra of row 1 names column {columns[-1]}; the next must be above"):
            held.begin(ids, mask, extra=[[], [(column, b"cat") for column in columns]])
    with pytest.raises(TypeError, match="salt is a str; give bytes"):
        held.begin(ids, mask, salt="adapter")  # type: ignore[arg-type]
    assert snapshot(held) == before
    check_all_given_back(held)


def test_salt_and_extra_keep_prompts_apart() -> None:
    ids, mask = prompts(12)
    held = paged("llama")

    def hit(**keys: Any) -> int:
        there = held.begin(ids, mask, **keys)
        generate("llama", ids, mask, held, max_new_tokens=1, min_new_tokens=1)
        return there

    assert [hit(), hit(), hit(salt=b"a"), hit(salt=b"a"), hit(salt=b"b")] == [0, 11, 0, 11, 0]
    image = [[(6, b"cat")]]
    assert [hit(extra=image), hit(extra=image), hit(extra=[[(6, b"dog")]]), hit()] == [4, 11, 6, 8]


def test_tell_refuses_what_is_not_so() -> None:
    ids, mask = prompts(9, 6)
    held = paged("llama")
    answers = generate("llama", ids, mask, held)
    with pytest.raises(ValueError, match="no prompt was told"):
        held.tell(answers)
    held.begin(ids, mask)
    answers = generate("llama", ids, mask, held)
    other = answers.clone()
    other[1, 5] += 1
    wrong = [
        (answers[:1], "sequences has 1 rows, the cache holds 2"),
        (answers[:, :5], "sequences has 5 columns, the cache holds 20"),
        (other, r"row 1 holds token \d+ at 2, and \d+ was given"),
    ]
    for sequences, message in wrong:
        with pytest.raises(ValueError, match=message):
            held.tell(sequences)
    held.tell(answers)
    held.begin(ids[:1])
    answers = generate("llama", ids[:1], mask[:1], held, num_beams=2, num_return_sequences=2)
    with pytest.raises(ValueError, match="shared between beams after token 9"):
        held.tell(answers)


def test_windows_that_moved_on_are_not_cut() -> None:
    held = PagedCache(sliding_config(), num_blocks=60, block_size=4)
    pair: list[Any] = [held, DynamicCache(config=sliding_config())]
    generator = torch.Generator().manual_seed(0)
    feed(pair, 2, 30, generator)
    before = snapshot(held)
    with pytest.raises(ValueError, match=r"20 columns would be left, but windows have moved on: at least 28 must be"):
        held.crop(-10)
    assert snapshot(held) == before
    held.activate_past_recording()
    pair[1].activate_past_recording()
    feed(pair, 2, 14, generator)
    before = snapshot(held)[1:]
    with pytest.raises(NoFreeBlocks):
        held.update(*states(2, 200, generator), 0)
    assert snapshot(held)[1:] == before
    for each in pair:
        each.crop(-13)
    feed(pair, 2, 3, generator)
    with pytest.raises(ValueError, match="windows have moved on"):
        held.crop(-30)
    check_all_given_back(held)


def test_another_cache_may_run_while_passes_are_recorded() -> None:
    first = PagedCache(sliding_config(), num_blocks=60, block_size=4)
    generator = torch.Generator().manual_seed(0)
    pair: list[Any] = [first, DynamicCache(config=sliding_config())]
    feed(pair, 1, 20, generator)
    second = first.fork()
    other = [second, copy.deepcopy(pair[1])]
    for held in (*pair, *other):
        held.activate_past_recording()
    feed(pair, 1, 12, generator)
    feed(other, 1, 5, generator)
    with pytest.raises(ValueError, match="windows have moved on"):
        first.crop(-10)
    feed(pair, 1, 2, generator)
    check_all_given_back(first, second)


@pytest.mark.parametrize("count", [1, -10])
def test_crop_takes_what_is_there(count: int) -> None:
    held = PagedCache(llama_config(), num_blocks=20)
    feed([held, DynamicCache(config=llama_config())], 1, 9, torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=f"tokens_to_remove={count} must be 0 to -9"):
        held.crop(count)
    assert held.get_seq_length() == 9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "64MiB", "num_blocks": 3}, "both say how large the pool is"),
        ({"memory": "64 tons"}, "is not a size"),
        ({"memory": 0}, "memory=0 must be 1 to"),
        ({"memory": 1.5}, "memory is a float"),
        ({"num_blocks": 0}, r"num_blocks=0 is outside 1\.\."),
        ({"block_size": -1}, r"block_size=-1 is outside 1\.\."),
        ({"dtype": "int3"}, "int3"),
        ({"device": "warp"}, "warp"),
        ({"manager": BlockManager(4, 16)}, "manager and engine belong together"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        PagedCache(llama_config(), **options)


def test_a_pool_must_fit_the_model() -> None:
    engine = CacheEngine(
        CacheConfig(num_layers=3, num_kv_heads=2, head_dim=8, num_gpu_blocks=4, block_size=16),
        torch.float32,
        "cpu",
        layout="NHD",
    )
    with pytest.raises(ValueError, match="engine has 3 layers, and 2 of the model's cache K and V"):
        PagedCache(llama_config(), manager=BlockManager(4, 16), engine=engine)
    engine = CacheEngine(
        CacheConfig(num_layers=2, num_kv_heads=2, head_dim=8, num_gpu_blocks=4, block_size=16),
        torch.float32,
        "cpu",
        layout="NHD",
    )
    with pytest.raises(ValueError, match="5 blocks of 16 tokens and the engine 4"):
        PagedCache(llama_config(), manager=BlockManager(5, 16), engine=engine)
    with pytest.raises(ValueError, match="give no others"):
        PagedCache(llama_config(), manager=BlockManager(4, 16), engine=engine, num_blocks=4)


def test_memory_is_what_it_takes_at_most() -> None:
    held = PagedCache(llama_config(), memory="1MiB", block_size=8)
    block = 8 * 2 * (8 + 8) * 4 * 2
    assert held.engine.memory_bytes == (1 << 20) // block * block
    late = PagedCache(llama_config(), memory="1MiB")
    late.update(*states(1, 3, torch.Generator()), 0)
    assert late.engine.memory_bytes <= 1 << 20
    assert late.engine.dtype == torch.float32
    small = PagedCache(llama_config(), memory=100)
    with pytest.raises(ValueError, match="memory=100 holds no block"):
        small.update(*states(1, 3, torch.Generator()), 0)


def test_models_that_share_no_prompts_say_why() -> None:
    ids, mask = prompts(9)
    for kind in ("git", "cpmant", "moshi", "prophetnet"):
        with pytest.raises(UnsupportedModel, match="it shares no prompts: leave begin out"):
            paged(kind).begin(ids, mask)


def test_rotary_frequencies_that_change_with_length_are_not_mixed() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config = llama_config(rope_parameters=rope, max_position_embeddings=16)
    held = PagedCache(config, num_blocks=40, block_size=4)
    for length, there in ((12, 0), (14, 12), (20, 0), (20, 0)):
        assert held.begin(*prompts(length)) == there
        for layer in range(2):
            held.update(*states(1, length - there, torch.Generator()), layer)
    with pytest.raises(ValueError, match="positions change with length"):
        held.tell(torch.ones(1, 20).long())


def test_it_is_not_pickled() -> None:
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(paged("llama"))
    assert "rows=0, columns=0" in repr(paged("llama"))
