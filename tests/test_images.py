"""Prompts with images through PagedCache: what was found leaves its pixels out, and no image is found in part."""

from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from kvblocks.integrations.transformers import PagedCache

# These tensors are tiny, and threads would only wait for each other.
torch.set_num_threads(1)

IMAGE = 5
TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"num_key_value_heads": 1, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1}
TEXT |= {"eos_token_id": 2}
SEEN = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
SEEN |= {"image_size": 12, "patch_size": 4}
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
GEMMA: dict[str, Any] = {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}

# The text half, the half that sees, and what else the config has. Each image takes nine columns.
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llava": (
        {"model_type": "llama"},
        {"model_type": "clip_vision_model", **SEEN},
        {"vision_feature_select_strategy": "default", "vision_feature_layer": -1},
    ),
    "gemma3": (
        {"model_type": "gemma3_text", **GEMMA},
        {"model_type": "siglip_vision_model", **SEEN},
        {"mm_tokens_per_image": 9},
    ),
    "qwen2_vl": (
        {"model_type": "qwen2_vl_text", "rope_parameters": ROPE},
        {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2},
        {},
    ),
}


@cache
def model_of(name: str) -> Any:
    """A model whose attention is sharp, so that another image changes tokens."""
    text, seen, more = MODELS[name]
    kinds: Any = transformers.AutoConfig
    config = kinds.for_model(
        name, text_config={**TEXT, **text}, vision_config=seen, image_token_id=IMAGE, image_token_index=IMAGE, **more
    )
    torch.manual_seed(0)
    models: Any = transformers.AutoModelForImageTextToText
    model = models.from_config(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 1.5 * weight[0].numel() ** -0.5)
    return model.eval()


def inputs_of(name: str, *rows: list[int | str]) -> dict[str, Tensor]:
    """What a processor would make: rows of ids and of images by name, padded on the left."""
    ids = [[token for part in row for token in ([IMAGE] * 9 if isinstance(part, str) else [part])] for row in rows]
    columns = max(map(len, ids))
    padded = torch.tensor([[0] * (columns - len(row)) + row for row in ids])
    made = {"input_ids": padded, "attention_mask": (padded > 0).long()}
    kinds = (padded == IMAGE).long()
    if name == "gemma3":
        made["token_type_ids"] = kinds
    if name == "qwen2_vl":
        made["mm_token_type_ids"] = kinds
    images = [part for row in rows for part in row if isinstance(part, str)]
    if not images:
        return made
    shape = (36, 3 * 2 * 16) if name == "qwen2_vl" else (3, 12, 12)
    pixels = [torch.randn(shape, generator=torch.Generator().manual_seed(sum(image.encode()))) for image in images]
    made["pixel_values"] = torch.cat(pixels) if name == "qwen2_vl" else torch.stack(pixels)
    if name == "qwen2_vl":
        made["image_grid_thw"] = torch.tensor([[1, 6, 6]] * len(images))
    return made


def generated(model: Any, inputs: dict[str, Any], past: Any) -> list[list[int]]:
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    made: Tensor = model.generate(**inputs, past_key_values=past, **options)
    tokens: list[list[int]] = made[:, inputs["input_ids"].shape[1] :].tolist()
    return tokens


def expected(name: str, inputs: dict[str, Any]) -> list[list[int]]:
    model = model_of(name)
    if name == "qwen2_vl":
        model.model.rope_deltas = None
    return generated(model, inputs, DynamicCache(config=model.config))


def begun(held: PagedCache, name: str, *rows: list[int | str]) -> tuple[int, int]:
    """Generate, and compare; the columns that were found in blocks, and the images whose pixels were needed."""
    held.reset()  # rows of its own would go on where they are
    inputs = inputs_of(name, *rows)
    right = expected(name, inputs)
    left = held.begin_inputs(model_of(name), inputs)
    found = held.get_seq_length()
    assert generated(model_of(name), left, held) == right
    pixels = left.get("pixel_values")
    held.manager.audit()
    return found, 0 if pixels is None else len(pixels) // (36 if name == "qwen2_vl" else 1)


@pytest.mark.parametrize("name", MODELS)
def test_turns_with_images(name: str) -> None:
    held = PagedCache(model_of(name).config, num_blocks=64, block_size=4)
    text = [7, 8, 9, 10, 11]
    assert begun(held, name, [*text, "cat", 12, 13, 14, 15]) == (0, 1)
    assert begun(held, name, [*text, "cat", 12, 13, 14, 15, 16, 17, "dog", 18, 19, 33, 34]) == (16, 1)
    assert begun(held, name, [*text, "cat", 12, 13, 14, 15, 16, 17, "dog", 18, 19, 33, 34, 35]) == (32, 0)
    # The third and the fourth block are the same but for the image.
    assert begun(held, name, [*text, "owl", 12, 13, 14, 15]) == (4, 1)
    assert begun(held, name, [*text, 12, 13, 14, 15])[1] == 0


