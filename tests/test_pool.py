"""One pool for many calls: what is found again, what is given back, and whose it is."""

import copy
import gc
import weakref
from typing import Any

import pytest
import tiny_models
import torch
from test_generation import prompt, tiny_llama
from test_streams import answers
from test_wrapped import Adapter

import kvblocks
from kvblocks import Chunk, Pool, demo
from kvblocks.integrations.transformers import PagedCache, served

# These tensors are tiny, and threads would only wait for each other.
torch.set_num_threads(1)

QUIET: dict[str, Any] = {"max_new_tokens": 8, "stop_tokens": []}


def check_all_free(pool: Pool) -> None:
    pool.manager.audit()
    assert pool.manager.num_free_blocks == pool.manager.num_blocks
    assert pool.manager.num_sequences == 0


def test_each_turn_of_a_chat_computes_only_what_is_new() -> None:
    pool = Pool(tiny_llama(), num_blocks=32, block_size=4)
    chat: list[int] = []
    for turn in range(5):
        chat += prompt(9, turn)
        [tokens] = kvblocks.generate(tiny_llama(), [chat], pool=pool, **QUIET).run()
        assert [tokens] == answers(tuple(chat))
        chat += tokens
    stats = pool.manager.stats()
    # Of 9, 26, 43, 60 and 77 tokens only those after the last full block of the turn before.
    assert stats.prompt_tokens - stats.hit_tokens == 9 + (26 - 16) + (43 - 32) + (60 - 48) + (77 - 64)
    check_all_free(pool)


def test_the_model_is_measured_once() -> None:
    model = demo.small_llama()
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    for _ in range(3):
        kvblocks.generate(model, [[1, 2]], max_new_tokens=1).run()
    assert len(passes) == 1 + 3


@pytest.mark.parametrize("how", ["break", "close"])
def test_what_is_left_early_gives_its_blocks_back(how: str) -> None:
    pool = Pool(tiny_llama(), num_blocks=32, block_size=4)
    gc.disable()
    try:
        run = kvblocks.generate(tiny_llama(), [prompt(20), prompt(9)], pool=pool, **QUIET)
        next(run[0])
        run.add(prompt(5))
        run.step()
        assert pool.manager.num_sequences == 3
        if how == "close":
            run.close()
        else:
            del run
        check_all_free(pool)
    finally:
        gc.enable()


def test_a_stream_alone_is_read_to_its_end_and_the_others_are_dropped() -> None:
    pool = Pool(tiny_llama(), num_blocks=32, block_size=4)
    stream = kvblocks.generate(tiny_llama(), [prompt(20), prompt(9)], pool=pool, **QUIET)[0]
    assert stream.read() == answers(prompt(20))[0]
    assert pool.manager.stats().admitted == 1
    check_all_free(pool)


def test_finished_streams_are_let_go() -> None:
    with kvblocks.generate(tiny_llama(), [prompt(5)], num_blocks=64, **QUIET) as run:
        seen = [weakref.ref(run.add(prompt(4, n))) for n in range(20)]
        late = run.add(prompt(9))
        while run.num_unfinished:
            run.step()  # who adds and does not look gets them from here
        assert [stream() for stream in seen] == [None] * 20
        assert late.tokens == answers(prompt(9))[0]
        assert run[0].tokens == answers(prompt(5))[0]


def test_two_calls_take_turns_on_a_pool() -> None:
    pool = Pool(tiny_llama(), num_blocks=32, block_size=4)
    first = kvblocks.generate(tiny_llama(), [prompt(20)], pool=pool, **QUIET)
    next(first[0])
    second = kvblocks.generate(tiny_llama(), [prompt(20), prompt(7)], pool=pool, **QUIET)
    assert second.run() == answers(prompt(20), prompt(7))
    assert pool.manager.stats().hit_tokens == 16
    assert first.run() == answers(prompt(20))
    check_all_free(pool)


