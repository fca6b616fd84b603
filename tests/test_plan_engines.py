"""What serving engines keep: their pages, paddings and packings, each counted here by the engine's own rule."""

import math
from pathlib import Path
from typing import Any

import pytest

from kvblocks import Chunk, Window, plan
from kvblocks.planner.engines import Engine

CONFIGS = Path(__file__).resolve().parent / "data" / "configs"
PLAIN: dict[str, Any] = {"num_layers": 12, "num_kv_heads": 2, "head_dim": 64}
LAYER = 2 * (64 + 64) * 2  # bytes of a token in one layer of PLAIN, in two bytes a number


def windowed(full: int, windows: int, size: int = 128) -> dict[str, Any]:
    reaches = [None] * full + [Window(size)] * windows
    return {"num_layers": full + windows, "num_kv_heads": 2, "head_dim": 64, "reaches": reaches}


def test_kvblocks_is_the_default() -> None:
    assert plan(PLAIN, seq_len=99).to_dict() == plan(PLAIN, seq_len=99, engine="kvblocks").to_dict()


# --- packed latents with an indexer


def test_vllm_and_sglang_pack_a_latent_and_its_index_key() -> None:
    config = CONFIGS / "glm-5.1-nvfp4.json"
    layers = 78
    both: list[tuple[Engine, str]] = [("vllm", "MLAAttentionSpec"), ("sglang", "NSATokenToKVPool")]
    for engine, name in both:
        packed = plan(config, engine=engine, dtype="fp8")
        assert packed.bytes_per_token == layers * (656 + 132)
        assert packed.block_size == 64
        assert "656 bytes; its index key 128 fp8 and a float32 scale, 132 bytes" in packed.explain()
        assert name in packed.explain()
        assert f"{layers} layers × 1 head × (656 + 132) × 1 B" in packed.explain()
        assert plan(config, engine=engine, dtype="bfloat16").bytes_per_token == layers * (2 * 576 + 132)
    assert plan(config, dtype="fp8").bytes_per_token == layers * (576 + 128)
    assert plan(config, engine="vllm", dtype="bfloat16").with_dtype("fp8").bytes_per_token == layers * (656 + 132)


def test_a_latent_without_an_indexer_is_not_packed() -> None:
    both: list[Engine] = ["vllm", "sglang"]
    for engine in both:
        latent = plan(CONFIGS / "deepseek-v3.json", engine=engine, dtype="fp8")
        assert latent.bytes_per_token == 61 * 576
        size, said = (
            (64, "vLLM: pages of 64 tokens") if engine == "vllm" else (1, "SGLang: pages of 1 token by default")
        )
        assert latent.block_size == size
        assert said in latent.explain()


# --- vLLM


def test_vllm_raises_blocks_until_a_page_holds_a_state() -> None:
    """Qwen 3.5 35B: 10 layers of attention, 30 of a gated delta rule, each state a page of its own."""
    config = CONFIGS / "qwen3.5-35b-a3b.json"
    token, state = 2 * 2 * 256 * 2, 32 * 128 * 128 * 4 + 3 * 8192 * 2
    block = 16 * math.ceil(state / (16 * token))
    planned = plan(config, engine="vllm", memory="40GiB", seq_len=32_768)
    assert planned.block_size == block == 1056
    assert planned.block_bytes == 10 * block * token
    assert planned.num_blocks == 40 * 2**30 // planned.block_bytes
    assert planned.blocks_for(32_768) == math.ceil(32_768 / block) + 3  # three groups of ten states
    assert planned.state_bytes == 0
    assert planned.cache_bytes(5) == plan(config).cache_bytes(5)
    assert "_align_hybrid_block_size" in planned.explain()
    assert plan(config, engine="vllm", dtype="fp8").block_size == 16 * math.ceil(state / (8 * token)) == 2096
    halves = plan(config, engine="vllm", tp=2)
    assert halves.block_size == block  # both the state and a page of attention are halved


@pytest.mark.parametrize(("full", "windows", "each"), [(5, 29, 5), (12, 12, 12), (10, 14, 14), (10, 15, 10)])
def test_vllm_groups_have_equally_many_layers(full: int, windows: int, each: int) -> None:
    """As many as the fewest of a kind; as the most, where these are less than one and a half times as many."""
    planned = plan(windowed(full, windows), engine="vllm", dtype="float16", memory="1GiB", step_tokens=100)
    assert planned.block_bytes == each * 16 * LAYER
    groups = [math.ceil(full / each), math.ceil(windows / each)]
    held = math.ceil((128 - 1 + 100) / 16) + 1
    assert planned.blocks_for(1000) == groups[0] * 63 + groups[1] * held
    assert planned.blocks_for(20) == 2 * sum(groups)
    assert sorted(len(group.layers) for group in planned.groups)[-1] <= each
    assert {index for group in planned.groups for index in group.layers} == set(range(full + windows))


