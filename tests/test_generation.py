"""The example engine against greedy generation over transformers' contiguous cache, token by token."""

from collections.abc import Sequence
from functools import cache
from itertools import count
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

import kvblocks
from kvblocks import demo
from kvblocks.config import CacheConfig
from kvblocks.errors import NoFreeBlocks
from kvblocks.generation.scheduler import Request, Scheduler, Token
from kvblocks.generation.verify import verify
from kvblocks.integrations.transformers import kv_shape
from kvblocks.sizes import LAYOUTS

# These tensors are tiny, and threads would only wait for each other.
torch.set_num_threads(1)

VOCABULARY = 61


@cache
def tiny_llama() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    model = LlamaForCausalLM(config)
    model.train(False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 1.5 * weight.shape[1] ** -0.5)
    return model


@cache
def small_llama() -> PreTrainedModel:
    return demo.small_llama()


@cache
def expected(model: PreTrainedModel, request: Request) -> list[int]:
    """The tokens of a request generated alone over `DynamicCache`."""
    past = DynamicCache(config=model.config)
    tokens: list[int] = []
    feed = list(request.prompt)
    with torch.inference_mode():
        while len(tokens) < request.max_new_tokens and not request.stop_tokens.intersection(tokens):
            output = model(input_ids=torch.tensor([feed]), past_key_values=past, use_cache=True)
            feed = [int(output.logits[0, -1].argmax())]
            tokens += feed
    return tokens


def sizes(model: PreTrainedModel, num_blocks: int, block_size: int) -> CacheConfig:
    shape = kv_shape(model.config)
    return CacheConfig(
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        num_gpu_blocks=num_blocks,
        block_size=block_size,
    )


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return tuple(torch.randint(0, VOCABULARY, (length,), generator=generator).tolist())


def run(scheduler: Scheduler, requests: Sequence[Request]) -> list[list[int]]:
    ids = [scheduler.add(request) for request in requests]
    tokens: dict[int, list[int]] = {request_id: [] for request_id in ids}
    for new in scheduler.stream():
        tokens[new.request_id].append(new.token)
    return list(tokens.values())


def check_all_given_back(scheduler: Scheduler) -> None:
    scheduler.manager.audit()
    assert scheduler.manager.num_free_blocks == scheduler.manager.num_blocks
    assert scheduler.manager.num_sequences == 0


@st.composite
def requests(draw: st.DrawFn) -> Request:
    stop = draw(st.sets(st.integers(0, VOCABULARY - 1), max_size=6))
    # Few seeds, so that prompts share prefixes.
    return Request(prompt(draw(st.integers(1, 30)), draw(st.integers(0, 1))), draw(st.integers(1, 8)), frozenset(stop))


