"""Plans for cards by name: how the model splits over them, which split is best, and how many are needed."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvblocks import plan
from kvblocks.cli.main import main
from kvblocks.planner import CARDS, smallest_changes, splits
from kvblocks.planner.cards import card_memory, parse_gpu
from kvblocks.planner.splits import best_split, fewest_devices

LLAMA_70B: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "torch_dtype": "bfloat16",
}
WEIGHTS = 141_107_412_992


def test_cards_by_the_names_that_people_write() -> None:
    assert parse_gpu("h100:8") == parse_gpu(" H100:8") == ("h100", 8)
    assert parse_gpu("RTX 4090") == ("rtx4090", None)
    assert parse_gpu("a100-40GB:2") == ("a100-40g", 2)
    assert all(parse_gpu(name) == (name, None) for name in CARDS)
    assert card_memory("h100") == 81559 * 2**20
    assert all(8 * 2**30 < card_memory(name) < 2**39 for name in CARDS)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"gpu": "h10"}, ValueError, "gpu='h10' is not a card in the table; give memory, or one of t4, "),
        ({"gpu": "h100:0"}, ValueError, "gpu='h100:0': after the colon comes the number of cards, 1 to 4096"),
        ({"gpu": "h100:x"}, ValueError, "after the colon comes the number of cards"),
        ({"gpu": 5}, TypeError, "gpu=5 is of type int"),
        ({"gpu": "h100", "memory": "80GiB"}, ValueError, "memory='80GiB' and gpu='h100': the card says its memory"),
        ({"gpu": "h100:2", "tp": 4}, ValueError, "tp=4 and pp=1 need 4 cards; gpu='h100:2' has 2"),
        ({"gpu": "h100:2", "pp": 4}, ValueError, "tp=1 and pp=4 need 4 cards"),
    ],
)
def test_cards_that_are_none(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan(LLAMA_70B, **arguments)


def test_every_size_side_by_side_and_the_best_is_planned() -> None:
    planned = plan(LLAMA_70B, gpu="h100:8", weights=WEIGHTS, seq_len="32k", concurrency=20)
    found = splits(planned)
    assert [(split.tp, split.copies) for split in found] == [(1, 8), (2, 4), (4, 2), (8, 1)]
    assert [split.sequences for split in found] == [0, 8, 36, 50]
    assert (planned.settings.tp, planned.settings.copies, planned.fits) == (8, 1, True)
    for split in found:
        alone = plan(LLAMA_70B, memory=card_memory("h100"), tp=split.tp, weights=WEIGHTS)
        assert split.sequences == split.copies * alone.max_concurrency(32768)
    shown = planned.explain()
    assert "blocks of 16, tp=8, 8 × h100\n" in shown
    assert "tp=4: 2 copies on 4 cards each, with 32.85 GiB of weights and " in shown
    assert next(line for line in shown.splitlines() if "the best" in line).startswith("tp=8: 1 copy on 8 cards each")
    marked = [split["tp"] for split in planned.to_dict()["splits"] if split["best"]]
    assert (marked, planned.to_dict()["gpus"]) == ([8], 8)


@pytest.mark.parametrize("seq_len", [None, "32k"])
@pytest.mark.parametrize("cards", ["h100:8", "h100"])
def test_where_no_size_holds_a_sequence_none_is_the_best(cards: str, seq_len: str | None) -> None:
    planned = plan(LLAMA_70B, gpu=cards, weights=64 * WEIGHTS, seq_len=seq_len)
    found, shown = planned.to_dict(), planned.explain()
    assert len(found["splits"]) == 4
    assert not any(split["best"] or split["sequences"] for split in found["splits"])
    assert "the best" not in shown
    assert "copies" not in shown
    length = "32,768" if seq_len else "131,072"
    assert f"no size of tensor parallelism holds a sequence of {length} tokens" in found["notes"]
    assert found["tp"] == (8 if cards == "h100:8" else 1)  # the one that lacks the least


def test_room_for_less_than_a_sequence_is_not_the_best() -> None:
    """What fits where no length is asked for may hold some tokens, and no sequence of the model's own length."""
    planned = plan(LLAMA_70B, gpu="h100:1", weights=75 * 2**30)
    assert planned.fits
    assert planned.num_blocks
    assert "the best" not in planned.explain()


