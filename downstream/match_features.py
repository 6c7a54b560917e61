"""How often, and how lately, a candidate's item and each of its item fields are in the user's past.

Per field: log1p counts of exact matches among the user's last 100 events, last 256 and all; log1p
of the hours since the newest match (0 if there is none); 1 if there is none. Then log1p of the
number of past events. FINDINGS.md section 1.2, DESIGN.md section 8.

An index, not a scan: per field the events are sorted by (user and value, position in the user's
past), so a count is the distance of two binary searches: O(log N) whatever the past's length.

Shape legend: B candidates, N events, V values, P (user, value) pairs, M features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from downstream.segments import find
from downstream.user_index import IndexStore, UserIndex

ITEM = "item"
WINDOWS = (100, 256)
MOST = 2**63 - 1
AT_ONCE = 1 << 20
"""Candidates looked up at a time, which bounds the memory of a call."""


@dataclass(frozen=True)
class Matches:
    """One field's events, by (user, value)."""

    value_V: Tensor
    pair_P: Tensor
    """Sorted, unique: user row x V + the value's place."""
    first_P: Tensor
    """Where a pair's events begin in `at_N`; one more entry than pairs, their end."""
    at_N: Tensor
    """Sorted: the pair's place x stride + the position in the user's past."""
    stride: int

    @classmethod
    def of(
        cls, value_N: Tensor, user_N: Tensor, position_N: Tensor, stride: int, num_users: int
    ) -> Matches:
        """Of events [N] of users below `num_users`, at positions below `stride`."""
        value_V, value_place_N = _distinct(value_N)
        pair_N = user_N * len(value_V) + value_place_N
        if num_users * len(value_V) * stride > MOST:
            # Numbered without gaps, so that a pair and a position fit in one number.
            held_P, pair_N = _distinct(pair_N)
        else:
            held_P = None
        at_N = _sorted(pair_N * stride + position_N)
        pair_N = at_N // stride
        is_first_N = torch.ones(len(at_N), dtype=torch.bool, device=at_N.device)
        torch.ne(pair_N[1:], pair_N[:-1], out=is_first_N[1:])
        first_P = is_first_N.nonzero().squeeze(1)
        pair_P, place_N = pair_N[first_P], is_first_N.cumsum(0) - 1
        at_N += (place_N - pair_N) * stride
        first_P = torch.cat([first_P, first_P.new_tensor([len(at_N)])])
        return cls(value_V, pair_P if held_P is None else held_P, first_P, at_N, stride)

    def find(
        self, user_B: Tensor, value_B: Tensor, length_B: Tensor, windows: Sequence[int]
    ) -> tuple[list[Tensor], Tensor]:
        """Counts in each window and in all of the first `length` events; the newest one's position.

        The position is -1 where nothing matches.
        """
        value_place_B, has_value_B = find(self.value_V, value_B)
        pair_B, has_pair_B = find(self.pair_P, user_B * len(self.value_V) + value_place_B)
        is_found_B = has_value_B & has_pair_B & (user_B >= 0)
        start_B, first_B = pair_B * self.stride, self.first_P[pair_B]
        if not len(self.at_N):
            return [first_B] * (len(windows) + 1), torch.full_like(user_B, -1)
        stop_B = torch.searchsorted(self.at_N, start_B + length_B)
        stop_B = torch.where(is_found_B, stop_B, first_B)
        num_B = stop_B - first_B
        oldest_B = self.at_N[first_B.clamp(max=len(self.at_N) - 1)]
        newest_B = self.at_N[(stop_B - 1).clamp(min=0)]
        counts = []
        for window in windows:
            edge_B = start_B + (length_B - window).clamp(min=0)
            count_B = torch.where(newest_B < edge_B, 0, num_B)
            # Only where some matches are in the window and some are not, it takes a search.
            (split,) = ((oldest_B < edge_B) & (count_B > 0)).nonzero(as_tuple=True)
            count_B[split] = stop_B[split] - torch.searchsorted(self.at_N, edge_B[split])
            counts.append(count_B)
        return [*counts, num_B], torch.where(num_B > 0, newest_B - start_B, -1)


