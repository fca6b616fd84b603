"""What `kvblocks generate --model tiny` runs on: a small Llama made from a fixed seed, bytes for tokens, and prompts.

Nothing is downloaded and nothing was trained: the model babbles, to each prompt in its own way. Imports transformers.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

__all__ = ["BOS", "EOS", "PROMPTS", "decode", "encode", "small_llama"]

BOS, EOS = 256, 257

PROMPTS = (
    "A block is the K and V of sixteen tokens.",
    "A block is the K and V of sixteen tokens, for every layer.",
    "Hello!",
    "?",
    "The quick brown fox jumps over the lazy dog.",
    "A sequence has a table of blocks, and a slot is where one token's K and V go. " * 2,
    "Once upon a time there was a cache that forgot nothing,",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "0, 1, 1, 2, 3, 5, 8, 13, 21,",
    "Who holds the lock?",
    "When the pool runs dry, the newest sequence gives way; when blocks come free, it is the first to come back.",
    "いろはにほへと ちりぬるを",
)


def encode(text: str) -> tuple[int, ...]:
    """The UTF-8 bytes of a text after the token that begins it."""
    return (BOS, *text.encode())


def decode(tokens: list[int]) -> str:
    """The text of bytes; special tokens are left out, what is not UTF-8 is escaped."""
    return bytes(token for token in tokens if token < BOS).decode(errors="backslashreplace")


def small_llama(seed: int = 7) -> LlamaForCausalLM:
    """A Llama of 4 layers and 2.4 million float32 weights with grouped query heads, the same each time.

    Weights are scaled so that attention is sharp, tokens depend on what came long before, and the best logit stands
    clear of the next. Only small letters, space, comma, full stop and the end have an output.
    """
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.train(False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.fill_(1)
                continue
            sharpness = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
            weight.copy_(torch.randn(weight.shape, generator=generator) * sharpness * weight.shape[1] ** -0.5)
        spoken = torch.zeros(config.vocab_size, 1)
        spoken[list(b"abcdefghijklmnopqrstuvwxyz ,.")] = 4.0
        spoken[EOS] = 2.2
        model.lm_head.weight.mul_(spoken)
        model.model.embed_tokens.weight.mul_(config.hidden_size**0.5)
    return model
