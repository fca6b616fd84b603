"""What a request may ask of its tokens, against `model.generate` of transformers with the same settings."""

import copy
from typing import Any

import pytest
import torch
from test_generation import VOCABULARY, check_all_given_back, expected, prompt, tiny_llama
from test_streams import answers
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.generation.stopping_criteria import StopStringCriteria

import kvblocks
from kvblocks.generation.scheduler import Request, Scheduler

# These tensors are tiny, and threads would only wait for each other.
torch.set_num_threads(1)

LENGTHS = (12, 5, 30)


def llama(**config: Any) -> PreTrainedModel:
    """The tiny Llama, with a generation config of its own."""
    sizes: Any = copy.deepcopy(tiny_llama().config)
    model = LlamaForCausalLM(sizes)
    model.load_state_dict(tiny_llama().state_dict())
    model.train(False)
    kind: Any = GenerationConfig
    model.generation_config = kind(**config)
    return model


def transformers_tokens(model: Any, ids: tuple[int, ...], seed: int = 0, new: int = 10, **options: Any) -> list[int]:
    torch.manual_seed(seed)
    out: Tensor = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        max_new_tokens=new,
        pad_token_id=0,
        **options,
    )
    tokens: list[int] = out[0, len(ids) :].tolist()
    return tokens


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    ],
)
def test_seeded_tokens_are_those_of_transformers(settings: dict[str, Any]) -> None:
    model = llama()
    requests = [Request(prompt(length), 10, seed=3 + length, **settings) for length in LENGTHS]
    right = [transformers_tokens(model, r.prompt, 3 + len(r.prompt), do_sample=True, **settings) for r in requests]
    assert kvblocks.generate(model, requests).run() == right
    # Preemption and small passes change nothing.
    with kvblocks.generate(model, requests, num_blocks=15, block_size=4, max_batch_tokens=9) as run:
        assert run.run() == right
        assert run.scheduler.manager.stats().preemptions > 0
    assert right != answers(*[r.prompt for r in requests], new=10)


@pytest.mark.parametrize(
    "config",
    [
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.6, "top_k": 8, "top_p": 0.95},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"do_sample": True, "suppress_tokens": [1, 2, 3], "typical_p": 0.9},
        {"min_new_tokens": 7, "eos_token_id": list(range(0, VOCABULARY, 2))},
        {"bad_words_ids": [[4], [7, 8]], "renormalize_logits": True, "remove_invalid_values": True},
        {"forced_eos_token_id": 9},
        {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": 5},
        {"begin_suppress_tokens": list(range(40))},
    ],
)
def test_the_generation_config_is_honoured(config: dict[str, Any]) -> None:
    model = llama(**config)
    for length in LENGTHS:
        right = transformers_tokens(model, prompt(length), 11)
        torch.manual_seed(11)  # who gives no seed draws from torch's numbers, as transformers does
        assert kvblocks.generate(model, [prompt(length)], max_new_tokens=10).run() == [right]


def test_temperature_0_takes_the_best_whatever_the_config_says() -> None:
    model = llama(do_sample=True, temperature=0.7)
    assert kvblocks.generate(model, [prompt(12)], max_new_tokens=8, temperature=0).run() == answers(prompt(12))


def test_limits_of_the_generation_config() -> None:
    prompts = [prompt(12), prompt(5)]
    assert kvblocks.generate(llama(max_new_tokens=6), prompts).run() == answers(*prompts, new=6)
    plain = answers(*prompts, new=15)
    assert kvblocks.generate(llama(max_length=20), prompts).run() == [plain[0][:8], plain[1]]
    with pytest.raises(ValueError, match=r"a prompt of 12 tokens, and .* max_length=10, which counts the prompt too"):
        kvblocks.generate(llama(max_length=10), prompts)


