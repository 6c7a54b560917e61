"""Sampled negatives for logs that hold only positives: what others took the same day and this user
did not.

Drawn from the day in which a model predicts, never from a longer slice: a model that remembers
items
would know that a later purchase of the same week has not happened yet (FINDINGS.md, section 1.1).
"""

from __future__ import annotations

from typing import Literal

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from pipelines import tables
from pipelines.domain import Domain
from pipelines.instances import instance_id


def with_negatives(
    real: DataFrame, domain: Domain, *, pool: Literal["day", "week"] = "day"
) -> DataFrame:
    """The instances, and beside each positive of the main task up to `per_positive` sampled
    negatives.

    The events of a day are shuffled by a hash of (seed, instance_id); a positive's draws are its
    successors in that order (at its end, its predecessors), so that over a day each event is drawn
    equally often and an item as often as it was taken. A draw is passed over if the user took its
    item
    that day or an earlier draw has it; of 2 x reach(per_positive) draws the first fit ones are
    kept,
    so a day with too few other items gives fewer. What a day gives depends on that day's events
    alone,
    and the work grows with the number of events, however many fall on a day.

    A negative is the request of its positive with the drawn event's item: item-side features are
    those
    of that event, `after` ones are missing, the main label is 0 and known when the positive's is,
    other labels are unknown.

    `pool="week"` is wrong on purpose: it plants the leak that `iat verify` must find.
    """
    if domain.negatives is None:
        return real
    per_positive, seed = domain.negatives.per_positive, domain.negatives.seed
    period = (
        F.col("event_date") if pool == "day" else F.date_trunc("week", "event_date").cast("date")
    )
    of_period = Window.partitionBy("period")
    shuffled = of_period.orderBy("rank", "instance_id")
    reach = num_draws(per_positive)
    marked = (
        real.withColumn("period", period)
        .withColumn("taken", F.collect_set("item_id").over(Window.partitionBy("period", "user_id")))
        .withColumn("rank", F.xxhash64(F.lit(seed), "instance_id"))
        .withColumn("drawn", F.struct("item_id", "item_key", *_of_item(domain)))
    )
    drawn = marked.select(
        "*",
        F.collect_list("drawn").over(shuffled.rowsBetween(1, reach)).alias("next"),
        F.collect_list("drawn").over(shuffled.rowsBetween(-reach, -1)).alias("previous"),
    ).withColumn("draws", F.concat("next", F.reverse("previous")))
    items = F.col("draws").getField("item_id")
    drawn = drawn.withColumn("items", items).withColumn("fit", F.array_except("items", "taken"))
    is_positive = F.col(f"label_{domain.label.name}") == 1
    fit = F.when(is_positive, F.transform(F.slice("fit", 1, per_positive), _first_draw))
    own = F.array(F.lit(None).cast(marked.schema["drawn"].dataType))
    rows = drawn.withColumn("candidate", F.explode(F.concat(own, F.coalesce(fit, F.array()))))
    return rows.select(*_columns(domain))


def num_draws(per_positive: int) -> int:
    """How far a positive's draws reach in either direction."""
    return 2 * per_positive + 4


def _first_draw(item: Column) -> Column:
    """The first draw of an item that is among the draws."""
    return F.get("draws", F.array_position("items", item).cast("int") - 1)


def _of_item(domain: Domain) -> list[str]:
    """The feature columns that a negative takes from its drawn event."""
    return [f.stream_column for f in domain.features if f.side == "item" and f.known == "request"]


def _columns(domain: Domain) -> list[Column]:
    """The instances table's columns: the event's own where `candidate` is null, else a
    negative's."""
    candidate = F.col("candidate")
    is_sampled = candidate.isNotNull()
    item_key, item_id = candidate.getField("item_key"), candidate.getField("item_id")
    keys = F.col("user_key"), item_key, F.col("request_key")
    new_id = instance_id(domain, *keys, F.col("instance_id"))
    negative: dict[str, Column] = {
        "instance_id": new_id,
        "item_id": item_id,
        "item_key": item_key,
        "is_sampled": F.lit(True),
        f"label_{domain.label.name}": F.lit(0).cast("tinyint"),
    }
    negative |= {name: candidate.getField(name) for name in _of_item(domain)}
    unknown = [f.stream_column for f in domain.features if f.known == "after"]
    for label in domain.labels[1:]:
        unknown += [f"label_{label.name}", f"label_time_{label.name}"]
    negative |= dict.fromkeys(unknown, F.lit(None))
    return [
        F.when(is_sampled, negative[name]).otherwise(F.col(name)).alias(name)
        if name in negative
        else F.col(name)
        for name in tables.instances(domain).schema.names
    ]
