"""`iat build-instances`, `build-streams`, `build-samples`: from small logs, through the command."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from pyspark.sql import SparkSession

from jobs import check_tables, lineage
from jobs.cli import run
from jobs.spark import SparkTables
from jobs.spark_faults import as_ours
from pipelines import delta, tables
from pipelines.days import Days
from pipelines.domain import Domain, load
from pipelines.errors import InputError, RetryableError

ROOT = Path(__file__).resolve().parents[2]
FIRST = date(2026, 1, 1)
NUM_DAYS = 4
EMPTY_DAY = FIRST + timedelta(days=2)
LOG = Days(FIRST, FIRST + timedelta(days=NUM_DAYS))
BUILT = (tables.instances, tables.temporal_order, tables.user_order, tables.histories)
ALL = (*BUILT, tables.ranker_samples)
DOMAIN = """
name = "shop"
source = {{path = "{path}", format = "{format}"}}
columns = {{user = "visitor", item = "product", time = "shown_at", time_unit = "us"}}
{more}
[[label]]
name = "click"
column = "clicked"
[[feature]]
name = "item"
column = "product"
side = "item"
[[feature]]
name = "title"
column = "title"
side = "item"
[[feature]]
name = "price"
column = "price"
kind = "number"
"""
NEGATIVES = "negatives = {per_positive = 2}"
Row = dict[str, Any]


def us(day: date, second: int = 0) -> int:
    at = datetime(day.year, day.month, day.day, 9, tzinfo=UTC) + timedelta(seconds=second)
    return int(at.timestamp()) * 1_000_000


def row(user: str | None, item: str, at_us: int | None, **changed: Any) -> Row:
    made = {"visitor": user, "product": item, "shown_at": at_us, "clicked": 1, "price": 2.5}
    return made | {"title": f"the {item}"} | changed


def clicks(*, seed: int = 0, per_day: int = 12) -> list[Row]:
    """Days of a few users' clicks, the third of them empty; titles that a CSV file must quote."""
    draw = random.Random(seed)
    days = [day for day in LOG if day != EMPTY_DAY]
    titles = ['say "hi"', "one, two", "first\nsecond", None]
    return [
        row(
            f"user{draw.randrange(5)}", item, us(day, n), clicked=draw.choice([1, 1, 0, None]),
            price=draw.choice([None, 1.25, -3.0]), title=titles[int(item) % 4],
        )
        for day in days
        for n in range(per_day)
        for item in [str(draw.randrange(9))]
    ]  # fmt: skip


SCHEMA = pa.schema(
    {
        "visitor": pa.string(),
        "product": pa.string(),
        "shown_at": pa.int64(),
        "clicked": pa.int64(),
        "price": pa.float64(),
        "title": pa.string(),
    }
)


@dataclass(frozen=True)
class Shop:
    """A folder with a log and its domain file."""

    folder: Path
    format: str = "parquet"

    def write(self, rows: list[Row], *, more: str = NEGATIVES) -> Shop:
        self.folder.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        if self.format == "parquet":
            pq.write_table(table, self.log)
        elif self.format == "delta":
            write_deltalake(self.log, table, mode="overwrite")
        else:
            with self.log.open("w", newline="") as file:
                writer = csv.DictWriter(file, SCHEMA.names)
                writer.writeheader()
                writer.writerows(rows)
        text = DOMAIN.format(path=self.log.name, format=self.format, more=more)
        (self.folder / "shop.toml").write_text(text)
        return self

    @property
    def log(self) -> Path:
        return self.folder / f"log.{self.format}"

    @property
    def file(self) -> str:
        return str(self.folder / "shop.toml")

    @property
    def domain(self) -> Domain:
        return load(self.file)


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


