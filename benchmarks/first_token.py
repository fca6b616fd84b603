"""Time to the first token where another process has computed the prompt: from disk, Redis and Mooncake, and without.

Run `python benchmarks/first_token.py [--model FOLDER]`. Each answer is `kvblocks generate` in a process of its own. For
each store one process computes the prompt, stores it and ends; then others take it from there, in turn with some that
have no store. Where one of them does not find the prompt, or its tokens are others, this fails. What loading a model
takes is not counted.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import RESULTS, Row, machine, report
from stores import mooncake_cluster, redis_store

BLOCK_SIZE = 16
AGAIN = "computed again"
ROOM = 1 << 30  # bytes of each store
SECONDS = 590  # that one process may take


class Command:
    """`kvblocks generate` for one prompt."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        prompts = folder / "prompts.jsonl"
        prompts.write_text(json.dumps({"tokens": tokens_of(options.model, options.prompt)}))
        self.arguments = ["--model", options.model, "--prompts", str(prompts), "--max-new-tokens", str(options.new)]
        self.arguments += ["--kv-memory", options.kv_memory, "--host-memory", options.host_memory, "--json"]
        self.arguments += ["--threads", str(options.threads), "--block-size", str(BLOCK_SIZE), "--no-verify"]

    def run(self, *more: str) -> dict[str, Any]:
        """What it reports, with its answer's tokens."""
        command = [sys.executable, "-m", "kvblocks", "generate", *self.arguments, *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with exit status {done.returncode}: {done.stderr}")
        found: dict[str, Any] = json.loads(done.stdout)
        [found["tokens"]] = [entry["tokens"] for entry in found["completions"]]
        return found


def tokens_of(model: str, count: int) -> list[int]:
    """The first tokens of a text that is at hand, as the model's tokenizer has them."""
    import transformers

    from kvblocks import smollm2

    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    text = (Path(__file__).resolve().parent.parent / "ARCHITECTURE.md").read_text()
    if model == "smollm2":
        _, tokenizer = smollm2.load()
    else:
        tokenizer: Any = transformers.AutoTokenizer.from_pretrained(model)
    tokens = list(tokenizer(text)["input_ids"][:count])
    if len(tokens) < count:
        raise SystemExit(f"the text has {len(tokens)} tokens; give --prompt of at most as many")
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2 (default), or a folder")
    parser.add_argument("--prompt", type=int, default=1200, metavar="TOKENS", help="(default: %(default)s)")
    parser.add_argument("--new", type=int, default=8, metavar="TOKENS", help="of each answer (default: %(default)s)")
    parser.add_argument(
        "--grid",
        type=int,
        default=BLOCK_SIZE,
        metavar="TOKENS",
        help="at whose multiples a prompt can be found: 256 where the model keeps states (default: %(default)s)",
    )
    parser.add_argument("--kv-memory", default="128MiB", metavar="SIZE", help="(default: %(default)s)")
    parser.add_argument("--host-memory", default="256MiB", metavar="SIZE", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="that torch computes with (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="on the disk in question (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--inside", action="store_true", help="this is a network namespace for it already")
    options = parser.parse_args()
    missing = mooncake_cluster.run_inside()
    print(f"without Mooncake, which {missing}" if missing else "with Mooncake, over TCP")
    options.folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder)))
        _, port = stack.enter_context(redis_store(folder, ROOM))
        stores = {
            "disk": ["--cache-dir", str(folder / "cache"), "--cache-size", str(ROOM)],
            "Redis": ["--store", f"redis://127.0.0.1:{port}/0"],
        }
        if not missing:
            master = stack.enter_context(mooncake_cluster.master(folder, client_ttl=10, lease_ms=10_000))
            stack.enter_context(mooncake_cluster.lender(master, ROOM))
            stores["Mooncake"] = ["--store", f"mooncake://{master.address}?segment=0"]
        rows = [measure(Command(options, folder), stores, options)]
    report(
        "Time to first token after another process",
        rows,
        ours="disk",
        workload=f"{options.model}, {options.repeats} repeats, threads: {options.threads}; medians",
        about=machine(("kvblocks", "torch", "transformers", "redis", "mooncake-transfer-engine-non-cuda")),
        name="first-token",
    )


def measure(command: Command, stores: dict[str, list[str]], options: argparse.Namespace) -> Row:
    times: dict[str, list[float]] = {name: [] for name in (*stores, AGAIN)}
    right: list[int] = []
    for arguments in stores.values():
        first = command.run(*arguments)
        right = right or first["tokens"]
        check(first, right, 0)
    found = (options.prompt - 1) // options.grid * options.grid
    for _ in range(options.repeats):
        for name, arguments in (*stores.items(), (AGAIN, [])):
            later = command.run(*arguments)
            cached = check(later, right, found if arguments else 0)
            times[name].append(later["seconds_to_first_token"])
            print(f"{name}: {cached:,} of {options.prompt:,} tokens found, first token after {times[name][-1]:.3f} s")
    seconds = {name: statistics.median(taken) for name, taken in times.items()}
    print(f"the {len(right)} tokens of all answers are the same")
    return Row(f"{options.prompt} tokens", seconds, notes={"all": times})


def check(found: dict[str, Any], tokens: list[int], expected: int) -> int:
    """How many tokens came from a store, which must be as many as expected."""
    cached: int = found["cached_tokens_disk"] + found["cached_tokens_store"]
    if cached != expected:
        raise SystemExit(f"{cached} tokens came from the store and not {expected}: {found['stores']}")
    if found["tokens"] != tokens:
        raise SystemExit(f"tokens {found['tokens']} are others than {tokens}, which were computed")
    return cached


if __name__ == "__main__":
    main()
