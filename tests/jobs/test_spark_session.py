"""The Spark session, and its two doors to the tables: whole days in, whole days out."""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from delta.exceptions import ConcurrentAppendException
from deltalake import DeltaTable
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.spark import MAX_TRIES, SparkTables, default_memory, retried, session
from pipelines import delta
from pipelines.days import Days
from pipelines.errors import InputError, RetryableError
from pipelines.tables import UTC_TIME, Table

VIEWS = Table(
    name="views/shop",
    schema=pa.schema(
        {
            "view_id": pa.int64(),
            "user_id": pa.int64(),
            "event_time": UTC_TIME,
            "price": pa.float32(),
            "tags": pa.list_(pa.int32()),
            "label": pa.int8(),
            "event_date": pa.date32(),
        }
    ),
    key=("view_id",),
    partition_by=("event_date",),
    sort_by=("user_id", "event_time", "view_id"),
)
JOB = {"job": "test", "run": "r1"}
FIRST = date(2026, 1, 1)


def day(number: int) -> Days:
    """The one day `number` days after the first."""
    start = FIRST + timedelta(days=number)
    return Days(start, start + timedelta(days=1))


def views(spark: SparkSession, *, num_days: int, per_day: int = 6, label: int = 0) -> DataFrame:
    """Rows in the wrong order, spread over partitions, with wider types than declared."""
    ids = spark.range(num_days * per_day).orderBy(F.desc("id")).repartition(3)
    when = F.timestamp_seconds(
        F.lit(int(datetime(2026, 1, 1, tzinfo=UTC).timestamp()))
        + (F.col("id") % num_days) * 86_400
        + F.floor(F.col("id") / num_days)
    )
    return ids.select(
        F.to_date(when).alias("event_date"),
        F.col("id").alias("view_id"),
        (F.col("id") * 7919 % 5).alias("user_id"),
        when.alias("event_time"),
        F.lit(1.5).cast("double").alias("price"),
        F.array(F.lit(1), F.lit(2)).cast("array<bigint>").alias("tags"),
        F.lit(label).alias("label"),
    )


@pytest.fixture
def tables(spark: SparkSession, lake: str) -> SparkTables:
    return SparkTables(spark, lake)


def labels_by_day(lake: str) -> dict[date, set[int]]:
    rows = delta.read(lake, VIEWS)
    found: dict[date, set[int]] = {}
    for when, label in zip(rows["event_date"].to_pylist(), rows["label"].to_pylist(), strict=True):
        found.setdefault(when, set()).add(label)
    return found


def test_a_session_speaks_utc_and_runs_this_python(spark: SparkSession) -> None:
    with_offset = "SELECT CAST(TIMESTAMP '2026-01-01 01:00:00+02:00' AS STRING)"
    assert spark.sql(with_offset).collect()[0][0] == "2025-12-31 23:00:00"
    versions = spark.range(1).rdd.map(lambda _: sys.executable).collect()
    assert versions == [sys.executable]


def test_a_process_has_one_session_and_never_leaves_its_master(spark: SparkSession) -> None:
    assert session("local[*]") is spark
    with pytest.raises(InputError, match=r"local\[2\].*spark://elsewhere:7077"):
        session("spark://elsewhere:7077")


def test_the_driver_gets_a_third_of_the_memory() -> None:
    installed_mb = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20
    megabytes = int(default_memory().removesuffix("m"))
    assert megabytes >= 2048
    assert megabytes <= max(2048, installed_mb / 3)


def test_what_spark_writes_reads_the_same_with_and_without_java(
    spark: SparkSession, tables: SparkTables, lake: str
) -> None:
    tables.replace(VIEWS, views(spark, num_days=2), Days(FIRST, date(2026, 1, 3)), commit=JOB)
    native = delta.read(lake, VIEWS)
    assert native.schema == VIEWS.schema
    assert native.num_rows == 12
    through_spark = tables.read(VIEWS).toArrow().select(VIEWS.schema.names)
    order = [("event_date", "ascending"), *((c, "ascending") for c in VIEWS.sort_by)]
    assert through_spark.cast(VIEWS.schema).sort_by(order).to_pylist() == native.to_pylist()