class MatchIndex:
    """Match features of candidates, on the device of the store whose histories it indexes."""

    def __init__(
        self, store: IndexStore, fields: Mapping[str, Matches], windows: Sequence[int]
    ) -> None:
        self.store, self.fields, self.windows = store, dict(fields), tuple(windows)

    @classmethod
    def build(
        cls,
        store: IndexStore | UserIndex,
        fields: Sequence[str] | None = None,
        windows: Sequence[int] = WINDOWS,
    ) -> MatchIndex:
        """Index the item and these side columns (None: the domain's match features).

        A missing value (0) of a side column is left out: it matches nothing.
        """
        if isinstance(store, UserIndex):
            store = IndexStore(store, None)
        users = store.index.users
        length_U = torch.from_numpy(users.count).to(store.device)
        first_U = length_U.cumsum(0) - length_U
        user_N = torch.repeat_interleave(torch.arange(len(length_U), device=store.device), length_U)
        position_N = torch.arange(len(user_N), device=store.device) - first_U[user_N]
        row_N = store.users.rows(user_N, position_N)
        stride = store.users.longest + 1
        item_N = store.columns["item_id"][row_N]
        num_users = len(users)
        found = {ITEM: Matches.of(item_N, user_N, position_N, stride, num_users)}
        for name in store.index.meta.match if fields is None else fields:
            value_N = store.columns[name][row_N].long()
            kept_N = value_N != 0
            found[name] = Matches.of(
                value_N[kept_N], user_N[kept_N], position_N[kept_N], stride, num_users
            )
        return cls(store, found, windows)

    @property
    def names(self) -> list[str]:
        """What each of the M features is."""
        windows = [*(f"last_{window}" for window in self.windows), "all", "hours", "never"]
        fields = [name.removeprefix("f_") for name in self.fields]
        return [*(f"{field}_{what}" for field in fields for what in windows), "history_length"]

    def features(
        self,
        user_ids: Tensor,
        as_of_us: Tensor,
        item_ids: Tensor,
        side: Mapping[str, Tensor],
        positions: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """[B, M] float32, from events strictly before as_of.

        Args:
            user_ids, as_of_us, item_ids: [B] int64.
            side: the candidate's value of every indexed side column, by its table's name, [B].
            positions: the store's of (user_ids, as_of_us), on its device, where they are known.
        """
        missing = [name for name in self.fields if name != ITEM and name not in side]
        if missing:
            raise ValueError(f"candidates need {', '.join(missing)}; got {', '.join(side) or '-'}")
        device = self.store.device
        user_ids, as_of_us, item_ids = (x.to(device) for x in (user_ids, as_of_us, item_ids))
        values = {name: side[name].to(device) for name in self.fields if name != ITEM}
        values = {ITEM: item_ids} | values
        out_BM = torch.empty(len(user_ids), len(self.names), device=device)
        # A user's candidates together: the searches then stay in the same few pages.
        for at in torch.argsort(user_ids).split(AT_ONCE):
            some = {name: value[at].long() for name, value in values.items()}
            if positions is None:
                user_B, length_B = self.store.positions(user_ids[at], as_of_us[at])
            else:
                user_B, length_B = (x[at] for x in positions)
            out_BM[at] = self._features(user_B, length_B, as_of_us[at], some)
        return out_BM

    def _features(
        self, user_B: Tensor, length_B: Tensor, as_of_us: Tensor, values: dict[str, Tensor]
    ) -> Tensor:
        columns = []
        for name, value_B in values.items():
            counts, newest_B = self.fields[name].find(user_B, value_B, length_B, self.windows)
            has_match_B = newest_B >= 0
            columns += [count_B.float().log1p() for count_B in counts]
            row_B = self.store.users.rows(user_B, newest_B)
            columns += [self._log_hours(row_B, has_match_B, as_of_us)]
            columns += [(~has_match_B).float()]
        columns.append(length_B.float().log1p())
        return torch.stack(columns, dim=1)

    def _log_hours(self, row_B: Tensor, is_there_B: Tensor, as_of_us: Tensor) -> Tensor:
        """log1p of the hours from the event at `row_B` to as_of; 0 where there is none."""
        times_N = self.store.columns["event_time_us"]
        if not len(times_N):
            return torch.zeros(len(row_B), device=row_B.device)
        gap_us_B = as_of_us - times_N[torch.where(is_there_B, row_B, 0)]
        return torch.where(is_there_B, gap_us_B.double() / 3.6e9, 0.0).log1p().float()


def _distinct(value_N: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted distinct values, and each value's place among them."""
    if value_N.device.type != "cpu":
        return torch.unique(value_N, return_inverse=True)
    # By a hash table: only what is distinct is sorted.
    held = pa.array(value_N.numpy()).dictionary_encode()
    value_V, place_N = np.array(held.dictionary), np.array(held.indices)
    order = np.argsort(value_V)
    place_V = np.empty(len(order), np.int64)
    place_V[order] = np.arange(len(order))
    return torch.from_numpy(value_V[order]), torch.from_numpy(place_V[place_N])


def _sorted(value_N: Tensor) -> Tensor:
    if value_N.device.type != "cpu":
        return torch.sort(value_N).values
    return torch.from_numpy(np.sort(value_N.numpy()))
