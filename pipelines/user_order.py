"""Instances -> the user-order stream: the same rows, a user's together in time order within each
day."""

from __future__ import annotations

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from pipelines import tables
from pipelines.domain import Domain


def user_order(
    model_ready: DataFrame, domain: Domain, *, num_buckets: int = tables.NUM_BUCKETS
) -> DataFrame:
    """The model-ready rows with user_bucket; the table sorts each day by (user_bucket, user_id,
    event_time, instance_id).

    As every day has this order, the stream over any days is their merge, bucket by bucket.
    """
    columns = tables.user_order(domain).schema.names
    return with_bucket(model_ready, num_buckets).select(*columns)


def with_bucket(rows: DataFrame, num_buckets: int) -> DataFrame:
    """The rows with user_bucket = pmod(user_id, num_buckets)."""
    bucket = F.pmod(F.col("user_id"), F.lit(num_buckets)).cast("int")
    return rows.withColumn("user_bucket", bucket)