@pytest.mark.parametrize(
    "config",
    [
        {"num_beams": 4},
        {"guidance_scale": 2.0},
        {"prompt_lookup_num_tokens": 3},
        {"num_return_sequences": 2, "do_sample": True},
    ],
)
def test_what_a_generation_config_asks_for_and_is_not_served_is_refused_by_name(config: dict[str, Any]) -> None:
    name = next(iter(config))
    with pytest.raises(ValueError, match=f"generation_config has {name}={config[name]}, which is not served here; set"):
        kvblocks.generate(llama(**config), [prompt(5)])


def test_each_request_has_settings_of_its_own() -> None:
    model = llama()
    with kvblocks.generate(model, [prompt(12)], max_new_tokens=10, num_blocks=99, temperature=0.8, seed=1) as run:
        greedy = run.add(prompt(12), temperature=0, seed=None)
        other = run.add(prompt(12), seed=2, top_k=3)
        assert greedy.read() == answers(prompt(12), new=10)[0]
        assert run[0].read() == transformers_tokens(model, prompt(12), 1, do_sample=True, temperature=0.8)
        assert other.read() == transformers_tokens(model, prompt(12), 2, do_sample=True, temperature=0.8, top_k=3)


def test_logits_processors_see_all_ids() -> None:
    seen: list[int] = []

    def even(ids: Tensor, scores: Tensor) -> Tensor:
        assert ids.dtype == torch.int64
        seen.append(ids.shape[1])
        assert ids[0, :9].tolist() == list(prompt(9))
        scores[:, 1::2] = -torch.inf
        return scores

    [tokens] = kvblocks.generate(
        tiny_llama(), [prompt(9)], max_new_tokens=6, stop_tokens=[], logits_processors=even
    ).run()
    assert seen == list(range(9, 15))
    assert all(token % 2 == 0 for token in tokens)


