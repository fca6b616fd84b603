"""How a block is identified outside of this process: its key in a store, and the header stored with its bytes.

Knows bytes, and neither stores nor managers. Imports numpy, the sizes, and xxhash where there is no secret.
"""

import hashlib
import hmac
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from kvblocks.sizes import HEADER_BYTES
from kvblocks.tiers.store import Buffer

__all__ = ["Block", "Header", "ObjectFormat", "fault_of", "namespace", "read_header"]

MIN_SECRET_BYTES = 16

# What of a header has a fixed place: magic, whether it is keyed, the length of the shard's name, group, bytes of the
# payload, tokens, extra bytes, namespace, parent, digest, shard, checksum of the payload. Tokens and extra bytes
# follow, then zeros; the last 32 bytes are the checksum of all before them.
_FIXED = struct.Struct("<8sHHIQII32s32s32s64s32s")
_MAGIC = b"kvblobj1"
_CHECKSUM_BYTES = 32
_ROOM = HEADER_BYTES - _FIXED.size - _CHECKSUM_BYTES
_PAYLOAD_CHECKSUM = slice(_FIXED.size - 32, _FIXED.size)
_SHARD = re.compile(r"[A-Za-z0-9._-]{1,64}")

# What a field of a namespace may be.
_Field: TypeAlias = "str | int | bytes | Sequence[_Field] | None"


class Block(NamedTuple):
    """Which tokens a block holds, and after which others.

    Attributes:
        parent: digest of the block before it, or the root of its salt: 32 bytes.
        digest: its own, which stands for all tokens up to its end: 32 bytes.
        tokens: the ids of its tokens as little-endian int32.
        extra: bytes of what its tokens stand for beyond their ids, such as the hash of an image.
    """

    parent: bytes
    digest: bytes
    tokens: bytes
    extra: bytes


@dataclass(frozen=True)
class Header:
    """What the header of an object says; nothing of it has been verified.

    Attributes:
        keyed: whether names and checksums were made with a secret.
        namespace: as in the object's key, 64 hexadecimal digits.
        block, group, shard: what the object holds.
        payload_bytes: how many bytes follow the header.
        key: the key of such an object in a store.
    """

    keyed: bool
    namespace: str
    block: Block
    group: int
    shard: str
    payload_bytes: int

    @property
    def key(self) -> str:
        return _key(self.namespace, self.block.digest, self.group, self.shard)


def namespace(
    *,
    model: str,
    weights_version: str,
    dtype: str,
    codec: str,
    block_size: int,
    layers: Sequence[_Field],
    groups: Sequence[_Field],
    layout: str,
) -> str:
    """A name for all that decides what the bytes of a block mean: sha256 over canonical bytes, as 64 hex digits.

    Two processes may share blocks only where all of these are equal, so there are no defaults.

    Args:
        model: its name.
        weights_version: what changes whenever the weights do, such as the sha256 of their files.
        dtype, codec: what is stored, and how.
        block_size: tokens in a block.
        layers: for each layer its sizes: heads, dims and the like, as nested sequences of text and integers.
        groups: for each layer group how far it attends and which layers are in it, likewise.
        layout: in which order the bytes of a block's piece lie.

    Raises:
        TypeError: a field that is neither text, bytes, an integer nor None, nor a sequence of these.
    """
    fields = (model, weights_version, dtype, codec, block_size, layers, groups, layout)
    return hashlib.sha256(b"kvblocks namespace 1" + _canonical(fields)).hexdigest()


def _canonical(value: _Field) -> bytes:
    """One encoding for each value, and none the beginning of another: a kind, a length, the content."""
    if isinstance(value, bool) or not (value is None or isinstance(value, str | int | bytes | Sequence)):
        raise TypeError(f"{value!r:.60} is a {type(value).__name__}; give text, bytes, integers, or sequences of these")
    if value is None:
        return b"n"
    if isinstance(value, int):
        return b"i%d;" % value
    if isinstance(value, str):
        text = value.encode()
        return b"s%d:%b" % (len(text), text)
    if isinstance(value, bytes):
        return b"b%d:%b" % (len(value), value)
    return b"l%d:%b" % (len(value), b"".join(map(_canonical, value)))


