"""What a streaming line predicted of each day before it was trained on the day: by these, lines are
compared on days that both have walked."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from compressor import versions
from compressor.data import StreamData
from compressor.walk import DayResult
from pipelines import forgotten
from pipelines.days import Days, as_date
from pipelines.errors import InputError


def save(lake: str, line: str, data: StreamData, result: DayResult) -> None:
    """A file a day beside the line's weights: instance_id, user_id, logit."""
    columns = {"instance_id": data.instance_id, "user_id": data.user_id}
    rows = {name: values[result.row] for name, values in columns.items()}
    place = path(lake, line, str(as_date(result.day)))
    _write(place, pa.table({**rows, "logit": result.score}).sort_by("instance_id"))


def forget(lake: str, line: str, users: Collection[int]) -> None:
    """The users' rows leave every day of a line."""
    for place in sorted(path(lake, line, "").parent.glob("*.parquet")):
        rows = pq.read_table(place)
        others = forgotten.without(rows, users)
        if len(others) < len(rows):
            _write(place, others)


def _write(place: Path, rows: pa.Table) -> None:
    """Whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        pq.write_table(rows, part)
        part.replace(place)
    finally:
        part.unlink(missing_ok=True)


def path(lake: str, line: str, day: str) -> Path:
    return versions.line_folder(lake, line) / "predictions" / f"{day}.parquet"


def logits(lake: str, line: str, days: Days, instance_id: pa.Array) -> npt.NDArray[np.float32]:
    """The line's logit of each instance, NaN where it has none; InputError for a day it has not
    walked."""
    parts = []
    for day in days:
        place = path(lake, line, str(day))
        if not place.is_file():
            raise InputError(
                f"line {line} kept no predictions of {day}: it has not walked the day, or was "
                "walked before lines kept any. Give days that it has walked"
            )
        parts.append(pq.read_table(place))
    held = pa.concat_tables(parts).sort_by("instance_id")
    known, wanted = held["instance_id"].to_numpy(), instance_id.to_numpy()
    logit = held["logit"].to_numpy()
    if not len(known):
        return np.full(len(wanted), np.nan, np.float32)
    at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    found: npt.NDArray[np.float32] = np.where(known[at] == wanted, logit[at], np.float32(np.nan))
    return found
