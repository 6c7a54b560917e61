"""The synthetic world's event log, with the best possible predictions beside it.

Its laws: `synthetic_world`. The bound for who does not see past contexts: `synthetic_bound`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from pipelines.days import midnight, to_us
from pipelines.sources.sample import Sample
from pipelines.sources.synthetic_bound import base_probability
from pipelines.sources.synthetic_world import (
    DAYS,
    USERS_PER_BLOCK,
    Array,
    Laws,
    Showings,
    World,
    draw,
    oracle_logit,
    sigmoid,
)

log = logging.getLogger(__name__)

TRUTH = ("oracle_probability", "base_probability")
"""The best predictions with and without past contexts: beside the events, never a feature."""
FIRST_DAY = date(2026, 1, 1)
LAST_SHARE = 0.2
UTC_TIME = pa.timestamp("us", tz="UTC")


def write(path: Path, sample: Sample) -> None:
    """The world's events as Parquet in time order, TRUTH included; logs the Bayes-optimal AUC."""
    wanted = {"num_users": sample.limit_users, "days": sample.days}
    world = World(seed=sample.seed, **{name: n for name, n in wanted.items() if n is not None})
    rows = pa.concat_tables(events(world, progress=True)).sort_by(
        [("event_time", "ascending"), ("user_id", "ascending"), ("item_id", "ascending")]
    )
    pq.write_table(rows, path, compression="zstd")
    for line in describe(bayes_auc(rows)):
        log.info(line)


def events(world: World, *, progress: bool = False) -> Iterator[pa.Table]:
    """The world's event log, a block of users at a time."""
    laws = Laws.of(world)
    num_blocks = -(-world.num_users // USERS_PER_BLOCK)
    for block in tqdm(
        range(num_blocks), desc="synthetic world", unit="block", disable=not progress
    ):
        showings, chance = draw(world, laws, block, horizon=max(world.days, DAYS))
        oracle = sigmoid(oracle_logit(world, laws, showings))
        label = chance < oracle
        base = base_probability(world, laws, showings, label)
        truth = dict(zip(TRUTH, (oracle, base), strict=True))
        yield _rows(world, laws, showings, label, truth, first_user=block * USERS_PER_BLOCK)


def bayes_auc(rows: pa.Table) -> dict[str, dict[str, float]]:
    """AUC of the best predictor with (`oracle`) and without (`base`) past contexts.

    On `all` rows and on the `last_fifth` of time.
    """
    days = np.asarray(pc.cast(pc.cast(rows["event_time"], pa.date32()), pa.int32()))
    is_last = days >= days.min() + (1 - LAST_SHARE) * (days.max() + 1 - days.min())
    label = rows["label"].to_numpy() == 1
    found = {}
    for name, kept in (("all", np.ones(len(rows), bool)), ("last_fifth", is_last)):
        scores = {
            c.removesuffix("_probability"): auc(label[kept], rows[c].to_numpy()[kept])
            for c in TRUTH
        }
        found[name] = {
            "rows": int(kept.sum()),
            "positive_share": float(label[kept].mean()),
            **scores,
        }
    return found


def describe(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The figures of `bayes_auc` as lines for people."""
    return [
        f"synthetic world, {name.replace('_', ' ')}: {at['rows']:,} rows, "
        f"Bayes-optimal AUC {at['oracle']:.4f}; without past contexts {at['base']:.4f}"
        for name, at in found.items()
    ]


def auc(label: Array, score: Array) -> float:
    """Area under the ROC curve; ties count half."""
    _, rank, size = np.unique(score, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(size) - (size - 1) / 2
    num_positives = int(label.sum())
    above = mean_rank[rank][label].sum() - num_positives * (num_positives + 1) / 2
    return float(above / (num_positives * (len(label) - num_positives)))


def _rows(
    world: World,
    laws: Laws,
    showings: Showings,
    label: Array,
    truth: Mapping[str, Array],
    *,
    first_user: int,
) -> pa.Table:
    """The real showings of the wanted users and days as a table, one row each."""
    is_wanted = showings.is_real.copy()
    is_wanted[world.num_users - first_user :] = False
    is_wanted[:, world.days :] = False
    user, day, request, _ = np.nonzero(is_wanted)
    item = showings.item[is_wanted]
    start_us = to_us(midnight(FIRST_DAY))
    time_us = start_us + (day * 86_400 + showings.second[user, day, request]) * 1_000_000
    columns: dict[str, Array | pa.Array] = {
        "user_id": first_user + user,
        "item_id": item,
        "request_id": (first_user + user) * 1_000_000 + day * showings.second.shape[2] + request,
        "event_time": pa.array(time_us).cast(UTC_TIME),
        "label": label[is_wanted].astype(np.int8),
        "department": laws.department[item],
        "brand": laws.brand[item],
        "segment": showings.segment[user],
        "offer": showings.offer[is_wanted],
        "discount": showings.discount[is_wanted],
        "placement": showings.placement[is_wanted],
        **{name: values[is_wanted] for name, values in showings.noise.items()},
        **{name: values[is_wanted] for name, values in truth.items()},
    }
    return pa.table(columns)
