"""The Spark session (Delta, Java, master), and Spark's two doors to the tables: read, replace."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import logging
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pyspark
from delta import exceptions as conflicts
from delta.tables import DeltaTable
from deltalake.exceptions import CommitFailedError
from pyspark.errors import PySparkException
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F  # noqa: N812
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.sql.types import StructField, StructType

from jobs.jars import jar_paths
from jobs.java import find_java
from jobs.spark_faults import SPARK_ERRORS, as_ours
from jobs.spark_progress import task_bar
from pipelines import delta
from pipelines.days import Days
from pipelines.errors import InputError, RetryableError
from pipelines.names import checked_line
from pipelines.schema_changes import check_meanings
from pipelines.tables import FEATURE, Table

Written = TypeVar("Written")

LOOPBACK = ("127.0.0.1", "localhost")
MAX_TRIES = 8
ROWS_PER_FILE = 8_000_000
LAST_COMMIT = "spark.databricks.delta.lastCommitVersionInSession"
"""Where Delta leaves the version it wrote; a look at the table could find another writer's."""
FILES_OF_A_TASK = ("spark.sql.files.maxPartitionBytes", "spark.sql.files.openCostInBytes")
A_FILE = str(2**45)
"""Bytes: as the price of opening a file and as the most of a task, that no file is cut and no two
are one task's."""
CONFLICTS = (
    CommitFailedError,
    conflicts.ConcurrentAppendException,
    conflicts.ConcurrentDeleteDeleteException,
    conflicts.ConcurrentDeleteReadException,
    conflicts.ConcurrentTransactionException,
    conflicts.ConcurrentWriteException,
    conflicts.DeltaConcurrentModificationException,
    conflicts.MetadataChangedException,
    conflicts.ProtocolChangedException,
)
"""Each is a class of its own in Python: delta-spark keeps no common ancestor. The first is what
delta-rs raises, which adds columns."""

EVERYWHERE = {
    "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
    "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
    "spark.sql.catalogImplementation": "in-memory",
    "spark.sql.session.timeZone": "UTC",
    "spark.sql.execution.arrow.pyspark.enabled": "true",
    "spark.sql.parquet.compression.codec": "zstd",
    "spark.sql.parquet.outputTimestampType": "TIMESTAMP_MICROS",
    # Java only interprets a method of more bytecode; Spark then makes several of a wide projection.
    "spark.sql.codegen.hugeMethodLimit": "8000",
    # Rows sorted by user and cut this small are found an order of magnitude faster.
    "spark.hadoop.parquet.block.row.count.limit": "32768",
    # The default of 50 tasks for every look at a table's log suits tables of a million files.
    "spark.databricks.delta.snapshotPartitions": "2",
    # A day that is replaced by nothing has been written too, and its commit says by whom.
    "spark.databricks.delta.skipRecordingEmptyCommits": "false",
    **{
        f"spark.databricks.delta.properties.defaults.{name.removeprefix('delta.')}": value
        for name, value in delta.OF_EVENTS.items()
    },
    "spark.ui.enabled": "false",
    "spark.ui.showConsoleProgress": "false",
}


def session(
    master: str = "local[*]", *, app: str = "iat", memory: str | None = None
) -> SparkSession:
    """This process's session: the one that runs already, or a new one on `master`.

    `memory` is the driver's ("4g"), a third of this machine's by default. Nothing is downloaded.
    Under spark-submit, which has started Java by now, master, memory and jars are its own.
    """
    # It says at its end, as information, that it has ended.
    logging.getLogger("py4j").setLevel(logging.WARNING)
    running = SparkSession.getActiveSession()
    if running is not None:
        return _running_on(running, master)
    settings = dict(EVERYWHERE)
    if "PYSPARK_GATEWAY_PORT" not in os.environ:
        settings |= _launch_settings(master, memory)
        _prepare_environment(is_local=_is_on_this_machine(master))
    builder = SparkSession.builder.appName(app)
    for name, value in settings.items():
        builder = builder.config(name, value)
    try:
        spark = builder.getOrCreate()
    except PySparkException as error:
        raise InputError(f"Spark does not start on {master}: {error}") from error
    atexit.register(_stop, spark)
    if master.startswith("local"):
        _write_no_side_files(spark)
    return spark


