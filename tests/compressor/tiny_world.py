"""A world small enough to learn in seconds, in which labels depend on the context of past events.

A user sees two items a day. Each was shown under an `offer`, which leaves a mark of +1 or -1: of no
use to its own label, and all that the next day's labels depend on besides the item.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from compressor.data import DAY_US
from pipelines import tables
from pipelines.domain import Domain, parse

Array = npt.NDArray[Any]

FIRST_DAY, NUM_DAYS, NUM_OFFERS, NUM_ITEMS = 20_000, 16, 6, 12
CANDIDATES = 2
PULL = 3.0
"""Of the mean mark of the day before, in the label's logit."""


def world_domain() -> Domain:
    return parse(
        {
            "name": "tinyworld",
            "source": {"path": "x.parquet"},
            "columns": {"user": "u", "item": "i", "time": "t", "request": "r"},
            "label": [{"name": "click", "column": "y"}],
            "feature": [
                {"name": "item", "column": "i", "side": "item", "buckets": 64},
                {"name": "offer", "column": "o", "side": "event", "buckets": 16},
                {"name": "noise", "column": "n", "side": "context", "buckets": 16},
            ],
        }
    )


def world_rows(
    domain: Domain, *, num_users: int = 300, seed: int = 0, is_label_random: bool = False
) -> pa.Table:
    """Rows of the temporal-order stream; every user has CANDIDATES rows a day, at one instant."""
    random = np.random.default_rng(seed)
    shape = (num_users, NUM_DAYS, CANDIDATES)
    offer = random.integers(NUM_OFFERS, size=shape)
    item = random.integers(NUM_ITEMS, size=shape)
    mark = np.where(offer % 2 == 0, 1.0, -1.0).mean(axis=2)
    yesterday = np.concatenate([np.zeros((num_users, 1)), mark[:, :-1]], axis=1)
    logit = np.linspace(-1, 1, NUM_ITEMS)[item] + PULL * yesterday[:, :, None]
    label = random.random(shape) < (0.5 if is_label_random else 1 / (1 + np.exp(-logit)))
    user, day, _ = np.indices(shape)
    second = random.integers(86_400, size=shape[:2])
    noise = random.integers(1, 10, size=shape[:2])
    time_us = (FIRST_DAY + day) * DAY_US + second[:, :, None] * 1_000_000
    columns: dict[str, Array] = {
        "instance_id": np.arange(label.size),
        "user_id": user + 1,
        "item_id": item,
        "request_id": user * NUM_DAYS + day,
        "event_time": time_us,
        "is_sampled": np.zeros(shape, bool),
        "f_item": item + 1,
        "f_offer": offer + 1,
        "f_noise": np.broadcast_to(noise[:, :, None], shape),
        "label_click": label,
        "label_time_click": time_us,
        "event_date": FIRST_DAY + day,
    }
    schema = tables.temporal_order(domain).schema
    arrays = {}
    for name in schema.names:
        kind = schema.field(name).type
        plain = {pa.timestamp("us", tz="UTC"): pa.int64(), pa.date32(): pa.int32()}.get(kind)
        found = pa.array(columns[name].ravel()).cast(plain or kind)
        arrays[name] = found.cast(kind)
    return pa.table(arrays, schema=schema)
