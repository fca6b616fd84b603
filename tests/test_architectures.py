"""Every decoder architecture of transformers over blocks: through PagedCache, and through `kvblocks.generate`.

What transformers' own cache generates is what must come out. `build/architectures.md` tells how each fared, and why
those that are not served are not.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache, PreTrainedModel

import kvblocks
from kvblocks import Pool
from kvblocks.generation.request import LogitsProcessor, Request
from kvblocks.integrations.transformers import PagedCache, UnsupportedModel
from kvblocks.integrations.transformers.layers import goes_on_by_one, model_layers

# These tensors are tiny, and threads would only wait for each other.
torch.set_num_threads(1)

NEW = 6
LENGTHS = (21, 14)  # of the prompts; both longer than every window and chunk
EVERY = 16  # tokens between checkpoints of states: no answer passes the one after that of its prompt, which would go
IDENTICAL = "identical"
FOUND_BY_NONE = (
    "identical, but no prefix is found: from a state the layers of Mamba 1 go on by one token in a pass only, as "
    "transformers' scan over several takes none, and model.generate computes the rest of a prompt in one pass"
)


@dataclass
class Outcome:
    """How an architecture fared: `IDENTICAL`, or why it is not served."""

    cache: str = ""
    prompts: str = ""
    generate: str = ""


_outcomes: dict[str, Outcome] = {}


def build(name: str) -> PreTrainedModel:
    """A model whose attention is sharp and whose logits lie far apart, so that a wrong key changes tokens."""
    model = tiny_models.sharp(name)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    return model


def batch() -> tuple[Tensor, Tensor]:
    columns = max(LENGTHS)
    ids = torch.randint(3, tiny_models.VOCABULARY, (len(LENGTHS), columns), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(columns) >= columns - torch.tensor(LENGTHS)[:, None]).long()
    return ids * mask, mask


def generate(
    model: PreTrainedModel, ids: Tensor, mask: Tensor, past: Any, new: int = NEW, **options: Any
) -> tuple[Tensor, Tensor]:
    """New tokens [rows, new] and their scores [rows, new, vocabulary], greedy."""
    options |= {"do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    made: Any = model
    out = made.generate(
        ids, attention_mask=mask, past_key_values=past, max_new_tokens=new, use_cache=True, pad_token_id=0, **options
    )
    return out.sequences[:, -new:], torch.stack(out.scores, 1)


def check(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> str:
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-4)
    return IDENTICAL


def reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def through_cache(model: PreTrainedModel, expected: tuple[Tensor, Tensor]) -> str:
    try:
        held = PagedCache(model.config, num_blocks=96, block_size=4)
        outcome = check(generate(model, *batch(), held), expected)
    except UnsupportedModel as error:
        return str(error)
    held.manager.audit()
    held.close()
    assert held.manager.num_free_blocks == held.manager.num_blocks
    return outcome


def alone(model: PreTrainedModel) -> list[tuple[Tensor, Tensor]]:
    """What each prompt gives by itself, without padding."""
    ids, mask = batch()
    prompts = [line[held.bool()][None] for line, held in zip(ids, mask, strict=True)]
    return [generate(model, ids, torch.ones_like(ids), DynamicCache(config=model.config)) for ids in prompts]


def keeps_states(model: PreTrainedModel) -> bool:
    return any(layer.states for layer in model_layers(model.config))


def stateful(model: PreTrainedModel) -> Pool:
    """A pool with checkpoints on a fine grid."""
    return Pool(model, num_blocks=128, block_size=4, num_states=8, state_every=EVERY)


def empty(pool: Pool) -> None:
    pool.manager.audit()
    assert pool.manager.num_free_blocks == pool.manager.num_blocks
    assert pool.manager.num_free_states == pool.manager.num_states


def through_prompts(model: PreTrainedModel, expected: tuple[Tensor, Tensor], each: list[tuple[Tensor, Tensor]]) -> str:
    """With hits: the first prompt was computed before, without padding; the second after it, with more of it."""
    ids, mask = batch()
    if keeps_states(model):
        return through_states(model, expected, each)
    extended = torch.cat([torch.zeros(1, 3, dtype=ids.dtype), ids[1:]], 1)
    held = PagedCache(model.config, num_blocks=128, block_size=4)
    try:
        for prompt in (ids[:1, :17], extended):
            given = (prompt > 0).long()
            held.begin(prompt, given)
            generate(model, prompt, given, held, 1)
    except UnsupportedModel as error:
        return str(error)
    held.begin(ids, mask)
    assert held.manager.stats().hit_tokens > 0
    outcome = check(generate(model, ids, mask, held), expected)
    held.close()
    empty(held.pool)
    return outcome


def through_states(model: PreTrainedModel, expected: tuple[Tensor, Tensor], each: list[tuple[Tensor, Tensor]]) -> str:
    """With hits at a checkpoint, which a row with padding has left where its tokens ended on the grid."""
    ids, mask = batch()
    held = PagedCache(model.config, pool=stateful(model))
    goes_on = not goes_on_by_one(type(model))
    longer = torch.cat([ids[:1].flip(1), ids[:1, :3]], 1)
    before = torch.cat([longer, pad(ids[:1, :EVERY], (longer.shape[1] - EVERY, 0))])
    try:
        assert held.begin(before, before > 0) == 0
    except UnsupportedModel as error:
        return str(error)
    generate(model, before, (before > 0).long(), held, 1)
    held.crop(0)  # nothing: the pass counts now
    assert held.begin(ids[:1]) == (EVERY if goes_on else 0)
    outcome = check(generate(model, ids[:1], mask[:1], held), each[0])
    assert held.begin(ids, mask) == 0  # no column is on the grid of both rows
    check(generate(model, ids, mask, held), expected)
    held.close()
    empty(held.pool)
    return outcome if goes_on else FOUND_BY_NONE


def through_generate(model: PreTrainedModel, each: list[tuple[Tensor, Tensor]]) -> str:
    """Two ragged rows, in chunks, as there is no padding here; twice, where states are found again at checkpoints."""
    ids, mask = batch()
    prompts = [line[held.bool()] for line, held in zip(ids, mask, strict=True)]
    seen: list[list[Tensor]] = [[] for _ in prompts]

    def keep(number: int) -> LogitsProcessor:
        def process(ids: Tensor, scores: Tensor) -> Tensor:
            seen[number].append(scores[0].clone())
            return scores

        return process

    requests = [
        Request(tuple(prompt.tolist()), NEW, logits_processors=(keep(number),)) for number, prompt in enumerate(prompts)
    ]
    options: dict[str, Any] = {"block_size": 4}
    again = False
    try:
        if keeps_states(model):
            again, options = True, {"pool": stateful(model)}
        for told in range(1 + again):
            with kvblocks.generate(model, requests, max_batch_tokens=9, **options) as run:
                tokens = run.run()
                assert run.pool is not None
                empty(run.pool)
                assert run.scheduler.num_hit == told * sum((length - 1) // EVERY * EVERY for length in LENGTHS)
            for got, scores, expected in zip(tokens, seen, each, strict=True):
                check((torch.tensor([got]), torch.stack(scores)[None]), expected)
                scores.clear()
    except UnsupportedModel as error:
        return str(error)
    return IDENTICAL


@pytest.mark.parametrize("name", tiny_models.architectures())
def test_generates_what_transformers_own_cache_generates(name: str) -> None:
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    model = build(name)
    outcome = _outcomes[name] = Outcome()
    if model.config.is_encoder_decoder:
        outcome.cache = outcome.prompts = outcome.generate = "an encoder-decoder"
        with pytest.raises(UnsupportedModel, match="encoder-decoder"):
            PagedCache(model.config)
        return
    try:
        expected = generate(model, *batch(), DynamicCache(config=model.config))
    except Exception as error:
        outcome.cache = outcome.prompts = outcome.generate = f"not with DynamicCache either: {reason(error)}"
        return
    outcome.cache = through_cache(model, expected)
    each = alone(model)
    outcome.prompts = through_prompts(model, expected, each) if outcome.cache == IDENTICAL else outcome.cache
    outcome.generate = through_generate(model, each)


def test_most_are_served_and_the_others_say_why() -> None:
    if set(_outcomes) != set(tiny_models.architectures()):
        pytest.skip("not all architectures were asked for")
    lines = ["| architecture | PagedCache | with prompts told | kvblocks.generate |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {o.cache} | {o.prompts} | {o.generate} |" for name, o in sorted(_outcomes.items())]
    lines += [f"| {name} | {why} | | |" for name, why in sorted(tiny_models.LEFT_OUT.items())]
    table = Path(__file__).resolve().parent.parent / "build" / "architectures.md"
    table.parent.mkdir(exist_ok=True)
    table.write_text("\n".join(lines) + "\n")
    assert all(len(why.split()) > 2 or why == IDENTICAL for o in _outcomes.values() for why in vars(o).values())
    served = {kind: sum(vars(o)[kind] == IDENTICAL for o in _outcomes.values()) for kind in vars(Outcome())}
    assert served["cache"] >= 178, f"see {table}"
    assert served["prompts"] >= 170, f"see {table}"
    assert served["generate"] >= 174, f"see {table}"
