"""Check generated tokens against the same model over transformers' own contiguous cache.

Knows nothing of blocks. Imports torch and transformers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from kvblocks.generation.generator import Request

__all__ = ["NEAR_TIE", "Verdict", "verify"]

NEAR_TIE = 16  # roundings of the best logit by which a token may miss it in half precision; up to 6 were seen


@dataclass(frozen=True)
class Verdict:
    """How the tokens of one request compare.

    Attributes:
        position: of the first new token that differs, or of the first that fails; None where all are identical.
        expected: the token over the contiguous cache, None where the request had ended before.
        got: the token as given, None where there is none.
        gap: by how much the contiguous cache's logit of `expected` exceeds that of `got`; NaN where logits are.
        bound: the largest gap that passes for a near tie: `NEAR_TIE * eps * |best logit|` in half precision, else 0.
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
def verify(model: PreTrainedModel, request: Request, tokens: Sequence[int]) -> Verdict:
    """Compare the new tokens of a request with greedy generation over `DynamicCache`, alone in its batch.

    Up to the first difference both see the same tokens. Where it is a near tie, the contiguous cache goes on with the
    token that was given, so that every later token is held against its logits too.

    The bound does not cover expert routing: in half precision a tie between experts can change a logit by more.
    """
    cache = DynamicCache(config=model.config)
    feed = list(request.prompt)
    verdict = Verdict()
    for position in range(request.max_new_tokens):
        inputs = torch.tensor([feed], device=model.device)
        logits = model(input_ids=inputs, past_key_values=cache, use_cache=True).logits[0, -1]
        expected = int(logits.argmax())
        if bool(logits.isnan().any()):
            return Verdict(position, None, tokens[position] if position < len(tokens) else None, math.nan)
        if position == len(tokens):
            return Verdict(position, expected, None, math.inf)
        got = tokens[position]
        if got != expected:
            best = float(logits[expected])
            half = logits.dtype in (torch.float16, torch.bfloat16)
            bound = NEAR_TIE * torch.finfo(logits.dtype).eps * abs(best) if half else 0.0
            found = Verdict(position, expected, got, best - float(logits[got]), bound)
            if not found.passed:
                return found
            verdict = verdict if not verdict.identical else found
        feed = [got]
        if got in request.stop_tokens:
            break
    if len(tokens) > position + 1:
        return Verdict(position, None, tokens[position + 1], math.inf)
    return verdict
