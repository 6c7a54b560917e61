"""Ranker samples, histories, tokens of one line -> each sample with its user's past written out.

The same rows as `TokenStore.fetch` gives, bit for bit, in two steps: what few rows say (`gathered`,
a row for each block of a user's events that a day's samples look back to) and what each sample then
reads of them (`unfolded`), so that the copies of a past are made last and never shuffled. A past is
read once for all samples of a moment. No list holds more than 2 L events, however many a user has.

Rules of time, DESIGN.md section 5: an event, a publication or a label of the same microsecond as
as_of is the future; events of one instant are in order of instance_id.

Letters: L sequence length, n a sample's number of events before it, r an event's number (its
user's first is 0). Block b holds the events of L b - L <= r < L b + L, so that the newest L before
any n are within block n div L.
"""

from __future__ import annotations

from collections.abc import Iterator

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F

from pipelines.domain import Domain
from pipelines.features import NEVER_US
from pipelines.token_format import TokenFormat

SAMPLE = ("instance_id", "item_id", "request_id", "is_sampled")
"""What is carried of a sample beside its user and moment."""
TWICE = "an instance is in the histories twice, or has two tokens of this line"
"""Part of the error with which Spark ends on such rows."""
OTHER_FORMAT = "tokens are not of the declared format"


def materialized(
    samples: DataFrame,
    histories: DataFrame,
    tokens: DataFrame,
    domain: Domain,
    *,
    length: int,
    form: TokenFormat,
) -> DataFrame:
    """A row of the table `materialized` for each sample, but for compressor_line.

    Args:
        samples, histories: rows of those tables; histories of all days up to the samples' last.
        tokens: instance tokens of one line, of the same days as the histories.
        length: L, at least 1.

    Errors, when the result is computed: TWICE, OTHER_FORMAT.
    """
    rows = gathered(samples, histories, tokens, domain, length=length, form=form)
    return unfolded(rows, domain, length=length, form=form)


def gathered(
    samples: DataFrame,
    histories: DataFrame,
    tokens: DataFrame,
    domain: Domain,
    *,
    length: int,
    form: TokenFormat,
) -> DataFrame:
    """A row for each (user_id, event_date, block): `asked`, its moments with their samples, and
    `past`, a struct of lists of at most 2 L entries that holds the events that those read, in
    order; `first` is the number of the first."""
    events = _events(samples, histories, tokens, domain, form)
    numbered = _numbered(samples, events)
    # A moment after n events reads those from n - L on: only these go on, to their blocks.
    has_asked = F.col("asked").isNotNull()
    reach = [
        each(F.when(has_asked, F.col("number"))).over(Window.partitionBy("user_id")).alias(name)
        for name, each in (("least", F.min), ("most", F.max))
    ]
    is_read = (F.col("number") >= F.col("least") - length) & (F.col("number") < F.col("most"))
    block = F.floor(F.col("number") / length)
    blocks = F.when(has_asked, F.array(block)).otherwise(F.array(block, block + 1))
    by_block = (
        numbered.select("*", *reach)
        .where(has_asked | is_read)
        .select("user_id", "number", "asked", "event", F.explode(blocks).alias("block"))
        .groupBy("user_id", "block")
        .agg(
            F.array_sort(F.collect_list(_beside_number("asked"))).alias("asked"),
            F.array_sort(F.collect_list(_beside_number("event"))).alias("past"),
        )
    )
    return _by_day(by_block, domain, length)


def unfolded(gathered: DataFrame, domain: Domain, *, length: int, form: TokenFormat) -> DataFrame:
    """A row for each sample of `gathered` rows, with the columns of the table `materialized` but
    compressor_line."""
    moments = gathered.select("user_id", "event_date", "first", "past", F.inline_outer("asked"))
    wide = (each.alias(name) for name, each in _wide(domain, length, form))
    read = moments.select("user_id", "event_date", "as_of", "samples", *wide)
    return read.select("*", F.inline_outer("samples")).drop("samples")


def _wide(domain: Domain, length: int, form: TokenFormat) -> Iterator[tuple[str, Column]]:
    """What is read at a moment, by column, padded in front."""
    as_of_us = F.unix_micros("as_of")
    nothing = F.lit(b"\0" * form.num_bytes)
    count = F.least(F.col("number"), F.lit(length)).cast("int")
    start = (F.col("number") - count - F.col("first") + 1).cast("int")

    def newest(name: str) -> Column:
        # Within the function that goes over its entries, and not in a column before: Spark reads
        # the entries of stored lists many times slower.
        return F.slice(f"past.{name}", start, count)

    def padded(value: Column, of: Column) -> Column:
        return F.concat(F.array_repeat(value, length - count), of)

    def known(name: str, at: str, otherwise: Column) -> Column:
        """The value where its time is before as_of."""
        return F.zip_with(
            newest(name), newest(at), lambda x, us: F.when(us < as_of_us, x).otherwise(otherwise)
        )

    yield "token", padded(nothing, known("token", "available_us", nothing))
    yield "mask", padded(F.lit(False), F.array_repeat(F.lit(True), count))
    is_published = F.transform(newest("available_us"), lambda us: us < as_of_us)
    yield "token_mask", padded(F.lit(False), is_published)
    gaps = F.transform(newest("time_us"), lambda us: ((as_of_us - us) / F.lit(1e6)).cast("float"))
    yield "gap_s", padded(F.lit(0.0).cast("float"), gaps)
    for feature in domain.side_features:
        yield feature.stream_column, padded(F.lit(0), newest(feature.stream_column))
    for label in domain.labels:
        column = f"label_{label.name}"
        yield column, padded(F.lit(0), known(column, f"known_us_{label.name}", F.lit(0)))