def default_memory() -> str:
    """A third of the memory this process may have; at least 2 GiB, at most 30 (short pointers)."""
    num_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError):  # a container's share, where there is one
        num_bytes = min(num_bytes, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return f"{min(max(num_bytes // 3 // 2**20, 2048), 30 * 1024)}m"


class SparkTables:
    """The lake's tables as Spark DataFrames: whole days out, whole days in."""

    def __init__(self, spark: SparkSession, lake: str) -> None:
        self.spark = spark
        self.lake = lake

    def read(
        self,
        table: Table,
        days: Days | None = None,
        *,
        line: str | None = None,
        version: int | None = None,
    ) -> DataFrame:
        """The declared columns of `days` (None: all), of one compressor line if given; a feature
        that came later reads as missing in the days before it."""
        path = delta.uri(self.lake, table)
        if not DeltaTable.isDeltaTable(self.spark, path):
            raise InputError(
                f"the lake {self.lake} has no table {table.name}; run the job that writes it first"
            )
        reader = self.spark.read.format("delta")
        if version is not None:
            reader = reader.option("versionAsOf", version)
        rows = reader.load(path)
        _check_stored_schema(table, rows.schema)
        if days is not None or line is not None:
            rows = rows.where(_predicate(days, line))
        return rows.select(*(_read_as(table, rows, field) for field in _spark_schema(table)))

    def replace(
        self,
        table: Table,
        rows: DataFrame,
        days: Days,
        *,
        commit: Mapping[str, str],
        line: str | None = None,
        files_per_day: int = 1,
        unfold: Callable[[DataFrame], DataFrame] | None = None,
        read_from: tuple[Table, int] | None = None,
    ) -> int:
        """Makes `rows` the whole content of `days` (of one line), in one commit; gives the version.

        Running it twice changes nothing; rows of other days are refused and nothing is written. A
        declared feature that the table lacks comes into it first.
        A day is one sorted file, or `files_per_day` written side by side (split by the first sort
        column, so that a user's rows stay together), each cut at ROWS_PER_FILE.

        Args:
            unfold: makes the table's rows of `rows`, each by itself, once they lie with their day
                and file: few rows that become many are moved before, not after. They need the
                table's event_date and, where a day is several files, its first sort column.
            read_from: the table and version whose rows, each by itself, `rows` are made of. Where
                they lie as a day in a file, and days are enough for all cores, a day is read, made
                and written by one task, and no row is moved.
        """
        path = delta.uri(self.lake, table)

        def commit_once(arranged: DataFrame) -> int:
            writer = (
                arranged.write.format("delta")
                .mode("overwrite")
                .option("replaceWhere", _predicate(days, line))
                .option("userMetadata", json.dumps(delta.with_days(commit, days), sort_keys=True))
                .option("maxRecordsPerFile", ROWS_PER_FILE)
            )
            # The empty table first, so that the predicate guards the first write too.
            self._create_if_absent(table, path)
            delta.evolve(self.lake, table, commit=commit)
            self.spark.conf.unset(LAST_COMMIT)
            writer.save(path)
            return self._committed_version(path)

        try:
            with (
                self._by_day(rows, days, read_from) as lie_by_day,
                task_bar(self.spark, table.name),
            ):
                if lie_by_day:
                    arranged = _in_order(table, _as_declared(table, rows))
                else:
                    arranged = self._arranged(table, rows, days, files_per_day, unfold)
                return retried(lambda: commit_once(arranged), what=f"{table.name} {days}")
        except SPARK_ERRORS as error:
            raise _explained(error, table, days) from error

    def _create_if_absent(self, table: Table, path: str) -> None:
        if DeltaTable.isDeltaTable(self.spark, path):
            stored = self.spark.read.format("delta").load(path).schema
            _check_stored_schema(table, stored)
            return
        # A write and not Delta's CREATE, which refuses a folder in which another writer has begun,
        # or one that was killed.
        empty = self.spark.createDataFrame([], _spark_schema(table)).write.format("delta")
        empty.mode("ignore").partitionBy(*table.partition_by).save(path)

    def _committed_version(self, path: str) -> int:
        """The version this session just committed, the newest when there was nothing to commit."""
        committed = self.spark.conf.get(LAST_COMMIT, None)
        if committed is not None:
            return int(committed)
        newest = DeltaTable.forPath(self.spark, path).history(1).select("version")
        return int(newest.collect()[0][0])

    def _arranged(
        self,
        table: Table,
        rows: DataFrame,
        days: Days,
        files_per_day: int,
        unfold: Callable[[DataFrame], DataFrame] | None = None,
    ) -> DataFrame:
        """Each day whole in one task (or `files_per_day`), sorted; no more tasks than help."""
        if unfold is None:
            rows = _as_declared(table, rows)
        slot = F.datediff(F.col("event_date"), F.lit(days.start)) * files_per_day
        if files_per_day > 1:
            key = F.col(_quoted(table.sort_by[0] if table.sort_by else table.schema.names[0]))
            slot = slot + F.pmod(F.xxhash64(key), F.lit(files_per_day)).cast("int")
        num_tasks = min(max(len(days), 1) * files_per_day, _most_tasks(self.spark))
        placed = rows.repartitionById(num_tasks, slot)
        if unfold is not None:
            placed = _as_declared(table, unfold(placed))
        return _in_order(table, placed)

    @contextlib.contextmanager
    def _by_day(
        self, rows: DataFrame, days: Days, read_from: tuple[Table, int] | None
    ) -> Iterator[bool]:
        """Whether each task reads one whole day of the rows, which it does while this lasts."""
        num_days = 0
        if read_from is not None:
            table, version = read_from
            num_days = len(delta.num_rows(self.lake, table, days, version=version))
        if num_days < self.spark.sparkContext.defaultParallelism:
            yield False
            return
        before = {name: str(self.spark.conf.get(name)) for name in FILES_OF_A_TASK}
        try:
            for name in before:
                self.spark.conf.set(name, A_FILE)
            # A task each for all files: for as many days, if none is several.
            yield rows.rdd.getNumPartitions() == num_days
        finally:
            for name, value in before.items():
                self.spark.conf.set(name, value)


def retried(attempt: Callable[[], Written], *, what: str, pause_s: float = 0.1) -> Written:
    """What `attempt` returns; while other writers win, MAX_TRIES times, then RetryableError."""
    for number in range(MAX_TRIES - 1):
        try:
            return attempt()
        except CONFLICTS:
            # Somewhere in a window that doubles, so that two losers do not meet again.
            time.sleep(random.uniform(0, pause_s * 2**number))
    try:
        return attempt()
    except CONFLICTS as error:
        message = f"another writer won {what} {MAX_TRIES} times: {error}"
        raise RetryableError(message) from error


def _running_on(spark: SparkSession, master: str) -> SparkSession:
    """The running session, unless `master` asks for another machine."""
    running = spark.sparkContext.master or ""
    if "PYSPARK_GATEWAY_PORT" in os.environ or running == master:
        return spark
    if running.startswith("local") and master.startswith("local"):
        return spark
    raise InputError(f"this process has a session on {running} and cannot open one on {master}")


def _launch_settings(master: str, memory: str | None) -> dict[str, str]:
    """What has to be known when Java starts."""
    if memory is not None and not re.fullmatch(r"\d+[mg]", memory):
        raise InputError(f'memory is a number with m or g, such as "4g": got {memory!r}')
    log = Path(__file__).with_name("log4j2.properties").as_uri()
    settings = {
        "spark.master": master,
        "spark.jars": ",".join(map(str, jar_paths())),
        "spark.driver.memory": memory or default_memory(),
        "spark.driver.extraJavaOptions": f"-Dlog4j2.configurationFile={log} -Duser.timezone=UTC",
        "spark.local.dir": _scratch(),
        "spark.sql.warehouse.dir": str(Path(_scratch(), "warehouse")),
    }
    if _is_on_this_machine(master):
        settings["spark.driver.host"] = settings["spark.driver.bindAddress"] = LOOPBACK[0]
    if master.startswith("local"):
        # A cluster keeps its default: adaptive execution joins what turns out small.
        settings["spark.sql.shuffle.partitions"] = str(max(8, os.cpu_count() or 1))
    return settings


def _prepare_environment(*, is_local: bool) -> None:
    """What Spark takes from the environment alone, for this process and those it starts."""
    os.environ["JAVA_HOME"] = str(find_java().launcher_home())
    # Another Spark on this machine would be started in this one's place.
    os.environ["SPARK_HOME"] = str(Path(pyspark.__file__).parent)
    for name in ("PYSPARK_PYTHON", "PYSPARK_DRIVER_PYTHON"):
        if is_local or name not in os.environ:
            os.environ[name] = sys.executable
    if is_local:
        os.environ["SPARK_LOCAL_IP"] = LOOPBACK[0]


def _is_on_this_machine(master: str) -> bool:
    return master.startswith("local") or urlsplit(master).hostname in LOOPBACK


@functools.cache
def _scratch() -> str:
    """This process's folder for shuffles and spills, below the temporary one, gone at exit."""
    folder = tempfile.mkdtemp(prefix="iat-spark-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _write_no_side_files(spark: SparkSession) -> None:
    """No .crc file beside each local file: Parquet's pages carry checksums of their own, and Hadoop
    starts a process (chmod) for every file that it makes."""
    jvm: Any = spark.sparkContext._jvm
    settings = spark.sparkContext._jsc.hadoopConfiguration()
    # One object serves the whole process, as driver and as executor.
    files = jvm.org.apache.hadoop.fs.FileSystem.get(jvm.java.net.URI("file:///"), settings)
    files.setWriteChecksum(False)


def _stop(spark: SparkSession) -> None:
    with contextlib.suppress(Exception):  # Java may have ended before us
        spark.stop()


def _spark_schema(table: Table) -> StructType:
    schema = from_arrow_schema(table.schema)
    for column, meaning in table.meanings.items():
        schema[column].metadata = {FEATURE: meaning}
    return schema


def _read_as(table: Table, rows: DataFrame, field: StructField) -> Column:
    """A declared column of stored rows; what a day does not have of it is missing."""
    is_stored = field.name in rows.columns
    value = F.col(_quoted(field.name)) if is_stored else F.lit(None).cast(field.dataType)
    missing = table.missing(field.name)
    if missing is not None:
        value = F.coalesce(value, F.lit(missing).cast(field.dataType))
    return value.alias(field.name)


def _check_stored_schema(table: Table, stored: StructType) -> None:
    """InputError when the table in the lake is not the one declared; features may come and go."""
    check_meanings(table, {field.name: field.metadata.get(FEATURE) for field in stored})
    found = {
        field.name: field.dataType.simpleString()
        for field in stored
        if field.name in table.schema.names or FEATURE not in field.metadata
    }
    wanted = {field.name: field.dataType.simpleString() for field in _spark_schema(table)}
    wanted = {n: kind for n, kind in wanted.items() if n in found or n not in table.meanings}
    if found == wanted:
        return
    missing = ", ".join(sorted(wanted.keys() - found.keys()))
    extra = ", ".join(sorted(found.keys() - wanted.keys()))
    other = ", ".join(
        f"{name} is {found[name]}, not {wanted[name]}"
        for name in wanted.keys() & found.keys()
        if found[name] != wanted[name]
    )
    raise InputError(
        f"the lake's table {table.name} was written with other columns "
        f"(missing: {missing or 'none'}; no longer declared: {extra or 'none'}; "
        f"of another type: {other or 'none'}): has its domain file changed? Use another lake, "
        "or remove this table and write its days again"
    )


def _in_order(table: Table, placed: DataFrame) -> DataFrame:
    """The rows of each task in the order of the table's files."""
    order = dict.fromkeys((*table.partition_by, *table.sort_by))
    return placed.sortWithinPartitions(*map(_quoted, order))


def _as_declared(table: Table, rows: DataFrame) -> DataFrame:
    """The declared columns in the declared order and types."""
    missing = [name for name in table.schema.names if name not in rows.columns]
    if missing:
        raise InputError(f"{table.name} needs the columns {missing}: got {rows.columns}")
    schema = _spark_schema(table)
    return rows.select(*(F.col(_quoted(f.name)).cast(f.dataType).alias(f.name) for f in schema))


def _predicate(days: Days | None, line: str | None) -> str:
    clauses = [days.predicate()] if days is not None else []
    if line is not None:
        clauses.append(f"compressor_line = '{checked_line(line)}'")
    return " AND ".join(clauses)


def _quoted(column: str) -> str:
    return "`" + column.replace("`", "``") + "`"


def _most_tasks(spark: SparkSession) -> int:
    shuffles = int(spark.conf.get("spark.sql.shuffle.partitions") or 8)
    return max(shuffles, spark.sparkContext.defaultParallelism)


def _explained(error: Exception, table: Table, days: Days) -> Exception:
    """The error as a person can act on it."""
    text = str(error)
    if "DELTA_REPLACE_WHERE_MISMATCH" in text or "DELTA_VIOLATE_CONSTRAINT" in text:
        return InputError(f"{table.name}: rows outside {days}; nothing was written")
    return as_ours(error, f"writing {table.name} {days}")
