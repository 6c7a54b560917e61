"""Half-open ranges of UTC days, the unit of every read and write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from pipelines.errors import InputError


@dataclass(frozen=True, slots=True)
class Days:
    """Every event with ``start <= event_date < end``."""

    start: date
    end: date

    def __post_init__(self) -> None:
        if self.end < self.start:
            raise InputError(
                f"--end must not be before --start: got start {self.start}, end {self.end}"
            )

    def __iter__(self) -> Iterator[date]:
        return (self.start + timedelta(days=n) for n in range(len(self)))

    def __len__(self) -> int:
        return (self.end - self.start).days

    def __contains__(self, day: object) -> bool:
        return isinstance(day, date) and self.start <= day < self.end

    def __str__(self) -> str:
        return f"[{self.start}, {self.end})"

    def predicate(self) -> str:
        """The range as a Delta predicate on ``event_date``."""
        return f"event_date >= '{self.start}' AND event_date < '{self.end}'"

    def chunks(self, num_days: int) -> Iterator[Days]:
        """Consecutive ranges of at most `num_days` days that make up this one."""
        start = self.start
        while start < self.end:
            end = min(start + timedelta(days=num_days), self.end)
            yield Days(start, end)
            start = end


def midnight(day: date) -> datetime:
    """The first instant of a UTC day."""
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


def to_us(moment: datetime) -> int:
    """Microseconds since 1970 UTC, exactly."""
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def as_date(day: int) -> date:
    """Days since 1970 as a date."""
    return EPOCH + timedelta(days=day)


def as_number(day: date) -> int:
    """A date as days since 1970."""
    return (day - EPOCH).days


EPOCH = date(1970, 1, 1)
