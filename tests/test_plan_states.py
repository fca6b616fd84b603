"""Plans of models with states: the slots that they propose, and engines that allocate what they say, to the byte."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from test_plan_groups import allocated

from kvblocks import BlockManager, CacheEngine, Plan, StepBuffers, plan
from kvblocks.cli.main import main
from kvblocks.config import CacheConfig, LayerTensor, key_value
from kvblocks.errors import OutOfMemory
from kvblocks.planner import smallest_changes
from kvblocks.planner.text import amount

CONFIGS = Path(__file__).parent / "data" / "configs"
README = Path(__file__).resolve().parents[1] / "README.md"
MODELS: dict[str, Any] = {
    "Qwen3-Next 80B": CONFIGS / "qwen3-next-80b-a3b.json",
    "Qwen3.5 35B": CONFIGS / "qwen3.5-35b-a3b.json",
    "Nemotron 3 Nano": CONFIGS / "nemotron-3-nano-30b-a3b.json",
    "Falcon-H1 7B": CONFIGS / "falcon-h1-7b.json",
    "Kimi Linear 48B": CONFIGS / "kimi-linear-48b-a3b.json",
}
SMALL = {
    "model_type": "granitemoehybrid",
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_d_conv": 4,
    "max_position_embeddings": 4096,
    "dtype": "bfloat16",
}
STATE = 2 * ((8 * 16 + 2 * 8) * 3 * 2 + 8 * 16 * 8 * 4)
BLOCK = 2 * (16 + 16) * 2 * 16


def engine_of(planned: Plan, **options: Any) -> CacheEngine:
    assert planned.num_states is not None
    return CacheEngine(planned.cache_config(), planned.storage_dtype, "cpu", num_states=planned.num_states, **options)


@pytest.mark.parametrize(
    "asked",
    [
        {"memory": "1GiB"},
        {"memory": "1GiB", "concurrency": 3, "seq_len": 500},
        {"memory": "1GiB", "tp": 2, "sequences": 4, "checkpoints": 9},
        {"memory": "1GiB", "dtype": "fp8", "block_size": 48},
        {"memory": "1GiB", "dtype": "int4", "group_size": 32, "checkpoints": 0},
        {"concurrency": 2, "seq_len": 1000, "dtype": "float32"},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", [*MODELS, "GLM 5.1"])
def test_engines_allocate_what_plans_say(name: str, asked: dict[str, Any]) -> None:
    planned = plan(MODELS.get(name, CONFIGS / "glm-5.1-nvfp4.json"), **asked)
    engine = engine_of(planned, layout="NHD")
    assert planned.num_blocks is not None
    assert planned.num_states is not None
    assert bool(planned.num_states) == (name != "GLM 5.1")  # which keeps index keys for a token, and no state
    said = planned.num_blocks * planned.block_bytes + planned.num_states * planned.state_bytes
    assert allocated(engine) == engine.memory_bytes == said
    if planned.memory is not None:
        assert planned.memory - planned.block_bytes < said <= planned.memory


def test_slots_are_for_the_sequences_that_run_and_for_checkpoints() -> None:
    asked = plan(SMALL, seq_len=100, concurrency=5)
    assert (asked.running, asked.checkpoints, asked.num_states) == (5, 5, 10)
    assert asked.memory_for(5, 100) == 5 * 7 * BLOCK + 10 * STATE
    assert "states: 5 sequences + 5 checkpoints = 10 slots" in asked.explain()
    assert plan(SMALL, concurrency=5, checkpoints=0).num_states == 5
    assert plan(SMALL, concurrency=5, checkpoints=90, sequences=8).num_states == 98
    unknown = plan(SMALL)
    assert (unknown.running, unknown.checkpoints, unknown.num_states) == (None, None, None)
    for found in (plan(SMALL, concurrency=5).to_dict(), asked.to_dict()):
        assert (found["sequences"], found["checkpoints"], found["num_states"]) == (5, 5, 10)
    for engine in ("vllm", "sglang", "llama.cpp"):
        assert plan(SMALL, engine=engine, concurrency=5).num_states == 0
    assert plan({"num_layers": 2, "num_kv_heads": 2, "head_dim": 8}, memory="1MiB").num_states == 0


def test_memory_for_sequences_with_state_and_blocks() -> None:
    asked: dict[str, Any] = {"memory": "1MiB", "checkpoints": 0}
    planned = plan(SMALL, **asked, activations=1000, weights=500, seq_len=40, concurrency=5)
    assert (planned.state_bytes, planned.block_bytes) == (STATE, BLOCK)
    assert planned.sequence_bytes(40) == 3 * BLOCK + STATE
    assert planned.memory_for(5, 40) == 5 * (3 * BLOCK + STATE) + 1500
    assert f"memory needed: 5 sequences × {amount(3 * BLOCK + STATE)} + 500 B weights + 1,000 B activations = " in (
        planned.explain()
    )
    assert amount(planned.memory_for(5, 40)) in planned.explain()
    apart = plan(SMALL, **asked, sequences=9)
    assert apart.num_blocks == (2**20 - 9 * STATE) // BLOCK
    assert apart.memory_for(5, 40) == 15 * BLOCK + 9 * STATE
    assert apart.max_concurrency(1) == 9
    beyond = plan(SMALL, **asked, sequences=9, concurrency=10)
    assert not beyond.fits
    assert "state is set aside for 9 sequences only" in beyond.explain()


def test_without_a_number_of_sequences_as_many_as_fit_have_slots() -> None:
    planned = plan(SMALL, memory="8MiB", seq_len=160)
    most = 2**23 // (10 * BLOCK + 2 * STATE)
    assert (planned.running, planned.num_states) == (most, 2 * most)
    assert planned.max_concurrency(160) == most
    assert planned.num_blocks == (2**23 - 2 * most * STATE) // BLOCK >= 10 * most
    assert f"states: {most} sequences of 160 tokens, as many as fit + {most} checkpoints = " in planned.explain()
    longest = plan(SMALL, memory="8MiB")
    assert longest.running == 2**23 // (256 * BLOCK + 2 * STATE)  # of 4,096 tokens, what the model was made for
    assert plan(SMALL | {"max_position_embeddings": 10**6}, memory="9MiB").running == 2  # of 32,768
    assert plan(SMALL, memory="64KiB").running == 1  # though not one of 4,096 tokens fits
    assert plan(SMALL, memory="8MiB", weights="1GiB").running == 1


def test_no_checkpoints_is_a_change_that_helps() -> None:
    planned = plan(SMALL, memory=5 * 7 * BLOCK + 5 * STATE, seq_len=100, concurrency=5)
    assert planned.missing_bytes == 5 * STATE
    changes = {change.setting: change.value for change in smallest_changes(planned, 9)}
    assert changes["checkpoints"] == 0
    assert plan(SMALL, memory=planned.memory, seq_len=100, concurrency=5, checkpoints=0).fits


def test_a_model_of_states_alone_has_no_checkpoints() -> None:
    """They hang on blocks, and there are none."""
    mamba = {"model_type": "mamba2", "num_hidden_layers": 2, "num_heads": 8, "head_dim": 16, "n_groups": 2}
    planned = plan(mamba | {"state_size": 32, "conv_kernel": 4, "dtype": "bfloat16"}, memory="1MiB", concurrency=3)
    assert (planned.running, planned.checkpoints, planned.num_states) == (3, 0, 0)


@pytest.mark.parametrize(
    ("checkpoints", "error"), [(-1, ValueError), (2**31, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_a_wrong_number_of_checkpoints_is_named(checkpoints: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"checkpoints={checkpoints}"):
        plan(SMALL, checkpoints=checkpoints)


def test_layers_without_blocks_are_in_the_config() -> None:
    planned = plan(SMALL, memory="1MiB", tp=2)
    assert planned.cache_layers == (0, 1, 2)
    states = (
        LayerTensor("convolution", (4 * 16 + 2 * 8, 3), "bfloat16", "sequence"),
        LayerTensor("recurrent state", (4, 16 * 8), "float32", "sequence"),
    )
    assert planned.cache_config().layers == (states, key_value(1, 16), states)


def test_the_command_takes_and_prints_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(SMALL))
    assert main(["plan", str(config), "--concurrency", "5", "--checkpoints", "7", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_states"] == 12


class Driven:
    """The engine and manager of a plan."""

    def __init__(self, planned: Plan, max_seqs: int, max_seq_len: int) -> None:
        self.engine = engine_of(planned, layout="NHD")
        config = self.engine.config
        self.manager = BlockManager.for_config(config, num_states=self.engine.num_states, watermark=0)
        self.step = StepBuffers.for_config(config, max_seqs=max_seqs, max_tokens=2048, max_seq_len=max_seq_len)

    def run(self, seqs: list[int], number: int) -> None:
        step_id = self.manager.prepare(seqs, number, self.step)
        self.engine.move(self.step)
        self.manager.commit(step_id)

    def prefill(self, tokens: list[int]) -> int:
        seq, at = self.manager.admit(tokens, reserve=0)
        while at < len(tokens):
            end = min(at + 2048, len(tokens))
            checkpoint = self.manager.next_checkpoint(seq)
            end = checkpoint if at < checkpoint < end else end
            self.run([seq], end - at)
            at = end
        return seq


def test_the_sequences_of_a_plan_run_in_its_engine_and_leave_their_checkpoints() -> None:
    length, number = 300, 6
    memory = plan(SMALL, seq_len=length, concurrency=number).memory_for(number, length)
    planned = plan(SMALL, memory=memory, seq_len=length, concurrency=number)
    assert planned.fits
    driven = Driven(planned, number, length)
    assert driven.engine.memory_bytes <= memory
    prompts = [[1000 * i + j for j in range(length - 3)] for i in range(number)]
    seqs = [driven.prefill(prompt) for prompt in prompts]
    for _ in range(3):
        driven.manager.append(seqs, [1] * number)
        driven.run(seqs, 1)
    assert [driven.manager.match(prompt) for prompt in prompts] == [256] * number
    driven.manager.audit()


@pytest.mark.parametrize("name", MODELS)
def test_the_table_of_the_readme_is_what_engines_allocate(name: str) -> None:
    """At 32k tokens, one sequence: it runs in what its plan allocates, and nothing would be left for another block."""
    cell = r"\+([\d.]+) %"
    rows = re.search(
        rf"^\| {re.escape(name)} \| ([\d,]+) MB \| {cell} \| {cell} \| {cell} \|$", README.read_text(), re.M
    )
    assert rows is not None
    length, over = 32768, []
    minimum = plan(MODELS[name]).cache_bytes(length)
    for checkpoints in (0, 1):
        planned = plan(MODELS[name], seq_len=length, concurrency=1, checkpoints=checkpoints)
        driven = Driven(planned, 1, length)
        seq = driven.prefill(list(range(length)))
        assert driven.manager.num_free_blocks == 0
        assert driven.manager.match(list(range(length - 1))) == 0
        driven.manager.append(seq, 1)
        over.append(allocated(driven.engine) / minimum - 1)
    assert over[0] < 0.05
    over.append(plan(MODELS[name], engine="vllm").sequence_bytes(length) / minimum - 1)
    assert rows.groups() == (f"{minimum / 1e6:,.0f}", *(f"{100 * each:.1f}" for each in over))


HYBRID = (
    (*key_value(2, 8), LayerTensor("index", (1, 4), "float8_e4m3fn")),
    (LayerTensor("state", (5, 9), "float32", "sequence"),),
)


def test_for_memory_leaves_room_for_states() -> None:
    config = CacheConfig.for_memory(layers=HYBRID, memory_bytes=100_000, dtype="bfloat16", num_states=7)
    block, state = 16 * (2 * 16 * 2 + 4), 180
    assert config.num_gpu_blocks == (100_000 - 7 * state) // block
    with pytest.raises(ValueError, match="beside num_states=7, which are 1260 bytes"):
        CacheConfig.for_memory(layers=HYBRID, memory_bytes=7 * state + block - 1, dtype="bfloat16", num_states=7)
    with pytest.raises(ValueError, match="num_states=-1"):
        CacheConfig.for_memory(layers=HYBRID, memory_bytes=100_000, dtype="bfloat16", num_states=-1)
    with pytest.raises(TypeError, match=r"num_states=1\.5"):
        CacheConfig.for_memory(layers=HYBRID, memory_bytes=100_000, dtype="bfloat16", num_states=1.5)  # type: ignore[arg-type]


def test_for_device_counts_states_and_named_tensors() -> None:
    layers = iter(HYBRID)  # read once
    engine = CacheEngine.for_device(
        dtype="bfloat16", device="cpu", layers=layers, memory="1MiB", num_states=7, layout="NHD"
    )
    block, state = 16 * (2 * 16 * 2 + 4), 180
    assert engine.num_blocks == (2**20 - 7 * state) // block
    assert allocated(engine) == engine.memory_bytes == engine.num_blocks * block + 7 * state
    assert engine.num_states == 7


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({"num_states": 0}, ValueError, "layer 1 keeps a state for each sequence, and num_states=0"),
        ({"num_states": -1}, ValueError, "num_states=-1"),
        ({"num_states": 7, "memory": 1000}, OutOfMemory, "holds no block of 1088 bytes beside 7 states of 180 bytes"),
        ({"num_states": 7, "num_layers": 2}, TypeError, "num_layers=2 is given beside layers"),
        ({"num_states": 7, "device": None}, TypeError, "needs dtype and device"),
        ({"num_states": 7, "dtype": None}, TypeError, "needs dtype and device"),
    ],
)
def test_for_device_says_what_is_wrong_with_states(asked: Any, error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cpu", "layers": HYBRID, "memory": "1MiB"}
    with pytest.raises(error, match=message):
        CacheEngine.for_device(**given | asked)
