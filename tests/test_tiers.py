"""What Tiers promises, told one rule at a time; `test_tiers_random` lets everything happen at once."""

import gc
import threading
import time
import weakref
from collections.abc import Sequence
from random import Random
from typing import Any

import pytest
from faulty_store import Fault, StoreDied
from tiers_world import DEADLINE, FakeEngine, StagedStore, World

from kvblocks.config import State, Window
from kvblocks.manager import BlockManager
from kvblocks.step.buffers import StepBuffers
from kvblocks.tiers import MemoryStore, Status, Tiers
from kvblocks.tiers.guarded import FAILURES, FIRST_PAUSE, FULL_SECONDS
from kvblocks.tiers.names import PRIVATE_SALT
from kvblocks.tiers.tiers import Ticket, _Spill

PROMPT = [i * i % 7 for i in range(25)]
OTHER = [i * i % 5 + 7 for i in range(25)]


def world(stores: Sequence[Any], seed: int = 0, **options: Any) -> World:
    return World(stores, Random(seed), **({"num_blocks": 40, "host_blocks": 64, "lag": 0.0} | options))


def fill(stores: Sequence[Any], *prompts: list[int], **options: Any) -> World:
    """Another process has computed these and spilled them."""
    made = world(stores, **options)
    for prompt in prompts:
        made.serve(prompt)
        made.free()
    made.offload()
    for _ in range(40):
        made.poll()
        made.workers.finish()
    made.end()
    return made


def keys(made: World, prompt: list[int]) -> list[str]:
    """Of the blocks of a prompt, in order."""
    form = made.tiers._slots.format
    return [form.key(block, 0, "all") for block in form.blocks(form.root(), prompt, made.block_size)]


def fetched(made: World, prompt: list[int], polls: int = 40) -> Ticket:
    ticket = made.fetch(prompt)
    for _ in range(polls):
        if not ticket.done:
            made.poll()
            made.workers.finish()
    return ticket


def test_what_one_process_computed_another_finds() -> None:
    store = StagedStore()
    fill([store], PROMPT)
    made = world([store])
    ticket = fetched(made, PROMPT)
    assert (ticket.done, ticket.timed_out, ticket.num_local) == (True, False, 0)
    assert (ticket.num_tokens, ticket.tokens_by_store) == (24, [24])
    assert made.serve(PROMPT, fetched=ticket.fetch) == 24
    [stats] = made.tiers.stats()
    assert (stats.hits, stats.misses, stats.bytes_loaded) == (12, 0, 12 * (4096 + 64))
    again = made.fetch(PROMPT)
    assert again.done
    assert (again.fetch, again.num_tokens, again.num_local) == (None, 24, 24)
    made.end()


def test_blocks_are_stored_once() -> None:
    store = StagedStore()
    first = fill([store], PROMPT)
    second = fill([store], PROMPT)
    assert (first.tiers.stats()[0].stored, first.tiers.stats()[0].known) == (12, 0)
    assert (second.tiers.stats()[0].stored, second.tiers.stats()[0].known) == (0, 12)


def states_of(made: World, prompt: list[int]) -> dict[int, str]:
    """The keys of a prompt's states, by the tokens that each has seen."""
    form, step = made.tiers._slots.format, made.manager.state_every // made.block_size
    blocks = form.blocks(form.root(), prompt, made.block_size)
    ends = range(step, len(blocks) + 1, step)
    return {end * made.block_size: form.key(blocks[end - 1], len(made.groups), "all") for end in ends}


def test_a_state_comes_back_with_its_blocks() -> None:
    store = StagedStore()
    first = fill([store], PROMPT, every=8)
    assert store.inner.stats().objects == 12 + 1  # the newest checkpoint of a sequence alone
    assert states_of(first, PROMPT)[24] in store.inner._objects
    made = world([store], every=8)
    ticket = fetched(made, PROMPT)
    assert (ticket.num_tokens, ticket.num_local, ticket.tokens_by_store) == (24, 0, [24])
    assert ticket.fetch is not None
    assert ticket.fetch.blocks[-1].tolist()[:2] == [11, 1]
    assert made.serve(PROMPT, fetched=ticket.fetch) == 24
    assert made.fetch(PROMPT).done
    made.end()


