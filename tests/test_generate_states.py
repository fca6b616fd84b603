"""`kvblocks.generate` of models that keep more than K and V: states of sequences, index keys of tokens."""

from functools import cache
from typing import Any

import pytest
import tiny_models
import torch
from transformers import DynamicCache, PreTrainedModel

import kvblocks
from kvblocks import Pool
from kvblocks.generation.request import Request
from kvblocks.generation.scheduler import Scheduler
from kvblocks.generation.streams import Generation
from kvblocks.generation.verify import verify
from kvblocks.integrations.transformers import CachedModel, PagedCache, PagedModel, UnsupportedModel, served

# These tensors are tiny, and threads would only wait for each other.
torch.set_num_threads(1)

NEW = 8
QUIET: dict[str, Any] = {"max_new_tokens": NEW, "stop_tokens": []}

# Gated delta rule; Mamba 2 beside attention in each layer; Mamba 1; convolutions beside windows; index keys.
NAMES = ["qwen3_next", "falcon_h1", "jamba", "lfm3", "deepseek_v32"]
WITH_STATES = NAMES[:-1]


@cache
def model_of(name: str) -> PreTrainedModel:
    model = tiny_models.sharp(name)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    return model


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    made: list[int] = torch.randint(3, tiny_models.VOCABULARY, (length,), generator=generator).tolist()
    return made


@cache
def answer(name: str, ids: tuple[int, ...], **options: Any) -> list[int]:
    """By transformers' own `generate` over its own cache, alone."""
    made: Any = model_of(name)
    given = torch.tensor([ids])
    past = DynamicCache(config=made.config)
    given_options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": NEW, **options}
    out = made.generate(given, attention_mask=torch.ones_like(given), cache=past, **given_options)
    tokens: list[int] = out[0, len(ids) :].tolist()
    return tokens


def pool_of(name: str, **options: Any) -> Pool:
    """Checkpoints at every second block."""
    states = {"num_states": 12, "state_every": 8} if name in WITH_STATES else {}
    return Pool(model_of(name), block_size=4, **{"num_blocks": 96, **states, **options})


def spent(run: Generation) -> None:
    """Nothing is held any more: no blocks, no states."""
    manager = run.scheduler.manager
    manager.audit()
    assert manager.num_free_blocks == manager.num_blocks
    assert manager.num_free_states == manager.num_states


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [7, 64])
def test_preempted_and_of_many_lengths(name: str, chunk: int) -> None:
    prompts = [prompt(5 + 4 * (number % 4), number) for number in range(6)]
    pool = pool_of(name, num_blocks=16)
    with kvblocks.generate(model_of(name), prompts, pool=pool, max_batch_tokens=chunk, **QUIET) as run:
        assert run.run() == [answer(name, tuple(ids)) for ids in prompts]
        assert run.scheduler.manager.stats().preemptions > 0
        spent(run)
    assert verify(model_of(name), run[0].request, run[0].tokens).identical


@pytest.mark.parametrize("name", WITH_STATES)
def test_a_chat_goes_on_from_checkpoints(name: str) -> None:
    """Each turn finds what the one before has left: of its prompt, or of its answer where that passed the grid."""
    pool = pool_of(name)
    chat, hits = prompt(21, 1), []
    for turn in range(3):
        with kvblocks.generate(model_of(name), [chat], pool=pool, max_batch_tokens=13, **QUIET) as run:
            assert run.run() == [answer(name, tuple(chat))]
            hits.append(run.scheduler.num_hit)
            spent(run)
        chat += run[0].tokens + prompt(3, 2 + turn)
    assert hits == [0, 24, 32]
    held = PagedCache(model_of(name).config, pool=pool)
    ids = torch.tensor([chat])
    # A scan of Mamba 1 begins at no state, so that `model.generate` cannot go on from one.
    assert held.begin(ids) == (0 if name == "jamba" else 48)
    made: Any = model_of(name)
    out = made.generate(ids, attention_mask=torch.ones_like(ids), cache=held, max_new_tokens=NEW, do_sample=False)
    assert out[0, len(chat) :].tolist() == answer(name, tuple(chat))
    held.close()
    pool.manager.audit()
    assert pool.manager.num_free_blocks == 96
    assert pool.manager.num_free_states == 12


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1", "jamba"])
def test_the_preempted_go_on_from_their_checkpoints(name: str) -> None:
    prompts = [prompt(17, number) for number in range(4)]
    pool = pool_of(name, num_blocks=22)
    with kvblocks.generate(model_of(name), prompts, pool=pool, **QUIET) as run:
        assert run.run() == [answer(name, tuple(ids)) for ids in prompts]
        assert run.scheduler.manager.stats().preemptions > 0
        assert run.scheduler.num_hit_again > 0
        spent(run)