def test_paged_caches_and_generate_share_a_pool() -> None:
    model: Any = tiny_llama()
    pool = Pool(model, num_blocks=32, block_size=4)
    ids = torch.tensor([prompt(20)])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for found in (0, 16):
        with PagedCache(model.config, pool=pool) as held:
            assert held.begin(ids) == found
            assert model.generate(ids, past_key_values=held, **options)[0, 20:].tolist() == answers(prompt(20))[0]
            assert held.engine is pool.engine
            fork = held.fork()
            assert fork.begin(ids) == 19
            fork.close()
    assert kvblocks.generate(model, [prompt(20)], pool=pool, **QUIET).run() == answers(prompt(20))
    assert pool.manager.stats().hit_tokens == 16 + 16  # of the second cache, and of `generate`
    pool.reset_prefix_cache()
    with PagedCache(model.config, pool=pool) as held:
        assert held.begin(ids) == 0
    check_all_free(pool)


@pytest.mark.parametrize("first", ["cache", "generate"])
def test_the_pool_of_a_paged_cache(first: str) -> None:
    """It is allocated for whoever comes first, and each finds what the other has computed."""
    model: Any = copy.deepcopy(tiny_llama())
    ids = torch.tensor([prompt(20)])
    with PagedCache(model.config, num_blocks=32, block_size=4) as held:
        for which in (first, "generate", "cache"):
            if which == "cache":
                found = held.begin(ids)
                made = model.generate(ids, cache=held, max_new_tokens=8, pad_token_id=0, eos_token_id=None)
                assert made[0, 20:].tolist() == answers(prompt(20))[0]
            else:
                run = kvblocks.generate(model, [prompt(20)], pool=held.pool, **QUIET)
                assert run.run() == answers(prompt(20))
                found = run.scheduler.num_hit
            assert held.engine is held.pool.engine
            assert found >= 16 or which == first
        assert held.fork().pool is held.pool
        pool = held.pool
    check_all_free(pool)


def test_where_attention_gets_other_k_and_v_than_the_cache_neither_finds_the_others() -> None:
    """Latent attention: the cache is handed latents, attention what they were expanded to."""
    model = tiny_models.sharp("deepseek_v3")
    assert not served(model).as_cached()
    ids = torch.tensor([prompt(20)])
    pool = Pool(model, num_blocks=64, block_size=4)
    with kvblocks.generate(model, [prompt(20)], pool=pool, **QUIET) as run, PagedCache(model.config, pool=pool) as held:
        expected = run.run()
        assert held.begin(ids) == 0
        made: Any = model
        out = made.generate(ids, cache=held, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=None)
        assert out[:, 20:].tolist() == expected
    again = kvblocks.generate(model, [prompt(20)], pool=pool, **QUIET)
    assert again.run() == expected
    assert again.scheduler.num_hit == 16


def test_adapters_are_told_apart_in_a_paged_cache() -> None:
    model: Any = copy.deepcopy(tiny_llama())
    pool = Pool(model, num_blocks=64, block_size=4)
    ids = torch.tensor([prompt(20)])
    with PagedCache(model.config, pool=pool) as held:
        held.begin(ids)
        model.generate(ids, cache=held, max_new_tokens=1, pad_token_id=0)
        attention = model.get_submodule("model.layers.0.self_attn")
        attention.v_proj = Adapter(attention.v_proj)
        assert held.begin(ids) == 0
        model.generate(ids, cache=held, max_new_tokens=1, pad_token_id=0)
        attention.v_proj = attention.v_proj.base_layer
        assert held.begin(ids) == 16


def test_the_pool_of_a_paged_cache_gets_the_models_dtype() -> None:
    model: Any = copy.deepcopy(tiny_llama()).double()
    held = PagedCache(model.config, num_blocks=32)
    kvblocks.generate(model, [prompt(5)], pool=held.pool, **QUIET).run()
    assert held.engine.dtype == torch.float64
    other: Any = copy.deepcopy(tiny_llama())
    with pytest.raises(ValueError, match="the pool was made for another model"):
        kvblocks.generate(other, [prompt(5)], pool=PagedCache(model.config, num_blocks=32).pool)


