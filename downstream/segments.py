"""Which rows of some arrays are whose, in order: found by binary search on any device, and grown by
a day without moving a row that anyone reads.

A key (user, item) owns two kinds of rows. Its first ones, `built` of them, lie in one piece from
`begin` on: as a whole build leaves them. Those that came later fill pages of PAGE rows, which are
taken from the arrays' end. Rows are never changed: a key whose past changes (a late label, a late
event) gets new pages from the first changed row on, and its old rows stay where older readers know
them.

Shape legend: B queries, L sequence length, K keys, G pages, N rows of the arrays, T touched keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

PAGE = 8
"""Rows of a page: fewer take less room for keys that rarely come, more give a smaller table."""


@dataclass(frozen=True)
class Segments:
    """The rows of each key, keys ascending."""

    key: Array
    """[K] int64, unique."""
    begin: Array
    """[K] The first row of those in one piece."""
    built: Array
    """[K] How many those are."""
    count: Array
    """[K] All rows, at least 1."""
    first_page: Array
    """[K] Where its pages begin in `pages`; they end where the next key's begin."""
    bucket: Array
    """[K] The key's part of the tables; 0 where they have none."""
    newest_us: Array
    """[K] No row of the key is later."""
    pages: Array
    """[G] int32: page p is the PAGE rows from base + p * PAGE on; a key's last may be spare."""
    base: int
    """The arrays' first row that is in a page."""

    @classmethod
    def of(
        cls, key: Array, count: Array, bucket: Array | None = None, newest_us: Array | None = None
    ) -> Segments:
        """Ascending keys [K] whose rows follow one another."""
        zero = np.zeros(len(key), np.int64)
        key, count = np.asarray(key, np.int64), np.asarray(count, np.int64)
        total = int(count.sum())
        return cls(
            key, np.cumsum(count) - count, count, count, zero,
            zero if bucket is None else np.asarray(bucket, np.int64),
            zero if newest_us is None else np.asarray(newest_us, np.int64),
            np.zeros(0, np.int32), total,
        )  # fmt: skip

    @classmethod
    def of_sorted(cls, keys: Array) -> Segments:
        """Of the keys of sorted rows [N]."""
        key, count = np.unique(np.asarray(keys, np.int64), return_counts=True)
        return cls.of(key, count)

    @classmethod
    def of_table(cls, table: Array, pages: Array, base: int) -> Segments:
        """The inverse of `table`."""
        key, begin, built, count, first_page, bucket, newest_us = np.ascontiguousarray(table)
        return cls(key, begin, built, count, first_page, bucket, newest_us, pages, base)

    @property
    def table(self) -> Array:
        """[7, K] int64: what there is one number a key of."""
        return np.stack([getattr(self, f.name) for f in fields(self)[:7]])

    def __len__(self) -> int:
        return len(self.key)

    @property
    def num_pages(self) -> Array:
        return np.diff(self.first_page, append=len(self.pages))

    @property
    def total(self) -> int:
        """Rows of all keys."""
        return int(self.count.sum())

    def rows(self) -> Array:
        """[total] The rows of all keys, key by key."""
        key = np.repeat(np.arange(len(self)), self.count)
        return self._rows(key, _ragged(np.zeros_like(self.count), self.count))

    def with_keys(self, key: Array, bucket: Array) -> Segments:
        """With keys that may be new, without rows of theirs yet."""
        key, first = np.unique(key, return_index=True)
        is_new = ~np.isin(key, self.key, assume_unique=True)
        key, bucket = key[is_new], bucket[first][is_new]
        at = np.searchsorted(self.key, key)
        zero = np.zeros(len(key), np.int64)
        first_page = np.append(self.first_page, len(self.pages))[at]
        new = (key, zero, zero, zero, first_page, bucket, zero + np.iinfo(np.int64).min)
        table = [np.insert(old, at, add) for old, add in zip(self.table, new, strict=True)]
        return Segments.of_table(np.stack(table), self.pages, self.base)

    def _rows(self, key: Array, place: Array) -> Array:
        held = SegmentTensors(self, "cpu")
        return held.rows(torch.from_numpy(key), torch.from_numpy(place)).numpy()


