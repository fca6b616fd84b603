"""The verifier must find what is planted, and nothing else."""

from functools import cache
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel

import kvblocks
from kvblocks import demo
from kvblocks.attention import paged_attention
from kvblocks.generation import verify as verify_module
from kvblocks.generation.scheduler import Request
from kvblocks.generation.verify import Verdict, verify
from kvblocks.integrations.transformers import backend

# These tensors are tiny, and threads would only wait for each other.
torch.set_num_threads(1)

REQUEST = Request(demo.encode("Who holds the lock?"), 12)


@cache
def model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    small = demo.small_llama()
    torch.nn.Module.to(small, dtype=dtype)
    return small


def greedy(dtype: torch.dtype = torch.float32, length: int = 12, swap: tuple[int, int] | None = None) -> list[int]:
    """Greedy tokens over a contiguous cache; at `swap` = (position, rank) the token of that rank, not the best."""
    past, feed = DynamicCache(config=model(dtype).config), list(REQUEST.prompt)
    tokens = []
    with torch.inference_mode():
        for position in range(length):
            output = model(dtype)(input_ids=torch.tensor([feed]), past_key_values=past, use_cache=True)
            ranks = output.logits[0, -1].argsort(descending=True)
            feed = [int(ranks[swap[1] if swap is not None and swap[0] == position else 0])]
            tokens += feed
    return tokens


def test_the_same_tokens_are_identical() -> None:
    verdict = verify(model(), REQUEST, greedy())
    assert verdict == Verdict()
    assert verdict.identical
    assert verdict.passed
    assert str(verdict) == "identical"


@pytest.mark.parametrize("position", [0, 5, 11])
def test_a_changed_token_is_found_where_it_is(position: int) -> None:
    tokens = greedy()
    right = tokens[position]
    tokens[position] = 7
    verdict = verify(model(), REQUEST, tokens)
    assert (verdict.position, verdict.expected, verdict.got) == (position, right, 7)
    assert verdict.gap > 0
    assert not verdict.identical
    assert not verdict.passed
    assert str(verdict).startswith(f"DIFFERENT at token {position}: 7 instead of {right}, whose logit is ")


def test_float32_has_no_near_ties() -> None:
    """The runner-up, and all that follows from it, is still a difference."""
    verdict = verify(model(), REQUEST, greedy(swap=(4, 1)))
    assert verdict.position == 4
    assert verdict.bound == 0
    assert not verdict.passed


def test_tokens_missing_or_too_many() -> None:
    tokens = greedy()
    short = verify(model(), REQUEST, tokens[:9])
    assert (short.position, short.expected, short.got) == (9, tokens[9], None)
    assert str(short) == f"DIFFERENT: ends before token 9, which is {tokens[9]}"
    stopped = Request(REQUEST.prompt, 12, frozenset([tokens[6]]))
    end = tokens.index(tokens[6]) + 1
    assert verify(model(), stopped, tokens[:end]).identical
    long = verify(model(), stopped, tokens)
    assert (long.position, long.expected, long.got) == (end - 1, None, tokens[end])
    assert str(long) == f"DIFFERENT: goes on after token {end - 1}, where the request ends"
    assert not short.passed
    assert not long.passed


def test_logits_that_are_no_numbers_prove_nothing() -> None:
    broken = demo.small_llama()
    with torch.no_grad():
        broken.lm_head.weight[3] = torch.nan
    verdict = verify(broken, REQUEST, [3] * 12)
    assert verdict.position == 0
    assert not verdict.passed
    assert str(verdict).startswith("NOT A NUMBER at token 0")


def gaps_of_runners_up(dtype: torch.dtype) -> list[float]:
    """For each greedy token, by how much the runner-up misses its logit."""
    past, feed, gaps = DynamicCache(config=model(dtype).config), list(REQUEST.prompt), []
    with torch.inference_mode():
        for _ in range(12):
            logits = model(dtype)(input_ids=torch.tensor([feed]), past_key_values=past, use_cache=True).logits[0, -1]
            ranks = logits.float().sort(descending=True).values
            gaps.append(float(ranks[0] - ranks[1]))
            feed = [int(logits.argmax())]
    return gaps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_forgives_near_ties_and_nothing_else(dtype: torch.dtype) -> None:
    gaps = gaps_of_runners_up(dtype)
    closest = min(range(12), key=lambda position: gaps[position])
    widest = max(range(12), key=lambda position: gaps[position])
    wrong = verify(model(dtype), REQUEST, greedy(dtype, swap=(widest, 1)))
    assert wrong.position == widest
    assert not wrong.passed
    assert 0 < wrong.bound < gaps[widest]
    swapped = verify(model(dtype), REQUEST, greedy(dtype, swap=(closest, 1)))
    assert swapped.position == closest
    assert swapped.passed == (gaps[closest] <= swapped.bound)
    assert swapped.gap == pytest.approx(gaps[closest])


