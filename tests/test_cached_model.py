"""Models whose layers cannot read blocks: `kvblocks.generate` gathers K and V for them, rows of one length together."""

import logging
from functools import cache
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import kvblocks
from kvblocks import Pool
from kvblocks.generation.verify import verify
from kvblocks.integrations.transformers import CachedModel, PagedModel, UnsupportedModel, served

# These tensors are tiny, and threads would only wait for each other.
torch.set_num_threads(1)

NEW = 12
QUIET: dict[str, Any] = {"max_new_tokens": NEW, "stop_tokens": []}


@cache
def model_of(name: str) -> PreTrainedModel:
    return tiny_models.sharp(name)


def prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    made: list[int] = torch.randint(3, tiny_models.VOCABULARY, (length,), generator=generator).tolist()
    return made


@cache
def answer(name: str, ids: tuple[int, ...]) -> list[int]:
    """By transformers' own `generate` over its own cache, alone."""
    made: Any = model_of(name)
    given = torch.tensor([ids])
    past = DynamicCache(config=made.config)
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    out = made.generate(
        given, attention_mask=torch.ones_like(given), past_key_values=past, max_new_tokens=NEW, **options
    )
    tokens: list[int] = out[0, len(ids) :].tolist()
    return tokens


# ALiBi; learned positions that the model counts; windows by turns, and no attention registry.
NAMES = ["bloom", "bart", "gpt_neo"]


@pytest.mark.parametrize("name", NAMES)
def test_preempted_and_of_many_lengths(name: str) -> None:
    prompts = [prompt(7 + 3 * (number % 5), number) for number in range(8)]
    with kvblocks.generate(model_of(name), prompts, num_blocks=16, block_size=4, max_batch_tokens=32, **QUIET) as run:
        assert run.run() == [answer(name, tuple(ids)) for ids in prompts]
        stats = run.scheduler.manager.stats()
        assert stats.preemptions > 0
        run.scheduler.manager.audit()
        assert run.scheduler.manager.num_free_blocks == 16
    assert all(verify(model_of(name), stream.request, stream.tokens).identical for stream in run)


def test_a_pass_takes_rows_of_one_length_together() -> None:
    model = model_of("bloom")
    batches: list[tuple[int, ...]] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: batches.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    try:
        run = kvblocks.generate(model, [prompt(9, 1), prompt(9, 2), prompt(12, 3)], **QUIET)
        run.step()
        run.step()
    finally:
        hook.remove()
    assert batches == [(2, 9), (1, 12), (2, 1), (1, 1)]


def test_turns_of_a_chat_find_what_was_computed() -> None:
    model = model_of("bloom")
    pool = Pool(model, num_blocks=64, block_size=4)
    chat: list[int] = []
    for turn in range(3):
        chat += prompt(9, turn)
        [tokens] = kvblocks.generate(model, [chat], pool=pool, **QUIET).run()
        assert tokens == answer("bloom", tuple(chat))
        chat += tokens
    stats = pool.manager.stats()
    assert stats.prompt_tokens - stats.hit_tokens == 9 + (30 - 20) + (51 - 40)
    assert pool.manager.num_free_blocks == 64


def test_answers_to_one_prompt_share_its_blocks() -> None:
    model = model_of("bloom")
    [first, _, third] = kvblocks.generate(model, [prompt(40, 5)], temperature=1.0, seed=1, n=3, block_size=4, **QUIET)
    first.read(), third.read()
    assert first.tokens != third.tokens
    made: Any = model
    for stream, seed in ((first, 1), (third, 3)):
        torch.manual_seed(seed)
        ids = torch.tensor([prompt(40, 5)])
        out = made.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=True, pad_token_id=0
        )
        assert out[0, 40:].tolist() == stream.tokens


def test_why_layers_do_not_read_blocks_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    _, model = tiny_models.build("mpt")
    with caplog.at_level(logging.INFO, "kvblocks"):
        assert isinstance(served(model), CachedModel)
        assert isinstance(served(model), CachedModel)
    assert [record.message for record in caplog.records] == [
        "MptForCausalLM attends by itself, to K and V gathered from the blocks: MptForCausalLM does not use "
        "transformers' attention registry, so its attention cannot be exchanged"
    ]
    _, llama = tiny_models.build("llama")
    assert isinstance(served(llama), PagedModel)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("moshi", "attends past its window within a pass, so it matters how a prompt is split"),
        ("cpmant", "puts tokens of its own before each prompt"),
        ("xlnet", "takes no cache, so the model keeps its K and V elsewhere, or none"),
        ("mamba", "has no layer with K and V, so there is nothing to keep in blocks"),
    ],
)
def test_what_neither_way_serves_is_refused_by_name(name: str, message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        kvblocks.generate(model_of(name), [[5, 6, 7]], **QUIET)


def test_a_model_in_training_mode_is_refused() -> None:
    _, model = tiny_models.build("bloom")
    model.train(True)
    with pytest.raises(UnsupportedModel, match="attention registry"):
        kvblocks.generate(model, [[5, 6, 7]], **QUIET)
    with pytest.raises(UnsupportedModel, match=r"BloomForCausalLM is in training mode; call model\.eval\(\)"):
        CachedModel(model)


def test_a_pass_that_fails_may_be_repeated() -> None:
    model = model_of("bloom")
    failing = [False]

    def fail(*_: Any) -> None:
        if failing[0]:
            raise RuntimeError("in the middle of a pass")

    hook = model.get_submodule("transformer.h.2").register_forward_pre_hook(fail)
    try:
        with kvblocks.generate(model, [prompt(9, 1), prompt(14, 2)], block_size=4, **QUIET) as run:
            for number in range(6):
                failing[0] = True
                with pytest.raises(RuntimeError, match="in the middle"):
                    run.step()
                failing[0] = False
                run.scheduler.manager.audit()
                run.step()
                assert len(run[0].tokens) == number + 1
            assert run.run() == [answer("bloom", tuple(prompt(9, 1))), answer("bloom", tuple(prompt(14, 2)))]
    finally:
        hook.remove()


def test_under_autocast() -> None:
    model = model_of("bloom")
    ids = torch.tensor([prompt(9, 1)])
    made: Any = model
    with torch.autocast("cpu", torch.bfloat16):
        [tokens] = kvblocks.generate(model, [prompt(9, 1)], **QUIET).run()
        out: Tensor = made.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=None
        )
    assert tokens == out[0, 9:].tolist()
