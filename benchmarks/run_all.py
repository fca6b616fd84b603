"""Every benchmark, one after the other, each in a process of its own; then one table of how the block managers compare.

Run `python benchmarks/run_all.py [--trace FILE]`: a quarter of an hour with all contenders installed, five minutes with
`--quick`, a minute or two without rivals. What moves K and V, and what has no rival, has its own table above the last.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from contenders import OURS, versions
from harness import RESULTS, Row, machine, report

HERE = Path(__file__).parent
QUICK = {
    "allocation.py": ["--repeats", "2", "--blocks", "131072"],
    "attention.py": ["--quick"],
    "layers.py": ["--quick"],
    "cuda.py": ["--quick"],
    "decode_step.py": ["--batches", "32", "256", "--rounds", "3"],
    "first_token.py": ["--prompt", "256", "--repeats", "1"],
    "generate.py": ["--prompts", "4", "--new", "16", "--repeats", "1", "--long", "256", "--beam-prompt", "256"],
    "hybrid.py": [],
    "memory_footprint.py": ["--blocks", "262144"],
    "plan.py": ["--repeats", "3"],
    "prefix_lookup.py": ["--repeats", "5"],
    "replay.py": ["--blocks", "131072", "--repeats", "3", "--limit", "20"],
    "scale.py": ["--blocks", "1000000", "--seqs", "10000"],
    "storage.py": ["--mebibytes", "32", "--layouts", "NHD", "--allocate", "1024"],
    "states.py": [],
    "stores.py": ["--mebibytes", "64", "--repeats", "5"],
    "tiers.py": ["--mebibytes", "64", "--repeats", "3"],
}
SUMMED = ("allocation", "decode_step", "memory_footprint", "prefix_lookup", "replay")
PARTS = (": admit", ": decode", ": free")  # of a replay, whose total is shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller workloads, fewer repeats")
    parser.add_argument("--trace", type=Path, help="for replay.py; by default a small trace is made up")
    parser.add_argument("--only", nargs="+", choices=sorted(QUICK), default=sorted(QUICK), metavar="FILE")
    options = parser.parse_args()
    rows: list[Row] = []
    for script in options.only:
        command = [sys.executable, str(HERE / script), *(QUICK[script] if options.quick else [])]
        if script == "replay.py" and options.trace:
            command += ["--trace", str(options.trace.resolve())]
        start = time.perf_counter()
        print(f"== {script}", flush=True)
        failed = subprocess.run(command).returncode
        print(f"== {script} took {time.perf_counter() - start:.0f} s{' and failed' if failed else ''}", flush=True)
        if not failed and script.removesuffix(".py") in SUMMED:
            rows += read(script.removesuffix(".py"))
    if not rows:
        return
    report(
        "Block managers",
        rows,
        ours=OURS,
        workload="each benchmark's own, as its table above and its JSON say",
        about=machine(versions()),
        name="summary",
    )


def read(name: str) -> list[Row]:
    document = json.loads((RESULTS / f"{name}.json").read_text())
    named = {"decode_step": "decode step, ", "prefix_lookup": "prefix of 32k tokens: ", "replay": "replay, "}.get(
        name, ""
    )
    rows = [Row(**row) for row in document["rows"]]
    return [
        Row(named + row.workload, row.seconds, measure=row.measure) for row in rows if not row.workload.endswith(PARTS)
    ]


if __name__ == "__main__":
    main()
