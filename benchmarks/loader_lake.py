"""A random log for the loader's benchmark, without Spark: samples in a Delta table, histories and
tokens as an index in memory.

Users have as many events each, so that nearly every history is full; a request shows two or three
items. Ids are buckets as Spark would hash them: far apart, few of them taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from downstream.index_arrays import ItemArrays, LineArrays
from downstream.segments import Segments
from downstream.user_index import IN_MEMORY, UserIndex
from pipelines import delta, tables
from pipelines.days import Days, as_date
from pipelines.domain import Domain, Feature

DAY_US = 86_400_000_000
FIRST_DAY, SAMPLED_DAY, END_DAY = 20_454, 20_544, 20_554
"""Since 1970: 90 days of events, then 10 that also hold samples."""
WIDTH = 64
NUM_ITEMS = 1200
NUM_VALUES = 50
"""Of any other categorical feature."""

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Log:
    """What is drawn of a log: the same for the same sizes and seed."""

    domain: Domain
    user_ids: Array
    item_ids: Array
    events_a_user: int
    seed: int = 0

    @classmethod
    def of(cls, domain: Domain, *, num_users: int, events_a_user: int) -> Log:
        draw = np.random.default_rng(1)
        user_ids = np.sort(draw.choice(2**62, num_users, replace=False))
        return cls(domain, user_ids, draw.choice(2**62, NUM_ITEMS, replace=False), events_a_user)

    def buckets(self, feature: Feature) -> Array:
        """[values] The buckets that a feature's values are hashed to."""
        draw = np.random.default_rng([2, *feature.name.encode()])
        num = {"item": NUM_ITEMS, "user": len(self.user_ids)}.get(feature.name, NUM_VALUES)
        return draw.integers(1, feature.buckets, num).astype(np.int32)

    def index(self) -> UserIndex:
        """Histories with a token each, published at the next midnight, and item tokens of a few
        days."""
        draw, num = np.random.default_rng([3, self.seed]), len(self.user_ids) * self.events_a_user
        span_us = (FIRST_DAY * DAY_US, END_DAY * DAY_US)
        time_us = draw.integers(*span_us, (len(self.user_ids), self.events_a_user))
        time_us = np.sort(time_us, axis=1).flatten()
        item = draw.integers(0, NUM_ITEMS, num)
        token = np.empty((num, WIDTH), np.float16)
        for some in np.array_split(np.arange(num), max(1, num // 1_000_000)):
            token[some[0] : some[-1] + 1] = draw.standard_normal((len(some), WIDTH), np.float32)
        items = np.sort(self.item_ids)
        item_days = np.arange(FIRST_DAY, END_DAY, 10)
        num_rows = len(items) * len(item_days)
        index = UserIndex.from_arrays(
            user_id=np.repeat(self.user_ids, self.events_a_user),
            event_time_us=time_us,
            item_id=self.item_ids[item],
            side={
                f.stream_column: self.buckets(f)[item % len(self.buckets(f))]
                for f in self.domain.side_features
            },
            labels={
                label.name: (draw.integers(0, 2, num), time_us + 5) for label in self.domain.labels
            },
            tokens=LineArrays(
                token,
                (time_us // DAY_US + 1) * DAY_US,
                ItemArrays(
                    Segments.of(items, np.full(len(items), len(item_days))),
                    np.tile(item_days * DAY_US, len(items)),
                    draw.standard_normal((num_rows, WIDTH), np.float32),
                    np.ones(num_rows, np.float32),
                ),
            ),
        )
        names = [f.stream_column for f in self.domain.side_features]
        assert [*index.lines] == [IN_MEMORY]
        assert index.meta.match == names
        return index

    def samples(self, num_samples: int) -> pa.Table:
        """At least so many rows of `ranker_samples`, in no order."""
        draw = np.random.default_rng([4, self.seed])
        num_requests = -(-num_samples * 2 // 5)
        request = np.repeat(np.arange(num_requests), 2 + np.arange(num_requests) % 2)
        num, user = len(request), draw.integers(0, len(self.user_ids), num_requests)
        as_of_us = draw.integers(SAMPLED_DAY * DAY_US, END_DAY * DAY_US, num_requests)
        item = draw.integers(0, NUM_ITEMS, num)
        columns: dict[str, Any] = {
            "instance_id": draw.permutation(num),
            "user_id": self.user_ids[user][request],
            "item_id": self.item_ids[item],
            "request_id": draw.permutation(num_requests)[request],
            "as_of": as_of_us[request],
            "is_sampled": np.zeros(num, bool),
            "event_date": (as_of_us // DAY_US)[request].astype(np.int32),
        }
        for label in self.domain.labels:
            columns[f"label_{label.name}"] = draw.integers(0, 2, num).astype(np.int8)
            columns[f"label_time_{label.name}"] = as_of_us[request] + DAY_US // 24
        for f in self.domain.features:
            is_shared = f.side in ("user", "context")
            if f.is_number:
                value = draw.standard_normal(num_requests if is_shared else num, np.float32)
            elif f.side == "user":
                value = self.buckets(f)[user % len(self.buckets(f))]
            elif f.side == "item":
                value = self.buckets(f)[item % len(self.buckets(f))]
            else:
                value = draw.choice(self.buckets(f), num_requests if is_shared else num)
            columns[f.stream_column] = value[request] if is_shared else value
        schema = tables.ranker_samples(self.domain).schema
        of = {name: pa.array(columns[name]).cast(schema.field(name).type) for name in schema.names}
        return pa.table(of, schema)

    def write(self, lake: str, num_samples: int) -> Days:
        """The samples as a table of the lake, a commit of all their days; returns these."""
        days = Days(as_date(SAMPLED_DAY), as_date(END_DAY))
        rows = self.samples(num_samples)
        delta.replace(lake, tables.ranker_samples(self.domain), rows, days, commit={"job": "bench"})
        return days
