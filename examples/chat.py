"""A chat with a Hugging Face model on `PagedCache`: each turn computes only what is new in it.

The model is a small Llama made from a fixed seed; it babbles. Needs transformers: `pip install "kvblocks[generate]"`.
"""

from typing import Any

import torch
from transformers import DynamicCache

from kvblocks.demo import BOS, EOS, decode, encode, small_llama
from kvblocks.integrations.transformers import PagedCache

TURNS = ("Good morning! What is a block?", "And who gives it back?", "Thank you.")


def main() -> None:
    model: Any = small_llama()
    cache = PagedCache(model.config, memory="16MiB")
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": EOS, "eos_token_id": EOS}
    text = [BOS]
    for turn in TURNS:
        text += encode(f"\nYou: {turn}\nModel: ")[1:]
        ids = torch.tensor([text])
        mask = torch.ones_like(ids)
        found = cache.begin(ids, mask)  # what earlier turns have in common with this one is not computed again
        sequence = model.generate(ids, attention_mask=mask, cache=cache, **options)
        cache.tell(sequence)  # so that the next turn goes on from the answer too
        alone = model.generate(ids, attention_mask=mask, cache=DynamicCache(config=model.config), **options)
        answer = sequence[0, len(text) :].tolist()
        print(f"You: {turn}\nModel: {decode(answer)}")
        print(f"    ({len(text)} tokens of prompt, {found} of them computed in earlier turns)")
        assert torch.equal(sequence, alone), "not what the model says with a cache of its own"
        assert (found > 0) == (turn != TURNS[0])
        text = sequence[0].tolist()
    cache.close()


if __name__ == "__main__":
    main()
