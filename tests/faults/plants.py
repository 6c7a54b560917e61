"""Faults of writing code, put into workers on purpose: a suite that does not catch them proves
nothing."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pyspark.sql import DataFrame

from jobs.spark import SparkTables, _as_declared
from pipelines import delta
from pipelines.days import Days
from pipelines.tables import Table

PLANTS = ("append", "commit-first", "skipped-transaction")


def plant(name: str) -> None:
    """Replace Spark's way to write days by a faulty one; no name, no fault."""
    if name:
        faulty = dict(zip(PLANTS, (_append, _commit_first, _skipped), strict=True))[name]
        SparkTables.replace = faulty(SparkTables.replace)  # type: ignore[method-assign]


def _append(right: Callable[..., int]) -> Callable[..., int]:
    """A blind append: the days' rows are added to what is there."""

    def replace(self: SparkTables, table: Table, rows: DataFrame, days: Days, **more: Any) -> int:
        path = delta.uri(self.lake, table)
        self._create_if_absent(table, path)
        _as_declared(table, rows).write.format("delta").mode("append").save(path)
        return delta.open_table(self.lake, table).version()

    return replace


def _commit_first(right: Callable[..., int]) -> Callable[..., int]:
    """The commit is there before the files that it names."""

    def replace(self: SparkTables, table: Table, rows: DataFrame, days: Days, **more: Any) -> int:
        there = Path(delta.uri(self.lake, table))
        with tempfile.TemporaryDirectory() as folder:
            beside = SparkTables(self.spark, folder)
            if there.exists():
                shutil.copytree(there, delta.uri(folder, table))
            version = right(beside, table, rows, days, **more)
            made = Path(delta.uri(folder, table))
            for part in ("_delta_log/*.json", "*/*.parquet"):
                for file in made.glob(part):
                    target = there / file.relative_to(made)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    if not target.exists():
                        shutil.copy(file, target)
                time.sleep(0.5)
        return version

    return replace


def _skipped(right: Callable[..., int]) -> Callable[..., int]:
    """One transaction id for the job, the date as its version: Delta skips what is not newer."""

    def replace(
        self: SparkTables, table: Table, rows: DataFrame, days: Days, *,
        commit: Mapping[str, str], **more: Any,
    ) -> int:  # fmt: skip
        settings = {"txnAppId": commit["job"], "txnVersion": str(days.start.toordinal())}
        for name, value in settings.items():
            self.spark.conf.set(f"spark.databricks.delta.write.{name}", value)
        try:
            return right(self, table, rows, days, commit=commit, **more)
        finally:
            for name in settings:
                self.spark.conf.unset(f"spark.databricks.delta.write.{name}")

    return replace
