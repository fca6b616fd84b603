"""The command `kvblocks plan`: how much memory a model's cache takes, and what fits.

The figures are `kvblocks.planner`'s. Imports matplotlib only where it draws, and itself never torch.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvblocks.cli import plan_tables as tables
from kvblocks.cli.extras import check_plot, save_plot
from kvblocks.errors import UsageError

if TYPE_CHECKING:
    from kvblocks.planner import Plan

__all__ = ["add_plan_parser", "run"]

_PLOT_DTYPES = ("bfloat16", "fp8", "int4")
_PLOT_DTYPES_LLAMA_CPP = ("float16", "q8_0", "q4_0")
_PLOT_POINTS = 200
_ARGUMENTS = "memory gpu utilization seq_len concurrency weights weights_dtype activations sequences checkpoints "
_ARGUMENTS += (
    "encoder_tokens dtype group_size scale_dtype zero_point block_size tp mla stored engine swa_full step_tokens"
)
_NAMES = tuple(_ARGUMENTS.split())
_EITHER = "|".join([*_NAMES, "pp"])
_ARGUMENT = re.compile(rf"(?<![\w.])({_EITHER})=('[^']*'|\[[^\]]*\]|[^\s,;:)]+)")
_NUMBER = re.compile(r"\b(?:num_)?(layers|kv_heads|head_dim)\b(=?)")
_GIVE = re.compile(rf"\b(give|or|set) ({_EITHER})\b")


def add_plan_parser(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", count: Callable[[str], int]
) -> None:
    """Add the command to a command line; `count` reads a whole number of at least 1."""
    about = "say how much memory the cache of a model takes, and what fits into the memory there is"
    parser = commands.add_parser("plan", help=about, description=f"{about[0].upper()}{about[1:]}.")
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("models", nargs="*", metavar="MODEL", help="config.json, a folder with one, or a hub id; several side by side")
    numbers = parser.add_argument_group("instead of MODEL")
    numbers.add_argument("--layers", type=count, metavar="N")
    numbers.add_argument("--kv-heads", type=count, metavar="N")
    numbers.add_argument("--head-dim", type=count, metavar="N")
    numbers.add_argument("--v-head-dim", type=count, metavar="N", help="where V's differs from K's")
    asked = parser.add_argument_group("what is asked")
    add = asked.add_argument
    add(
        "--memory",
        metavar="SIZE",
        help="of one device: 80G and 80GiB are 80 * 2**30, 80GB 80 * 10**9; or what is free on cuda, cuda:1, cpu",
    )
    add("--gpu", metavar="CARD[:N]", help="instead of --memory: h100:8, or h100 for as many as are needed")
    add("--utilization", type=_share, default=1.0, metavar="SHARE", help="of the memory: 0.9 or 90%% (default: all)")
    add("--seq-len", metavar="N", help="tokens of a sequence: 32768 or 32k; several as 8k,32k")
    add("--concurrency", type=count, metavar="N", help="sequences at once")
    add("--weights", metavar="SIZE", help="of all weights; auto reads safetensors headers, or the config")
    add("--weights-dtype", metavar="DTYPE", help="for --weights auto (default: the config's)")
    add("--activations", metavar="SIZE", help="set aside on each device")
    add("--sequences", type=count, metavar="N", help="whose states are set aside before blocks are counted")
    add("--checkpoints", type=int, metavar="N", help="states set aside for prefixes (default: one a sequence)")
    add("--encoder-tokens", type=int, default=0, metavar="N", help="that cross-attention keeps K and V for")
    stored = parser.add_argument_group("how it is stored")
    add = stored.add_argument
    add(
        "--engine",
        choices=("kvblocks", "vllm", "sglang", "llama.cpp"),
        default="kvblocks",
        help="whose pages, paddings and packings are counted (default: %(default)s)",
    )
    add("--swa-full", action="store_true", help="llama.cpp's: windowed layers keep every token")
    add("--step-tokens", type=count, metavar="N", help="of a sequence in one step (default: 1, or the engine's)")
    add("--dtype", metavar="K[,V]", help="bfloat16, fp8, q8_0, int4, ... or auto; q8_0,q4_0 (default: the config's)")
    add("--group-size", type=count, metavar="N", help="numbers of one head that share a scale")
    add("--scale-dtype", default="float16", metavar="DTYPE", help="(default: %(default)s)")
    add("--zero-point", action="store_true", help="each group keeps one besides its scale")
    add("--block-size", type=count, metavar="N", help="tokens in a block (default: 16, or what the model needs)")
    add("--tp", type=count, metavar="N", help="devices over which heads are split (default: 1; the best with --gpu)")
    add(
        "--pp", default="1", metavar="N", help="pipeline stages, or the layers of each: 20,21,20 (default: %(default)s)"
    )
    add("--mla", choices=("latent", "expanded"), default="latent", help="latent attention (default: %(default)s)")
    add(
        "--stored",
        choices=("exact", "transformers"),
        default="exact",
        help="whose caches a sequence's exact bytes are of (default: %(default)s)",
    )
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object instead of a table; a list of them for several")
    add("--markdown", action="store_true", help="print a Markdown table")
    add("--plot", metavar="FILE.png", help="draw sequences at once over their length, a line for each dtype")


def run(args: argparse.Namespace) -> int:
    """Run the command. Returns 0, or 1 where what is asked for does not fit.

    Raises:
        UsageError: the model is not known or not to be read, an argument is out of bounds, or a package is missing.
    """
    from kvblocks.planner import plan

    models, lengths = _models(args), _lengths(args.seq_len)
    if args.plot:
        if args.memory is None and args.gpu is None:
            raise UsageError("--plot draws what fits: give --memory or --gpu")
        if len(models) * len(lengths) > 1:
            raise UsageError("--plot draws one model at one --seq-len")
        check_plot("plan", args.plot)
    if args.json and args.markdown:
        raise UsageError("--json and --markdown are two forms of one answer; give one of them")
    arguments = _arguments(args)
    try:
        plans = [plan(model, seq_len=length, **arguments) for model in models for length in lengths]
        results = [made.to_dict() for made in plans] if args.json else []
        if args.plot and (curves := _curves(plans[0])):
            _plot(curves, plans[0], args.plot)
        elif args.plot:
            print(f"kvblocks: {args.plot} is not written: not one sequence fits at any length", file=sys.stderr)
    except ModuleNotFoundError as error:
        raise UsageError(_one_line(error)) from None
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise UsageError(_one_line(error)) from None
    if args.json:
        print(json.dumps(results if len(results) > 1 else results[0], indent=1))
    elif args.markdown:
        tables.print_markdown(plans, _in_flags)
    else:
        tables.print_table(plans, _in_flags)
    return 0 if all(made.fits for made in plans) else 1


def _models(args: argparse.Namespace) -> list[Any]:
    numbers = {"num_layers": args.layers, "num_kv_heads": args.kv_heads, "head_dim": args.head_dim}
    given = {name: value for name, value in numbers.items() if value is not None}
    if args.v_head_dim is not None:
        given["v_head_dim"] = args.v_head_dim
    if args.models:
        if given:
            raise UsageError("give MODEL or --layers, --kv-heads and --head-dim, not both")
        return list(args.models)
    if len(given.keys() & numbers.keys()) < len(numbers):
        raise UsageError("give MODEL, or all of --layers, --kv-heads and --head-dim")
    return [given]


def _lengths(text: str | None) -> list[str | None]:
    """Each length by itself; `plan` reads them."""
    return [None] if text is None else list(text.split(","))


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
    """What `plan` takes."""
    return {name: getattr(args, name) for name in _NAMES if name != "seq_len"} | {"pp": _stages(args.pp)}


def _stages(text: str) -> int | list[int]:
    try:
        layers = [int(number) for number in text.split(",")]
    except ValueError:
        raise UsageError(
            f"--pp {text:.60} is neither a number of stages nor the layers of each, like 20,21,20"
        ) from None
    return layers[0] if len(layers) == 1 else layers


def _share(text: str) -> float | str:
    try:
        return text if text.endswith("%") else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a share; give one like 0.9 or 90%") from None


def _one_line(error: Exception) -> str:
    return _in_flags(" ".join(str(error).split()))


def _in_flags(text: str) -> str:
    """What `plan` says of its arguments, in this command's words: `--seq-len 5` for `seq_len=5`."""
    text, instead, numbers = text.partition("give the numbers instead: ")
    text += instead + _NUMBER.sub(lambda match: f"--{match[1].replace('_', '-')}{' ' if match[2] else ''}", numbers)
    given = _ARGUMENT.sub(lambda match: f"--{match[1].replace('_', '-')} {match[2].strip(chr(39))}", text)
    return _GIVE.sub(lambda match: f"{match[1]} --{match[2].replace('_', '-')}", given)


