"""StepBuffers: what arrives on a device equals what the host has, however late the device is."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import DEVICES
from torch import Tensor

from kvblocks import BlockManager, Chunk, NoFreeBlocks, NoFreeStates, State, StepBuffers, Window
from kvblocks.checks import once
from kvblocks.kernels import kernels
from kvblocks.kernels.launch import INTERPRETED
from kvblocks.manager import StepArrays
from kvblocks.step import buffers as step_buffers
from kvblocks.step.upload import Event, Transport

ARRAYS = ("input_ids", "positions", "slot_mapping", "block_table", "seq_lens", "query_start_loc")
PAGES = ("kv_indptr", "kv_last_page_len")
STATES = ("state_slots", "state_zero", "state_drafts")


class LateTransport(Transport):
    """CPU memory as a device that does nothing before it is waited for, and then in order."""

    def __init__(self, with_kernel: bool = INTERPRETED) -> None:
        super().__init__(torch.device("cpu"))
        self.queue: list[Callable[[], Any]] = []
        self.with_kernel = with_kernel
        self.sent: list[int] = []
        self.broken = False

    def event(self) -> Event:
        return LateEvent(self)

    def copy(self, target: Tensor, source: Tensor) -> None:
        if self.broken:
            raise RuntimeError("the device fell off the bus")
        self.sent.append(source.nbytes)
        self.queue.append(lambda: target.copy_(source))

    def apply(self, image: Tensor, packed: Tensor, host: Tensor, patches_at: int, count: int, longest: int) -> None:
        module = kernels("steps")
        if self.with_kernel and module is not None:
            self.queue.append(lambda: module.apply_patches(image, packed, patches_at, count, longest))
        else:
            self.queue.append(lambda: Transport.apply(self, image, packed, host, patches_at, count, longest))

    def run(self, until: Callable[[], bool]) -> None:
        while self.queue and not until():
            self.queue.pop(0)()

    def finish(self) -> None:
        self.run(lambda: False)


class LateEvent:
    def __init__(self, transport: LateTransport) -> None:
        self.transport, self.pending = transport, 0

    def record(self) -> None:
        self.pending += 1
        self.transport.queue.append(self.reached)

    def reached(self) -> None:
        self.pending -= 1

    def synchronize(self) -> None:
        self.transport.run(lambda: self.pending == 0)


def buffers_over(way: Transport | None, **sizes: Any) -> StepBuffers:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_buffers, "transport", lambda device: way)
        return StepBuffers(**{"max_seqs": 5, "max_tokens": 24, "max_blocks_per_seq": 9, **sizes})


def snapshot(buffers: StepBuffers, num_copies: int, num_state_copies: int = 0) -> dict[str, list[Any]]:
    found = {name: getattr(buffers, name).tolist() for name in ARRAYS}
    found["copies"] = buffers._copies_image[:num_copies].tolist()
    if buffers._state_copies_image is not None:
        found |= {name: getattr(buffers, name).tolist() for name in STATES}
        found["state_copies"] = buffers._state_copies_image[:num_state_copies].tolist()
    if buffers.kv_indptr is not None and buffers.kv_indices is not None:
        found |= {name: getattr(buffers, name).tolist() for name in PAGES}
        ends = buffers.kv_indptr.view(buffers.num_groups, -1)[:, -1].tolist()
        rows = buffers.kv_indices.view(buffers.num_groups, -1)
        found["kv_indices"] = [row[:end].tolist() for row, end in zip(rows, ends, strict=True)]
    return found


class Engine:
    """A manager, and the calls that a seed makes on it; the same seed makes the same calls with the same block ids."""

    def __init__(self, seed: int, buffers: StepBuffers) -> None:
        self.rng = random.Random(seed)
        reaches = (None,) if buffers.num_groups == 1 else (None, Window(6), Chunk(8))
        self.stateful = buffers.state_slots is not None
        more: dict[str, Any] = {"num_states": 7} if self.stateful else {}
        groups = (*reaches, State(8)) if self.stateful else reaches
        self.manager = BlockManager(24 * len(reaches), 4, max_open_steps=2, groups=groups, **more)
        self.buffers = buffers
        self.seqs: list[int] = []

    def steps(self, count: int) -> Iterator[int | None]:
        """After each step's `prepare` its number, before it is closed; None where it could not be prepared."""
        for number in range(count):
            self.shuffle_batch()
            batch = self.rng.sample(self.seqs, min(len(self.seqs), self.rng.randint(1, 5)))
            pairs = [(seq, self.pending(seq)) for seq in batch]
            batch = [seq for seq, pending in pairs if pending]
            lens = [self.rng.randint(1, min(pending, 4)) for _, pending in pairs if pending]
            if not batch:
                continue
            keep = self.stateful and self.rng.random() < 0.3
            try:
                step_id = self.manager.prepare(batch, lens, self.buffers, keep_state=keep)
            except (NoFreeBlocks, NoFreeStates):
                for seq in self.seqs:
                    self.manager.free([seq])
                self.seqs.clear()
                yield None
                continue
            self.manager.mark_moved(self.buffers.last_move)
            yield number
            if self.rng.random() < 0.15:
                lost = self.manager.abort(step_id)
            elif self.rng.random() < 0.3:
                lost = self.manager.commit(step_id, [self.rng.randint(1, n) for n in lens])
            else:
                lost = self.manager.commit(step_id)
            self.manager.free(lost)
            self.seqs = [seq for seq in self.seqs if seq not in lost]
        self.manager.audit()

    def pending(self, seq: int) -> int:
        lengths = self.manager.lengths([seq])
        return int(lengths.num_tokens[0] - lengths.num_computed[0])

    def shuffle_batch(self) -> None:
        rng, manager = self.rng, self.manager
        if len(self.seqs) < 6 and rng.random() < 0.6:
            prompt = [rng.randint(0, 1) for _ in range(rng.randint(1, 20))]
            if manager.can_admit(prompt) == 0:
                self.seqs.append(manager.admit(prompt)[0])
        if self.seqs and rng.random() < 0.3 and len(self.seqs) < 7:
            self.seqs += [int(child) for child in manager.fork(rng.choice(self.seqs), 1)]
        if self.seqs and rng.random() < 0.2:
            manager.free([self.seqs.pop(rng.randrange(len(self.seqs)))])
        for seq in self.seqs:
            if not self.pending(seq) and int(manager.lengths([seq]).num_tokens[0]) < 32:
                manager.append([seq], [rng.randint(0, 9)])


