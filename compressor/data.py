"""A stream of model-ready instances as device-resident arrays, and the units that training draws
from it.

Rows are user-major: a user's rows together, in (event_time, instance_id) order. An event is a row
that really happened
(not a sampled negative): events become tokens, all rows are predicted. A unit is a user and a
range of that user's rows
(one day in the streaming protocol): its rows are the targets, the user's newest events before them
the context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from compressor.nn.embedding import Vocabulary
from pipelines.domain import Domain
from pipelines.features import FeatureLayout, arrays, times_us

DAY_US = 86_400_000_000
Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class StreamData:
    """Rows [n], user-major; feature rows are vocabulary rows."""

    instance_id: Int64s
    user_id: Int64s
    item_id: Int64s
    time_us: Int64s
    day: Int64s
    is_event: npt.NDArray[np.bool_]
    event_before: Int64s
    """Events among all rows before this one; event e is row events[e]."""
    events: Int64s
    user_start: Int64s
    """First row of this row's user."""
    next_first: Int64s
    next_count: Int64s
    """Per event: the first event and the number of events of the user's next request (count 0:
    none)."""
    tensors: StreamTensors

    def __len__(self) -> int:
        return len(self.time_us)

    def day_units(self, days: Sequence[int] | None = None) -> Int64s:
        """[num_units, 2] row ranges, one per (user, day), ordered by day then user; `days` keeps
        some."""
        cut = np.flatnonzero(np.diff(self.user_start, prepend=-1) | np.diff(self.day, prepend=-1))
        units = np.stack([cut, np.append(cut[1:], len(self))], axis=1).reshape(-1, 2)
        units = units[np.lexsort((units[:, 0], self.day[units[:, 0]]))] if len(units) else units
        return units if days is None else units[np.isin(self.day[units[:, 0]], np.asarray(days))]

    def user_units(self, first_day: int, last_day: int, max_rows: int) -> Int64s:
        """Row ranges that cut each user's rows in [first_day, last_day) into pieces of at most
        about `max_rows`, at day borders."""
        pieces: list[tuple[int, int]] = []
        for begin, end in self.day_units(range(first_day, last_day))[
            np.argsort(self.day_units(range(first_day, last_day))[:, 0])
        ]:
            if (
                pieces
                and pieces[-1][1] == begin
                and self.user_start[begin] == self.user_start[pieces[-1][0]]
                and end - pieces[-1][0] <= max_rows
            ):
                pieces[-1] = (pieces[-1][0], int(end))
            else:
                pieces.append((int(begin), int(end)))
        return np.asarray(pieces, np.int64).reshape(-1, 2)


@dataclass(frozen=True, slots=True)
class StreamTensors:
    """What batches gather from, on the device."""

    rows_NS: Tensor
    numbers_NM: Tensor
    after_rows_NS: Tensor
    after_numbers_NM: Tensor
    label_N: Tensor
    """0, 1 or NaN (unknown)."""
    label_time_N: Tensor
    time_N: Tensor
    is_event_N: Tensor
    event_before_N: Tensor
    events_E: Tensor
    user_start_N: Tensor
    next_first_E: Tensor
    next_count_E: Tensor


def load(
    rows: pa.Table, domain: Domain, vocabulary: Vocabulary, device: torch.device | str = "cpu"
) -> StreamData:
    """Stream rows (either order) as arrays; ids the vocabulary lacks read as never seen."""
    rows = rows.sort_by([(name, "ascending") for name in ("user_id", "event_time", "instance_id")])
    request, after = (
        FeatureLayout.of(domain, known="request"),
        FeatureLayout.of(domain, known="after"),
    )
    at_request, afterwards = arrays(rows, request), arrays(rows, after)
    user_id = rows.column("user_id").to_numpy()
    time_us = times_us(rows, "event_time")
    is_event = ~rows.column("is_sampled").to_numpy()
    starts = (
        np.flatnonzero(np.diff(user_id, prepend=user_id[0] - 1))
        if len(user_id)
        else np.zeros(0, np.int64)
    )
    user_start = np.repeat(starts, np.diff(np.append(starts, len(user_id))))
    events = np.flatnonzero(is_event)
    next_first, next_count = _next_requests(user_start[events], time_us[events])
    label = (
        rows.column(f"label_{domain.label.name}").to_numpy(zero_copy_only=False).astype(np.float32)
    )

    def tensor(values: npt.NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.array(values)).to(device)

    event_before = np.cumsum(is_event) - is_event
    tensors = StreamTensors(
        rows_NS=tensor(vocabulary.rows(request.slot_tables, at_request.ids)),
        numbers_NM=tensor(at_request.numbers),
        after_rows_NS=tensor(vocabulary.rows(after.slot_tables, afterwards.ids)),
        after_numbers_NM=tensor(afterwards.numbers),
        label_N=tensor(label),
        label_time_N=tensor(times_us(rows, f"label_time_{domain.label.name}")),
        time_N=tensor(time_us),
        is_event_N=tensor(is_event),
        event_before_N=tensor(event_before),
        events_E=tensor(events),
        user_start_N=tensor(user_start),
        next_first_E=tensor(next_first),
        next_count_E=tensor(next_count),
    )
    return StreamData(
        instance_id=rows.column("instance_id").to_numpy(),
        user_id=user_id,
        item_id=rows.column("item_id").to_numpy(),
        time_us=time_us,
        day=time_us // DAY_US,
        is_event=is_event,
        event_before=event_before,
        events=events,
        user_start=user_start,
        next_first=next_first,
        next_count=next_count,
        tensors=tensors,
    )


def vocabulary_of(rows: pa.Table, domain: Domain, start: Vocabulary | None = None) -> Vocabulary:
    """Rows for every id that these stream rows hold."""
    layout = FeatureLayout.of(domain)
    return (start or Vocabulary.empty()).extended(layout.slot_tables, arrays(rows, layout).ids)


def _next_requests(user: Int64s, time_us: Int64s) -> tuple[Int64s, Int64s]:
    """Per event (user-major): where the user's next, strictly later, instant starts and how many
    events it has."""
    if not len(user):
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    starts = np.flatnonzero(np.diff(user, prepend=user[0] - 1) | np.diff(time_us, prepend=-1))
    sizes = np.diff(np.append(starts, len(user)))
    has_next = np.append(user[starts[1:]] == user[starts[:-1]], False)
    next_first = np.append(starts[1:], 0)
    next_count = np.where(has_next, np.append(sizes[1:], 0), 0)
    return np.repeat(next_first, sizes), np.repeat(next_count, sizes)