@settings(max_examples=40)
@given(st.data())
def test_any_requests_in_any_pool(data: st.DataObject) -> None:
    model = tiny_llama()
    todo = data.draw(st.lists(requests(), min_size=1, max_size=6))
    block_size = data.draw(st.sampled_from([1, 2, 3, 5, 8, 16, 64]))
    longest = max(len(request.prompt) + request.max_new_tokens - 1 for request in todo)
    least = -(-longest // block_size)
    with Scheduler(
        model,
        sizes(model, data.draw(st.integers(least, least + 6)), block_size),
        layout=data.draw(st.sampled_from(LAYOUTS)),
        max_batch_tokens=data.draw(st.integers(1, 40)),
        max_seqs=data.draw(st.integers(1, 4)),
        watermark=data.draw(st.sampled_from([0.0, 0.01, 0.3])),
    ) as scheduler:
        tokens = run(scheduler, todo)
        check_all_given_back(scheduler)
    assert tokens == [expected(model, request) for request in todo]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block_size", [1, 7, 16])
def test_preempted_sequences_lose_no_token(layout: str, block_size: int) -> None:
    model = small_llama()
    todo = [Request(demo.encode(text), 20, frozenset([demo.EOS])) for text in demo.PROMPTS[:9]]
    longest = max(len(request.prompt) for request in todo) + 19
    config = sizes(model, -(-longest // block_size), block_size)
    with Scheduler(model, config, layout=layout, max_batch_tokens=50, watermark=0.0) as scheduler:
        tokens = run(scheduler, todo)
        stats = scheduler.manager.stats()
        check_all_given_back(scheduler)
    assert tokens == [expected(model, request) for request in todo]
    assert stats.preemptions > 0
    assert stats.resumed == stats.preemptions
    assert stats.peak_used_blocks == config.num_gpu_blocks


def test_half_precision_differs_at_near_ties_only() -> None:
    model = demo.small_llama().bfloat16()
    todo = [Request(demo.encode(text), 24, frozenset([demo.EOS])) for text in demo.PROMPTS]
    with Scheduler(model, sizes(model, 40, 8), max_batch_tokens=37) as scheduler:
        tokens = run(scheduler, todo)
        assert scheduler.engine.dtype == torch.bfloat16
    verdicts = [verify(model, request, new) for request, new in zip(todo, tokens, strict=True)]
    assert all(verdict.passed for verdict in verdicts), [str(verdict) for verdict in verdicts]
    assert sum(verdict.identical for verdict in verdicts) >= len(verdicts) // 2


def test_requests_may_arrive_during_the_run() -> None:
    model = tiny_llama()
    first, late = Request(prompt(12), 10), Request(prompt(5), 6)
    tokens: dict[int, list[int]] = {0: [], 1: []}
    with Scheduler(model, sizes(model, 8, 8)) as scheduler:
        scheduler.add(first)
        for number, new in enumerate(scheduler.stream()):
            tokens[new.request_id].append(new.token)
            if number == 3:
                assert scheduler.add(late) == 1
        assert scheduler.num_unfinished == 0
    assert list(tokens.values()) == [expected(model, first), expected(model, late)]


def test_a_long_prompt_does_not_hold_up_those_who_decode() -> None:
    model = tiny_llama()
    with Scheduler(model, sizes(model, 20, 8), max_batch_tokens=8, max_seqs=4) as scheduler:
        scheduler.add(Request(prompt(4), 30))
        first = scheduler.step()
        assert [new.request_id for new in first] == [0]
        scheduler.add(Request(prompt(70), 2))
        # 70 tokens go 7 at a time beside the one that decodes.
        for _ in range(9):
            assert [new.request_id for new in scheduler.step()] == [0]
        assert {new.request_id for new in scheduler.step()} == {0, 1}


def test_the_newest_gives_way_and_the_oldest_gets_on() -> None:
    model = tiny_llama()
    todo = [Request(prompt(9, seed), 24) for seed in range(4)]
    with Scheduler(model, sizes(model, 8, 4), watermark=0.0) as scheduler:
        for request in todo:
            scheduler.add(request)
        ended = [new.request_id for new in scheduler.stream() if new.finish]
        assert scheduler.manager.stats().preemptions > 0
    assert ended == sorted(ended)


@pytest.mark.parametrize(("watermark", "ids"), [(0.0, [0, 1]), (0.5, [0])])
def test_the_watermark_keeps_room_for_those_who_run(watermark: float, ids: list[int]) -> None:
    model = tiny_llama()
    with Scheduler(model, sizes(model, 10, 4), watermark=watermark) as scheduler:
        scheduler.add(Request(prompt(12), 4))
        scheduler.add(Request(prompt(15), 4))
        assert [new.request_id for new in scheduler.step()] == ids


def test_blocks_that_others_hold_are_not_waited_for() -> None:
    model = tiny_llama()
    with Scheduler(model, sizes(model, 4, 8)) as scheduler:
        theirs, _ = scheduler.manager.admit(range(9))
        scheduler.add(Request(prompt(20), 2))
        with pytest.raises(NoFreeBlocks):
            next(scheduler.stream())
        scheduler.manager.free(theirs)
        tokens = [new.token for new in scheduler.stream()]
    assert tokens == expected(model, Request(prompt(20), 2))


def test_a_repeated_prompt_hits_the_cache() -> None:
    model = tiny_llama()
    request = Request(prompt(33), 4)
    with Scheduler(model, sizes(model, 20, 8)) as scheduler:
        once = run(scheduler, [request])
        again = run(scheduler, [request])
        assert scheduler.manager.stats().hit_tokens == 32
    assert once == again == [expected(model, request)]


def test_finish_reasons() -> None:
    model = tiny_llama()
    plain = expected(model, Request(prompt(6), 8))
    stop = plain[3]
    length = plain.index(stop) + 1
    with Scheduler(model, sizes(model, 20, 8)) as scheduler:
        scheduler.add(Request(prompt(6), 8))
        scheduler.add(Request(prompt(6), 8, frozenset([stop])))
        scheduler.add(Request(prompt(6), length, frozenset([stop])))
        news = list(scheduler.stream())
    last = {new.request_id: new for new in news if new.finish}
    assert last[0] == Token(0, plain[-1], "length")
    assert last[1] == Token(1, stop, "stop")
    assert last[2] == Token(2, stop, "stop")
    assert [new.token for new in news if new.request_id == 1] == plain[:length]


def test_a_failed_pass_can_be_repeated() -> None:
    model = tiny_llama()
    passes = count()

    def stumble(*_: Any) -> None:
        if next(passes) % 3 == 1:
            raise RuntimeError("device lost")

    todo = [Request(prompt(length), 8) for length in (3, 20, 11)]
    tokens: list[list[int]] = [[], [], []]
    failures = 0
    hook = model.get_submodule("model.layers.1").register_forward_pre_hook(stumble)
    with Scheduler(model, sizes(model, 6, 8), max_batch_tokens=16, max_seqs=3) as scheduler:
        for request in todo:
            scheduler.add(request)
        while scheduler.num_unfinished:
            try:
                for new in scheduler.step():
                    tokens[new.request_id].append(new.token)
            except RuntimeError:
                scheduler.manager.audit()
                failures += 1
        check_all_given_back(scheduler)
    hook.remove()
    assert failures > 5
    assert tokens == [expected(model, request) for request in todo]


def test_nothing_to_do() -> None:
    model = tiny_llama()
    with Scheduler(model, sizes(model, 4, 8)) as scheduler:
        assert scheduler.step() == []
        assert list(scheduler.stream()) == []


def test_the_model_gets_its_attention_back() -> None:
    model = tiny_llama()
    before = model.config._attn_implementation
    seen = []
    hook = model.register_forward_pre_hook(lambda *_: seen.append(model.config._attn_implementation))
    with Scheduler(model, sizes(model, 4, 8)) as scheduler:
        scheduler.add(Request(prompt(5), 3))
        scheduler.step()
        assert model.config._attn_implementation == before
    hook.remove()
    assert seen == ["kvblocks"]
    with pytest.raises(ValueError, match="layout"):
        Scheduler(model, sizes(model, 4, 8), layout="DNH")
    assert model.config._attn_implementation == before


def test_two_schedulers_take_turns_with_a_model_and_none_runs_after_close() -> None:
    model = tiny_llama()
    todo = [Request(prompt(3), 6), Request(prompt(9), 6)]
    schedulers = [Scheduler(model, sizes(model, 4, 8)) for _ in todo]
    for scheduler, request in zip(schedulers, todo, strict=True):
        scheduler.add(request)
    steps = [[scheduler.step()[0].token for scheduler in schedulers] for _ in range(6)]
    assert [list(tokens) for tokens in zip(*steps, strict=True)] == [expected(model, request) for request in todo]
    with Scheduler(model, sizes(model, 4, 8)) as scheduler:
        scheduler.add(Request(prompt(3), 2))
        assert len(scheduler.step()) == 1
    with pytest.raises(RuntimeError, match="the scheduler is closed"):
        scheduler.add(Request(prompt(3), 2))
    with pytest.raises(RuntimeError, match="the scheduler is closed"):
        scheduler.step()


def test_errors() -> None:
    model = tiny_llama()
    config = sizes(model, 4, 8)
    with pytest.raises(ValueError, match="max_seqs=0 and max_batch_tokens=512 must be at least 1"):
        Scheduler(model, config, max_seqs=0)
    with pytest.raises(ValueError, match="max_batch_tokens=0"):
        Scheduler(model, config, max_batch_tokens=0)
    with Scheduler(model, config) as scheduler:
        with pytest.raises(ValueError, match="0 prompt tokens"):
            scheduler.add(Request((), 4))
        with pytest.raises(ValueError, match="max_new_tokens=0"):
            scheduler.add(Request((1,), 0))
        with pytest.raises(ValueError, match=r"30 prompt tokens and max_new_tokens=4 need 33 slots; .* have 32"):
            scheduler.add(Request(prompt(30), 4))
        for token in (-1, VOCABULARY):
            with pytest.raises(ValueError, match=f"token {token} is in the prompt; the model knows 0 to 60"):
                scheduler.add(Request((1, token), 2))
        assert scheduler.num_unfinished == 0
        tokens = run(scheduler, [Request(prompt(30), 3)])
    assert tokens == [expected(model, Request(prompt(30), 3))]
    with (
        Scheduler(model, sizes(model, 100, 8)) as scheduler,
        pytest.raises(ValueError, match="the cache and the model have 128"),
    ):
        scheduler.add(Request(prompt(100), 30))


def windowed(window: int) -> PreTrainedModel:
    """A tiny Mistral, every layer of which attends to a window."""
    config = MistralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=window,
        max_position_embeddings=4096,
    )
    torch.manual_seed(1)
    model = MistralForCausalLM(config)
    model.train(False)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 1.5 * weight.shape[1] ** -0.5)
    return model


def test_where_all_layers_have_windows_a_sequence_may_be_longer_than_the_pool() -> None:
    model = windowed(16)
    request = Request(prompt(300), 60)
    with kvblocks.generate(model, [request]) as run:
        assert run.scheduler.manager.num_blocks * 16 < 300 + 300
        assert run.run() == [expected(model, request)]
    # The smallest pool that a manager can run it in: a window that begins inside a block.
    todo = [request, Request(prompt(200, 1), 30), Request(prompt(9), 70)]
    for num_blocks in (5, 6, 9):
        with kvblocks.generate(model, todo, num_blocks=num_blocks, block_size=4) as run:
            assert run.run() == [expected(model, request) for request in todo]
            check_all_given_back(run.scheduler)
    with pytest.raises(ValueError, match="need 359 slots; the cache and the model have 16 for one sequence"):
        kvblocks.generate(model, [request], num_blocks=4, block_size=4)
