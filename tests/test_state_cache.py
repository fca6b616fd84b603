"""What layers keep once for a sequence, in an engine: tensors, their sizes, and the states that passes find there."""

from random import Random
from typing import Any

import pytest
import torch

from kvblocks import BlockManager, CacheConfig, CacheEngine, LayerTensor, NoFreeStates, State, StepBuffers, key_value
from kvblocks.errors import MovesPending, OutOfMemory
from kvblocks.storage import StateCache

CONV = LayerTensor("conv", (3, 5), per="sequence")
DELTA = LayerTensor("delta", (2, 4, 3), "float32", per="sequence")
FLAGS = LayerTensor("flags", (7,), "uint8", per="sequence")
HYBRID = CacheConfig(
    layers=[(CONV, DELTA), key_value(2, 8), (FLAGS, CONV), (*key_value(2, 8), FLAGS)], num_gpu_blocks=24, block_size=4
)
EVERY = 8
LOAD = 1  # a kind of move
STATES = 1  # the group of states, which comes after that of blocks


def engine_of(num_states: int = 6, dtype: str = "float16", host_states: int = 0) -> CacheEngine:
    slots = 48 if host_states else 0
    return CacheEngine(
        HYBRID, dtype, "cpu", layout="NHD", num_states=num_states, host_blocks=slots, host_states=host_states
    )


def state_of(engine: CacheEngine, layer: int) -> StateCache:
    cache = engine.states[layer]
    assert cache is not None
    return cache


def test_each_layer_has_its_tensors_and_sizes_are_exact() -> None:
    engine = engine_of()
    assert HYBRID.state_bytes("float16") == 2 * 15 * 2 + 24 * 4 + 2 * 7
    assert engine.memory_bytes == HYBRID.memory_bytes("float16") + 6 * HYBRID.state_bytes("float16")
    tensors = [tensor for cache in engine.states if cache is not None for tensor in cache.tensors.values()]
    assert sum(tensor.numel() * tensor.itemsize for tensor in tensors) == 6 * HYBRID.state_bytes("float16")
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert sum(storages.values()) == 6 * HYBRID.state_bytes("float16")
    first = state_of(engine, 0)
    assert list(first["conv"].shape) == [6, 3, 5]
    assert (first["conv"].dtype, first["delta"].dtype) == (torch.float16, torch.float32)
    assert list(first["delta"].shape) == [6, 2, 4, 3]
    assert all(tensor[0].is_contiguous() for tensor in tensors)
    assert first.slot_bytes == 15 * 2 + 24 * 4
    assert engine.states[1] is None
    assert repr(first) == "<StateCache of 6 slots: conv [3, 5], delta [2, 4, 3]>"
    for number, tensor in enumerate(tensors):  # nobody writes into another's
        tensor.fill_(number + 1)
    assert all((tensor == number + 1).all() for number, tensor in enumerate(tensors))


def test_a_layer_that_keeps_nothing_for_a_token_has_no_cache() -> None:
    engine = engine_of()
    assert len(engine) == 4
    assert engine.get_cache(0) is None
    assert len(engine.get_all_caches()) == len(list(engine)) == 2
    assert engine[3].tensors.keys() == {"key", "value"}
    assert engine.group_of(1) == 0
    for call in (lambda: engine[0], lambda: engine.group_of(2)):
        with pytest.raises(ValueError, match=r"keeps nothing for a token; engine\.states\["):
            call()


def test_wrong_numbers_of_states() -> None:
    with pytest.raises(ValueError, match=r"layer 0 keeps a state for each sequence, and num_states=0"):
        CacheEngine(HYBRID, "float16", "cpu")
    plain = CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_gpu_blocks=4)
    with pytest.raises(ValueError, match=r"num_states=3, but no layer"):
        CacheEngine(plain, "float16", "cpu", num_states=3)
    for wrong, error in ((-1, ValueError), (2**31, ValueError), (1.5, TypeError), (True, TypeError)):
        with pytest.raises(error, match="num_states"):
            CacheEngine(HYBRID, "float16", "cpu", num_states=wrong)  # type: ignore[arg-type]
    large = CacheConfig(
        layers=[key_value(1, 8), (LayerTensor("all", (2**30,), per="sequence"),)], num_gpu_blocks=1, block_size=1
    )
    with pytest.raises(OutOfMemory, match=r"2000000 slots for states of 2147483648 bytes"):
        CacheEngine(large, "float16", "cpu", num_states=2_000_000)


