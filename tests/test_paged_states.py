"""PagedCache of models that keep more than K and V: states of rows, index keys. What transformers' own cache gives."""

import copy
from functools import cache
from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForImageTextToText, DynamicCache, PreTrainedModel

import kvblocks
from kvblocks import NoFreeBlocks, NoFreeStates, Pool
from kvblocks.integrations.transformers import PagedCache, UnsupportedModel

# These tensors are tiny, and threads would only wait for each other.
torch.set_num_threads(1)

# Gated delta rule; Mamba beside attention in each layer; convolutions only; index keys; index keys with positions.
NAMES = ["qwen3_next", "falcon_h1", "lfm2", "deepseek_v32", "qwen4_exp_text"]
WITH_STATES = ["qwen3_next", "falcon_h1", "lfm2", "qwen4_exp_text"]


@cache
def model_of(name: str) -> PreTrainedModel:
    model = tiny_models.sharp(name)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    return model


def paged(name: str, **options: Any) -> PagedCache:
    return PagedCache(model_of(name).config, **{"num_blocks": 96, "block_size": 4, **options})


def own(name: str) -> DynamicCache:
    return DynamicCache(config=model_of(name).config)


def tokens(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(3, tiny_models.VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(seed))


def padded(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    columns = max(lengths)
    mask = (torch.arange(columns) >= columns - torch.tensor(lengths)[:, None]).long()
    return tokens(len(lengths), columns, seed) * mask, mask


@torch.inference_mode()
def forward(name: str, held: Any, ids: Tensor) -> Tensor:
    made: Any = model_of(name)
    logits: Tensor = made(ids, cache=held, use_cache=True).logits[:, -1]
    return logits


def same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def empty(held: PagedCache) -> None:
    held.manager.audit()
    held.close()
    assert held.manager.num_free_blocks == held.manager.num_blocks
    assert held.manager.num_free_states == held.manager.num_states


def generate(name: str, held: Any, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    made: Any = model_of(name)
    out: Tensor = made.generate(ids, attention_mask=mask, cache=held, pad_token_id=0, **options)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_beams_and_several_answers_of_padded_prompts(name: str) -> None:
    ids, mask = padded([13, 9])
    beams: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 7}
    held = paged(name)
    assert torch.equal(generate(name, held, ids, mask, **beams), generate(name, own(name), ids, mask, **beams))
    drawn: dict[str, Any] = {"num_return_sequences": 3, "do_sample": True, "max_new_tokens": 7}
    made = []
    for past in (held, own(name)):
        if isinstance(past, PagedCache):
            # States are of rows, so of these models every row is told.
            told = [matrix.repeat_interleave(3, 0) if name in WITH_STATES else matrix for matrix in (ids, mask)]
            assert past.begin(*told) == 0
        else:
            past.reset()  # type: ignore[no-untyped-call]
        torch.manual_seed(5)
        made.append(generate(name, past, ids, mask, **drawn))
    assert torch.equal(*made)
    if name in WITH_STATES:
        held.begin(ids, mask)
        with pytest.raises(
            ValueError, match=r"the batch has 6 rows, and begin was told 2; of a model that keeps states"
        ):
            generate(name, held, ids, mask, **drawn)
        assert held.get_seq_length() == 0
    empty(held)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_selected_repeated_and_forked(name: str) -> None:
    ours, theirs = paged(name), own(name)
    same(forward(name, ours, tokens(2, 11)), forward(name, theirs, tokens(2, 11)))
    beams: Any = torch.tensor([1, 1])
    for held in (ours, theirs):
        held.reorder_cache(beams)
    same(forward(name, ours, tokens(2, 1, 1)), forward(name, theirs, tokens(2, 1, 1)))
    other, twin = ours.fork(), copy.deepcopy(theirs)
    same(forward(name, ours, tokens(2, 3, 2)), forward(name, theirs, tokens(2, 3, 2)))
    same(forward(name, other, tokens(2, 1, 3)), forward(name, twin, tokens(2, 1, 3)))
    same(forward(name, other, tokens(2, 1, 4)), forward(name, twin, tokens(2, 1, 4)))
    same(forward(name, ours, tokens(2, 1, 5)), forward(name, theirs, tokens(2, 1, 5)))
    # Transformers' own layers of states cannot do these.
    fresh, prompt = own(name), torch.cat([tokens(2, 11)[1:], tokens(2, 1, 1)[1:], tokens(2, 3, 2)[1:]], 1)
    prompt = torch.cat([prompt, tokens(2, 1, 5)[1:]], 1)
    ours.batch_select_indices(torch.tensor([False, True]))
    ours.batch_repeat_interleave(3)
    same(
        forward(name, ours, tokens(3, 1, 6)),
        forward(name, fresh, torch.cat([prompt.expand(3, -1), tokens(3, 1, 6)], 1)),
    )
    other.close()
    empty(ours)


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_that_fails_is_taken_back(name: str) -> None:
    made: Any = model_of(name)
    parts = made.model.layers
    ours = paged(name)
    theirs = own(name)
    for number, columns in enumerate((9, 1, 4)):
        ids = tokens(2, columns, number)
        for part in parts:
            before = ours.get_seq_length()

            def fail(*_: Any) -> None:
                raise KeyError("in the middle of a pass")

            hook = part.mlp.register_forward_pre_hook(fail) if hasattr(part, "mlp") else None
            hook = hook or part.feed_forward.register_forward_pre_hook(fail)
            try:
                with pytest.raises(KeyError, match="in the middle"):
                    forward(name, ours, ids)
            finally:
                hook.remove()
            if part is not parts[-1]:
                with pytest.raises(
                    RuntimeError, match=r"has not ended: . of . layers have written\. If it failed, call"
                ):
                    forward(name, ours, ids)
                with pytest.raises(RuntimeError, match="fork was called inside a pass"):
                    ours.fork()
            if part is parts[-1] and name == "deepseek_v32":  # all was written when it failed
                ours.crop(-columns)
            ours.abort()
            assert ours.get_seq_length() == before
            ours.manager.audit()
        same(forward(name, ours, ids), forward(name, theirs, ids))
    empty(ours)


@pytest.mark.parametrize("name", WITH_STATES)
def test_a_pass_without_blocks_leaves_everything_as_it_was(name: str) -> None:
    ours, theirs = paged(name, num_blocks=4), own(name)
    same(forward(name, ours, tokens(1, 9)), forward(name, theirs, tokens(1, 9)))
    with pytest.raises(NoFreeBlocks):
        forward(name, ours, tokens(1, 9, 1))
    same(forward(name, ours, tokens(1, 2, 2)), forward(name, theirs, tokens(1, 2, 2)))
    with pytest.raises(NoFreeBlocks):
        forward(name, ours, tokens(1, 9, 1))
    same(forward(name, ours, tokens(1, 1, 3)), forward(name, theirs, tokens(1, 1, 3)))
    empty(ours)


def test_convolutions_are_cropped_as_far_as_they_were_recorded() -> None:
    ours = paged("lfm2")
    prompt = tokens(1, 9)
    forward("lfm2", ours, prompt)
    with pytest.raises(ValueError, match=r"1 columns cannot be dropped: convolutions hold the last . of 9 columns"):
        ours.crop(-1)
    ours.activate_past_recording()
    forward("lfm2", ours, tokens(1, 5, 1))
    forward("lfm2", ours, tokens(1, 2, 2))
    ours.crop(-6)
    prompt = torch.cat([prompt, tokens(1, 5, 1)[:, :1], tokens(1, 1, 3)], 1)
    same(forward("lfm2", ours, tokens(1, 1, 3)), forward("lfm2", own("lfm2"), prompt))
    ours.crop(0)
    with pytest.raises(ValueError, match="columns cannot be dropped"):
        ours.crop(-1)
    assert ours.get_seq_length() == 11
    ours.crop(-11)
    same(forward("lfm2", ours, prompt), forward("lfm2", own("lfm2"), prompt))
    empty(ours)


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1"])
def test_a_recurrent_state_does_not_go_back(name: str) -> None:
    ours, theirs = paged(name), own(name)
    ours.activate_past_recording()
    assert not ours.is_croppable
    for number in range(2):
        same(forward(name, ours, tokens(1, 4, number)), forward(name, theirs, tokens(1, 4, number)))
    with pytest.raises(ValueError, match="the model keeps a recurrent state, which does not go back"):
        ours.crop(-1)
    assert not ours.is_croppable
    same(forward(name, ours, tokens(1, 1, 2)), forward(name, theirs, tokens(1, 1, 2)))
    empty(ours)


@pytest.mark.parametrize("name", ["lfm2", "deepseek_v32"])
def test_assisted_generation(name: str) -> None:
    ids = tokens(1, 6).repeat(1, 3)
    mask = torch.ones_like(ids)
    plain: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
    expected = generate(name, own(name), ids, mask, **plain)
    held = paged(name)
    assert torch.equal(generate(name, held, ids, mask, prompt_lookup_num_tokens=3, **plain), expected)
    held.reset()
    helper = copy.deepcopy(model_of(name))
    with torch.no_grad():
        for weight in helper.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.02)
    assert torch.equal(generate(name, held, ids, mask, assistant_model=helper, **plain), expected)
    empty(held)


def stateful(name: str, **options: Any) -> Pool:
    """Checkpoints at every second block."""
    return Pool(model_of(name), block_size=4, **{"num_blocks": 96, "num_states": 12, "state_every": 8, **options})


@pytest.mark.parametrize("name", WITH_STATES)
def test_a_prefix_is_found_where_a_pass_has_left_its_states(name: str) -> None:
    """Of all rows, where these end at one column; and where there are none, or others began meanwhile, all is right."""
    pool = stateful(name)
    first, second = (PagedCache(model_of(name).config, pool=pool) for _ in range(2))
    ids = tokens(2, 13)
    assert first.begin(ids) == 0
    forward(name, first, ids[:, :8])
    same(forward(name, first, ids[:, 8:]), forward(name, own(name), ids))
    longer = torch.cat([ids, tokens(2, 4, 1)], 1)
    expected = forward(name, own(name), longer)
    assert second.begin(longer[:, :9]) == 0  # one column alone is not computed from states that were found
    assert second.begin(longer) == 8
    same(forward(name, second, longer[:, 8:]), expected)
    same(forward(name, first, longer[:, 13:]), expected)  # the pass of the other has come to its end
    mixed = torch.cat([longer[:1], tokens(1, 17, 7)])
    assert second.begin(mixed) == 0
    same(forward(name, second, mixed), forward(name, own(name), mixed))
    assert second.begin(longer, salt=b"another tenant") == 0
    assert second.begin(longer, reuse=False) == 0
    # A checkpoint does not change with what goes on from it, nor with a pass that fails.
    assert second.begin(longer[1:]) == 8
    forward(name, second, longer[1:, 8:12])
    second.abort()
    same(forward(name, second, longer[1:, 8:]), expected[1:])
    assert first.begin(longer[1:]) == 8
    same(forward(name, first, longer[1:, 8:]), expected[1:])
    second.reset_prefix_cache()
    assert first.begin(longer) == 0
    first.close()
    pool.manager.audit()
    assert pool.manager.num_free_states == 12


@pytest.mark.parametrize("name", WITH_STATES)
def test_rows_with_padding_are_found_at_a_column_where_each_has_left_its_states(name: str) -> None:
    pool = stateful(name)
    first, second = (PagedCache(model_of(name).config, pool=pool) for _ in range(2))
    greedy: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    greedy |= {"output_logits": True, "return_dict_in_generate": True}

    def begun(ids: Tensor, mask: Tensor, **options: Any) -> int:
        """Columns that are found; what is generated after them is what transformers' own cache makes of all."""
        second.reset()
        found = second.begin(ids, mask, **options)
        made: list[Any] = [generate(name, past, ids, mask, **greedy) for past in (second, own(name))]
        same(*(torch.stack(each.logits) for each in made))
        return found

    ids, mask = padded([24, 16])
    assert first.begin(ids, mask) == 0
    generate(name, first, ids, mask, max_new_tokens=1)  # its pass over the prompts ends on the grid of both rows
    first.crop(0)  # and counts
    ids, mask = torch.cat([ids, tokens(2, 7, 1)], 1), pad(mask, (0, 7), value=1)
    assert begun(ids, mask) == 24
    assert begun(ids[1:, 8:], mask[1:, 8:]) == 16  # padding is no part of a row
    assert begun(pad(ids, (3, 0)), pad(mask, (3, 0))) == 27
    assert begun(pad(ids, (3, 0)), pad(mask, (3, 0)), salt=b"another tenant") == 3  # padding of all rows
    # No column is on the grid of both rows, where the second is padded by 7; nor where all before it is padding of one.
    assert begun(torch.cat([ids[:1, :30], ids[1:, 1:]]), torch.cat([mask[:1, :30], mask[1:, 1:]])) == 0
    assert begun(*padded([31, 7])) == 0
    second.close()
    empty(first)


def test_what_was_computed_by_one_column_beside_padding_is_nobody_elses() -> None:
    """Transformers hides padding from states in passes of several columns alone."""
    name = "qwen4_exp_text"
    pool = stateful(name)
    first, second = (PagedCache(model_of(name).config, pool=pool) for _ in range(2))
    ids, mask = padded([24, 16])
    first.begin(ids, mask)
    generate(name, first, ids, mask, max_new_tokens=1, prefill_chunk_size=1)
    first.crop(0)
    more = torch.cat([ids, tokens(2, 5, 1)], 1)
    assert second.begin(more[:1]) == 24
    assert second.begin(more[1:, 8:]) == 0
    same(forward(name, second, more[1:, 8:]), forward(name, own(name), more[1:, 8:]))
    second.close()
    empty(first)


def test_positions_of_an_image_are_there_again_with_the_states_behind_it() -> None:
    """An indexer goes by the positions of all columns, which an image shifts: those that are found are told to it."""
    config: Any = tiny_models.tiny_config("qwen4_exp")
    config.image_token_id = 5
    models: Any = AutoModelForImageTextToText
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = models.from_config(config).eval()
    tiny_models.sharpen(model)
    pool = Pool(model, num_blocks=64, block_size=4, num_states=8, state_every=8)
    first, second = (PagedCache(config, pool=pool) for _ in range(2))
    ids = pad(tokens(1, 26).clamp(min=6), (3, 0))
    ids[:, 6:12] = 5
    with pytest.raises(UnsupportedModel, match=r"\(rope_deltas\)"):
        second.begin(ids)

    def inputs(columns: int) -> dict[str, Any]:
        told = ids[:, :columns]
        seen = torch.randn(24, 3 * 2 * 16 * 16, generator=torch.Generator().manual_seed(1))
        given = {"input_ids": told, "attention_mask": (told > 0).long(), "pixel_values": seen}
        return given | {"image_grid_thw": torch.tensor([[1, 4, 6]]), "mm_token_type_ids": (told == 5).long()}

    greedy: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "output_logits": True}
    greedy |= {"return_dict_in_generate": True}
    expected = model.generate(**inputs(29), **greedy, max_new_tokens=4, cache=DynamicCache(config=config))
    told = first.begin_inputs(model, inputs(19))
    assert first.get_seq_length() == 3  # padding
    model.generate(**told, **greedy, max_new_tokens=1, cache=first)
    first.crop(0)
    told = second.begin_inputs(model, inputs(29))
    assert second.get_seq_length() == 19
    assert "pixel_values" not in told
    got = model.generate(**told, **greedy, max_new_tokens=4, cache=second)
    same(torch.stack(got.logits), torch.stack(expected.logits))
    second.close()
    empty(first)


