"""The planner: how long the command takes on a bare config.json, and what hybrid models take in groups over one pool.

Run `python benchmarks/plan.py`. The first table is of whole processes, Python's own start included. The second is of
bytes per sequence for the numbers of published configs, K and V in bfloat16, blocks of 16: what the plan's groups hold,
what a uniform layout would, and the exact minimum, which counts the tokens that a query reaches and no padding. The
third holds figures that serving engines printed (`tests/data/engine_figures.json`) beside those of this planner and of
other calculators, as shares of the printed one. These are on PyPI, and each needs an environment of its own:

    python -m venv DIR && DIR/bin/pip install hf-mem    # or kvfit, or ridgepoint
    python benchmarks/plan.py --calculator hf-mem=DIR/bin/python --calculator kvfit=...

One that is not named is looked for beside kvblocks, and left out where it is not installed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calculators import CALCULATORS, Question, ask
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


# --- other calculators

DATA = Path(__file__).resolve().parent.parent / "tests" / "data"
FIGURES: list[dict[str, Any]] = json.loads((DATA / "engine_figures.json").read_text())
SHORT = (64, 128)  # tokens from which those of one token and of the state follow: whole pages, and below all windows


def asked_of_others(case: dict[str, Any]) -> bool:
    """Whether other calculators can be asked: by a config, in a dtype that they take, for latents as they are kept."""
    arguments = case["arguments"]
    own = arguments.get("mla") == "expanded" or arguments.get("dtype") == "q8_0"
    return not own and case["figure"] not in ("block_size", "num_blocks")


def figure_name(case: dict[str, Any]) -> str:
    figure, arguments = case["figure"], case["arguments"]
    if figure == "max_tokens":
        figure = f"tokens in {arguments['memory']:,} B"
    dtype = f", {arguments['dtype']}" if "dtype" in arguments else ""
    latent = ", latents expanded" if arguments.get("mla") == "expanded" else ""
    return f"{case['model']}: {figure.replace('_', ' ')}{dtype}{latent} ({case['engine']})"


def questions(case: dict[str, Any]) -> list[Question]:
    """Of one sequence: at the length that is asked about, or at three from which a token and the state follow."""
    config = json.loads((DATA / "configs" / f"{case['model']}.json").read_text(encoding="utf-8-sig"))
    size = 1 if case["arguments"].get("dtype") in ("fp8", "q8_0") else 2
    _, _, tokens = case["figure"].partition(" of ")
    packed = case["figure"] == "bytes a token and layer"
    return [Question(config, length, size, packed) for length in ([int(tokens)] if tokens else SHORT)]


def figure_of(case: dict[str, Any], answers: list[float | str]) -> float | None:
    """The figure from a calculator's bytes; None where it gave none."""
    numbers = [answer for answer in answers if not isinstance(answer, str)]
    if len(numbers) != len(answers):
        return None
    arguments, figure = case["arguments"], case["figure"]
    if figure.startswith("bytes of"):
        return numbers[0]
    if figure.startswith("sequences of"):
        return float(arguments["memory"] / numbers[0])
    token = (numbers[1] - numbers[0]) / (SHORT[1] - SHORT[0])
    if figure == "state_bytes":
        return numbers[0] - SHORT[0] * token
    if figure == "max_tokens":
        return float(arguments["memory"] / token)
    if figure == "bytes a token and layer":
        return token / len(plan(DATA / "configs" / f"{case['model']}.json").model.layers)
    return token


def ours(case: dict[str, Any]) -> float:
    planned = plan(DATA / "configs" / f"{case['model']}.json", **case["arguments"])
    what, _, tokens = case["figure"].partition(" of ")
    if case["figure"] == "bytes a token and layer":
        return planned.bytes_per_token / len(planned.model.layers)
    if what == "bytes":
        return float(planned.cache_bytes(int(tokens)))
    if what == "sequences":
        return (planned.num_blocks or 0) / planned.blocks_for(int(tokens))
    return float(getattr(planned, case["figure"]))


def calculators(pythons: dict[str, str], about: Mapping[str, str]) -> None:
    """Print each figure that an engine printed, and what every calculator makes of it, as a share."""
    cases = [case for case in FIGURES if asked_of_others(case)]
    columns: dict[str, list[float | None]] = {OURS: [ours(case) for case in cases]}
    reasons: dict[str, list[str]] = {}
    for name in CALCULATORS:
        asked = [questions(case) for case in cases]
        try:
            version, flat = ask(name, pythons.get(name, sys.executable), [one for group in asked for one in group])
        except (ModuleNotFoundError, FileNotFoundError) as error:
            print(f"{name} is left out: {error}")
            continue
        answers = iter(flat)
        found = [[next(answers) for _ in group] for group in asked]
        head = f"{name} {version}"
        columns[head] = [figure_of(case, group) for case, group in zip(cases, found, strict=True)]
        reasons[head] = sorted({answer for group in found for answer in group if isinstance(answer, str)})
    print(f"\n{'; '.join(about.values())}\n\n| printed by an engine | {' | '.join(columns)} |")
    print(f"| --- |{' ---: |' * len(columns)}")
    for i, case in enumerate(cases):
        shares = [column[i] for column in columns.values()]
        cells = ["no answer" if share is None else f"{share / case['printed']:.3f}" for share in shares]
        print(f"| {figure_name(case)}: {case['printed']:,} | {' | '.join(cells)} |")
    for name, why in reasons.items():
        for reason in why:
            print(f"{name}: {reason}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--calculator", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--only-calculators", action="store_true", help="the third table alone")
    options = parser.parse_args()
    about = machine(versions())
    pythons = dict(pair.split("=", 1) for pair in options.calculator)
    if unknown := pythons.keys() - CALCULATORS.keys():
        parser.error(f"{', '.join(sorted(unknown))}: not among {', '.join(CALCULATORS)}")
    calculators(pythons, about)
    if options.only_calculators:
        return
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
