"""How the next token of a request is chosen from its logits: the best one, or one that is drawn.

A request's settings, and the model's generation config where it has none, become transformers' own logits processors.
Knows nothing of blocks and of who runs when. Imports torch and transformers.
"""

import copy
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel
from transformers.generation.stopping_criteria import StopStringCriteria

from kvblocks.generation.request import Request

__all__ = ["Choice", "Chooser", "Choosers"]

# Fields of a generation config that ask for another way to generate, or for what is not there, and what is harmless.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "guidance_scale": (1,),
    "diversity_penalty": (0,),
    "token_healing": (False,),
    "use_mtp": (False,),
    "penalty_alpha": (),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "prompt_lookup_num_tokens": (),
    "assistant_early_exit": (),
    "max_time": (),
}


class Choice(NamedTuple):
    """A token that was chosen, whether it completes a stop string, and its log-probability where that was asked for."""

    token: int
    stops: bool = False
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Chooser:
    """Chooses the tokens of one answer.

    Args:
        processors: applied to the logits in order.
        samples: draw a token, instead of taking the best one.
        rng: what is drawn from; None for torch's own numbers.
        stop: tells whether ids end with a stop string.
        logprobs: of how many best tokens; None for none, not of the chosen one either.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        samples: bool,
        rng: torch.Generator | None,
        stop: StopStringCriteria | None,
        logprobs: int | None,
    ) -> None:
        self.processors = processors
        self.samples = samples
        self.rng = rng
        self._stop = stop
        self._logprobs = logprobs

    def scores(self, ids: npt.NDArray[np.integer[Any]], logits: Tensor) -> Tensor:
        """Logits [vocabulary] after ids [tokens], processed: float32 [vocabulary].

        Raises:
            TypeError: a processor returned something else.
        """
        scores = logits[None].to(torch.float32, copy=True)
        if self.processors:
            process: Any = self.processors
            made = process(self._tensor(ids, logits), scores)
            if not isinstance(made, Tensor) or made.shape != scores.shape:
                what = f"of shape {list(made.shape)}" if isinstance(made, Tensor) else f"a {type(made).__name__}"
                raise TypeError(f"logits_processors returned scores {what}; they must be {list(scores.shape)}")
            scores = made
        return scores[0]

    def choose(self, ids: npt.NDArray[np.integer[Any]], logits: Tensor) -> Choice:
        """The token that follows ids [tokens], by their logits [vocabulary]."""
        scores = self.scores(ids, logits)
        if self.samples:
            token = int(torch.multinomial(torch.softmax(scores, -1), 1, generator=self.rng))
        else:
            token = int(scores.argmax())
        stops = False
        if self._stop is not None:
            last = ids[max(0, len(ids) - self._stop.maximum_token_len) :]  # a string reaches no further back
            stops = bool(self._stop(self._tensor(np.append(last, token), logits), scores[None]))
        if self._logprobs is None:
            return Choice(token, stops)
        known = torch.log_softmax(logits.float(), -1)
        best = known.topk(min(self._logprobs, len(known)))
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Choice(token, stops, float(known[token]), top)

    @staticmethod
    def _tensor(ids: npt.NDArray[np.integer[Any]], like: Tensor) -> Tensor:
        return torch.from_numpy(ids.astype(np.int64))[None].to(like.device)


class Choosers:
    """Makes the chooser of each answer, for one model.

    Args:
        tokenizer: transformers' tokenizer of the model, where stop strings are asked for.

    Raises:
        ValueError: the model's generation config asks for what is not served, or has stop strings and there is no
            tokenizer.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any = None) -> None:
        self._model: Any = model
        self._tokenizer = tokenizer
        self._stops: dict[tuple[str, ...], StopStringCriteria] = {}
        self._base = generation_config(model)
        self._stop_strings = tuple(_as_list(self._base.stop_strings))
        for name, harmless in _REFUSED.items():
            value = getattr(self._base, name, None)
            if value is not None and value not in harmless:
                raise ValueError(
                    f"the model's generation_config has {name}={value!r}, which is not served here; set it to "
                    f"{harmless[0] if harmless else None}, or use model.generate with PagedCache"
                )
        if self._base.cache_implementation == "quantized":
            raise ValueError("the model's generation_config has cache_implementation='quantized'; set it to None")
        probe = self._chooser(Request((0,), 1, frozenset([0])), 0)
        self._plain = not (probe.samples or probe.processors or self._stop_strings)

    def make(self, request: Request) -> list[Chooser] | None:
        """One for each of the request's answers; None where it takes the best token and asks for nothing else.

        Raises:
            ValueError: settings of sampling where nothing is sampled, several answers that would be the same, or stop
                strings without a tokenizer.
        """
        asked = (request.temperature, request.top_k, request.top_p, request.min_p, request.seed, request.logprobs)
        given = asked != (None,) * 6 or request.logits_processors or request.stop_strings or request.n > 1
        if self._plain and not given:
            return None
        choosers = [self._chooser(request, number) for number in range(request.n)]
        if not choosers[0].samples:
            for name in ("top_k", "top_p", "min_p", "seed"):
                if getattr(request, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(request, name)} changes nothing where the best token is taken; give a "
                        "temperature too"
                    )
            if request.n > 1:
                raise ValueError(f"n={request.n} answers of the best tokens would be the same; give a temperature")
        return choosers

    def _chooser(self, request: Request, number: int) -> Chooser:
        config = copy.copy(self._base)
        if request.temperature is not None:
            config.do_sample = request.temperature > 0
            config.temperature = request.temperature if request.temperature > 0 else None
        for name in ("top_k", "top_p", "min_p"):
            if getattr(request, name) is not None:
                setattr(config, name, getattr(request, name))
        config.eos_token_id = sorted(request.stop_tokens) or None
        config.max_length = len(request.prompt) + request.max_new_tokens
        device = self._model.device
        self._model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=device)
        processors = self._model._get_logits_processor(
            config,
            input_ids_seq_length=len(request.prompt),
            encoder_input_ids=torch.tensor([request.prompt], device=device),
            logits_processor=LogitsProcessorList(request.logits_processors),
            device=device,
        )
        rng = None
        if request.seed is not None:
            rng = torch.Generator(device).manual_seed(request.seed + number)
        stop = None
        if texts := request.stop_strings or self._stop_strings:
            if self._tokenizer is None:
                raise ValueError(f"stop_strings {list(texts)} need the tokenizer; give tokenizer=")
            if texts not in self._stops:
                self._stops[texts] = StopStringCriteria(self._tokenizer, list(texts))
            stop = self._stops[texts]
        return Chooser(processors, bool(config.do_sample), rng, stop, request.logprobs)


def generation_config(model: PreTrainedModel) -> GenerationConfig:
    """A model's generation config, with transformers' defaults where it says nothing."""
    made: Any = model
    if getattr(model, "generation_config", None) is None:
        made = GenerationConfig
        return made()  # type: ignore[no-any-return]
    config: GenerationConfig = made._prepare_generation_config(None)[0]
    return config


def _as_list(texts: Any) -> list[str]:
    return [] if texts is None else [texts] if isinstance(texts, str) else list(texts)
