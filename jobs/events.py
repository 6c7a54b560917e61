"""A domain's raw event log as a DataFrame, wherever its domain file says it is."""

from __future__ import annotations

from pathlib import Path

from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession

from pipelines import sources
from pipelines.domain import Domain
from pipelines.errors import InputError


def open_events(
    spark: SparkSession,
    domain: Domain,
    lake: str,
    *,
    data: Path | None = None,
    limit_users: int | None = None,
    limit_days: int | None = None,
    seed: int = 0,
) -> tuple[DataFrame, str]:
    """The events, and where they are.

    A public log is first written as one Parquet file below the lake; the other arguments choose a
    sample of it (`pipelines.sources.prepare`) and are refused for a log that is read in place.
    """
    if domain.source.reader:
        place = str(
            sources.prepare(
                domain, lake, data=data, limit_users=limit_users, seed=seed, days=limit_days
            )
        )
        return spark.read.parquet(place), place
    if data or limit_users or limit_days:
        raise InputError(
            f"--data, --limit-users and --limit-days are for the public logs; domain "
            f"{domain.name!r} reads {domain.source.path}"
        )
    place = _place(domain)
    kind = domain.source.format
    reader = spark.read.format(kind)
    if kind == "csv":
        # Text as it came: what is a number or a time, the domain file says. Quotes as `iat init`.
        reader = reader.options(header=True, escape='"', mode="PERMISSIVE", encoding="UTF-8")
    try:
        return reader.load(place), place
    except PySparkException as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"[source] of domain {domain.name!r}: {place} does not read as {kind}: {reason}"
        ) from error


def _place(domain: Domain) -> str:
    path = domain.source.path
    if "://" in path:
        return path
    place = domain.folder / path
    if not place.exists():
        raise InputError(
            f"[source] path of domain {domain.name!r}: there is nothing at {place}; "
            "a relative path starts at the domain file's folder"
        )
    return str(place)
