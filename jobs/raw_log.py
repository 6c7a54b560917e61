"""A raw log's files as Spark lists and reads them, and what those hold that no run has opened."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F  # noqa: N812
from pyspark.sql.readwriter import DataFrameReader

from jobs.spark_progress import task_bar
from pipelines import delta, tables
from pipelines.domain import Domain
from pipelines.instances import days_in
from pipelines.raw_files import RawFiles, known


@dataclass(frozen=True)
class RawLog:
    """Where a domain's events are, and how Spark reads them."""

    place: str
    """File, folder or URI."""
    format: str
    """parquet, csv or delta."""
    events: DataFrame
    """All of them."""
    reader: DataFrameReader
    """Of some of its files (not for delta)."""

    @property
    def spark(self) -> SparkSession:
        return self.events.sparkSession

    def files(self) -> dict[str, str]:
        """Every file, named from the log's root on, with its stamp: once it holds something else,
        its stamp is another. No file is opened."""
        if self.format == "delta":
            root, snapshot = self._snapshot()
            added = DataFrame(snapshot.allFiles().toDF(), self.spark)
            rows = added.select("path", "size", "modificationTime", "deletionVector.pathOrInlineDv")
            return {
                self.named(f"{root}/{path}"): " ".join(str(x) for x in stamp if x is not None)
                for path, *stamp in rows.collect()
            }
        return {self.named(quote(path)): stamp for path, stamp in self._listed()}

    def read(self, files: Set[str]) -> DataFrame:
        """The events of some files, with the columns of the whole log."""
        if not files:
            return self.events.where(F.lit(False))
        if files >= self.files().keys():
            return self.events
        if self.format != "delta":
            kept = sorted(path for path, _ in self._listed() if self.named(quote(path)) in files)
            return self.reader.load(list(map(literal, kept)))
        root, snapshot = self._snapshot()
        every, java = snapshot.allFiles().collectAsList(), self._java
        some = java.java.util.ArrayList()
        for at in range(every.size()):
            if self.named(f"{root}/{every.get(at).path()}") in files:
                some.add(every.get(at))
        scala = java.scala.jdk.javaapi.CollectionConverters.asScala(some).toSeq()
        none = java.scala.Option.empty()
        frame = snapshot.deltaLog().createDataFrame(snapshot, scala, False, none)
        return DataFrame(frame, self.spark)

    def named(self, uri: str) -> str:
        """A file of the log by its path below the log's root: nothing that opens it."""
        path, root = unquote(uri), urlsplit(self.place).path if "://" in self.place else self.place
        return path.partition(root)[2].strip("/") or path.rpartition("/")[2]

    def _listed(self) -> list[tuple[str, str]]:
        listed = self.spark.read.format("binaryFile").load(literal(self.place))
        rows = listed.select("path", "length", F.unix_micros("modificationTime"))
        return [(path, f"{length} {modified}") for path, length, modified in rows.collect()]

    @property
    def _java(self) -> Any:
        return self.spark._jvm

    def _snapshot(self) -> tuple[str, Any]:
        """The Delta table's folder, quoted as its files' paths are, and its newest state."""
        none = self._java.scala.Option.empty()
        log = self._java.org.apache.spark.sql.delta.DeltaLog.forTable(
            self.spark._jsparkSession, self.place
        )
        return quote(str(log.dataPath().toString())), log.update(False, none, none)


def looked(log: RawLog, lake: str, domain: Domain, *, commit: Mapping[str, str] | None) -> RawFiles:
    """What is known once the files that are new or changed have been opened; kept in the lake
    where a `commit` is given."""
    table, last = tables.raw_files(domain), known(lake, domain)
    rows = last.rows if last else table.schema.empty_table()
    how = json.dumps([log.format, domain.columns.time, domain.columns.time_unit])
    listed = {file: f"{stamp} {how}" for file, stamp in log.files().items()}
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
    with task_bar(log.spark, f"new files of {domain.name}"):
        counted = days_in(log.read(files.keys()), domain).collect()
    empty = {"event_date": None, "num_events": 0, "content": Decimal(0)}
    found = [row.asDict() | {"file": log.named(row["file"])} for row in counted]
    without = files.keys() - {row["file"] for row in found}
    return [
        row | {"stamp": files[row["file"]]}
        for row in [*found, *({"file": file} | empty for file in without)]
        if row["file"] in files
    ]


def literal(file: str) -> str:
    """A local path in which Hadoop sees no pattern."""
    return file if "://" in file else re.sub(r"([\[\]{}*?\\])", r"\\\1", file)
