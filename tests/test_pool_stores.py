"""Pools whose blocks go down to stores, as users of a model ask for it: generate, PagedCache and the command."""

import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import transformers
from faulty_store import Fault, FaultyStore
from test_generate_states import NAMES, WITH_STATES, answer, model_of
from test_generation import prompt, tiny_llama
from test_streams import answers
from test_wrapped import Adapter
from tokenizers import Tokenizer, models, pre_tokenizers

import kvblocks
from kvblocks import Pool
from kvblocks.cli.main import main
from kvblocks.integrations.transformers import PagedCache
from kvblocks.integrations.transformers.weights import adapter_digest, file_version, model_name, state_version
from kvblocks.tiers import DiskStore, MemoryStore, Status

torch.set_num_threads(1)

QUIET: dict[str, Any] = {"max_new_tokens": 8, "stop_tokens": []}
SIZES: dict[str, Any] = {"num_blocks": 48, "block_size": 4, "host_memory": "8MiB", "weights_version": "1"}


def pool_on(store: Any, model: Any = None, **options: Any) -> Pool:
    return Pool(tiny_llama() if model is None else model, stores=[store], **(SIZES | options))


def hits(pool: Pool) -> int:
    return pool.manager.stats().hit_tokens


def test_a_second_process_computes_only_what_is_new() -> None:
    store = MemoryStore("64MiB")
    texts = [prompt(30, seed) for seed in range(3)]
    with pool_on(store) as first:
        kvblocks.generate(tiny_llama(), texts, pool=first, **QUIET).run()
    assert first.manager.num_background_slots == 0
    with pool_on(store) as second:
        run = kvblocks.generate(tiny_llama(), [[*text, 5] for text in texts], pool=second, **QUIET)
        found = run.run()
        assert found == answers(*[(*text, 5) for text in texts])
        assert run.scheduler.num_hit_by_store == [3 * 28]
        assert hits(second) == 3 * 28
        second.manager.audit()
    assert second.tiers is not None
    assert second.tiers.num_operations == 0


def test_answers_are_found_too() -> None:
    store = MemoryStore("64MiB")
    with pool_on(store) as first:
        [[*tokens]] = kvblocks.generate(tiny_llama(), [prompt(20)], pool=first, **QUIET).run()
    with pool_on(store) as second:
        kvblocks.generate(tiny_llama(), [[*prompt(20), *tokens, 1]], pool=second, **QUIET).run()
        assert hits(second) == 24  # of 27 that were computed before


def test_requests_that_are_dropped_while_they_wait_hold_nothing() -> None:
    store = MemoryStore("64MiB")
    texts = [prompt(30, seed) for seed in range(6)]
    with pool_on(store) as first:
        kvblocks.generate(tiny_llama(), texts, pool=first, **QUIET).run()
    with pool_on(store) as second:
        run = kvblocks.generate(tiny_llama(), texts, pool=second, max_seqs=1, **QUIET)
        run.step()
        run[1].cancel()
        run.step()
        run.close()
        assert second.tiers is not None
        end = time.monotonic() + 10
        while second.tiers.num_operations and time.monotonic() < end:
            second.tiers.poll()
        assert second.manager.num_background_slots == 0
        second.manager.audit()


@pytest.mark.parametrize("name", ["gemma3_text", "llama4_text", "qwen3"])
def test_models_with_windows_and_chunks(name: str) -> None:
    """What had slid out of a window was not stored; a chat that goes on needs only what its last token reached."""
    model = tiny_models.sharp(name)
    store = MemoryStore("64MiB")
    with pool_on(store, model, num_blocks=96) as first:
        [tokens] = kvblocks.generate(model, [prompt(30)], pool=first, **QUIET).run()
    chat = [*prompt(30), *tokens, 1, 2, 3]
    with pool_on(store, model, num_blocks=96) as second:
        assert (
            kvblocks.generate(model, [chat], pool=second, **QUIET).run()
            == kvblocks.generate(model, [chat], **QUIET).run()
        )
        assert hits(second) == 36


def test_a_cache_for_model_generate_waits_for_its_fetch() -> None:
    model: Any = tiny_llama()
    store = MemoryStore("64MiB")
    text = prompt(30)
    [expected] = answers(text)
    for turn in range(2):
        with pool_on(store) as pool:
            cache = PagedCache(model.config, pool=pool)
            found = cache.begin(torch.tensor([text]))
            assert found == 28 * turn
            made = model.generate(
                torch.tensor([text]), cache=cache, do_sample=False, max_new_tokens=8, eos_token_id=None
            )
            assert made[0, 30:].tolist() == expected
            cache.reset()


