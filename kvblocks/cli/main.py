"""The command line: what commands there are and what they take. Each does its work in a module of its own.

Imports neither torch nor transformers until a command that needs them runs.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

from kvblocks import __version__
from kvblocks.cli.cache import add_cache_parser
from kvblocks.cli.plan import add_plan_parser
from kvblocks.cli.replay import add_replay_parser
from kvblocks.errors import UsageError
from kvblocks.sizes import LAYOUTS, parse_size

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, `sys.argv` by default. Returns the exit code: 0 fine, 1 tokens differ, a plan
    does not fit or a cache is damaged, 2 wrong usage."""
    args = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that lacks a character is no reason to stop
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except UsageError as error:
        print(f"kvblocks: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except (BrokenPipeError, SystemExit):  # rich turns the one into the other
        _write_no_more()
        return 141  # as a shell says of a program that SIGPIPE ended
    except OSError as error:
        _write_no_more()
        print(f"kvblocks: error: {error}", file=sys.stderr)
        return 2
    return code


def _write_no_more() -> None:
    """What is still buffered for standard output would raise again when Python ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvblocks", description="The paged KV cache for PyTorch.")
    parser.add_argument("--version", action="version", version=f"kvblocks {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_generate(commands)
    add_plan_parser(commands, _count)
    add_replay_parser(commands, _count)
    add_cache_parser(commands)
    return parser


def _add_generate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    about = "answer many prompts at once with a transformers model over the paged cache"
    parser = commands.add_parser("generate", help=about, description=f"{about[0].upper()}{about[1:]}.")
    parser.set_defaults(run=_generate)
    add = parser.add_argument
    add(
        "--model",
        metavar="MODEL",
        help="directory or hub id, smollm2 (the default where its package is installed), or tiny, a small Llama that "
        "is made on the spot",
    )
    add(
        "--prompts",
        metavar="FILE",
        help="one prompt a line, - for standard input; by default a built-in set. In a file *.jsonl each line is an "
        "object with a prompt, messages or tokens, and settings of its own, like temperature or max_new_tokens",
    )
    add("--chat", action="store_true", help="put each prompt into the chat template of the model's tokenizer")
    add("--system", metavar="TEXT", help="what the system says in each chat; implies --chat")
    add("--max-new-tokens", type=_count, default=64, metavar="N", help="for each prompt (default: %(default)s)")
    add("--kv-memory", type=_size, default="64MiB", metavar="SIZE", help="for K, V and states (default: %(default)s)")
    add(
        "--host-memory",
        type=_size,
        metavar="SIZE",
        help="host memory for blocks that leave the cache and may come back (default: none; with --cache-dir or "
        "--store a quarter of --kv-memory, but at least 16 blocks, and 8 states where the model keeps some). Of what "
        "these have, up to a quarter of it is taken for one prompt",
    )
    add(
        "--cache-dir",
        metavar="DIR",
        help="folder where blocks are kept for later runs, with the same model and weights; see `kvblocks cache`",
    )
    add("--cache-size", type=_size, metavar="SIZE", help="of the files in --cache-dir, at most (default: 10GiB)")
    add(
        "--store",
        action="append",
        default=[],
        metavar="URL",
        help="a store that machines share, asked after --cache-dir: redis://HOST:PORT/DB, or "
        "mooncake://HOST:PORT?segment=8GiB; may be given several times. See kvblocks.tiers.open_store",
    )
    add(
        "--secret-file",
        metavar="FILE",
        help="a secret of 16 bytes or more, for names and checksums of what --cache-dir and --store keep; the same in "
        "every process that is to find it",
    )
    add("--block-size", type=_count, default=16, metavar="N", help="tokens in a block (default: %(default)s)")
    add("--layout", choices=LAYOUTS, default="NHD", help="of the cache (default: %(default)s)")
    add("--dtype", choices=("float16", "bfloat16", "float32", "float64"), help="default: what the model was saved in")
    add("--device", help="cpu, cuda, cuda:1, ...; by default cuda where there is one")
    add("--max-batch-tokens", type=_count, default=512, metavar="N", help="of one pass (default: %(default)s)")
    add("--max-seqs", type=_count, default=64, metavar="N", help="sequences run at once (default: %(default)s)")
    add("--threads", type=_count, metavar="N", help="on CPU; default: 1 for --model tiny, else what torch takes")
    add(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="generate again over transformers' contiguous cache and compare; by default with smollm2 and tiny "
        "(in half precision a mixture of experts may differ, where two experts tie)",
    )
    add("--json", action="store_true", help="print one JSON object instead of text")


def _generate(args: argparse.Namespace) -> int:
    try:
        from kvblocks.cli import generate
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("rich", "transformers", "safetensors"):
            raise
        raise UsageError(
            f'`kvblocks generate` needs {error.name}, which is not installed; run: pip install "kvblocks[generate]"'
        ) from None
    except ImportError as error:
        if error.name != "transformers":
            raise
        raise UsageError(str(error)) from None  # it is too old, and the message says so
    return generate.run(args)


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if not 1 <= count < 2**31:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a whole number of 1 to {2**31 - 1}")
    return count


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
