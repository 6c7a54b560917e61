"""`iat status` and `iat backfill`: what is missing or stale is found, nothing else is written."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import date, datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import SparkSession

from jobs import backfill, future, train_compressor, write_tokens
from jobs.backfill_plan import Step, plan
from jobs.cli import run
from jobs.day_states import GROUPS, Group, States
from pipelines import delta, tables
from pipelines.days import Days
from pipelines.domain import Domain
from pipelines.written import MISSING, Expected, Written, why_again
from tests.compressor.conftest import small_config
from tests.jobs.test_build_jobs import (
    FIRST,
    LOG,
    NEGATIVES,
    ROOT,
    Shop,
    clicks,
    content,
    days_flags,
    done,
    iat,
    row,
    us,
)

BUILT = [make for made in GROUPS.values() for make in made]
SECOND, EMPTY, LAST = (FIRST + timedelta(days=n) for n in (1, 2, 3))


def one(day: date) -> Days:
    return Days(day, day + timedelta(days=1))


def test_a_day_is_right_only_as_its_inputs_file_and_code_made_it() -> None:
    expected = Expected("file 2", "1.1", {"item": "a", "brand": "b"})
    said = {"config": "file 2", "code": "1.1", "inputs": json.dumps({"instances": 7})}

    def why(upstream: Mapping[date, Written], **changed: str) -> str | None:
        table = {FIRST: Written(3, said | changed)}
        return why_again(FIRST, table, expected, {"instances": upstream})

    assert why({}) is None
    assert why({FIRST: Written(7, {})}) is None
    assert why({SECOND: Written(9, {})}) is None  # another day's rows
    assert why({FIRST: Written(8, {})}) == "instances rewritten"
    assert why({}, config="file 1") == "domain file changed"
    assert why({}, features=json.dumps({"item": "a"})) is None  # the brand was added since
    assert why({}, features=json.dumps({"item": "x"})) == "feature item changed"
    assert why({}, features=json.dumps({"item": "a", "color": "c"})) == "feature color changed"
    assert why({}, code="1.0") == "code changed from 1.0 to 1.1"
    assert why_again(SECOND, {FIRST: Written(3, said)}, expected, {}) == MISSING


def states(**reasons: str) -> States:
    """Reasons by group, a letter a day of the log: m missing, s stale, . right."""
    words = {"m": MISSING, "s": "stale", ".": None}
    found: dict[Group, dict[date, str | None]] = {}
    for group in GROUPS:
        letters = reasons.get(group, "." * len(LOG))
        found[group] = {day: words[x] for day, x in zip(LOG, letters, strict=True)}
    return found


def told(steps: list[Step]) -> list[tuple[str, dict[str, str]]]:
    return [(str(step.days), dict(step.why)) for step in steps]


def test_what_is_made_of_rewritten_instances_is_rewritten_and_nothing_else() -> None:
    found, without = plan(states(instances=".s..", samples="...m"), list(GROUPS))
    again = {"instances": "stale", "streams": "instances rewritten"}
    assert told(found) == [
        (str(one(SECOND)), again | {"samples": "instances rewritten"}),
        (str(one(LAST)), {"samples": MISSING}),
    ]
    assert without == []
    assert plan(states(), list(GROUPS)) == ([], [])


def test_days_without_instances_are_left_out_where_instances_are_not_asked_for() -> None:
    found, without = plan(states(instances="m.s.", streams="ms.."), ["streams"])
    assert told(found) == [(str(one(SECOND)), {"streams": "stale"})]
    assert without == [FIRST]


@pytest.mark.parametrize(("at_once", "sizes"), [(1, [1, 1, 1]), (2, [2, 1]), (9, [3])])
def test_days_next_to_each_other_share_a_step_up_to_a_number(
    at_once: int, sizes: list[int]
) -> None:
    found, _ = plan(states(streams="sss.", samples="sssm"), list(GROUPS), at_once)
    assert [len(step.days) for step in found] == [*sizes, 1]


def status(shop: Shop, lake: object, *flags: object) -> tuple[int, str]:
    """(exit code, what it said, errors too); the command starts no Spark."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = run(["status", "--domain", shop.file, "--lake", str(lake), *map(str, flags)])
    return code, out.getvalue()


def versions(lake: object, domain: Domain) -> list[int]:
    return [delta.open_table(str(lake), make(domain)).version() for make in BUILT]


def files(lake: object, domain: Domain) -> set[str]:
    return {f for make in BUILT for f in delta.open_table(str(lake), make(domain)).file_uris()}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("shop")).write(clicks())


