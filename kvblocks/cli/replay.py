"""The command `kvblocks replay`: run a request trace through a block manager, then say what it did and how fast.

How a replay goes is in `kvblocks.replay`. Imports numpy, rich and matplotlib only when the command runs and needs them.
"""

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvblocks.cli.extras import check_plot, need, save_plot
from kvblocks.errors import UsageError

if TYPE_CHECKING:
    from kvblocks.manager import BlockManager
    from kvblocks.replay import Sample, StoredBlocks, Tally

__all__ = ["add_replay_parser", "run"]

FILE_BLOCKS, SMALL_BLOCKS = 131_072, 4096  # the small trace still sees evictions
MAX_STEP_TOKENS = 8192  # prompt tokens of one prefill step, as serving engines do


def add_replay_parser(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", count: Callable[[str], int]
) -> None:
    """Add the command to a command line; `count` reads a whole number of at least 1."""
    about = "run a request trace through the block manager, without a model, as fast as it goes"
    parser = commands.add_parser("replay", help=about, description=f"{about[0].upper()}{about[1:]}.")
    parser.set_defaults(run=run)
    add = parser.add_argument
    add(
        "trace",
        nargs="?",
        metavar="TRACE",
        help="file of JSON lines with input_length, output_length and hash_ids, one id for each 512 tokens of the "
        "prompt; by default a small trace is made up",
    )
    blocks_help = f"in the pool (default: {FILE_BLOCKS}, and {SMALL_BLOCKS} for the made-up trace)"
    add("--blocks", type=count, metavar="N", help=blocks_help)
    add("--host-blocks", type=count, metavar="N", help="in a second pool, in host memory (default: there is none)")
    add(
        "--store-blocks",
        type=count,
        metavar="N",
        help="in a store below the host pool, such as a disk; needs --host-blocks (default: there is none)",
    )
    add("--block-size", type=count, default=16, metavar="N", help="tokens in a block (default: %(default)s)")
    add("--concurrency", type=count, default=32, metavar="N", help="requests at once, at most (default: %(default)s)")
    add("--limit", type=count, metavar="N", help="requests to replay, from the start of the trace (default: all)")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    add("--plot", metavar="FILE.png", help="draw use of the pool and hit rate over time; the ending picks the format")