def test_a_cache_nobody_told_a_prompt_stores_nothing() -> None:
    model: Any = tiny_llama()
    store = MemoryStore("64MiB")
    with pool_on(store) as pool:
        cache = PagedCache(model.config, pool=pool)
        ids = torch.tensor([prompt(30)])
        model.generate(ids, cache=cache, do_sample=False, max_new_tokens=8, eos_token_id=None)
        cache.reset()
    assert store.stats().objects == 0


class Slow(MemoryStore):
    """Hangs until the test lets go."""

    go = False

    def load(self, keys: Sequence[str], buffers: Sequence[Any]) -> list[Status]:
        while not self.go:
            time.sleep(0.001)
        return super().load(keys, buffers)


def test_a_store_that_hangs_costs_a_deadline_and_right_tokens() -> None:
    store = Slow("64MiB")
    text = prompt(30)
    with pool_on(store) as first:
        kvblocks.generate(tiny_llama(), [text], pool=first, **QUIET).run()
    second = pool_on(store, deadline=0.05)
    assert kvblocks.generate(tiny_llama(), [text], pool=second, **QUIET).run() == answers(text)
    assert second.tiers is not None
    [stats] = second.tiers.stats()
    assert (stats.hits, stats.timeouts) == (0, 1)
    assert not second.close(timeout=0.05)
    store.go = True
    end = time.monotonic() + 10
    while second.tiers.num_operations and time.monotonic() < end:
        second.tiers.poll()
    assert second.manager.num_background_slots == 0


@pytest.mark.parametrize("fault", [Fault.TORN, Fault.RECYCLED, Fault.FOREIGN, Fault.LIES, Fault.HALFWAY, Fault.DEAD])
def test_tokens_are_right_whatever_a_store_does(fault: Fault) -> None:
    store = FaultyStore()
    texts = [prompt(30, seed) for seed in range(3)]
    with pool_on(store) as first:
        kvblocks.generate(tiny_llama(), texts, pool=first, **QUIET).run()
    store._chances[fault] = 0.5
    with pool_on(store) as second:
        assert kvblocks.generate(tiny_llama(), texts, pool=second, **QUIET).run() == answers(*texts)
    assert store.seen[fault]


def test_other_weights_find_nothing() -> None:
    store = MemoryStore("64MiB")
    text = prompt(30)
    with pool_on(store) as first:
        kvblocks.generate(tiny_llama(), [text], pool=first, **QUIET).run()
    with pool_on(store, weights_version="2") as other:
        kvblocks.generate(tiny_llama(), [text], pool=other, **QUIET).run()
        assert hits(other) == 0
    with pool_on(store, dtype=torch.float64, model=tiny_llama().config) as other:
        assert other.tiers is not None
        assert other.tiers.namespace != first.tiers.namespace  # type: ignore[union-attr]


def test_new_weights_in_one_pool() -> None:
    store = MemoryStore("64MiB")
    text = prompt(30)
    model = copy.deepcopy(tiny_llama())
    with pool_on(store, model) as pool:
        old = kvblocks.generate(model, [text], pool=pool, **QUIET).run()
        assert pool.flush()
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.5)
        pool.reset_prefix_cache()
        new = kvblocks.generate(model, [text], pool=pool, **QUIET).run()
        assert hits(pool) == 0
        assert pool.tiers is not None
        assert pool.tiers.is_suspended
        with pytest.raises(ValueError, match="that of the weights before"):
            pool.renew("1")
        pool.reset_prefix_cache(weights_version="2")
        assert kvblocks.generate(model, [text], pool=pool, **QUIET).run() == new != old
        assert hits(pool) == 0


def test_adapters_are_told_apart_by_their_weights() -> None:
    store = MemoryStore("64MiB")
    text = prompt(30)

    def adapted(seed: int) -> Any:
        model = copy.deepcopy(tiny_llama())
        torch.manual_seed(seed)
        layer: Any = model.model.layers[0].self_attn
        layer.v_proj = Adapter(layer.v_proj)
        layer.v_proj.scale = torch.nn.Parameter(torch.randn(1))
        return model

    for seed, found in ((0, 0), (1, 0), (0, 28)):
        model = adapted(seed)
        with pool_on(store, model) as pool:
            kvblocks.generate(model, [text], pool=pool, **QUIET).run()
            assert hits(pool) == found
    assert adapter_digest(adapted(0)) != adapter_digest(adapted(1))
    assert adapter_digest(tiny_llama()) == b""


def test_a_secret_keeps_out_who_does_not_have_it() -> None:
    store = MemoryStore("64MiB")
    text = prompt(30)
    for secret, found in ((b"0123456789abcdef", 0), (b"another secret 2", 0), (None, 0), (b"0123456789abcdef", 28)):
        with pool_on(store, secret=secret) as pool:
            kvblocks.generate(tiny_llama(), [text], pool=pool, **QUIET).run()
            assert hits(pool) == found


