"""A tiny decoder in plain torch, which the other examples run on, and its answers without a cache.

It was not trained, so its answers mean nothing, but every token of them depends on all the tokens before. Attention is
not part of it: whoever runs the model says how a layer's queries meet K and V.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

VOCABULARY, LAYERS, HEADS, KV_HEADS, DIM = 256, 4, 4, 2, 16

# Given a layer's number, its queries [tokens, heads, dim], and K and V [tokens, KV heads, dim] of the tokens of this
# pass: what the queries read, [tokens, heads, dim].
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class TinyModel:
    """Four layers with grouped query heads.

    Args:
        windows: for each layer how many tokens back it attends, itself counted; None for all.
    """

    def __init__(self, windows: Sequence[int | None] = (None,) * LAYERS, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        width, rows = HEADS * DIM, (HEADS + 2 * KV_HEADS) * DIM

        def weight(rows: int, columns: int, scale: float = 1.0) -> Tensor:
            return torch.randn(rows, columns, generator=generator) * scale / math.sqrt(columns)

        self.windows = tuple(windows)
        self.embedding = weight(VOCABULARY, width, math.sqrt(width))
        self.layers = [(weight(rows, width, 2.0), weight(width, width), weight(width, width)) for _ in windows]
        self.output = weight(VOCABULARY, width)

    def __call__(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Logits [tokens, vocabulary] for ids and positions [tokens] of any number of sequences, one after another."""
        angles = positions[:, None] / 100.0 ** (torch.arange(HEADS * DIM // 2) / (HEADS * DIM // 2))
        x = self.embedding[ids] + torch.cat([angles.sin(), angles.cos()], 1)
        for layer, (into_qkv, out_of_heads, mix) in enumerate(self.layers):
            qkv = (norm(x) @ into_qkv.T).view(len(ids), HEADS + 2 * KV_HEADS, DIM)
            q, k, v = qkv[:, :HEADS], qkv[:, HEADS:-KV_HEADS], qkv[:, -KV_HEADS:]
            x = x + attend(layer, q, k, v).reshape(len(ids), -1) @ out_of_heads.T
            x = x + torch.tanh(norm(x) @ mix.T)
        return norm(x) @ self.output.T

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits after the last of these tokens, with everything computed anew."""
        count = torch.arange(len(tokens))

        def dense(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            seen = count[None, :] <= count[:, None]
            window = self.windows[layer]
            if window is not None:
                seen &= count[None, :] > count[:, None] - window
            q, k, v = (states.transpose(0, 1)[None] for states in (q, k, v))
            attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
            return attended[0].transpose(0, 1)

        return self(torch.tensor(tokens), count, dense)[-1]

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The most likely `count` tokens after a prompt, without a cache: slow, and what the examples must equal."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(tokens).argmax()))
        return tokens[len(prompt) :]


def norm(x: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:])
