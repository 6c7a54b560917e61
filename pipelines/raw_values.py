"""Raw columns of whatever type -> text, lists, numbers and times; what cannot be read is null,
never an error."""

from __future__ import annotations

import re
from datetime import timedelta

from pyspark.sql import Column
from pyspark.sql import functions as F
from pyspark.sql.types import (
    ArrayType,
    BooleanType,
    DataType,
    DateType,
    FractionalType,
    IntegralType,
    NumericType,
    StringType,
    StructType,
    TimestampNTZType,
    TimestampType,
)

from pipelines.domain import TimeUnit, duration
from pipelines.errors import InputError

PER_SECOND = {"s": 1_000_000, "ms": 1_000, "us": 1}
"""Microseconds in one of each time unit."""
FIRST_US, LAST_US = -62_135_596_800_000_000, 253_402_300_799_999_999
"""Years 1 to 9999: what a calendar date can be."""
EXACT = 2.0**53
"""Whole numbers below this are exact as floating point."""


def text(value: Column, kind: DataType, where: str) -> Column:
    """The value as its owner would write it: whole floats without `.0`; empty, blank and NaN are
    null."""
    if isinstance(kind, ArrayType | StructType) or "map<" in kind.simpleString():
        raise InputError(
            f"{where} needs single values, but its column is {kind.simpleString()}: "
            'for lists set kind = "multi-category" or "sequence", or name a column of its own'
        )
    if isinstance(kind, FractionalType) and kind.typeName() in ("float", "double"):
        is_whole = (F.rint(value) == value) & (F.abs(value) < EXACT)
        written = F.when(is_whole, value.try_cast("bigint").cast("string")).otherwise(
            value.cast("string")
        )
        return F.when(~F.isnan(value), written)
    return F.when(F.trim(value.cast("string")) != "", value.cast("string"))


def list_of(value: Column, kind: DataType, separator: str, where: str) -> Column:
    """The values of an array, or of a string split at `separator`; trimmed, without empty ones;
    null if there is none."""
    if isinstance(kind, ArrayType):
        element = kind.elementType
        parts = F.transform(value, lambda each: F.trim(text(each, element, where)))
    else:
        split = F.split(text(value, kind, where), re.escape(separator))
        # Not F.trim alone: as a function of two it would be given each value's index to trim.
        parts = F.transform(split, lambda each: F.trim(each))
    kept = F.filter(parts, lambda each: each != "")
    return F.when(F.size(kept) > 0, kept)


def number(value: Column, kind: DataType, where: str) -> Column:
    """The value as a double; null where it is empty or no number."""
    if isinstance(kind, StringType):
        return F.trim(value).try_cast("double")
    if isinstance(kind, BooleanType):
        return value.cast("int").cast("double")
    if not isinstance(kind, NumericType):
        raise InputError(f"{where} needs numbers, but its column is {kind.simpleString()}")
    return value.cast("double")


def moment(value: Column, kind: DataType, unit: TimeUnit, where: str) -> Column:
    """The value as a UTC timestamp; null where it is no time between the years 1 and 9999."""
    if unit in PER_SECOND:
        if not isinstance(kind, NumericType | StringType):
            raise _wrong_unit(kind, unit, where)
        read = F.timestamp_micros(_whole(value, kind, PER_SECOND[unit]))
    elif isinstance(kind, TimestampType | TimestampNTZType | DateType):
        read = value.cast("timestamp")
    elif isinstance(kind, StringType) and unit == "iso":
        # Without the date in front, Spark would read "12:30" as that hour of the day it runs on.
        dated = F.when(value.rlike(r"^\s*\d{4}-\d{1,2}-\d{1,2}"), value)
        read = F.try_to_timestamp(dated)
    else:
        raise _wrong_unit(kind, unit, where)
    us = F.unix_micros(read)
    return F.when((us >= FIRST_US) & (us <= LAST_US), read)


def microseconds(text: str) -> int:
    """`30s`, `15m`, `2h` or `7d` in microseconds."""
    return duration(text, "a duration") // timedelta(microseconds=1)


def _whole(value: Column, kind: DataType, factor: int) -> Column:
    """value x factor as a bigint, null beyond LAST_US; exact for whole numbers and decimal
    fractions."""
    if isinstance(kind, IntegralType):
        limit = LAST_US // factor
        return F.when(value.between(-limit, limit), value.cast("bigint") * factor)
    exact = (F.trim(value) if isinstance(kind, StringType) else value).try_cast("decimal(27,6)")
    us = exact * F.lit(factor).cast("decimal(8,0)")
    return F.when(us.between(-LAST_US, LAST_US), F.round(us).cast("bigint"))


def _wrong_unit(kind: DataType, unit: str, where: str) -> InputError:
    if isinstance(kind, StringType):
        fit = 'time_unit = "iso"'
    elif isinstance(kind, NumericType):
        fit = 'time_unit = "s", "ms" or "us"'
    else:
        fit = 'time_unit = "timestamp"'
    return InputError(
        f'{where}: its column is {kind.simpleString()}, which time_unit = "{unit}" cannot read; '
        f"set {fit}"
    )