def test_the_manager_and_the_engine_keep_as_many_states() -> None:
    engine = engine_of()
    step = StepBuffers.for_config(HYBRID, max_seqs=2, max_tokens=16, max_seq_len=64)
    for manager in (BlockManager(24, 4), BlockManager(24, 4, groups=(None, State(EVERY)), num_states=7)):
        manager.prepare(manager.admit(range(5))[0], 5, step)
        with pytest.raises(ValueError, match=r"num_states="):
            engine.move(step)
    options: dict[str, Any] = {"every": EVERY, "num_states": 6, "host_blocks": 4}
    with_host = BlockManager.for_config(HYBRID, **options, host_states=2)
    with_host.prepare(with_host.admit(range(5))[0], 5, step)
    for other in (0, 1):
        made = CacheEngine(HYBRID, "float16", "cpu", num_states=6, host_blocks=4, host_states=other)
        with pytest.raises(ValueError, match=rf"host_states=2 and the engine {other}"):
            made.move(step)
    with pytest.raises(ValueError, match=r"host_states=2 needs num_states= and host_blocks="):
        CacheEngine(HYBRID, "float16", "cpu", num_states=6, host_states=2)
    manager = BlockManager.for_config(HYBRID, every=EVERY, num_states=6)
    manager.prepare(manager.admit(range(5))[0], 5, step)
    assert step.state_zero is not None
    step.state_zero[0] = 6
    with pytest.raises(ValueError, match=r"step\.state_zero names slot 6, which is outside 0\.\.5"):
        engine.move(step)
    with pytest.raises(MovesPending):
        manager.commit(1)
    step.state_zero[0] = 0
    engine.move(step)
    manager.commit(1)


class Model:
    """A model whose state is a function of each token that it has seen, in their order, and of nothing else."""

    def __init__(self, engine: CacheEngine) -> None:
        self.tensors = [tensor for cache in engine.states if cache is not None for tensor in cache.tensors.values()]

    def advance(self, number: int, state: torch.Tensor, token: int) -> torch.Tensor:
        """The state of one tensor after one more token: small integers, exact in any dtype."""
        return (state.to(torch.int64) * 5 + token + number + torch.arange(state.numel()).view(state.shape)) % 113

    def run(self, manager: BlockManager, step: StepBuffers) -> None:
        assert step.state_slots is not None
        assert step.state_drafts is not None
        for row in range(step.num_seqs):
            first, last = step.query_start_loc[row : row + 2].tolist()
            for number, tensor in enumerate(self.tensors):
                state = tensor[int(step.state_slots[row])].clone()
                for place in range(first, last):
                    state = self.advance(number, state, int(step.input_ids[place])).to(tensor.dtype)
                    slot = int(step.state_drafts[place])
                    if slot >= 0:
                        tensor[slot] = state
                if int(step.state_drafts[first]) < 0:
                    tensor[int(step.state_slots[row])] = state

    def after(self, number: int, tokens: list[int]) -> torch.Tensor:
        state = torch.zeros_like(self.tensors[number][0])
        for token in tokens:
            state = self.advance(number, state, token).to(state.dtype)
        return state


