"""The classes that a Spark session loads, kept ready: one starts a third faster with them.

`python -m jobs.class_archive`, a part of set-up. Java maps the archive (JEP 350) where its launcher
finds one; without it everything works, and starts slower.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jobs.java import ARCHIVE, find_java

WITHIN_S = 300.0
# What every job does, so that what it needs is there: a table made, replaced in part and read.
SESSION = """
import sys
from datetime import date
import pyarrow as pa
from pyspark.sql import functions as F
from jobs.spark import SparkTables, session
from pipelines.days import Days
from pipelines.tables import Table

schema = pa.schema({"id": pa.int64(), "event_date": pa.date32()})
table = Table("archive", schema, ("id",), ("event_date",), ("id",))
days = Days(date(2026, 1, 1), date(2026, 1, 2))
spark = session("local[2]", memory="1g")
tables = SparkTables(spark, sys.argv[1])
rows = spark.range(9).select("id", F.lit(days.start).alias("event_date"))
for _ in range(2):
    tables.replace(table, rows, days, commit={})
tables.read(table, days).groupBy(F.col("id") % 2).count().toArrow()
java = spark.sparkContext._gateway.proc
spark.stop()
java.stdin.close()
java.wait()
"""


def make() -> int:
    """Makes this Java's archive anew; returns its bytes.

    OSError, CalledProcessError, TimeoutExpired: there is none, and sessions start without.
    """
    java = find_java()
    archive = java.launcher_home() / ARCHIVE
    archive.unlink(missing_ok=True)
    if not (java.home / "lib" / "server" / ARCHIVE).exists():
        raise FileNotFoundError(f"{java.home} comes without one of its own to build upon")
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        made = Path(folder, ARCHIVE)
        options = {"SPARK_SUBMIT_OPTS": f"-XX:ArchiveClassesAtExit={made} -Xlog:cds*=off"}
        subprocess.run(
            [sys.executable, "-c", SESSION, folder], env=os.environ | options,
            capture_output=True, text=True, check=True, timeout=WITHIN_S, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        made.replace(archive)
    return archive.stat().st_size


def main() -> int:
    """A part of set-up that may fail: it says so, and that is all."""
    started = time.monotonic()
    try:
        num_bytes = make()
    except (OSError, subprocess.SubprocessError) as error:
        sys.stderr.write(f"set-up: no class archive, Spark starts without: {_why(error)}\n")
        return 0
    sys.stderr.write(
        f"set-up: Java's classes are archived, so that Spark starts a third faster "
        f"({num_bytes / 2**20:.0f} MB, {time.monotonic() - started:.0f} s)\n"
    )
    return 0


def _why(error: Exception) -> str:
    said = getattr(error, "stderr", None) or ""
    return said.strip().rpartition("\n")[2] or str(error)


if __name__ == "__main__":
    sys.exit(main())