class ObjectFormat:
    """Keys and headers of the blocks of one namespace.

    An object is a header of 4,096 bytes and, right after it, the bytes of one block of one layer group (or of a shard
    of it). Its key is `kvb1/<namespace>/<digest>/g<group>/<shard>`. A block's digest is a sha256 over the digest of
    the block before it, its extra bytes and its tokens; the first block has the root of a salt before it.

    The header says all that the key says, and holds the tokens, the extra bytes and the parent. There is exactly one
    valid header for a block and its payload: `verify` makes it again and compares it byte for byte.

    Without a secret the payload's checksum is xxh3-128, which finds accidents. With one, digests, namespace and
    checksums are HMAC-SHA256 under keys derived from it: without the secret nobody can make an object that verifies,
    nor tell from a store's keys which prompts or salts they stand for. Headers hold the tokens unencrypted.

    Args:
        namespace: 64 hexadecimal digits, as `kvblocks.tiers.objects.namespace` gives them.
        secret: at least 16 bytes, the same in every process that shares the store; None for none.

    Raises:
        ValueError: a namespace or a secret that is not as above.
        TypeError: a secret that is not bytes.
        ModuleNotFoundError: there is no secret, and the package xxhash is not installed.

    Thread-safety: immutable.
    """

    def __init__(self, namespace: str, *, secret: bytes | None = None) -> None:
        if not isinstance(namespace, str) or not re.fullmatch("[0-9a-f]{64}", namespace):
            raise ValueError(f"namespace={namespace!r:.80} is not 64 hexadecimal digits; see objects.namespace")
        self._digests = _Digests(secret)
        name = bytes.fromhex(namespace)
        # Keyed too: a key in a store does not even tell which model it belongs to.
        self._namespace = self._digests.name(b"kvblocks namespace 1", name) if secret else name

    @property
    def namespace(self) -> str:
        """As it stands in keys and headers: 64 hexadecimal digits, keyed where there is a secret."""
        return self._namespace.hex()

    def root(self, salt: bytes = b"") -> bytes:
        """The parent of the first block of sequences of this salt: 32 bytes."""
        return self._digests.name(b"kvblocks root 1", salt)

    def blocks(
        self, parent: bytes, tokens: npt.ArrayLike, block_size: int, extras: Sequence[bytes] | None = None
    ) -> list[Block]:
        """The full blocks of a run of tokens, in order.

        Args:
            parent: digest of the block before them, or a `root`.
            tokens: [n] integers, 0 to 2**31 - 1; those after the last full block are left out.
            block_size: tokens in a block.
            extras: the extra bytes of each block, [n // block_size]; None where no block has any.

        Raises:
            ValueError: `parent` is not 32 bytes, `extras` has another length, a token or `block_size` is out of range.
            TypeError: tokens that are not integers.
        """
        if len(parent) != 32:
            raise ValueError(f"parent has {len(parent)} bytes; give a digest or a root, which have 32")
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be at least 1")
        array = _tokens(tokens)
        count = len(array) // block_size
        if extras is not None and len(extras) != count:
            raise ValueError(f"there are {len(extras)} extras for {count} blocks; give one for each, b'' for none")
        raw, step = array[: count * block_size].tobytes(), 4 * block_size
        found = []
        for i in range(count):
            block = self.block(parent, raw[i * step : (i + 1) * step], extras[i] if extras is not None else b"")
            found.append(block)
            parent = block.digest
        return found

    def block(self, parent: bytes, tokens: bytes, extra: bytes = b"") -> Block:
        """The block of these tokens after `parent`, a digest or a root.

        Args:
            tokens: ids as little-endian int32.
            extra: its extra bytes.
        """
        return Block(parent, self._digests.block(parent, tokens, extra), tokens, extra)

    def key(self, block: Block, group: int, shard: str) -> str:
        """The key of an object: `kvb1/<namespace>/<digest>/g<group>/<shard>`.

        Args:
            group: number of the layer group, 0 to 2**32 - 1.
            shard: the layers and heads that the object holds: 1 to 64 letters, digits, `.`, `_` and `-`.

        Raises:
            ValueError: a group or shard that is not as above.
        """
        _check_part(group, shard)
        return _key(self.namespace, block.digest, group, shard)

    @staticmethod
    def fits(block: Block) -> bool:
        """Whether the tokens and extra bytes of a block go into a header: up to 3,840 bytes. Others are not stored."""
        return len(block.tokens) + len(block.extra) <= _ROOM

    def seal(self, block: Block, group: int, shard: str, buffer: Buffer) -> None:
        """Write the header of an object whose payload lies in `buffer`, from byte 4,096 to its end.

        Raises:
            ValueError: a buffer of 4,096 bytes or less, a block that does not fit, a group or shard that `key` refuses.
            TypeError: a buffer that is read-only or in several pieces.
        """
        view = memoryview(buffer).cast("B")
        payload = _payload(view)
        checksum = self._digests.payload(payload)
        view[:HEADER_BYTES] = self._digests.header(self._namespace, block, group, shard, len(payload), checksum)

    def verify(self, block: Block, group: int, shard: str, buffer: Buffer) -> bool:
        """Whether `buffer` holds exactly this object: its header to the last byte, and a payload that fits it.

        The buffer must not change from here until its payload is used.

        Raises:
            ValueError: as for `seal`.
        """
        return self._digests.verify(self._namespace, block, group, shard, memoryview(buffer).cast("B"))


