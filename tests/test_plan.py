"""The planner: published figures, and properties that hold for any model, format, memory and split over devices."""

import copy
import math
import pickle
import re
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from kvblocks import (
    BlockManager,
    CacheConfig,
    CacheEngine,
    Chunk,
    Group,
    LayerTensor,
    Plan,
    StepBuffers,
    Window,
    key_value,
    plan,
)
from kvblocks.config import blocks_held
from kvblocks.formats import format_of
from kvblocks.models.grouping import BlockGroup, Layout, PagedLayer, layer_groups, uniform_bytes
from kvblocks.planner import UnknownModel, smallest_changes, uniform
from kvblocks.planner.explain import lines
from kvblocks.planner.text import amount
from kvblocks.sizes import parse_length, parse_share, parse_size

LLAMA_3_8B = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
LLAMA_31_405B = LLAMA_3_8B | {"num_hidden_layers": 126, "hidden_size": 16384, "num_attention_heads": 128}
QWEN_25_72B = {
    "model_type": "qwen2",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "use_sliding_window": False,
    "sliding_window": 131072,
    "max_window_layers": 80,
    "torch_dtype": "bfloat16",
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "torch_dtype": "bfloat16",
}
GEMMA_2_9B = {
    "model_type": "gemma2",
    "num_hidden_layers": 42,
    "hidden_size": 3584,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "sliding_window": 4096,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}
GEMMA_3_27B = {
    "model_type": "gemma3_text",
    "num_hidden_layers": 62,
    "hidden_size": 5376,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}


# --- published figures: the DeepSeek-V3 hardware paper (2025), table 1, with kB = 1,000 bytes


@pytest.mark.parametrize(
    ("config", "expected"),
    [(DEEPSEEK_V3, 70_272), (QWEN_25_72B, 327_680), (LLAMA_31_405B, 516_096), (LLAMA_3_8B, 131_072)],
    ids=["DeepSeek-V3", "Qwen2.5-72B", "Llama-3.1-405B", "Llama-3-8B"],
)
def test_published_bytes_per_token(config: dict[str, Any], expected: int) -> None:
    planned = plan(config)
    assert planned.bytes_per_token == expected
    assert planned.cache_bytes(1000) == planned.cache_bytes(1) * 1000 == expected * 1000


def test_expanded_latents_are_heads_of_k_and_v() -> None:
    expanded = plan(DEEPSEEK_V3, mla="expanded")
    assert expanded.bytes_per_token == 61 * 128 * (128 + 64 + 128) * 2
    latent = (LayerTensor("latent", (1, 512)), LayerTensor("rope key", (1, 64)))
    assert plan(DEEPSEEK_V3, memory="1GiB").cache_config().layers == (latent,) * 61
    config = plan(DEEPSEEK_V3, memory="1GiB", mla="expanded").cache_config()
    assert (config.num_kv_heads, config.head_dim, config.v_head_dim) == (128, 192, 128)


def test_waste_of_uniform_layouts_as_published() -> None:
    """Gemma 2 wastes 25 % and Ministral 8B 56.25 % where every layer keeps every token (Jenga, 2025)."""
    gemma = plan(GEMMA_2_9B)
    assert gemma.uniform_waste() == 0.25
    assert gemma.waste() < 0.002
    ministral = uniform(36, 8, 128, reaches=[None, *[Window(32768)] * 3] * 9, dtype="bfloat16")
    assert plan(ministral).uniform_waste(131072) == 0.5625
    assert plan(ministral).waste(131072) < 0.001


def test_groups_of_gemma_3_are_as_the_design_has_them() -> None:
    planned = plan(GEMMA_3_27B, memory="8GiB")
    reaches = [group.reach for group in planned.groups]
    assert reaches == [None, *[Window(1024)] * 6]
    assert sorted(layer for group in planned.groups for layer in group.layers) == list(range(62))
    assert planned.block_bytes == 10 * 16 * (128 + 128) * 2 * 16
    assert planned.waste(32768) < 0.03
    assert planned.explain().count("\n") > 10


# --- examples


def test_every_line_of_a_plan() -> None:
    planned = plan(LLAMA_3_8B, memory="24GiB", weights="16.06GB", seq_len=8192, concurrency=8)
    text = planned.explain()
    assert "32 layers × 8 heads × (128 + 128) × 2 B = 131,072 B" in text
    assert "32 layers × 8 heads × (128 + 128) × 2 B × 16 tokens = 2.00 MiB per block" in text
    assert planned.fits
    assert planned.missing_bytes == 0
    assert smallest_changes(planned) == ()
    assert planned.num_blocks == (24 * 2**30 - 16_060_000_000) // 2**21
    assert planned.sequence_bytes(8192) == planned.cache_bytes(8192) == 2**30
    assert planned.max_concurrency(8192) == 9
    assert planned.memory_for(9, 8192) <= 24 * 2**30 < planned.memory_for(10, 8192)


def test_what_does_not_fit_says_what_is_missing_and_what_would_help() -> None:
    planned = plan(LLAMA_3_8B, memory="10GiB", seq_len=8192, concurrency=16)
    assert not planned.fits
    assert planned.missing_bytes == 6 * 2**30
    text = planned.explain()
    assert "6,442,450,944 B (6.00 GiB) are missing" in text
    changes = smallest_changes(planned)
    assert [change.setting for change in changes] == ["memory", "concurrency", "seq_len"]
    assert [change.value for change in changes] == [16 * 2**30, 10, 5120]
    assert all(f"  {i}. {change.what}" in text for i, change in enumerate(changes, 1))
    assert planned.to_dict()["changes"][0]["value"] == 16 * 2**30


