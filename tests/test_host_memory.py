"""Blocks that leave the pool for host memory and come back, as users of a model ask for it."""

import json
from typing import Any

import pytest
import tiny_models
import torch
from test_generation import prompt, tiny_llama
from test_streams import answers

import kvblocks
from kvblocks import Pool
from kvblocks.cli.main import main
from kvblocks.integrations.transformers import PagedCache

torch.set_num_threads(1)

QUIET: dict[str, Any] = {"max_new_tokens": 6, "stop_tokens": []}


def test_chats_that_evict_each_other_come_back_from_the_host() -> None:
    """Right tokens all the way, and each turn computes only what is new."""
    pool = Pool(tiny_llama(), num_blocks=24, block_size=4, host_memory="4MiB")
    chats = [list(prompt(20, seed)) for seed in range(4)]
    for turn in range(3):
        for number, chat in enumerate(chats):
            chat += prompt(5, 10 * turn + number)
            [tokens] = kvblocks.generate(tiny_llama(), [chat], pool=pool, **(QUIET | {"max_new_tokens": 2})).run()
            assert tokens == answers(tuple(chat))[0][:2]
            chat += tokens
            pool.manager.audit()
    stats = pool.manager.stats()
    assert stats.hit_tokens == 4 * (24 + 32)  # all whole blocks of the turn before, for each chat
    assert stats.host_hit_tokens > stats.hit_tokens // 2
    assert stats.loads > 0
    assert stats.evictions > 0


@pytest.mark.parametrize("name", ["gemma3_text", "llama4_text"])
def test_groups_come_back_too(name: str) -> None:
    """Windows and chunks: what they reach is loaded, and tokens are those of a pool that never ran out."""
    model = tiny_models.sharp(name)
    small = Pool(model, num_blocks=40, block_size=4, host_memory="16MiB")
    large = Pool(model, num_blocks=400, block_size=4)
    chats = [list(prompt(20, seed)) for seed in range(5)]
    for turn in range(3):
        for number, chat in enumerate(chats):
            found = [kvblocks.generate(model, [chat], pool=pool, **QUIET).run() for pool in (small, large)]
            assert found[0] == found[1]
            chat += [*found[0][0], *prompt(3, 10 * turn + number)]
    assert small.manager.stats().host_hit_tokens > 0
    small.manager.audit()


def test_a_cache_for_model_generate_finds_what_the_host_has() -> None:
    model: Any = tiny_llama()
    pool = Pool(model, num_blocks=16, block_size=4, host_memory="4MiB")
    texts = [prompt(21, seed) for seed in range(4)]
    expected = [kvblocks.generate(model, [text], **QUIET).run() for text in texts]
    for _ in range(2):
        for text, [tokens] in zip(texts, expected, strict=True):
            cache = PagedCache(model.config, pool=pool)
            cached = cache.begin(torch.tensor([text]))
            made = model.generate(
                torch.tensor([text]), cache=cache, do_sample=False, max_new_tokens=6, eos_token_id=None
            )
            assert made[0, len(text) :].tolist() == tokens
            cache.reset()
    assert cached is not None
    assert pool.manager.stats().host_hit_tokens > 0
    pool.manager.audit()


@pytest.mark.parametrize(
    ("host_memory", "error", "message"),
    [
        (1, ValueError, "host_memory=1 holds 0 slots of ([0-9]+) bytes; give at least \\1 bytes"),
        ("900TiB", ValueError, "host_memory='900TiB' holds [0-9]+ slots of .*; give memory for [0-9]+ at most"),
        (-5, ValueError, "host_memory=-5"),
        ("much", ValueError, "host_memory='much'"),
        (1.5, TypeError, "host_memory"),
    ],
)
def test_host_memory_that_cannot_be(host_memory: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Pool(tiny_llama(), num_blocks=4, host_memory=host_memory)


def test_host_memory_beside_a_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="num_blocks, block_size and layout are those of the pool"):
        kvblocks.generate(tiny_llama(), [[1]], pool=Pool(tiny_llama(), num_blocks=4), host_memory="1MiB")


def test_the_command_says_what_came_from_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "--model", "tiny", "--max-new-tokens", "2", "--host-memory", "8MiB", "--json"]
    assert main(command) == 0
    report = json.loads(capsys.readouterr().out)
    assert 0 < report["host_bytes"] <= 8 * 2**20
    assert report["cached_tokens_host"] == 0  # nothing had to leave
    assert report["cached_tokens_device"] == report["hit_tokens"]
    assert main([*command[:-3], "--host-memory", "1KiB"]) == 2
    assert "--host-memory 1024 holds 0 slots of" in capsys.readouterr().err
