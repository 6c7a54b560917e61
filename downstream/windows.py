"""A fetch on the CPU at the speed of its memory: a user's newest rows are copied as one piece.

Rows of a user lie together, so that the L rows before a moment are a window of each array, and a
view in which row i is the L rows from i on has all windows of a batch as its rows: one
`index_select` copies them, each as one piece, on all threads. (Rows that came after the index was
built lie in pages of PAGE: those are copied first, then cut.) What a window holds before the user's
first row is another user's, and is overwritten.

The plain path, in `user_index.py` and `segments.py`, says what this must give bit for bit.

Shape legend: B requests (of a part), L sequence length, D token width, N rows of the arrays,
P pages that a window is cut from.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from threading import Barrier

import numpy as np
import torch
from torch import Tensor

from downstream.segments import PAGE, SegmentTensors

CACHED = 65_536
"""Values of a column that a thread handles at a time: they stay in its core's cache."""
SEARCHED = 16_384
"""Queries that a thread searches at a time."""


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Memory for a result. NumPy asks for huge pages, which come several times faster."""
    return torch.from_numpy(np.empty(shape, torch.empty(0, dtype=dtype).numpy().dtype))


def positions(
    held: SegmentTensors, times_N: Tensor, query_B: Tensor, moment_B: Tensor
) -> tuple[Tensor, Tensor]:
    """(key_B, num_B): each query's place among the keys (-1: not there), and how many of its rows
    are before the moment. Fastest where queries come in order of (key, moment)."""
    key_B, num_B = torch.empty_like(query_B), torch.empty_like(query_B)

    def search(part: slice) -> None:
        place, is_known = held.find(query_B[part])
        key_B[part] = torch.where(is_known, place, -1)
        num_B[part] = _count_before(held, times_N, place, moment_B[part]).mul_(is_known)

    each_part(search, [slice(at, at + SEARCHED) for at in range(0, len(query_B), SEARCHED)])
    return key_B, num_B


def _count_before(
    held: SegmentTensors, times_N: Tensor, key_B: Tensor, moment_B: Tensor
) -> Tensor:
    begin_B, built_B = held.begin[key_B], held.built[key_B]

    def time_at(row_B: Tensor) -> Tensor:
        return times_N.index_select(0, row_B)

    num_B = _lower_bound(time_at, begin_B, built_B, moment_B)
    if held.is_paged:
        # Whose rows in one piece are all before the moment go on in their pages.
        is_late_B = (num_B == built_B).logical_and_(held.count[key_B] > built_B)
        late = is_late_B.nonzero().squeeze(1)
        num_B[late] += _count_in_pages(held, times_N, key_B[late], moment_B[late])
    return num_B


def _count_in_pages(
    held: SegmentTensors, times_N: Tensor, key_B: Tensor, moment_B: Tensor
) -> Tensor:
    first_B, rows_B = held.first_page[key_B], held.count[key_B] - held.built[key_B]

    def row_at(page_B: Tensor) -> Tensor:
        return held.pages.index_select(0, page_B).long().mul_(PAGE).add_(held.base)

    num_B = _lower_bound(
        lambda page_B: times_N.index_select(0, row_at(page_B)),
        first_B, (rows_B + PAGE - 1) // PAGE, moment_B,
    )  # fmt: skip
    # Of the last page that begins before the moment, perhaps not all rows are.
    last_B = (num_B - 1).clamp_(min=0)
    step_P = torch.arange(PAGE)
    row_BP = row_at(first_B + last_B)[:, None] + step_P
    is_before_BP = times_N[row_BP] < moment_B[:, None]
    is_before_BP &= (last_B * PAGE)[:, None] + step_P < rows_B[:, None]
    return last_B * PAGE + is_before_BP.sum(dim=1)


def _lower_bound(
    value_at: Callable[[Tensor], Tensor], begin_B: Tensor, num_B: Tensor, bound_B: Tensor
) -> Tensor:
    """How many of each piece's `num` ascending values, from `begin` on, are below its bound.

    No branches: all queries take the steps of the longest piece.
    """
    before_B, left_B, half_B = begin_B - 1, num_B.clone(), torch.empty_like(num_B)
    for _ in range(int(num_B.max()).bit_length() if len(num_B) else 0):
        torch.add(left_B, 1, out=half_B).bitwise_right_shift_(1)
        is_below_B = value_at((before_B + half_B).clamp_(min=0)) < bound_B
        left_B.sub_(half_B)
        before_B.add_(half_B.mul_(is_below_B))
    return before_B.sub_(begin_B).add_(1)


@dataclass(frozen=True)
class Windows:
    """Where the newest rows of a part's requests are, and which of them are the requests' own."""

    start_B: Tensor
    """The first row of each window; 0 where it would be before the arrays."""
    page_BP: Tensor | None
    """The first row of each page that windows are cut from, at `start_B`; None: of the arrays."""
    row_BL: Tensor
    """-1 at padding."""
    is_padding_BL: Tensor | None
    """None: there is none."""
    early: Tensor
    """Requests whose window would begin before the arrays: their rows are taken one by one."""
    _kept: dict[torch.dtype, Tensor | None] = field(default_factory=dict)
    """By type, 0 at padding and 1 elsewhere: a product is several times faster than a mask."""

    @classmethod
    def of(
        cls, held: SegmentTensors, key_B: Tensor, num_B: Tensor, length: int, row_BL: Tensor
    ) -> Windows:
        """Writes `row_BL`, as `SegmentTensors.newest` gives it."""
        key_B = key_B.clamp(min=0)
        first_B = num_B - length
        step_L = torch.arange(length)
        is_padding_BL = None
        if int(first_B.min()) < 0:
            is_padding_BL = step_L < -first_B[:, None]
        page_BP = None
        built_B = held.built[key_B]
        if held.is_paged and bool((num_B > built_B).any()):
            beyond_B, bits = first_B - built_B, PAGE.bit_length() - 1
            block_BP = (beyond_B >> bits)[:, None] + torch.arange(length // PAGE + 2)
            page_BP = held.rows(key_B, built_B[:, None] + block_BP * PAGE)
            start_B = beyond_B & PAGE - 1
            paged_BX = (page_BP[..., None] + torch.arange(PAGE)).flatten(1)
            start_B = start_B + torch.arange(len(key_B)) * paged_BX.shape[1]
            _cut(paged_BX.flatten(), start_B, row_BL)
            is_early_B = page_BP.amin(dim=1) < 0
            page_BP.clamp_(min=0)
        else:
            start_B = held.begin[key_B] + first_B
            torch.add(start_B[:, None], step_L, out=row_BL)
            is_early_B = start_B < 0
            start_B = start_B.clamp_(min=0)
        if is_padding_BL is not None:
            row_BL.masked_fill_(is_padding_BL, -1)
        early = is_early_B.nonzero().squeeze(1)
        return cls(start_B, page_BP, row_BL, is_padding_BL, early)

    def take(self, column_N: Tensor, found_BL: Tensor) -> Tensor:
        """Write the column [N, ...] of the windows' rows; anything at padding."""
        if self.page_BP is None:
            _cut(column_N, self.start_B, found_BL)
        else:
            paged = column_N.new_empty(*self.page_BP.shape, PAGE, *column_N.shape[1:])
            _cut(column_N, self.page_BP.flatten(), paged.flatten(0, 1))
            _cut(paged.flatten(0, 2), self.start_B, found_BL)
        if len(self.early):
            row = self.row_BL[self.early].clamp_(min=0)
            found_BL[self.early] = column_N[row]
        return found_BL

    def mask(self, found_BL: Tensor) -> None:
        """Write where rows are the requests' own."""
        if self.is_padding_BL is None:
            found_BL.fill_(True)
        else:
            torch.logical_not(self.is_padding_BL, out=found_BL)

    def cleared(self, found_BL: Tensor) -> Tensor:
        """0 at padding, in place."""
        if found_BL.dtype not in self._kept:
            kept_BL = None
            if self.is_padding_BL is not None:
                kept_BL = self.is_padding_BL.logical_not().to(found_BL.dtype)
            self._kept[found_BL.dtype] = kept_BL
        kept_BL = self._kept[found_BL.dtype]
        return found_BL if kept_BL is None else found_BL.mul_(kept_BL)


