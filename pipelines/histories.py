"""Instances -> histories: keys, side information and labels of what really happened."""

from __future__ import annotations

from pyspark.sql import DataFrame

from pipelines import tables
from pipelines.domain import Domain
from pipelines.user_order import with_bucket


def histories(
    model_ready: DataFrame, domain: Domain, *, num_buckets: int = tables.NUM_BUCKETS
) -> DataFrame:
    """The real events among the model-ready rows, never a sampled one, in the user-order stream's
    order."""
    real = with_bucket(model_ready.where("not is_sampled"), num_buckets)
    return real.select(*tables.histories(domain).schema.names)