@pytest.fixture(scope="module")
def whole(spark: SparkSession, shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The lake of `iat build`, undisturbed."""
    lake = str(tmp_path_factory.mktemp("whole") / "lake")
    done("build", shop, lake)
    return lake


@pytest.fixture
def lake(whole: str, tmp_path: Path) -> str:
    """A copy to disturb."""
    return shutil.copytree(whole, tmp_path / "lake").as_posix()


@pytest.mark.slow
def test_a_lake_filled_newest_day_first_is_the_lake_that_was_built_at_once(
    spark: SparkSession, shop: Shop, whole: str, tmp_path: Path
) -> None:
    flags = (*days_flags(LOG), "--order", "newest", "--json", tmp_path / "found.json")
    planned = done("backfill", shop, tmp_path / "lake", *flags, "--dry-run")
    assert "4 of 4 days to write, 4 steps" in planned.out
    assert not (tmp_path / "lake").exists()
    said = done("backfill", shop, tmp_path / "lake", *flags)
    assert "4 of 4 steps done" in said.out
    found = json.loads((tmp_path / "found.json").read_text())
    assert [step["days"] for step in found["steps"]] == [str(one(day)) for day in reversed([*LOG])]
    assert content(tmp_path / "lake", shop.domain) == content(whole, shop.domain)
    before = versions(tmp_path / "lake", shop.domain)
    again = done("backfill", shop, tmp_path / "lake")
    assert "0 of 4 days to write" in again.out
    assert versions(tmp_path / "lake", shop.domain) == before
    assert "streams: 4 of 4 days right" in status(shop, tmp_path / "lake")[1]


def test_a_rebuilt_day_makes_stale_what_was_made_of_it_and_that_alone_is_written(
    spark: SparkSession, tmp_path: Path
) -> None:
    other, lake = Shop(tmp_path / "other").write(clicks()), tmp_path / "lake"
    done("build", other, lake)
    other.write([*clicks(), row("late", "7", us(SECOND, 99))])
    done("build-instances", other, lake, *days_flags(one(SECOND)))
    _, said = status(other, lake, "--json", tmp_path / "found.json")
    assert "instances: 4 of 4 days right" in said
    assert "streams: 3 of 4 days right, 1 instances/shop rewritten\n  2026-01  #~##\n" in said
    found: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())["tables"]
    assert [*found["samples"]["again"]] == [str(SECOND)]
    before = files(lake, other.domain)
    done("backfill", other, lake)
    done("build", other, tmp_path / "anew")
    assert content(lake, other.domain) == content(tmp_path / "anew", other.domain)
    changed = {Path(file).parent.name for file in before ^ files(lake, other.domain)}
    assert changed == {f"event_date={SECOND}"}


def test_another_domain_file_makes_every_day_stale(
    spark: SparkSession, shop: Shop, lake: str, tmp_path: Path
) -> None:
    more = NEGATIVES.replace("2", "1")
    other = Shop(tmp_path / "other").write(clicks(), more=more)
    assert "samples: 0 of 4 days right, 4 domain file changed" in status(other, lake)[1]
    planned = done("backfill", other, lake, "--dry-run", "--days-at-once", 4)
    assert "4 of 4 days to write, 1 steps" in planned.out
    assert " MB, " in planned.out  # a size and a time, from the days and runs that are there
    assert "unknown" not in planned.out


def test_a_day_that_fails_keeps_no_other_from_being_written(
    spark: SparkSession, shop: Shop, whole: str, tmp_path: Path
) -> None:
    bad = [row(None, "1", us(LAST, n)) for n in range(30)]
    other = Shop(tmp_path / "other").write([*clicks(), *bad])
    flags = (*days_flags(LOG), "--tables", "instances")
    said = iat("backfill", other, tmp_path / "lake", *flags)
    assert said.code == 1
    assert f"1 of 4 steps failed, the first {one(LAST)}" in said.err
    assert "max_quarantined_share" in said.err
    # The next run is asked for that day alone, and what the others hold is right.
    planned = done("backfill", other, tmp_path / "lake", *flags, "--dry-run").out
    assert f"1 of 4 days to write, 1 steps\n  {LAST}: instances (missing)" in planned
    assert "quarantined" not in status(other, tmp_path / "lake", *days_flags(one(FIRST)))[1]
    wanted, found = (
        delta.read(str(lake), tables.instances(shop.domain)).to_pylist()
        for lake in (whole, tmp_path / "lake")
    )
    assert found == [r for r in wanted if r["event_date"] != LAST]


def test_a_fault_of_the_disk_is_worth_a_retry_and_keeps_no_other_from_being_written(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[date] = []

    def run_step(args: object, step: Step) -> None:
        tried.append(step.days.start)
        if step.days.start == SECOND:
            raise OSError("Input/output error")

    monkeypatch.setattr(backfill, "run_step", run_step)
    said = iat("backfill", shop, tmp_path, *days_flags(LOG))
    assert said.code == 3
    assert f"1 of 4 steps failed, the first {one(SECOND)}: Input/output error" in said.err
    assert tried == [*LOG]


def test_the_clock_decides_nothing_where_the_days_are_given(
    spark: SparkSession, shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Behind(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Behind:
            return cls(2020, 1, 1, tzinfo=tz)

    monkeypatch.setattr(future, "datetime", Behind)
    lake = tmp_path / "lake"
    done("backfill", shop, lake, *days_flags(LOG), "--tables", "instances")
    assert status(shop, lake, *days_flags(LOG))[1].count("instances: 4 of 4 days right") == 1
    planned = done("backfill", shop, lake, *days_flags(LOG), "--tables", "instances", "--dry-run")
    assert "0 of 4 days to write" in planned.out


def test_quarantined_events_are_told_as_a_share_of_their_day(
    spark: SparkSession, tmp_path: Path
) -> None:
    more = f"{NEGATIVES}\nlimits = {{max_quarantined_share = 0.9}}"
    other = Shop(tmp_path).write(
        [*clicks(), *[row(None, "1", us(LAST, n)) for n in range(4)]], more=more
    )
    done("build", other, tmp_path / "lake")
    said = status(other, tmp_path / "lake")[1]
    assert f"quarantined: 1 days have some, most {LAST}: 25.00%" in said


def test_a_lake_without_the_domain_is_refused(shop: Shop, tmp_path: Path) -> None:
    code, said = status(shop, tmp_path / "nothing")
    assert code == 2
    assert "give --start and --end, or build it first" in said
    assert iat("backfill", shop, tmp_path, "--workers", 0).code == 2


@pytest.mark.slow
def test_one_plan_writes_a_day_and_then_its_tokens(
    spark: SparkSession, lake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens in a process of their own, as whoever runs it gets them."""
    other = Shop(tmp_path / "other").write([*clicks(), row("late", "7", us(SECOND, 99))])
    monkeypatch.setattr(train_compressor, "SourceConfig", lambda order: small_config(order=order))
    given: dict[str, Any] = {"domain": other.file, "lake": lake, "device": "cpu"}
    train_compressor.main(
        train_compressor.Args(**given, protocol="frozen", line="f", end=EMPTY, epochs=1)
    )
    write_tokens.main(write_tokens.Args(**given, version="f"))
    made = [make("shop") for make in (tables.instance_tokens, tables.item_tokens)]
    before = [delta.read(lake, table, one(SECOND)) for table in made]
    said = done("backfill", other, lake, "--compressor-version", "f", "--device", "cpu")
    assert (
        "3 of 4 days to write, 4 steps\n"
        f"  {SECOND}: instances (raw log changed), streams (instances rewritten), "
        "samples (instances rewritten)\n"
        f"  {SECOND}: tokens (streams rewritten)\n"
        f"  {SECOND}: item tokens (tokens rewritten)\n"
        f"  {EMPTY} to {LAST}: item tokens (earlier days rewritten)\n"
    ) in said.out
    assert "4 of 4 steps done" in said.out
    found = [delta.read(lake, table) for table in made]
    assert len(delta.read(lake, made[0], one(SECOND))) == len(before[0]) + 1
    assert "item tokens of f: 4 of 4 days right" in status(other, lake)[1]
    write_tokens.main(write_tokens.Args(**given, version="f"))
    assert [delta.read(lake, table) for table in made] == found


@pytest.mark.slow
def test_a_backfill_that_is_killed_goes_on_where_it_was(
    spark: SparkSession, shop: Shop, whole: str, tmp_path: Path
) -> None:
    lake, days = tmp_path / "lake", Days(FIRST, EMPTY)
    command = [sys.executable, "-m", "jobs.cli", "backfill", "--domain", shop.file, "--lake", lake]
    flags = [*days_flags(days), "--workers", 2, "--master", "local[1]"]
    process = subprocess.Popen(
        [*map(str, (*command, *flags))], cwd=ROOT, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    wanted, until = lake / tables.user_order(shop.domain).name, time.monotonic() + 120
    while not list(wanted.glob("event_date=*/*")) and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    done("backfill", shop, lake, *days_flags(days))
    assert content(lake, shop.domain) == {
        table: [row for row in rows if row["event_date"] in days]
        for table, rows in content(whole, shop.domain).items()
    }
    assert "0 of 2 days to write" in done("backfill", shop, lake, *days_flags(days)).out
