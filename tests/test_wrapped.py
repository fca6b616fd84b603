"""Models as torch.compile, autocast and PEFT leave them."""

import copy
from typing import Any

import pytest
import torch
from test_generation import prompt, tiny_llama
from test_streams import answers
from torch import Tensor, nn
from transformers import DynamicCache

import kvblocks
from kvblocks.integrations.transformers import PagedCache, UnsupportedModel

# These tensors are tiny, and threads would only wait for each other.
torch.set_num_threads(1)

QUIET: dict[str, Any] = {"max_new_tokens": 8, "stop_tokens": []}


def a_copy() -> Any:
    return copy.deepcopy(tiny_llama())


@pytest.mark.parametrize("dynamic", [True, False])
def test_compiled_models(dynamic: bool) -> None:
    """What is around attention is traced; attention itself runs as it is."""
    compiled: Any = torch.compile(a_copy(), backend="eager", dynamic=dynamic)
    prompts = [prompt(9), prompt(20)]
    assert kvblocks.generate(compiled, prompts, **QUIET).run() == answers(*prompts)
    assert compiled.config._attn_implementation == tiny_llama().config._attn_implementation


def test_a_compiled_model_over_a_paged_cache() -> None:
    model = a_copy()
    model.compile(backend="eager", dynamic=True)
    ids = torch.tensor([prompt(20)])
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with PagedCache(model.config, num_blocks=8) as held:
        assert model.generate(ids, past_key_values=held, **options)[0, 20:].tolist() == answers(prompt(20))[0][:4]


def test_autocast() -> None:
    """K comes in float32 and V in bfloat16 there."""
    model = a_copy()
    ids = torch.tensor([prompt(20)])
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(input_ids=ids, past_key_values=DynamicCache(config=model.config)).logits
        logits: list[Tensor] = []

        def choose(scores: Tensor) -> Tensor:
            logits.append(scores)
            return scores.argmax(-1)

        run = kvblocks.generate(model, [prompt(20)], choose=choose, **QUIET)
        run.step()
        torch.testing.assert_close(logits[0].float(), plain[:, -1].float(), rtol=0.03, atol=0.03)
        assert run.scheduler.engine.dtype == torch.float32
        for dtype in (None, torch.bfloat16):
            with PagedCache(model.config, num_blocks=8, dtype=dtype) as held:
                over_blocks = model(input_ids=ids, past_key_values=held).logits
            assert torch.equal(over_blocks, plain)


def test_what_wraps_no_transformers_model_is_named() -> None:
    wrong: Any = nn.Linear(2, 2)
    with pytest.raises(UnsupportedModel, match=r"a Linear is no transformers model, nor one"):
        kvblocks.generate(wrong, [[1]])


class Adapter(nn.Module):
    """A layer under adapters as PEFT makes them, of which the tests need no more than this."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.active_adapters = ["one"]
        self.disable_adapters = False

    def forward(self, states: Tensor) -> Tensor:
        made: Tensor = self.base_layer(states)
        return made * 1.5 if self.active_adapters == ["two"] and not self.disable_adapters else made


class Wrapped(nn.Module):
    """A model as PEFT wraps it."""

    def __init__(self, model: nn.Module, learns_prompts: bool = False) -> None:
        super().__init__()
        self.model = model
        self.peft_config = {"one": object()}
        self.active_peft_config: Any = type(
            "Config", (), {"is_prompt_learning": learns_prompts, "peft_type": "PREFIX_TUNING"}
        )

    def get_base_model(self) -> nn.Module:
        return self.model

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


def test_adapters_are_kept_apart_by_name() -> None:
    model = a_copy()
    attention = model.get_submodule("model.layers.0.self_attn")
    attention.v_proj = adapter = Adapter(attention.v_proj)
    wrapped: Any = Wrapped(model)
    pool = kvblocks.Pool(wrapped, num_blocks=64)
    seen = []
    for name in ("one", "two", "one", "two"):
        adapter.active_adapters = [name]
        [tokens] = kvblocks.generate(wrapped, [prompt(40)], pool=pool, **QUIET).run()
        assert tokens == kvblocks.generate(wrapped, [prompt(40)], **QUIET).run()[0]
        seen.append(tokens)
    assert seen[0] == answers(prompt(40))[0] != seen[1]
    assert pool.manager.stats().hit_tokens == 2 * 32
    adapter.disable_adapters = True
    assert kvblocks.generate(wrapped, [prompt(40)], pool=pool, **QUIET).run() == [seen[0]]
    assert pool.manager.stats().hit_tokens == 2 * 32


def test_learned_prompts_are_refused() -> None:
    wrapped: Any = Wrapped(a_copy(), learns_prompts=True)
    with pytest.raises(UnsupportedModel, match=r"learns a prompt \(PREFIX_TUNING\), whose K and V belong to no token"):
        kvblocks.generate(wrapped, [[1]])


def test_a_model_of_peft() -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(a_copy(), peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    wrapped.train(False)
    ids = torch.tensor([prompt(20)])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    right = wrapped.generate(input_ids=ids, **options)[0, 20:].tolist()
    assert kvblocks.generate(wrapped, [prompt(20)], **QUIET).run() == [right] != answers(prompt(20))
    with wrapped.disable_adapter():
        assert kvblocks.generate(wrapped, [prompt(20)], **QUIET).run() == answers(prompt(20))
    learned = peft.get_peft_model(a_copy(), peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    with pytest.raises(UnsupportedModel, match="learns a prompt"):
        kvblocks.generate(learned, [[1]])