def test_copies_share_the_sequences() -> None:
    """A latent is kept whole on every device, so that copies hold more than one model over all cards."""
    latent = {"model_type": "deepseek_v3", "num_hidden_layers": 61, "num_attention_heads": 128, "kv_lora_rank": 512}
    latent |= {"qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "torch_dtype": "bfloat16"}
    planned = plan(latent, gpu="h200:8", weights="50GiB", seq_len="32k", concurrency=101)
    assert (planned.settings.tp, planned.settings.copies) == (1, 8)
    assert planned.target == (13, 32768)
    shown = planned.explain()
    assert "8 copies of the model on 1 card each; figures are of one copy, which holds 13 of the 101 sequences" in shown
    assert "memory needed: 13 sequences" in shown
    one = plan(latent, gpu="h200:8", tp=8, weights="50GiB", seq_len="32k", concurrency=101)
    assert (one.settings.copies, one.target) == (1, (101, 32768))


def test_as_many_cards_as_are_needed() -> None:
    asked: dict[str, Any] = {"weights": WEIGHTS, "seq_len": "32k", "concurrency": 20}
    planned = plan(LLAMA_70B, gpu="h100", **asked)
    assert planned.fits
    devices = planned.settings.tp * len(planned.settings.stages)
    assert f"{devices} h100 cards needed, the fewest" in planned.explain()
    assert devices in (1, 2, 4) or devices % 8 == 0  # as people have them
    fewer = [(tp, few // tp) for few in (1, 2, 4, 8, 16) if few < devices for tp in (1, 2, 4, 8) if few % tp == 0]
    assert fewer
    assert not any(plan(LLAMA_70B, memory=card_memory("h100"), tp=tp, pp=pp, **asked).fits for tp, pp in fewer)
    one = plan(LLAMA_70B, gpu="b300", **{**asked, "concurrency": 5})
    assert (one.settings.tp, one.settings.stages, one.fits) == (1, (80,), True)
    assert "1 b300 card needed" in one.explain()


def test_a_model_of_several_nodes_runs_a_stage_on_each() -> None:
    """61 layers of DeepSeek V3 that 9 cards would hold: two nodes of 8, not 9 stages of a card each."""
    latent = {"model_type": "deepseek_v3", "num_hidden_layers": 61, "num_attention_heads": 128, "kv_lora_rank": 512}
    latent |= {"qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "torch_dtype": "bfloat16"}
    asked: dict[str, Any] = {"weights": "671GB", "seq_len": "32k", "concurrency": 16}
    planned = plan(latent, gpu="h100", **asked)
    assert (planned.settings.tp, planned.settings.stages) == (8, (31, 30))
    assert plan(latent, memory=card_memory("h100"), pp=9, **asked).fits
    changes = {change.setting: change.value for change in smallest_changes(plan(latent, memory="80GiB", **asked), 9)}
    assert changes["pp"] == 16  # a power of two, as 61 layers do not divide


def test_where_no_number_of_cards_does() -> None:
    planned = plan(LLAMA_70B, gpu="t4", weights="10TiB")
    assert (planned.fits, fewest_devices(planned), planned.settings.tp) == (False, None, 1)
    assert "does not fit" in planned.explain()
    assert "needed" not in planned.explain().split("does not fit")[0]


def test_weights_that_are_not_counted_are_said() -> None:
    assert "no weights are counted, which decide how many cards are needed" in plan(LLAMA_70B, gpu="h100:8").explain()


@given(st.integers(1, 12), st.integers(0, 2**38), st.integers(1, 100))
def test_the_best_split_is_no_worse_than_any_other(cards: int, weights: int, sequences: int) -> None:
    planned = plan(LLAMA_70B, gpu=f"h100:{cards}", weights=weights, seq_len=4096, concurrency=sequences)
    found = splits(planned)
    best = best_split(found)
    assert planned.settings.tp == best.tp
    assert all(split.tp * split.copies <= cards < split.tp * (split.copies + 1) for split in found)
    assert planned.fits == any(split.plan.fits for split in found)
    assert best.sequences == max(split.sequences for split in found if split.plan.fits == planned.fits)
    assert all(a.tp < b.tp for a, b in pairwise(found))


def test_the_command(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    asked = [str(tmp_path), "--weights", "141GB", "--seq-len", "32k", "--concurrency", "20"]
    assert main(["plan", *asked, "--gpu", "h100:8"]) == 0
    assert "the best" in capsys.readouterr().out
    assert main(["plan", *asked, "--gpu", "h100:1", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["gpu"] == "h100"
    assert main(["plan", *asked, "--gpu", "h100:2", "--tp", "4", "--json"]) == 2
    assert "--tp 4 and --pp 1 need 4 cards; --gpu h100:2 has 2" in capsys.readouterr().err
