"""Tokens of a user's past as of a moment: what a fetch returns, who can be asked, and a plain twin.

Every comparison with `as_of` is strict: an event, a publication or a label of the same microsecond
is the future (DESIGN.md section 5). Side columns keep their table's names: `f_<feature>` is a
bucket (0: missing), `label_<name>` reads 0 unknown, 1 negative, 2 positive.

Shape legend: B requests, L sequence length, D token width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pipelines.features import NEVER_US


class Tokens(NamedTuple):
    """The newest L events of each user strictly before as_of, oldest first, left-padded."""

    token_BLD: Tensor
    """As stored (float16 or float32); 0 where token_mask_BL is false."""
    mask_BL: Tensor
    """An event is there."""
    token_mask_BL: Tensor
    """Its token exists and was published before as_of; otherwise the event keeps its place."""
    gap_s_BL: Tensor
    """as_of - event_time, float32; 0 at padding."""
    side: dict[str, Tensor]
    """Name -> int32 [B, L]; 0 at padding."""
    row_BL: Tensor
    """The event's row in the index (user-major order); -1 at padding."""


class ItemTokens(NamedTuple):
    """The decayed mean token of each item from its newest row published before as_of."""

    token_BD: Tensor
    """float32; 0 where mask_B is false."""
    mask_B: Tensor
    count_B: Tensor
    """Decayed number of instances behind the mean, as of that row's day; float32."""


class TokenStore(Protocol):
    """Whoever can be asked for tokens by user and by item, as of a moment; bound to one line."""

    @property
    def width(self) -> int:
        """D; 0 for histories without tokens."""
        ...

    def fetch(self, user_ids: Tensor, as_of_us: Tensor, length: int) -> Tokens:
        """user_ids and as_of_us [B] int64; a user not known has an empty past."""
        ...

    def fetch_items(self, item_ids: Tensor, as_of_us: Tensor) -> ItemTokens:
        """item_ids and as_of_us [B] int64; an item not known has no token."""
        ...


@dataclass(frozen=True, kw_only=True)
class HistoryRow:
    """One past instance of a user with all that a fetch may show of it."""

    user_id: int
    event_time_us: int
    instance_id: int
    item_id: int = 0
    request_id: int = 0
    side: Mapping[str, int] = field(default_factory=dict)
    labels: Mapping[str, tuple[int | None, int]] = field(default_factory=dict)
    """Name without `label_` -> (0, 1 or None, label_time in us)."""
    token: Sequence[float] | None = None
    available_us: int = NEVER_US


@dataclass(frozen=True, kw_only=True)
class ItemRow:
    """An item's decayed sum of tokens and decayed count, readable from available_us on."""

    item_id: int
    available_us: int
    decayed_sum: Sequence[float]
    decayed_count: float


class InMemoryTokenStore:
    """A TokenStore over Python lists: slow, and plain enough to be right by reading it."""

    def __init__(
        self,
        rows: Iterable[HistoryRow],
        *,
        width: int,
        items: Iterable[ItemRow] = (),
        side: Sequence[str] = (),
        labels: Sequence[str] = (),
        dtype: torch.dtype = torch.float16,
    ) -> None:
        self.rows = sorted(rows, key=lambda r: (r.user_id, r.event_time_us, r.instance_id))
        self.items = list(items)
        self.width, self.side, self.labels, self.dtype = width, list(side), list(labels), dtype

    def fetch(self, user_ids: Tensor, as_of_us: Tensor, length: int) -> Tokens:
        num = len(user_ids)
        names = [*self.side, *(f"label_{name}" for name in self.labels)]
        found = Tokens(
            token_BLD=torch.zeros(num, length, self.width, dtype=self.dtype),
            mask_BL=torch.zeros(num, length, dtype=torch.bool),
            token_mask_BL=torch.zeros(num, length, dtype=torch.bool),
            gap_s_BL=torch.zeros(num, length),
            side={name: torch.zeros(num, length, dtype=torch.int32) for name in names},
            row_BL=torch.full((num, length), -1),
        )
        pairs = zip(user_ids.tolist(), as_of_us.tolist(), strict=True)
        for b, (user_id, as_of) in enumerate(pairs):
            past = [
                (i, row)
                for i, row in enumerate(self.rows)
                if row.user_id == user_id and row.event_time_us < as_of
            ]
            newest = past[max(0, len(past) - length) :]
            for at, (i, row) in enumerate(newest, start=length - len(newest)):
                found.mask_BL[b, at] = True
                found.row_BL[b, at] = i
                found.gap_s_BL[b, at] = (as_of - row.event_time_us) / 1e6
                if row.token is not None and row.available_us < as_of:
                    found.token_mask_BL[b, at] = True
                    found.token_BLD[b, at] = torch.tensor(row.token, dtype=self.dtype)
                for name in self.side:
                    found.side[name][b, at] = row.side.get(name, 0)
                for name in self.labels:
                    found.side[f"label_{name}"][b, at] = _label(row, name, as_of)
        return found

    def fetch_items(self, item_ids: Tensor, as_of_us: Tensor) -> ItemTokens:
        num = len(item_ids)
        token_BD = torch.zeros(num, self.width)
        mask_B = torch.zeros(num, dtype=torch.bool)
        count_B = torch.zeros(num)
        pairs = zip(item_ids.tolist(), as_of_us.tolist(), strict=True)
        for b, (item_id, as_of) in enumerate(pairs):
            past = [r for r in self.items if r.item_id == item_id and r.available_us < as_of]
            if past:
                newest = max(past, key=lambda r: r.available_us)
                mask_B[b] = True
                count_B[b] = newest.decayed_count
                token_BD[b] = torch.tensor(newest.decayed_sum) / count_B[b]
        return ItemTokens(token_BD, mask_B, count_B)


def _label(row: HistoryRow, name: str, as_of: int) -> int:
    """0 not known by then, 1 negative, 2 positive."""
    value, known_us = row.labels.get(name, (None, NEVER_US))
    return 0 if value is None or known_us >= as_of else 1 + value