def test_a_prompt_goes_on_from_the_last_checkpoint_that_a_store_has() -> None:
    store = StagedStore()
    fill([store], PROMPT[:19], every=8)  # 9 blocks, and the state after 16 tokens
    made = world([store], every=8)
    ticket = fetched(made, PROMPT)
    assert ticket.num_tokens == 16
    assert made.serve(PROMPT, fetched=ticket.fetch) == 16
    assert made.fetch(PROMPT[:8]).done  # no checkpoint that leaves a token to compute
    assert made.fetch(PROMPT[:8]).fetch is None
    made.end()


@pytest.mark.parametrize("lost", ["state", "block"])
def test_half_of_a_pair_is_a_miss(lost: str) -> None:
    """Whether it is known when it is looked up, or it is gone when it is loaded."""
    for when in ("before", "later"):
        store = StagedStore()
        made = fill([store], PROMPT, every=8)
        key = states_of(made, PROMPT)[24] if lost == "state" else keys(made, PROMPT)[5]
        made = world([store], every=8)
        ticket = made.fetch(PROMPT)
        while when == "later" and not ticket._looking.ended:  # type: ignore[union-attr]
            made.workers.finish()
        store.delete([key])
        for _ in range(9):
            made.poll()
            made.workers.finish()
        assert (ticket.done, ticket.num_tokens) == (True, 0)
        made.tiers.release(ticket)
        assert made.serve(PROMPT) == 0
        assert made.manager.num_background_slots == 0
        made.end()


def test_a_fetch_that_has_no_room_goes_to_an_earlier_checkpoint() -> None:
    store = StagedStore()
    fill([store], PROMPT[:9], PROMPT[:17], PROMPT, every=8)
    made = world([store], every=8, host_blocks=32)  # 8 of which a fetch may take
    ticket = fetched(made, PROMPT)
    assert ticket.num_tokens == 16
    assert made.serve(PROMPT, fetched=ticket.fetch) == 16
    made.end()


def test_more_checkpoints_than_host_slots_for_them_are_flushed_in_turns() -> None:
    store = StagedStore()
    made = world([store], every=8, host_states=8, num_states=64, num_blocks=400, host_blocks=400)
    for first in range(20):
        made.serve([first, *PROMPT])
    made.free()
    for _ in range(3):
        made.offload()  # steps that go on before anything is spilled
    assert made.tiers.flush(60.0)
    assert sum(key.split("/")[3] == "g1" for key in store.inner._objects) == 20
    made.end()


def test_spills_leave_a_slot_for_the_state_of_a_fetch_and_late_ones_do_not_count() -> None:
    """Of 16 slots four may be held: two by spills, and two by fetches."""
    below = StagedStore()
    fill([below], PROMPT, every=8)
    store = StagedStore()
    made = world([store, below], every=8, host_blocks=128)
    for first in range(5):
        made.serve([first, *PROMPT])
        made.free()
    made.offload()
    store.script = [None, Fault.HANG] * 9
    made.workers.chance_to_stop = 1.0
    for _ in range(9):
        made.poll()
        made.run(9, resuming=0)

    def spilled() -> list[int]:
        return [each.num_states for each in made.tiers._operations if isinstance(each, _Spill)]

    assert sum(spilled()) == 2
    store.script = []
    ticket = made.fetch(PROMPT)
    for _ in range(9):
        made.poll()
        made.run(9, resuming=0)
    assert ticket.num_tokens == 24
    made.tiers.release(ticket)
    made.now = DEADLINE
    made.poll()
    assert spilled() == [2, 0, 2]  # the first ones hang
    made.workers.finish()
    made.settle()
    made.end()


