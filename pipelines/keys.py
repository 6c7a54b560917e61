"""Keys as Spark hashes them, without Spark."""

from __future__ import annotations

import math
from typing import Any

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


def key_text(value: Any) -> str | None:
    """A raw value as the text that is hashed (pipelines.raw_values.text, without Spark); None where
    it is no key."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        if math.isnan(value):
            return None
        value = int(value) if value.is_integer() else value
    text = "" if value is None else str(value)
    return text if text.strip() else None