def iat(command: str, shop: Shop, lake: object, *flags: object) -> Said:
    """The command in this process, on the session that runs."""
    out, err = io.StringIO(), io.StringIO()
    words = [command, "--domain", shop.file, "--lake", str(lake), "--master", "local[2]"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([*words, *map(str, flags)])
    return Said(code, out.getvalue(), err.getvalue())


def done(command: str, shop: Shop, lake: object, *flags: object) -> Said:
    said = iat(command, shop, lake, *flags)
    assert said.code == 0, said.err
    return said


def days_flags(days: Days) -> tuple[object, ...]:
    return "--start", days.start, "--end", days.end


def content(lake: object, domain: Domain) -> dict[str, list[Row]]:
    return {make(domain).name: delta.read(str(lake), make(domain)).to_pylist() for make in ALL}


def ids(lake: object, table: tables.Table, days: Days | None = None) -> list[int]:
    found = delta.read(str(lake), table, days, columns=["instance_id"])
    return sorted(found["instance_id"].to_pylist())


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("shop")).write(clicks())


@dataclass(frozen=True)
class Built:
    lake: str
    said: dict[str, Said]
    json: dict[str, Any]


@pytest.fixture(scope="module")
def built(spark: SparkSession, shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The lake of all three commands, run once over the whole log."""
    folder = tmp_path_factory.mktemp("built")
    lake = str(folder / "lake")
    said = {}
    for command in ("build-instances", "build-streams", "build-samples"):
        said[command] = done(command, shop, lake, "--json", folder / f"{command}.json")
    found = {command: json.loads((folder / f"{command}.json").read_text()) for command in said}
    return Built(lake, said, found)


def test_the_commands_say_what_they_built(built: Built, shop: Shop) -> None:
    num = built.json["build-instances"]["instances"]
    num_sampled = built.json["build-instances"]["sampled"]
    assert 0 < num_sampled < num == len(ids(built.lake, tables.instances(shop.domain)))
    assert built.said["build-instances"].out == (
        f"shop: 36 events in {shop.log}\n"
        f"{LOG}: {num} instances, {num_sampled} of them sampled negatives; 0 events quarantined; "
        "1 days are empty\n"
    )
    assert built.json["build-instances"].keys() == {
        "domain", "source", "days", "events", "kept", "quarantined", "rules", "forgotten",
        "instances", "sampled", "empty_days", "version", "changed_days",
    }  # fmt: skip
    assert built.json["build-streams"] == {
        "domain": "shop",
        "days": str(LOG),
        "input_versions": {"instances/shop": 1},
        "rows": {
            "temporal_order/shop": num,
            "user_order/shop": num,
            "histories/shop": num - num_sampled,
        },
    }
    assert f"\n  {'temporal_order/shop':32s} {num:>10d} rows\n" in built.said["build-streams"].out
    samples = built.json["build-samples"]
    assert (samples["rows"], samples["sampled"]) == (num, num_sampled)
    assert f"{num} ranker samples, {num_sampled} of them" in built.said["build-samples"].out


def test_every_table_is_of_the_same_instances(built: Built, shop: Shop) -> None:
    domain = shop.domain
    for days in (None, Days(FIRST + timedelta(days=1), LOG.end)):
        wanted = ids(built.lake, tables.instances(domain), days)
        for make in (tables.temporal_order, tables.user_order, tables.ranker_samples):
            assert ids(built.lake, make(domain), days) == wanted
    rows = delta.read(built.lake, tables.instances(domain)).to_pylist()
    real = sorted(row["instance_id"] for row in rows if not row["is_sampled"])
    assert ids(built.lake, tables.histories(domain)) == real
    found = check_tables.main(check_tables.Args(domain=shop.file, lake=built.lake))
    assert (found["findings"], len(found["tables"])) == ([], len(ALL) + 1)


def test_spark_and_delta_rs_read_the_same(built: Built, shop: Shop, spark: SparkSession) -> None:
    for make in ALL:
        table = make(shop.domain)
        native = delta.read(built.lake, table)
        order = [(name, "ascending") for name in dict.fromkeys((*table.sort_by, "instance_id"))]
        through_spark = SparkTables(spark, built.lake).read(table).toArrow()
        in_order = through_spark.select(table.schema.names).cast(table.schema).sort_by(order)
        assert in_order.to_pylist() == native.sort_by(order).to_pylist()


def test_a_day_is_one_file_with_nothing_beside_it(built: Built, shop: Shop) -> None:
    for make in ALL:
        folder = Path(built.lake, make(shop.domain).name)
        found = sorted(path.parent.name for path in folder.glob("event_date=*/*"))
        assert found == [f"event_date={day}" for day in LOG if day != EMPTY_DAY]
        assert not list(folder.glob("event_date=*/.*"))


def test_a_flipped_bit_in_a_table_is_noticed(built: Built, shop: Shop, tmp_path: Path) -> None:
    file = Path(next(iter(delta.open_table(built.lake, tables.instances(shop.domain)).file_uris())))
    flipped = bytearray(file.read_bytes())
    flipped[pq.read_metadata(file).row_group(0).column(0).data_page_offset + 60] ^= 1
    (tmp_path / "flipped.parquet").write_bytes(flipped)
    pq.read_table(file, page_checksum_verification=True)
    with pytest.raises(OSError, match="CRC checksum"):
        pq.read_table(tmp_path / "flipped.parquet", page_checksum_verification=True)


def test_a_commit_says_which_run_wrote_it_from_what(built: Built, shop: Shop) -> None:
    domain = shop.domain
    reports = delta.read(built.lake, tables.job_reports()).to_pylist()
    runs = {row["job"]: row["run"] for row in reports}
    assert all(json.loads(row["report"])["rows"] for row in reports)
    inputs = {
        tables.instances: ("build-instances", {"source": str(shop.log)}),
        tables.user_order: ("build-streams", {"instances/shop": 1}),
        tables.ranker_samples: ("build-samples", {"instances/shop": 1}),
    }
    for make, (job, read) in inputs.items():
        commit = DeltaTable(f"{built.lake}/{make(domain).name}").history(1)[0]
        told = json.loads(commit["userMetadata"])
        assert (told["job"], told["run"]) == (job, runs[job])
        assert json.loads(told["inputs"]) == read
        assert (told["start"], told["end"]) == (str(LOG.start), str(LOG.end))
        of_run = {"job", "run", "code", "domain", "config", "features", "inputs", "start", "end"}
        assert told.keys() == of_run | ({"raw"} if "source" in told["inputs"] else set())
    found = lineage.main(lineage.Args(table="user_order/shop", lake=built.lake, day=FIRST))
    assert [(x["table"], x["version"], x["run"], x["source"]) for x in found["commits"]] == [
        ("user_order/shop", 1, runs["build-streams"], None),
        ("instances/shop", 1, runs["build-instances"], str(shop.log)),
    ]


def test_days_out_of_order_and_twice_give_the_same_tables(
    spark: SparkSession, built: Built, shop: Shop, tmp_path: Path
) -> None:
    *before, last = LOG.chunks(2)
    for part in (last, *before, last):
        done("build-instances", shop, tmp_path, *days_flags(part))
    for part in (last, *before):
        done("build-streams", shop, tmp_path, *days_flags(part))
    for make in BUILT:
        table = make(shop.domain)
        assert delta.read(str(tmp_path), table) == delta.read(built.lake, table)


def test_a_day_that_is_run_again_is_replaced_alone(
    spark: SparkSession, built: Built, shop: Shop, tmp_path: Path
) -> None:
    lake = tmp_path / "lake"
    shutil.copytree(built.lake, lake)
    changed_day = Days(FIRST + timedelta(days=1), EMPTY_DAY)
    earlier = [row for row in clicks() if row["shown_at"] < us(changed_day.start)]
    extra = row("user9", "7", us(changed_day.start))
    other = Shop(tmp_path / "other").write([*earlier, extra, *clicks(seed=1)[24:]])
    domain = shop.domain
    files = {make: set(delta.open_table(str(lake), make(domain)).file_uris()) for make in BUILT}
    done("build-instances", other, lake, *days_flags(changed_day))
    done("build-streams", other, lake, *days_flags(changed_day))
    for make, before in files.items():
        after = set(delta.open_table(str(lake), make(domain)).file_uris())
        replaced = {Path(file).parent.name for file in before ^ after}
        assert replaced == {f"event_date={changed_day.start}"}
        users = delta.read(str(lake), make(domain), changed_day)["user_id"].to_pylist()
        assert len(set(users)) == 1


def test_a_day_that_became_empty_is_emptied_everywhere(
    spark: SparkSession, built: Built, shop: Shop, tmp_path: Path
) -> None:
    lake = tmp_path / "lake"
    shutil.copytree(built.lake, lake)
    gone = Days(FIRST + timedelta(days=1), EMPTY_DAY)
    kept = [row for row in clicks() if not us(gone.start) <= row["shown_at"] < us(gone.end)]
    fewer = Shop(tmp_path / "fewer").write(kept)
    said = [
        done(command, fewer, lake, *days_flags(gone)).out
        for command in ("build-instances", "build-streams", "build-samples")
    ]
    assert "0 events quarantined; 1 days are empty" in said[0]
    for make in ALL:
        assert ids(lake, make(shop.domain), gone) == []
        assert len(ids(lake, make(shop.domain))) > 0


def test_a_dry_run_says_what_it_would_do_and_writes_nothing(
    spark: SparkSession, built: Built, shop: Shop, tmp_path: Path
) -> None:
    said = done("build-instances", shop, tmp_path / "lake", "--dry-run")
    assert said.out == f"shop: 36 events in {shop.log}; would build {LOG}\n"
    assert not (tmp_path / "lake").exists()
    before = sorted(Path(built.lake).rglob("*"))
    for command, what in (("build-streams", "streams and histories"), ("build-samples", "ranker")):
        assert f"shop: would build {what}" in done(command, shop, built.lake, "--dry-run").out
    assert sorted(Path(built.lake).rglob("*")) == before


@pytest.mark.parametrize("kind", ["csv", "delta"])
def test_a_log_of_any_format_gives_the_same_instances(
    spark: SparkSession, built: Built, shop: Shop, tmp_path: Path, kind: str
) -> None:
    other = Shop(tmp_path, kind).write(clicks())
    done("build-instances", other, tmp_path / "lake")
    table = tables.instances(shop.domain)
    assert delta.read(str(tmp_path / "lake"), table) == delta.read(built.lake, table)


# Bad input.

FAULTY = [
    row(None, "1", us(FIRST)),
    row("ann", "1", us(FIRST), clicked=2),
    row("ann", "1", us(FIRST), price=float("inf")),
    row("ann", "1", us(FIRST), price=float("nan")),
    row("bo", "1", us(FIRST)),
    row("bo", "1", us(FIRST)),
]


def test_what_breaks_a_rule_is_in_quarantine_and_past_its_share_the_job_fails(
    spark: SparkSession, built: Built, shop: Shop, tmp_path: Path
) -> None:
    lake = tmp_path / "lake"
    shutil.copytree(built.lake, lake)
    bad = Shop(tmp_path / "bad").write([*clicks(), *FAULTY])
    said = iat("build-instances", bad, lake, "--json", tmp_path / "found.json")
    assert said.code == 1
    assert json.loads((tmp_path / "found.json").read_text())["rules"]["not_finite:price"] == 2
    assert (
        "of 42 events 5 were rejected, and of the log's 42 events 0 have no day "
        "(bad_label:click 1, duplicate 1, not_finite:price 2, null_user 1): more than "
        "limits.max_quarantined_share = 0.05. The instances stay as they were. Look at "
        f"quarantine/shop in {lake}, then mend the log or raise the limit"
    ) in said.err
    assert "Traceback" not in said.err
    assert content(lake, shop.domain) == content(built.lake, shop.domain)
    rejected = delta.read(str(lake), tables.quarantine(shop.domain))
    assert sorted(rejected["rule"].to_pylist())[0] == "bad_label:click"
    assert rejected.num_rows == 5

    bad.write([*clicks(), *FAULTY], more=f"{NEGATIVES}\nlimits = {{max_quarantined_share = 0.2}}")
    said = done("build-instances", bad, lake)
    assert (
        "5 events quarantined; 1 days are empty\n  1 bad_label:click\n  1 duplicate\n" in said.out
    )
    assert len(delta.read(str(lake), tables.quarantine(shop.domain))) == 5


def test_events_without_a_day_count_against_the_whole_log(
    spark: SparkSession, tmp_path: Path
) -> None:
    """Every day's run meets them: against one day they would fail each day of a good log."""
    limits = 'limits = {max_quarantined_share = 0.1, latest = "2026-01-05"}'
    dayless = [row("ann", "1", None), row("ann", "1", us(date(2126, 1, 1)))]
    few = Shop(tmp_path / "few").write([*clicks(), *dayless], more=limits)
    day = Days(LOG.start, LOG.start + timedelta(days=1))
    said = done("build-instances", few, tmp_path / "lake", *days_flags(day))
    assert "2 events quarantined\n  1 bad_time\n  1 future\n" in said.out
    many = Shop(tmp_path / "many").write([*clicks(), *dayless, *dayless[:1] * 4], more=limits)
    said = iat("build-instances", many, tmp_path / "lake", *days_flags(day))
    assert said.code == 1
    assert "of 12 events 0 were rejected, and of the log's 42 events 6 have no day" in said.err


def refused(said: Said, lake: Path) -> str:
    """The message of a command that refused its input, wrote nothing and showed no traceback."""
    assert said.code == 2, said
    assert "Traceback" not in said.err
    assert not (lake / "instances").exists()
    return said.err


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('user = "visitor"', 'user = "vistor"', r"'vistor' \(did you mean 'visitor'\?\)"),
        ("column =", "colum =", r"'click' has no key 'colum' \(did you mean 'column'\?\)"),
        ('"us"', '"timestamp"', r'columns\.time: its column is bigint.*set time_unit = "s"'),
        ('column = "price"', 'column = "none"', r"names columns that the events lack: 'none'"),
        ('path = "log.parquet"', 'path = "log.csv"', "there is nothing at .*log.csv; a relative"),
        ('"parquet"', '"parkett"', r"one of parquet, csv, delta; got 'parkett' \(did you mean"),
        ('"parquet"', '"delta"', "log.parquet does not read as delta"),
    ],
)
def test_a_domain_file_that_does_not_fit_is_refused(
    spark: SparkSession, shop: Shop, tmp_path: Path, old: str, new: str, says: str
) -> None:
    changed = Shop(tmp_path).write(clicks())
    text = Path(changed.file).read_text()
    assert old in text
    Path(changed.file).write_text(text.replace(old, new, 1))
    said = iat("build-instances", changed, tmp_path / "lake")
    refused(said, tmp_path / "lake")
    assert re.search(says, said.err), said.err