def test_a_fetch_that_hangs_is_over_at_its_deadline_and_its_slots_when_the_call_is() -> None:
    store = StagedStore()
    fill([store], PROMPT, OTHER)
    made = world([store])
    store.script = [None, Fault.HANG]
    made.workers.chance_to_stop = 1.0
    late = made.fetch(PROMPT)
    for _ in range(10):
        made.poll()
        made.run(4, resuming=0)
    assert made.workers.stage.stopped
    made.now = 0.999 * DEADLINE
    made.poll()
    assert not late.done
    other = made.fetch(OTHER)  # is not held up by it
    made.now = DEADLINE
    made.poll()
    assert (late.done, late.timed_out, late.fetch, late.num_tokens) == (True, True, None, 0)
    for _ in range(10):
        made.poll()
        made.run(8, resuming=0)
    assert (other.done, other.num_tokens) == (True, 4 * 2)  # as many as a quarter of the host pool has left
    made.tiers.release(other)
    assert made.manager.num_background_slots == 12
    made.workers.finish()
    made.poll()
    assert made.manager.num_background_slots == 0
    made.end()


def test_a_lookup_that_hangs_is_a_miss() -> None:
    store = StagedStore()
    fill([store], PROMPT)
    made = world([store])
    store.script = [Fault.HANG]
    made.workers.chance_to_stop = 1.0
    ticket = made.fetch(PROMPT)
    made.run(4, resuming=0)
    made.now = 2 * DEADLINE
    made.poll()
    assert (ticket.done, ticket.timed_out, made.tiers.num_operations) == (True, True, 0)
    assert made.tiers.stats()[0].timeouts == 1
    assert not made.tiers._is_idle()  # so that the store is not closed
    made.workers.finish()
    made.end()


class LateStore(MemoryStore):
    """Answers TIMEOUT to every load."""

    def load(self, keys: Sequence[str], buffers: Sequence[Any]) -> list[Status]:
        return [Status.TIMEOUT] * len(keys)


class PromptStore(LateStore):
    writes_late = False


@pytest.mark.parametrize(("kind", "kept"), [(LateStore, 12), (PromptStore, 0)])
def test_memory_that_a_store_may_still_write_is_never_used_again(kind: type[MemoryStore], kept: int) -> None:
    """It is not even asked of another store, whose bytes would be overwritten."""
    first, second = kind("1MiB"), MemoryStore("1MiB")
    fill([first, second], PROMPT)
    made = world([first, second])
    ticket = fetched(made, PROMPT)
    assert ticket.done
    assert ticket.tokens_by_store == [0, 0 if kept else 24]
    if not kept:
        made.tiers.release(ticket)
    assert made.tiers.close(timeout=0) is not bool(kept)
    assert made.manager.num_background_slots == kept


def test_a_prefix_that_only_this_process_has_does_not_hide_the_rest() -> None:
    """A store forgets what is not loaded, and what is always in the pool never is."""
    store = StagedStore()
    fill([store], PROMPT)
    made = world([store])
    made.serve(PROMPT[:11])
    store.inner.delete(keys(made, PROMPT)[:5])
    ticket = fetched(made, PROMPT)
    assert (ticket.num_local, ticket.num_tokens, ticket.tokens_by_store) == (10, 24, [14])
    made.serve(PROMPT, fetched=ticket.fetch)
    made.end()


def test_groups_with_windows_need_only_what_is_reached() -> None:
    store = StagedStore()
    groups = (None, Window(5))
    fill([store], PROMPT, groups=groups, num_blocks=48)
    lacking = [key for key in store.inner._objects if "/g1/" in key]
    assert len(lacking) < 12  # what had slid out of the window was never spilled
    made = world([store], groups=groups, num_blocks=48)
    ticket = fetched(made, PROMPT)
    assert ticket.num_tokens == 24
    assert made.serve(PROMPT, fetched=ticket.fetch) == 24
    made.end()


def test_a_missing_block_ends_what_is_looked_up() -> None:
    store = StagedStore()
    long = [i % 11 for i in range(401)]
    fill([store], long, num_blocks=240, host_blocks=900)
    made = world([store], num_blocks=240, host_blocks=900)
    store.inner.delete(keys(made, long)[20:21])
    ticket = fetched(made, long)
    assert ticket.num_tokens == 40
    assert made.tiers.stats()[0].misses == 1  # of the first call, and there was no second
    made.tiers.release(ticket)
    made.end()


