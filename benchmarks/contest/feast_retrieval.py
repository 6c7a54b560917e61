"""Feast: `get_historical_features` from a file offline store, the newest event of each sample.

Its rule is "at or before", so each sample asks a microsecond, which is the tables' resolution,
before its as_of. A feature view holds one moment a row, and gives what was the newest then:
whether that event's token and label were known is seen from their own times, afterwards. It drops
samples of the same user and moment, so it is asked for each pair once, and of events of the same
instant it takes any, so it is given the last of each.
The store is the one that DuckDB runs: the default one, which Dask runs, is slower. Either
joins each sample with its user's whole past, and keeps the newest row.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.types import Bytes, Int32, UnixTimestamp

from benchmarks.contest.world import World

NAME = "feast_retrieval"
FEATURES = {
    "at": UnixTimestamp, "f_a": Int32, "f_b": Int32, "label_buy": Int32,
    "label_time_buy": UnixTimestamp, "token": Bytes, "available_time": UnixTimestamp,
}  # fmt: skip


def prepare(world: World, length: int) -> None:
    """The last event of each instant of a user, its time twice: the view's own is not given."""
    folder = world.prepared(NAME)
    folder.mkdir(parents=True)
    rows = pq.read_table(world.events)
    user, time_us = rows["user_id"].to_numpy(), rows["event_time"].cast("int64").to_numpy()
    is_last = np.append((np.diff(user) != 0) | (np.diff(time_us) != 0), [True])
    rows = rows.filter(pa.array(is_last))
    rows = rows.append_column("at", rows["event_time"])
    pq.write_table(rows.drop_columns(["instance_id"]), folder / "events.parquet")


def ready(world: World, length: int) -> Callable[[Path], None]:
    if length != 1:
        raise ValueError(f"a feature view gives one row a sample: length {length}")
    folder = world.prepared(NAME)
    store = FeatureStore(
        config=RepoConfig(
            project="contest", provider="local", registry=str(folder / "registry.db"),
            online_store=None, offline_store={"type": "duckdb"}, entity_key_serialization_version=3,
        )
    )  # fmt: skip
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
    source = FileSource(path=str(folder / "events.parquet"), timestamp_field="event_time")
    view = FeatureView(
        name="events", entities=[user], source=source, ttl=timedelta(0), online=False,
        schema=[Field(name=name, dtype=kind) for name, kind in FEATURES.items()],
    )  # fmt: skip
    store.apply([user, view])
    samples = pd.read_parquet(world.samples)
    pairs = samples[["user_id", "as_of"]].drop_duplicates()
    pairs["event_timestamp"] = pairs.as_of - pd.Timedelta(microseconds=1)
    names = [f"events:{name}" for name in FEATURES]

    def answer(out: Path) -> None:
        found = store.get_historical_features(entity_df=pairs, features=names).to_df()
        found = samples.merge(found[found["at"].notna()], on=["user_id", "as_of"])
        is_known = found.label_buy.notna() & (found.label_time_buy < found.as_of)
        is_published = found.available_time < found.as_of
        rows = {
            "sample_id": found.sample_id,
            "event_time": found["at"],
            "f_a": found.f_a.astype("int32"),
            "f_b": found.f_b.astype("int32"),
            "label_buy": (found.label_buy + 1).where(is_known, 0).astype("int32"),
            "token": found.token.mask(~is_published),
        }
        table = pa.Table.from_pandas(pd.DataFrame(rows), preserve_index=False)
        pq.write_table(table, out, compression="lz4")

    return answer
