"""A domain file that changes: an added feature evolves the lake, a changed one is refused."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from compressor import data as streams
from compressor.configs import SourceConfig, TrainingConfig
from compressor.walk import Trainer, walk
from downstream.batch import RankerBatch
from downstream.configs import RankerConfig, arm
from downstream.data import RankerData
from downstream.user_index import IndexStore, UserIndex
from jobs.oracle import Oracle
from jobs.spark import SparkTables
from pipelines import delta, tables
from pipelines.days import Days, as_number
from pipelines.domain import Domain, Feature
from pipelines.errors import InputError
from pipelines.histories import histories
from pipelines.instances import accepted, checked
from pipelines.negatives import with_negatives
from pipelines.samples import ranker_samples
from pipelines.temporal_order import model_ready, temporal_order
from pipelines.user_order import user_order
from pipelines.written import last_written
from tests.jobs.test_backfill import one, status, versions
from tests.jobs.test_build_jobs import (
    ALL,
    FIRST,
    LOG,
    NEGATIVES,
    Row,
    Shop,
    clicks,
    content,
    days_flags,
    done,
    iat,
    us,
)

LAST = FIRST + timedelta(days=3)
OLD, NEW = Days(FIRST, FIRST + timedelta(days=2)), Days(FIRST + timedelta(days=2), LOG.end)
ADDED = {
    "brand": 'column = "brand"\nside = "item"\nbuckets = 64',
    "tags": 'column = "tags"\nside = "item"\nkind = "multi-category"\nbuckets = 64',
    "weight": 'column = "weight"\nkind = "number"',
    "coupon": 'column = "coupon"\nside = "event"\nknown = "after"\nbuckets = 16',
}
MORE = pa.schema([(name, pa.float64() if name == "weight" else pa.string()) for name in ADDED])
COMMIT = {"job": "test"}
DOMAIN_MORE = f"{NEGATIVES}\nlimits = {{max_quarantined_share = 0.5}}"


def log() -> list[Row]:
    """Clicks, some of them logged twice, and not alike."""
    rows = clicks()
    return [*rows, *({**row, "price": 77.0} for row in rows[::5])]


def with_features(shop: Shop, features: dict[str, str]) -> Shop:
    """The shop's file with more features, over a log that has their columns (null in old days)."""
    text = "".join(f'[[feature]]\nname = "{name}"\n{rest}\n' for name, rest in features.items())
    shop.write(log(), more=DOMAIN_MORE)
    table = pq.read_table(shop.log)
    at = np.asarray(table.column("shown_at"))
    is_new = at >= us(NEW.start) - 9 * 3_600_000_000
    for number, field in enumerate(MORE):
        values = [float(n % 7) if field.type == pa.float64() else f"a{n % 5}|b{n % (3 + number)}"
                  for n in range(len(table))]  # fmt: skip
        kept = pa.array([v if new else None for v, new in zip(values, is_new, strict=True)])
        table = table.append_column(field, kept.cast(field.type))
    pq.write_table(table, shop.log)
    Path(shop.file).write_text(Path(shop.file).read_text() + text)
    return shop


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("old")).write(log(), more=DOMAIN_MORE)


