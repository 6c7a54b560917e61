"""A raw log's files as Spark lists and reads them, and what those hold that no run has opened."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cached_property
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F  # noqa: N812
from pyspark.sql.readwriter import DataFrameReader

from jobs.spark_progress import task_bar
from pipelines import delta, tables
from pipelines.domain import Domain, check_columns
from pipelines.forgotten import BROKEN_ROW
from pipelines.instances import days_in
from pipelines.raw_files import RawFiles, known, named


@dataclass(frozen=True)
class RawLog:
    """Where a domain's events are, and how Spark reads them.

    Its files are listed once: what is read later is of those, or fails. A file that comes meanwhile
    is for the next run.
    """

    place: str
    """File, folder or URI."""
    format: str
    """parquet, csv or delta."""
    events: DataFrame
    """All of them, for their columns."""
    reader: DataFrameReader
    """Of some of its files (not for delta)."""
    only: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Column -> values, as text: whose events are the domain's. All that is read and counted here
    is of those."""

    @property
    def spark(self) -> SparkSession:
        return self.events.sparkSession

    @cached_property
    def files(self) -> dict[str, str]:
        """Every file, by its name below the log's root, with its stamp: once it holds something
        else, its stamp is another. No file is opened."""
        return {name: stamp for name, (_, stamp) in self._listed.items()}

    def read(self, files: Set[str]) -> DataFrame:
        """The domain's events of some files, with the columns of the whole log."""
        if not files:
            return self.events.where(F.lit(False))
        events = self._read(files)
        for column, values in self.only.items():
            quoted = column.replace("`", "``")
            is_kept = F.col(f"`{quoted}`").cast("string").isin(list(values))
            if BROKEN_ROW in events.columns:  # whose it is cannot be told: it is quarantined
                is_kept = is_kept | F.col(BROKEN_ROW).isNotNull()
            events = events.where(is_kept)
        return events

    def _read(self, files: Set[str]) -> DataFrame:
        paths = sorted(self._listed[file][0] for file in files)
        if self.format == "delta":
            return self._read_added(paths)
        if len(self._listed) == 1:  # perhaps the log is that file, which is no base of itself
            return self.events
        return self.reader.load(list(map(literal, paths)))

    def _read_added(self, paths: Sequence[str]) -> DataFrame:
        is_one: Any = F.col("path").isin(list(paths))
        added = self._snapshot.allFiles().filter(is_one._jc).collectAsList()
        files = self._java.scala.jdk.javaapi.CollectionConverters.asScala(added).toSeq()
        log, none = self._snapshot.deltaLog(), self._java.scala.Option.empty()
        return DataFrame(log.createDataFrame(self._snapshot, files, False, none), self.spark)

    @cached_property
    def _listed(self) -> dict[str, tuple[str, str]]:
        """Path (as the log itself has it) and stamp by name."""
        if self.format == "delta":
            root = str(self._snapshot.deltaLog().dataPath().toString())
            added = DataFrame(self._snapshot.allFiles().toDF(), self.spark)
            rows = added.select("path", "size", "modificationTime", "deletionVector.pathOrInlineDv")
            return {
                named(self.place, f"{root}/{unquote(path)}"): (path, " ".join(map(str, stamp)))
                for path, *stamp in rows.collect()
            }
        listed = self.spark.read.format("binaryFile").load(literal(self.place))
        rows = listed.select("path", "length", F.unix_micros("modificationTime"))
        return {
            named(self.place, path): (path, " ".join(map(str, stamp)))
            for path, *stamp in rows.collect()
        }

    @cached_property
    def _snapshot(self) -> Any:
        """The Delta table's state when it was first asked for."""
        none = self._java.scala.Option.empty()
        log = self._java.org.apache.spark.sql.delta.DeltaLog.forTable(
            self.spark._jsparkSession, self.place
        )
        return log.update(False, none, none)

    @property
    def _java(self) -> Any:
        return self.spark._jvm


def looked(log: RawLog, lake: str, domain: Domain, *, commit: Mapping[str, str] | None) -> RawFiles:
    """What is known once the files that are new or changed have been opened; kept in the lake
    where a `commit` is given."""
    table, last = tables.raw_files(domain), known(lake, domain)
    rows = last.rows if last else table.schema.empty_table()
    told: list[Any] = [log.format, domain.columns.time, domain.columns.time_unit]
    how = json.dumps([*told, log.only] if log.only else told)
    listed = {file: f"{stamp} {how}" for file, stamp in log.files.items()}
    held = dict(zip(rows["file"].to_pylist(), rows["stamp"].to_pylist(), strict=True))
    fresh = {file for file, stamp in listed.items() if held.get(file) != stamp}
    if last and not fresh and listed.keys() == held.keys():
        return last
    kept = [row for row in rows.to_pylist() if row["file"] in listed and row["file"] not in fresh]
    kept += _opened(log, domain, {file: listed[file] for file in fresh})
    found = RawFiles(pa.Table.from_pylist(kept, table.schema))
    if commit is not None:
        delta.replace(lake, table, found.rows, None, commit=commit)
    return found


def _opened(log: RawLog, domain: Domain, files: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows of the table for files, by stamp; an empty file has one too."""
    if not files:
        return []
    check_columns(domain, log.events.columns)
    with task_bar(log.spark, f"new files of {domain.name}"):
        counted = days_in(log.read(files.keys()), domain).collect()
    empty = {"event_date": None, "num_events": 0, "content": Decimal(0)}
    found = [row.asDict() | {"file": named(log.place, unquote(row["file"]))} for row in counted]
    without = files.keys() - {row["file"] for row in found}
    found += [{"file": file} | empty for file in without]
    return [row | {"stamp": files[row["file"]]} for row in found]


def literal(file: str) -> str:
    """A local path in which Hadoop sees no pattern."""
    return file if "://" in file else re.sub(r"([\[\]{}*?\\])", r"\\\1", file)
