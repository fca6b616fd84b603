"""What must not be mixed up: adapters, images, padding, weights, and what a model keeps in itself."""

from typing import Any

import pytest
import torch
import transformers
from test_generation import expected, prompt, tiny_llama
from test_streams import answers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import kvblocks
from kvblocks.generation.scheduler import Request
from kvblocks.integrations.transformers import PagedCache, UnsupportedModel

# These tensors are tiny, and threads would only wait for each other.
torch.set_num_threads(1)

IMAGE = 5  # the token that stands for an image


def with_images(name: str, **fields: Any) -> PreTrainedModel:
    """A tiny model that takes images, of which only the text half is run."""
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text = {**small, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256, **fields}
    seen = {"hidden_size": 32, "embed_dim": 32, "intermediate_size": 48, "num_hidden_layers": 1, "depth": 1}
    kinds: Any = transformers.AutoConfig
    config = kinds.for_model(
        name,
        text_config={"model_type": fields.pop("text_type"), **text},
        vision_config={**seen, "num_attention_heads": 2, "num_heads": 2},
        image_token_id=IMAGE,
        image_token_index=IMAGE,
    )
    torch.manual_seed(0)
    models: Any = transformers.AutoModelForImageTextToText
    model: PreTrainedModel = models.from_config(config)
    model.train(False)
    return model


def qwen2_vl() -> PreTrainedModel:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    return with_images("qwen2_vl", text_type="qwen2_vl_text", rope_parameters=rope)


def test_adapters_share_no_block() -> None:
    shared = prompt(96)
    with kvblocks.generate(tiny_llama(), [shared], max_new_tokens=2, stop_tokens=[], salt=b"one", num_blocks=64) as run:
        run.run()
        stats = run.scheduler.manager.stats
        assert run.add(shared, salt=b"two").read() == answers(shared, new=2)[0]
        assert stats().hit_tokens == 0
        run.add(shared).read()
        assert stats().hit_tokens == 95 // 16 * 16
        run.add(Request(shared, 2, salt=b"two", extra=((40, b"cat"),))).read()
        assert stats().hit_tokens == 80 + 32
        run.add(shared, salt=b"two", extra=[(40, b"dog")]).read()
        assert stats().hit_tokens == 80 + 32 + 32


