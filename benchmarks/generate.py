"""What a model's answers cost: `kvblocks.generate` beside transformers' own ways, same model, same prompts, greedy.

Run `python benchmarks/generate.py [--model smollm2] [--device cuda]`; a few minutes on two cores. With SmolLM2 the
workload is smaller by default, and reading its GGUF file takes a minute or more the first time. Contenders:
`model.generate` one prompt at a time, `model.generate` over a padded batch, `model.generate_batch` (transformers'
continuous batching, its pages as large as our blocks). One that takes longer than `--limit` for a workload is left out
of it. In float32 all must give the same tokens. Then beams: blocks that four of them hold, through PagedCache and
through DynamicCache.
"""

import argparse
import logging
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from harness import Row, compare, machine, report
from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching import cache as their_cache

import kvblocks
from kvblocks import smollm2
from kvblocks.integrations.transformers import PagedCache
from kvblocks.integrations.transformers.layers import cache_argument

OURS = "kvblocks.generate"
BLOCK = 16
VOCABULARY = 1024
Answers = list[list[int]]
# new tokens, prompts, tokens of a long one, timed calls, tokens of the prompt for beams
DEFAULTS = {"random": (32, 16, 1024, 3, 2000), "smollm2": (16, 8, 256, 1, 256)}


def build(layers: int, hidden: int, device: str, dtype: torch.dtype) -> Any:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 1.5 * weight.shape[-1] ** -0.5)
    model.generation_config.eos_token_id = None
    return model.to(device=device, dtype=dtype).eval()


def prompts(count: int, shared: int, length: int, seed: int) -> Answers:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, VOCABULARY, (shared,), generator=generator).tolist()
    own = torch.randint(0, VOCABULARY, (count, length), generator=generator).tolist()
    return [start + line for line in own]


def dynamic_bytes(held: DynamicCache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in held.layers)