def _events(
    samples: DataFrame,
    histories: DataFrame,
    tokens: DataFrame,
    domain: Domain,
    form: TokenFormat,
) -> DataFrame:
    """The events of users who ask, with all that a fetch may show of each in the struct `event`."""
    users = samples.select("user_id").distinct()
    is_whole = F.octet_length("token") == form.num_bytes
    theirs = tokens.join(users, "user_id", "left_semi").select(
        "instance_id",
        F.when(F.coalesce(is_whole, F.lit(False)), F.col("token"))
        .otherwise(F.raise_error(F.lit(OTHER_FORMAT)))
        .alias("token"),
        _micros("available_time").alias("available_us"),
    )
    rows = histories.join(users, "user_id", "left_semi").join(theirs, "instance_id", "left")
    facts = [
        F.unix_micros("event_time").alias("time_us"),
        F.coalesce("token", F.lit(b"\0" * form.num_bytes)).alias("token"),
        F.coalesce("available_us", F.lit(NEVER_US)).alias("available_us"),
        *(F.col(f.stream_column) for f in domain.side_features),
    ]
    for label in domain.labels:
        value = F.coalesce(F.col(f"label_{label.name}") + 1, F.lit(0)).cast("int")
        facts += [
            value.alias(f"label_{label.name}"),
            _micros(f"label_time_{label.name}").alias(f"known_us_{label.name}"),
        ]
    event = F.struct(*facts)
    return rows.select("user_id", "event_time", "instance_id", event.alias("event"))


def _numbered(samples: DataFrame, events: DataFrame) -> DataFrame:
    """Events and moments that samples ask at (`event` or `asked` is not null), each with the number
    of its user's events before it: for a moment, of those strictly before."""
    moments = samples.groupBy("user_id", "as_of", "event_date").agg(
        F.collect_list(F.struct(*SAMPLE)).alias("samples")
    )
    asked = moments.select(
        "user_id",
        F.col("as_of").alias("at"),
        F.lit(False).alias("is_event"),
        F.lit(None).cast("long").alias("instance_id"),
        F.struct("as_of", "event_date", "samples").alias("asked"),
    )
    happened = events.select(
        "user_id", F.col("event_time").alias("at"), F.lit(True).alias("is_event"), "instance_id",
        "event",
    )  # fmt: skip
    # At one instant what asks comes first, and so before every event of it.
    in_order = Window.partitionBy("user_id").orderBy("at", "is_event", "instance_id")
    before = in_order.rowsBetween(Window.unboundedPreceding, -1)
    is_again = (
        F.col("is_event")
        & F.lag("is_event").over(in_order)
        & (F.lag("instance_id").over(in_order) == F.col("instance_id"))
    )
    number = F.when(is_again, F.raise_error(F.lit(TWICE)).cast("long")).otherwise(
        F.count(F.when(F.col("is_event"), 1)).over(before)
    )
    both = asked.unionByName(happened, allowMissingColumns=True)
    return both.select("user_id", number.alias("number"), "asked", "event")


def _by_day(by_block: DataFrame, domain: Domain, length: int) -> DataFrame:
    """Blocks that are asked of, a row for each day on which they are, with what is read then."""
    dates = F.col("asked.of.event_date")
    by_day = by_block.select(
        "user_id", "asked", "past", dates.alias("dates"),
        F.explode(F.array_distinct(dates)).alias("event_date"),
    )  # fmt: skip
    # In order of number, and so of day: a day's first moment reads from where the day does, its
    # last to the day's end.
    first_at = F.array_position("dates", F.col("event_date")).cast("int")
    num_after = F.array_position(F.reverse("dates"), F.col("event_date")).cast("int") - 1
    of_day = by_day.select(
        "user_id", "event_date", "past",
        F.slice("asked", first_at, F.size("dates") - num_after - first_at + 1).alias("asked"),
    )  # fmt: skip
    start = F.greatest(F.element_at("asked.number", 1) - length, F.lit(0))
    end = F.element_at("asked.number", -1)
    skipped = (start - F.coalesce(F.get("past.number", F.lit(0)), start)).cast("int")
    read = of_day.select(
        "user_id", "event_date", "asked", start.alias("first"),
        F.slice("past", skipped + 1, (end - start).cast("int")).alias("past"),
    )  # fmt: skip
    return read.select(
        "user_id",
        "event_date",
        "first",
        F.struct(*(F.col(f"past.of.{name}").alias(name) for name in _facts(domain))).alias("past"),
        F.arrays_zip(
            F.col("asked.number").alias("number"),
            F.col("asked.of.as_of").alias("as_of"),
            F.col("asked.of.samples").alias("samples"),
        ).alias("asked"),
    )


def _facts(domain: Domain) -> list[str]:
    """What is gathered of each event."""
    labels = [f"{kind}_{label.name}" for label in domain.labels for kind in ("label", "known_us")]
    side = [feature.stream_column for feature in domain.side_features]
    return ["time_us", "token", "available_us", *side, *labels]


def _beside_number(name: str) -> Column:
    """A struct by which a list is sorted; null, which lists leave out, where there is none."""
    return F.when(F.col(name).isNotNull(), F.struct("number", F.col(name).alias("of")))


def _micros(column: str) -> Column:
    """Microseconds since 1970; never, where it is null."""
    return F.coalesce(F.unix_micros(column), F.lit(NEVER_US))