def test_only_leading_blocks_count() -> None:
    """One is gone when it is loaded: what comes after it is of no use, and is not taken for it."""
    store = StagedStore()
    fill([store], PROMPT)
    made = world([store])
    ticket = made.fetch(PROMPT)
    made.workers.finish()
    store.inner.delete(keys(made, PROMPT)[5:6])
    made.poll()
    made.workers.finish()
    made.poll()
    assert (ticket.done, ticket.num_tokens, ticket.tokens_by_store) == (True, 10, [10])
    assert made.serve(PROMPT, fetched=ticket.fetch) == 10
    made.end()


def test_one_prompt_asked_for_twice_is_loaded_once() -> None:
    store = StagedStore()
    fill([store], PROMPT)
    made = world([store])
    tickets = [made.fetch(PROMPT), made.fetch([*PROMPT, 5, 5, 5])]
    for _ in range(10):
        made.poll()
        made.workers.finish()
    assert [ticket.num_tokens for ticket in tickets] == [24, 24]
    assert [ticket.num_local for ticket in tickets] == [0, 24]
    assert made.tiers.stats()[0].hits == 12
    for ticket in tickets:
        made.tiers.release(ticket)
    made.end()


def test_who_waits_for_anothers_fetch_waits_no_longer_than_the_own_deadline() -> None:
    store = StagedStore()
    fill([store], PROMPT)
    made = world([store])
    store.script = [None, None, Fault.HANG]
    made.workers.chance_to_stop = 1.0
    first = made.tiers.fetch(PROMPT, deadline=10 * DEADLINE)
    second = made.fetch(PROMPT)
    for _ in range(10):
        made.poll()
        made.run(4, resuming=0)
    made.now = DEADLINE
    made.poll()
    assert (first.done, second.done, second.timed_out) == (False, True, True)
    made.workers.finish()
    made.poll()
    assert first.num_tokens == 24
    made.tiers.release(first)
    made.end()


def test_a_second_store_gives_what_the_first_has_lost() -> None:
    first, second = StagedStore(), StagedStore()
    fill([first, second], PROMPT)
    assert first.inner.stats().objects == second.inner.stats().objects == 12
    made = world([first, second])
    first.script = [None, Fault.FLIPPED]
    ticket = fetched(made, PROMPT)
    assert ticket.tokens_by_store == [0, 24]
    assert [(stats.hits, stats.corrupt) for stats in made.tiers.stats()] == [(0, 12), (12, 0)]
    made.tiers.release(ticket)
    first.inner.delete(keys(made, PROMPT)[6:])
    made = world([first, second])
    ticket = fetched(made, PROMPT)
    assert ticket.tokens_by_store == [12, 12]
    made.tiers.release(ticket)
    made.end()


def test_a_store_that_fails_is_left_alone_and_asked_again() -> None:
    failing, sound = StagedStore({Fault.HALFWAY: 1.0}), StagedStore()
    fill([sound], PROMPT, OTHER)
    made = world([failing, sound])
    for prompt in ([1, 2, 3], [2, 3, 4], [3, 4, 5]):
        assert fetched(made, prompt).num_tokens == 0
    assert failing.seen[Fault.HALFWAY] == FAILURES
    assert made.tiers.stats()[0].is_open
    ticket = fetched(made, PROMPT)
    assert ticket.tokens_by_store == [0, 24]
    assert failing.seen[Fault.HALFWAY] == FAILURES  # it was not asked
    made.serve(PROMPT, fetched=ticket.fetch)
    made.now += FIRST_PAUSE
    fetched(made, [4, 5, 6])
    assert failing.seen[Fault.HALFWAY] == FAILURES + 1  # asked once, and again left alone: twice as long
    made.now += FIRST_PAUSE
    fetched(made, [5, 6, 7])
    assert failing.seen[Fault.HALFWAY] == FAILURES + 1
    failing._chances.clear()
    made.now += FIRST_PAUSE
    fetched(made, [6, 7, 8])
    assert not made.tiers.stats()[0].is_open
    made.end()


@pytest.mark.parametrize("fault", [Fault.FLIPPED, Fault.FOREIGN, Fault.LIES])
def test_what_is_not_there_or_wrong_opens_no_breaker(fault: Fault) -> None:
    store = StagedStore()
    fill([store], PROMPT)
    made = world([store])
    for _ in range(5):
        store.script = [None, fault]
        fetched(made, PROMPT)
    assert not made.tiers.stats()[0].is_open
    assert made.tiers.stats()[0].corrupt == 5 * 12
    fetched(made, OTHER)
    assert not made.tiers.stats()[0].is_open


