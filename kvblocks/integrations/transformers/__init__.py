"""Hugging Face transformers models over the paged cache, unpatched: a cache for `generate`, and an attention backend.

`PagedCache` takes the place of transformers' own cache. Importing this registers the attention "kvblocks", by which a
model's layers read the blocks in place; `kvblocks.generate` runs on that. Imports transformers.
"""

from kvblocks.errors import UnsupportedModel
from kvblocks.integrations.transformers.backend import PagedModel, check_model
from kvblocks.integrations.transformers.cache import PagedCache
from kvblocks.integrations.transformers.cached import CachedModel, served
from kvblocks.integrations.transformers.layers import (
    KVShape,
    cache_config,
    cache_groups,
    kv_shape,
    longest_sequence,
    placeholder_tokens,
)
from kvblocks.integrations.transformers.pool import Pool

__all__ = [
    "CachedModel",
    "KVShape",
    "PagedCache",
    "PagedModel",
    "Pool",
    "UnsupportedModel",
    "cache_config",
    "cache_groups",
    "check_model",
    "kv_shape",
    "longest_sequence",
    "placeholder_tokens",
    "served",
]
