"""Plans of GGUF files, written here by the `gguf` package that also reads them."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from kvblocks import Chunk, Window, plan
from kvblocks.cli.main import main
from kvblocks.errors import UnknownModel

LLAMA = {"block_count": 4, "embedding_length": 64, "context_length": 512, "attention.head_count": 4}
LLAMA |= {"attention.head_count_kv": 2}
LATENT = {**LLAMA, "attention.head_count_kv": 1, "attention.kv_lora_rank": 32, "rope.dimension_count": 8}
LATENT |= {"attention.key_length": 40, "attention.value_length": 32}
LATENT |= {"attention.key_length_mla": 24, "attention.value_length_mla": 16}


def write(path: Path, values: dict[str, Any], architecture: str = "llama", tensors: int = 1) -> Path:
    writer = GGUFWriter(path, architecture)
    for name, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(f"{architecture}.{name}", value)
        elif isinstance(value, list):
            writer.add_array(f"{architecture}.{name}", value)
        else:
            writer.add_uint32(f"{architecture}.{name}", value)
    for i in range(tensors):
        writer.add_tensor(f"blk.{i}.weight", np.zeros((3, 5), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_heads_of_k_and_v(tmp_path: Path) -> None:
    planned = plan(write(tmp_path / "tiny.gguf", LLAMA), weights="auto", dtype="q8_0")
    assert planned.bytes_per_token == 4 * 2 * 2 * (16 + 2)
    assert (planned.model.max_seq_len, planned.model.query_heads, planned.model.name) == (512, (4,), "tiny")
    assert planned.weights_bytes == 60
    assert "weights are those of the checkpoint, by tiny.gguf" in planned.explain()
    own = LLAMA | {"attention.key_length": 24, "attention.value_length": 8}
    assert plan(write(tmp_path / "own.gguf", own)).bytes_per_token == 4 * 2 * (24 + 8) * 2
    each = LLAMA | {"attention.head_count_kv": [2, 0, 1, 4]}
    assert plan(write(tmp_path / "each.gguf", each)).bytes_per_token == (2 + 0 + 1 + 4) * 2 * 16 * 2


def test_latents(tmp_path: Path) -> None:
    path = write(tmp_path / "latent.gguf", LATENT, "deepseek2")
    assert plan(path).bytes_per_token == 4 * (32 + 8) * 2
    assert plan(path, mla="expanded").bytes_per_token == 4 * 4 * (24 + 16) * 2


def test_windows(tmp_path: Path) -> None:
    windowed = {**LLAMA, "block_count": 6, "attention.sliding_window": 32}
    planned = plan(write(tmp_path / "a.gguf", windowed, "gemma3"))
    assert [layer.kept[0].reach for layer in planned.model.layers] == [*[Window(32)] * 5, None]
    said = windowed | {"attention.sliding_window_pattern": [True, False] * 3}
    planned = plan(write(tmp_path / "b.gguf", said, "mine"))
    assert [layer.kept[0].reach for layer in planned.model.layers] == [Window(32), None] * 3
    with pytest.raises(UnknownModel, match="has a window of 32 tokens and does not say in which layers"):
        plan(write(tmp_path / "c.gguf", windowed, "mine"))


def test_parts_of_a_file(tmp_path: Path) -> None:
    first = write(tmp_path / "m-00001-of-00002.gguf", LLAMA, tensors=2)
    with pytest.raises(FileNotFoundError, match=r"m-00002-of-00002\.gguf is not there"):
        plan(first, weights="auto")
    write(tmp_path / "m-00002-of-00002.gguf", {}, tensors=3)
    assert plan(first, weights="auto").weights_bytes == 5 * 60


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnknownModel, match=r"does not know what mamba\.ssm\.state_size=16 means in a GGUF file"):
        plan(write(tmp_path / "a.gguf", LLAMA | {"ssm.state_size": 16}, "mamba"))
    with pytest.raises(UnknownModel, match=r"has no attention\.head_count"):
        plan(write(tmp_path / "b.gguf", {"block_count": 4}))
    with pytest.raises(UnknownModel, match="has 3 numbers for 4 layers"):
        plan(write(tmp_path / "c.gguf", LLAMA | {"attention.head_count_kv": [1, 2, 3]}))
    (tmp_path / "d.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnknownModel, match="is no GGUF file that can be read"):
        plan(tmp_path / "d.gguf")
    with pytest.raises(ValueError, match="weights are as they are stored"):
        plan(write(tmp_path / "e.gguf", LLAMA), weights="auto", weights_dtype="fp8")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert main(["plan", str(tmp_path / "e.gguf"), "--json"]) == 2
    assert 'run: pip install "kvblocks[gguf]"' in capsys.readouterr().err


def test_layers_that_predict_ahead_keep_nothing(tmp_path: Path) -> None:
    ahead = {**LLAMA, "block_count": 5, "nextn_predict_layers": 1, "attention.head_count_kv": [2, 2, 2, 2, 4]}
    planned = plan(write(tmp_path / "ahead.gguf", ahead, "glm4moe"))
    assert planned.bytes_per_token == 4 * 2 * 2 * 16 * 2
    windowed = ahead | {"attention.sliding_window": 32, "attention.sliding_window_pattern": [True, False] * 2 + [True]}
    reaches = [layer.kept[0].reach for layer in plan(write(tmp_path / "b.gguf", windowed, "exaone-moe")).model.layers]
    assert reaches == [Window(32), None] * 2


def test_llama_4_has_chunks_that_a_file_does_not_name(tmp_path: Path) -> None:
    reaches = [
        layer.kept[0].reach for layer in plan(write(tmp_path / "a.gguf", LLAMA, "llama4"), seq_len=32).model.layers
    ]
    assert reaches == [*[Chunk(8192)] * 3, None]
    whole = plan(write(tmp_path / "b.gguf", LLAMA | {"attention.sliding_window": 0}, "llama4"))
    assert [layer.kept[0].reach for layer in whole.model.layers] == [None] * 4


def test_encoders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"bert\.attention.causal is false: a model that attends both ways keeps no"):
        plan(write(tmp_path / "a.gguf", LLAMA | {"attention.causal": False}, "bert"))
    with pytest.raises(UnknownModel, match=r"t5\.decoder_block_count=4 means in a GGUF file; give the model's config"):
        plan(write(tmp_path / "b.gguf", LLAMA | {"decoder_block_count": 4}, "t5"))