class Answers(MemoryStore):
    """Answers what no store should."""

    answer: Any = None

    def lookup(self, keys: Sequence[str]) -> list[bool]:
        return self.answer  # type: ignore[no-any-return]

    load = store = lookup  # type: ignore[assignment]


@pytest.mark.parametrize("answer", [None, [], [True] * 99, [Status.OK] * 12, ["yes"] * 12, 7, {True: 1}])
def test_an_answer_that_is_none_is_an_error(answer: Any) -> None:
    store = Answers("1MiB")
    store.answer = answer
    made = world([store])
    assert fetched(made, PROMPT).num_tokens == 0
    assert made.tiers.stats()[0].errors == 12
    made.end()


def test_lookups_that_fail_open_the_breaker() -> None:
    """A server that refuses connections says so at once: that is no miss."""
    store = Answers("1MiB")
    store.answer = [None] * 12
    made = world([store])
    for _ in range(3):
        assert not made.tiers.stats()[0].is_open
        assert fetched(made, PROMPT).num_tokens == 0
    assert made.tiers.stats()[0].is_open
    assert made.tiers.stats()[0].errors == 3 * 12
    made.end()


def test_a_full_store_is_not_offered_more_for_a_while() -> None:
    store = MemoryStore(100)
    made = world([store])
    made.serve(PROMPT)
    made.free()
    made.offload()
    for _ in range(20):
        made.poll()
        made.workers.finish()
    first = made.tiers.stats()[0].full
    assert 0 < first <= 2 * made.tiers._spill_blocks
    made.now += FULL_SECONDS
    for _ in range(20):
        made.poll()
        made.workers.finish()
    assert first < made.tiers.stats()[0].full <= 2 * first
    assert not made.tiers.stats()[0].is_open
    made.end()


def test_tokens_that_fit_into_no_header_are_not_spilled_and_not_tried_again() -> None:
    store = StagedStore()
    made = world([store], block_size=1000)
    made.step = StepBuffers(1, 4096, 256)
    made.serve([1] * 2500)
    made.free()
    made.offload()
    for _ in range(10):
        made.poll()
        made.workers.finish()
    assert store.inner.stats().objects == 0
    assert made.tiers._spilled_all
    made.end()


def test_private_salts_stay_in_their_process() -> None:
    store = StagedStore()
    made = world([store])
    private = PRIVATE_SALT + b"mine"
    for length in (9, 25):  # the second time parents are known by their digests
        made.serve(PROMPT[:length], private)
        made.serve(OTHER)
        made.free()
        made.offload()
        for _ in range(10):
            made.poll()
            made.workers.finish()
    assert store.inner.stats().objects == 12
    assert made.check_store(store) == 12
    assert made.tiers._spilled_all
    made.end()
    made = world([store])
    assert made.fetch(PROMPT, private).done
    assert not made.fetch(PROMPT).done


def test_flush_brings_down_more_than_the_host_pool_holds() -> None:
    store = StagedStore()
    made = world([store], num_blocks=60, host_blocks=16)
    for prompt in (PROMPT, OTHER):
        made.serve(prompt)
    assert made.tiers.flush(DEADLINE)
    assert store.inner.stats().objects == 0  # sequences hold them all
    made.free()
    assert made.tiers.flush(DEADLINE)
    assert store.inner.stats().objects == 24
    assert made.check_store(store) == 24
    made.end()


@pytest.mark.parametrize("fault", [Fault.HANG, Fault.HALFWAY, Fault.LIES])
def test_flush_says_where_not_all_was_stored(fault: Fault) -> None:
    store = StagedStore({fault: 1.0})
    made = world([store])
    made.workers.chance_to_stop = 1.0
    made.serve(PROMPT)
    made.free()

    def wait(seconds: float) -> None:
        made.now += 0.1 * DEADLINE
        made.workers.run_one(0.0)

    made.workers.wait = wait  # type: ignore[method-assign]
    # What a store says it has is believed; loading it shows the truth.
    assert made.tiers.flush(5 * DEADLINE) is (fault is Fault.LIES)
    objects = store.inner.stats().objects
    assert objects is not None
    assert objects < 12
    store._chances.clear()
    made.workers.finish()
    made.end()


