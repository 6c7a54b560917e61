"""Ranker samples as arrays, and how they are cut into pieces of requests.

Shape legend: n samples, G requests, P pieces of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from downstream.inputs import RankerInputs
from pipelines.domain import Domain
from pipelines.features import FeatureArrays, arrays, times_us

PIECE_SIZES = (1, 2, 4, 8, 16, 32)
REQUEST_COST = 12.0
"""What a request's history costs, in candidates: decides how finely requests are cut."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Samples:
    """Ranker samples [n]; feature ids are hash buckets."""

    instance_id: Array
    user_id: Array
    item_id: Array
    request_id: Array
    as_of_us: Array
    request: FeatureArrays
    """User features, then context features."""
    candidate: FeatureArrays
    label: Array
    """0, 1 or NaN (unknown), float32."""
    label_time_us: Array

    def __len__(self) -> int:
        return len(self.as_of_us)

    @classmethod
    def of(cls, rows: pa.Table, domain: Domain) -> Samples:
        """From rows of the table `ranker_samples`; the label is the domain's main one."""
        inputs = RankerInputs.of(domain, num_match=0)
        label = rows.column(f"label_{domain.label.name}").to_numpy(zero_copy_only=False)
        # Copied: arrow's buffers are read-only, and torch warns of tensors over such memory.
        keys = {
            name: np.array(rows.column(name).to_numpy())
            for name in ("instance_id", "user_id", "item_id", "request_id")
        }
        return cls(
            **keys,
            as_of_us=np.array(times_us(rows, "as_of")),
            request=arrays(rows, inputs.request),
            candidate=arrays(rows, inputs.candidate),
            label=np.asarray(label, np.float32),
            label_time_us=times_us(rows, f"label_time_{domain.label.name}"),
        )


@dataclass(frozen=True, slots=True)
class Pieces:
    """Samples ordered by request, each request cut into pieces of at most a size."""

    order: Array
    """[n] The sample at each place: by time, then request, then as loaded."""
    request_start: Array
    """[G] The request's first place."""
    start: Array
    """[P] The piece's first place."""
    size: Array
    request: Array
    """[P] The request it is of."""

    @classmethod
    def of(cls, samples: Samples) -> Pieces:
        """Rows of one user, moment, request id and request-side features are one request."""
        shared = _fingerprint(samples.request)
        keys = (shared, samples.user_id, samples.request_id, samples.as_of_us)
        order = in_order(keys)
        is_first = np.zeros(len(order), bool)
        is_first[:1] = True
        for key in keys:
            is_first[1:] |= np.diff(key[order]) != 0
        request_start = np.flatnonzero(is_first)
        sizes = np.diff(np.append(request_start, len(order)))
        most = best_piece_size(sizes)
        num_pieces = -(-sizes // most)
        request = np.repeat(np.arange(len(sizes)), num_pieces)
        number = np.arange(len(request)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
        # A request of 40 cut at 32 makes two pieces of 20, not one of 32 and one of 8.
        begin = number * sizes[request] // num_pieces[request]
        end = (number + 1) * sizes[request] // num_pieces[request]
        return cls(order, request_start, request_start[request] + begin, end - begin, request)


def best_piece_size(sizes: Array) -> int:
    """The cut for which padding and repeated histories together cost least."""

    def cost(most: int) -> float:
        return float((-(-sizes // most)).sum() * (REQUEST_COST + most))

    return min(PIECE_SIZES, key=cost)


def in_order(keys: Sequence[Array]) -> Array:
    """np.lexsort, quick where rows are in order already, as `delta.read` gives samples."""
    is_behind = np.zeros(max(0, len(keys[0]) - 1), bool)
    for key in keys:
        is_behind = (key[1:] < key[:-1]) | ((key[1:] == key[:-1]) & is_behind)
    return np.lexsort(keys) if is_behind.any() else np.arange(len(keys[0]))


def _fingerprint(features: FeatureArrays) -> Array:
    """One number per row that differs where features do (but for chance of 2^-64)."""
    columns = [*features.ids.T, *features.numbers.view(np.int32).T]
    found = np.zeros(len(features), np.uint64)
    with np.errstate(over="ignore"):
        for column in columns:
            found = (found ^ column.astype(np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
            found ^= found >> np.uint64(29)
    return found.view(np.int64)
