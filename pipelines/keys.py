"""Keys as Spark hashes them, without Spark."""

from __future__ import annotations

import xxhash

SEED = 42
"""Spark's, of `xxhash64`."""


def key_id(key: str) -> int:
    """What Spark's xxhash64 gives for one string: a user's or an item's id.

    >>> key_id("Spark")
    -4294468057691064905
    """
    found: int = xxhash.xxh64_intdigest(key.encode(), seed=SEED)
    return found - 2**64 if found >= 2**63 else found