@pytest.fixture(scope="module")
def new(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return with_features(Shop(tmp_path_factory.mktemp("new")), ADDED)


@pytest.fixture(scope="module")
def evolved(
    spark: SparkSession, old: Shop, new: Shop, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """Two days of the old file, then two of the new one."""
    lake = str(tmp_path_factory.mktemp("evolved") / "lake")
    done("build", old, lake, *days_flags(OLD))
    done("build", new, lake, *days_flags(NEW))
    return lake


@pytest.fixture(scope="module")
def at_once(spark: SparkSession, new: Shop, tmp_path_factory: pytest.TempPathFactory) -> str:
    """All days of the new file, through the same transformations and the other door."""
    lake = str(tmp_path_factory.mktemp("at_once") / "lake")
    domain = new.domain
    events = spark.read.parquet(str(new.log))
    rows = with_negatives(accepted(checked(events, domain, LOG), domain), domain).cache()
    ready = model_ready(rows, domain)
    made = {
        tables.instances: rows,
        tables.temporal_order: temporal_order(rows, domain),
        tables.user_order: user_order(ready, domain),
        tables.histories: histories(ready, domain),
        tables.ranker_samples: ranker_samples(ready, domain),
    }
    for make, found in made.items():
        delta.replace(lake, make(domain), found.toArrow(), LOG, commit=COMMIT)
    rows.unpersist()
    return lake


def test_an_evolved_lake_is_the_lake_built_at_once(
    spark: SparkSession, evolved: str, at_once: str, new: Shop
) -> None:
    found, wanted = content(evolved, new.domain), content(at_once, new.domain)
    assert found == wanted
    samples = found["ranker_samples/shop"]
    old_days = [r for r in samples if r["event_date"] in OLD]
    assert {(r["f_brand"], tuple(r["f_tags"]), r["f_weight"]) for r in old_days} == {(0, (), None)}
    assert any(r["f_brand"] and r["f_tags"] and r["f_weight"] for r in samples)
    instances = [r for r in found["instances/shop"] if r["event_date"] in OLD]
    assert {(r["f_brand"], r["f_tags"], r["f_coupon"]) for r in instances} == {(None,) * 3}
    for make in (tables.instances, tables.user_order):
        table = make(new.domain)
        rows = SparkTables(spark, evolved).read(table).toArrow().cast(table.schema)
        order = [(name, "ascending") for name in ("event_date", *table.sort_by)]
        assert rows.sort_by(order).to_pylist() == delta.read(evolved, table).to_pylist()


def test_old_days_keep_their_files_and_are_right(evolved: str, new: Shop) -> None:
    said = status(new, evolved)[1]
    for group in ("instances", "streams", "samples"):
        assert f"{group}: 4 of 4 days right" in said
    assert "0 of 4 days to write" in done("backfill", new, evolved, "--dry-run").out
    for make in ALL:
        written = last_written(evolved, make(new.domain))
        opened = delta.open_table(evolved, make(new.domain), written[FIRST].version)
        assert "f_brand" not in delta.stored_meanings(opened)


def test_a_file_without_the_new_features_reads_on_and_writes_no_more(
    spark: SparkSession, evolved: str, old: Shop
) -> None:
    table = tables.instances(old.domain)
    assert len(delta.read(evolved, table)) == SparkTables(spark, evolved).read(table).count()
    for command in ("build-instances", "build-streams", "build-samples", "backfill"):
        said = iat(command, old, evolved, "--dry-run")
        assert said.code == 2
        assert "feature 'brand' is stored and the domain file has it no longer" in said.err


def test_a_feature_that_no_day_has_yet_reads_as_missing(
    spark: SparkSession, evolved: str, new: Shop
) -> None:
    color = Feature(name="color", column="color", side="item")
    table = tables.histories(replace(new.domain, features=(*new.domain.features, color)))
    for rows in (delta.read(evolved, table), SparkTables(spark, evolved).read(table).toArrow()):
        assert set(rows.column("f_color").to_pylist()) == {0}
        assert set(rows.column("f_brand").to_pylist()) > {0}


def batch_of(lake: str, domain: Domain, folder: Path) -> RankerBatch:
    """A ranker's batch of all days, over an index with all logged fields."""
    index = UserIndex.build(lake, domain, folder, days=None, fields=True)
    rows = delta.read(lake, tables.ranker_samples(domain))
    data = RankerData.load(rows, domain, IndexStore(index, None), fields=True)
    config = arm("end-to-end", RankerConfig(history_length=8))
    return data.batch(data.of_days(as_number(FIRST), as_number(LOG.end)), config)


def tensors_of(batch: RankerBatch) -> dict[str, torch.Tensor]:
    held = batch._asdict() | batch.histories["main"]._asdict()
    return {name: value for name, value in held.items() if isinstance(value, torch.Tensor)}


def test_a_ranker_reads_both_days_as_if_built_at_once(
    evolved: str, at_once: str, new: Shop, tmp_path: Path
) -> None:
    lakes = {"evolved": evolved, "at_once": at_once}
    found, wanted = (
        tensors_of(batch_of(lake, new.domain, tmp_path / name)) for name, lake in lakes.items()
    )
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert (found["field_ids_RLS"] > 0).any()


@pytest.mark.parametrize("make", [tables.user_order, tables.temporal_order])
def test_a_compressor_learns_from_both_days_as_if_built_at_once(
    make: Callable[[Domain], tables.Table], evolved: str, at_once: str, new: Shop
) -> None:
    torch.set_num_threads(1)
    results = []
    for lake in (evolved, at_once):
        rows = delta.read(lake, make(new.domain))
        vocabulary = streams.vocabulary_of(rows, new.domain)
        data = streams.load(rows, new.domain, vocabulary)
        config = SourceConfig(width=16, num_tokens=4, depth=1, bottleneck=8, sit_layers=1, heads=2)
        trainer = Trainer.create(config, TrainingConfig(), new.domain, vocabulary, "cpu")
        results.append(list(walk(trainer, data, [*map(as_number, LOG)])))
    for found, wanted in zip(*results, strict=True):
        np.testing.assert_array_equal(found.token, wanted.token)
        np.testing.assert_array_equal(found.score, wanted.score)
    assert np.isfinite(results[0][-1].loss)


def test_the_oracle_reads_old_days_as_missing(evolved: str, new: Shop) -> None:
    """It reads the tables apart from `delta.scan`: no readable value has two buckets."""
    domain = new.domain
    for empty in (tables.instance_tokens("shop"), tables.item_tokens("shop")):
        delta.replace(evolved, empty, empty.schema.empty_table(), LOG, commit=COMMIT, line="x")
    versions_table = tables.compressor_versions()
    rows = versions_table.schema.empty_table()
    delta.replace(evolved, versions_table, rows, None, commit=COMMIT, line="x")
    oracle = Oracle(evolved, domain, "x")
    oracle.choose(None, 10_000, 0)
    found, wrong = oracle.buckets()
    assert wrong.to_pylist() == []
    assert found["f_brand"][None] == 0  # type: ignore[index]


CHANGES = {
    "kind": ("brand", {"kind": "sequence"}, 'kind = "category"', 'kind = "sequence"'),
    "buckets": ("brand", {"buckets": 128}, "buckets = 64", "buckets = 128"),
    "table": ("brand", {"table": "makers"}, 'table = "brand"', 'table = "makers"'),
    "side": ("brand", {"side": "context"}, 'side = "item"', 'side = "context"'),
    "known": ("brand", {"known": "after"}, 'known = "request"', 'known = "after"'),
    "max_length": ("tags", {"max_length": 4}, "max_length = 8", "max_length = 4"),
    "scale": ("weight", {"scale": 2.0}, "scale = 1.0", "scale = 2.0"),
    "transform": ("weight", {"transform": "log"}, 'transform = "none"', 'transform = "log"'),
    "derive": ("brand", {"column": "", "derive": "hour"}, "no derive", 'derive = "hour"'),
}


def changed(domain: Domain, name: str, more: dict[str, Any]) -> Domain:
    features = tuple(replace(f, **more) if f.name == name else f for f in domain.features)
    return replace(domain, features=features)


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_meaning_is_neither_written_nor_read(
    change: str, spark: SparkSession, evolved: str, new: Shop
) -> None:
    name, more, stored, came = CHANGES[change]
    domain = changed(new.domain, name, more)
    table = tables.instances(domain)
    before = versions(evolved, new.domain)
    empty = table.schema.empty_table()
    through_spark = SparkTables(spark, evolved)
    attempts: list[Callable[[], object]] = [
        lambda: delta.check_features(evolved, table),
        lambda: delta.read(evolved, table),
        lambda: delta.replace(evolved, table, empty, one(LAST), commit=COMMIT),
        lambda: through_spark.read(table),
        lambda: through_spark.replace(
            table,
            spark.createDataFrame(empty.to_pandas(), _schema(table)),
            one(LAST),
            commit=COMMIT,
        ),
    ]
    for attempt in attempts:
        with pytest.raises(InputError) as caught:
            attempt()
        said = str(caught.value)
        assert f"feature {name!r} was stored with" in said
        assert said.index(stored) < said.index("domain file now says") < said.index(came)
        assert "give the domain another `name`" in said
    assert versions(evolved, new.domain) == before


def _schema(table: tables.Table) -> Any:
    from pyspark.sql.pandas.types import from_arrow_schema

    return from_arrow_schema(table.schema)


def test_a_re_bucketed_feature_stops_every_build_before_it_starts(
    evolved: str, tmp_path: Path
) -> None:
    brand = ADDED["brand"].replace("64", "128")
    other = with_features(Shop(tmp_path), ADDED | {"brand": brand})
    before = versions(evolved, other.domain)
    for command in ("build-instances", "build-streams", "build-samples", "backfill", "build"):
        said = iat(command, other, evolved)
        assert said.code == 2
        assert "feature 'brand' was stored with buckets = 64" in said.err
    assert versions(evolved, other.domain) == before


def test_a_renamed_column_is_no_schema_change_but_its_days_are_stale(
    spark: SparkSession, evolved: str, tmp_path: Path
) -> None:
    renamed = ADDED | {"brand": ADDED["brand"].replace('"brand"', '"maker"')}
    other = with_features(Shop(tmp_path), renamed)
    assert "would build" in done("build-samples", other, evolved, "--dry-run").out
    said = status(other, evolved)[1]
    assert "instances: 2 of 4 days right, 2 feature brand changed" in said


@pytest.mark.parametrize(
    ("was", "becomes", "why"),
    [
        ('path = "log.parquet"', 'path = "moved/log.parquet"', None),
        ('name = "shop"', 'name = "shop"\ntitle = "A shop"', None),
        ("per_positive = 2}", "per_positive = 2}\ntokens = {delay = '1h'}", None),
        ("per_positive = 2", "per_positive = 3", "domain file changed"),
        ('column = "clicked"', 'column = "clicked"\ndelay = "1h"', "domain file changed"),
        ('user = "visitor"', 'user = "title"', "domain file changed"),
        ('format = "parquet"', 'format = "csv"', "domain file changed"),
        ("share = 0.5", "share = 0.6", None),
        ("share = 0.5", 'share = 0.5, latest = "2026-01-03"', "domain file changed"),
    ],
)  # fmt: skip
def test_what_makes_days_stale(
    was: str, becomes: str, why: str | None, evolved: str, new: Shop, tmp_path: Path
) -> None:
    text = Path(new.file).read_text()
    assert text.count(was) == 1
    (tmp_path / "shop.toml").write_text(text.replace(was, becomes))
    said = status(Shop(tmp_path), evolved)[1]
    for group in ("instances", "streams", "samples"):
        expected = "4 of 4 days right\n" if why is None else f"0 of 4 days right, 4 {why}\n"
        assert f"{group}: {expected}" in said


def rows_of(table: tables.Table, day: date, bucket: int) -> pa.Table:
    columns = {name: pa.nulls(1, table.schema.field(name).type) for name in table.schema.names}
    columns |= {"event_date": pa.array([day]), "f_brand": pa.array([bucket], pa.int32())}
    kept = {name: columns[name] for name in table.schema.names}
    return pa.table(kept, schema=table.schema)


def race(lake: str, writers: list[tuple[tables.Table, date, int]], through: Any) -> list[str]:
    """What each writer met, all of them starting at once in a table of the old file's day."""

    def write(given: tuple[tables.Table, date, int]) -> str:
        try:
            through(*given)
        except InputError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(writers)) as pool:
        return list(pool.map(write, writers))


@pytest.mark.parametrize("door", ["spark", "delta-rs"])
def test_writers_that_race_while_one_evolves_the_table_lose_no_day(
    door: str, spark: SparkSession, lake: str, old: Shop, new: Shop
) -> None:
    first, table = tables.histories(old.domain), tables.histories(new.domain)
    delta.replace(lake, first, rows_of(first, FIRST, 0), one(FIRST), commit=COMMIT)
    days = [FIRST + timedelta(days=n + 1) for n in range(2 if door == "spark" else 5)]

    def write(table: tables.Table, day: date, bucket: int) -> None:
        rows = rows_of(table, day, bucket)
        if door == "delta-rs":
            delta.replace(lake, table, rows, one(day), commit=COMMIT)
        else:
            frame = spark.createDataFrame(rows.to_pandas(), _schema(table))
            SparkTables(spark, lake).replace(table, frame, one(day), commit=COMMIT)

    assert race(lake, [(table, day, n + 1) for n, day in enumerate(days)], write) == [""] * len(
        days
    )
    found = delta.read(lake, table, columns=["f_brand", "event_date"])
    assert found.column("event_date").to_pylist() == [FIRST, *days]
    assert found.column("f_brand").to_pylist() == [*range(len(days) + 1)]


@pytest.mark.parametrize("number", range(5))
def test_of_two_meanings_that_race_one_is_refused_whole(
    number: int, lake: str, old: Shop, new: Shop
) -> None:
    first = tables.histories(old.domain)
    delta.replace(lake, first, rows_of(first, FIRST, 0), one(FIRST), commit=COMMIT)
    wide = changed(new.domain, "brand", {"buckets": 128})
    made = [tables.histories(new.domain), tables.histories(wide)] * 2
    writers = [(table, FIRST + timedelta(days=n + 1), n + 1) for n, table in enumerate(made)]

    def write(table: tables.Table, day: date, bucket: int) -> None:
        delta.replace(lake, table, rows_of(table, day, bucket), one(day), commit=COMMIT)

    said = race(lake, writers, write)
    winner = (made[0] if not said[0] else made[1]).meanings
    for (table, _, _), error in zip(writers, said, strict=True):
        assert ("was stored with buckets" in error) == (table.meanings != winner)
    right = [(table, n) for table, _, n in writers if table.meanings == winner]
    held = delta.read(lake, right[0][0]).column("f_brand").to_pylist()
    assert held == [0, *(n for _, n in right)]


def test_a_writer_of_the_old_file_that_is_overtaken_by_a_new_one_is_refused(
    lake: str, old: Shop, new: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, table = tables.histories(old.domain), tables.histories(new.domain)
    delta.replace(lake, first, rows_of(first, FIRST, 0), one(FIRST), commit=COMMIT)
    evolve = delta.evolve

    def overtaken(lake: str, asked: tables.Table, *, commit: dict[str, str]) -> DeltaTable:
        opened = evolve(lake, asked, commit=commit)
        evolve(lake, table, commit=commit)
        return opened

    monkeypatch.setattr(delta, "evolve", overtaken)
    with pytest.raises(InputError, match="'brand' is stored and the domain file has it no longer"):
        delta.replace(lake, first, rows_of(first, LAST, 0), one(LAST), commit=COMMIT)
    assert delta.read(lake, table).column("event_date").to_pylist() == [FIRST]