def test_requests_wait_for_states_as_for_blocks() -> None:
    """With one slot one runs at a time, and nothing is left for checkpoints."""
    for num_states in (1, 2):
        prompts = [prompt(17, number % 2) for number in range(3)]
        pool = pool_of("qwen3_next", num_states=num_states)
        with kvblocks.generate(model_of("qwen3_next"), prompts, pool=pool, **QUIET) as run:
            late = run.add(prompt(9, 5), priority=1)
            assert run.scheduler.max_seqs == num_states
            assert run.run() == [answer("qwen3_next", tuple(ids)) for ids in prompts]
            assert late.tokens == answer("qwen3_next", tuple(prompt(9, 5)))
            spent(run)
    with pytest.raises(ValueError, match=r"n=3 answers run together, and max_seqs=2 sequences can, with 2 slots for"):
        kvblocks.generate(model_of("qwen3_next"), [prompt(9, 1)], pool=pool, temperature=1.0, n=3, **QUIET)


def test_what_others_hold_of_the_states_is_waited_for() -> None:
    """Slots that are not the scheduler's own are not there for it."""
    pool = pool_of("qwen3_next", num_states=2)
    [tokens] = kvblocks.generate(model_of("qwen3_next"), [prompt(9, 1)], pool=pool, **QUIET).run()
    pin = pool.manager.pin(prompt(9, 1) + tokens)
    prompts = [prompt(11, number) for number in range(3)]
    with kvblocks.generate(model_of("qwen3_next"), prompts, pool=pool, **QUIET) as run:
        assert run.run() == [answer("qwen3_next", tuple(ids)) for ids in prompts]
    pool.manager.unpin(pin)
    spent(run)


@pytest.mark.parametrize("name", ["falcon_h1", "lfm3"])
def test_tenants_find_their_own_states_only(name: str) -> None:
    pool, ids = pool_of(name, state_every=16), prompt(21, 1)
    for told, salts in enumerate([[b"a", b"b", b""], [b"b", b"", b"a"]]):
        requests = [Request(tuple(ids), NEW, salt=salt) for salt in salts]
        with kvblocks.generate(model_of(name), requests, pool=pool, **QUIET) as run:
            assert run.run() == [answer(name, tuple(ids))] * 3
            assert run.scheduler.num_hit == told * 3 * 16
            spent(run)
    with kvblocks.generate(model_of(name), [Request(tuple(ids), NEW, salt=b"c")], pool=pool, **QUIET) as run:
        assert run.run() == [answer(name, tuple(ids))]
        assert run.scheduler.num_hit == 0


def talked(name: str, pool: Pool, rounds: tuple[int, ...]) -> list[list[int]]:
    """Three chats, each told in every round; after the first round they are longer, and so many tokens are found."""
    chats = [prompt(37, seed) for seed in range(3)]
    for found in rounds:
        for chat in chats:
            with kvblocks.generate(model_of(name), [chat], pool=pool, **QUIET) as run:
                assert run.run() == [answer(name, tuple(chat))]
                assert run.scheduler.num_hit == found
            if not found:
                chat += run[0].tokens + prompt(3, 9)
    return chats


def all_go_on(name: str, pool: Pool, chats: list[list[int]]) -> None:
    """A cache finds 40 tokens of each chat, and answers as a cache of transformers' does."""
    with PagedCache(model_of(name).config, pool=pool) as held:
        for chat in chats:
            ids = torch.tensor([chat])
            assert held.begin(ids) == 40
            made: Any = model_of(name)
            out = made.generate(ids, attention_mask=torch.ones_like(ids), cache=held, max_new_tokens=NEW)
            assert out[0, len(chat) :].tolist() == answer(name, tuple(chat))


def test_a_checkpoint_stays_with_blocks_in_host_memory() -> None:
    name = "qwen3_next"
    pool = pool_of(name, num_blocks=24, host_memory="1MiB")
    chats = talked(name, pool, (0, 40))
    came_back = pool.manager.stats().host_hit_tokens
    assert came_back > 0
    all_go_on(name, pool, chats)
    assert pool.manager.stats().host_hit_tokens > came_back
    pool.manager.audit()
    assert pool.manager.num_free_states == 12


