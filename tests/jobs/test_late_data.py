"""Events that come late, change or go: found by the next run, and no other day is touched or even
read."""

from __future__ import annotations

import os
import shutil
from datetime import date, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from pyspark.sql import SparkSession

from jobs.events import open_events
from jobs.raw_log import looked
from jobs.spark_faults import SPARK_ERRORS
from pipelines import delta, tables
from pipelines.days import Days, to_us
from tests.jobs.test_build_jobs import (
    FIRST,
    LOG,
    NEGATIVES,
    SCHEMA,
    Row,
    Shop,
    clicks,
    content,
    days_flags,
    done,
    iat,
    row,
    us,
)

SECOND, LAST = FIRST + timedelta(days=1), FIRST + timedelta(days=3)


def one(day: date) -> Days:
    return Days(day, day + timedelta(days=1))


class Folder(Shop):
    """A log in which each part is a file of its own."""

    def start(self) -> Folder:
        self.write([])
        shutil.rmtree(self.log) if self.log.is_dir() else self.log.unlink()
        for day in LOG:
            self.add(
                f"day {day}", [r for r in clicks() if us(day) <= r["shown_at"] < us(day, 86400)]
            )
        return self

    def add(self, name: str, rows: list[Row]) -> Path | None:
        """One more file; where it is, if the format lets us choose."""
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        if self.format == "delta":
            if rows:
                write_deltalake(self.log, table, mode="append")
            return None
        path = self.log / f"{name}.{self.format}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path) if self.format == "parquet" else pc.write_csv(table, path)
        return path


