"""Plans of published configs against what serving engines printed for them, and against published parameter counts.

`data/engine_figures.json` holds each engine's figure with the arguments of `plan` that ask for the same, and how far
apart the two may be: 0 where the engine prints whole bytes, else what it rounds to. `data/parameter_counts.json` holds
billions of parameters, layers for multi-token prediction left out.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from kvblocks import Plan, plan

DATA = Path(__file__).resolve().parent / "data"
FIGURES = json.loads((DATA / "engine_figures.json").read_text())
COUNTS = json.loads((DATA / "parameter_counts.json").read_text())


def config(name: str) -> Path:
    return DATA / "configs" / f"{name}.json"


def figure(planned: Plan, name: str) -> float:
    """A figure of the plan: by its name, or of a number of tokens."""
    if name == "bytes a token and layer":
        return planned.bytes_per_token / len(planned.model.layers)
    what, _, tokens = name.partition(" of ")
    if what == "bytes":
        return planned.cache_bytes(int(tokens))
    if what == "sequences":  # with the fraction that engines print; `max_concurrency` counts whole ones
        assert planned.memory is not None
        return planned.memory / planned.sequence_bytes(int(tokens))
    found: int = getattr(planned, name)
    return found


@pytest.mark.parametrize(
    "case", FIGURES, ids=[f"{case['engine']}-{case['figure']}-{i}" for i, case in enumerate(FIGURES)]
)
def test_what_an_engine_printed(case: dict[str, Any]) -> None:
    model = case["model"] if isinstance(case["model"], dict) else config(case["model"])
    planned = plan(model, **case["arguments"])
    assert figure(planned, case["figure"]) == pytest.approx(case["printed"], rel=case["within"], abs=0)


@pytest.mark.parametrize("name", COUNTS)
def test_published_parameter_counts(name: str) -> None:
    """A number of one byte each, so that bytes count them; published to two digits after the point."""
    counted = plan(config(name), dtype="bfloat16", weights="auto", weights_dtype="int8").weights_bytes
    assert round(counted / 1e9, 2) == COUNTS[name]


def test_the_half_that_sees_is_counted_and_what_predicts_ahead_is_named() -> None:
    """Qwen 3.5's types are registered as text alone and as text with images; the checkpoint holds both halves."""
    whole = json.loads(config("qwen3.5-35b-a3b").read_text())
    counted = plan(whole, weights="auto", weights_dtype="int8")
    text = plan(whole["text_config"], dtype="bfloat16", weights="auto", weights_dtype="int8")
    sees = whole["vision_config"]
    layers = sees["depth"] * (4 * sees["hidden_size"] ** 2 + 2 * sees["hidden_size"] * sees["intermediate_size"])
    assert counted.weights_bytes - text.weights_bytes == pytest.approx(layers, rel=0.1)
    assert "weights are counted without 1 layer for multi-token prediction" in counted.explain()
    assert "multi-token prediction" not in plan(whole, weights="70GB").explain()