class SegmentTensors:
    """Segments on a device."""

    def __init__(self, held: Segments, device: str | torch.device) -> None:
        def tensor(array: Array) -> Tensor:
            # At least one value, so that keys that are not there, masked later, can be looked up.
            return torch.from_numpy(array if len(array) else np.zeros(1, array.dtype)).to(device)

        self.key_K = torch.from_numpy(held.key).to(device)
        self.begin, self.built, self.count = map(tensor, (held.begin, held.built, held.count))
        self.first_page, self.pages = tensor(held.first_page), tensor(held.pages)
        self.base, self.is_paged = held.base, len(held.pages) > 0
        self.longest = int(held.count.max(initial=0))

    def find(self, query_B: Tensor) -> tuple[Tensor, Tensor]:
        """Where each query is among the keys, and whether it is there (else place 0)."""
        return find(self.key_K, query_B)

    def rows(self, key_B: Tensor, place: Tensor) -> Tensor:
        """The rows at places [B] or [B, P] of keys' pasts; any row where the place is outside."""
        return self._rows(self._own(key_B, place), place)

    def _own(self, key_B: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where keys' rows are, to be used beside places."""
        columns = (self.begin[key_B], self.built[key_B], self.first_page[key_B])
        begin, built, first_page = (x if place.dim() == 1 else x[:, None] for x in columns)
        return begin, built, first_page

    def _rows(self, own: tuple[Tensor, Tensor, Tensor], place: Tensor) -> Tensor:
        begin, built, first_page = own
        row = begin + place
        if not self.is_paged:
            return row
        beyond = place - built
        at = (beyond >> PAGE.bit_length() - 1).add_(first_page)
        at.clamp_(min=0, max=len(self.pages) - 1)
        page = self.pages.index_select(0, at.flatten()).view(at.shape).long()
        paged = page.mul_(PAGE).add_(self.base).add_(beyond & PAGE - 1)
        return torch.where(beyond >= 0, paged, row)

    def newest(self, key_B: Tensor, num_B: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """(row_BL, mask_BL): the last of each key's first `num` rows, left-padded with -1."""
        step_L = torch.arange(-length, 0, device=num_B.device)
        mask_BL = step_L >= -num_B[:, None]
        if not self.is_paged:
            row_BL = (self.begin[key_B] + num_B)[:, None] + step_L
        else:
            # Looked up once for PAGE places, which lie in one piece on either side of `built`.
            built_B, bits = self.built[key_B], PAGE.bit_length() - 1
            first_B = num_B - length - built_B
            block_BP = (first_B >> bits)[:, None] + torch.arange(
                length // PAGE + 2, device=num_B.device
            )
            start_BP = self.rows(key_B, built_B[:, None] + block_BP * PAGE)
            row_BX = (start_BP[..., None] + torch.arange(PAGE, device=num_B.device)).flatten(1)
            at_B = torch.arange(len(key_B), device=num_B.device)
            row_BL = row_BX.unfold(1, length, 1)[at_B, first_B & PAGE - 1]
        return row_BL.masked_fill_(~mask_BL, -1), mask_BL

    def count_before(self, times_N: Tensor, key_B: Tensor, moment_B: Tensor) -> Tensor:
        """How many rows of each key, whose times ascend, are before the moment.

        The steps are the logarithm of the longest key's rows, and the device is not asked.
        """
        low_B, high_B = torch.zeros_like(key_B), self.count[key_B]
        own = self._own(key_B, low_B)
        for _ in range(self.longest.bit_length()):
            middle_B = (low_B + high_B) // 2
            row_B = self._rows(own, middle_B).clamp_(max=len(times_N) - 1)
            is_before_B, is_open_B = times_N[row_B] < moment_B, low_B < high_B
            low_B = torch.where(is_open_B & is_before_B, middle_B + 1, low_B)
            high_B = torch.where(is_open_B & ~is_before_B, middle_B, high_B)
        return low_B


def find(keys_U: Tensor, query_B: Tensor) -> tuple[Tensor, Tensor]:
    """Where each query is among sorted unique keys, and whether it is there (else place 0)."""
    if not len(keys_U):
        return torch.zeros_like(query_B), torch.zeros_like(query_B, dtype=torch.bool)
    place_B = torch.searchsorted(keys_U, query_B).clamp(max=len(keys_U) - 1)
    is_there_B = keys_U[place_B] == query_B
    return torch.where(is_there_B, place_B, 0), is_there_B


@dataclass(frozen=True)
class NewRows:
    """Rows [n] to come in, in any order."""

    key: Array
    time_us: Array
    tie: Array
    """Orders a key's rows of one time."""
    bucket: Array


@dataclass(frozen=True)
class Growth:
    """What to write so that arrays hold what `segments` says."""

    segments: Segments
    num_rows: int
    """Of the arrays."""
    copied_from: Array
    copied_to: Array
    new_to: Array
    """[n] The row of each new one."""


def grown(
    held: Segments,
    num_rows: int,
    time_us_N: Array,
    tie_N: Array,
    is_gone: Callable[[Array], Array],
    new: NewRows,
    going_us: Sequence[tuple[int, int]],
    buckets: Array | None = None,
) -> Growth:
    """Segments in which some held rows are gone and others new, each key's rows in order of time
    and tie. It costs the rows of the keys that have any of these, from the first of them on.

    Args:
        num_rows: of the arrays that `held` is of.
        is_gone: which rows go.
        going_us: half-open ranges of time, ascending, outside of which none goes.
        buckets: leave rows of keys of other buckets alone.
    """
    held = held.with_keys(new.key, new.bucket)
    key_n = np.searchsorted(held.key, new.key)
    low_K = _first_changes(held, time_us_N, key_n, new.time_us, going_us, buckets)
    is_touched = low_K < held.count
    is_touched[key_n] = True
    key_T = np.flatnonzero(is_touched)
    count_T, built_T, pages_T = held.count[key_T], held.built[key_T], held.num_pages[key_T]
    used_T, low_T = -((built_T - count_T) // PAGE), low_K[key_T]
    # From the page's first row on: a page is written as a whole.
    low_T = np.where(low_T > built_T, low_T - (low_T - built_T) % PAGE, low_T)

    old_T = count_T - low_T
    t_old, place_old = np.repeat(np.arange(len(key_T)), old_T), _ragged(low_T, old_T)
    row_old = held._rows(key_T[t_old], place_old)
    goes = is_gone(row_old)
    stays = row_old[~goes]
    t = np.concatenate([t_old[~goes], np.searchsorted(key_T, key_n)])
    source = np.concatenate([stays, -1 - np.arange(len(key_n))])
    time_us = np.concatenate([time_us_N[stays], new.time_us])
    order = np.lexsort((np.concatenate([tie_N[stays], new.tie]), time_us, t))
    t, source, time_us = t[order], source[order], time_us[order]
    merged_T = np.bincount(t, minlength=len(key_T))
    place, total_T = _ragged(low_T, merged_T), low_T + merged_T

    # The first place whose row is another than before; all before it stay where they are.
    change_T = count_T.copy()
    np.minimum.at(change_T, t_old[goes], place_old[goes])
    np.minimum.at(change_T, t[source < 0], place[source < 0])
    is_appended_T = change_T == count_T
    built_T = np.minimum(built_T, change_T)
    kept_T = np.where(is_appended_T, used_T, (change_T - built_T) // PAGE)
    write_T = np.where(is_appended_T, count_T, built_T + kept_T * PAGE)
    need_T = -((built_T - total_T) // PAGE) - kept_T
    spare_T = pages_T - used_T
    # Half as many again as it has, so that the pages of a key that comes often lie together.
    more_T = np.maximum(need_T - spare_T, (kept_T + need_T) // 2)
    fresh_T = np.where(need_T > spare_T, more_T, 0)

    num_K, keep_K = held.num_pages, held.num_pages
    num_K[key_T], keep_K[key_T] = kept_T + spare_T + fresh_T, kept_T
    first_K = np.cumsum(num_K) - num_K
    first_T, old_first_T = first_K[key_T], held.first_page[key_T]
    pages = np.empty(int(num_K.sum()), np.int32)
    pages[_ragged(first_K, keep_K)] = held.pages[_ragged(held.first_page, keep_K)]
    spare = held.pages[_ragged(old_first_T + used_T, spare_T)]
    pages[_ragged(first_T + kept_T, spare_T)] = spare
    num_fresh = int(fresh_T.sum())
    fresh = (num_rows - held.base) // PAGE + np.arange(num_fresh)
    pages[_ragged(first_T + kept_T + spare_T, fresh_T)] = fresh

    built_K, count_K, newest_us_K = held.built.copy(), held.count.copy(), held.newest_us.copy()
    built_K[key_T], count_K[key_T] = built_T, total_T
    np.maximum.at(newest_us_K, key_T[t], time_us)
    segments = replace(
        held, built=built_K, count=count_K, newest_us=newest_us_K, first_page=first_K, pages=pages
    )
    is_written = place >= write_T[t]
    to, source = segments._rows(key_T[t[is_written]], place[is_written]), source[is_written]
    new_to = np.empty(len(key_n), np.int64)
    new_to[-1 - source[source < 0]] = to[source < 0]
    return Growth(
        _without_empty(segments), num_rows + num_fresh * PAGE,
        source[source >= 0], to[source >= 0], new_to,
    )  # fmt: skip


def _first_changes(
    held: Segments,
    time_us_N: Array,
    key_n: Array,
    time_us_n: Array,
    going_us: Sequence[tuple[int, int]],
    buckets: Array | None,
) -> Array:
    """[K] A place before which no row goes or comes; the count where none does."""
    tensors, times_N = SegmentTensors(held, "cpu"), torch.from_numpy(time_us_N)

    def count_before(key: Array, moment_us: Array | int) -> Array:
        moment = torch.as_tensor(moment_us)
        return tensors.count_before(times_N, torch.from_numpy(key), moment).numpy()

    low_K = held.count.copy()
    for start_us, end_us in going_us:
        may_go = held.newest_us >= start_us
        if buckets is not None:
            may_go &= np.isin(held.bucket, buckets)
        key = np.flatnonzero(may_go)
        first, last = count_before(key, start_us), count_before(key, end_us)
        low_K[key] = np.minimum(low_K[key], np.where(first < last, first, held.count[key]))
    earliest_us = np.full(len(held), np.iinfo(np.int64).max)
    np.minimum.at(earliest_us, key_n, time_us_n)
    key = np.unique(key_n)
    low_K[key] = np.minimum(low_K[key], count_before(key, earliest_us[key]))
    return low_K


def _without_empty(held: Segments) -> Segments:
    is_left = held.count > 0
    if is_left.all():
        return held
    num_pages = held.num_pages
    pages = held.pages[np.repeat(is_left, num_pages)]
    first_page = np.cumsum(num_pages * is_left) - num_pages * is_left
    table = replace(held, first_page=first_page).table[:, is_left]
    return Segments.of_table(table, pages, held.base)


def _ragged(first: Array, count: Array) -> Array:
    """[sum of counts] first, first + 1, ... for each of many, one after the other."""
    start = np.cumsum(count) - count
    return np.arange(int(count.sum())) + np.repeat(first - start, count)
