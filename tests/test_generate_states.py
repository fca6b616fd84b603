"""`kvblocks.generate` of models that keep more than K and V: states of sequences, index keys of tokens."""

from functools import cache
from typing import Any

import pytest
import tiny_models
import torch
from transformers import DynamicCache, PreTrainedModel

import kvblocks
from kvblocks import Pool
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


def spent(run: Generation) -> None:
    """Nothing is held any more: no blocks, no states."""
    scheduler = run.scheduler
    scheduler.manager.audit()
    assert scheduler.manager.num_free_blocks == scheduler.manager.num_blocks
    assert len(scheduler._states) == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", [7, 64])
def test_preempted_and_of_many_lengths(name: str, chunk: int) -> None:
    prompts = [prompt(5 + 4 * (number % 4), number) for number in range(6)]
    with kvblocks.generate(
        model_of(name), prompts, num_blocks=16, block_size=4, max_batch_tokens=chunk, **QUIET
    ) as run:
        assert run.run() == [answer(name, tuple(ids)) for ids in prompts]
        assert run.scheduler.manager.stats().preemptions > 0
        spent(run)
    assert verify(model_of(name), run[0].request, run[0].tokens).identical


@pytest.mark.parametrize("name", WITH_STATES)
def test_a_prefix_is_computed_anew_as_its_state_is_gone(name: str) -> None:
    pool = Pool(model_of(name), num_blocks=64, block_size=4)
    chat = prompt(21, 1)
    for turn in range(2):
        [tokens] = kvblocks.generate(model_of(name), [chat], pool=pool, max_batch_tokens=13, **QUIET).run()
        assert tokens == answer(name, tuple(chat))
        chat += tokens + prompt(3, 2 + turn)
    held = PagedCache(model_of(name).config, pool=pool)
    ids = torch.tensor([chat])
    assert held.begin(ids) == 0
    made: Any = model_of(name)
    out = made.generate(ids, attention_mask=torch.ones_like(ids), cache=held, max_new_tokens=NEW, do_sample=False)
    assert out[0, len(chat) :].tolist() == answer(name, tuple(chat))
    held.close()
    assert pool.manager.stats().hit_tokens == 0
    assert pool.manager.num_free_blocks == 64


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
        with kvblocks.generate(
            model_of(name), [ids], temperature=1.0, seed=1, n=3, block_size=4, num_blocks=blocks, **QUIET
        ) as run:
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
        with kvblocks.generate(made, prompts, block_size=4, max_batch_tokens=11, **QUIET) as run:
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
        assert len(run.scheduler._states) == 0
        assert run.run() == [answer(name, tuple(ids))]


def test_served_by_gathering() -> None:
    for name in NAMES:
        with pytest.raises(UnsupportedModel, match="keeps more than the K and V that attention reads: index keys, or"):
            PagedModel(model_of(name))
        assert isinstance(served(model_of(name)), CachedModel)