def test_flush_of_what_is_suspended_or_closed_does_nothing() -> None:
    made = world([StagedStore()])
    made.serve(PROMPT)
    made.free()
    made.manager.reset_prefix_cache()
    assert not made.tiers.flush(1)
    made.end()
    assert not made.tiers.flush(1)


def test_spills_that_hang_do_not_keep_others_from_their_stores() -> None:
    store = StagedStore()
    made = world([store], host_blocks=128)
    store.script = [None, Fault.HANG, None, Fault.HANG]
    made.workers.chance_to_stop = 1.0
    for prompt in (PROMPT, OTHER):
        made.serve(prompt)
        made.free()
    made.offload()
    for _ in range(20):
        made.poll()
        made.run(20, resuming=0)
    assert store.inner.stats().objects == 0  # both that may run at once hang
    made.now += 2 * DEADLINE
    for _ in range(20):
        made.poll()
        made.run(20, resuming=0)
    assert store.inner.stats().objects == 24 - 2 * made.tiers._spill_blocks
    made.workers.finish()
    made.poll()
    assert store.inner.stats().objects == 24
    made.end()


def test_a_released_ticket_holds_nothing() -> None:
    store = StagedStore()
    fill([store], PROMPT)
    for polls in range(6):
        made = world([store])
        ticket = made.fetch(PROMPT)
        for _ in range(polls):
            made.poll()
            made.workers.finish()
        made.tiers.release(ticket)
        made.settle()
        assert ticket.done
        assert made.manager.num_background_slots == 0
        if polls < 4:
            made.tiers.release(ticket)  # nothing was fetched, so nothing is wrong
        made.end()


def test_new_weights() -> None:
    store = StagedStore()
    fill([store], PROMPT)
    made = world([store])
    old, new = made.namespace(0), made.namespace(1)
    with pytest.raises(ValueError, match=r"reset_prefix_cache\(\) first"):
        made.tiers.renew(new)
    running = made.fetch(PROMPT)
    made.manager.reset_prefix_cache()
    assert made.tiers.is_suspended
    made.workers.finish()
    made.poll()
    assert (running.done, running.fetch, running.timed_out) == (True, None, False)
    assert made.tiers.fetch(PROMPT).done
    made.weights = 1
    made.serve(OTHER)
    made.free()
    made.offload()
    made.poll()
    assert not made.tiers.num_operations  # nothing is spilled
    with pytest.raises(ValueError, match="is that of the weights before"):
        made.tiers.renew(old)
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        made.tiers.renew("new")
    assert made.tiers.is_suspended
    made.tiers.renew(new)
    assert fetched(made, PROMPT).num_tokens == 0  # the old weights' are not found
    for _ in range(20):
        made.poll()
        made.workers.finish()
    assert store.inner.stats().objects == 24
    made.check_store(store)
    made.end()


def test_a_reset_with_the_same_weights() -> None:
    store = StagedStore()
    fill([store], PROMPT)
    made = world([store])
    made.manager.reset_prefix_cache()
    made.tiers.renew(made.namespace(0), same_weights=True)
    ticket = fetched(made, PROMPT)
    assert made.serve(PROMPT, fetched=ticket.fetch) == 24
    made.end()


def test_close_waits_for_calls_up_to_a_bound() -> None:
    """On real threads: one call hangs. Its slots stay taken, its memory stays alive, and nobody waits for it."""
    store = MemoryStore("1MiB")
    fill([store], PROMPT)
    go = threading.Event()
    entered = threading.Event()

    class Hangs(MemoryStore):
        def lookup(self, keys: Sequence[str]) -> list[bool]:
            return store.lookup(keys)

        def load(self, keys: Sequence[str], buffers: Sequence[Any]) -> list[Status]:
            entered.set()
            go.wait(60)
            return store.load(keys, buffers)

    made = world([store])
    tiers = Tiers(made.manager, made.engine, [Hangs(1)], namespace=made.namespace(0), deadline=60)
    ticket = tiers.fetch(PROMPT)
    while not entered.is_set():
        tiers.poll()
        time.sleep(0.001)
    assert not tiers.close(timeout=0.05)
    assert (ticket.done, ticket.fetch, tiers.num_operations) == (True, None, 1)
    assert made.manager.num_background_slots == 12
    assert tiers.fetch(OTHER).done  # a miss
    assert not tiers.close()
    del tiers
    go.set()


