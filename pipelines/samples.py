"""Instances -> ranker samples: who asked, when, about what, and what came of it."""

from __future__ import annotations

from pyspark.sql import DataFrame

from pipelines import tables
from pipelines.domain import Domain


def ranker_samples(model_ready: DataFrame, domain: Domain) -> DataFrame:
    """One row per instance with only the features known at the request; the past is pointed to by
    (user_id, as_of)."""
    columns = tables.ranker_samples(domain).schema.names
    return model_ready.withColumnRenamed("event_time", "as_of").select(*columns)
