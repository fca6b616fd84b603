"""`kvblocks.generate`: streams, arrival, cancellation and limits, against one prompt at a time over `DynamicCache`."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import tiny_models
import torch
from test_generation import VOCABULARY, expected, prompt, tiny_llama
from torch import Tensor
from transformers.cache_utils import DynamicCache

import kvblocks
from kvblocks.errors import OutOfMemory
from kvblocks.generation.scheduler import Request


def answers(*prompts: tuple[int, ...], new: int = 8) -> list[list[int]]:
    return [expected(tiny_llama(), Request(ids, new)) for ids in prompts]


def test_one_line_and_the_model_is_as_before() -> None:
    model = tiny_llama()
    before = model.config._attn_implementation
    prompts = [prompt(12), prompt(5), prompt(30)]
    streams = kvblocks.generate(model, prompts, max_new_tokens=8, stop_tokens=[])
    assert model.config._attn_implementation == before
    assert [list(stream) for stream in streams] == answers(*prompts)
    assert model.config._attn_implementation == before
    assert [stream.finish for stream in streams] == ["length"] * 3
    assert list(streams[0]) == []  # each token is given once


def test_tensors_arrays_and_requests() -> None:
    given: list[Any] = [
        torch.tensor(prompt(7)),
        list(prompt(9)),
        Request(prompt(4), 3),
        torch.tensor(prompt(5)).numpy(),
    ]
    tokens = kvblocks.generate(tiny_llama(), given, max_new_tokens=8, stop_tokens=()).run()
    plain = answers(prompt(7), prompt(9), prompt(4), prompt(5))
    assert tokens == [plain[0], plain[1], plain[2][:3], plain[3]]


def test_reading_one_stream_runs_the_others_beside_it() -> None:
    with kvblocks.generate(tiny_llama(), [prompt(12), prompt(5)], max_new_tokens=8, stop_tokens=[]) as run:
        first = [next(run[0]) for _ in range(4)]
        assert len(run[1].tokens) == 4
        assert [*first, *run[0]] == answers(prompt(12))[0]
        assert run[1].finish == "length"
        assert list(run[1]) == answers(prompt(5))[0]


def test_arrival_during_the_run_with_limits_of_its_own() -> None:
    plain = answers(prompt(6, 1), new=12)[0]
    with kvblocks.generate(tiny_llama(), [prompt(12)], max_new_tokens=8, stop_tokens=[], num_blocks=40) as run:
        next(run[0])
        late = run.add(prompt(6, 1), max_new_tokens=12, stop_tokens=[plain[5]])
        usual = run.add(prompt(6, 1))
        assert late.read() == plain[: plain.index(plain[5]) + 1]
        assert late.finish == "stop"
        assert usual.read() == plain[:8]
        assert run[0].read() == answers(prompt(12))[0]
        assert len(run) == 1  # who asks later holds the stream
        # All has ended; a request that comes then starts it again.
        assert run.num_unfinished == 0
        assert run.add(prompt(5)).read() == answers(prompt(5))[0]


def test_cancellation_gives_blocks_back_and_leaves_the_others() -> None:
    with kvblocks.generate(
        tiny_llama(), [prompt(20), prompt(9, 1), prompt(5)], max_new_tokens=8, stop_tokens=[], max_seqs=2
    ) as run:
        manager = run.scheduler.manager
        next(run[0])
        run[0].cancel()  # it runs
        run[2].cancel()  # it waits
        run[0].cancel()
        assert manager.num_sequences == 1
        assert run[1].read() == answers(prompt(9, 1))[0]
        assert [stream.finish for stream in run] == ["cancelled", "length", "cancelled"]
        assert run[0].tokens == answers(prompt(20))[0][:1]
        assert list(run[0]) == list(run[2]) == []
        run[1].cancel()
        assert run[1].finish == "length"
        manager.audit()
        assert manager.num_free_blocks == manager.num_blocks


def test_leaving_ends_what_is_left() -> None:
    model = tiny_llama()
    before = model.config._attn_implementation
    with kvblocks.generate(model, [prompt(20), prompt(5)], max_new_tokens=8) as run:
        next(run[0])
        assert repr(run).startswith("Generation(streams=2, unfinished=2, pool=Pool(num_blocks=")
    assert {stream.finish for stream in run} == {"cancelled"}
    assert model.config._attn_implementation == before
    with pytest.raises(RuntimeError, match="the scheduler is closed"):
        run.add(prompt(3))
    abandoned = kvblocks.generate(model, [prompt(20)], max_new_tokens=8)
    next(abandoned[0])
    assert model.config._attn_implementation == before


def test_stop_tokens_are_the_models_by_default() -> None:
    model = tiny_llama()
    plain = answers(prompt(12))[0]
    settings: Any = model.generation_config
    kept, settings.eos_token_id = settings.eos_token_id, [plain[2], VOCABULARY]
    try:
        [stream] = kvblocks.generate(model, [prompt(12)], max_new_tokens=8)
        assert stream.read() == plain[: plain.index(plain[2]) + 1]
        assert stream.finish == "stop"
        [stream] = kvblocks.generate(model, [prompt(12)], max_new_tokens=8, stop_tokens=plain[4])
        assert stream.read() == plain[: plain.index(plain[4]) + 1]
    finally:
        settings.eos_token_id = kept


def test_choose_decides_the_tokens() -> None:
    def worst(logits: Tensor) -> Tensor:
        return logits.argmin(-1)

    [stream] = kvblocks.generate(tiny_llama(), [prompt(12)], max_new_tokens=3, stop_tokens=[], choose=worst)
    with torch.inference_mode():
        logits = tiny_llama()(input_ids=torch.tensor([prompt(12)])).logits[0, -1]
    assert stream.read()[0] == int(logits.argmin())
    [stream] = kvblocks.generate(tiny_llama(), [prompt(12)], max_new_tokens=3, choose=lambda logits: logits)
    with pytest.raises(TypeError, match=r"choose returned torch.float32 \[1, 61\]; .* it must be int64 \[1\]"):
        stream.read()
    stream.cancel()


def test_stop_tokens_may_be_a_tensor() -> None:
    [answer] = answers(prompt(12))
    [stream] = kvblocks.generate(tiny_llama(), [prompt(12)], max_new_tokens=8, stop_tokens=torch.tensor([answer[2]]))
    assert stream.read() == answer[: answer.index(answer[2]) + 1]
    assert stream.finish == "stop"


@pytest.mark.parametrize("wrong", [-1, VOCABULARY, 2**40])
def test_a_token_that_the_model_does_not_know_may_be_chosen_again(wrong: int) -> None:
    """No sequence has moved, so the others lose nothing."""
    bad = [wrong]

    def choose(logits: Tensor) -> Tensor:
        tokens = logits.argmax(-1)
        if bad:
            tokens[-1] = bad.pop()
        return tokens

    run = kvblocks.generate(tiny_llama(), [prompt(12), prompt(5)], max_new_tokens=8, stop_tokens=[], choose=choose)
    with pytest.raises(ValueError, match=f"choose returned token {wrong}; .* it must be 0 to {VOCABULARY - 1}"):
        run[0].read()
    assert [stream.read() for stream in run] == answers(prompt(12), prompt(5))


def test_a_stream_may_be_cancelled_while_tokens_are_chosen() -> None:
    def choose(logits: Tensor) -> Tensor:
        run[0].cancel()
        return logits.argmax(-1)

    run = kvblocks.generate(tiny_llama(), [prompt(12), prompt(5)], max_new_tokens=8, stop_tokens=[], choose=choose)
    assert run[1].read() == answers(prompt(5))[0]
    assert [stream.finish for stream in run] == ["cancelled", "length"]


def test_a_prompt_waits_for_what_another_is_about_to_compute() -> None:
    shared = prompt(96)
    prompts = [(*shared, number) for number in range(6)]
    with kvblocks.generate(tiny_llama(), prompts, max_new_tokens=4, stop_tokens=[], max_batch_tokens=64) as run:
        assert run.run() == answers(*prompts, new=4)
        stats = run.scheduler.manager.stats()
    # The last 32 that they share were not worth another pass.
    assert stats.hit_tokens == 5 * 64
    # Short ones are not worth a pass.
    prompts = [(*shared[:40], number) for number in range(6)]
    with kvblocks.generate(tiny_llama(), prompts, max_new_tokens=4, stop_tokens=[]) as run:
        run.step()
        assert run.scheduler.manager.num_sequences == 6


def test_the_cache_is_as_large_as_the_prompts_need() -> None:
    prompts = [prompt(30), prompt(10), prompt(3)]
    run = kvblocks.generate(tiny_llama(), prompts, max_new_tokens=8, stop_tokens=[], block_size=4)
    assert run.scheduler.manager.num_blocks == -(-37 // 4) + -(-17 // 4) + -(-10 // 4) + 1
    run.run()
    assert run.scheduler.manager.stats().preemptions == 0
    run.close()
    with kvblocks.generate(tiny_llama(), [], memory="64KiB") as empty:
        assert empty.scheduler.engine.memory_bytes <= 64 << 10
        assert empty.run() == []
        assert empty.add(prompt(5), max_new_tokens=8, stop_tokens=[]).read() == answers(prompt(5))[0]


@pytest.mark.parametrize(
    ("prompts", "options", "kind", "message"),
    [
        ([], {}, ValueError, "no prompt says how large the cache must be; give memory or num_blocks"),
        ([[1]], {"memory": 1, "num_blocks": 1}, ValueError, "both say how large"),
        ([[1]], {"memory": "1 bag"}, ValueError, "is not a size"),
        ([[1]], {"memory": 0}, ValueError, "memory=0 must be 1 to"),
        ([[1]], {"memory": 1.5}, TypeError, "memory is a float; give bytes as an int, or text like"),
        ([[1]], {"memory": True}, TypeError, "memory is a bool"),
        ([[1]], {"memory": 100}, ValueError, "memory=100 holds no block; one is"),
        ([[1]], {"num_blocks": 0}, ValueError, "num_gpu_blocks=0"),
        ([1, 2, 3], {}, TypeError, r"prompts is one flat list of 3 ids; give a list of prompts: \[ids\]"),
        ("Hello", {}, TypeError, "prompts is the str 'Hello'; give a list of prompts, as token ids"),
        (None, {}, TypeError, "prompts is the NoneType None; give a list"),
        ([[1]], {"pool": "mine"}, TypeError, r"pool is a str; give a kvblocks\.Pool"),
        (["Hello"], {}, TypeError, r"a prompt is the str 'Hello'; give token ids"),
        ([[1, 2.5]], {}, TypeError, r"a prompt holds 2.5 of type float"),
        (
            [[list(range(50))]],
            {},
            TypeError,
            r"a prompt holds \[0, 1, .{30,36} of type list; give .* one flat list a prompt",
        ),
        ([[1], []], {}, ValueError, "a request of 0 prompt tokens"),
        ([[VOCABULARY]], {}, ValueError, "token 61 is in the prompt; the model knows 0 to 60"),
        ([[1]], {"max_new_tokens": 2.5, "num_blocks": 8}, TypeError, "max_new_tokens=2.5 must be an int"),
        ([[1]], {"stop_tokens": ["1"]}, TypeError, "stop_tokens holds '1' of type str"),
        ([Request((1,), 4, frozenset({"x"}))], {}, TypeError, "stop_tokens holds 'x' of type str"),  # type: ignore[arg-type]
        ([[1]], {"max_new_tokens": 0}, ValueError, "max_new_tokens=0; both must be at least 1"),
        ([[1]], {"max_new_tokens": 500}, ValueError, "need 500 slots; the cache and the model have 128"),
        ([[1]], {"max_seqs": 0}, ValueError, "max_seqs=0"),
        ([[1]], {"layout": "DNH"}, ValueError, "layout"),
        ([[1]], {"num_blocks": 2**31 - 1, "block_size": 4096}, OutOfMemory, "bytes"),
    ],
)
def test_what_cannot_be(prompts: Any, options: dict[str, Any], kind: type[Exception], message: str) -> None:
    model = tiny_llama()
    before = model.config._attn_implementation
    with pytest.raises(kind, match=message):
        kvblocks.generate(model, prompts, **options)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    "kind",
    ["gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "ministral", "gpt_oss", "llama4_text", "cohere2"],
)
def test_hybrid_families_under_preemption_and_with_hits(kind: str) -> None:
    """Layers of different reach over one small pool, with windows and chunks far shorter than the sequences."""
    config, built = tiny_models.build(kind)
    model: Any = built
    model.generation_config.eos_token_id = None
    text = torch.randint(3, 90, (30,), generator=torch.Generator().manual_seed(1)).tolist()
    prompts = [text + [i + 3] * (i + 1) for i in range(6)]
    right = []
    for ids in prompts:
        past = DynamicCache(config=config)
        out = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=24, past_key_values=past)
        right.append(out[0, len(ids) :].tolist())
    run = kvblocks.generate(
        model, prompts, max_new_tokens=24, stop_tokens=[], num_blocks=40, block_size=4, max_batch_tokens=24
    )
    assert [stream.read() for stream in run] == right
    manager = run.scheduler.manager
    assert len(manager.groups) > 1
    assert manager.stats().preemptions > 0
    assert manager.stats().hit_tokens > 0


def test_between_passes_a_model_is_free_for_anything() -> None:
    """An early break, an exception, and what else is done with the model meanwhile."""
    model: Any = tiny_llama()
    ids = torch.tensor([prompt(20)])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}

    def by_itself() -> None:
        assert model.generate(ids, **options)[0, 20:].tolist() == answers(prompt(20))[0]

    run = kvblocks.generate(model, [prompt(12), prompt(30)], max_new_tokens=8, stop_tokens=[])
    for stream in run:
        for _ in stream:
            break
        by_itself()
        break
    other = kvblocks.generate(model, [prompt(5)], max_new_tokens=8, stop_tokens=[])
    next(other[0])
    assert run[0].read() == answers(prompt(12))[0]
    assert other.run() == answers(prompt(5))

    def stumble(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.get_submodule("model.layers.1").register_forward_pre_hook(stumble)
    late = run.add(prompt(12))
    with pytest.raises(KeyboardInterrupt):
        late.read()
    hook.remove()
    by_itself()
    assert late.read() == answers(prompt(12))[0]


def test_threads_wait_for_each_others_passes() -> None:
    model = tiny_llama()
    prompts = [prompt(9, seed) for seed in range(4)]
    right = answers(*prompts)
    with ThreadPoolExecutor(4) as pool:

        def alone(ids: tuple[int, ...]) -> list[int]:
            return kvblocks.generate(model, [ids], max_new_tokens=8, stop_tokens=[]).run()[0]

        assert list(pool.map(alone, prompts)) == right