def test_a_plan_without_room_for_a_block_is_still_a_plan() -> None:
    planned = plan(LLAMA_3_8B, memory=2**20)
    assert (planned.num_blocks, planned.fits, planned.max_tokens) == (0, False, 0)
    assert planned.missing_bytes == 2**20
    with pytest.raises(ValueError, match="not one block fits: 1048576 bytes are missing"):
        planned.cache_config()
    heavy = plan(LLAMA_3_8B, memory="8GiB", weights="16GB")
    assert (heavy.num_blocks, heavy.fits) == (0, False)
    assert heavy.missing_bytes == 16_000_000_000 + 2**21 - 8 * 2**30


def test_backwards() -> None:
    planned = plan(LLAMA_3_8B, memory="10GiB")
    assert planned.max_seq_len(10) == 8192
    assert planned.dtype_for(10, 8192) == "bfloat16"
    assert planned.dtype_for(20, 8192) == "float8_e4m3fn"
    assert planned.dtype_for(32, 8192) == "int4"
    assert planned.dtype_for(100, 8192) is None
    assert plan(LLAMA_3_8B, concurrency=10, seq_len=8192).num_blocks == 10 * 512
    assert plan(LLAMA_3_8B).num_blocks is None
    with pytest.raises(ValueError, match=r"give plan\(\.\.\., memory="):
        plan(LLAMA_3_8B).max_seq_len()
    assert plan(LLAMA_3_8B).max_tokens is None
    with pytest.raises(ValueError, match="how many blocks"):
        plan(LLAMA_3_8B).cache_config()