class Contenders:
    """Each a function from prompts to answers; `peaks` has the most K and V bytes that each held."""

    def __init__(self, model: Any, new: int, max_seqs: int) -> None:
        self.model, self.new, self.max_seqs = model, new, max_seqs
        self.peaks: dict[str, float] = {}

    def ours(self, given: Answers) -> Answers:
        with kvblocks.generate(
            self.model, given, max_new_tokens=self.new, stop_tokens=[], block_size=BLOCK, max_seqs=self.max_seqs
        ) as run:
            answers = run.run()
            used = run.scheduler.manager.stats().peak_used_blocks
            self.peaks[OURS] = used * run.scheduler.engine.memory_bytes / run.scheduler.engine.num_blocks
        return answers

    def one_by_one(self, given: Answers) -> Answers:
        answers, peak = [], 0
        for prompt in given:
            ids = torch.tensor([prompt], device=self.model.device)
            held = DynamicCache(config=self.model.config)
            answers += self._generate(ids, torch.ones_like(ids), held)
            peak = max(peak, dynamic_bytes(held))
        self.peaks["one by one"] = peak
        return answers

    def padded(self, given: Answers) -> Answers:
        columns = max(map(len, given))
        ids = torch.tensor([[0] * (columns - len(line)) + line for line in given], device=self.model.device)
        mask = torch.tensor([[0] * (columns - len(line)) + [1] * len(line) for line in given], device=ids.device)
        held = DynamicCache(config=self.model.config)
        answers = self._generate(ids, mask, held)
        self.peaks["padded batch"] = dynamic_bytes(held)
        return answers

    def continuous(self, given: Answers) -> Answers:
        tokens = sum(-(-(len(line) + self.new) // BLOCK) for line in given) + 8
        settings = ContinuousBatchingConfig(
            page_size=BLOCK, num_blocks=tokens, max_batch_tokens=512, max_requests_per_batch=self.max_seqs
        )
        limits = GenerationConfig(max_new_tokens=self.new, do_sample=False, eos_token_id=-1)
        peak, kind = [0.0], their_cache.PagedAttentionCache
        plain = kind.extend_read_and_write_indices

        def noted(held: Any, *args: Any, **kwargs: Any) -> None:
            whole = held.num_sectors * held.bytes_per_sector
            peak[0] = max(peak[0], whole - held.compute_free_capacity(relative=False))
            plain(held, *args, **kwargs)

        kind.extend_read_and_write_indices = noted
        try:
            out = self.model.generate_batch(
                given, generation_config=limits, continuous_batching_config=settings, warmup=False
            )
        finally:
            kind.extend_read_and_write_indices = plain
        self.peaks["generate_batch"] = peak[0]
        in_order = sorted(out.values(), key=lambda one: int(one.request_id.rpartition("_")[2]))
        return [list(one.generated_tokens) for one in in_order]

    def _generate(self, ids: torch.Tensor, mask: torch.Tensor, held: DynamicCache) -> Answers:
        out = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=self.new,
            do_sample=False,
            pad_token_id=0,
            **{cache_argument(self.model.forward): held},
        )
        answers: Answers = out[:, ids.shape[1] :].tolist()
        return answers


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raise `TimeoutError` in what runs longer than that, in the main thread."""

    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(model: Any, name: str, given: Answers, new: int, repeats: int, max_seqs: int, limit: float) -> Row:
    field = Contenders(model, new, max_seqs)
    answers: dict[str, Answers] = {}

    def kept(which: str, run: Callable[[Answers], Answers]) -> Callable[[], None]:
        return lambda: answers.__setitem__(which, run(given))

    runs = {
        OURS: kept(OURS, field.ours),
        "one by one": kept("one by one", field.one_by_one),
        "padded batch": kept("padded batch", field.padded),
        "generate_batch": kept("generate_batch", field.continuous),
    }
    print(f"{name}:", flush=True)
    for which in list(runs):
        start = time.perf_counter()
        try:
            with within(limit):
                runs[which]()
        except TimeoutError:
            del runs[which]
            print(f"  {which}: not done after {limit:g} s, left out", flush=True)
        else:
            print(f"  {which}: {time.perf_counter() - start:.1f} s for the first call", flush=True)
    if OURS not in runs:
        raise SystemExit(f"{OURS} was not done after {limit:g} s; give a higher --limit or a smaller workload")
    seconds = compare(runs, repeats, warm=False)
    alike = {
        which: sum(mine == theirs for mine, theirs in zip(answers[OURS], answers[which], strict=True)) / len(given)
        for which in runs
    }
    peaks = {which: field.peaks[which] for which in runs}
    for which, took in seconds.items():
        print(
            f"  {which}: {len(given) * new / took:.3g} tokens/s, peak K and V {peaks[which] / 2**20:.2f} MiB, "
            f"{alike[which]:.0%} of the answers as {OURS}'s",
            flush=True,
        )
    return Row(name, seconds, len(given) * new, "tokens/s", {"peak_kv_bytes": peaks, "identical": alike})


def beams(model: Any, length: int, new: int) -> dict[str, Any]:
    """What four beams of one prompt hold at the end, against one sequence."""
    ids = torch.tensor(prompts(1, 0, length, 7), device=model.device)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    argument = cache_argument(model.forward)
    found: dict[str, Any] = {"prompt": length, "new": new, "block_size": BLOCK}
    for name, begin, count in (("one sequence", True, 1), ("4 beams, begin", True, 4), ("4 beams", False, 4)):
        with PagedCache(model.config, num_blocks=5 * (length + new) // BLOCK + 8, block_size=BLOCK) as held:
            if begin:
                held.begin(ids)
            out = model.generate(ids, num_beams=count, **{argument: held}, **options)
            peak = held.manager.stats().peak_used_blocks
            found[name] = {"blocks": held.num_held_blocks, "peak_blocks": peak}
            found[name]["bytes"] = held.num_held_blocks * held.engine.memory_bytes // held.engine.num_blocks
            if count == 4:
                found[name]["tokens"] = out.tolist()
    held = DynamicCache(config=model.config)
    out = model.generate(ids, num_beams=4, **{argument: held}, **options)
    found["4 beams, DynamicCache"] = {"bytes": dynamic_bytes(held)}
    for name in ("4 beams, begin", "4 beams"):
        found[name]["identical"] = found[name].pop("tokens") == out.tolist()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=["random", "smollm2"], default="random", help="SmolLM2-135M, or one made up")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--new", type=int, help="tokens of each answer (default: 32; smollm2: 16)")
    parser.add_argument("--prompts", type=int, help="default: 16; smollm2: 8")
    parser.add_argument("--long", type=int, help="tokens of a long prompt, and of a shared prefix (1024; smollm2: 256)")
    parser.add_argument("--max-seqs", type=int, default=64)
    parser.add_argument("--repeats", type=int, help="timed calls after the first one (default: 3; smollm2: 1)")
    parser.add_argument("--beam-prompt", type=int, help="tokens (default: 2000; smollm2: 256)")
    parser.add_argument("--limit", type=float, default=120, help="seconds for one call of a contender (default: 120)")
    options = parser.parse_args()
    for field, value in zip(("new", "prompts", "long", "repeats", "beam_prompt"), DEFAULTS[options.model], strict=True):
        if getattr(options, field) is None:
            setattr(options, field, value)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    dtype = getattr(torch, options.dtype)
    if options.model == "smollm2":
        print(f"reading {smollm2.NAME}", flush=True)
        model, _ = smollm2.load()
        model = model.to(device=options.device, dtype=dtype)
        model.generation_config.eos_token_id = None
        name = smollm2.NAME
    else:
        model = build(options.layers, options.hidden, options.device, dtype)
        name = f"Llama of {options.layers} layers"
    short = [line[: 8 + 3 * number] for number, line in enumerate(prompts(options.prompts, 0, 64, 1))]
    workloads = {
        f"{len(short)} short prompts, 8 to {len(short[-1])} tokens": short,
        f"{options.prompts // 2} long prompts, {options.long} tokens": prompts(
            options.prompts // 2, 0, options.long, 2
        ),
        f"{options.prompts} prompts that share {options.long} tokens": prompts(options.prompts, options.long, 16, 3),
    }
    rows = [
        measure(model, name, given, options.new, options.repeats, options.max_seqs, options.limit)
        for name, given in workloads.items()
    ]
    start = time.perf_counter()
    found = beams(model, options.beam_prompt, 16)
    rows.append(Row(f"4 beams of {options.beam_prompt} tokens", {OURS: time.perf_counter() - start}, notes=found))
    weights = sum(weight.numel() for weight in model.parameters())
    report(
        "Generation",
        rows[:-1],
        ours=OURS,
        workload=f"{name}, {weights / 1e6:.1f} M weights, {options.dtype} on "
        f"{options.device}, {torch.get_num_threads()} threads, {options.new} new tokens each, blocks of {BLOCK}",
        about=machine(["torch", "transformers", "numpy"]),
        name="generate",
    )
    print(f"{rows[-1].workload}: {found}")


if __name__ == "__main__":
    main()
