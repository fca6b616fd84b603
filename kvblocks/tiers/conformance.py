"""What every store must do, as checks that a store's author runs on theirs, with pytest or without.

    import pytest
    from kvblocks.tiers.conformance import CHECKS, Subject

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_my_store(check, tmp_path):
        check(Subject(open=lambda: MyStore(tmp_path), capacity=1 << 20))

A check raises `NotConforming`, an AssertionError, which says what the store did and what it should have done. The
checks know the interface alone: what a store does with damaged media its own tests have to show.
"""

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from mmap import mmap

from kvblocks.errors import NotConforming
from kvblocks.tiers.store import MAX_KEY_BYTES, Status, Store

__all__ = ["CHECKS", "NotConforming", "Subject"]

PAGE = 4096
OK, MISSING, FULL = Status.OK, Status.MISSING, Status.FULL


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A store to be checked, and what it is.

    Args:
        open: makes or opens the store. The first call gives one without objects; where `persistent` is true, the next
            one, after `close`, gives the objects that are left.
        capacity: bytes of objects that the store holds at most.
        sizes: lengths of objects to check with, each different from the others; the largest fits 8 times.
        persistent: whether objects outlive `close`.
    """

    open: Callable[[], Store]
    capacity: int
    sizes: tuple[int, ...] = (8 * PAGE, PAGE, 1, PAGE - 1, 3 * PAGE + 17)
    persistent: bool = False


class _Arena:
    """Registered memory that buffers are cut from, page-aligned, each between guards that must stay as they are."""

    def __init__(self, store: Store, nbytes: int = 4 << 20) -> None:
        self.memory = mmap(-1, nbytes)
        self.view = memoryview(self.memory)
        self.view[:] = b"\xa5" * nbytes
        self.used = PAGE
        self.taken: list[tuple[int, int]] = []
        store.register(self.view)

    def take(self, nbytes: int, fill: bytes | None = None) -> memoryview:
        start, end = self.used, self.used + nbytes
        _require(end + PAGE <= len(self.view), "the check needs more memory than its arena has")
        self.used = -(-end // PAGE) * PAGE + PAGE
        self.taken.append((start, end))
        if fill is not None:
            self.view[start:end] = fill
        return self.view[start:end]

    def check_guards(self) -> None:
        end = 0
        for start, after in [*self.taken, (len(self.view), len(self.view))]:
            _require(
                self.view[end:start] == b"\xa5" * (start - end),
                f"the store wrote outside of its buffers, between bytes {end} and {start} of the registered memory",
            )
            end = after


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise NotConforming(message)


def _equal(what: str, got: object, wanted: object) -> None:
    _require(got == wanted, f"{what} gave {got!r:.300}; it should give {wanted!r:.300}")


def _refused(what: str, error: type[Exception], call: Callable[[], object]) -> None:
    try:
        result = call()
    except error:
        return
    except Exception as other:
        raise NotConforming(f"{what} raised {other!r}; it should raise {error.__name__}") from other
    raise NotConforming(f"{what} gave {result!r:.300}; it should raise {error.__name__}")


def _content(seed: object, nbytes: int) -> bytes:
    return random.Random(repr(seed)).randbytes(nbytes)


def _key(number: int, group: int = 0) -> str:
    return f"kvb1/{'0f' * 32}/{number:064x}/g{group}/all"


def check_an_empty_store(subject: Subject) -> None:
    """Everything is missing, and calls without keys answer without statuses."""
    with subject.open() as store:
        arena = _Arena(store)
        buffers = [arena.take(subject.sizes[0]) for _ in range(2)]
        keys = [_key(1), _key(2)]
        _equal("lookup in an empty store", store.lookup(keys), [False, False])
        _equal("load from an empty store", store.load(keys, buffers), [MISSING, MISSING])
        _equal("delete in an empty store", store.delete(keys), [MISSING, MISSING])
        nothing: list[tuple[str, Callable[[], object]]] = [
            ("lookup of no keys", lambda: store.lookup([])),
            ("load of no keys", lambda: store.load([], [])),
            ("store of no keys", lambda: store.store([], [])),
            ("delete of no keys", lambda: store.delete([])),
        ]
        for what, call in nothing:
            _equal(what, call(), [])
        stats = store.stats()
        _require(stats.objects in (0, None) and stats.bytes_used in (0, None), f"an empty store says it holds {stats}")


def check_what_is_stored_can_be_loaded(subject: Subject) -> None:
    """Objects of all sizes, from copies that the store has made."""
    with subject.open() as store:
        arena = _Arena(store)
        contents = [_content(i, size) for i, size in enumerate(subject.sizes)]
        keys = [_key(i) for i in range(len(contents))]
        sources = [arena.take(len(content), content) for content in contents]
        _equal("store", store.store(keys, sources), [OK] * len(keys))
        _require(
            all(source == content for source, content in zip(sources, contents, strict=True)),
            "store changed a buffer that it was to read",
        )
        for source in sources:
            source[:] = b"\0" * len(source)  # the store has copies
        asked = [keys[-1], _key(99), *keys]
        wanted = [contents[-1], None, *contents]
        targets = [arena.take(len(content or contents[0])) for content in wanted]
        _equal("lookup", store.lookup(asked), [content is not None for content in wanted])
        _equal("load", store.load(asked, targets), [MISSING if content is None else OK for content in wanted])
        for key, target, content in zip(asked, targets, wanted, strict=True):
            _require(content is None or target == content, f"load of {key} gave other bytes than were stored")
        arena.check_guards()
        stats = store.stats()
        _require(stats.objects in (len(keys), None), f"a store of {len(keys)} objects says it holds {stats}")
        _require(stats.bytes_used in (sum(map(len, contents)), None), f"the bytes stored are not those in {stats}")


def check_memory_that_was_not_made_for_it(subject: Subject) -> None:
    """Buffers that begin anywhere, and read-only ones to store from."""
    with subject.open() as store:
        arena = _Arena(store)
        size = subject.sizes[0]
        content = _content("odd", size)
        area = arena.take(size + 3)
        area[3:] = content
        _equal("store of a buffer that begins at an odd address", store.store([_key(1)], [area[3:]]), [OK])
        area[:] = b"\0" * len(area)
        _equal("load into a buffer that begins at an odd address", store.load([_key(1)], [area[1:-2]]), [OK])
        _require(area == b"\0" + content + b"\0\0", "load into a buffer at an odd address gave other bytes")
        _equal("store of a read-only buffer", store.store([_key(2)], [area.toreadonly()]), [OK])
        arena.check_guards()


def check_an_object_of_another_length_is_not_loaded(subject: Subject) -> None:
    """Neither into a shorter nor into a longer buffer."""
    with subject.open() as store:
        arena = _Arena(store)
        size = subject.sizes[0]
        store.store([_key(1)], [arena.take(size, _content(1, size))])
        for length in (size - 1, size + 1, size - PAGE, size + PAGE, 1):
            [status] = store.load([_key(1)], [arena.take(length)])
            _require(status is not OK, f"load of an object of {size} bytes into a buffer of {length} answered OK")
        arena.check_guards()


def check_what_is_stored_again(subject: Subject) -> None:
    """Either object may be there afterwards, in one piece; and one of another length counts as another object."""
    with subject.open() as store:
        arena = _Arena(store)
        size = subject.sizes[0]
        contents = [_content(i, size) for i in range(3)]
        target = arena.take(size)
        for content in contents:
            store.store([_key(1)], [arena.take(size, content)])
            [status] = store.load([_key(1)], [target])
            _equal("load of an object stored again", status, OK)
            _require(bytes(target) in contents, "an object that was stored again is a mix of both")
        both = [arena.take(size, content) for content in contents[:2]]
        store.store([_key(2), _key(2)], both)
        _equal("load of a key that was twice in a batch", store.load([_key(2)], [target]), [OK])
        _require(bytes(target) in contents[:2], "an object that was twice in a batch is a mix of both")
        other = subject.sizes[1]
        store.store([_key(1)], [arena.take(other, _content("other", other))])
        [status] = store.load([_key(1)], [target])
        _require(status is not OK or bytes(target) in contents, "load gave bytes that were never stored at this length")
        arena.check_guards()


def check_deleting(subject: Subject) -> None:
    """Deleted objects are missing until they are stored again, and others stay."""
    with subject.open() as store:
        arena = _Arena(store)
        size = subject.sizes[0]
        keys = [_key(i) for i in range(4)]
        contents = [_content(i, size) for i in range(4)]
        store.store(keys, [arena.take(size, content) for content in contents])
        _equal("delete", store.delete([keys[1], _key(9), keys[3]]), [OK, MISSING, OK])
        _equal("lookup after delete", store.lookup(keys), [True, False, True, False])
        targets = [arena.take(size) for _ in keys]
        _equal("load after delete", store.load(keys, targets), [OK, MISSING, OK, MISSING])
        again = _content("again", size)
        _equal("store after delete", store.store([keys[1]], [arena.take(size, again)]), [OK])
        _equal("load of what was stored after its delete", store.load([keys[1]], [targets[1]]), [OK])
        _require(targets[1] == again, "load gave what was deleted instead of what was stored afterwards")
        _require(targets[0] == contents[0] and targets[2] == contents[2], "a delete changed other objects")


def check_keys_have_no_meaning(subject: Subject) -> None:
    """Keys that are alike, that look like paths or patterns, or are as long as a key may be."""
    with subject.open() as store:
        arena = _Arena(store)
        longest = "k" * MAX_KEY_BYTES
        keys = [_key(1), _key(1, 1), _key(1, 10), _key(1)[:-1], _key(1) + "/", _key(1).upper(), "a", "a\0", "A", " a"]
        keys += ["../../a", "/a", "*", "a*", "ä", "a\u0308", "\\", "{}", "a\nb", longest, longest[:-1] + "l"]
        contents = [_content(key, PAGE) for key in keys]
        for key, content in zip(keys, contents, strict=True):
            _equal(f"lookup of {key!r} before it was stored", store.lookup([key]), [False])
            _equal(f"store of {key!r}", store.store([key], [arena.take(PAGE, content)]), [OK])
        targets = [arena.take(PAGE) for _ in keys]
        _equal("load", store.load(keys, targets), [OK] * len(keys))
        for key, target, content in zip(keys, targets, contents, strict=True):
            _require(target == content, f"load of {key!r} gave the bytes of another key")
        _equal("delete of '*'", store.delete(["*"]), [OK])
        _equal("lookup after delete of '*'", store.lookup(keys), [key != "*" for key in keys])


def check_wrong_calls_change_nothing(subject: Subject) -> None:
    """Each raises the exception that `Store` names."""
    with subject.open() as store:
        arena = _Arena(store)
        content = _content(1, PAGE)
        source, target = arena.take(PAGE, content), arena.take(PAGE, b"t" * PAGE)
        empty, strided = target[:0], arena.take(2 * PAGE)[::2]
        store.store([_key(1)], [source])
        key = _key(1)
        wrong: list[tuple[str, type[Exception], object, object]] = [
            ("two keys and one buffer", ValueError, [key, _key(2)], [target]),
            ("one key and two buffers", ValueError, [key], [target, target]),
            ("an empty key", ValueError, [key, ""], [target, target]),
            ("a key too long", ValueError, [key, "k" * (MAX_KEY_BYTES + 1)], [target, target]),
            ("a key that is no Unicode", ValueError, [key, "\ud800"], [target, target]),
            ("a key of bytes", TypeError, [key, b"key"], [target, target]),
            ("keys that are one text", TypeError, key, [target] * len(key)),
            ("an empty buffer", ValueError, [key, _key(2)], [target, empty]),
            ("a buffer with gaps", ValueError, [key, _key(2)], [target, strided]),
            ("a buffer that is a list", TypeError, [key, _key(2)], [target, [1, 2]]),
        ]
        for what, error, keys, buffers in wrong:
            _refused(f"load with {what}", error, lambda k=keys, b=buffers: store.load(k, b))  # type: ignore[misc]
            _refused(f"store with {what}", error, lambda k=keys, b=buffers: store.store(k, b))  # type: ignore[misc]
        _refused("load into a read-only buffer", TypeError, lambda: store.load([key], [target.toreadonly()]))
        for what, error, given in [
            ("an empty key", ValueError, [key, ""]),
            ("a key of bytes", TypeError, [key, b"key"]),
            ("keys that are one text", TypeError, key),
        ]:
            _refused(f"delete with {what}", error, lambda k=given: store.delete(k))  # type: ignore[misc]
            _refused(f"lookup with {what}", error, lambda k=given: store.lookup(k))  # type: ignore[misc]
        _require(target == b"t" * PAGE, "a load that raised wrote into a buffer")
        _equal("lookup after wrong calls", store.lookup([key, _key(2)]), [True, False])
        _equal("load after wrong calls", store.load([key], [target]), [OK])
        _require(target == content, "a store that raised changed an object")


def check_a_store_that_is_full(subject: Subject) -> None:
    """Twice as much as it holds: others are evicted, or it answers FULL; what it still has is right."""
    with subject.open() as store:
        arena = _Arena(store)
        size = subject.sizes[0]
        count = 2 * subject.capacity // size + 2
        source, target = arena.take(size), arena.take(size)
        for i in range(count):
            source[:] = _content(i, size)
            [status] = store.store([_key(i)], [source])
            _require(status in (OK, FULL), f"store into a store that is full answered {status}; OK or FULL is right")
        held = 0
        for i in range(count):
            [there] = store.lookup([_key(i)])
            [status] = store.load([_key(i)], [target])
            _equal(f"load where lookup says {there}", status, OK if there else MISSING)
            _require(
                not there or target == _content(i, size), "a store that was full gave other bytes than were stored"
            )
            held += there is True
        _require(
            8 <= held < count, f"of {count} objects of {size} bytes a store of {subject.capacity} bytes has {held}"
        )
        stats = store.stats()
        _require(stats.objects in (held, None), f"a store of {held} objects says it holds {stats}")
        fits = stats.capacity is None or stats.bytes_used is None or stats.bytes_used <= stats.capacity
        _require(fits, f"the store holds more than its capacity: {stats}")


def check_many_threads(subject: Subject) -> None:
    """Four threads store, load, look up and delete the same few keys: a load gives one object of its key, whole."""
    with subject.open() as store:
        arena = _Arena(store)
        size, keys, rounds = subject.sizes[0], 5, 60
        versions = [[_content((k, v), size) for v in range(3)] for k in range(keys)]
        buffers = [[(arena.take(size), arena.take(size)) for _ in range(2)] for _ in range(4)]
        failures: list[BaseException] = []

        def work(number: int) -> None:
            chance = random.Random(number)
            try:
                for _ in range(rounds):
                    chosen = [chance.randrange(keys) for _ in range(2)]
                    names = [_key(k) for k in chosen]
                    sources, targets = zip(*buffers[number], strict=True)
                    action = chance.random()
                    if action < 0.4:
                        for k, source in zip(chosen, sources, strict=True):
                            source[:] = chance.choice(versions[k])
                        store.store(names, sources)
                    elif action < 0.9:
                        statuses = store.load(names, targets)
                        for k, status, target in zip(chosen, statuses, targets, strict=True):
                            whole = status is not OK or bytes(target) in versions[k]
                            _require(whole, "a load beside other calls gave bytes that were never stored in one piece")
                    elif action < 0.95:
                        store.lookup(names)
                    else:
                        store.delete(names)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        arena.check_guards()


def check_closing(subject: Subject) -> None:
    """`close` may be called twice; every other call raises then."""
    store = subject.open()
    arena = _Arena(store)
    buffer = arena.take(PAGE, _content(1, PAGE))
    store.store([_key(1)], [buffer])
    store.close()
    store.close()
    for what, call in [
        ("lookup", lambda: store.lookup([_key(1)])),
        ("load", lambda: store.load([_key(1)], [buffer])),
        ("store", lambda: store.store([_key(1)], [buffer])),
        ("delete", lambda: store.delete([_key(1)])),
        ("stats", store.stats),
    ]:
        _refused(f"{what} of a closed store", ValueError, call)


def check_opening_again(subject: Subject) -> None:
    """The objects that were there outlive `close`; a store that is not persistent is not checked."""
    if not subject.persistent:
        return
    sizes = subject.sizes
    with subject.open() as store:
        arena = _Arena(store)
        for i, size in enumerate(sizes):
            store.store([_key(i)], [arena.take(size, _content(i, size))])
        store.store([_key(0)], [arena.take(sizes[0], _content("new", sizes[0]))])
        store.delete([_key(1)])
        before = store.stats()
    with subject.open() as store:
        arena = _Arena(store)
        targets = [arena.take(size) for size in sizes]
        statuses = store.load([_key(i) for i in range(len(sizes))], targets)
        _equal("load after opening again", statuses, [OK, MISSING] + [OK] * (len(sizes) - 2))
        for i in range(2, len(sizes)):
            _require(targets[i] == _content(i, sizes[i]), "after opening again a load gave other bytes")
        old_or_new = bytes(targets[0]) in (_content(0, sizes[0]), _content("new", sizes[0]))
        _require(old_or_new, "after opening again an object that was stored twice is a mix of both")
        after = store.stats()
        _equal("objects after opening again", (after.objects, after.bytes_used), (before.objects, before.bytes_used))


CHECKS: tuple[Callable[[Subject], None], ...] = (
    check_an_empty_store,
    check_what_is_stored_can_be_loaded,
    check_memory_that_was_not_made_for_it,
    check_an_object_of_another_length_is_not_loaded,
    check_what_is_stored_again,
    check_deleting,
    check_keys_have_no_meaning,
    check_wrong_calls_change_nothing,
    check_a_store_that_is_full,
    check_many_threads,
    check_closing,
    check_opening_again,
)
