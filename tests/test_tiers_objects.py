"""Names and headers: the same in every process and release, and no object passes for another one."""

import hashlib
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from faulty_store import Fault, FaultyStore, StoreDied
from hypothesis import given
from hypothesis import strategies as st

from kvblocks.sizes import HEADER_BYTES
from kvblocks.tiers import Status
from kvblocks.tiers.objects import Block, ObjectFormat, fault_of, namespace, read_header

MODEL: dict[str, Any] = {
    "model": "org/model",
    "weights_version": "a" * 64,
    "dtype": "bfloat16",
    "codec": "none",
    "block_size": 16,
    "layers": [(8, 128, 128)] * 2,
    "groups": [(None, (0, 1))],
    "layout": "NHD",
}
NAME = namespace(**MODEL)
SECRET = b"0123456789abcdef"
PLAIN, KEYED = ObjectFormat(NAME), ObjectFormat(NAME, secret=SECRET)
FORMATS = pytest.mark.parametrize("form", [PLAIN, KEYED], ids=["plain", "secret"])


def sealed(form: ObjectFormat, block: Block, payload: bytes, group: int = 0, shard: str = "all") -> bytearray:
    buffer = bytearray(HEADER_BYTES) + payload
    form.seal(block, group, shard, buffer)
    return buffer


def one_block(form: ObjectFormat, salt: bytes = b"", extra: bytes = b"", first: int = 0) -> Block:
    [block] = form.blocks(form.root(salt), np.arange(first, first + 16), 16, [extra])
    return block


def test_the_format_of_names_and_headers_stays() -> None:
    """What earlier releases stored is found and verified. Whoever changes the format counts its version up."""
    block = one_block(PLAIN, b"tenant", b"image")
    name = "6112924d836929c6f2084e99a44a594e18bf7e861e46471a639bf43c63c4f41f"
    digest = "595fd2ddb60adde92598fee81263ad817c28dff51d9f1dc2e040dfc302ff6c58"
    assert PLAIN.key(block, 3, "l0-1") == f"kvb1/{name}/{digest}/g3/l0-1"
    digests = [
        hashlib.sha256(sealed(form, one_block(form, b"t", b"x"), b"payload")).hexdigest() for form in (PLAIN, KEYED)
    ]
    assert digests == [
        "3be59f59001524e2de5b0ac655828743dc9a1797bf7eea6937b77570da256f15",
        "09d13d7d9abe745e81544895992347af5bdae529bb84822cf0a2dd38676aa6fc",
    ]