def log_of(shop: Shop, kind: str) -> None:
    """Puts a broken log in the place of a good one."""
    log = shop.log
    if kind == "no rows":
        pq.write_table(SCHEMA.empty_table(), log)
    elif kind == "no bytes":
        log.write_bytes(b"")
    elif kind == "damaged":
        damaged = log.read_bytes()
        log.write_bytes(damaged[:4] + bytes(600) + damaged[604:])  # its footer is whole
    elif kind == "no times":
        rows = pa.Table.from_pylist([row("ann", "1", None)], schema=SCHEMA)
        pq.write_table(rows, log)
    else:
        log.unlink()
        log.mkdir()
        if kind == "other types":
            rows = pa.Table.from_pylist(clicks(), schema=SCHEMA)
            pq.write_table(rows, log / "1.parquet")
            at = SCHEMA.get_field_index("price")
            words = pa.array(["dear"] * len(rows))
            pq.write_table(rows.set_column(at, "price", words), log / "2.parquet")


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("no rows", "the log of domain 'shop' is empty: it has no event at all"),
        ("no bytes", "does not read as parquet: "),
        ("no files", "does not read as parquet: "),
        ("damaged", "log.parquet cannot be read ("),
        ("other types", "Data type mismatches when reading Parquet column [price]"),
        ("no times", "none of the 1 events of domain 'shop' has a readable time: check [columns]"),
    ],
)
def test_a_log_that_cannot_be_read_is_refused(
    spark: SparkSession, tmp_path: Path, kind: str, says: str
) -> None:
    shop = Shop(tmp_path).write(clicks())
    log_of(shop, kind)
    assert says in refused(iat("build-instances", shop, tmp_path / "lake"), tmp_path / "lake")


