"""The planner: how long the command takes on a bare config.json, and what hybrid models take in groups over one pool.

Run `python benchmarks/plan.py`. The first table is of whole processes, Python's own start included. The second is of
bytes per sequence for the numbers of published configs, K and V in bfloat16, blocks of 16: what the plan's groups hold,
what a uniform layout would, and the exact minimum, which counts the tokens that a query reaches and no padding.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from contenders import OURS, versions
from harness import Row, compare, machine, report

from kvblocks import plan

LENGTHS = (8192, 32768, 131072)
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "torch_dtype": "bfloat16",
}


def mixed(layers: int, full: list[int], kv_heads: int, head_dim: int, reach: dict[str, int]) -> dict[str, Any]:
    """A config of layers that attend to a window or a chunk, but for those in `full`."""
    [(field, _)] = reach.items()
    far = {"sliding_window": "sliding_attention", "attention_chunk_size": "chunked_attention"}[field]
    return {
        "model_type": "gemma2" if field == "sliding_window" else "llama4_text",
        "transformers_version": "5.0.0",
        "num_hidden_layers": layers,
        "num_attention_heads": kv_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "layer_types": ["full_attention" if i in full else far for i in range(layers)],
        "dtype": "bfloat16",
        **reach,
    }


def every(layers: int, period: int, offset: int) -> list[int]:
    return list(range(offset, layers, period))


MODELS = {
    "Gemma 2 9B": mixed(42, every(42, 2, 1), 8, 256, {"sliding_window": 4096}),
    "Gemma 2 27B": mixed(46, every(46, 2, 1), 16, 128, {"sliding_window": 4096}),
    "Gemma 3 4B": mixed(34, every(34, 6, 5), 4, 256, {"sliding_window": 1024}),
    "Gemma 3 12B": mixed(48, every(48, 6, 5), 8, 256, {"sliding_window": 1024}),
    "Gemma 3 27B": mixed(62, every(62, 6, 5), 16, 128, {"sliding_window": 1024}),
    "Ministral 8B": mixed(36, every(36, 4, 0), 8, 128, {"sliding_window": 32768}),
    "gpt-oss 20B": mixed(24, every(24, 2, 1), 8, 64, {"sliding_window": 128}),
    "gpt-oss 120B": mixed(36, every(36, 2, 1), 8, 64, {"sliding_window": 128}),
    "Llama 4 Scout": mixed(48, every(48, 4, 3), 8, 128, {"attention_chunk_size": 8192}),
    "Command R7B": mixed(32, every(32, 4, 3), 8, 128, {"sliding_window": 4096}),
}


def times(repeats: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(LLAMA))

        def process(*arguments: str) -> None:
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)

        asked = [str(config), "--memory", "80GiB", "--seq-len", "8192"]
        rows = []
        for name, arguments in {"--json": [*asked, "--json"], "table": asked}.items():
            contenders = {
                OURS: lambda arguments=arguments: process("-m", "kvblocks", "plan", *arguments),
                "python -c pass": lambda: process("-c", "pass"),
                "python -c 'import torch'": lambda: process("-c", "import torch"),
            }
            rows.append(Row(f"kvblocks plan, {name}", compare(contenders, repeats)))
        return rows


def sizes() -> list[Row]:
    rows = []
    for name, config in MODELS.items():
        for length in LENGTHS:
            planned = plan(config, seq_len=length)
            held = planned.sequence_bytes(length)
            minimum = planned.cache_bytes(length)
            uniform = minimum / (1 - planned.uniform_waste())
            found = {OURS: float(held), "uniform": uniform, "minimum": float(minimum)}
            notes = {"groups": len(planned.groups), "waste": planned.waste(), "uniform_waste": planned.uniform_waste()}
            rows.append(Row(f"{name}, {length // 1024}k", found, notes=notes, measure="B"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    about = machine(versions())
    report("The command", times(options.repeats), ours=OURS, workload="a Llama's config", about=about, name="plan")
    report(
        "Bytes per sequence",
        sizes(),
        ours=OURS,
        workload="published configs, bfloat16, blocks of 16",
        about=about,
        name="hybrid_bytes",
    )


if __name__ == "__main__":
    main()