class _Digests:
    """Digests and checksums with or without a secret, and the headers that they make."""

    def __init__(self, secret: bytes | None) -> None:
        self._keys: tuple[bytes, ...] | None = None
        if secret is None:
            try:
                import xxhash
            except ModuleNotFoundError:
                needs = (
                    "checksums of blocks need xxhash, which is not installed; run: pip install "
                    '"kvblocks[tiers]", or give a secret'
                )
                raise ModuleNotFoundError(needs, name="xxhash") from None
            self._xxh3 = xxhash.xxh3_128_digest
            return
        if not isinstance(secret, bytes):
            raise TypeError(f"secret is a {type(secret).__name__}; give bytes")
        if len(secret) < MIN_SECRET_BYTES:
            raise ValueError(f"secret has {len(secret)} bytes; give at least {MIN_SECRET_BYTES}, from a random source")
        purposes = (b"kvblocks 1 names", b"kvblocks 1 payloads", b"kvblocks 1 headers")
        self._keys = tuple(hmac.digest(secret, purpose, "sha256") for purpose in purposes)

    def name(self, *parts: bytes) -> bytes:
        message = b"".join(parts)
        if self._keys is None:
            return hashlib.sha256(message).digest()
        return hmac.digest(self._keys[0], message, "sha256")

    def block(self, parent: bytes, tokens: bytes, extra: bytes) -> bytes:
        return self.name(parent, len(extra).to_bytes(4, "little"), extra, tokens)

    def payload(self, payload: memoryview) -> bytes:
        if self._keys is None:
            return self._xxh3(payload).ljust(_CHECKSUM_BYTES, b"\0")
        return hmac.digest(self._keys[1], payload, "sha256")

    def header(
        self, namespace: bytes, block: Block, group: int, shard: str, payload_bytes: int, checksum: bytes
    ) -> bytes:
        _check_part(group, shard)
        if not ObjectFormat.fits(block):
            raise ValueError(
                f"{len(block.tokens)} bytes of tokens and {len(block.extra)} extra bytes do not fit into a header, "
                f"which has {_ROOM} for both"
            )
        fixed = _FIXED.pack(
            _MAGIC,
            self._keys is not None,
            len(shard),
            group,
            payload_bytes,
            len(block.tokens) // 4,
            len(block.extra),
            namespace,
            block.parent,
            block.digest,
            shard.encode(),
            checksum,
        )
        body = b"".join((fixed, block.tokens, block.extra)).ljust(HEADER_BYTES - _CHECKSUM_BYTES, b"\0")
        if self._keys is None:
            return body + self._xxh3(body).ljust(_CHECKSUM_BYTES, b"\0")
        return body + hmac.digest(self._keys[2], body, "sha256")

    def verify(self, namespace: bytes, block: Block, group: int, shard: str, view: memoryview) -> bool:
        payload, given = _payload(view), view[:HEADER_BYTES]
        checksum = bytes(given[_PAYLOAD_CHECKSUM])
        # An object of another block is refused without reading its payload.
        if not hmac.compare_digest(given, self.header(namespace, block, group, shard, len(payload), checksum)):
            return False
        return hmac.compare_digest(checksum, self.payload(payload))