def test_a_csv_file_is_read_as_it_was_meant_or_not_at_all(
    spark: SparkSession, tmp_path: Path
) -> None:
    shop = Shop(tmp_path, "csv").write(clicks(), more="limits = {max_quarantined_share = 0.5}")
    lake = tmp_path / "lake"
    good = shop.log.read_text()
    shop.log.write_text("")
    assert "is empty: a CSV file starts with the names" in refused(
        iat("build-instances", shop, lake), lake
    )
    shop.log.write_text(good.splitlines()[0] + "\n")
    assert "is empty: it has no event" in refused(iat("build-instances", shop, lake), lake)
    at = us(FIRST)
    # A broken line's time is no time: it would make the log a month longer.
    later = us(FIRST + timedelta(days=31))
    shop.log.write_text(f"\ufeff{good}ann,1,{later},1,2.5,shoes, red\nann,1,{at}\n\n")
    assert (
        "2 events quarantined; 1 days are empty\n  2 bad_row\n"
        in done("build-instances", shop, lake).out
    )
    raw = delta.read(str(lake), tables.quarantine(shop.domain))["raw"].to_pylist()
    assert {json.loads(each)["_broken_row"] for each in raw} == {
        f"ann,1,{later},1,2.5,shoes, red",
        f"ann,1,{at}",
    }