def test_memory_that_a_store_was_given_outlives_it() -> None:
    class Registers(MemoryStore):
        def register(self, buffer: Any) -> None:
            self.length = len(buffer)

    kept = []
    for kind in (Registers, MemoryStore):
        made = world([store := kind(1)])
        arena = weakref.ref(made.engine.arena.buffer)
        made.end()
        del made
        gc.collect()
        kept.append(arena() is not None)
        del store
        gc.collect()
        assert arena() is None
    assert kept == [True, False]


def test_real_threads_end_with_their_tiers() -> None:
    store = MemoryStore("1MiB")
    fill([store], PROMPT)
    made = world([store])
    before = threading.active_count()
    tiers = Tiers(made.manager, made.engine, [store], namespace=made.namespace(0))
    ticket = tiers.fetch(PROMPT)
    tiers.wait([ticket])
    assert ticket.num_tokens == 24
    assert threading.active_count() > before
    tiers.release(ticket)
    del tiers, ticket
    gc.collect()
    end = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.001)
    assert threading.active_count() == before


def test_wrong_arguments() -> None:
    made = world([MemoryStore(1)])
    name = made.namespace(0)
    other, fewer = BlockManager(8, 2), BlockManager(8, 2, host_blocks=3)
    homeless = BlockManager(8, 2, groups=[None, State(4)], num_states=2, host_blocks=4)
    stateful = BlockManager(8, 2, groups=[None, State(4)], num_states=2, host_blocks=4, host_states=8)
    scarce = BlockManager(8, 2, groups=[None, State(4)], num_states=2, host_blocks=4, host_states=7)

    def make(**arguments: Any) -> None:
        given: dict[str, Any] = {
            "manager": made.manager,
            "engine": made.engine,
            "stores": [MemoryStore(1)],
            "namespace": name,
        }
        Tiers(**(given | arguments))

    wrong: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (ValueError, "no stores", {"stores": []}),
        (TypeError, r"stores\[1\] is a int", {"stores": [MemoryStore(1), 3]}),
        (ValueError, "no host_blocks", {"manager": other}),
        (ValueError, "host_blocks=64 and the engine 3", {"engine": FakeEngine(fewer, Random(0))}),
        (ValueError, "has host_blocks=3, .*at least 4", {"manager": fewer}),
        (ValueError, "has host_states=7, .*at least 8", {"manager": scarce}),
        (ValueError, "no host_states", {"manager": homeless}),
        (ValueError, "host_states=8 and the engine 0", {"manager": stateful}),
        (ValueError, "64 hexadecimal digits", {"namespace": "model"}),
        (ValueError, "secret has 5 bytes", {"secret": b"short"}),
        (ValueError, "shard='a/b'", {"shard": "a/b"}),
        (ValueError, "threads=0 is outside 1..64", {"threads": 0}),
        (ValueError, "deadline=0 must be", {"deadline": 0}),
        (ValueError, "deadline=nan must be", {"deadline": float("nan")}),
    ]
    for error, message, arguments in wrong:
        with pytest.raises(error, match=message):
            make(**arguments)
    with pytest.raises(ValueError, match="deadline=-1"):
        made.tiers.fetch(PROMPT, deadline=-1)
    with pytest.raises(ValueError, match="token"):
        made.tiers.fetch([])
    with pytest.raises(RuntimeError, match="agree gave 1 integers for 2"):
        made.tiers.poll(lambda numbers: numbers[:1])
    assert made.tiers.num_operations == 0
    made.end()


def test_a_store_that_dies_while_it_is_registered_says_so() -> None:
    class Dead(MemoryStore):
        def register(self, buffer: Any) -> None:
            raise StoreDied("no network")

    with pytest.raises(StoreDied):
        world([Dead(1)])