@pytest.mark.parametrize(
    "with_kernel",
    [
        pytest.param(True, marks=pytest.mark.skipif(not INTERPRETED, reason="compiled kernels take no CPU tensors")),
        False,
    ],
)
@settings(max_examples=20)
@given(seed=st.integers(0, 2**32), kv_indices=st.booleans(), groups=st.sampled_from([1, 3]), states=st.booleans())
def test_a_late_device_sees_every_step_as_the_host_has_it(
    with_kernel: bool, seed: int, kv_indices: bool, groups: int, states: bool
) -> None:
    """Two managers make the same calls. On the device each pass reads the image when its turn comes, not before."""
    way = LateTransport(with_kernel)
    there = Engine(seed, buffers_over(way, kv_indices=kv_indices, groups=groups, states=states))
    here = Engine(seed, buffers_over(None, kv_indices=kv_indices, groups=groups, states=states))
    expected: list[dict[str, list[Any]]] = []
    found: list[dict[str, list[Any]]] = []
    for number, same in zip(there.steps(25), here.steps(25), strict=True):
        assert number == same
        if number is None:
            continue
        assert there.buffers.num_copies == here.buffers.num_copies
        copies = here.buffers.num_copies, here.buffers.num_state_copies
        expected.append(snapshot(here.buffers, *copies))
        way.queue.append(lambda copies=copies: found.append(snapshot(there.buffers, *copies)))  # type: ignore[misc]
    way.finish()
    assert found == expected


def admitted(manager: BlockManager, lengths: list[int]) -> list[int]:
    return [manager.admit(list(range(1000 * i, 1000 * i + n)))[0] for i, n in enumerate(lengths)]


def test_a_decode_step_carries_what_changed_and_not_the_tables() -> None:
    way = LateTransport()
    buffers = buffers_over(way, max_seqs=64, max_tokens=8192, max_blocks_per_seq=512)
    manager = BlockManager(64 * 16, 16)
    seqs = admitted(manager, [15 * 16] * 64)
    for seq in seqs:
        manager.commit(manager.prepare([seq], 15 * 16, buffers))
    for _ in range(2):
        manager.append(seqs, [1] * 64)
        manager.commit(manager.prepare(seqs, 1, buffers))
    manager.append(seqs, [1] * 64)
    manager.commit(manager.prepare(seqs, 1, buffers))
    # Ids, positions and slots of 64 tokens, 64 lengths, 65 starts, and a list of five patches; no entry of a table.
    assert way.sent[-1] <= 64 * 24 + 64 * 4 + 66 * 4 + 6 * 24


def test_the_host_is_two_steps_ahead_and_no_more() -> None:
    way = LateTransport()
    buffers = buffers_over(way)
    manager = BlockManager(24, 4)
    passes: list[int] = []
    seqs = admitted(manager, [9])
    for number in range(4):
        step_id = manager.prepare(seqs, 2, buffers)
        assert passes == list(range(number - 2))
        way.queue.append(lambda number=number: passes.append(number))  # type: ignore[misc]
        manager.commit(step_id)


