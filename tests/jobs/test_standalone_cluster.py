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
from pyspark.sql import SparkSession

from jobs.cli import run
from pipelines import delta, tables
from pipelines.domain import load
from tests.processes import children, is_running

ROOT = Path(__file__).resolve().parents[2]

# All days, then the second again; and who does the work.
BUILD = """
import sys
import pyarrow as pa
from jobs.cli import run
from jobs.spark import session

domain, lake, master = sys.argv[1:]
flags = ["--domain", domain, "--lake", lake, "--master", master]
for days in ([], ["--start", "2026-01-02", "--end", "2026-01-03"]):
    if run(["build", *flags, *days]):
        sys.exit("build")


def this_python(batches):
    for _ in batches:
        yield pa.RecordBatch.from_pydict({"python": [sys.executable]})


spark = session(master)
pythons = spark.range(4, numPartitions=4).mapInArrow(this_python, "python string").distinct()
num_executors = spark.sparkContext._jsc.sc().getExecutorMemoryStatus().size() - 1
print(pythons.collect()[0]["python"] == sys.executable, num_executors)
"""

# Of the default 200 tasks a shuffle nearly all would be empty here.
FEW_TASKS = "-Dspark.sql.shuffle.partitions=8"

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
    assert run(["build", *flags["one"]]) == 0
    options = f"{os.environ['SPARK_SUBMIT_OPTS']} {FEW_TASKS}"
    done = subprocess.run(
        [sys.executable, "-c", BUILD, *flags["many"][1::2]],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=400,
        env=os.environ | {"SPARK_SUBMIT_OPTS": options},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "clientserver" not in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.split()[-2:] == ["True", "2"]
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