@pytest.mark.parametrize(
    "flags",
    [
        ("--start", "2026-01-05"),
        ("--end", "2026-01-01"),
        ("--start", "2026-01-02", "--end", "2026-01-02"),
        ("--start", "2025-01-01", "--end", "2025-02-01"),
    ],
)
def test_days_outside_the_log_are_refused_with_its_extent(
    spark: SparkSession, built: Built, shop: Shop, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    said = iat("build-instances", shop, tmp_path / "lake", *flags)
    says = refused(said, tmp_path / "lake")
    assert "its log goes from 2026-01-01 to 2026-01-04 (--end is the day after the last)" in says
    said = iat("build-streams", shop, built.lake, *flags)
    assert said.code == 2
    assert "its days go from 2026-01-01 to 2026-01-04" in said.err


def test_other_wrong_calls_say_what_to_do(spark: SparkSession, shop: Shop, tmp_path: Path) -> None:
    for command in ("build-streams", "build-samples"):
        said = iat(command, shop, tmp_path)
        assert said.code == 2
        assert "has no table instances/shop; run the job that writes it first" in said.err
    said = iat("build-instances", shop, tmp_path / "lake", "--limit-users", 3)
    assert "--limit-users and --limit-days are for the public logs" in refused(said, tmp_path)


def test_a_lake_that_cannot_be_written_is_refused(
    spark: SparkSession, shop: Shop, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    said = iat("build-instances", shop, tmp_path / "file" / "lake")
    assert said.code == 2
    assert "Traceback" not in said.err
    assert "Not a directory" in said.err
    assert "choose another --lake" in said.err
    assert "choose another --lake" in said.err


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder with room for 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_a_fault_that_leaves_the_table_as_it_was(
    spark: SparkSession, small_disk: Path, tmp_path: Path
) -> None:
    large = os.urandom(2_000_000).hex()
    second = FIRST + timedelta(days=1)
    rows = [
        row("ann", f"{n}", us(second, n), title=large[n * 4000 : n * 4000 + 4000])
        for n in range(1000)
    ]
    shop = Shop(tmp_path / "shop").write([*clicks()[:12], *rows], more="")
    first = Days(FIRST, second)
    done("build-instances", shop, small_disk / "lake", *days_flags(first))
    before = delta.read(str(small_disk / "lake"), tables.instances(shop.domain)).to_pylist()
    said = iat("build-instances", shop, small_disk / "lake")
    assert said.code == 3
    assert "Traceback" not in said.err
    assert "writing instances/shop [2026-01-01, 2026-01-03): no space left on the disk" in said.err
    assert "run the same command again" in said.err
    assert delta.read(str(small_disk / "lake"), tables.instances(shop.domain)).to_pylist() == before


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("x\n: java.io.IOException: No space left on device\n", RetryableError, "no space left"),
        ("x\n: java.io.IOException: Mkdirs failed to create f\n", InputError, "Mkdirs failed to"),
        ("x\n: o.a.E\nCaused by: java.net.ConnectException: no", RetryableError, "Exception: no"),
    ],
)
def test_an_error_of_java_becomes_one_of_ours(text: str, kind: type, says: str) -> None:
    found = as_ours(Exception(text), "writing x")
    assert type(found) is kind
    assert str(found).startswith("writing x")
    assert says in str(found)