def test_a_prompt_waits_for_none_of_another_adapter() -> None:
    shared = prompt(96)
    requests = [Request((*shared, n), 2, salt=b"%d" % (n % 2), extra=((70, b"%d" % (n // 4)),)) for n in range(6)]
    with kvblocks.generate(tiny_llama(), requests, num_blocks=99) as run:
        assert len(run.step()) == 2  # one of each salt; the others wait for what these compute
        assert run.run() == answers(*[request.prompt for request in requests], new=2)


@pytest.mark.parametrize(
    ("keys", "kind", "message"),
    [
        ({"salt": "one"}, TypeError, "salt is a str; give bytes"),
        ({"extra": ((3, "cat"),)}, TypeError, r"extra holds \(3, 'cat'\); give \(position, bytes\) pairs"),
        ({"extra": ((3, b"a"), (3, b"b"))}, ValueError, "extra names position 3; the next must be above 3 and below 9"),
        ({"extra": ((9, b"a"),)}, ValueError, "extra names position 9; the next must be above -1 and below 9"),
    ],
)
def test_keys_that_cannot_be(keys: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        kvblocks.generate(tiny_llama(), [Request(prompt(9), 2, **keys)])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_left_out(side: str) -> None:
    rows = [prompt(9), prompt(4), prompt(6)]
    padded = [(*(0,) * (9 - len(row)), *row) if side == "left" else (*row, *(0,) * (9 - len(row))) for row in rows]
    lengths = torch.tensor([[len(row)] for row in rows])
    mask = torch.arange(9) >= 9 - lengths if side == "left" else torch.arange(9) < lengths
    options: dict[str, Any] = {"max_new_tokens": 4, "stop_tokens": []}
    tokens = kvblocks.generate(tiny_llama(), torch.tensor(padded), attention_mask=mask.long(), **options).run()
    assert tokens == answers(*rows, new=4)
    as_lists = kvblocks.generate(tiny_llama(), padded, attention_mask=mask.int().tolist(), **options).run()
    assert as_lists == tokens


def test_a_tensor_that_may_hold_padding_is_refused() -> None:
    ids = torch.tensor([prompt(6), prompt(6, 1)])
    with pytest.raises(ValueError, match=r"prompts is a Tensor of shape \[2, 6\], which may hold padding; give atten"):
        kvblocks.generate(tiny_llama(), ids)
    with pytest.raises(ValueError, match=r"prompts is a Tensor of shape \[6\]; give a list of prompts"):
        kvblocks.generate(tiny_llama(), ids[0])
    with pytest.raises(ValueError, match=r"attention_mask has shape \[2, 5\] and prompts \[2, 6\]"):
        kvblocks.generate(tiny_llama(), ids, attention_mask=torch.ones(2, 5))
    hole = torch.ones(2, 6)
    hole[1, 2] = 0
    with pytest.raises(ValueError, match="row 1 of attention_mask has a 0 between two 1"):
        kvblocks.generate(tiny_llama(), ids, attention_mask=hole)
    with pytest.raises(ValueError, match="a request of 0 prompt tokens"):
        kvblocks.generate(tiny_llama(), ids, attention_mask=torch.zeros(2, 6))


def test_an_image_that_nobody_gave_is_refused() -> None:
    model = with_images("llava", text_type="llama")
    with pytest.raises(ValueError, match=r"token 5 is in the prompt, the config's image_token_i.*; pixels and sounds"):
        kvblocks.generate(model, [[1, IMAGE, 2]])
    held = PagedCache(model.config, num_blocks=16)
    ids = torch.tensor([[1, 2, 3], [1, IMAGE, 2]])
    with pytest.raises(ValueError, match=r"row 1 of input_ids holds 5, the config's image_token_i.*give extra with"):
        held.begin(ids)
    assert held.begin(ids, extra=[[], [(1, b"cat")]]) == 0


def test_each_part_of_a_model_gets_back_the_attention_that_it_had() -> None:
    model = with_images("llava", text_type="llama")
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    kvblocks.generate(model, [[1, 2, 3]], max_new_tokens=2, stop_tokens=[]).run()
    parts: Any = model.config
    assert parts.text_config._attn_implementation == "eager"
    assert parts.vision_config._attn_implementation == "sdpa"


def test_positions_that_a_model_keeps_in_itself() -> None:
    """Qwen2-VL adds the offset of the prompt before to a prompt of which a part is found."""
    model: Any = qwen2_vl()
    ids = torch.arange(6, 46)[None]
    held = PagedCache(model.config, num_blocks=16)
    with pytest.raises(
        UnsupportedModel,
        match=r"keeps in itself by how much an image .* \(rope_deltas\).* leave begin out, or call begin_inputs",
    ):
        held.begin(ids)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    plain: Tensor = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, past_key_values=held, **options), plain)
    model.model.rope_deltas = torch.tensor([[-7]])  # as an image leaves it
    run = kvblocks.generate(model, [ids[0], ids[0]], max_new_tokens=4, stop_tokens=[])
    assert run.run() == [plain[0, 40:].tolist()] * 2


def retrained(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)


def a_llama() -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**tiny_llama().config.to_dict()))
    model.load_state_dict(tiny_llama().state_dict())
    model.train(False)
    return model


def test_new_weights_find_nothing_of_the_old() -> None:
    model = a_llama()
    request = Request(prompt(70), 12)
    with kvblocks.generate(model, [request], num_blocks=64) as run:
        old = run[0].read()
        half = run.add(request)
        first = [next(half) for _ in range(4)]
        retrained(model)
        run.reset_prefix_cache()
        late = run.add(request)
        tokens = late.read()
        assert tokens == expected(model, request) != old
        # The one that was under way goes on as the new weights do from what it had got.
        rest = Request((*request.prompt, *first), 8)
        assert half.read() == [*first, *expected(model, rest)]
        run.scheduler.manager.audit()


def test_new_weights_under_a_paged_cache() -> None:
    model: Any = a_llama()
    ids = torch.tensor([prompt(40)])
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    held = PagedCache(model.config, num_blocks=16)
    held.begin(ids)
    model.generate(ids, past_key_values=held, **options)
    retrained(model)
    held.reset_prefix_cache()
    assert held.num_rows == 0
    assert held.begin(ids) == 0
    assert torch.equal(model.generate(ids, past_key_values=held, **options), model.generate(ids, **options))