def test_vllm_counts_a_whole_step_beside_a_window_by_default() -> None:
    planned = plan(windowed(4, 4), engine="vllm", dtype="float16")
    assert planned.blocks_for(100_000) == 6250 + math.ceil((127 + 8192) / 16) + 1
    assert "--max-num-batched-tokens" in planned.explain()


def test_vllm_gives_small_pages_more_tokens() -> None:
    """Gemma 4 26B's windowed layers have pages twice as large as its full ones, whose blocks hold twice the tokens."""
    config = CONFIGS / "gemma-4-26b-a4b-nvfp4.json"
    planned = plan(config, engine="vllm", dtype="bfloat16", step_tokens=1)
    sizes = {group.block_bytes for group in planned.stage.layout.groups}
    pages = {layer.block_bytes for group in planned.stage.layout.groups for layer in group.layers}
    assert len(pages) == 2
    assert max(pages) % min(pages) == 0
    assert planned.block_bytes == 5 * max(pages) >= max(sizes)
    layout = planned.stage.layout
    for group in layout.groups:  # 640 tokens, shorter than the window
        ratio = max(pages) // group.layers[0].block_bytes
        assert layout.blocks_of(group, 640) == 640 // 16 // ratio


def test_vllm_pages_that_do_not_divide_are_refused() -> None:
    config = {
        "model_type": "gemma3_text",
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
        "per_layer_config": {"1": {"num_key_value_heads": 3}},
        "transformers_version": "5.0.0",
    }
    with pytest.raises(ValueError, match="layers with pages of 1536 and 1024 bytes; how it unifies those is not known"):
        plan(config, engine="vllm").num_blocks  # noqa: B018


# --- SGLang


def test_sglang_has_a_pool_for_windows_of_some_types() -> None:
    planned = plan(CONFIGS / "gpt-oss-20b.json", engine="sglang", dtype="bfloat16", memory="10GiB")
    layer = 8 * 128 * 2
    slots = 10 * 2**30 / (12 * layer * 1.8)
    assert planned.max_seq_len() == pytest.approx(slots, abs=2)
    assert planned.num_blocks is None
    assert planned.sequence_bytes(1000) == 12 * layer * 1000 + 12 * layer * 800
    assert planned.max_concurrency(1000) == pytest.approx(slots / 1000, abs=1)
    short = plan(CONFIGS / "gpt-oss-20b.json", engine="sglang", dtype="bfloat16").sequence_bytes(100)
    assert short == 125 * 12 * layer + 100 * 12 * layer  # the windowed pool decides: 100 slots of it come with 125
    every = plan(windowed(6, 6), engine="sglang", dtype="float16", memory="1GiB")
    assert (every.block_size, every.block_bytes, len(every.groups)) == (1, 12 * LAYER, 1)
    assert "windowed layers keep every token" in every.explain()


# --- llama.cpp


@pytest.mark.parametrize("reach", [Window(128), Chunk(128)])
def test_llama_cpp_allocates_cells(reach: Any) -> None:
    model = {**PLAIN, "reaches": [None] * 4 + [reach] * 8}
    planned = plan(model, engine="llama.cpp", memory="1GiB")
    assert planned.dtype == "float16"
    assert planned.sequence_bytes(1000) == (4 * 1024 + 8 * 768) * LAYER  # 128 and a batch of 512, padded to 256
    assert planned.sequence_bytes(300) == 12 * 512 * LAYER
    assert planned.memory_for(3, 1000) == 3 * planned.sequence_bytes(1000)
    assert planned.max_concurrency(1000) == 2**30 // planned.sequence_bytes(1000)
    assert planned.num_blocks is None
    assert plan(model, engine="llama.cpp", step_tokens=2048).sequence_bytes(9000) == (4 * 9216 + 8 * 2304) * LAYER
    full = plan(model, engine="llama.cpp", swa_full=True)
    assert full.sequence_bytes(1000) == 12 * 1024 * LAYER
    assert "llama_kv_cache_iswa" in planned.explain()
    assert "--swa-full keeps every token" in full.explain()