def test_checkpoints_come_back_from_host_memory() -> None:
    """The device has slots for a sequence and two checkpoints, and host memory for those of three prompts."""
    name = "qwen3_next"
    pool = pool_of(name, num_blocks=32, num_states=3, host_memory="1MiB")
    assert pool.manager.host_states >= 3
    talked(name, pool, (0, 40, 40))
    pool.manager.audit()
    assert pool.manager.num_free_states == 3


def test_a_checkpoint_comes_back_alone_from_host_memory() -> None:
    """The device has K and V of all chats still, and the states of few: a cache reads these once they are loaded."""
    name = "qwen3_next"
    pool = pool_of(name, num_states=3, host_memory="1MiB")
    chats = talked(name, pool, (0, 40))
    all_go_on(name, pool, chats)
    assert pool.manager.stats().host_hit_tokens == 0  # no block was loaded


def test_equal_prompts_wait_for_the_checkpoint_that_one_of_them_leaves() -> None:
    pool, ids = pool_of("qwen3_next", state_every=64, num_blocks=128), prompt(80, 1)
    with kvblocks.generate(model_of("qwen3_next"), [ids] * 3, pool=pool, max_batch_tokens=100, **QUIET) as run:
        assert run.run() == [answer("qwen3_next", tuple(ids))] * 3
        assert run.scheduler.num_hit == 128
        spent(run)


def test_the_memory_of_states_is_counted() -> None:
    made = model_of("qwen3_next")
    for memory in ("96KiB", "1MiB"):
        pool = Pool(made, memory=memory, block_size=4)
        assert 2 <= pool.manager.num_states <= max(2, pool.engine.num_blocks)
        limit = 1024 * int(memory[:-3]) * (1 if memory.endswith("KiB") else 1024)
        assert limit - pool.engine.config.block_bytes(made.dtype) < pool.engine.memory_bytes <= limit
    assert pool.manager.state_every == 256
    with pytest.raises(ValueError, match=r"holds no block; one is \d+ bytes, beside 2 states of \d+ bytes"):
        Pool(made, memory="8KiB")
    with pytest.raises(ValueError, match=r"state_every=6 is not a multiple of block_size=4"):
        Pool(made, num_blocks=8, block_size=4, state_every=6)
    with pytest.raises(ValueError, match=r"num_states=0 "):
        Pool(made, num_blocks=8, num_states=0)
    with pytest.raises(ValueError, match=r"num_states=3, state_every=None, but the model keeps no states"):
        Pool(model_of("deepseek_v32"), num_blocks=8, num_states=3)
    with pytest.raises(ValueError, match=r"Qwen3NextForCausalLM keeps states, for which a pool has slots: give pool="):
        Scheduler(made, pool.config)


def test_index_keys_of_a_prefix_are_found_with_it() -> None:
    pool = Pool(model_of("deepseek_v32"), num_blocks=64, block_size=4)
    chat = prompt(21, 1)
    for turn in range(2):
        [tokens] = kvblocks.generate(model_of("deepseek_v32"), [chat], pool=pool, **QUIET).run()
        assert tokens == answer("deepseek_v32", tuple(chat))
        chat += tokens + prompt(3, 2 + turn)
    held = PagedCache(model_of("deepseek_v32").config, pool=pool)
    ids = torch.tensor([chat])
    assert held.begin(ids) >= 36
    made: Any = model_of("deepseek_v32")
    out = made.generate(ids, attention_mask=torch.ones_like(ids), cache=held, max_new_tokens=NEW, do_sample=False)
    assert out[0, len(chat) :].tolist() == answer("deepseek_v32", tuple(chat))


@pytest.mark.parametrize("name", ["qwen3_next", "lfm3"])
def test_answers_to_one_prompt_go_on_apart_and_are_preempted(name: str) -> None:
    """Each answer has a state of its own from its first token on, which no other's writes."""
    ids = prompt(14, 5)
    alone = [
        kvblocks.generate(model_of(name), [ids], temperature=1.0, seed=seed, **QUIET).run()[0] for seed in (1, 2, 3)
    ]
    for blocks in (64, 9):
        pool = pool_of(name, num_blocks=blocks)
        with kvblocks.generate(model_of(name), [ids], temperature=1.0, seed=1, n=3, pool=pool, **QUIET) as run:
            assert run.run() == alone
            assert (run.scheduler.manager.stats().preemptions > 0) == (blocks == 9)
            spent(run)