def read_header(buffer: Buffer) -> Header | None:
    """What the header at the start of `buffer` says, unverified; None where there is none that could be read."""
    view = memoryview(buffer).cast("B")
    if len(view) < HEADER_BYTES:
        return None
    magic, keyed, shard_len, group, payload_bytes, tokens, extra, name, parent, digest, shard, _ = _FIXED.unpack_from(
        view
    )
    if magic != _MAGIC or keyed > 1 or 4 * tokens + extra > _ROOM:
        return None
    try:
        text = shard[: min(shard_len, 64)].decode("ascii")
    except UnicodeDecodeError:
        return None
    if not _SHARD.fullmatch(text):
        return None
    middle = _FIXED.size + 4 * tokens
    block = Block(parent, digest, bytes(view[_FIXED.size : middle]), bytes(view[middle : middle + extra]))
    return Header(bool(keyed), name.hex(), block, group, text, payload_bytes)


def fault_of(buffer: Buffer, secret: bytes | None = None) -> str | None:
    """What is wrong with an object whose tokens the caller does not know, in a few words; None for nothing.

    Args:
        buffer: the object, to its end.
        secret: with which it must have been made, or None for without one.

    Raises:
        ValueError, TypeError, ModuleNotFoundError: as for `ObjectFormat`.
    """
    digests = _Digests(secret)
    header = read_header(buffer)
    if header is None:
        return "no header of kvblocks"
    if header.keyed != (secret is not None):
        return "made with a secret" if header.keyed else "made without a secret"
    view = memoryview(buffer).cast("B")
    if header.payload_bytes != len(view) - HEADER_BYTES or not header.payload_bytes:
        return f"{len(view) - HEADER_BYTES} bytes of payload, where the header says {header.payload_bytes}"
    block, name = header.block, bytes.fromhex(header.namespace)
    if digests.block(block.parent, block.tokens, block.extra) != block.digest:
        return "a digest that is not that of its tokens"
    if not digests.verify(name, block, header.group, header.shard, view):
        return "a header or a payload that its checksum does not fit"
    return None


def _payload(view: memoryview) -> memoryview:
    if len(view) <= HEADER_BYTES:
        raise ValueError(f"the buffer has {len(view)} bytes; an object has a header of {HEADER_BYTES} and a payload")
    return view[HEADER_BYTES:]


def _key(namespace: str, digest: bytes, group: int, shard: str) -> str:
    return f"kvb1/{namespace}/{digest.hex()}/g{group}/{shard}"


def _check_part(group: int, shard: str) -> None:
    if not 0 <= group < 2**32:
        raise ValueError(f"group={group} is outside 0..{2**32 - 1}")
    if not _SHARD.fullmatch(shard):
        raise ValueError(f"shard={shard!r:.80} must be 1 to 64 letters, digits, '.', '_' and '-'")


def _tokens(given: npt.ArrayLike) -> npt.NDArray[np.int32]:
    array = np.asarray(given)
    if array.size == 0:
        return np.empty(0, "<i4")
    if array.dtype.kind not in "iu":
        raise TypeError(f"tokens are {array.dtype}; give integers")
    if array.ndim != 1:
        raise ValueError(f"tokens have shape {list(array.shape)}; give those of one sequence, [n]")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= 2**31:
        raise ValueError(f"tokens hold {low if low < 0 else high}, which is outside 0..{2**31 - 1}")
    return array.astype("<i4")