def test_what_was_written_without_java_is_read_and_replaced_by_spark(
    spark: SparkSession, tables: SparkTables, lake: str
) -> None:
    rows = views(spark, num_days=2).toArrow()
    delta.replace(lake, VIEWS, rows, Days(FIRST, date(2026, 1, 3)), commit=JOB)
    assert tables.read(VIEWS, day(1)).count() == 6
    second = views(spark, num_days=2, label=1).where("event_date = '2026-01-02'")
    tables.replace(VIEWS, second, day(1), commit=JOB)
    assert labels_by_day(lake) == {FIRST: {0}, date(2026, 1, 2): {1}}


def test_a_day_is_replaced_whole_in_any_order_and_twice(
    spark: SparkSession, tables: SparkTables, lake: str
) -> None:
    rows = views(spark, num_days=3)
    for number in (2, 0, 1, 0, 2):
        only = rows.where(F.col("event_date") == F.lit(day(number).start))
        tables.replace(VIEWS, only, day(number), commit=JOB)
    once = SparkTables(spark, f"{lake}-at-once")
    once.replace(VIEWS, rows, Days(FIRST, date(2026, 1, 4)), commit=JOB)
    assert delta.read(lake, VIEWS) == delta.read(once.lake, VIEWS)


def test_a_day_without_rows_is_empty_afterwards(
    spark: SparkSession, tables: SparkTables, lake: str
) -> None:
    rows = views(spark, num_days=2)
    tables.replace(VIEWS, rows, Days(FIRST, date(2026, 1, 3)), commit=JOB)
    tables.replace(VIEWS, rows.limit(0), day(0), commit=JOB)
    assert labels_by_day(lake) == {date(2026, 1, 2): {0}}


@pytest.mark.parametrize("is_first_write", [True, False])
def test_rows_of_another_day_are_refused_and_nothing_is_written(
    spark: SparkSession, tables: SparkTables, lake: str, is_first_write: bool
) -> None:
    rows = views(spark, num_days=2)
    if not is_first_write:
        tables.replace(VIEWS, rows, Days(FIRST, date(2026, 1, 3)), commit=JOB)
    before = delta.read(lake, VIEWS) if not is_first_write else VIEWS.schema.empty_table()
    with pytest.raises(InputError, match="rows outside"):
        tables.replace(VIEWS, rows.withColumn("label", F.lit(9)), day(0), commit=JOB)
    assert delta.read(lake, VIEWS) == before


def test_a_row_without_a_day_is_refused(spark: SparkSession, tables: SparkTables) -> None:
    rows = views(spark, num_days=1).withColumn("event_date", F.lit(None).cast("date"))
    with pytest.raises(InputError, match="rows outside"):
        tables.replace(VIEWS, rows, day(0), commit=JOB)


def test_the_commit_says_who_wrote_it(spark: SparkSession, tables: SparkTables, lake: str) -> None:
    version = tables.replace(VIEWS, views(spark, num_days=1), day(0), commit=JOB)
    commit = DeltaTable(f"{lake}/{VIEWS.name}").history(1)[0]
    days = {"start": str(day(0).start), "end": str(day(0).end)}
    assert json.loads(commit["userMetadata"]) == JOB | days
    assert commit["version"] == version
    kept = DeltaTable(f"{lake}/{VIEWS.name}").metadata().configuration
    assert kept["delta.logRetentionDuration"] == "interval 36500 days"


def test_a_day_is_one_sorted_file_in_small_row_groups(
    spark: SparkSession, tables: SparkTables, lake: str
) -> None:
    days = Days(FIRST, date(2026, 1, 3))
    tables.replace(VIEWS, views(spark, num_days=2, per_day=40_000), days, commit=JOB)
    files = DeltaTable(f"{lake}/{VIEWS.name}").file_uris()
    assert len(files) == 2
    for file in map(pq.ParquetFile, files):
        rows = file.read(list(VIEWS.sort_by))
        assert rows == rows.sort_by([(column, "ascending") for column in VIEWS.sort_by])
        groups = [file.metadata.row_group(n) for n in range(file.metadata.num_row_groups)]
        assert max(group.num_rows for group in groups) <= 32_768
        assert groups[0].column(0).compression == "ZSTD"


