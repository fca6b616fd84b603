"""Sizing: what a model's cache takes, what fits into a card, and what to change where it does not.

Nothing is loaded and nothing downloaded: the numbers of a config are enough. Here they are those of Llama 3 8B.
"""

from kvblocks import plan

LLAMA_3_8B = {
    "model_type": "llama",
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
}


def main() -> None:
    made = plan(LLAMA_3_8B, memory="24GiB", weights="16GB", seq_len=8192, concurrency=4)
    print(made.explain())
    # 32 layers, K and V, 8 heads of 128 numbers of 2 bytes: 128 KiB a token, and 1 GiB for 8,192 of them.
    assert made.bytes_per_token == 32 * 2 * 8 * 128 * 2 == 128 * 2**10
    assert made.memory_for(2, 8192) - made.memory_for(1, 8192) == 2**30
    assert made.fits
    most = made.max_concurrency(8192)
    print(f"\n{most} sequences of 8,192 tokens fit beside the weights, and 4 were asked for.")
    assert most == (24 * 2**30 - 16 * 10**9) // 2**30
    halved = plan(LLAMA_3_8B, memory="24GiB", weights="16GB", dtype="fp8", seq_len=8192, concurrency=4)
    print(f"With K and V in 8 bits {halved.max_concurrency(8192)} do.")
    assert halved.max_concurrency(8192) >= 2 * most
    too_many = plan(LLAMA_3_8B, memory="24GiB", weights="16GB", seq_len=8192, concurrency=64)
    assert not too_many.fits
    print("64 do not:")
    print("\n".join(too_many.explain().splitlines()[-4:]))


if __name__ == "__main__":
    main()