def test_after_an_upload_that_failed_the_next_one_brings_everything() -> None:
    way = LateTransport()
    there, here = buffers_over(way), buffers_over(None)
    managers = [BlockManager(24, 4), BlockManager(24, 4)]
    for manager, buffers in zip(managers, (there, here), strict=True):
        seqs = admitted(manager, [9, 7])
        manager.commit(manager.prepare(seqs, [9, 7], buffers))
        manager.append(seqs, [1, 2])
    way.finish()
    before = managers[0].stats()
    way.broken = True
    with pytest.raises(RuntimeError, match="fell off the bus"):
        managers[0].prepare(seqs, 1, there)
    assert managers[0].stats() == before
    assert managers[0].lengths(seqs).reserved.tolist() == [9, 7]
    managers[0].audit()
    way.broken = False
    there._to_device.image.fill_(77)
    for manager, buffers in zip(managers, (there, here), strict=True):
        manager.commit(manager.prepare(seqs, 1, buffers))
    way.finish()
    assert snapshot(there, 0) == snapshot(here, 0)


def test_tensors_stay_where_they_are() -> None:
    way = LateTransport()
    buffers = buffers_over(way, kv_indices=True)
    tensors = [getattr(buffers, name) for name in (*ARRAYS, *PAGES, "kv_indices")]
    places = [tensor.data_ptr() for tensor in tensors]
    assert all((place - buffers._to_device.image.data_ptr()) % 256 == 0 for place in places)
    manager = BlockManager(24, 4)
    manager.prepare(admitted(manager, [9]), 9, buffers)
    way.finish()
    assert [getattr(buffers, name).data_ptr() for name in (*ARRAYS, *PAGES, "kv_indices")] == places
    assert buffers.positions[:9].tolist() == list(range(9))


def test_on_the_host_nothing_is_carried() -> None:
    buffers = StepBuffers(2, 8, 4, device="cpu")
    manager = BlockManager(8, 4)
    manager.prepare(admitted(manager, [5]), 5, buffers)
    assert buffers.positions[:5].tolist() == [0, 1, 2, 3, 4]
    wide, narrow = np.zeros(4, np.int64), np.zeros(4, np.int32)
    arrays = StepArrays(wide, wide, wide, narrow.reshape(2, 2), narrow[:2], narrow[:3], wide.reshape(2, 2))
    with pytest.raises(RuntimeError, match="without uploads=True"):
        arrays._pack(0, 0)


def test_what_layers_derived_from_a_step_is_forgotten_when_it_is_filled_again() -> None:
    buffers, manager = StepBuffers(2, 8, 4), BlockManager(8, 4)
    seqs, made = admitted(manager, [3, 2]), iter(range(9))
    manager.prepare(seqs, [3, 1], buffers)
    assert [once(buffers, "lengths", lambda: next(made)) for _ in range(3)] == [0, 0, 0]
    with pytest.raises(ValueError, match="99"):  # nothing was filled, so nothing is forgotten
        manager.prepare(seqs, [99, 1], buffers)
    assert once(buffers, "lengths", lambda: next(made)) == 0
    manager.prepare(seqs[1:], [1], buffers)
    assert once(buffers, "lengths", lambda: next(made)) == 1
    assert [once(None, "lengths", lambda: next(made)) for _ in range(2)] == [2, 3]


def test_buffers_made_in_inference_mode_are_filled_outside_of_it() -> None:
    way = LateTransport()
    with torch.inference_mode():
        buffers = buffers_over(way)
    manager = BlockManager(8, 4)
    manager.prepare(admitted(manager, [5]), 5, buffers)
    way.finish()
    assert buffers.positions[:5].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("longest", [1, 31, 1024, 1025, 40_000])
def test_the_kernel_applies_patches_as_the_host_does(longest: int, device: str) -> None:
    generator = torch.Generator().manual_seed(longest)
    lengths = [longest, 1, 7, 33, longest // 2 + 1]
    words = sum(lengths)
    packed = torch.randint(-(2**31), 2**31, (words + words % 2 + 6 * len(lengths),), generator=generator).int()
    targets, sources = np.cumsum([3, *(n + 5 for n in lengths)]), np.cumsum([0, *lengths])
    rows = [(int(target), int(source), n) for target, source, n in zip(targets, sources, lengths, strict=False)]
    patches = torch.tensor(rows, dtype=torch.int64)
    packed[words + words % 2 :] = patches.view(torch.int32).flatten()
    image = torch.full((words + 5 * len(lengths) + 9,), 77, dtype=torch.int32)
    expected = image.clone()
    for target, source, n in rows:
        expected[target : target + n] = packed[source : source + n]
    module = kernels("steps")
    assert module is not None
    there = image.to(device)
    module.apply_patches(there, packed.to(device), words + words % 2, len(rows), longest)
    assert torch.equal(there.cpu(), expected)
    host = packed[words + words % 2 :].clone().view(torch.int64)
    Transport(torch.device("cpu")).apply(image, packed, host, 0, len(rows), longest)
    assert torch.equal(image, expected)


def test_what_buffers_hold_can_be_read() -> None:
    step, manager = StepBuffers(4, 8, 6), BlockManager(6, 2)
    manager.prepare(manager.admit([1, 2, 3])[0], 3, step)
    sizes = "max_seqs=4, max_tokens=8, max_blocks_per_seq=6, groups=1, device='cpu'"
    assert repr(step) == f"StepBuffers({sizes}; num_seqs=1, num_tokens=3)"