@pytest.mark.parametrize("name", WITH_STATES)
def test_a_chat_goes_on_in_its_rows(name: str) -> None:
    """Where the next prompts begin with all that the rows hold, their states are those that are needed."""
    held = paged(name)
    ids = tokens(2, 11)
    for turn in range(3):
        mask = torch.ones_like(ids)
        assert held.begin(ids) == (0 if turn == 0 else ids.shape[1] - 4)
        out = generate(name, held, ids, mask, max_new_tokens=5, do_sample=False)
        assert torch.equal(out, generate(name, own(name), ids, mask, max_new_tokens=5, do_sample=False))
        held.tell(out)
        ids = torch.cat([out, tokens(2, 3, turn)], 1)
    other = ids.clone()
    other[1, 4] += 1
    assert held.begin(other) == 0
    mask = torch.ones_like(other)
    out = generate(name, held, other, mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(out, generate(name, own(name), other, mask, max_new_tokens=5, do_sample=False))
    empty(held)


@pytest.mark.parametrize("name", WITH_STATES)
def test_prompts_in_chunks_leave_states_behind(name: str) -> None:
    """With beams too, and from a pool that the cache made by itself."""
    held = paged(name, num_blocks=384)
    ids = tokens(1, 262)
    mask = torch.ones_like(ids)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2}
    expected = generate(name, own(name), ids, mask, **options)
    for found in (0, 256):
        assert held.begin(ids.repeat_interleave(2, 0)) == found
        assert torch.equal(generate(name, held, ids, mask, **options, prefill_chunk_size=128), expected)
    assert 0 < held.engine.num_states == held.manager.num_states
    empty(held)