def _cut(column_N: Tensor, start_B: Tensor, found_BL: Tensor) -> None:
    """found[b] = column[start[b] : start[b] + L], each copied as one piece."""
    length, inner = found_BL.shape[1], math.prod(column_N.shape[1:])
    view_SX = column_N.as_strided((len(column_N) - length + 1, length * inner), (inner, 1))
    torch.index_select(view_SX, 0, start_B, out=found_BL.view(len(start_B), length * inner))


def parts(num_requests: int, length: int) -> list[slice]:
    """A batch in parts."""
    size = max(1, CACHED // max(length, 1))
    return [slice(at, at + size) for at in range(0, num_requests, size)]


def each_part(do: Callable[[slice], None], of: Sequence[slice]) -> None:
    """`do` each part, on as many threads as PyTorch has; the first error is raised.

    PyTorch's own threads meet after every operation, and a core that another process needs for a
    moment makes all wait: here a thread does all of a part, and they meet once.
    """
    num, todo = min(torch.get_num_threads(), len(of)), iter(of)

    def work() -> None:
        for part in todo:
            do(part)

    if num <= 1:
        work()
        return
    for done in [_pool(torch.get_num_threads()).submit(work) for _ in range(num)]:
        done.result()


@cache
def _pool(num: int) -> ThreadPoolExecutor:
    """Threads in which an operation of PyTorch takes one thread, and no others."""
    pool, started = ThreadPoolExecutor(num, "fetch"), Barrier(num + 1)

    def start() -> None:
        torch.set_num_threads(1)
        started.wait()

    for _ in range(num):
        pool.submit(start)
    started.wait()
    # It is a thread's own number, but threads that begin later take the last one that was set.
    torch.set_num_threads(num)
    return pool


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of these threads


def clear_rows(found_BLD: Tensor, is_kept_BL: Tensor) -> None:
    """0 in the rows that are not kept, in place: no others are passed over."""
    num_bytes = found_BLD.shape[2] * found_BLD.element_size()
    rows = found_BLD.flatten(0, 1)
    if num_bytes % 8 == 0 and num_bytes:
        rows = rows.view(torch.int64)
    rows.index_fill_(0, is_kept_BL.logical_not().flatten().nonzero().squeeze(1), 0)