@pytest.mark.parametrize("name", MODELS)
def test_a_hit_that_would_end_inside_an_image_ends_before_it(name: str) -> None:
    held = PagedCache(model_of(name).config, num_blocks=64, block_size=4)
    text = [7, 8, 9, 10, 11]
    assert begun(held, name, [*text, "cat", 12, 13]) == (0, 1)
    # Three blocks are there, and the last two of these are of the image.
    # Where layers have windows, the blocks up to there are found again, and only whole ones are.
    assert begun(held, name, [*text, "cat", 30, 31]) == (4 if name == "gemma3" else 5, 1)


@pytest.mark.parametrize("name", MODELS)
def test_rows_start_from_one_column_that_is_inside_no_image(name: str) -> None:
    held = PagedCache(model_of(name).config, num_blocks=64, block_size=4)
    first: list[int | str] = [7, 8, 9, 10, 11, "cat", 12, 13, 14]
    second: list[int | str] = [20, 21, 22, "dog", 23, 24, 25, 26, 27]
    begun(held, name, [*first, 30], [*second, 30])
    assert begun(held, name, [*first, 31, 32], [*second, 31, 32]) == (16, 0)
    # Columns 9 to 17 of the second row are its dog, and 6 to 14 of the first, after its padding, the cat.
    third: list[int | str] = [*range(40, 49), "dog", 23]
    begun(held, name, [*third, 30])
    assert begun(held, name, [*first, 33, 34], [*third, 33]) == (4 if name == "gemma3" else 6, 2)


@pytest.mark.parametrize("name", MODELS)
def test_a_chat_goes_on_from_its_own_answers(name: str) -> None:
    """Rows that go on where they are: tokens of an answer lie in no block that a prompt could find."""
    model, held = model_of(name), PagedCache(model_of(name).config, num_blocks=64, block_size=4)
    text: list[int | str] = [7, 8, "cat", 9]
    for image, found in (("dog", 0), ("owl", 17), ("cat", 34)):
        inputs = inputs_of(name, text)
        left = held.begin_inputs(model, inputs)
        assert held.get_seq_length() == found
        assert len(left["pixel_values"]) == (36 if name == "qwen2_vl" else 1)
        tokens = generated(model, left, held)
        assert tokens == expected(name, inputs)
        held.tell([inputs["input_ids"][0].tolist() + tokens[0]])
        text += [*tokens[0], 10, image]
        text += [11]
    # Another image in the place of the second: what is before it stays.
    text[text.index("dog")] = "owl"
    inputs = inputs_of(name, text)
    left = held.begin_inputs(model, inputs)
    assert held.get_seq_length() == (16 if name == "gemma3" else 19)
    assert generated(model, left, held) == expected(name, inputs)


def test_images_behind_what_windows_found_are_told_apart() -> None:
    """Where rows are admitted anew with less than was found, what comes after keeps its image."""
    held = PagedCache(model_of("gemma3").config, num_blocks=64, block_size=4)
    head: list[int | str] = [*range(20, 40)]
    for image in ("cat", "dog"):
        begun(held, "gemma3", [*head, 41, image, 42, 43, 44, 45], [*range(41, 50), *range(30, 50)])
        begun(held, "gemma3", [*head, 41, image, 42, 43, 44, 45, 46])


def test_another_image_changes_tokens() -> None:
    for name in MODELS:
        cat, dog = (expected(name, inputs_of(name, [7, 8, image, 9])) for image in ("cat", "dog"))
        assert cat != dog


def test_what_cannot_be_told_apart_is_refused() -> None:
    model = model_of("llava")
    held = PagedCache(model.config, num_blocks=64)
    inputs = inputs_of("llava", [7, "cat", 8])
    with pytest.raises(ValueError, match="inputs has image_sizes; taken are attention_mask, image_grid_thw, input_ids"):
        held.begin_inputs(model, {**inputs, "image_sizes": torch.ones(1, 2)})
    with pytest.raises(ValueError, match="input_ids holds 9 placeholders of images, and there are no pixel_values"):
        held.begin_inputs(model, {**inputs, "pixel_values": None})
    with pytest.raises(ValueError, match=r"9 placeholders; taken are .*each image with as many placeholders"):
        held.begin_inputs(model, {**inputs, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)})
    hole = inputs["input_ids"].clone()
    hole[0, [0, 5]] = hole[0, [5, 0]]
    with pytest.raises(ValueError, match="do not follow each other in one row"):
        held.begin_inputs(model, {**inputs, "input_ids": hole})
    with pytest.raises(TypeError, match="input_ids is a list; give tensors: return_tensors='pt'"):
        held.begin_inputs(model, {"input_ids": [[1, 2]]})
    with pytest.raises(ValueError, match="inputs has pixel_values; input_ids must be among them"):
        held.begin_inputs(model, {"pixel_values": inputs["pixel_values"]})
    with pytest.raises(ValueError, match="the cache was made for another model than this Gemma3For"):
        held.begin_inputs(model_of("gemma3"), inputs)
    assert held.num_rows == 0
