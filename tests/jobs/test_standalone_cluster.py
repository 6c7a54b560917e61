"""The tables through a real Spark cluster: a standalone master with two workers, on loopback."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from pyspark.sql import SparkSession

from jobs.cli import run
from pipelines import delta, tables
from pipelines.domain import load
from tests.processes import children, is_running

ROOT = Path(__file__).resolve().parents[2]

# Two days in one commit, then the second day again with other values.
REPLACE_TWICE = """
import sys
from datetime import date
import pyarrow as pa
from pyspark.sql import functions as F
from jobs.spark import SparkTables, session
from pipelines.days import Days
from pipelines.tables import Table

master, lake = sys.argv[1:]
spark = session(master, app="cluster test", memory="1g")
schema = pa.schema({"id": pa.int64(), "value": pa.int32(), "event_date": pa.date32()})
table = Table("clicks", schema, ("id",), ("event_date",), ("id",))
rows = spark.range(1000, numPartitions=2).select(
    F.col("id"),
    F.lit(1).alias("value"),
    F.date_add(F.lit(date(2026, 1, 1)), (F.col("id") % 2).cast("int")).alias("event_date"),
)
tables = SparkTables(spark, lake)
tables.replace(table, rows, Days(date(2026, 1, 1), date(2026, 1, 3)), commit={})
second = rows.where("event_date = '2026-01-02'").withColumn("value", F.lit(2))
tables.replace(table, second, Days(date(2026, 1, 2), date(2026, 1, 3)), commit={})


def this_python(batches):
    for _ in batches:
        yield pa.RecordBatch.from_pydict({"python": [sys.executable]})


pythons = spark.range(4, numPartitions=4).mapInArrow(this_python, "python string").distinct()
num_executors = spark.sparkContext._jsc.sc().getExecutorMemoryStatus().size() - 1
print(tables.read(table).count(), pythons.collect()[0]["python"] == sys.executable, num_executors)
"""

BUILD = """
import sys
from jobs.cli import run

domain, lake, master = sys.argv[1:]
flags = ["--domain", domain, "--lake", lake, "--master", master]
for command in ("build-instances", "build-streams", "build-samples"):
    if run([command, *flags]):
        sys.exit(command)
"""

SHOP = """
name = "shop"
source = {path = "log.parquet"}
columns = {user = "user", item = "item", time = "at", time_unit = "s"}
negatives = {per_positive = 2}
limits = {max_quarantined_share = 0.5}
[[label]]
name = "buy"
always = 1
[[feature]]
name = "item"
column = "item"
side = "item"
[[feature]]
name = "price"
column = "price"
kind = "number"
"""

START_AND_WAIT = """
import time
from jobs.local_cluster import local_cluster
with local_cluster(num_workers=1) as master:
    print(master, flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_days_are_replaced_on_a_cluster_as_on_one_machine(
    spark_cluster: str, tmp_path: Path
) -> None:
    lake = tmp_path / "lake"
    done = subprocess.run(
        [sys.executable, "-c", REPLACE_TWICE, spark_cluster, str(lake)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.stdout.split() == ["1000", "True", "2"], done.stderr
    rows = DeltaTable(str(lake / "clicks")).to_pyarrow_table().group_by(["event_date", "value"])
    counts = rows.aggregate([("id", "count")]).sort_by("event_date")
    assert counts["value"].to_pylist() == [1, 2]
    assert counts["id_count"].to_pylist() == [500, 500]


@pytest.mark.slow
def test_the_commands_give_the_same_rows_on_a_cluster_as_on_one_machine(
    spark_cluster: str, spark: SparkSession, tmp_path: Path
) -> None:
    (tmp_path / "shop.toml").write_text(SHOP)
    num = 600
    log = {
        "user": [f"u{n % 17}" if n % 50 else None for n in range(num)],
        "item": [f"i{n * n % 29}" for n in range(num)],
        "at": [1_767_225_600 + n * 700 for n in range(num)],  # five days
        "price": [float(n % 7) for n in range(num)],
    }
    pq.write_table(pa.table(log), tmp_path / "log.parquet", row_group_size=100)
    places = {"one": "local[2]", "many": spark_cluster}
    flags = {
        name: ["--domain", str(tmp_path / "shop.toml"), "--lake", str(tmp_path / name),
               "--master", master]
        for name, master in places.items()
    }  # fmt: skip
    for command in ("build-instances", "build-streams", "build-samples"):
        assert run([command, *flags["one"]]) == 0
    done = subprocess.run(
        [sys.executable, "-c", BUILD, *flags["many"][1::2]],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "clientserver" not in done.stderr
    assert "Traceback" not in done.stderr
    domain = load(str(tmp_path / "shop.toml"))
    declared = (
        tables.instances, tables.temporal_order, tables.user_order, tables.histories,
        tables.ranker_samples,
    )  # fmt: skip
    for make in declared:
        found = {name: delta.read(str(tmp_path / name), make(domain)) for name in places}
        assert found["many"].num_rows >= num - num // 50
        assert found["one"] == found["many"]
    raw = {name: delta.read(str(tmp_path / name), tables.quarantine(domain)) for name in places}
    assert sorted(raw["one"]["raw"].to_pylist()) == sorted(raw["many"]["raw"].to_pylist())
    assert raw["many"].num_rows == num // 50


@pytest.mark.slow
def test_a_cluster_ends_with_the_process_that_started_it() -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", START_AND_WAIT], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    with owner.stdout:
        master = owner.stdout.readline()
    daemons = children(owner.pid)
    owner.kill()  # no `finally` runs
    owner.wait()
    try:
        assert master.startswith("spark://127.0.0.1:")
        assert len(daemons) == 2
        give_up = time.monotonic() + 20
        while any(map(is_running, daemons)) and time.monotonic() < give_up:
            time.sleep(0.1)
        assert not any(map(is_running, daemons))
    finally:
        for daemon in daemons:
            with contextlib.suppress(ProcessLookupError):
                os.kill(daemon, signal.SIGKILL)