def test_wrong_arguments() -> None:
    store = MemoryStore("1MiB")
    with pytest.raises(ValueError, match="weights_version must say"):
        Pool(tiny_llama(), num_blocks=8, stores=[store])
    with pytest.raises(ValueError, match="for stores, and there are none"):
        Pool(tiny_llama(), num_blocks=8, weights_version="1")
    with pytest.raises(ValueError, match="weights_version is empty"):
        pool_on(store, weights_version="")
    with pytest.raises(TypeError, match=r"stores\[0\] is a str"):
        pool_on("folder")
    with pytest.raises(ValueError, match="no stores"):
        Pool(tiny_llama(), num_blocks=8).renew("2")
    assert Pool(tiny_llama(), num_blocks=8).close()


def stateful(store: Any, name: str, **options: Any) -> Pool:
    """A pool of a model that keeps states, or of one that keeps index keys beside K and V."""
    states = {"num_states": 12, "state_every": 8} if name in WITH_STATES else {}
    return pool_on(store, model_of(name), **{"num_blocks": 96, **states, **options})


@pytest.mark.parametrize("name", NAMES)
def test_states_and_index_keys_come_back(name: str, tmp_path: Path) -> None:
    """A store on disk is closed and opened again, as by another process; what it brings gives the same tokens."""
    texts = [prompt(30, seed) for seed in range(3)]
    with DiskStore(tmp_path / "store", "64MiB") as store, stateful(store, name) as first:
        answers = kvblocks.generate(model_of(name), texts, pool=first, **QUIET).run()
    longer = [[*text, *tokens, 5] for text, tokens in zip(texts, answers, strict=True)]
    found = 3 * (32 if name in WITH_STATES else 36)  # up to the newest checkpoint
    with DiskStore(tmp_path / "store", "64MiB") as store:
        with stateful(store, name) as second:
            run = kvblocks.generate(model_of(name), longer, pool=second, **QUIET)
            assert run.run() == [answer(name, tuple(text)) for text in longer]
            assert run.scheduler.num_hit_by_store == [found]
            second.manager.audit()
        with stateful(store, name) as third:
            held = PagedCache(model_of(name).config, pool=third)
            ids = torch.tensor(longer[:1])
            # A scan of Mamba 1 begins at no state, so that `model.generate` cannot go on from one.
            assert held.begin(ids) == (0 if name == "jamba" else found // 3)
            made: Any = model_of(name)
            out = made.generate(ids, attention_mask=torch.ones_like(ids), cache=held, max_new_tokens=8, do_sample=False)
            assert out[0, 39:].tolist() == answer(name, tuple(longer[0]))
            held.close()
            third.manager.audit()


def test_of_a_chat_with_states_each_turn_is_found() -> None:
    """Each process computes one turn, and leaves its newest checkpoint to the next."""
    store, chat = MemoryStore("64MiB"), list(prompt(21))
    hits_of_turns = []
    for turn in range(3):
        with stateful(store, "qwen3_next") as pool:
            run = kvblocks.generate(model_of("qwen3_next"), [chat], pool=pool, **QUIET)
            assert run.run() == [answer("qwen3_next", tuple(chat))]
            hits_of_turns.append(run.scheduler.num_hit_by_store)
        chat = [*chat, *run[0].tokens, *prompt(3, turn)]
    assert hits_of_turns == [[0], [24], [32]]


def test_more_prompts_than_states_may_be_fetched_at_once_take_turns() -> None:
    """One of two slots that work in the background may hold is for fetches: the others wait until it is free."""
    store = MemoryStore("64MiB")
    sizes: dict[str, Any] = {"block_size": 16, "state_every": 16, "num_blocks": 24}
    texts = [prompt(20, seed) for seed in range(6)]
    with stateful(store, "falcon_h1", **sizes) as first:
        kvblocks.generate(model_of("falcon_h1"), texts, pool=first, **QUIET).run()
    with stateful(store, "falcon_h1", host_memory="656KiB", **sizes) as second:
        assert second.manager.host_states == 8
        assert second.manager.host_blocks >= 4 * 4  # blocks would do for four
        run = kvblocks.generate(model_of("falcon_h1"), texts, pool=second, **QUIET)
        assert run.run() == [answer("falcon_h1", tuple(text)) for text in texts]
        assert run.scheduler.num_hit_by_store == [6 * 16]
    assert second.manager.num_background_slots == 0


def test_without_host_memory_a_quarter_is_taken() -> None:
    with pool_on(MemoryStore("1MiB"), host_memory=None, num_blocks=4000) as pool:
        assert pool.engine.arena is not None
        assert 0.2 < pool.engine.arena.memory_bytes / pool.engine.memory_bytes <= 0.25
    with pool_on(MemoryStore("1MiB"), host_memory=None, num_blocks=8) as pool:
        assert pool.manager.host_blocks == 16


def test_versions_of_weights(tmp_path: Path) -> None:
    model: Any = copy.deepcopy(tiny_llama())
    first = state_version(model)
    assert state_version(tiny_llama()) == first
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    assert state_version(model) != first
    assert state_version(copy.deepcopy(model).to(torch.float16)) != state_version(model)
    assert file_version(tmp_path) is None
    (tmp_path / "a.safetensors").write_bytes(b"1")
    one = file_version(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"2")
    two = file_version(tmp_path)
    (tmp_path / "b.safetensors").write_bytes(b"3")
    assert len({one, two, file_version(tmp_path)}) == 3
    assert model_name(model) == model_name(tiny_llama().config) != model_name(tiny_models.sharp("qwen3"))


def command(*more: str) -> list[str]:
    return ["generate", "--model", "tiny", "--max-new-tokens", "4", "--no-verify", "--json", *more]


def test_the_command_finds_what_it_computed_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "cache"
    reports = []
    for _ in range(2):
        assert main(command("--cache-dir", str(folder), "--cache-size", "1GiB", "--host-memory", "64MiB")) == 0
        reports.append(json.loads(capsys.readouterr().out))
    first, second = reports
    assert first["cached_tokens_disk"] == 0
    assert first["disk_bytes_stored"] > 0
    assert second["cached_tokens_disk"] > 0
    assert second["disk_bytes_stored"] == 0
    total = sum(second[f"cached_tokens_{tier}"] for tier in ("device", "host", "disk"))
    assert total == second["hit_tokens"]
    assert [entry["tokens"] for entry in first["completions"]] == [entry["tokens"] for entry in second["completions"]]
    assert main(["cache", "verify", str(folder)]) == 0
    assert main([*command()[:-1], "--cache-dir", str(folder)]) == 0
    assert "of the disk" in capsys.readouterr().out


def test_the_command_used_wrongly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--cache-size", "1GiB"], "--cache-size is of the files in --cache-dir"),
        (["--cache-dir", str(tmp_path), "--cache-size", "0"], "capacity=0"),
        (["--cache-dir", "/proc/none"], "--cache-dir /proc/none cannot be used"),
    ):
        assert main(command(*arguments)) == 2
        assert message in capsys.readouterr().err
    with DiskStore(tmp_path / "used", "1MiB"):
        assert main(command("--cache-dir", str(tmp_path / "used"))) == 2
        assert "cannot be used" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["falcon_h1", "lfm3"])
