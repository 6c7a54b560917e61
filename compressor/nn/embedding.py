"""Hashed ids -> embedding rows -> vectors, for every slot of a feature layout in one gather.

A `Vocabulary` keeps a row for each bucket that its days hold, so tables are as large as the data,
not as the hash
space. A row's initial vector depends on the seed, its table and its bucket alone: rows that later
days add
move nothing that was there before. Row 0 is "missing or never seen": a zero vector that is never
trained.
Shape legend: B rows, S id slots, F fields, E embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from pipelines.features import Ints

Int64s = npt.NDArray[np.int64]

DENSE = 16
"""Ids of fewer buckets than this many times their number are looked up in a table of all buckets,
which takes no sorting."""


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The buckets each embedding table holds rows for; a table's rows follow those of the tables
    before it."""

    buckets: Mapping[str, Ints]

    @classmethod
    def empty(cls) -> Vocabulary:
        return cls({})

    def extended(self, slot_tables: Sequence[str], ids: Ints) -> Vocabulary:
        """With rows for every bucket in `ids` [n, S] too."""
        found = dict(self.buckets)
        for slot, table in enumerate(slot_tables):
            old = found.get(table, np.zeros(0, np.int32))
            found[table] = np.union1d(old, _distinct(ids[:, slot])).astype(np.int32)
        return Vocabulary(dict(sorted(found.items())))

    def union(self, other: Vocabulary) -> Vocabulary:
        """With the other's buckets too."""
        empty = np.zeros(0, np.int32)
        return Vocabulary(
            {
                table: np.union1d(
                    self.buckets.get(table, empty), other.buckets.get(table, empty)
                ).astype(np.int32)
                for table in sorted({*self.buckets, *other.buckets})
            }
        )

    @property
    def num_rows(self) -> int:
        """Rows of all tables, row 0 counted."""
        return 1 + sum(len(b) for b in self.buckets.values())

    def rows(self, slot_tables: Sequence[str], ids: Ints) -> Ints:
        """Buckets [n, S] as rows [n, S]; 0 where missing or never seen."""
        starts = self.starts()
        out = np.zeros(ids.shape, np.int32)
        for slot, table in enumerate(slot_tables):
            buckets = self.buckets.get(table)
            if buckets is None or not len(buckets):
                continue
            held = ids[:, slot]
            num = 1 + max(int(held.max(initial=0)), int(buckets[-1]))
            if num <= DENSE * len(held):
                row_of = np.zeros(num, np.int32)
                row_of[buckets] = np.arange(starts[table], starts[table] + len(buckets))
                out[:, slot] = row_of[held]
                continue
            at = np.minimum(np.searchsorted(buckets, held), len(buckets) - 1)
            out[:, slot] = np.where(buckets[at] == held, starts[table] + at, 0)
        return out

    def starts(self) -> dict[str, int]:
        """The first row of each table."""
        at, found = 1, {}
        for table, buckets in self.buckets.items():
            found[table] = at
            at += len(buckets)
        return found

    def rows_of(self, older: Vocabulary) -> Tensor:
        """Where each row of an older vocabulary, which holds no other buckets, is in this one."""
        starts = self.starts()
        parts = [np.zeros(1, np.int64)]
        parts += [starts[t] + np.searchsorted(self.buckets[t], b) for t, b in older.buckets.items()]
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    def row_keys(self) -> Int64s:
        """One number per row that names its table and bucket whatever else the vocabulary holds;
        row 0 is 0."""
        parts = [np.zeros(1, np.int64)]
        parts += [
            _table_hash(t) * np.int64(1 << 31) + b.astype(np.int64) for t, b in self.buckets.items()
        ]
        return np.concatenate(parts)


def _distinct(ids: Ints) -> Ints:
    """The buckets among `ids`, ascending, without 0."""
    num = 1 + int(ids.max(initial=0))
    if num > DENSE * len(ids):
        seen = np.unique(ids)
        return seen[seen > 0]
    is_there = np.zeros(num, bool)
    is_there[ids] = True
    is_there[0] = False
    return np.flatnonzero(is_there).astype(np.int32)


def _table_hash(table: str) -> np.int64:
    value = 0
    for byte in table.encode():
        value = (value * 1_000_003 + byte) % (1 << 31)
    return np.int64(value + 1)


def initial_rows(keys: Int64s, width: int, *, seed: int, std: float) -> Tensor:
    """[len(keys), width] uniform values of deviation `std`, each a function of (seed, key,
    column); key 0 gives zeros."""
    with np.errstate(over="ignore"):
        state = keys.astype(np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)
        state = state + np.arange(1, width + 1, dtype=np.uint64) * np.uint64(0xBF58476D1CE4E5B9)
        state = state ^ np.uint64((seed + 1) * 0x94D049BB133111EB % 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
        state ^= state >> np.uint64(31)
    unit = (state >> np.uint64(11)).astype(np.float64) / 2**53
    values = (2 * unit - 1) * std * np.sqrt(3)
    values[keys == 0] = 0
    return torch.from_numpy(values.astype(np.float32))


class EmbeddingBank(nn.Module):
    """All tables of a vocabulary in one matrix: rows [..., S] -> vectors [..., S, E]."""

    def __init__(self, vocabulary: Vocabulary, width: int, *, seed: int, std: float) -> None:
        super().__init__()
        self.width = width
        rows_RE = initial_rows(vocabulary.row_keys(), width, seed=seed, std=std)
        self.table = nn.Embedding(len(rows_RE), width, padding_idx=0, _weight=rows_RE)

    def forward(self, rows_BS: Tensor) -> Tensor:
        return self.table(rows_BS)


class FieldPooling(nn.Module):
    """Slot vectors [..., S, E] -> field vectors [..., F, E]: the mean over a field's filled slots,
    zeros if none."""

    slot_field_SF: Tensor

    def __init__(self, slot_fields: Sequence[int]) -> None:
        super().__init__()
        num_fields = max(slot_fields) + 1 if slot_fields else 0
        matrix_SF = torch.zeros(len(slot_fields), num_fields)
        if slot_fields:
            matrix_SF[torch.arange(len(slot_fields)), torch.tensor(slot_fields)] = 1
        self.is_identity = len(slot_fields) == num_fields
        self.register_buffer("slot_field_SF", matrix_SF, persistent=False)

    def forward(self, vectors_BSE: Tensor, rows_BS: Tensor) -> Tensor:
        if self.is_identity:
            return vectors_BSE
        matrix_SF = self.slot_field_SF.to(vectors_BSE.dtype)
        count_BF = (rows_BS != 0).to(vectors_BSE.dtype) @ matrix_SF
        return (
            torch.einsum("...se,sf->...fe", vectors_BSE, matrix_SF)
            / count_BF.clamp(min=1)[..., None]
        )


class NumberEncoder(nn.Module):
    """Numbers [..., N] (NaN: missing) -> [..., 3 N]: the value, its bounded form and a missing
    flag."""

    def __init__(self, num_numbers: int) -> None:
        super().__init__()
        self.width = 3 * num_numbers

    def forward(self, numbers_BN: Tensor) -> Tensor:
        is_missing_BN = torch.isnan(numbers_BN)
        value_BN = numbers_BN.nan_to_num(0.0).clamp(-10, 10)
        return torch.cat([value_BN, torch.tanh(value_BN), is_missing_BN.to(value_BN.dtype)], dim=-1)
