"""What a fetch does on the CPU, compiled: where users' pasts end, and what their newest rows hold.

The rows before a moment lie together (in pages of PAGE rows, where they came after the index was
built), so that a sequence is copied piece by piece and at the speed of the memory, its masks and
gaps in the same pass. Tokens are written past the caches: a store into a cache first reads the
memory that it is about to replace, which took half of the time. A thread does a part of a batch by
itself: PyTorch's threads meet after each operation, and a core that another process needs for a
moment makes all of them wait.

The plain path, in `user_index.py` and `segments.py`, says what these must give bit for bit.

Shape legend: B requests, L sequence length, D token width, K keys, G pages, N rows of the arrays.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from numba.np.arrayobj import make_array
from torch import Tensor

from downstream.segments import PAGE, Array, SegmentTensors
from downstream.token_store import Tokens

STEPS = 65_536
"""Of sequences, that a thread handles at a time."""
QUERIES = 1024
"""That a thread searches for at a time."""
TOGETHER = 8
"""Of them, whose searches wait for memory at the same time."""
VECTOR = 4
"""Words of eight bytes that one store writes past the caches; it is aligned to as much."""


def positions(
    held: SegmentTensors, times_N: Tensor, query_B: Tensor, moment_B: Tensor
) -> tuple[Tensor, Tensor]:
    """(key_B, num_B): each query's place among the keys (-1: not there), and how many of its rows
    are before the moment. Fastest where queries come in order of (key, moment)."""
    key_B, num_B = torch.empty_like(query_B), torch.empty_like(query_B)
    asked = (query_B.numpy(), moment_B.numpy(), key_B.numpy(), num_B.numpy())
    keys, count, times = held.key_K.numpy(), held.count.numpy(), times_N.numpy()
    where = _arrays(held)

    def search(part: slice) -> None:
        _positions(keys, count, *where, times, *(x[part] for x in asked))

    _each_part(search, len(query_B), QUERIES)
    return key_B, num_B


def newest(
    held: SegmentTensors, times_N: Tensor, key_B: Tensor, num_B: Tensor, moment_B: Tensor,
    token_ND: Tensor, available_us_N: Tensor, sides: dict[str, tuple[Tensor, Tensor | None]],
    found: Tokens,
) -> None:  # fmt: skip
    """Write the last rows of each key's first `num`, left-padded, into what a fetch gives.

    sides: by name, a column [N] and, of a label, when each value became known.
    """
    num, length = found.row_BL.shape
    where, times, available = _arrays(held), times_N.numpy(), available_us_N.numpy()
    tokens, words = _words(token_ND)
    out_tokens, _ = _words(found.token_BLD)
    row_bytes = words * tokens.itemsize
    is_aligned = (row_bytes | out_tokens.ctypes.data) % (8 * VECTOR) == 0
    copy_tokens = _stream_tokens if is_aligned else _tokens
    of_requests = (key_B.numpy(), num_B.numpy(), moment_B.numpy())
    outs = tuple(
        x.numpy() for x in (found.row_BL, found.mask_BL, found.token_mask_BL, found.gap_s_BL)
    )
    columns = [
        (column_N.numpy(), None if known is None else known.numpy(), found.side[name].numpy())
        for name, (column_N, known) in sides.items()
    ]

    def copy(part: slice) -> None:
        key, asked, moment = (x[part] for x in of_requests)
        row_BL, mask_BL, token_mask_BL, gap_s_BL = (x[part] for x in outs)
        pieces = _pieces(*where, key, asked, length)
        _events(pieces, times, available, moment, row_BL, mask_BL, token_mask_BL, gap_s_BL)
        if words:
            size = length * words
            here = out_tokens[part.start * size : part.stop * size]
            copy_tokens(pieces, tokens, words, token_mask_BL, here)
        for column, known, out_BL in columns:
            if known is None:
                _side(pieces, column, out_BL[part])
            else:
                _label(pieces, column, known, moment, out_BL[part])

    _each_part(copy, num, max(1, STEPS // max(length, 1)))


def _arrays(held: SegmentTensors) -> tuple[Any, ...]:
    """Where rows are. PAGE goes with them: Numba keeps what it has compiled, with the constants of
    then, until this file changes, and PAGE stands in another."""
    tensors = (held.begin, held.built, held.first_page, held.pages)
    return (*(x.numpy() for x in tensors), held.base, PAGE)


def _words(tokens: Tensor) -> tuple[Array, int]:
    """Tokens as one row of numbers to copy, and how many of them a token has."""
    row_bytes = tokens.shape[-1] * tokens.element_size()
    unit = np.int64 if row_bytes % 8 == 0 else np.uint8
    flat = tokens.numpy().reshape(-1).view(unit)
    return flat, row_bytes // np.dtype(unit).itemsize


def _each_part(do: Callable[[slice], None], num: int, size: int) -> None:
    """Each `size` of `num`, on as many threads as PyTorch has; the first error is raised."""
    of = [slice(at, min(at + size, num)) for at in range(0, num, size)]
    threads = min(torch.get_num_threads(), len(of))
    todo = iter(of)

    def work() -> None:
        for part in todo:
            do(part)

    others = [_pool(threads).submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        other.result()


@cache
def _pool(num: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(num, "fetch")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of these threads


@njit(nogil=True, cache=True)
def _positions(
    key_K, count_K, begin_K, built_K, first_page_K, page_G, base, page_size, time_N, query_B,
    moment_B, key_B, num_B,
):  # fmt: skip
    _find(key_K, query_B, key_B)
    _count_built(begin_K, built_K, time_N, moment_B, key_B, num_B)
    for at in range(len(query_B)):
        place, moment = key_B[at], moment_B[at]
        if place < 0:
            continue
        num, count, built = num_B[at], count_K[place], built_K[place]
        if num == built and count > built:
            # All rows in one piece are before the moment: how many pages begin before it?
            first = first_page_K[place]
            low, high = 0, (count - built + page_size - 1) // page_size
            while low < high:
                middle = (low + high) // 2
                if time_N[base + page_G[first + middle] * page_size] < moment:
                    low = middle + 1
                else:
                    high = middle
            if low:
                row = base + page_G[first + low - 1] * page_size
                before = (low - 1) * page_size
                num += before
                for of in range(min(page_size, count - built - before)):
                    num += time_N[row + of] < moment
            num_B[at] = num


@njit(nogil=True, cache=True)
def _find(key_K, query_B, key_B):
    place = 0
    for at in range(len(query_B)):
        query = query_B[at]
        if at and query < query_B[at - 1]:
            place = 0
        # From the place before on, in steps that double: near, where queries are sorted.
        step = 1
        while place + step < len(key_K) and key_K[place + step] < query:
            place += step
            step *= 2
        place = _first_not_below(key_K, place, min(place + step, len(key_K)), query)
        is_there = place < len(key_K) and key_K[place] == query
        key_B[at] = place if is_there else -1


@njit(nogil=True, cache=True)
def _count_built(begin_K, built_K, time_N, moment_B, key_B, num_B):
    """How many of a key's rows that lie in one piece are before the moment.

    Some are searched for together, a step of each at a time: the processor then waits for the
    memory of all of them at once, and guesses no branch.
    """
    low_T, size_T = np.empty(TOGETHER, np.int64), np.empty(TOGETHER, np.int64)
    for first in range(0, len(key_B), TOGETHER):
        num = min(TOGETHER, len(key_B) - first)
        most = 0
        for of in range(num):
            place = key_B[first + of]
            size_T[of] = built_K[place] if place >= 0 else 0
            low_T[of] = begin_K[place] if size_T[of] else 0
            most = max(most, size_T[of])
        while most > 1:
            most -= most >> 1
            for of in range(num):
                half, low = size_T[of] >> 1, low_T[of]
                is_before = time_N[low + half - (half > 0)] < moment_B[first + of]
                low_T[of] = low + half * is_before
                size_T[of] -= half
        for of in range(num):
            if key_B[first + of] < 0:
                num_B[first + of] = 0
                continue
            low = low_T[of]
            is_last_before = size_T[of] > 0 and time_N[low] < moment_B[first + of]
            begin = begin_K[key_B[first + of]] if size_T[of] else low
            num_B[first + of] = low - begin + is_last_before


@njit(nogil=True, cache=True)
def _first_not_below(value_N, low, high, bound):
    while low < high:
        middle = (low + high) // 2
        if value_N[middle] < bound:
            low = middle + 1
        else:
            high = middle
    return low


@njit(nogil=True, cache=True)
def _pieces(
    begin_K, built_K, first_page_K, page_G, base, page_size, key_B, num_B, length
):  # fmt: skip
    """[P, 4] Request, step, row and number of rows that follow one another; row -1: padding."""
    found = np.empty((len(key_B) * (length // page_size + 4), 4), np.int64)
    num_pieces = 0
    for at in range(len(key_B)):
        key, num = max(key_B[at], 0), num_B[at]
        step, place = 0, num - length
        while step < length:
            beyond = place - built_K[key]
            if place < 0:
                row, size = -1, -place
            elif beyond < 0:
                row, size = begin_K[key] + place, -beyond
            else:
                page = page_G[first_page_K[key] + beyond // page_size]
                row, size = (
                    base + page * page_size + beyond % page_size,
                    page_size - beyond % page_size,
                )
            size = min(size, length - step)
            found[num_pieces] = at, step, row, size
            num_pieces += 1
            step += size
            place += size
    return found[:num_pieces]


@njit(nogil=True, cache=True)
def _events(pieces, time_N, available_N, moment_B, row_BL, mask_BL, token_mask_BL, gap_s_BL):
    for at, step, row, size in pieces:
        moment = moment_B[at]
        rows, masks = row_BL[at, step : step + size], mask_BL[at, step : step + size]
        token_masks = token_mask_BL[at, step : step + size]
        gaps_s = gap_s_BL[at, step : step + size]
        masks[:] = row >= 0
        if row < 0:
            rows[:] = -1
            token_masks[:] = False
            gaps_s[:] = 0
            continue
        times, available = time_N[row : row + size], available_N[row : row + size]
        for of in range(size):
            rows[of] = row + of
        for of in range(size):
            token_masks[of] = available[of] < moment
        for of in range(size):
            gaps_s[of] = (moment - times[of]) / 1e6


@njit(nogil=True, cache=True)
def _tokens(pieces, token_X, words, token_mask_BL, out_X):
    length = token_mask_BL.shape[1]
    for at, step, row, size in pieces:
        to = (at * length + step) * words
        out = out_X[to : to + size * words]
        if row < 0:
            out[:] = 0
            continue
        out[:] = token_X[row * words : (row + size) * words]
        for of in range(size):
            if not token_mask_BL[at, step + of]:
                out[of * words : (of + 1) * words] = 0


@intrinsic
def _stream(typing, to_X, to, from_X, at, is_kept):
    """Write VECTOR words of an array, or as many zeros, into another past the caches."""

    def build(context, builder, signature, args):
        vector = ir.VectorType(ir.IntType(64), VECTOR)

        def pointer(array, index):
            data = make_array(signature.args[array])(context, builder, args[array]).data
            return builder.bitcast(builder.gep(data, [args[index]]), vector.as_pointer())

        loaded = builder.load(pointer(2, 3), align=8)
        value = builder.select(builder.trunc(args[4], ir.IntType(1)), loaded, vector(None))
        stored = builder.store(value, pointer(0, 1), align=8 * VECTOR)
        once = builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)])
        stored.set_metadata("nontemporal", once)
        return context.get_dummy_value()

    return types.void(to_X, types.intp, from_X, types.intp, types.boolean), build


@intrinsic
def _fence(typing):
    """What was written past the caches is there for other threads."""

    def build(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), build


@njit(nogil=True, cache=True)
def _stream_tokens(pieces, token_X, words, token_mask_BL, out_X):
    length = token_mask_BL.shape[1]
    for at, step, row, size in pieces:
        to, begin = (at * length + step) * words, max(row, 0) * words
        for of in range(size):
            is_kept = token_mask_BL[at, step + of]
            for word in range(of * words, (of + 1) * words, VECTOR):
                _stream(out_X, to + word, token_X, begin + word, is_kept)
    _fence()


@njit(nogil=True, cache=True)
def _side(pieces, column_N, out_BL):
    for at, step, row, size in pieces:
        if row < 0:
            out_BL[at, step : step + size] = 0
        else:
            out_BL[at, step : step + size] = column_N[row : row + size]


@njit(nogil=True, cache=True)
def _label(pieces, column_N, known_N, moment_B, out_BL):
    for at, step, row, size in pieces:
        out = out_BL[at, step : step + size]
        if row < 0:
            out[:] = 0
            continue
        moment = moment_B[at]
        values, known = column_N[row : row + size], known_N[row : row + size]
        for of in range(size):
            is_known = (values[of] >= 0) & (known[of] < moment)
            out[of] = (values[of] + 1) * is_known
