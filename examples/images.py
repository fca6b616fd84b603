"""A chat about images on `PagedCache`: an image of an earlier turn is not seen again, so its pixels are left out.

The model is a tiny LLaVA made from a fixed seed; it babbles. A processor would make its inputs of texts and pictures;
here they are made by hand. Needs transformers: `pip install "kvblocks[generate]"`.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from kvblocks.integrations.transformers import PagedCache

IMAGE, COLUMNS = 5, 9  # the token that stands for an image, and how many of them one takes
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny_llava() -> Any:
    config = LlavaConfig(
        text_config=LlamaConfig(vocab_size=128, **SIZES),
        vision_config=CLIPVisionConfig(image_size=12, patch_size=4, **SIZES),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.train(False)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 1.5 * weight[0].numel() ** -0.5)
    return model


def main() -> None:
    model = tiny_llava()
    cache = PagedCache(model.config, memory="4MiB")
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    text: list[int] = []
    seen: list[Tensor] = []
    for turn in range(3):
        seen.append(torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(turn)))
        text += [20 + turn, 21, *[IMAGE] * COLUMNS, 40, 41, 42]
        ids = torch.tensor([text])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.stack(seen)}
        left = cache.begin_inputs(model, inputs)  # an image is told from others by its pixels
        found, pixels = cache.get_seq_length(), left["pixel_values"]
        sequence = model.generate(**left, cache=cache, **options)
        cache.tell(sequence)
        alone = model.generate(**inputs, cache=DynamicCache(config=model.config), **options)
        print(f"turn {turn + 1}: {len(text)} tokens and {len(seen)} images; {found} tokens were found, and")
        print(f"    {len(seen) - len(pixels)} of the images were left out")
        assert torch.equal(sequence, alone), "not what the model says with a cache of its own"
        assert len(pixels) == 1, "only the image of this turn is new"
        text = sequence[0].tolist()
    cache.close()


if __name__ == "__main__":
    main()