def test_scales_and_zero_points_are_counted() -> None:
    packed = plan(LLAMA_3_8B, dtype="int4", group_size=32, zero_point=True)
    vector = 128 // 2 + 4 * (2 + 2)
    assert packed.bytes_per_token == 32 * 8 * 2 * vector
    assert "int4 with a float16 scale and zero point for each 32" in packed.explain()
    assert plan(LLAMA_3_8B, dtype="int8", group_size=48, scale_dtype="float32").bytes_per_token == 32 * 8 * 2 * (
        128 + 12
    )
    assert plan(LLAMA_3_8B, dtype="fp8").bytes_per_token == 65_536
    assert plan(LLAMA_3_8B, dtype=torch.float8_e5m2).bytes_per_token == 65_536
    config = plan(LLAMA_3_8B, dtype="int4", group_size=32, memory="1GiB").cache_config()
    assert (config.head_dim, config.num_gpu_blocks) == (72, 2**30 // (32 * 8 * 2 * 72 * 16))


def test_state_is_set_aside_when_asked() -> None:
    config = {
        "model_type": "mamba2",
        "num_hidden_layers": 4,
        "num_heads": 8,
        "head_dim": 16,
        "n_groups": 2,
        "state_size": 32,
        "conv_kernel": 4,
        "dtype": "bfloat16",
    }
    planned = plan(config, memory="1MiB")
    state = 4 * ((8 * 16 + 2 * 2 * 32) * 3 * 2 + 8 * 16 * 32 * 4)
    assert (planned.state_bytes, planned.bytes_per_token, planned.block_bytes, planned.num_blocks) == (state, 0, 0, 0)
    assert planned.max_concurrency(1) == planned.max_concurrency(2**31 - 1) == 2**20 // state
    assert planned.max_seq_len(2**20 // state) == 2**31 - 1
    assert planned.max_seq_len(2**20 // state + 1) == 0
    assert planned.waste() == planned.uniform_waste() == 0
    with pytest.raises(ValueError, match="nothing to page"):
        planned.cache_config()
    assert "no bound" in planned.explain()


def test_the_latent_cache_is_a_change_that_helps() -> None:
    planned = plan(DEEPSEEK_V3, memory="4GiB", mla="expanded", seq_len=8192)
    changes = {change.setting: change for change in smallest_changes(planned, 10)}
    assert changes["mla"].value == "latent"
    assert plan(DEEPSEEK_V3, memory="4GiB", mla="latent", seq_len=8192).fits
    assert "mla" not in {change.setting for change in smallest_changes(plan(DEEPSEEK_V3, memory="1MiB"), 10)}


def test_a_title_says_how_it_is_split() -> None:
    assert (
        plan(LLAMA_3_8B, tp=2, pp=4)
        .explain()
        .startswith("llama: 32 layers, K and V in bfloat16, blocks of 16, tp=2, pp=4\n")
    )
    assert "pp" not in plan(LLAMA_3_8B).explain().splitlines()[0]
    assert "figures are of pipeline stage 0, layers 0 to 7" in plan(LLAMA_3_8B, pp=4).explain()


def test_layers_that_share_read_what_another_keeps() -> None:
    config = {
        "model_type": "gemma3n_text",
        "num_hidden_layers": 10,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": 32,
        "num_kv_shared_layers": 5,
        "dtype": "bfloat16",
    }
    planned = plan(config, memory="1MiB")
    assert planned.cache_layers == (0, 1, 2, 3, 4, 3, 3, 3, 3, 4)
    assert planned.cache_config().num_layers == 5
    assert "5 layers read what another layer keeps" in planned.explain()
    with pytest.raises(ValueError, match="layer 5 of gemma3n_text reads the cache of layer 3"):
        plan(config, pp=2)
    assert len(plan(config, pp=[1, 9]).stages) == 2


def test_layers_of_several_shapes_hand_over_their_shapes() -> None:
    config = {
        "model_type": "mimo_v2_flash",
        "transformers_version": "5.0.0",
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "v_head_dim": 8,
        "sliding_window": 32,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "dtype": "bfloat16",
    }
    planned = plan(config, memory="1MiB")
    handed = planned.cache_config()
    assert handed.layers == tuple(key_value(heads, 16, 8) for heads in (2, 4, 4, 2))
    assert handed.memory_bytes("bfloat16") == (planned.num_blocks or 0) * planned.block_bytes
    assert planned.groups == (Group(None, (0, 3)), Group(Window(32), (1,)), Group(Window(32), (2,)))


# --- properties

REACHES = st.one_of(
    st.none(), st.none(), st.sampled_from([Window(1), Window(9), Window(64)]), st.sampled_from([Chunk(8), Chunk(24)])
)
FORMATS = st.sampled_from(
    [
        {"dtype": "bfloat16"},
        {"dtype": "float32"},
        {"dtype": "fp8"},
        {"dtype": "int4"},
        {"dtype": "int4", "group_size": 5, "zero_point": True},
        {"dtype": "int8", "group_size": 16},
    ]
)


@st.composite
def models(draw: st.DrawFn) -> Any:
    reaches = [
        reach for reach in draw(st.lists(REACHES, min_size=1, max_size=3)) for _ in range(draw(st.integers(1, 6)))
    ]
    heads, dim = draw(st.integers(1, 12)), draw(st.integers(1, 40))
    return uniform(len(reaches), heads, dim, draw(st.integers(1, 40)), reaches=reaches, dtype="bfloat16")


SETTINGS = st.fixed_dictionaries(
    {
        "memory": st.integers(0, 10**7),
        "block_size": st.sampled_from([1, 3, 16]),
        "tp": st.integers(1, 12),
        "weights": st.integers(0, 10**6),
        "activations": st.integers(0, 10**5),
        "step_tokens": st.integers(1, 40),
        "max_groups": st.integers(1, 12),
    }
)


@given(models(), FORMATS, SETTINGS)
def test_the_plan_fits_and_one_block_more_does_not(
    model: Any, format: dict[str, Any], settings: dict[str, Any]
) -> None:
    planned = plan(model, **format, **settings)
    room = settings["memory"] - planned.weights_bytes - settings["activations"]
    blocks = planned.num_blocks
    assert blocks is not None
    assert blocks == 0 or blocks * planned.block_bytes <= room
    assert (blocks + 1) * planned.block_bytes > room
    if blocks:
        config = planned.cache_config()
        assert config.memory_bytes(planned.storage_dtype) == blocks * planned.block_bytes
        assert config.num_gpu_blocks == blocks
        assert [group.reach for group in config.groups] == [group.reach for group in planned.groups]


@given(models(), FORMATS, SETTINGS, st.integers(1, 30), st.integers(1, 500))
@example(uniform(1, 1, 1, dtype="bfloat16"), {"dtype": "int8"}, {"memory": 2**40, "block_size": 1}, 1, 1)
def test_forward_and_backward_agree(
    model: Any, format: dict[str, Any], settings: dict[str, Any], count: int, length: int
) -> None:
    settings = {**settings, "concurrency": count, "seq_len": length}
    planned = plan(model, **format, **settings)
    needed = planned.memory_for(count, length)
    assert planned.fits == (needed <= settings["memory"])
    assert (needed <= settings["memory"]) == (planned.max_concurrency(length) >= count)
    assert (needed <= settings["memory"]) == (planned.max_seq_len(count) >= length)
    exactly = plan(model, **format, **{**settings, "memory": needed})
    assert exactly.max_concurrency(length) >= count
    assert exactly.max_seq_len(count) >= length
    less = plan(model, **format, **{**settings, "memory": needed - 1})
    assert less.max_concurrency(length) < count
    assert less.max_seq_len(count) < length
    assert less.missing_bytes == 1
    assert planned.max_tokens == planned.max_seq_len(1)


@given(models(), FORMATS, SETTINGS, st.integers(1, 10**6), st.integers(1, 400))
def test_more_memory_never_gives_less(
    model: Any, format: dict[str, Any], settings: dict[str, Any], more: int, length: int
) -> None:
    before = plan(model, **format, **settings)
    after = plan(model, **format, **{**settings, "memory": settings["memory"] + more})
    assert (before.num_blocks or 0) <= (after.num_blocks or 0)
    assert (before.max_tokens or 0) <= (after.max_tokens or 0)
    assert before.max_concurrency(length) <= after.max_concurrency(length)


def kept_by_devices(queries: int, heads: int, tp: int) -> list[set[int]]:
    """The K and V heads that each device's queries share: queries lie on devices in order, equally many on each."""
    here = queries // tp
    return [{query * heads // queries for query in range(i * here, (i + 1) * here)} for i in range(tp)]


@given(st.data(), st.integers(1, 24), st.integers(1, 12), st.integers(1, 40), st.integers(0, 300))
def test_shares_of_tensor_parallelism_are_the_heads_that_queries_share(
    data: st.DataObject, heads: int, sharing: int, dim: int, length: int
) -> None:
    queries = heads * sharing
    tp = data.draw(st.sampled_from([n for n in range(1, queries + 1) if queries % n == 0]))
    model = uniform(3, heads, dim, num_attention_heads=queries, dtype="bfloat16")
    head, share = plan(uniform(3, 1, dim, dtype="bfloat16")), plan(model, tp=tp)
    kept = kept_by_devices(queries, heads, tp)
    fullest = max(map(len, kept))
    assert set().union(*kept) == set(range(heads))
    assert share.bytes_per_token == fullest * head.bytes_per_token
    assert share.cache_bytes(length) == fullest * head.cache_bytes(length)
    assert evaluated(lines(share)[0].arithmetic) == share.bytes_per_token
    assert plan(model, tp=tp, memory=2**30).cache_config().num_kv_heads == fullest
    copies = sum(map(len, kept))
    text = share.explain()
    assert (f"({heads} head" in text) == (copies > heads)
    if copies == heads:
        assert fullest * tp == heads
    elif heads * (tp // heads) == tp:
        assert f"1 on each device) cannot be split that far; a head is kept {tp // heads} times" in text.replace(
            "\n", " "
        )
    else:
        assert f"{fullest} on the fullest device) do not split evenly; a head is kept wherever" in text
        assert f"wherever its queries are, {copies} in all" in text


def test_heads_that_do_not_split_evenly_lie_where_their_queries_are() -> None:
    phi_4 = {"model_type": "phi3", "num_hidden_layers": 40, "hidden_size": 5120, "num_attention_heads": 40}
    phi_4 |= {"num_key_value_heads": 10, "sliding_window": None, "torch_dtype": "bfloat16"}
    head = 40 * (128 + 128) * 2
    shares = {tp: plan(phi_4, tp=tp).bytes_per_token // head for tp in (1, 2, 4, 5, 8, 10, 20, 40)}
    assert shares == {1: 10, 2: 5, 4: 3, 5: 2, 8: 2, 10: 1, 20: 1, 40: 1}
    assert (
        "note: tp=4: K (10 heads, 3 on the fullest device), V (10 heads, 3 on the fullest device) do not split evenly; "
        "a head is kept wherever its queries are, 12 in all"
    ) in plan(phi_4, tp=4).explain()
    changes = smallest_changes(plan(phi_4, memory="1GiB", seq_len=6000), 10)
    tp = next(change.value for change in changes if change.setting == "tp")
    assert plan(phi_4, memory="1GiB", seq_len=6000, tp=tp).fits


def test_queries_of_every_layer_must_split() -> None:
    config: dict[str, Any] = {"model_type": "inkling_text", "num_hidden_layers": 2, "hidden_size": 64, "head_dim": 16}
    config |= {"layer_types": ["hybrid_sliding", "hybrid"], "transformers_version": "5.0.0", "conv_kernel_size": 4}
    config |= {"swa_num_attention_heads": 6, "swa_num_key_value_heads": 3, "swa_head_dim": 8, "sliding_window_size": 9}
    config |= {"num_attention_heads": 8, "num_key_value_heads": 4, "torch_dtype": "bfloat16"}
    assert plan(config, tp=2).bytes_per_token == 2 * (8 + 8) * 2 + 2 * (16 + 16) * 2
    for tp, number in ((4, 6), (3, 8)):
        with pytest.raises(ValueError, match=f"num_attention_heads={number} does not divide by tp={tp}"):
            plan(config, tp=tp)
        with pytest.raises(ValueError, match=f"num_attention_heads={number} does not divide by tp={tp}"):
            plan(config).replaced(tp=tp)


def test_transformers_keeps_the_latent() -> None:
    with pytest.raises(
        ValueError, match="cache of deepseek_v3 keeps the latent and the rotated key; give mla='latent'"
    ):
        plan(DEEPSEEK_V3, mla="expanded", stored="transformers")
    assert plan(DEEPSEEK_V3, stored="transformers").cache_bytes(7) == 7 * 70_272
    llama = plan(LLAMA_3_8B, mla="expanded", stored="transformers")
    assert llama.cache_bytes(7) == 7 * 131_072


@given(st.integers(1, 9), st.integers(1, 24), st.integers(1, 40), st.integers(1, 24), st.integers(0, 300))
def test_shares_of_tensor_parallelism_without_known_queries_add_up(
    layers: int, heads: int, dim: int, tp: int, length: int
) -> None:
    model = uniform(layers, heads, dim, dtype="bfloat16")
    whole, share = plan(model), plan(model, tp=tp)
    copies = tp // math.gcd(heads, tp)
    assert share.bytes_per_token * tp == whole.bytes_per_token * copies
    assert share.cache_bytes(length) * tp == whole.cache_bytes(length) * copies
    assert ("a head is kept" in share.explain()) == (copies > 1)


@given(models(), st.integers(1, 6), st.integers(0, 300))
def test_pipeline_stages_add_up(model: Any, pp: int, length: int) -> None:
    assume(pp <= len(model.layers))
    whole, split = plan(model), plan(model, pp=pp)
    assert sum(stage.cache_bytes(length) for stage in split.stages) == whole.cache_bytes(length)
    assert sum(len(stage.layers) for stage in split.stages) == len(model.layers)
    assert sum(stage.token_bytes for stage in split.stages) == whole.bytes_per_token


@given(models(), FORMATS, st.sampled_from([1, 3, 16]), st.integers(0, 400), st.integers(0, 60))
def test_bytes_of_a_sequence(model: Any, format: dict[str, Any], size: int, length: int, more: int) -> None:
    planned = plan(model, **format, block_size=size)
    assert planned.cache_bytes(length) <= planned.cache_bytes(length + more)
    assert planned.cache_bytes(length) <= planned.sequence_bytes(length) <= planned.sequence_bytes(length + more)
    assert planned.sequence_bytes(length) == planned.blocks_for(length) * planned.block_bytes
    assert 0 <= planned.waste(length + 1) < 1
    stored = plan(model, **format, stored="transformers")
    if all(layer.kept[0].reach != Window(1) for layer in model.layers):
        assert stored.cache_bytes(length) <= planned.cache_bytes(length)


def brute_blocks(reach: Any, num_tokens: int, block_size: int, step: int) -> int:
    """The most blocks at any time: what a step of up to `step` tokens reaches and writes."""
    most = 0
    for start in range(num_tokens):
        end = min(start + step, num_tokens)
        if isinstance(reach, Window):
            first = max(0, start - reach.size + 1)
        elif isinstance(reach, Chunk):
            first = start // reach.size * reach.size
        else:
            first = 0
        most = max(most, (end - 1) // block_size - first // block_size + 1)
    return most


@given(
    st.one_of(st.none(), st.builds(Window, st.integers(1, 40)), st.builds(Chunk, st.integers(1, 40))),
    st.integers(0, 150),
    st.integers(1, 20),
    st.integers(1, 30),
)
def test_blocks_held_is_the_most_there_can_be(reach: Any, num_tokens: int, block_size: int, step: int) -> None:
    held = blocks_held(reach, num_tokens, block_size, step)
    brute = brute_blocks(reach, num_tokens, block_size, step)
    assert held >= brute
    if not isinstance(reach, Chunk) or (reach.size % block_size == 0 and step == 1):
        assert held == brute


@given(
    st.lists(
        st.one_of(st.none(), st.builds(Window, st.integers(1, 40)), st.builds(Chunk, st.integers(1, 40))),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 150),
    st.integers(1, 20),
    st.integers(1, 30),
)
def test_a_manager_never_needs_more_blocks_than_are_planned(
    reaches: list[Any], num_tokens: int, block_size: int, step: int
) -> None:
    """The planner adds up what each group holds at most, wherever steps begin; the manager knows where they do."""
    planned = sum(blocks_held(reach, num_tokens, block_size, step) for reach in reaches)
    needed = BlockManager(1, block_size, groups=reaches).blocks_needed(num_tokens, reserve=step)
    assert planned >= needed
    if step == 1 and not any(isinstance(reach, Chunk) for reach in reaches):
        assert planned - needed <= sum(reach is not None for reach in reaches)


def compositions(items: list[PagedLayer]) -> Any:
    """Every way to cut a list into runs."""
    for cuts in range(2 ** (len(items) - 1)):
        borders = [0, *[i + 1 for i in range(len(items) - 1) if cuts >> i & 1], len(items)]
        yield [items[start:end] for start, end in pairwise(borders)]


@given(
    st.lists(st.tuples(REACHES, st.integers(1, 4)), min_size=1, max_size=7),
    st.integers(1, 7),
    st.none() | st.integers(1, 300) | st.integers(32768, 10**6),
)
def test_no_groups_take_less(spec: list[tuple[Any, int]], max_groups: int, longest: int | None) -> None:
    layers = [PagedLayer(i, reach, 10 * size) for i, (reach, size) in enumerate(spec)]
    block_size, length = 16, min(longest or 32768, 32768)
    found = Layout(layer_groups(layers, longest, max_groups), block_size)
    assert sorted(layer.index for group in found.groups for layer in group.layers) == list(range(len(layers)))
    assert all(layer.reach == group.reach for group in found.groups for layer in group.layers)
    reaches = list(dict.fromkeys(layer.reach for layer in layers))
    assert len(found.groups) <= max(max_groups, len(reaches))
    ways: list[list[BlockGroup]] = [[]]
    for reach in reaches:
        same = [layer for layer in layers if layer.reach == reach]
        ways = [way + [BlockGroup(reach, tuple(run)) for run in runs] for way in ways for runs in compositions(same)]
    allowed = [way for way in ways if len(way) <= max(max_groups, len(reaches))]
    best = min(Layout(tuple(way), block_size).held_bytes(length) for way in allowed)
    assert found.held_bytes(length) == best
    if len({layer.block_bytes for layer in layers}) == 1 and len(reaches) == 1:
        assert found.held_bytes(length) <= uniform_bytes(layers, block_size, length)


@given(models(), FORMATS, SETTINGS, st.integers(1, 40), st.integers(1, 3000))
def test_changes_make_it_fit(
    model: Any, format: dict[str, Any], settings: dict[str, Any], count: int, length: int
) -> None:
    planned = plan(model, **format, **settings, concurrency=count, seq_len=length)
    changes = smallest_changes(planned, 10)
    assert bool(changes) == (not planned.fits)
    assert [change.factor for change in changes] == sorted(change.factor for change in changes)
    given_ = {**format, **settings, "concurrency": count, "seq_len": length}
    for change in changes:
        changed = {**given_, change.setting: change.value}
        if change.setting == "dtype":
            changed = {**changed, "group_size": 32 if change.value == "int4" else None, "zero_point": False}
        assert plan(model, **changed).fits, change
        if change.setting == "memory":
            assert not plan(model, **{**changed, "memory": change.value - 1}).fits
        if change.setting == "concurrency" or (change.setting == "seq_len" and len(planned.groups) == 1):
            assert not plan(model, **{**changed, change.setting: change.value + 1}).fits


def evaluated(arithmetic: str) -> float:
    """The value of `32 layers × 8 heads × (128 + 128) × 2 B`."""
    words = re.sub(r"[A-Za-z][\w-]*|,", "", arithmetic).replace("×", "*")
    return float(eval(re.sub(r"\(\s*\)", "", words), {"__builtins__": {}}))


@given(models(), FORMATS, st.sampled_from([1, 3, 16]), st.integers(1, 12))
def test_the_arithmetic_is_right(model: Any, format: dict[str, Any], size: int, tp: int) -> None:
    planned = plan(model, **format, block_size=size, tp=tp)
    found = {line.name: line for line in lines(planned)}
    assert evaluated(found["per token"].arithmetic) == planned.bytes_per_token
    groups = [line for line in lines(planned) if line.arithmetic.endswith("tokens")]
    assert max(evaluated(line.arithmetic) for line in groups) == planned.block_bytes
    assert len(groups) == len(planned.groups)
    assert planned.explain().startswith("model: ")


# --- arguments

WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dtype": ({"dtype": "int3"}, TypeError, "dtype='int3' cannot hold a cache"),
    "dtype of another kind": ({"dtype": torch.int64}, TypeError, "cannot hold a cache"),
    "memory text": ({"memory": "lots"}, ValueError, "memory='lots' is not a size"),
    "memory of many digits": ({"memory": "9" * 5000}, ValueError, r"^memory='9{0,60} is more than 2\*\*63 - 1 bytes$"),
    "memory of many letters": ({"memory": "x" * 5000}, ValueError, r"^memory='x{0,60} is not a size; give one"),
    "memory of another CPU": ({"memory": "cpu:1"}, ValueError, "memory='cpu:1': there is one CPU; give 'cpu'"),
    "memory negative": ({"memory": -1}, ValueError, r"memory=-1 is outside 0\.\."),
    "memory bool": ({"memory": True}, TypeError, "memory=True is a bool"),
    "memory huge": ({"memory": 2**63}, ValueError, "is outside"),
    "memory of no device": ({"memory": "cuda"}, ValueError, "finds no CUDA device|CUDA"),
    "block_size": ({"block_size": 0}, ValueError, r"block_size=0 is outside 1\.\."),
    "tp": ({"tp": 0}, ValueError, r"tp=0 is outside 1\.\."),
    "tp that queries do not allow": (
        {"tp": 3},
        ValueError,
        "num_attention_heads=8 does not divide by tp=3; use 1, 2, 4 or 8",
    ),
    "tp beyond the queries": ({"tp": 9}, ValueError, "num_attention_heads=8 does not divide by tp=9; use 1, 2, 4 or 8"),
    "pp": ({"pp": 5}, ValueError, r"pp=5 is outside 1\.\.4, the layers of"),
    "pp text": ({"pp": "2"}, TypeError, "pp='2' is of type str"),
    "pp bool": ({"pp": True}, TypeError, "pp=True is of type bool"),
    "pp layers": ({"pp": [1, 2]}, ValueError, r"pp=\[1, 2\] adds up to 3 layers; model has 4"),
    "pp empty": ({"pp": []}, ValueError, "adds up to 0 layers"),
    "pp of none": ({"pp": [4, 0]}, ValueError, "each stage has at least one layer"),
    "mla": ({"mla": "no"}, ValueError, "mla='no' is not one of latent, expanded"),
    "stored": ({"stored": "x"}, ValueError, "stored='x' is not one of exact, transformers"),
    "seq_len": ({"seq_len": 0}, ValueError, r"seq_len=0 is outside 1\.\."),
    "concurrency": ({"concurrency": 1.5}, TypeError, "concurrency=1.5 is of type float"),
    "utilization": ({"utilization": 0}, ValueError, "utilization=0 is outside"),
    "utilization of more": ({"utilization": 1.01}, ValueError, "utilization=1.01 is outside"),
    "utilization text": ({"utilization": "1"}, TypeError, "utilization='1' is of type str"),
    "utilization nan": ({"utilization": math.nan}, ValueError, "utilization=nan is outside"),
    "group_size": ({"group_size": 32}, ValueError, "bfloat16 has no scales"),
    "group_size zero": ({"dtype": "int4", "group_size": 0}, ValueError, "group_size=0 is below 1"),
    "group_size bool": ({"dtype": "int4", "group_size": True}, TypeError, "group_size=True is a bool"),
    "scale_dtype": (
        {"dtype": "int4", "group_size": 8, "scale_dtype": "int8"},
        ValueError,
        "scale_dtype=int8 is not one",
    ),
    "zero_point": ({"dtype": "int4", "zero_point": True}, ValueError, "zero_point=True without group_size"),
    "zero_point number": ({"dtype": "int4", "zero_point": 1}, TypeError, "zero_point=1 is no bool"),
    "weights": ({"weights": "auto"}, ValueError, "weights='auto' needs a config"),
    "weights_dtype": ({"weights": 5, "weights_dtype": "fp8"}, ValueError, "weights_dtype='fp8' is for weights='auto'"),
    "encoder_tokens": ({"encoder_tokens": -1}, ValueError, r"encoder_tokens=-1 is outside 0\.\."),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case: str) -> None:
    changes, error, message = WRONG[case]
    model = uniform(4, 8, 16, num_attention_heads=8)
    if case == "memory of no device" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(error, match=message):
        plan(model, **{"dtype": "bfloat16", **changes})


@pytest.mark.parametrize("value", [-1, True, 1.0, "5", 2**31])
def test_lengths_are_checked(value: Any) -> None:
    planned = plan(LLAMA_3_8B, memory="1GiB")
    for call in (
        planned.cache_bytes,
        planned.sequence_bytes,
        planned.max_concurrency,
        planned.max_seq_len,
        planned.waste,
    ):
        with pytest.raises((TypeError, ValueError), match=r"give an integer|is outside"):
            call(value)


@pytest.mark.parametrize("reaches", [[None], [None, 5], ["full", None], 5, "ab", {0: None, 1: None}])
def test_reaches_are_checked(reaches: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"reaches(=.* is of type| names 1| holds)"):
        uniform(2, 1, 1, reaches=reaches)


def test_plans_are_frozen_and_compare() -> None:
    planned = plan(LLAMA_3_8B, memory="1GiB")
    assert planned == plan(LLAMA_3_8B, memory=2**30)
    assert planned != plan(LLAMA_3_8B, memory=2**30 + 1)
    assert {planned, pickle.loads(pickle.dumps(planned)), copy.deepcopy(planned)} == {planned}
    assert repr(planned) == "<Plan of llama in bfloat16: bytes_per_token=131072, block_bytes=2097152, num_blocks=512>"
    with pytest.raises(AttributeError):
        planned.settings = planned.settings  # type: ignore[misc]
    assert isinstance(planned, Plan)
    assert issubclass(UnknownModel, ValueError)


def test_compressed_entries_need_whole_blocks() -> None:
    config = {
        "model_type": "deepseek_v4",
        "transformers_version": "5.0.0",
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "head_dim": 16,
        "index_head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["heavily_compressed_attention"],
        "compress_rates": {"heavily_compressed_attention": 128},
        "dtype": "bfloat16",
    }
    with pytest.raises(ValueError, match="block_size=16 is no multiple of 128"):
        plan(config, block_size=16)
    assert plan(config).block_size == 128
    planned = plan(config, block_size=128, memory="1MiB")
    assert planned.bytes_per_token == 16 * 2 + 1  # an entry of 32 B for 128 tokens, rounded up
    assert planned.block_bytes == 128 * 16 * 2
    with pytest.raises(ValueError, match="layer 0 of deepseek_v4 has one entry of its compressed K = V for 128 tokens"):
        planned.cache_config()


def test_the_free_memory_of_a_device_is_a_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvblocks.memory.available_memory", lambda: 10 * 2**20)
    for device in ("cpu", "cpu:0", torch.device("cpu"), torch.device("cpu:0")):
        assert plan(LLAMA_3_8B, memory=device).num_blocks == 5
        assert plan(LLAMA_3_8B, memory=device, utilization=0.9).memory == 9 * 2**20
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (device.index * 2**30, 2**40))
    assert plan(LLAMA_3_8B, memory="cuda:3").memory == 3 * 2**30


def test_sizes_as_people_write_them() -> None:
    assert parse_size("80GiB") == 80 * 2**30
    assert parse_size(" 1.5 GB ") == 1_500_000_000
    assert parse_size("0.3kb") == 300
    assert amount(1023) == "1,023 B"
    assert amount(2**21) == "2.00 MiB"
    assert amount(3 * 2**70) == "3,072.00 EiB"
    assert format_of("int4", 32).vector_bytes(7) == 4 + 2
    with pytest.raises(ValueError, match="more than"):
        parse_size("99999999999GiB")


def test_sizes_lengths_and_shares_as_people_write_them() -> None:
    assert parse_size("80G") == parse_size("80g") == 80 * 2**30
    assert parse_size("80GB") == 80 * 10**9
    assert [parse_length(text) for text in ("8192", "32k", "1M", "0.5k")] == [8192, 32768, 2**20, 512]
    assert parse_share("92.5%") == Fraction(37, 40)
    for text in ("0.3", "32kB", "-1", ""):
        with pytest.raises(ValueError, match="is not a number of tokens"):
            parse_length(text)
    with pytest.raises(ValueError, match="'90' is not a share"):
        parse_share("90")
    planned = plan(LLAMA_3_8B, memory="80G", utilization="90%", seq_len="8k")
    assert (planned.memory, planned.settings.seq_len) == (72 * 2**30, 8192)
    assert plan(LLAMA_3_8B, memory=80).memory == 80
    with pytest.raises(ValueError, match="memory='80' has no unit; give 80GiB"):
        plan(LLAMA_3_8B, memory="80")


@pytest.mark.parametrize(
    ("dtype", "of_32"),
    [
        ("q8_0", 34),
        ("q5_1", 24),
        ("q5_0", 22),
        ("q4_1", 20),
        ("q4_0", 18),
        ("iq4_nl", 18),
        ("fp8_e4m3", 32),
        ("f16", 64),
    ],
)
def test_formats_by_the_names_that_engines_have_for_them(dtype: str, of_32: int) -> None:
    """llama.cpp's block_q8_0 is 32 int8 and a float16 scale; block_q5_1 is 20 bytes and two float16."""
    planned = plan(LLAMA_3_8B, dtype=dtype, memory="1GiB")
    assert planned.bytes_per_token == 32 * 8 * 2 * (128 // 32) * of_32
    assert planned.cache_config().memory_bytes(planned.storage_dtype) == (planned.num_blocks or 0) * planned.block_bytes


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [
        ({"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, "float8_e4m3fn"),
        ({"kv_cache_scheme": {"num_bits": 8, "type": "int"}}, "int8"),
        ({"kv_cache_quant_algo": "FP8"}, "float8_e4m3fn"),
        ({"kv_cache_scheme": None}, "bfloat16"),
    ],
)
def test_the_dtype_that_a_checkpoint_asks_for_is_said(scheme: dict[str, Any], dtype: str) -> None:
    config = LLAMA_3_8B | {"quantization_config": scheme}
    assert plan(config).dtype == "bfloat16"
    assert (f"asks for K and V in {dtype}" in plan(config).explain()) == (dtype != "bfloat16")
    assert plan(config, dtype="auto").dtype == dtype
    assert "asks for K and V" not in plan(config, dtype="auto").explain()


@pytest.mark.parametrize(
    ("config", "arguments"),
    [
        (LLAMA_3_8B, {}),
        (DEEPSEEK_V3, {}),
        (DEEPSEEK_V3, {"mla": "expanded"}),
        (DEEPSEEK_V3 | {"model_type": "deepseek_v32", "index_head_dim": 128}, {}),
        (LLAMA_3_8B, {"dtype": "int4", "group_size": 32}),
        (GEMMA_2_9B, {}),
        (GEMMA_3_27B, {"tp": 2}),
    ],
)
def test_an_engine_allocates_what_the_plan_says(config: dict[str, Any], arguments: dict[str, Any]) -> None:
    small = {**config, "num_hidden_layers": 7}
    planned = plan(small, memory="9MiB", block_size=4, **arguments)
    engine = CacheEngine(planned.cache_config(), planned.storage_dtype, "cpu", layout="NHD")
    assert engine.memory_bytes == (planned.num_blocks or 0) * planned.block_bytes <= 9 * 2**20
    assert engine.num_blocks == planned.num_blocks
    assert len(engine) == 7


def test_a_config_that_is_handed_over_counts_what_the_plan_says() -> None:
    planned = plan(GEMMA_2_9B, memory="4GiB")
    config = planned.cache_config()
    assert isinstance(config, CacheConfig)
    assert config.memory_bytes("bfloat16") == (planned.num_blocks or 0) * planned.block_bytes
    assert config.block_bytes("bfloat16") == planned.block_bytes
    assert config.layers_per_group == 21


# --- the manager holds what the plan says


@given(st.lists(REACHES, min_size=1, max_size=4), st.integers(1, 150), st.sampled_from([1, 4, 16]), st.integers(1, 40))
def test_a_sequence_holds_no_more_blocks_than_planned(
    reaches: list[Any], length: int, block_size: int, step_tokens: int
) -> None:
    model = uniform(len(reaches), 1, 1, reaches=reaches, dtype="bfloat16")
    planned = plan(model, block_size=block_size, step_tokens=step_tokens, max_groups=64)
    groups = tuple(group.reach for group in planned.groups)
    manager = BlockManager(planned.blocks_for(length), block_size, groups=groups, prefix_caching=False)
    step = StepBuffers(1, step_tokens, -(-length // block_size), device="cpu", groups=len(groups))
    seq, _ = manager.admit(list(range(length)), reserve=min(step_tokens, length))
    most = 0
    for start in range(0, length, step_tokens):
        step_id = manager.prepare([seq], [min(step_tokens, length - start)], step)
        most = max(most, manager.num_blocks - manager.num_free_blocks)
        manager.commit(step_id)
        most = max(most, manager.num_blocks - manager.num_free_blocks)
    assert most <= planned.blocks_for(length)
    if length % block_size == 0 and all(reach is None for reach in reaches):
        assert most == planned.blocks_for(length)
    manager.free([seq])


def test_an_intermediate_size_outweighs_expand() -> None:
    config: dict[str, Any] = {"model_type": "falcon_mamba", "hidden_size": 4096, "intermediate_size": 8192}
    config |= {"expand": 16, "num_hidden_layers": 64, "state_size": 16, "conv_kernel": 4, "torch_dtype": "bfloat16"}
    assert plan(config).state_bytes == 64 * 8192 * (3 * 2 + 16 * 4)


def test_every_device_of_a_split_keeps_b_and_c_of_its_group() -> None:
    config: dict[str, Any] = {"model_type": "mamba2", "num_heads": 80, "head_dim": 64, "n_groups": 1, "state_size": 128}
    config |= {"conv_kernel": 4, "num_hidden_layers": 1, "torch_dtype": "bfloat16"}
    assert plan(config, tp=2).state_bytes == (40 * 64 + 2 * 128) * 3 * 2 + 40 * 64 * 128 * 4


def test_advice_about_memory_counts_the_share_that_is_used() -> None:
    asked: dict[str, Any] = {"dtype": "bfloat16", "utilization": 0.9, "seq_len": 100_000, "concurrency": 1}
    numbers = {"num_layers": 32, "num_kv_heads": 8, "head_dim": 128}
    change = next(c for c in smallest_changes(plan(numbers, memory="10GiB", **asked)) if c.setting == "memory")
    assert plan(numbers, memory=change.value, **asked).fits
    assert not plan(numbers, memory=change.value - 2, **asked).fits


def test_stages_grouped_differently_get_the_blocks_they_need() -> None:
    reaches = [None] * 8 + [Window(128)] * 6 + [None] * 2
    numbers = {"num_layers": 16, "num_kv_heads": 8, "head_dim": 128, "reaches": reaches}
    made = plan(numbers, dtype="bfloat16", pp=2, memory="1GiB")
    most = made.max_concurrency(4096)
    for i, stage in enumerate(made.stages):
        assert made.cache_config(i).num_gpu_blocks >= most * stage.layout.blocks(4096)


def test_the_state_of_the_sequences_asked_for_is_set_aside() -> None:
    config: dict[str, Any] = {"model_type": "jamba", "hidden_size": 64, "num_hidden_layers": 8, "attn_layer_offset": 4}
    config |= {"attn_layer_period": 8, "mamba_d_conv": 4, "mamba_d_state": 16, "mamba_expand": 2}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "torch_dtype": "bfloat16"}
    made = plan(config, memory="16MiB", seq_len=128, concurrency=50)
    assert made.fits
    assert made.memory is not None
    assert made.cache_config().memory_bytes(made.storage_dtype) + 50 * made.state_bytes <= made.memory