def test_a_pool_may_be_made_of_a_config() -> None:
    model = tiny_llama()
    pool = Pool(model.config, memory="64KiB", block_size=4)
    assert pool.engine.memory_bytes <= 64 << 10
    assert repr(pool) == f"Pool(num_blocks={pool.config.num_gpu_blocks}, free=64, memory_bytes=65536)"
    assert kvblocks.generate(model, [prompt(20)], pool=pool, **QUIET).run() == answers(prompt(20))


def test_a_pool_is_of_one_model() -> None:
    pool = Pool(tiny_llama(), num_blocks=8)
    with pytest.raises(ValueError, match="the pool was made for another model, a LlamaForCausalLM; its K and V would"):
        kvblocks.generate(demo.small_llama(), [[1, 2]], pool=pool)
    with pytest.raises(ValueError, match="the pool was made for another model"):
        PagedCache(demo.small_llama().config, pool=pool)
    moved = demo.small_llama()
    pool = Pool(moved, num_blocks=8)
    moved.double()
    with pytest.raises(ValueError, match=r"the model is torch\.float64 on cpu, and the pool torch\.float32 on cpu"):
        kvblocks.generate(moved, [[1, 2]], pool=pool)
    first, second = demo.small_llama(), demo.small_llama()
    pool = Pool(first.config, num_blocks=8)
    second.config = first.config
    kvblocks.generate(first, [[1, 2]], pool=pool, max_new_tokens=1).run()
    with pytest.raises(ValueError, match="the pool was made for another model"):
        kvblocks.generate(second, [[1, 2]], pool=pool)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "1MiB", "num_blocks": 4}, "both say how large the pool is"),
        ({"memory": 100}, "memory=100 holds no block; one is"),
        ({"num_blocks": 0}, "num_gpu_blocks=0"),
    ],
)
def test_pools_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pool(tiny_llama(), **options)


def test_sizes_beside_a_pool_are_refused() -> None:
    pool = Pool(tiny_llama(), num_blocks=8)
    with pytest.raises(ValueError, match="are those of the pool; give no others"):
        kvblocks.generate(tiny_llama(), [[1]], pool=pool, num_blocks=4)
    with pytest.raises(ValueError, match="give no others"):
        PagedCache(tiny_llama().config, pool=pool, num_blocks=4)
    with pytest.raises(ValueError, match="pool has a manager and an engine of its own"):
        PagedCache(tiny_llama().config, pool=pool, manager=pool.manager, engine=pool.engine)


def test_a_generation_makes_a_pool_that_the_next_call_takes_up() -> None:
    model = tiny_llama()
    with kvblocks.generate(model, [prompt(20)], max_new_tokens=4, num_blocks=32, block_size=4) as first:
        assert isinstance(first.pool, Pool)
        expected = first.run()
    with kvblocks.generate(model, [prompt(20)], max_new_tokens=4, pool=first.pool) as second:
        assert second.run() == expected
        assert second.scheduler.num_hit == 16
        assert second.pool is first.pool


def test_chunked_layers_keep_their_chunk_where_no_cache_for_transformers_needs_more() -> None:
    model: Any = tiny_models.build("llama4_text")[1]
    run = kvblocks.generate(model, [prompt(9)], max_new_tokens=2)
    assert run.pool is not None
    assert any(isinstance(reach, Chunk) for reach in run.pool.manager.groups)
    with pytest.raises(ValueError, match=r"its group keeps Chunk\(size=\d+\); give manager and engine of a PagedCache"):
        PagedCache(model.config, pool=run.pool)
    PagedCache(model.config, pool=Pool(model, num_blocks=8))  # windows, by default