def test_llama_cpp_keeps_state_in_float32() -> None:
    config = CONFIGS / "qwen3.5-35b-a3b.json"
    conv, state = 3 * 8192, 32 * 128 * 128
    assert plan(config, engine="llama.cpp").state_bytes == 30 * 4 * (conv + state)
    assert plan(config).state_bytes == 30 * (2 * conv + 4 * state)


# --- K and V of unlike dtypes


@pytest.mark.parametrize(
    ("dtype", "head"),
    [
        ("q8_0,q4_0", 68 + 36),
        ("q8_0, f16", 68 + 128),
        ("f16,q4_0", 128 + 36),
        ("fp8,bf16", 64 + 128),
        ("q8_0,q8_0", 136),
    ],
)
def test_keys_and_values_of_unlike_dtypes(dtype: str, head: int) -> None:
    engines: list[Engine] = ["kvblocks"] if "fp8" in dtype else ["kvblocks", "llama.cpp"]
    for engine in engines:
        planned = plan(PLAIN, dtype=dtype, engine=engine, memory="1GiB", seq_len=256)
        assert planned.bytes_per_token == 12 * 2 * head
        assert planned.cache_bytes(256) == 256 * 12 * 2 * head
    config = plan(PLAIN, dtype=dtype, memory="1GiB").cache_config()
    assert config.memory_bytes("uint8") == config.num_gpu_blocks * 16 * 12 * 2 * head


def test_the_title_names_both_dtypes() -> None:
    assert "K and V in q8_0,q4_0" in plan(PLAIN, dtype="q8_0,q4_0").explain()
    assert "12 layers × 2 heads × (68 + 36) B" in plan(PLAIN, dtype="q8_0,q4_0").explain()
    with pytest.raises(ValueError, match="names 3 dtypes; give one, or one for K and one for V"):
        plan(PLAIN, dtype="q8_0,q4_0,f16")
    with pytest.raises(TypeError, match="'int3' cannot hold a cache"):
        plan(PLAIN, dtype="q8_0,int3")


# --- wrong calls


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"engine": "vLLM2"}, ValueError, "engine='vLLM2' is not one of kvblocks, vllm, sglang, llama.cpp"),
        ({"engine": None}, ValueError, "engine=None is not one of"),
        ({"swa_full": True}, ValueError, "engine='kvblocks': only llama.cpp has --swa-full"),
        ({"swa_full": 1, "engine": "llama.cpp"}, TypeError, "swa_full=1 is of type int; give a bool"),
        ({"engine": "vllm", "stored": "transformers"}, ValueError, "counts transformers' caches, and engine='vllm'"),
        (
            {"engine": "llama.cpp", "dtype": "fp8"},
            ValueError,
            "dtype='float8_e4m3fn': llama.cpp has K and V in float32,",
        ),
        ({"engine": "llama.cpp", "dtype": "q8_0,int4"}, ValueError, "dtype='int4': llama.cpp has K and V in"),
        ({"engine": "vllm", "dtype": "bf16,q8_0"}, ValueError, "is llama.cpp's, and engine='vllm' has none such"),
        ({"engine": "vllm", "step_tokens": 0}, ValueError, "step_tokens=0 is outside 1"),
    ],
)
def test_wrong_calls(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan(PLAIN, **({"dtype": "float16"} | arguments))


def test_llama_cpp_is_advised_what_it_has() -> None:
    planned = plan(PLAIN, engine="llama.cpp", seq_len=4096)
    short = plan(PLAIN, engine="llama.cpp", seq_len=4096, memory=planned.sequence_bytes(4096) * 3 // 5)
    assert "K and V in q8_0 instead of float16" in short.explain()
    assert short.dtype_for(1, 4096) == "q8_0"


def test_an_engine_that_packs_in_unknown_ways_is_refused_and_makes_no_cache() -> None:
    compressed = {
        "model_type": "deepseek_v4",
        "transformers_version": "5.0.0",
        "num_hidden_layers": 1,
        "head_dim": 8,
        "layer_types": ["heavily_compressed_attention"],
        "compress_rates": {"heavily_compressed_attention": 128},
        "index_head_dim": 8,
        "sliding_window": 8,
        "num_attention_heads": 2,
        "dtype": "bfloat16",
    }
    assert plan(compressed).block_size == 128
    with pytest.raises(ValueError, match=r"how it keeps the compressed entries .* give engine='kvblocks'"):
        plan(compressed, engine="sglang")
    with pytest.raises(ValueError, match="engine='vllm': a CacheEngine keeps what engine='kvblocks' counts"):
        plan(PLAIN, dtype="float16", memory="1GiB", engine="vllm").cache_config()
