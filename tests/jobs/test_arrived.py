"""`iat arrived`: whether a log has come to a day, whatever it is stored as."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from deltalake import write_deltalake

from jobs import arrived
from jobs.cli import run
from pipelines.errors import CheckFailedError, InputError

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)
DAY = NOON.date()
FORMS: dict[str, tuple[str, Any]] = {
    "parquet": ("timestamp", lambda t: pa.array([t], pa.timestamp("us", "UTC"))),
    "parquet without a zone": ("timestamp", lambda t: pa.array([t.replace(tzinfo=None)])),
    "parquet of days": ("timestamp", lambda t: pa.array([t.date()])),
    "parquet of seconds": ("s", lambda t: pa.array([int(t.timestamp())])),
    "parquet of milliseconds": ("ms", lambda t: pa.array([t.timestamp() * 1000])),
    "csv": ("iso", lambda t: pa.array([t.isoformat()])),
    "csv of a zone": ("iso", lambda t: pa.array([t.astimezone().isoformat()])),
    "csv of microseconds": ("us", lambda t: pa.array([str(int(t.timestamp() * 1e6))])),
    "delta": ("timestamp", lambda t: pa.array([t], pa.timestamp("us", "UTC"))),
}


def log(folder: Path, form: str, *moments: datetime) -> str:
    """A domain file beside its log, which holds an event at each moment."""
    kind, (unit, made) = form.split()[0], FORMS[form]
    place = folder / "log"
    place.mkdir(exist_ok=True)
    for number, moment in enumerate(moments):
        rows = pa.table({"u": ["1"], "i": ["2"], "t": made(moment)})
        if kind == "csv":
            pyarrow.csv.write_csv(rows, place / f"{number}.csv")
        elif kind == "parquet":
            pq.write_table(rows, place / f"{number}.parquet")
        else:
            write_deltalake(place, rows, mode="append")
    file = folder / "shop.toml"
    file.write_text(
        f'name = "shop"\nsource = {{path = "log", format = "{kind}"}}\n'
        f'columns = {{user = "u", item = "i", time = "t", time_unit = "{unit}"}}\n'
        '[[label]]\nname = "buy"\nalways = 1\n'
        '[[feature]]\nname = "item"\ncolumn = "i"\nside = "item"\n'
    )
    return str(file)


def ask(file: str, day: date, **given: Any) -> bool:
    args = arrived.Args(domain=file, lake="lake", start=day, end=day + timedelta(days=1), **given)
    try:
        return bool(arrived.main(args)["arrived"])
    except CheckFailedError as error:
        return bool((error.result or {"arrived": True})["arrived"])


@pytest.mark.parametrize("form", FORMS)
def test_a_log_has_come_to_the_days_up_to_its_latest_event(tmp_path: Path, form: str) -> None:
    file = log(tmp_path, form, NOON - timedelta(days=3), NOON)
    assert [ask(file, DAY + timedelta(days=n)) for n in (-2, 0, 1)] == [True, True, False]
    assert [ask(file, DAY + timedelta(days=n), closed=True) for n in (-1, 0)] == [True, False]


def test_a_mistyped_year_is_no_sign(tmp_path: Path) -> None:
    file = log(tmp_path, "parquet", NOON, NOON.replace(year=2926))
    assert not ask(file, DAY + timedelta(days=1))


def test_a_log_that_is_not_there_yet_has_not_come(tmp_path: Path) -> None:
    file = log(tmp_path, "parquet")
    (tmp_path / "log").rmdir()
    assert not ask(file, DAY)


def test_exit_codes_are_those_a_sensor_waits_by(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = log(tmp_path, "csv", NOON)
    words = ["arrived", "--domain", file, "--lake", "lake", "--start", str(DAY), "--end"]
    assert run([*words, str(DAY + timedelta(days=1))]) == 0
    assert run([*words, str(DAY + timedelta(days=2))]) == 1
    text = Path(file).read_text()
    Path(file).write_text(text.replace('time = "t"', 'time = "when"'))
    assert run([*words, str(DAY + timedelta(days=1))]) == 2
    assert "when" in capsys.readouterr().err


def test_what_cannot_be_read_says_where(tmp_path: Path) -> None:
    file = log(tmp_path, "parquet", NOON)
    (tmp_path / "log" / "0.parquet").write_bytes(b"no")
    with pytest.raises(InputError, match=r"\[source\] of domain 'shop'"):
        ask(file, DAY)
