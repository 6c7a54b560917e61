"""Instances -> the temporal-order stream: model-ready rows, a day's in time order."""

from __future__ import annotations

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from pipelines import tables
from pipelines.domain import Domain, Feature

SEPARATOR = "\x1f"


def temporal_order(instances: DataFrame, domain: Domain) -> DataFrame:
    """The same instances, model-ready; the table sorts each day by (event_time, instance_id)."""
    return model_ready(instances, domain).select(*tables.temporal_order(domain).schema.names)


def model_ready(instances: DataFrame, domain: Domain) -> DataFrame:
    """The rows with each readable feature replaced by its bucket(s) or scaled number.

    A bucket is 0 if missing, else pmod(xxhash64(embedding table, \\x1f, value), buckets - 1) + 1:
    the
    same value in features that share a table is the same bucket. A list is cut to max_length (a
    sequence keeps its last values), a missing one is empty. A number is (transform(x) - center) /
    scale.
    """
    return instances.withColumns({f.stream_column: _model_ready(f) for f in domain.features})


def _model_ready(feature: Feature) -> Column:
    value = F.col(feature.stream_column)
    if feature.is_number:
        return _scaled(feature, value)
    if not feature.is_list:
        return F.when(value.isNotNull(), _bucket(feature, value)).otherwise(0)
    start = F.lit(1)
    if feature.kind == "sequence":
        start = F.greatest(F.size(value) - feature.max_length + 1, start)
    kept = F.slice(value, start, feature.max_length)
    return F.coalesce(
        F.transform(kept, lambda each: F.when(each.isNotNull(), _bucket(feature, each))),
        F.array().cast("array<int>"),
    )


def _bucket(feature: Feature, value: Column) -> Column:
    """Of a value that is not null: xxhash64 of null is its seed, not null."""
    named = F.concat(F.lit(feature.embedding_table + SEPARATOR), value)
    return (F.pmod(F.xxhash64(named), F.lit(feature.buckets - 1)) + 1).cast("int")


def _scaled(feature: Feature, value: Column) -> Column:
    if feature.transform == "log":
        value = F.signum(value) * F.log1p(F.abs(value))
    return ((value - feature.center) / feature.scale).cast("float")