def test_a_large_day_is_written_by_several_tasks_that_keep_users_whole(
    spark: SparkSession, tables: SparkTables, lake: str
) -> None:
    rows = views(spark, num_days=1, per_day=100)
    tables.replace(VIEWS, rows, day(0), commit=JOB, files_per_day=3)
    files = DeltaTable(f"{lake}/{VIEWS.name}").file_uris()
    users = [set(pq.read_table(file)["user_id"].to_pylist()) for file in files]
    assert 1 < len(files) <= 3
    assert sum(map(len, users)) == len(set().union(*users))


def test_a_year_is_written_by_a_few_tasks_of_whole_days(
    spark: SparkSession, tables: SparkTables
) -> None:
    year = Days(FIRST, date(2027, 1, 2))
    rows = views(spark, num_days=366, per_day=2)
    arranged = tables._arranged(VIEWS, rows, year, 1)
    parts = arranged.select("event_date", F.spark_partition_id().alias("task")).distinct()
    tasks = [row["task"] for row in parts.collect()]
    assert len(tasks) == 366
    assert len(set(tasks)) <= 64
    assert max(map(tasks.count, set(tasks))) - min(map(tasks.count, set(tasks))) <= 1


@pytest.mark.parametrize(
    ("num_days", "files_per_day", "is_moved"), [(4, 1, False), (4, 2, True), (1, 1, True)]
)
def test_days_that_lie_a_file_each_are_made_where_they_are_read(
    spark: SparkSession,
    tables: SparkTables,
    lake: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    num_days: int,
    files_per_day: int,
    is_moved: bool,
) -> None:
    days = Days(FIRST, FIRST + timedelta(days=num_days))
    by_user = replace(VIEWS, name="views/by_user")
    rows = views(spark, num_days=num_days, per_day=3000)
    by_time = replace(VIEWS, sort_by=("event_time",))
    version = tables.replace(by_time, rows, days, commit=JOB, files_per_day=files_per_day)
    stored = tables.read(by_time, days, version=version)
    moved: list[Table] = []
    arranged = tables._arranged
    monkeypatch.setattr(
        tables, "_arranged", lambda table, *rest: moved.append(table) or arranged(table, *rest)
    )
    # By itself Spark cuts these files.
    cut = "spark.sql.files.maxPartitionBytes"
    before = spark.conf.get(cut)
    spark.conf.set(cut, "5000")
    try:
        assert stored.rdd.getNumPartitions() > num_days
        stored = tables.read(by_time, days, version=version)
        tables.replace(by_user, stored, days, commit=JOB, read_from=(by_time, version))
        assert spark.conf.get(cut) == "5000"
    finally:
        spark.conf.set(cut, before)
    assert bool(moved) == is_moved
    files = DeltaTable(f"{lake}/{by_user.name}").file_uris()
    assert len(files) == num_days
    for file in files:
        found = pq.read_table(file, columns=list(VIEWS.sort_by))
        assert found == found.sort_by([(column, "ascending") for column in VIEWS.sort_by])
    assert delta.read(lake, by_user) == delta.read(lake, VIEWS)


def test_a_line_is_replaced_without_touching_another(
    spark: SparkSession, tables: SparkTables, lake: str
) -> None:
    lined = replace(
        VIEWS,
        schema=VIEWS.schema.append(pa.field("compressor_line", pa.string())),
        partition_by=("compressor_line", "event_date"),
    )
    rows = views(spark, num_days=1).withColumn("compressor_line", F.lit("a"))
    for line, label in (("a", 1), ("b", 2), ("a", 3)):
        values = {"compressor_line": F.lit(line), "label": F.lit(label)}
        tables.replace(lined, rows.withColumns(values), day(0), commit=JOB, line=line)
    counts = tables.read(lined).groupBy("compressor_line", "label").count().collect()
    assert sorted(map(tuple, counts)) == [("a", 3, 6), ("b", 2, 6)]
    with pytest.raises(InputError, match="rows outside"):
        tables.replace(lined, rows, day(0), commit=JOB, line="b")


