"""A store from one line of text, as a command or a settings file gives it. Imports the stores."""

from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from kvblocks.tiers.disk import DiskStore
from kvblocks.tiers.mooncake import MooncakeStore
from kvblocks.tiers.redis import RedisStore
from kvblocks.tiers.store import Store

__all__ = ["open_store"]

Number = TypeVar("Number", int, float)


def open_store(url: str) -> Store:
    """The store that a URL names.

    | URL | store | options |
    | --- | --- | --- |
    | `file:///PATH?size=10GiB` | `DiskStore` | `size` (needed), `threads` |
    | `redis://HOST:PORT/DB`, `rediss://HOST:PORT/DB`, `unix:///PATH?db=DB` | `RedisStore` | `timeout`, \
`connect_timeout`, those of redis that begin with `ssl_` |
    | `mooncake://HOST:PORT?segment=8GiB` | `MooncakeStore` | `segment` (needed; 0 lends none), `host`, `protocol`, \
`devices`, `metadata`, `lease` |

    Raises:
        ValueError: `url` names no store, lacks an option, or has one that its store does not know.
        Whatever the store raises that is made.

    Example:
        >>> with open_store("file:///var/cache/kv?size=10GiB") as store:  # doctest: +SKIP
        ...     store.lookup(["a"])
        [False]
    """
    scheme = url.partition(":")[0].lower()
    if "://" not in url or scheme not in _OPENERS:
        # Not the URL itself: it may have a password in it.
        raise ValueError(f"{scheme!r:.40} is no kind of store; give a URL that begins with {_known()}")
    options = dict(parse_qsl(urlsplit(url).query, keep_blank_values=True))
    return _OPENERS[scheme](url, options)


def _file(url: str, options: dict[str, str]) -> Store:
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost") or not parts.path.strip("/"):
        raise ValueError(f"{url!r:.200} names no folder; give file:///PATH?size=10GiB, with three slashes")
    if "size" not in options:
        raise ValueError(f"{url!r:.200} lacks the bytes that the folder may take; add ?size=10GiB")
    size = options.pop("size")
    threads = _number("threads", options.pop("threads", "4"), int)
    if options:
        raise ValueError(f"{url!r:.200} has an option {next(iter(options))!r}; size and threads are known")
    return DiskStore(unquote(parts.path), size, threads=threads)


def _redis(url: str, options: dict[str, str]) -> Store:
    seconds = {
        name: _number(name, options.pop(name), float) for name in ("timeout", "connect_timeout") if name in options
    }
    server, rest = url.partition("?")[0], urlencode(options)
    return RedisStore(f"{server}?{rest}" if rest else server, **seconds)


def _mooncake(url: str, options: dict[str, str]) -> Store:
    parts = urlsplit(url)
    if parts.path.strip("/") or "@" in parts.netloc:
        raise ValueError("a URL of Mooncake has a host and a port alone; give mooncake://HOST:PORT?segment=8GiB")
    if "segment" not in options:
        raise ValueError(
            f"{url!r:.200} lacks the memory that this process lends; add ?segment=8GiB, or ?segment=0 for none"
        )
    segment = options.pop("segment")
    settings: dict[str, Any] = {
        name: options.pop(name) for name in ("host", "protocol", "devices", "metadata") if name in options
    }
    if "lease" in options:
        settings["lease"] = _number("lease", options.pop("lease"), float)
    if options:
        raise ValueError(
            f"{url!r:.200} has an option {next(iter(options))!r}; "
            "segment, host, protocol, devices, metadata and lease are known"
        )
    return MooncakeStore(parts.netloc, segment=segment, **settings)


def _number(name: str, text: str, kind: type[Number]) -> Number:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{name}={text!r:.40} in the URL of a store is no number") from None


def _known() -> str:
    return ", ".join(f"{scheme}://" for scheme in _OPENERS)


_OPENERS: dict[str, Callable[[str, dict[str, str]], Store]] = {
    "file": _file,
    "redis": _redis,
    "rediss": _redis,
    "unix": _redis,
    "mooncake": _mooncake,
}
