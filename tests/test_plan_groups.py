"""Layers are grouped alike by the planner, generation and `PagedCache`, and engines allocate what the README says.

Models have the layers, windows, chunks and longest sequences of the published configs; what is run has few and small
heads, on which groups do not depend.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    Llama4TextConfig,
    PreTrainedConfig,
)

import kvblocks
from kvblocks import CacheEngine, Plan, plan
from kvblocks.config import CacheConfig, Chunk, Group, Window
from kvblocks.errors import UnsupportedModel
from kvblocks.integrations.transformers import PagedCache, cache_config, cache_groups
from kvblocks.manager import BlockManager
from kvblocks.models.grouping import PagedLayer, layer_groups
from kvblocks.step import StepBuffers

README = Path(__file__).resolve().parents[1] / "README.md"
LENGTH = 32768
ROW = re.compile(r"^\| ([^|]+) \| (\d+) \| \+([\d.]+) % \| \+(\d+) % \|$", re.MULTILINE)
TABLE = {
    name: (int(groups), float(over), int(uniform)) for name, groups, over, uniform in ROW.findall(README.read_text())
}
SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "intermediate_size_mlp": 16,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Where a plan's groups are not those of `kvblocks.generate`, and why.
GROUPED_OTHERWISE = {
    "gpt_neo": "transformers' cache keeps every token of its local layers; the plan counts their window",
    "minimax": "transformers' cache keeps every token; the plan counts the sliding window of its mask",
}


def by_turns(layers: int, period: int, near: str = "sliding_attention") -> list[str]:
    return ["full_attention" if i % period == period - 1 else near for i in range(layers)]


# Class, layers, period of those that attend to everything, K and V heads, their dims, and how far the others attend.
MODELS: dict[str, tuple[type[PreTrainedConfig], int, int, int, int, Window | Chunk]] = {
    "Gemma 2 9B": (Gemma2Config, 42, 2, 8, 256, Window(4096)),
    "Gemma 3 27B": (Gemma3TextConfig, 62, 6, 16, 128, Window(1024)),
    "gpt-oss 20B": (GptOssConfig, 24, 2, 8, 64, Window(128)),
    "Llama 4 Scout": (Llama4TextConfig, 48, 4, 8, 128, Chunk(8192)),
    "Command R7B": (Cohere2Config, 32, 4, 8, 128, Window(4096)),
}


def model_config(name: str, *, small: bool = False) -> PreTrainedConfig:
    kind, layers, period, heads, dim, reach = MODELS[name]
    chunked = isinstance(reach, Chunk)
    fields: dict[str, Any] = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": dim,
        "max_position_embeddings": 131072,
        "layer_types": by_turns(layers, period, "chunked_attention" if chunked else "sliding_attention"),
        "attention_chunk_size" if chunked else "sliding_window": reach.size,
        "dtype": "bfloat16",
    }
    return kind(**fields | (SMALL | {"dtype": "float32"} if small else {}))


def planned_groups(planned: Plan) -> tuple[Group, ...]:
    """Of the layers that keep something for a token, by their number among these."""
    groups = planned.cache_config().groups
    number = {layer: i for i, layer in enumerate(sorted(layer for group in groups for layer in group.layers))}
    return tuple(Group(group.reach, tuple(number[layer] for layer in group.layers)) for group in groups)


def as_windows(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    return tuple(
        Group(Window(group.reach.size) if isinstance(group.reach, Chunk) else group.reach, group.layers)
        for group in groups
    )


def allocated(engine: CacheEngine) -> int:
    """Bytes of all memory that the tensors of an engine lie in, each counted once."""
    tensors = [tensor for cache in engine for tensor in cache.tensors.values()]
    tensors += [tensor for states in engine.states if states is not None for tensor in states.tensors.values()]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def held_blocks(config: CacheConfig, length: int) -> int:
    """The most blocks that a manager of these groups holds for a sequence while its last block is decoded."""
    size = config.block_size
    blocks = len(config.groups) * (length // size + 1)
    manager = BlockManager.for_config(config.replace(num_gpu_blocks=blocks), prefix_caching=False, watermark=0)
    step = StepBuffers(1, 2048, length // size + 1, device="cpu", groups=len(config.groups))
    seq, _ = manager.admit(list(range(length - size)), reserve=0)
    for start in range(0, length - size, 2048):
        manager.commit(manager.prepare([seq], [min(2048, length - size - start)], step))
    most = 0
    for token in range(size):
        manager.append(seq, token)
        step_id = manager.prepare([seq], [1], step)
        most = max(most, blocks - manager.num_free_blocks)
        manager.commit(step_id)
    return most


@pytest.mark.parametrize("name", MODELS)
def test_plan_generation_and_cache_group_alike(name: str) -> None:
    config, small = model_config(name), model_config(name, small=True)
    groups = planned_groups(plan(config, memory="64GiB"))
    assert planned_groups(plan(small, memory="64MiB")) == groups
    assert cache_config(config, "64GiB", torch.bfloat16).groups == groups
    model = AutoModelForCausalLM.from_config(small).eval()  # type: ignore[no-untyped-call]
    with kvblocks.generate(model, [[5, 6, 7]], max_new_tokens=1, num_blocks=16) as run:
        assert run.scheduler.engine.config.groups == groups
    for given in (config, small):
        assert PagedCache(given, num_blocks=1).engine.config.groups == as_windows(groups)
    assert kvblocks.Pool(model, num_blocks=1).config.groups == as_windows(groups)


@pytest.mark.parametrize("name", tiny_models.architectures())
def test_every_architecture_is_grouped_alike_and_takes_the_bytes_of_its_plan(name: str) -> None:
    config = tiny_models.tiny_config(name)
    planned = plan(config, mla="expanded", dtype="float32", memory="64MiB")
    try:
        sizes = planned.cache_config()
    except ValueError as error:
        if not re.search("a block holds one entry for|nothing to page", str(error)):
            raise
        pytest.skip(str(error))
    states = planned.num_states or 0
    engine = CacheEngine(sizes, planned.storage_dtype, "cpu", num_states=states)
    fixed = states * sizes.state_bytes("float32")
    assert allocated(engine) == engine.memory_bytes == sizes.num_gpu_blocks * planned.block_bytes + fixed
    assert fixed == (states * planned.state_bytes if states else 0)
    try:
        groups = cache_groups(config)
    except UnsupportedModel as error:
        pytest.skip(str(error))
    expected = planned_groups(planned)
    if name in GROUPED_OTHERWISE:
        assert {group.reach for group in expected} != {None}
        expected = (Group(None, tuple(sorted(layer for group in expected for layer in group.layers))),)
    assert groups == expected


def test_minimax_as_it_is_published_is_grouped_alike() -> None:
    """It has no sliding window then."""
    config = tiny_models.tiny_config("minimax")
    config.sliding_window = None
    assert planned_groups(plan(config, memory="64MiB")) == cache_groups(config)


@pytest.mark.parametrize("name", ["gemma4_text", "mimo_v2_flash"])
def test_layers_of_unlike_shapes_have_the_same_groups_and_bytes_everywhere(name: str) -> None:
    config, model = tiny_models.build(name)
    planned = plan(config, dtype="float32", memory="64MiB").cache_config()
    assert len(set(planned.layers)) > 1
    with kvblocks.generate(model, [[5, 6, 7]], max_new_tokens=1, num_blocks=16) as run:
        made = [run.scheduler.engine.config]
    made += [cache_config(config, "64MiB", torch.float32), PagedCache(config, num_blocks=1).engine.config]
    made += [kvblocks.Pool(given, num_blocks=1).config for given in (config, model)]
    for each in made:
        assert each.groups == planned.groups
        assert each.layers == planned.layers
        assert each.block_bytes("float32") == planned.block_bytes("float32")


def test_gemma_4_26b_has_the_groups_of_its_plan() -> None:
    values = json.loads((Path(__file__).parent / "data/configs/gemma-4-26b-a4b-nvfp4.json").read_text())
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    planned = plan(config, memory="64GiB").cache_config()
    made = cache_config(config, "64GiB", torch.bfloat16)
    assert (made.groups, made.layers) == (planned.groups, planned.layers)
    assert {len(group.layers) for group in made.groups} == {
        2,
        3,
        5,
    }  # a full layer keeps half of what a windowed one does


@pytest.mark.parametrize("name", MODELS)
def test_the_table_of_the_readme_is_what_an_engine_allocates(name: str) -> None:
    planned = plan(model_config(name), memory="64GiB")
    config = planned.cache_config().replace(num_gpu_blocks=2)
    engine = CacheEngine(config, planned.storage_dtype, "cpu", layout="NHD")
    assert engine.memory_bytes == 2 * planned.block_bytes
    assert config.block_bytes("bfloat16") == planned.block_bytes
    minimum = planned.cache_bytes(LENGTH)
    taken = held_blocks(config, LENGTH) * planned.block_bytes
    uniform = 1 / (1 - planned.uniform_waste(LENGTH)) - 1
    assert TABLE[name] == (len(config.groups), round(100 * (taken / minimum - 1), 2), round(100 * uniform))


def test_the_readme_has_no_other_models() -> None:
    assert TABLE.keys() == MODELS.keys()


def test_gemma_3_27b_takes_little_more_than_the_minimum_everywhere() -> None:
    """At most 2.4 % more, with the groups of `plan`, of a cache for `kvblocks.generate` and of `PagedCache`."""
    config = model_config("Gemma 3 27B")
    minimum = plan(config).cache_bytes(LENGTH)
    paged = PagedCache(config, num_blocks=2).engine
    made = [
        plan(config, memory="64GiB").cache_config(),
        cache_config(config, "64GiB", torch.bfloat16),
        paged.config,
    ]
    assert paged.memory_bytes == 2 * paged.config.block_bytes("bfloat16")
    for each in made:
        over = held_blocks(each, LENGTH) * each.block_bytes("bfloat16") / minimum - 1
        assert 0 < over < 0.02405


@pytest.mark.parametrize(
    "asked",
    [
        {"seq_len": 1000},
        {"seq_len": 131072},
        {"dtype": "float32"},
        {"dtype": "int4", "group_size": 32},
        {"block_size": 128},
        {"tp": 8},
        {"step_tokens": 2048},
        {"memory": "1GiB"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["Gemma 3 27B", "Llama 4 Scout"])
def test_groups_depend_on_the_model_alone(name: str, asked: dict[str, Any]) -> None:
    config = model_config(name)
    assert plan(config, **asked).groups == plan(config).groups


@pytest.mark.parametrize(("longest", "number"), [(600, 5), (1024, 5), (2048, 6), (32768, 7), (131072, 7)])
def test_groups_follow_the_longest_sequence(longest: int, number: int) -> None:
    """Within the window every layer keeps as much: 10 layers and four times 13 leave the fewest places empty then."""
    config = model_config("Gemma 3 27B")
    config.max_position_embeddings = longest
    groups = plan(config).groups
    assert cache_groups(config) == groups
    assert len(groups) == number


@pytest.mark.parametrize("longest", [None, 32768, 131072, 10**6])
def test_no_sequence_past_32k_is_counted(longest: int | None) -> None:
    """At 32k, 8 places for 7 + 8 layers take 8 * (2048 + 513) blocks and 7 places 7 * (2048 + 2 * 513), which is more.

    At 128k it would be the other way round: 8 * (8192 + 513) against 7 * (8192 + 2 * 513).
    """
    layers = [PagedLayer(i, None if i < 7 else Window(8192), 1) for i in range(15)]
    assert [len(group.layers) for group in layer_groups(layers, longest)] == [7, 8]