def test_the_command_finds_states_on_disk(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first process ends on a checkpoint at 256 tokens, and the second one goes on from there."""
    model = tiny_models.sharp(name)
    model.config.get_text_config().max_position_embeddings = 512
    folder, prompts = tmp_path / "model", tmp_path / "prompts"
    model.save_pretrained(folder)
    words = {word: number for number, word in enumerate(["<unk>", *"abcdefghijklmnopqrstuvwxyz"])}
    backend: Any = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    kind: Any = transformers.PreTrainedTokenizerFast
    kind(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)
    text = " ".join("abcdefghijklmnopqrstuvwxyz"[number * number % 23] for number in range(300))
    run = ["generate", "--model", str(folder), "--prompts", str(prompts), "--max-new-tokens", "4", "--json", "--verify"]
    run += ["--kv-memory", "8MiB", "--cache-dir", str(tmp_path / "cache"), "--cache-size", "1GiB"]
    reports = []
    for more, size in (("", "32MiB"), (" x y z", "32MiB"), (" x y z", "512KiB")):
        prompts.write_text(text + more)
        assert main([*run, "--host-memory", size]) == 0
        out, err = capsys.readouterr()
        reports.append(json.loads(out))
        assert all(entry["verdict"]["identical"] for entry in reports[-1]["completions"])
    assert [report["cached_tokens_disk"] for report in reports] == [0, 256, 0]
    enough = err.split("--host-memory ")[1].split()[0]  # the last one was told how much it takes
    assert main([*run, "--host-memory", enough]) == 0
    assert json.loads(capsys.readouterr().out)["cached_tokens_disk"] == 256
    assert main(["cache", "verify", str(tmp_path / "cache")]) == 0
    capsys.readouterr()
    assert main(["cache", "ls", str(tmp_path / "cache"), "--json"]) == 0
    groups = {"falcon_h1": {0, 1}, "lfm3": {0, 1, 2}}[name]  # states are in the last one
    assert {kind["group"] for kind in json.loads(capsys.readouterr().out)["kinds"]} == groups