@pytest.fixture(params=["parquet", "delta", "csv"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    # Brackets are read as a pattern by delta-rs and by Spark's reader of many-line CSV.
    name = "a [log] of 100%" if request.param == "parquet" else "a log, 100%"
    return Folder(tmp_path / name, request.param).start()


def planned(shop: Shop, lake: object, *flags: object) -> list[str]:
    said = done("backfill", shop, lake, "--dry-run", *flags).out.splitlines()
    return [line.strip() for line in said if "instances (" in line]


ALONE = ("--tables", "instances")
CHANGED = "instances (raw log changed)"


def test_late_events_rebuild_their_days_and_no_other(
    spark: SparkSession, log: Folder, tmp_path: Path
) -> None:
    lake, instances = tmp_path / "lake", tables.instances(log.domain)
    assert "iat backfill" not in done("build-instances", log, lake).out
    # The same events in other files, and in another order, change nothing.
    if log.format == "delta":
        DeltaTable(log.log).optimize.compact()
    else:
        for file in log.log.iterdir():
            file.unlink()
        log.add("all", clicks()[::-1])
    assert planned(log, lake, *ALONE) == []
    version = delta.open_table(str(lake), instances).version()
    log.add("late", [row("late", "7", us(SECOND, 99)), row("late", "8", us(LAST, 99))])
    assert planned(log, lake, *ALONE) == [f"{SECOND}: {CHANGED}", f"{LAST}: {CHANGED}"]
    # A build of one of them says that the other is left.
    told = done("build-instances", log, lake, *days_flags(one(LAST))).out
    assert f"1 days built earlier have changed in the log since ({SECOND} the first)" in told
    done("backfill", log, lake, *ALONE)
    done("build-instances", log, tmp_path / "anew")
    assert delta.read(str(lake), instances) == delta.read(str(tmp_path / "anew"), instances)
    assert delta.open_table(str(lake), instances).version() == version + 2
    assert planned(log, lake, *ALONE) == []


def test_of_a_log_that_others_share_only_the_domain_s_own_events_count(
    spark: SparkSession, log: Folder, tmp_path: Path
) -> None:
    text = Path(log.file).read_text()
    own = 'source = {only = {product = ["1", 3, 5], visitor = ["user1", "user2"]}, '
    Path(log.file).write_text(text.replace("source = {", own))
    kept = [r for r in clicks() if r["product"] in "135" and r["visitor"] in ("user1", "user2")]
    lake, alone = tmp_path / "lake", tmp_path / "alone"
    said = done("build-instances", log, lake).out
    assert f"{len(kept)} events" in said
    done("build-instances", Shop(tmp_path / "part", log.format).write(kept), alone)
    instances = tables.instances(log.domain)
    assert delta.read(str(lake), instances) == delta.read(str(alone), instances)
    # An event of another domain is no reason to build its day again; one of its own is.
    log.add("late", [row("user1", "2", us(LAST, 98)), row("other", "1", us(SECOND, 98))])
    assert planned(log, lake, *ALONE) == []
    log.add("later", [row("user1", "3", us(LAST, 99))])
    assert planned(log, lake, *ALONE) == [f"{LAST}: {CHANGED}"]
    # To keep others is to build anew.
    Path(log.file).write_text(text.replace("source = {", own.replace("user2", "user3")))
    assert "domain file changed" in planned(log, lake, *ALONE)[0]
    Path(log.file).write_text(text.replace("source = {", own.replace('"1", 3, 5', '"none"')))
    nothing = iat("build-instances", log, tmp_path / "nothing")
    assert (nothing.code, "has no event with product of none" in nothing.err) == (2, True)
    Path(log.file).write_text(text.replace("source = {", own.replace("product", "prodct")))
    unknown = iat("build-instances", log, tmp_path / "unknown")
    assert (unknown.code, "'prodct' (did you mean 'product'?)" in unknown.err) == (2, True)


def test_a_broken_line_belongs_to_every_domain_of_the_log(
    spark: SparkSession, tmp_path: Path
) -> None:
    log = Folder(tmp_path / "log", "csv").start()
    text = Path(log.file).read_text() + "[limits]\nmax_quarantined_share = 1.0\n"
    Path(log.file).write_text(text.replace("source = {", 'source = {only = {product = ["1"]}, '))
    with (log.log / f"day {FIRST}.csv").open("a") as file:
        file.write("one value\n")
    assert "1 events quarantined" in done("build-instances", log, tmp_path / "lake").out


def test_what_is_read_is_what_was_looked_at_whatever_comes_or_goes_meanwhile(
    spark: SparkSession, log: Folder, tmp_path: Path
) -> None:
    raw = open_events(spark, log.domain, str(tmp_path / "lake"))
    log.add("after it was opened", [row("late", "7", us(SECOND, 98))])
    found = looked(raw, str(tmp_path / "lake"), log.domain, commit=None)
    assert found.num_events == len(clicks()) + 1
    log.add("after it was looked at", [row("late", "8", us(SECOND, 99))])
    if log.format == "delta":
        DeltaTable(log.log).optimize.compact()
    assert raw.read(found.files_of(LOG)).count() == found.num_events
    if log.format != "delta":
        (log.log / f"day {SECOND}.{log.format}").unlink()
        with pytest.raises(SPARK_ERRORS):
            raw.read(found.files_of(LOG)).count()


def test_files_of_one_name_in_many_folders_are_many_files(
    spark: SparkSession, tmp_path: Path
) -> None:
    log = Folder(tmp_path / "log").start()
    shutil.rmtree(log.log)
    for day in (FIRST, SECOND):
        log.add(f"dt={day}/part-0", [row("ann", "1", us(day)), row("bob", "2", us(day))])
    raw = open_events(spark, log.domain, str(tmp_path / "lake"))
    found = looked(raw, str(tmp_path / "lake"), log.domain, commit=None)
    assert found.files_of(one(SECOND)) == {f"dt={SECOND}/part-0.parquet"}
    events = raw.read(found.files_of(one(SECOND))).collect()
    assert {(event["visitor"], event["dt"]) for event in events} == {
        ("ann", SECOND),
        ("bob", SECOND),
    }


def test_a_day_opens_no_file_of_another_day(
    spark: SparkSession, log: Folder, tmp_path: Path
) -> None:
    lake = tmp_path / "lake"
    done("build-instances", log, lake, *days_flags(Days(FIRST, SECOND)))
    held = sorted(file for file in log.log.glob("*.*") if file.is_file())
    new = [row("new", "3", us(LOG.end, 5))]
    log.add("tomorrow", new)
    for file in held[1 if log.format == "parquet" else 0 :]:
        # The same size and time, and nothing left but what tells Spark the columns: a line of names
        # in CSV; the first file of Parquet, above.
        stat, text = file.stat(), file.read_bytes()
        names = text[: text.index(b"\n") + 1] if log.format == "csv" else b""
        file.write_bytes(names.ljust(stat.st_size, b"\0"))
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    done("build-instances", log, lake, *days_flags(one(LOG.end)))
    found = delta.read(str(lake), tables.instances(log.domain), one(LOG.end))
    assert found["user_key"].to_pylist() == ["new"]


def test_days_that_the_log_has_lost_or_won_are_found(spark: SparkSession, tmp_path: Path) -> None:
    log, lake = Folder(tmp_path / "log").start(), tmp_path / "lake"
    done("build-instances", log, lake, *days_flags(Days(SECOND, LAST)))
    # Days before the first that was built are nobody's wish; days after it are.
    assert planned(log, lake, *ALONE) == [f"{LAST}: instances (missing)"]
    (log.log / f"day {SECOND}.parquet").unlink()
    done("backfill", log, lake, *ALONE)
    held = delta.num_rows(str(lake), tables.instances(log.domain), Days(FIRST, LOG.end))
    assert held.keys() == {LAST}
    assert planned(log, lake, *ALONE) == []


def test_a_label_that_matures_rewrites_its_day_and_is_unknown_until_its_time(
    spark: SparkSession, tmp_path: Path
) -> None:
    late = '[[label]]\nname = "buy"\ncolumn = "price"\nat_least = 5\ndelay = "2d"\nwindow = "7d"'
    log, lake = Folder(tmp_path / "log"), tmp_path / "lake"
    log.write([], more=NEGATIVES)
    text = Path(log.file).read_text().replace("[[feature]]", f"{late}\n[[feature]]", 1)
    Path(log.file).write_text(text)
    log.log.unlink()
    for day in (FIRST, SECOND):
        log.add(f"day {day}", [row("ann", "1", us(day), price=None), row("bob", "2", us(day, 1))])
    done("build", log, lake)
    before = content(lake, log.domain)["histories/shop"]
    assert [r["label_buy"] for r in before if r["event_date"] == FIRST].count(None) == 1
    log.add(f"day {FIRST}", [row("ann", "1", us(FIRST), price=9.0), row("bob", "2", us(FIRST, 1))])
    made_of_it = "streams (instances rewritten), samples (instances rewritten)"
    assert planned(log, lake) == [f"{FIRST}: {CHANGED}, {made_of_it}"]
    done("backfill", log, lake)
    for table in ("histories/shop", "ranker_samples/shop"):
        rows = [r for r in content(lake, log.domain)[table] if r["label_buy"] == 1]
        (known,) = {to_us(r["label_time_buy"]) for r in rows}
        assert known == us(FIRST) + 2 * 86_400_000_000
        assert {r["event_date"] for r in rows} == {FIRST}
