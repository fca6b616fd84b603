"""The tiny models: as many as there can be, each as small as it says, the same every time."""

import pytest
import tiny_models
import torch


def test_every_architecture_is_built_or_left_out_for_a_reason() -> None:
    built, left_out = tiny_models.architectures(), tiny_models.LEFT_OUT
    assert sorted([*built, *left_out]) == sorted(tiny_models.known())
    assert len(built) >= 115
    assert all(len(reason.split()) > 4 for reason in left_out.values())


@pytest.mark.parametrize("name", tiny_models.architectures())
def test_builds_and_runs(name: str) -> None:
    config, model = tiny_models.build(name)
    assert config.model_type == name or name in ("gpt-sw3", "internlm3", "iquestcoder")
    assert sum(weight.numel() for weight in model.parameters()) < 4_000_000
    tokens = torch.randint(3, tiny_models.VOCABULARY, (1, 21), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    assert logits.shape[:2] == (1, 21)
    assert bool(torch.isfinite(logits).all())


def test_the_seed_decides_the_weights() -> None:
    (_, first), (_, again), (_, other) = (tiny_models.build("llama", seed) for seed in (0, 0, 1))
    weights = [next(model.parameters()) for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