@pytest.mark.parametrize("host_states", [0, 6])
@pytest.mark.parametrize("seed", range(3))
def test_passes_find_the_state_of_their_own_tokens(seed: int, host_states: int) -> None:
    """Conversations with hits, forks, drafts, aborts and preemptions; each state is what its tokens alone make it, also
    where it has been in host memory."""
    rng = Random(seed)
    engine = engine_of(4 if host_states else rng.choice([4, 6, 12]), host_states=host_states)
    for cache in engine.states:
        for tensor in cache.tensors.values() if cache is not None else ():
            tensor.fill_(99)  # what another tenant left
    model = Model(engine)
    manager = BlockManager.for_config(
        HYBRID,
        every=EVERY,
        num_states=engine.num_states,
        host_blocks=48 if host_states else 0,
        host_states=host_states,
    )
    step = StepBuffers.for_config(HYBRID, max_seqs=4, max_tokens=64, max_seq_len=64)
    live: list[int] = []
    hits = loads = 0
    for _ in range(100):
        if len(live) < 3 and rng.random() < 0.6:
            prompt = [rng.randint(0, 3 if host_states else 1)] * rng.randint(1, 20) + [rng.randint(0, 1)]
            if manager.can_admit(prompt):
                seq, cached = manager.admit(prompt)
                hits += cached
                live.append(seq)
        if live and len(live) < 4 and rng.random() < 0.2:
            live += manager.fork(rng.choice(live))
        if live and rng.random() < 0.15:
            manager.free(live.pop(rng.randrange(len(live))))
        lengths = manager.lengths(live)
        left = [int(n - done) for n, done in zip(lengths.num_tokens, lengths.num_computed, strict=True)]
        manager.append([seq for seq, n in zip(live, left, strict=True) if n == 0], [rng.randint(0, 1)] * left.count(0))
        lens = [rng.randint(1, max(1, min(n, 16))) for n in left]
        if rng.random() < 0.5:
            ends = [manager.next_checkpoint(seq) for seq in live]
            done = [int(count) for count in lengths.num_computed]
            lens = [end - now if end else n for end, now, n in zip(ends, done, lens, strict=True)]
        keep = rng.random() < 0.2
        if not live:
            continue
        try:
            step_id = manager.prepare(live, lens, step, keep_state=keep)
        except (NoFreeStates, RuntimeError):
            manager.free(live.pop())
            continue
        loads += sum(kind == LOAD and group == STATES for kind, group, _, _ in step.moves.tolist())
        engine.move(step)
        manager.landed(engine.landed())
        model.run(manager, step)
        chance = rng.random()
        if chance < 0.15:
            lost = manager.abort(step_id)
        elif chance < 0.4:
            lost = manager.commit(step_id, [rng.randint(0, n) for n in lens])
        else:
            lost = manager.commit(step_id)
            assert step.state_slots is not None
            assert step.state_drafts is not None
            for row, seq in enumerate(live):
                end = int(step.query_start_loc[row + 1]) - 1
                slot = int(step.state_drafts[end]) if keep else int(step.state_slots[row])
                tokens = manager.tokens(seq)[: int(step.seq_lens[row])].tolist()
                for number, tensor in enumerate(model.tensors):
                    assert torch.equal(tensor[slot], model.after(number, tokens)), f"tensor {number} of row {row}"
        gone = [seq for seq in live if seq in lost or int(manager.lengths(seq).num_tokens[0]) >= 40]
        manager.free(gone)
        live = [seq for seq in live if seq not in gone]
        manager.audit()
    assert hits > 0
    assert (loads > 0) == (host_states > 0)


@pytest.mark.parametrize("layout", ["HDN", "NHD"])
def test_ids_and_positions_come_back_as_they_were(layout: str) -> None:
    """Of 64 bits, which no float would hold."""
    layer = (
        *key_value(2, 8),
        LayerTensor("positions", (3, 1), "int64"),
        LayerTensor("last", (2,), "int64", "sequence"),
    )
    config = CacheConfig(layers=[layer], num_gpu_blocks=4, block_size=4)
    engine = CacheEngine(config, "float16", "cpu", layout=layout, num_states=2)
    keys, values = torch.randn(6, 2, 8).half(), torch.randn(6, 2, 8).half()
    positions = torch.arange(18).view(6, 3, 1) + 2**62
    engine[0].write(keys, values, positions, torch.arange(6))
    engine.copy_blocks([(1, 3)])
    assert torch.equal(engine[0].gather([0, 3], 6)[2], positions)
    last = state_of(engine, 0)["last"]
    last[1] = torch.tensor([2**63 - 1, -(2**63)])
    assert (list(last.shape), last[1].tolist()) == ([2, 2], [2**63 - 1, -(2**63)])