@pytest.mark.parametrize("name", ["falcon_h1", "lfm3"])
def test_a_pass_that_fails_may_be_repeated(name: str) -> None:
    made: Any = model_of(name)
    failing = [False]

    def fail(*_: Any) -> None:
        if failing[0]:
            raise RuntimeError("in the middle of a pass")

    part = made.model.layers[-1]
    hook = part.feed_forward.register_forward_pre_hook(fail)
    try:
        prompts = [prompt(9, 1), prompt(14, 2)]
        with kvblocks.generate(made, prompts, pool=pool_of(name), max_batch_tokens=11, **QUIET) as run:
            while run.scheduler.num_unfinished:
                failing[0] = True
                with pytest.raises(RuntimeError, match="in the middle"):
                    run.step()
                failing[0] = False
                run.scheduler.manager.audit()
                run.step()
            assert [stream.tokens for stream in run] == [answer(name, tuple(ids)) for ids in prompts]
            spent(run)
    finally:
        hook.remove()


def test_cancelled_and_preferred_requests() -> None:
    name = "qwen3_next"
    prompts = [prompt(9, number) for number in range(3)]
    with kvblocks.generate(model_of(name), prompts, block_size=4, num_blocks=12, max_seqs=2, **QUIET) as run:
        run.step()
        run.step()
        run[0].cancel()
        urgent = run.add(prompt(11, 7), priority=1)
        run.run()
        assert urgent.tokens == answer(name, tuple(prompt(11, 7)))
        assert [run[number].tokens for number in (1, 2)] == [answer(name, tuple(ids)) for ids in prompts[1:]]
        spent(run)


def test_new_weights_are_for_states_too() -> None:
    name = "qwen3_next"
    ids = prompt(9, 1)
    with kvblocks.generate(model_of(name), [ids], block_size=4, **QUIET) as run:
        run.step()
        run.step()
        run.reset_prefix_cache()
        assert run.scheduler.manager.num_free_states == run.scheduler.manager.num_states
        assert run.run() == [answer(name, tuple(ids))]


@pytest.mark.parametrize("name", ["qwen3_next", "lfm3"])
def test_between_the_passes_of_a_cache_on_the_same_pool(name: str) -> None:
    """The last pass of a cache that keeps states, or records windows, is open until something else begins."""
    made: Any = model_of(name)
    pool, ids = pool_of(name), torch.tensor([prompt(17, 1)])
    held = PagedCache(made.config, pool=pool)
    held.activate_past_recording()
    held.begin(ids)
    out = made.generate(ids, attention_mask=torch.ones_like(ids), cache=held, max_new_tokens=3, do_sample=False)
    with kvblocks.generate(made, [prompt(9, 2)], pool=pool, **QUIET) as run:
        run.step()
        assert held.get_seq_length() == 19
        with torch.inference_mode():
            made(out[:, 19:], cache=held, use_cache=True)
        assert run.run() == [answer(name, tuple(prompt(9, 2)))]
    assert out[0, 17:].tolist() == answer(name, tuple(prompt(17, 1)))[:3]
    held.tell(out)
    held.close()
    spent(run)


def test_a_crop_that_is_refused_changes_nothing() -> None:
    """Once something else has begun on the pool windows have moved on, and convolutions were recorded further back."""
    made: Any = model_of("lfm3")
    pool, ids = pool_of("lfm3"), torch.tensor([prompt(22, 1)])
    with PagedCache(made.config, pool=pool) as held, torch.inference_mode():
        held.activate_past_recording()
        made(ids[:, :21], cache=held, use_cache=True)
        kvblocks.generate(made, [prompt(9, 2)], pool=pool, **QUIET).run()
        with pytest.raises(ValueError, match="17 columns would be left, but windows have moved on: at least 20 must"):
            held.crop(-4)
        got = made(ids[:, 21:], cache=held, use_cache=True).logits[:, -1]
        torch.testing.assert_close(got, made(ids, use_cache=False).logits[:, -1], rtol=1e-4, atol=1e-4)
    pool.manager.audit()


def test_served_by_gathering() -> None:
    for name in NAMES:
        with pytest.raises(UnsupportedModel, match="keeps more than the K and V that attention reads: index keys, or"):
            PagedModel(model_of(name))
        assert isinstance(served(model_of(name)), CachedModel)