# --- the chart


def _curves(made: "Plan") -> dict[str, list[tuple[int, int]]]:
    """Sequences at once over the lengths at which any fit, for the plan's own dtype and the usual ones, if they fit."""
    longest = max(made.settings.seq_len or 0, made.model.max_seq_len or 0, 1024)
    lengths = sorted({max(1, round(longest ** (i / _PLOT_POINTS))) for i in range(_PLOT_POINTS // 3, _PLOT_POINTS + 1)})
    curves = {}
    usual = _PLOT_DTYPES_LLAMA_CPP if made.settings.engine == "llama.cpp" else _PLOT_DTYPES
    for plan in [made, *(made.with_dtype(dtype) for dtype in usual)]:
        if plan.dtype not in curves:
            counts = [(length, plan.max_concurrency(length)) for length in lengths]
            curves[plan.dtype] = [(length, count) for length, count in counts if count]
    return {dtype: points for dtype, points in curves.items() if points}


def _plot(curves: dict[str, list[tuple[int, int]]], plan: "Plan", file: str) -> None:
    from matplotlib.figure import Figure

    from kvblocks.planner.text import amount

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for dtype, points in curves.items():
        axes.plot([length for length, _ in points], [count for _, count in points], label=dtype)
    axes.set(xlabel="tokens of a sequence", ylabel="sequences at once", xscale="log", yscale="log")
    axes.set_title(f"{plan.model.name} in {amount(plan.memory or 0)}", fontsize="medium")
    axes.grid(alpha=0.3, which="both")
    axes.legend(title="K and V in")
    save_plot(figure, file)