def test_names_are_the_same_in_another_process() -> None:
    code = (
        "from test_tiers_objects import *; "
        "print(PLAIN.key(one_block(PLAIN, b's'), 1, 'all'), KEYED.key(one_block(KEYED, b's'), 1, 'all'))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=__file__.rpartition("/")[0])
    keys = [form.key(one_block(form, b"s"), 1, "all") for form in (PLAIN, KEYED)]
    assert done.stdout.split() == keys, done.stderr


def test_digests_are_what_is_documented() -> None:
    tokens = np.arange(40, dtype=np.int64)
    first, second = PLAIN.blocks(PLAIN.root(b"salt"), tokens, 16, [b"", b"image"])
    root = hashlib.sha256(b"kvblocks root 1salt").digest()
    assert first == (
        root,
        hashlib.sha256(root + bytes(4) + struct.pack("<16i", *range(16))).digest(),
        first.tokens,
        b"",
    )
    text = struct.pack("<16i", *range(16, 32))
    digest = hashlib.sha256(first.digest + struct.pack("<I", 5) + b"image" + text).digest()
    assert second == (first.digest, digest, text, b"image")
    assert PLAIN.key(second, 0, "all") == f"kvb1/{NAME}/{digest.hex()}/g0/all"
    assert PLAIN.namespace == NAME


small = st.integers(1, 3).flatmap(
    lambda size: st.tuples(
        st.just(size), st.sampled_from([b"", b"a", b"ab"]), st.lists(st.integers(0, 2), max_size=9), st.booleans()
    )
)


@given(small, small, st.sampled_from([PLAIN, KEYED]))
def test_two_digests_are_equal_only_where_all_that_counts_is(one: Any, other: Any, form: ObjectFormat) -> None:
    def told(case: Any) -> list[tuple[Any, bytes]]:
        size, salt, tokens, marked = case
        extras = [b"x" if marked and i == 1 else b"" for i in range(len(tokens) // size)]
        found = form.blocks(form.root(salt), np.array(tokens, np.int32), size, extras)
        texts = [tuple(tokens[i * size : (i + 1) * size]) for i in range(len(found))]
        return [((salt, tuple(zip(texts, extras, strict=True))[: i + 1]), b.digest) for i, b in enumerate(found)]

    for what, digest in told(one):
        for what_else, digest_else in told(other):
            assert (what == what_else) == (digest == digest_else)


def test_a_namespace_is_of_everything_that_counts() -> None:
    changed = {
        "model": "org/model2",
        "weights_version": "b" * 64,
        "dtype": "float16",
        "codec": "int8",
        "block_size": 32,
        "layers": [(8, 128, 128), (8, 128, 64)],
        "groups": [(("window", 64), (0, 1))],
        "layout": "HND",
    }
    names = [NAME, *(namespace(**(MODEL | {field: value})) for field, value in changed.items())]
    assert len(changed) == len(MODEL)
    # Where one field ends and the next begins, and how deep a sequence lies, counts too.
    names += [namespace(**(MODEL | {"dtype": "bfloat16n", "codec": "one"}))]
    names += [
        namespace(**(MODEL | {"layers": layers})) for layers in ([8, 128, 128], [(8, 128), 128], ["8", 128], [b"8"])
    ]
    assert len(set(names)) == len(names)
    assert namespace(**MODEL) == NAME


@FORMATS
def test_one_changed_bit_anywhere_is_seen(form: ObjectFormat) -> None:
    block = one_block(form, extra=b"image")
    buffer = sealed(form, block, random.Random(0).randbytes(100))
    assert form.verify(block, 0, "all", buffer)
    chance = random.Random(1)
    for i in range(len(buffer)):
        bit = 1 << chance.randrange(8)
        buffer[i] ^= bit
        assert not form.verify(block, 0, "all", buffer), i
        buffer[i] ^= bit
    assert form.verify(block, 0, "all", buffer)


@FORMATS
def test_no_other_object_passes_for_the_one_that_was_asked_for(form: ObjectFormat) -> None:
    block, payload = one_block(form, extra=b"image"), bytes(range(200))
    wanted = sealed(form, block, payload)
    renamed = ObjectFormat(namespace(**(MODEL | {"weights_version": "new"})), secret=SECRET if form is KEYED else None)
    others = {
        "tokens": sealed(form, one_block(form, extra=b"image", first=1), payload),
        "tokens under the digest that is wanted": sealed(form, block._replace(tokens=bytes(64)), payload),
        "extra bytes under the digest that is wanted": sealed(form, block._replace(extra=b"other"), payload),
        "parent under the digest that is wanted": sealed(form, block._replace(parent=bytes(32)), payload),
        "digest": sealed(form, block._replace(digest=bytes(32)), payload),
        "salt": sealed(form, one_block(form, b"salt", b"image"), payload),
        "group": sealed(form, block, payload, group=1),
        "shard": sealed(form, block, payload, shard="l0"),
        "weights": sealed(renamed, block, payload),
        "longer": sealed(form, block, payload + b"\0")[:-1],
        "shorter": sealed(form, block, payload[:-1]) + b"\0",
        "payload": wanted[:HEADER_BYTES] + payload[::-1],
        "torn": wanted[: HEADER_BYTES + 100] + bytes(100),
        "nothing": bytearray(len(wanted)),
    }
    assert form.verify(block, 0, "all", wanted)
    for what, buffer in others.items():
        assert not form.verify(block, 0, "all", buffer), what


def test_who_does_not_know_the_secret_cannot_make_an_object() -> None:
    block, payload = one_block(KEYED), bytes(200)
    theirs = ObjectFormat(NAME, secret=b"another secret of theirs")
    assert not KEYED.verify(block, 0, "all", sealed(PLAIN, block, payload))
    assert not KEYED.verify(block, 0, "all", sealed(theirs, block, payload))
    assert not PLAIN.verify(block, 0, "all", sealed(KEYED, block, payload))
    # The payload of one object, with its own checksum, under the header of another one.
    one, other = sealed(KEYED, block, payload), sealed(KEYED, one_block(KEYED, first=5), b"x" * 200)
    checksum = slice(192, 224)
    assert one[checksum] != other[checksum]
    mixed = bytearray(one)
    mixed[checksum], mixed[HEADER_BYTES:] = other[checksum], other[HEADER_BYTES:]
    assert not KEYED.verify(block, 0, "all", mixed)
    # Names tell neither salts nor models to who tries them out.
    assert len({form.key(one_block(form, b"tenant"), 0, "all")[5:69] for form in (PLAIN, KEYED, theirs)}) == 3
    assert len({form.root(b"tenant") for form in (PLAIN, KEYED, theirs)}) == 3


def test_a_salt_is_in_no_header() -> None:
    salt = b"a tenant's own salt"
    for form in (PLAIN, KEYED):
        block = form.blocks(form.root(salt), np.arange(16), 16)[0]
        assert salt not in sealed(form, block, bytes(64))


@FORMATS
def test_what_does_not_fit_into_a_header_is_not_sealed(form: ObjectFormat) -> None:
    [most] = form.blocks(form.root(), np.arange(900), 900, [b"e" * 240])
    assert form.fits(most)
    buffer = sealed(form, most, b"p")
    assert form.verify(most, 0, "all", buffer)
    found = read_header(buffer)
    assert found is not None
    assert found.block == most
    [more] = form.blocks(form.root(), np.arange(900), 900, [b"e" * 241])
    assert not form.fits(more)
    before = bytes(buffer)
    with pytest.raises(
        ValueError, match="3600 bytes of tokens and 241 extra bytes do not fit into a header, which has 3840"
    ):
        form.seal(more, 0, "all", buffer)
    assert buffer == before


@FORMATS
def test_what_a_header_says(form: ObjectFormat) -> None:
    block = one_block(form, extra=b"image")
    buffer = sealed(form, block, b"payload", group=2, shard="l0-3.h0")
    header = read_header(buffer)
    assert header is not None
    assert (header.block, header.group, header.shard, header.payload_bytes) == (block, 2, "l0-3.h0", 7)
    assert header.key == form.key(block, 2, "l0-3.h0")
    assert header.keyed == (form is KEYED)
    for wrong in (b"", bytes(4096), b"x" * 5000, buffer[:4000], b"x" + buffer[1:]):
        assert read_header(wrong) is None


def test_faults_of_objects_that_nobody_asked_for() -> None:
    block = one_block(PLAIN)
    buffer = sealed(PLAIN, block, b"payload")
    assert fault_of(buffer) is None
    assert fault_of(bytes(5000)) == "no header of kvblocks"
    assert fault_of(buffer, SECRET) == "made without a secret"
    assert fault_of(buffer + b"x") == "8 bytes of payload, where the header says 7"
    assert fault_of(buffer[:-1] + b"x") == "a header or a payload that its checksum does not fit"
    other = sealed(PLAIN, block._replace(tokens=bytes(64)), b"payload")
    assert fault_of(other) == "a digest that is not that of its tokens"
    keyed = sealed(KEYED, one_block(KEYED), b"payload")
    assert fault_of(keyed) == "made with a secret"
    assert fault_of(keyed, SECRET) is None
    assert fault_of(keyed, SECRET * 2) == "a digest that is not that of its tokens"


@FORMATS
def test_whatever_a_store_does_only_right_bytes_are_verified(form: ObjectFormat) -> None:
    """Two thousand loads from a store in which everything goes wrong that can, into buffers that are used again."""
    chances: dict[Fault, float] = {fault: 0.07 for fault in Fault if fault not in (Fault.SLOW, Fault.HANG, Fault.DEAD)}
    store = FaultyStore(chances, seed=4)
    blocks = form.blocks(form.root(), np.arange(20 * 16), 16)
    payloads = [random.Random(i).randbytes(300) for i in range(20)]
    keys = [form.key(block, 0, "all") for block in blocks]
    chance, passed, refused = random.Random(5), 0, 0
    buffers = [bytearray(HEADER_BYTES + 300) for _ in range(3)]
    for _ in range(1000):
        chosen = chance.sample(range(20), 2)
        names = [keys[i] for i in chosen]
        try:
            if chance.random() < 0.3:
                store.store(names, [sealed(form, blocks[i], payloads[i]) for i in chosen])
            else:
                targets = chance.sample(buffers, 2)
                for i, status, target in zip(chosen, store.load(names, targets), targets, strict=True):
                    if status is Status.OK and form.verify(blocks[i], 0, "all", target):
                        assert target[HEADER_BYTES:] == payloads[i]
                        passed += 1
                    else:
                        refused += status is Status.OK
        except StoreDied:
            continue
    assert passed > 300
    assert refused > 200


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, "namespace='A'", lambda: ObjectFormat("A")),
        (ValueError, "secret has 15 bytes; give at least 16", lambda: ObjectFormat(NAME, secret=b"x" * 15)),
        (TypeError, "secret is a str; give bytes", lambda: ObjectFormat(NAME, secret="x" * 16)),  # type: ignore[arg-type]
        (ValueError, "parent has 4 bytes", lambda: PLAIN.blocks(b"root", [1], 1)),
        (ValueError, "block_size=0", lambda: PLAIN.blocks(PLAIN.root(), [1], 0)),
        (ValueError, "tokens hold -1, which is outside", lambda: PLAIN.blocks(PLAIN.root(), [1, -1], 1)),
        (ValueError, "tokens hold 2147483648", lambda: PLAIN.blocks(PLAIN.root(), [2**31], 1)),
        (ValueError, r"tokens have shape \[1, 1\]", lambda: PLAIN.blocks(PLAIN.root(), [[1]], 1)),
        (TypeError, "tokens are float64", lambda: PLAIN.blocks(PLAIN.root(), [1.0], 1)),
        (ValueError, "1 extras for 2 blocks", lambda: PLAIN.blocks(PLAIN.root(), [1, 2], 1, [b""])),
        (ValueError, "group=-1", lambda: PLAIN.key(one_block(PLAIN), -1, "all")),
        (ValueError, "shard='a/b'", lambda: PLAIN.key(one_block(PLAIN), 0, "a/b")),
        (ValueError, "the buffer has 4096 bytes", lambda: PLAIN.seal(one_block(PLAIN), 0, "all", bytearray(4096))),
        (TypeError, "1.5 is a float; give text", lambda: namespace(**(MODEL | {"layers": [1.5]}))),
        (TypeError, "True is a bool", lambda: namespace(**(MODEL | {"layers": [True]}))),
    ],
)
def test_wrong_calls(error: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=message):
        call()


def test_without_xxhash_a_secret_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xxhash", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "kvblocks\[tiers\]"'):
        ObjectFormat(NAME)
    assert ObjectFormat(NAME, secret=SECRET).namespace == KEYED.namespace
