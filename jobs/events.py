"""A domain's raw event log, wherever its domain file says it is."""

from __future__ import annotations

from pathlib import Path

from pyspark.sql import SparkSession
from pyspark.sql.readwriter import DataFrameReader
from pyspark.sql.types import StringType, StructField, StructType

from jobs.raw_log import RawLog, literal
from jobs.spark_faults import SPARK_ERRORS, reason
from pipelines import sources
from pipelines.domain import Domain
from pipelines.errors import InputError
from pipelines.forgotten import BROKEN_ROW


def open_events(
    spark: SparkSession,
    domain: Domain,
    lake: str,
    *,
    data: Path | None = None,
    limit_users: int | None = None,
    limit_days: int | None = None,
    seed: int = 0,
) -> RawLog:
    """The log, read in place.

    A public log is first written as one Parquet file below the lake; the other arguments choose a
    sample of it (`pipelines.sources.prepare`) and are refused for a log that is read in place.
    """
    if domain.source.reader:
        place = str(
            sources.prepare(
                domain, lake, data=data, limit_users=limit_users, seed=seed, days=limit_days
            )
        )
        events, only = spark.read.parquet(literal(place)), domain.source.only
        return RawLog(place, "parquet", events, spark.read, only)
    if data or limit_users or limit_days:
        raise InputError(
            f"--data, --limit-users and --limit-days are for the public logs; domain "
            f"{domain.name!r} reads {domain.source.path}"
        )
    place = _place(domain)
    kind, where = domain.source.format, f"[source] of domain {domain.name!r}: {place}"
    try:
        reader = _csv(spark, place) if kind == "csv" else spark.read.format(kind)
        events = reader.load(place if kind == "delta" else literal(place))
    except SPARK_ERRORS as error:
        raise InputError(f"{where} does not read as {kind}: {reason(str(error))}") from error
    if not events.columns:
        raise InputError(f"{where} is empty: a CSV file starts with the names of its columns")
    some = reader.schema(events.schema).option("basePath", place)
    return RawLog(place, kind, events, some, domain.source.only)


def _csv(spark: SparkSession, place: str) -> DataFrameReader:
    """Text as it came (what is a number or a time, the domain file says); quotes as `iat init`
    reads them. A line of too many or too few values stands whole in the column BROKEN_ROW."""
    reader = spark.read.format("csv").options(
        header=True,
        escape='"',
        multiLine=True,
        encoding="UTF-8",
        mode="PERMISSIVE",
        columnNameOfCorruptRecord=BROKEN_ROW,
        # The files of a folder must name the same columns; with pruning no line's length is seen.
        enforceSchema=Path(place).is_file(),
        columnPruning=False,
    )
    columns = reader.load(literal(place)).columns
    if not columns:
        return reader
    texts = [StructField(name, StringType()) for name in (*columns, BROKEN_ROW)]
    return reader.schema(StructType(texts))


def _place(domain: Domain) -> str:
    path = domain.source.path
    if "://" in path:
        return path
    place = (domain.folder / path).absolute()
    if not place.exists():
        raise InputError(
            f"[source] path of domain {domain.name!r}: there is nothing at {place}; "
            "a relative path starts at the domain file's folder"
        )
    return str(place)
