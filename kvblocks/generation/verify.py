"""Check generated tokens against the same model over transformers' own contiguous cache.

Knows nothing of blocks. Imports torch and transformers.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from kvblocks.generation.request import Request
from kvblocks.generation.sampling import Choosers
from kvblocks.integrations.transformers.backend import unwrapped
from kvblocks.integrations.transformers.layers import cache_argument

__all__ = ["NEAR_TIE", "Verdict", "verify"]

NEAR_TIE = 2  # times the noise: two logits may each be off by it, in opposite directions


@dataclass(frozen=True)
class Verdict:
    """How the tokens of one request compare.

    Attributes:
        position: of the first new token that differs, or of the first that fails; None where all are identical.
        expected: the token over the contiguous cache, None where the request had ended before.
        got: the token as given, None where there is none.
        gap: by how much the contiguous cache's logit of `expected` exceeds that of `got`; NaN where logits are.
        bound: the largest gap that passes for a near tie: in half precision `NEAR_TIE` times the noise, else 0. Noise
            is what the model's own logits so far differ by between one token at a time and all at once, and at least
            what their dtype cannot tell apart: there are processors on which both sum up in one order.
    """

    position: int | None = None
    expected: int | None = None
    got: int | None = None
    gap: float = 0.0
    bound: float = 0.0

    @property
    def identical(self) -> bool:
        return self.position is None

    @property
    def passed(self) -> bool:
        """Identical, or a near tie in half precision that fell the other way."""
        return self.identical or (self.bound > 0 and self.gap <= self.bound)

    def __str__(self) -> str:
        if self.identical:
            return "identical"
        if math.isnan(self.gap):
            return f"NOT A NUMBER at token {self.position}: the model's own logits have NaN, so nothing can be compared"
        if self.expected is None:
            return f"DIFFERENT: goes on after token {self.position}, where the request ends"
        if self.got is None:
            return f"DIFFERENT: ends before token {self.position}, which is {self.expected}"
        return (
            f"{'near tie' if self.passed else 'DIFFERENT'} at token {self.position}: {self.got} instead of "
            f"{self.expected}, whose logit is {self.gap:.3g} higher (bound {self.bound:.3g})"
        )


@torch.inference_mode()
def verify(model: Any, request: Request, tokens: Sequence[int]) -> Verdict:
    """Compare the new tokens of a request with greedy generation over `DynamicCache`, alone in its batch.

    Up to the first difference both see the same tokens. Where it is a near tie, the contiguous cache goes on with the
    token that was given, so that every later token is held against its logits too. The logits are processed as the
    request and the model's generation config have it.

    The bound does not cover expert routing: in half precision a tie between experts can change a logit by more.

    Raises:
        ValueError: the request's tokens are sampled.
    """
    inner = unwrapped(model)
    choosers = Choosers(inner).make(replace(request, stop_strings=(), logprobs=None, n=1))
    chooser = choosers[0] if choosers else None
    if chooser is not None and chooser.samples:
        raise ValueError("the tokens of this request are sampled, so greedy generation says nothing about them")
    taken = inspect.signature(inner.forward).parameters
    keeps = "logits_to_keep" in taken
    last: dict[str, Any] = {"logits_to_keep": 1} if keeps else {}
    last[cache_argument(inner.forward)] = DynamicCache(config=inner.config)
    ids = list(request.prompt)
    feed = ids
    verdict = Verdict()
    steps: list[Tensor] = []
    whole: Tensor | None = None
    for position in range(request.max_new_tokens):
        inputs = torch.tensor([feed], device=inner.device)
        made = model(input_ids=inputs, use_cache=True, **last).logits[0, -1]
        logits = made if chooser is None else chooser.scores(np.array(ids), made)
        steps.append(made)
        expected = int(logits.argmax())
        if bool(logits.isnan().any()):
            return Verdict(position, None, tokens[position] if position < len(tokens) else None, math.nan)
        if position == len(tokens):
            if request.stop_strings:
                break  # texts are not known here, so any end is taken for one of them
            return Verdict(position, expected, None, math.inf)
        got = tokens[position]
        if got != expected:
            bound = 0.0
            if made.dtype in (torch.float16, torch.bfloat16):
                if whole is None:
                    inputs = torch.tensor([[*request.prompt, *tokens[:-1]]], device=inner.device)
                    keep = {"logits_to_keep": len(tokens)} if keeps else {}
                    whole = model(input_ids=inputs, use_cache=False, **keep).logits[0, -len(tokens) :]
                bound = NEAR_TIE * max(_noise(one, all_) for one, all_ in zip(steps, whole, strict=False))
            found = Verdict(position, expected, got, float(logits[expected]) - float(logits[got]), bound)
            if not found.passed:
                return found
            verdict = verdict if not verdict.identical else found
        feed = [got]
        ids = [*ids, got]
        if got in request.stop_tokens:
            break
    if len(tokens) > position + 1:
        return Verdict(position, None, tokens[position + 1], math.inf)
    return verdict


def _noise(one: Tensor, other: Tensor) -> float:
    """By how much two computations of the same logits differ, or a unit in the last place of the largest, if more."""
    unit = torch.finfo(one.dtype).eps * float(one.abs().max())
    return max(unit, float((one - other).float().abs().max()))