def test_two_writers_of_one_day_leave_the_rows_of_one_of_them(
    spark: SparkSession, tables: SparkTables, lake: str
) -> None:
    def write(label: int) -> int:
        rows = views(spark, num_days=1, label=label)
        return tables.replace(VIEWS, rows, day(0), commit={"label": str(label)})

    with ThreadPoolExecutor(3) as pool:  # none of the three has the table to begin with
        list(pool.map(write, range(3)))
    assert len(labels_by_day(lake)[FIRST]) == 1
    assert delta.read(lake, VIEWS).num_rows == 6


def test_what_a_killed_first_write_left_behind_is_no_obstacle(
    spark: SparkSession, tables: SparkTables, lake: str
) -> None:
    folder = Path(lake, VIEWS.name)
    (folder / "_delta_log").mkdir(parents=True)
    (folder / "event_date=2026-01-01").mkdir()
    (folder / "event_date=2026-01-01" / "orphan.parquet").write_text("half a file")
    tables.replace(VIEWS, views(spark, num_days=1), day(0), commit=JOB)
    assert delta.read(lake, VIEWS).num_rows == 6


def test_losing_every_race_is_a_fault_worth_retrying() -> None:
    tries = []

    def lose() -> int:
        tries.append(1)
        raise ConcurrentAppendException("somebody else was first")

    with pytest.raises(RetryableError, match="views 8 times: somebody else was first"):
        retried(lose, what="views", pause_s=0)
    assert len(tries) == MAX_TRIES


def test_a_missing_column_is_named(spark: SparkSession, tables: SparkTables, lake: str) -> None:
    with pytest.raises(InputError, match=r"needs the columns \['price'\]"):
        tables.replace(VIEWS, views(spark, num_days=1).drop("price"), day(0), commit=JOB)
    assert not Path(lake).exists()


def test_a_table_of_other_columns_is_neither_read_nor_written(
    spark: SparkSession, tables: SparkTables
) -> None:
    tables.replace(VIEWS, views(spark, num_days=1), day(0), commit=JOB)
    price = VIEWS.schema.get_field_index("price")
    changed = replace(VIEWS, schema=VIEWS.schema.set(price, pa.field("price", pa.string())))
    with pytest.raises(InputError, match="price is float, not string"):
        tables.read(changed)
    with pytest.raises(InputError, match="price is float, not string"):
        tables.replace(changed, views(spark, num_days=1), day(0), commit=JOB)


def test_a_value_that_does_not_fit_fails_the_write(
    spark: SparkSession, tables: SparkTables, lake: str
) -> None:
    with pytest.raises(Exception, match="CAST_OVERFLOW"):
        tables.replace(VIEWS, views(spark, num_days=1, label=300), day(0), commit=JOB)
    assert delta.read(lake, VIEWS).num_rows == 0


def test_a_table_that_is_not_there_says_what_to_do(tables: SparkTables) -> None:
    with pytest.raises(InputError, match="has no table views/shop; run the job that writes it"):
        tables.read(VIEWS)


@pytest.mark.parametrize("name", ["../outside", "a//b", "views`; DROP", "", "views/.."])
def test_a_name_that_leaves_the_lake_is_refused(tables: SparkTables, name: str) -> None:
    with pytest.raises(InputError, match="no table name"):
        tables.read(replace(VIEWS, name=name))


def test_a_line_cannot_smuggle_sql(tables: SparkTables, spark: SparkSession) -> None:
    with pytest.raises(InputError, match="no compressor line"):
        tables.replace(VIEWS, views(spark, num_days=1), day(0), commit=JOB, line="a' OR 'a' = 'a")