def test_generations_that_share_too_few_slots_for_states() -> None:
    pool = stateful("qwen3_next", num_states=2)
    prompts = tokens(3, 20).tolist()
    options: dict[str, Any] = {"max_new_tokens": 5, "temperature": 0}
    expected = kvblocks.generate(model_of("qwen3_next"), prompts, num_blocks=96, **options).run()
    first = kvblocks.generate(model_of("qwen3_next"), prompts[:2], pool=pool, **options)
    second = kvblocks.generate(model_of("qwen3_next"), prompts[2:], pool=pool, **options)
    next(iter(first[0]))
    with pytest.raises(NoFreeStates, match="1 slots for states needed, 0 of 2 free"):
        next(iter(second[0]))
    assert first.run() == expected[:2]
    assert second.run() == expected[2:]
    pool.manager.audit()
    assert pool.manager.num_free_states == 2


def test_index_keys_lie_in_blocks_and_count_in_memory() -> None:
    config: Any = model_of("deepseek_v32").config
    held = paged("deepseek_v32", memory="256KiB", num_blocks=None)
    forward("deepseek_v32", held, tokens(1, 9))
    [layer, *_] = held.engine.config.layers
    assert [tensor.name for tensor in layer] == ["key", "value", "index"]
    assert layer[2].shape == (1, config.index_head_dim)
    assert held.engine.memory_bytes <= 256 * 1024
    ids = tokens(2, 12, 1)
    held.begin(ids)
    forward("deepseek_v32", held, ids)
    assert held.begin(torch.cat([ids, tokens(2, 3, 2)], 1)) == 12
    expected = forward("deepseek_v32", own("deepseek_v32"), torch.cat([ids, tokens(2, 3, 2)], 1))
    same(forward("deepseek_v32", held, tokens(2, 3, 2)), expected)
    empty(held)


@pytest.mark.parametrize("layout", ["NHD", "HND", "HDN", "X"])
def test_index_keys_in_every_layout(layout: str) -> None:
    pool = Pool(model_of("deepseek_v32"), num_blocks=32, block_size=4, layout=layout)
    held, theirs = PagedCache(model_of("deepseek_v32").config, pool=pool), own("deepseek_v32")
    for number, columns in enumerate((9, 3, 1)):
        ids = tokens(2, columns, number)
        same(forward("deepseek_v32", held, ids), forward("deepseek_v32", theirs, ids))
    empty(held)