def run(args: argparse.Namespace) -> int:
    """Run the command; returns 0.

    Raises:
        UsageError: the trace cannot be read, a request is too long for the pool, or a package is missing.
    """
    from kvblocks.replay import Replay, StoredBlocks, host_step, read_trace, small_trace

    if args.store_blocks and not args.host_blocks:
        raise UsageError("--store-blocks needs --host-blocks, through which blocks come and go")
    if args.concurrency > 2**20:
        raise UsageError(f"--concurrency {args.concurrency} must be at most {2**20}")
    if args.plot:
        check_plot("replay", args.plot)
    if not args.json:
        need("replay", "rich", "its table; --json needs nothing")
    if args.trace is None:
        name, requests = "made-up trace", small_trace()[: args.limit]
    else:
        name = args.trace
        try:
            requests = read_trace(Path(args.trace), args.limit)
        except OSError as error:
            raise UsageError(f"cannot read {args.trace}: {error.strerror or error}") from None
        except ValueError as error:
            raise UsageError(str(error)) from None
        if not requests:
            raise UsageError(f"{args.trace} has no requests")
    manager = _manager(args)
    longest = max(request.input_length + request.output_length for request in requests)
    at_once = min(args.concurrency, len(requests))
    try:
        step = host_step(at_once, max(MAX_STEP_TOKENS, at_once), -(-longest // args.block_size))
    except MemoryError as error:
        raise UsageError(f"the arrays of a step of {at_once} requests: {error}; give less --concurrency") from None
    store = StoredBlocks(manager, args.store_blocks) if args.store_blocks else None
    replay = Replay(manager, step, at_once, store)
    for number, request in enumerate(requests, 1):
        try:
            replay.check(request)
        except ValueError as error:
            raise UsageError(f"request {number} of {name}: {error}; give more --blocks") from None
    with _progress(len(requests), shown=not args.json) as advance:
        tally = replay.run(requests, advance)
    result = summary(tally, manager, name, args.concurrency, store)
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        _print_table(result)
    if args.plot:
        _plot(tally.samples, result, args.plot)
    return 0


def summary(
    tally: "Tally", manager: "BlockManager", trace: str, concurrency: int, store: "StoredBlocks | None" = None
) -> dict[str, Any]:
    """What `--json` prints. Times are those inside calls of the manager; admits count what was refused, and resumes."""
    stats = manager.stats()
    asked = tally.admits + tally.resumed + tally.refused

    def each(part: str, count: int) -> float | None:
        return round(1e6 * tally.seconds[part] / count, 3) if count else None

    return {
        "trace": trace,
        "requests": tally.requests,
        "blocks": manager.num_blocks,
        "host_blocks": manager.host_blocks,
        "store_blocks": 0 if store is None else store.capacity,
        "block_size": manager.block_size,
        "concurrency": concurrency,
        "prompt_tokens": tally.prompt_tokens,
        "cached_tokens": tally.cached_tokens,
        "cached_tokens_device": tally.cached_tokens - tally.host_tokens - tally.store_tokens,
        "cached_tokens_host": tally.host_tokens,
        "cached_tokens_store": tally.store_tokens,
        "hit_rate": round(tally.hit_rate, 6),
        "decoded_tokens": tally.decoded_tokens,
        "decode_steps": tally.decode_steps,
        "evictions": stats.evictions,
        "offloads": stats.offloads,
        "loads": stats.loads,
        "host_evictions": stats.host_evictions,
        "stored": 0 if store is None else store.num_stored,
        "preemptions": stats.preemptions,
        "peak_used_blocks": stats.peak_used_blocks,
        "peak_usage": round(stats.peak_used_blocks / manager.num_blocks, 6),
        "seconds": {part: round(seconds, 6) for part, seconds in tally.seconds.items()},
        "microseconds": {
            "admit": each("admit", asked),
            "prefill": each("prefill", tally.admits + tally.resumed),
            "decode_step": each("decode", tally.decode_steps),
            "decoded_token": each("decode", tally.decoded_tokens),
            "free": each("free", tally.frees),
        },
    }


def _manager(args: argparse.Namespace) -> "BlockManager":
    from kvblocks.manager import BlockManager

    try:
        # Preempted sequences keep their places.
        blocks = args.blocks or (FILE_BLOCKS if args.trace else SMALL_BLOCKS)
        return BlockManager(
            blocks, args.block_size, max_seqs=2 * args.concurrency + 1, host_blocks=args.host_blocks or 0
        )
    except (ValueError, MemoryError) as error:
        raise UsageError(str(error)) from None


@contextlib.contextmanager
def _progress(total: int, *, shown: bool) -> "Iterator[Callable[[], object] | None]":
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("requests", total=total)
        yield lambda: bar.advance(task)


def _pools(result: dict[str, Any]) -> str:
    host = f" and {result['host_blocks']:,} in the host" if result["host_blocks"] else ""
    store = f", {result['store_blocks']:,} in a store" if result["store_blocks"] else ""
    return f"{result['blocks']:,} blocks of {result['block_size']}{host}{store}"


def _print_table(result: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        f"{result['trace']}: {result['requests']:,} requests, {result['concurrency']} at once, {_pools(result)}",
        highlight=False,
        markup=False,
    )
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("prompt tokens", f"{result['prompt_tokens']:,}")
    table.add_row("hit rate", f"{result['hit_rate']:.1%}")
    if result["host_blocks"]:
        for tier in ("device", "host", "store") if result["store_blocks"] else ("device", "host"):
            share = result[f"cached_tokens_{tier}"] / result["prompt_tokens"]
            table.add_row(f"  from the {tier}", f"{share:.1%}")
    table.add_row("decoded tokens", f"{result['decoded_tokens']:,}")
    table.add_row("evictions", f"{result['evictions']:,} blocks")
    if result["host_blocks"]:
        table.add_row("offloaded, loaded", f"{result['offloads']:,}, {result['loads']:,} blocks")
        table.add_row("host evictions", f"{result['host_evictions']:,} blocks")
    if result["store_blocks"]:
        table.add_row("stored", f"{result['stored']:,} blocks")
    table.add_row("preemptions", f"{result['preemptions']:,}")
    table.add_row("peak use", f"{result['peak_used_blocks']:,} blocks, {result['peak_usage']:.1%}")
    table.add_section()
    for name, microseconds in result["microseconds"].items():
        table.add_row(name.replace("_", " "), "none" if microseconds is None else f"{microseconds:,.2f} µs")
    table.add_row("all calls together", f"{sum(result['seconds'].values()):.3f} s")
    console.print(table)


def _plot(samples: "Sequence[Sample]", result: dict[str, Any], file: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    steps = [sample.step for sample in samples]
    axes.plot(steps, [100 * sample.usage for sample in samples], label="blocks in use", linewidth=1)
    axes.plot(steps, [100 * sample.hit_rate for sample in samples], label="hit rate of the prompts so far")
    if result["host_blocks"]:
        axes.plot(steps, [100 * sample.host_rate for sample in samples], label="of that, from the host")
    if result["store_blocks"]:
        axes.plot(steps, [100 * sample.store_rate for sample in samples], label="of that, from the store")
    axes.set(xlabel="decode step", ylabel="%", ylim=(0, 100), xlim=(0, None))
    axes.set_title(f"{result['trace']}, {_pools(result)}", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    save_plot(figure, file)