def test_noise_is_at_least_a_unit_in_the_last_place() -> None:
    """There are processors on which both ways to compute logits agree to the last bit."""
    logits = torch.tensor([1.0, -100.0, 7.0], dtype=torch.bfloat16)
    assert verify_module._noise(logits, logits) == pytest.approx(100 / 128)
    assert verify_module._noise(logits, logits + torch.tensor([0.0, 0.0, 5.0], dtype=torch.bfloat16)) == 5


def test_a_model_whose_forward_keeps_all_logits() -> None:
    """Its noise is measured over logits of the whole prompt, of which the last ones count."""

    class Plain(LlamaForCausalLM):  # type: ignore[no-untyped-call]
        def forward(self, input_ids: Any, cache: Any = None, use_cache: Any = None) -> Any:
            return super().forward(input_ids=input_ids, cache=cache, use_cache=use_cache)

    plain: Any = Plain(model().config)
    plain.to(torch.bfloat16).eval()
    plain.load_state_dict(model(torch.bfloat16).state_dict())
    tokens = greedy(torch.bfloat16, swap=(4, 1))
    assert verify(plain, REQUEST, tokens) == verify(model(torch.bfloat16), REQUEST, tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_the_prompt_are_not_computed(dtype: torch.dtype) -> None:
    """Neither token by token, nor where a difference asks for the noise."""
    checked, counts = model(dtype), list[int]()
    hook = checked.lm_head.register_forward_hook(lambda module, given, made: counts.append(made.shape[1]))
    tokens = greedy(dtype, swap=(4, 1))
    counts.clear()
    verify(checked, REQUEST, tokens)
    hook.remove()
    assert set(counts) <= {1, len(tokens)}
    assert len(tokens) < len(REQUEST.prompt)


def test_what_follows_a_near_tie_is_held_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a forgiven token the comparison goes on along the tokens as given."""
    dtype = torch.bfloat16
    gaps = gaps_of_runners_up(dtype)
    tie = min(range(11), key=lambda position: gaps[position])
    monkeypatch.setattr(verify_module, "NEAR_TIE", 1e3)
    tokens = greedy(dtype, swap=(tie, 1))
    forgiven = verify(model(dtype), REQUEST, tokens)
    assert forgiven.passed
    assert forgiven.position == tie
    noise = forgiven.bound / 1e3
    assert str(forgiven).startswith(f"near tie at token {tie}: ")
    tokens[11] = 7
    monkeypatch.setattr(verify_module, "NEAR_TIE", 1.01 * gaps[tie] / noise)
    found = verify(model(dtype), REQUEST, tokens)
    assert found.position == 11
    assert not found.passed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_attention_that_is_a_little_wrong_is_seen(
    dtype: torch.dtype, factor: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scale that is 10 % off changes tokens by little, and yet by more than rounding does."""

    def off(*args: Any, scale: float, **options: Any) -> torch.Tensor:
        return paged_attention(*args, scale=scale * factor, **options)

    monkeypatch.setattr(backend, "paged_attention", off)
    requests = [Request(demo.encode(text), 32, frozenset([demo.EOS])) for text in demo.PROMPTS]
    answers = kvblocks.generate(model(dtype), requests, block_size=8, max_batch_tokens=64).run()
    verdicts = [verify(model(dtype), request, tokens) for request, tokens in zip(requests, answers, strict=True)]
    passed = sum(verdict.passed for verdict in verdicts)
    assert passed == 12 if factor == 1 else passed <= 2, [str(verdict) for verdict in verdicts]


def test_penalties_are_those_of_the_request() -> None:
    penalized = demo.small_llama()
    assert penalized.generation_config is not None
    penalized.generation_config.repetition_penalty = 1.6
    [tokens] = kvblocks.generate(penalized, [REQUEST]).run()
    assert tokens != greedy()
    assert verify(penalized, REQUEST, tokens).identical
    assert not verify(model(), REQUEST, tokens).passed
    with pytest.raises(ValueError, match="the tokens of this request are sampled"):
        verify(model(), Request((1, 2), 2, temperature=1.0), [1, 2])