def test_log_probabilities_are_the_models_own() -> None:
    model = llama()
    request = Request(prompt(12), 6, temperature=0.5, seed=4, logprobs=3)
    [stream] = kvblocks.generate(model, [request])
    ids = torch.tensor([[*request.prompt, *stream.read()]])
    with torch.inference_mode():
        known = model(input_ids=ids).logits[0, 11:-1].log_softmax(-1)
    assert stream.logprobs == pytest.approx(
        [float(row[token]) for row, token in zip(known, stream.tokens, strict=True)]
    )
    best = known.topk(3)
    assert [[token for token, _ in row] for row in stream.top] == best.indices.tolist()
    assert torch.tensor([[value for _, value in row] for row in stream.top]) == pytest.approx(best.values, abs=1e-5)
    [greedy] = kvblocks.generate(model, [prompt(12)], max_new_tokens=2, logprobs=0)
    greedy.read()
    assert len(greedy.logprobs) == 2
    assert greedy.top == [(), ()]


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of one or two letters a token."""
    words = [chr(97 + n) if n < 26 else f"{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(VOCABULARY)]
    assert len(set(words)) == VOCABULARY
    pairs = [(word[0], word[1]) for word in words if len(word) == 2]
    backend: Any = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, pairs))
    backend.decoder = decoders.Fuse()
    kind: Any = PreTrainedTokenizerFast
    made: PreTrainedTokenizerFast = kind(tokenizer_object=backend)
    return made


def test_stop_strings_end_where_transformers_ends() -> None:
    model, tokenizer = llama(), letters()
    texts: Any = tokenizer.convert_ids_to_tokens(answers(prompt(12), new=10)[0])
    stop = texts[3][-1] + texts[4][:1]  # across two tokens
    right = transformers_tokens(model, prompt(12), tokenizer=tokenizer, stop_strings=[stop])
    assert len(right) < 10
    [stream] = kvblocks.generate(
        model, [prompt(12)], max_new_tokens=10, stop_strings=stop, stop_tokens=[], tokenizer=tokenizer
    )
    assert stream.read() == right
    assert stream.finish == "stop"
    with pytest.raises(ValueError, match=r"stop_strings \['x'\] need the tokenizer; give tokenizer="):
        kvblocks.generate(model, [prompt(12)], stop_strings=["x"])
    configured = llama(stop_strings=stop)
    assert kvblocks.generate(configured, [prompt(12)], max_new_tokens=10, tokenizer=tokenizer).run() == [right]


def test_answers_to_one_prompt_share_its_blocks() -> None:
    model = llama()
    request = Request(prompt(100), 8, temperature=1.5, seed=5, n=4)
    right = [transformers_tokens(model, request.prompt, 5 + n, 8, do_sample=True, temperature=1.5) for n in range(4)]
    with kvblocks.generate(model, [request], max_batch_tokens=64, block_size=16) as run:
        assert len(run) == 4
        assert run[2].answers == tuple(run)
        run[0].cancel()  # who computes the prompt for all of them
        run.step()
        run.step()
        manager = run.scheduler.manager
        # Six full blocks and a last one in common, and a last one of their own for two.
        assert manager.num_blocks - manager.num_free_blocks <= 6 + 3
        assert manager.stats().admitted == 1
        assert [stream.read() for stream in run][1:] == right[1:]
        check_all_given_back(run.scheduler)
    tight = kvblocks.generate(model, [request, prompt(90)], num_blocks=9, max_new_tokens=8, max_seqs=4)
    assert tight.run() == [*right, *answers(prompt(90))]
    assert tight.scheduler.manager.stats().preemptions > 0


def test_answers_may_be_cancelled_at_any_time() -> None:
    model = llama()
    for cancelled in ([0], [1], [0, 1], [0, 1, 2], [2, 0]):
        for steps in (0, 1, 3):
            run = kvblocks.generate(model, [Request(prompt(30), 6, temperature=1.0, seed=5, n=3)], max_batch_tokens=20)
            for _ in range(steps):
                run.step()
            for number in cancelled:
                run[number].cancel()
            rest = [run[number].read() for number in range(3) if number not in cancelled]
            right = [
                transformers_tokens(model, prompt(30), 5 + number, 6, do_sample=True)
                for number in range(3)
                if number not in cancelled
            ]
            assert rest == right
            check_all_given_back(run.scheduler)
            assert run.scheduler.num_unfinished == 0


def test_priorities_decide_who_runs() -> None:
    model = tiny_llama()
    with kvblocks.generate(model, [], max_new_tokens=8, stop_tokens=[], num_blocks=99, max_seqs=2) as run:
        low, usual, late = (run.add(prompt(9, n), priority=p) for n, p in enumerate((-1, 0, 0)))
        run.step()
        assert [len(stream.tokens) for stream in (low, usual, late)] == [0, 1, 1]
        urgent = run.add(prompt(9, 3), priority=5)
        run.step()  # the later of two equals gives way
        assert [len(stream.tokens) for stream in (low, usual, late, urgent)] == [0, 2, 1, 1]
        assert [s.read() for s in (low, usual, late, urgent)] == answers(*[prompt(9, n) for n in range(4)])


def test_a_pass_that_fails_draws_the_same_tokens_again() -> None:
    model = llama()
    fail = [False, True, False, True]

    def stumble(_: Tensor, scores: Tensor) -> Tensor:
        if fail and fail.pop(0):
            raise RuntimeError("not now")
        return scores

    requests = [
        Request(prompt(12), 6, temperature=1.0, seed=1),
        Request(prompt(5), 6, logits_processors=(stumble,)),
    ]
    run = kvblocks.generate(model, requests)
    failures = 0
    while run.num_unfinished:
        try:
            run.step()
        except RuntimeError:
            failures += 1
    assert failures == 2
    right = transformers_tokens(model, prompt(12), 1, 6, do_sample=True)
    assert [stream.tokens for stream in run] == [right, expected(model, Request(prompt(5), 6))]


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"temperature": -1}, ValueError, "temperature=-1 must be finite, 0 up"),
        ({"temperature": "hot"}, TypeError, "temperature='hot' must be a number"),
        ({"temperature": 1.0, "top_p": 1.5}, ValueError, r"top_p=1\.5 must be 0 to 1"),
        ({"temperature": 1.0, "top_k": 0}, ValueError, "top_k=0 must be at least 1"),
        ({"temperature": 1.0, "seed": 1.5}, TypeError, r"seed=1\.5 must be an int"),
        (
            {"temperature": 1.0, "seed": 2**64 - 1, "n": 2},
            ValueError,
            r"answer i draws from seed \+ i, at most 2\*\*64",
        ),
        ({"top_k": 5}, ValueError, "top_k=5 changes nothing where the best token is taken; give a temperature too"),
        ({"seed": 5}, ValueError, "seed=5 changes nothing"),
        ({"n": 2}, ValueError, "n=2 answers of the best tokens would be the same; give a temperature"),
        ({"n": 65, "temperature": 1.0}, ValueError, "n=65 answers run together, and max_seqs=64 sequences can"),
        ({"n": 0}, ValueError, "n=0 must be at least 1"),
        ({"logprobs": -1}, ValueError, "logprobs=-1 must be at least 0"),
        ({"stop_strings": [""]}, TypeError, "stop_strings holds ''; give texts"),
        ({"logits_processors": [3]}, TypeError, "logits_processors holds 3; give callables"),
        ({"heat": 1.0}, TypeError, r"heat=1\.0 is no setting of a request; there are logits_processors, logprobs"),
        ({"temperature": 1.0, "choose": lambda logits: logits.argmax(-1)}, ValueError, "no effect with choose"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        kvblocks.generate(tiny_llama(), [prompt(5)], **settings)


@pytest.mark.parametrize(
    ("made", "what"), [(None, "a NoneType"), (torch.zeros(1, 3), r"of shape \[1, 3\]")], ids=["None", "too few"]
)
def test_a_logits_processor_that_returns_no_scores_is_named(made: Any, what: str) -> None:
    with kvblocks.generate(tiny_llama(), [prompt(5)], logits_processors=lambda ids, scores: made) as run:
        with pytest.raises(TypeError, match=f"logits_processors returned scores {what}; they must be "):
            run.step()
        assert run.scheduler.manager.num_free_blocks < run.scheduler.manager.num_blocks  # it still runs
    check_all_given_back(run.scheduler)


def test_a_scheduler_counts_what_it_holds() -> None:
    """After any mixture of answers, cancellations and preemption nothing is counted as held."""
    model = llama()
    with kvblocks.generate(model, [], num_blocks=12, block_size=4, max_seqs=5, max_new_tokens=12) as run:
        streams = [run.add(prompt(8 + n, n), temperature=1.0, seed=n, n=1 + n % 3, priority=n % 2) for n in range(12)]
        for number, stream in enumerate(streams):
            run.step()
            if number % 3 == 0:
                stream.answers[-1].cancel()
                streams[-1 - number].cancel()
        while run.num_unfinished:
            run.step()
        scheduler: Scheduler = run.scheduler
        assert scheduler.manager.stats().preemptions > 0
        assert (scheduler.num_held, scheduler.num_unfinished) == (0, 0)
        check_all_given_back(scheduler)


def test_stop_strings_look_at_the_last_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the answer: each token would cost as much as there are before it."""
    seen: list[int] = []
    plain = StopStringCriteria.__call__

    def noted(self: Any, ids: Tensor, scores: Tensor, **options: Any) -> Any:
        seen.append(ids.shape[1])
        return plain(self, ids, scores, **options)

    monkeypatch.setattr(StopStringCriteria, "__call__", noted)
    request = Request(prompt(60), 20, stop_strings=("zzzzz",), temperature=0)
    kvblocks.generate(tiny_llama(), [request], tokenizer=letters()).run()
    assert seen == [len("zzzzz") + 1] * 20


def test_a_generation_config_that_looks_at_the_prompt() -> None:
    """As Blenderbot's, whose answers repeat nothing of the prompt."""
    repeating = tuple(prompt(6)) * 3
    for config in ({"encoder_no_repeat_ngram_size": 1}, {"encoder_repetition_penalty": 3.0}):
        model = llama(**config)
        [tokens] = kvblocks.generate(model, [repeating], max_new_tokens=10, stop_tokens=[]).run()
        assert tokens == transformers_tokens(model, repeating)
        assert tokens != answers(repeating, new=10)[0]
