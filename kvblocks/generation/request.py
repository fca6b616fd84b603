"""What a request asks for, and what it gets token by token. Below the scheduler. Imports torch."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, TypedDict

from torch import Tensor

__all__ = ["LogitsProcessor", "Request", "Settings", "Token", "check_request"]

LogitsProcessor: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Request:
    """A prompt to be continued, and how. What is None is as the model's generation config has it.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: at least 1.
        stop_tokens: ids that end the request; the one that does is its last token.
        salt: what decides the K and V beside the ids: an adapter, a tenant. Requests of another salt share nothing.
        extra: the (position in the prompt, bytes) of what the ids do not say, in order.
        temperature: above 0 the tokens are sampled, 0 takes the best one each time.
        top_k, top_p, min_p: what is sampled from, as transformers has them; they need a temperature, here or in the
            generation config.
        seed: 0 to 2**64 - n, of the request's own random numbers; None draws from torch's. Sampled tokens are those of
            `torch.manual_seed(seed); model.generate(...)` with this prompt alone, where logits are equal.
        logits_processors: called as transformers' are, with ids int64 [1, tokens] and scores float32 [1, vocabulary].
        logprobs: also give each token's log-probability, and those of so many best ones: by the model's own logits,
            before processors, temperature and sampling settings.
        stop_strings: texts that end the request; the token that completes one is its last.
        priority: the higher the sooner. A request gives way to those of higher priority even while it runs.
        n: answers to this prompt, sampled apart, which share its blocks. Answer i draws from seed + i.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    stop_tokens: frozenset[int] = frozenset()
    salt: bytes = b""
    extra: tuple[tuple[int, bytes], ...] = ()
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    logits_processors: tuple[LogitsProcessor, ...] = ()
    logprobs: int | None = None
    stop_strings: tuple[str, ...] = ()
    priority: int = 0
    n: int = 1


class Settings(TypedDict, total=False):
    """Fields of a `Request` that `kvblocks.generate` takes as keywords, for prompts that are no requests themselves."""

    salt: bytes
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int | None
    logits_processors: Iterable[LogitsProcessor] | LogitsProcessor
    logprobs: int | None
    stop_strings: Iterable[str] | str
    priority: int
    n: int


class Token(NamedTuple):
    """One new token of a request.

    Attributes:
        finish: with the last token of a request, why it ended: "stop" or "length"; else None.
        logprob, top: its log-probability, and the (token, log-probability) of the best ones, if these were asked for.
    """

    request_id: int
    token: int
    finish: str | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def check_request(request: Request) -> None:
    """Raise `TypeError` or `ValueError` for a field that can never be, whatever the model and the cache."""
    _check_int("max_new_tokens", request.max_new_tokens)
    if any(not hasattr(token, "__index__") for token in request.prompt):
        raise TypeError("the prompt of a request is token ids, as ints")
    for stop in request.stop_tokens:
        if type(stop) is not int:
            raise TypeError(f"stop_tokens holds {stop!r} of type {type(stop).__name__}; give token ids, as int")
    if not request.prompt or request.max_new_tokens < 1:
        raise ValueError(
            f"a request of {len(request.prompt)} prompt tokens and max_new_tokens={request.max_new_tokens}; "
            "both must be at least 1"
        )
    _check_keys(request)
    for name, least in (("top_k", 1), ("logprobs", 0), ("seed", 0)):
        value = getattr(request, name)
        if value is not None:
            _check_int(name, value)
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
    _check_int("priority", request.priority)
    _check_int("n", request.n)
    if request.n < 1:
        raise ValueError(f"n={request.n} must be at least 1")
    if request.seed is not None and request.seed + request.n > 2**64:
        raise ValueError(f"seed={request.seed} and n={request.n}: answer i draws from seed + i, at most 2**64 - 1")
    for name, most in (("temperature", float("inf")), ("top_p", 1.0), ("min_p", 1.0)):
        value = getattr(request, name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name}={value!r} must be a number")
        if not 0 <= value <= most or value == float("inf"):
            raise ValueError(
                f"{name}={value} must be 0 to {most}" if most == 1 else f"{name}={value} must be finite, 0 up"
            )
    for processor in request.logits_processors:
        if not callable(processor):
            raise TypeError(f"logits_processors holds {processor!r}; give callables of (ids, scores)")
    for text in request.stop_strings:
        if not isinstance(text, str) or not text:
            raise TypeError(f"stop_strings holds {text!r}; give texts of at least one character")


def _check_int(name: str, value: object) -> None:
    if type(value) is not int:
        raise TypeError(f"{name}={value!r} must be an int")


def _check_keys(request: Request) -> None:
    """Stop what the manager would refuse only once the request is admitted."""
    if not isinstance(request.salt, bytes):
        raise TypeError(f"salt is a {type(request.salt).__name__}; give bytes")
    before = -1
    for pair in request.extra:
        if not isinstance(pair, tuple) or len(pair) != 2 or type(pair[0]) is not int or not isinstance(pair[1], bytes):
            raise TypeError(f"extra holds {pair!r}; give (position, bytes) pairs")
        if not before < pair[0] < len(request.prompt):
            raise ValueError(
                f"extra names position {pair[0]}; the next must be above {before} and below {len(request.prompt)}"
            )
        before = pair[0]
