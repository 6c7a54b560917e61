"""`iat backfill --compressor-version` and what `iat status` says of tokens, without Spark."""

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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from jobs import backfill, ledger, token_steps, train_compressor, write_tokens
from jobs.backfill_plan import Step, TokenPlan, token_plan
from jobs.cli import run
from jobs.token_states import BEFORE, TokenStates
from pipelines import delta, tables
from pipelines.days import Days, midnight, to_us
from pipelines.domain import Domain, load
from pipelines.errors import InputError, RetryableError
from pipelines.written import MISSING, days_written
from tests.compressor.conftest import small_config
from tests.jobs.test_build_jobs import DOMAIN, ROOT, days_flags

FIRST = date(2026, 1, 1)
LOG = Days(FIRST, FIRST + timedelta(days=6))
EMPTY, LEARNED = 2, 3
"""A day without events; the number of days that the frozen version learns."""
MADE = (tables.instance_tokens, tables.item_tokens)


def day(number: int) -> date:
    return FIRST + timedelta(days=number)


def span(first: int, last: int | None = None) -> Days:
    """Days by number, the last included."""
    return Days(day(first), day(first if last is None else last) + timedelta(days=1))


def stream_rows(domain: Domain, *, seed: int = 0) -> pa.Table:
    """Twenty showings a day to seven users."""
    draw, rows = np.random.default_rng(seed), []
    for number, at in enumerate(LOG):
        for n in range(0 if number == EMPTY else 20):
            user, item = (int(draw.integers(most)) for most in (7, 9))
            now = to_us(midnight(at)) + n * 1_000_000
            rows.append({
                "instance_id": number * 100 + n, "user_id": user * 1_000_003, "item_id": item,
                "request_id": number * 100 + n, "event_time": now, "is_sampled": n % 4 == 3,
                "user_bucket": user * 1_000_003 % tables.NUM_BUCKETS, "f_item": item + 1,
                "f_title": item % 4 + 1, "f_price": float(draw.normal()),
                "label_click": int(draw.integers(2)), "label_time_click": now, "event_date": at,
            })  # fmt: skip
    schema = tables.user_order(domain).schema
    columns = {name: pa.array([row[name] for row in rows]) for name in schema.names}
    times = {
        n: c.cast(pa.int64()) for n, c in columns.items() if n.startswith(("event_t", "label_t"))
    }
    return pa.table(columns | times).cast(schema)


def build(lake: str, domain: Domain, days: Days, *, seed: int = 0) -> None:
    """The days of the tables that tokens are made of, as built by Spark, instances apart."""
    rows = stream_rows(domain, seed=seed)
    is_asked = pc.and_(
        pc.greater_equal(rows["event_date"], days.start), pc.less(rows["event_date"], days.end)
    )
    source = tables.instances(domain)
    commit = ledger.commit_of(ledger.Run("test", "built"), domain, {source.name: 1})
    delta.replace(lake, source, source.schema.empty_table(), days, commit=commit)
    at = delta.open_table(lake, source).version()
    commit = ledger.commit_of(ledger.Run("test", "built"), domain, {source.name: at})
    for table in (
        tables.temporal_order(domain),
        tables.user_order(domain),
        tables.histories(domain),
    ):
        kept = rows.filter(is_asked).select(table.schema.names).cast(table.schema)
        delta.replace(lake, table, kept, days, commit=commit)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A domain file; tokens are out two hours after their day."""
    file = tmp_path_factory.mktemp("shop") / "shop.toml"
    more = 'tokens = {delay = "2h"}'
    file.write_text(DOMAIN.format(path="log.parquet", format="parquet", more=more))
    return str(file)


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token steps in this process: importing torch once more takes as long as all of them."""
    monkeypatch.setattr(token_steps, "pool", lambda workers: ThreadPoolExecutor(1))
    monkeypatch.setattr(
        train_compressor, "SourceConfig", lambda order: small_config(order=order, context=8)
    )


def train(shop: str, lake: object, **given: Any) -> str:
    """The name of a new version; frozen unless said otherwise."""
    given = {"protocol": "frozen", "epochs": 1, "device": "cpu"} | given
    return str(
        train_compressor.main(train_compressor.Args(domain=shop, lake=str(lake), **given))[
            "version"
        ]
    )


@pytest.fixture(scope="module")
def frozen(shop: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A lake with streams and the frozen line f, and no tokens."""
    lake = str(tmp_path_factory.mktemp("frozen") / "lake")
    build(lake, load(shop), LOG)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_compressor, "SourceConfig", lambda order: small_config(order=order))
        train(shop, lake, line="f", end=day(LEARNED))
    return lake


@pytest.fixture
def lake(frozen: str, tmp_path: Path) -> str:
    """A copy to disturb."""
    return shutil.copytree(frozen, tmp_path / "lake").as_posix()


@pytest.fixture
def written(shop: str, lake: str, tmp_path: Path) -> str:
    """Another, with the tokens of all days by `iat write-tokens`."""
    other = shutil.copytree(lake, tmp_path / "written").as_posix()
    write_tokens.main(write_tokens.Args(domain=shop, lake=other, version="f", device="cpu"))
    return other


def iat(command: str, shop: str, lake: object, *flags: object) -> tuple[int, str]:
    """(exit code, what it said, errors too)."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        code = run([*map(str, (command, "--domain", shop, "--lake", lake, *flags))])
    return code, out.getvalue()


def fill(shop: str, lake: object, *flags: object, version: str = "f") -> str:
    code, said = iat("backfill", shop, lake, *of_tokens(version), *flags)
    assert code == 0, said
    return said


def of_tokens(version: str = "f") -> tuple[object, ...]:
    return "--tables", "tokens", "--compressor-version", version, "--device", "cpu"


def content(lake: object, line: str = "f") -> list[pa.Table]:
    found = [delta.read(str(lake), make("shop"), line=line) for make in MADE]
    assert all(map(len, found))
    return found


def versions(lake: str, line: str = "f") -> list[dict[date, int]]:
    """By day, the version that wrote it last, of instance tokens and item tokens."""
    held = [make("shop") for make in MADE if delta.exists(lake, make("shop"))]
    told = [delta.commits(delta.open_table(lake, table)) for table in held]
    found = [days_written(commits, line=line) for commits in told]
    return [{at: on.version for at, on in days.items()} for days in found]


def changed(before: dict[date, int], after: dict[date, int]) -> list[date]:
    return sorted(at for at, version in after.items() if version != before.get(at))


def states(tokens: str, items: str) -> TokenStates:
    """A letter a day: m missing, s stale, . right."""
    words = {"m": MISSING, "s": "stale", ".": None}
    both = (
        {day(n): words[letter] for n, letter in enumerate(letters)} for letters in (tokens, items)
    )
    return TokenStates(*both, without={day(1)}, later=[day(9)])


def told(steps: Any) -> list[tuple[Days, str]]:
    return [(step.days, reason) for step in steps for reason in step.why.values()]


def test_item_tokens_are_summed_up_again_from_the_first_day_whose_tokens_change() -> None:
    plan = token_plan(states(".m.sm.", "......"), {day(5)})
    assert told(plan.steps) == [
        (span(3), "stale"), (span(4), MISSING), (span(5), "streams rewritten"),
    ]  # fmt: skip
    assert told(plan.sums) == [(span(3, 5), "tokens rewritten")]
    assert (plan.without, plan.later) == ([day(1)], [day(9)])
    plan = token_plan(states("......", "...s.."), set())
    assert plan.steps == []
    assert told(plan.sums) == [(span(3), "stale"), (span(4, 5), BEFORE)]
    assert token_plan(states("......", "......"), set()) == TokenPlan([], [], [], ())
    plan = token_plan(states(".m....", ".m...."), {day(1)}, days_at_once=3)
    assert [*told(plan.steps), *told(plan.sums)] == [
        (span(1), MISSING), (span(1), MISSING), (span(2, 5), BEFORE),
    ]  # fmt: skip


def test_tokens_filled_newest_day_first_are_those_written_at_once(
    shop: str, lake: str, written: str, tmp_path: Path
) -> None:
    flags = ("--order", "newest", "--json", tmp_path / "plan.json")
    said = fill(shop, lake, *flags, "--dry-run")
    assert "6 of 6 days to write, 7 steps" in said
    assert f"3 of these days are among those that f@{day(LEARNED)} was trained on" in said
    assert "unknown" not in said.split("about ")[1].split(" MB")[0]
    assert not any(delta.exists(lake, make("shop")) for make in MADE)
    assert "7 of 7 steps done" in fill(shop, lake, *flags)
    steps = json.loads((tmp_path / "plan.json").read_text())["steps"]
    assert [step["days"] for step in steps] == [
        *(str(span(n)) for n in reversed(range(6))), str(LOG),
    ]  # fmt: skip
    assert content(lake) == content(written)
    before = versions(lake)
    assert "0 of 6 days to write, 0 steps" in fill(shop, lake)
    assert versions(lake) == before
    for place in (lake, written):
        calendar = iat("status", shop, place)[1]
        assert "\ntokens of f: 6 of 6 days right\n" in calendar
        assert "\nitem tokens of f: 6 of 6 days right\n" in calendar


def test_a_rewritten_day_of_the_stream_makes_its_tokens_stale_and_later_sums(
    shop: str, lake: str, written: str
) -> None:
    fill(shop, lake)
    for place in (lake, written):
        build(place, load(shop), span(3), seed=1)
    calendar = iat("status", shop, lake)[1]
    assert (
        "\ntokens of f: 5 of 6 days right, 1 user_order/shop rewritten\n  2026-01  ###~##\n"
        in calendar
    )
    before, old = versions(lake), content(lake)
    said = fill(shop, lake)
    assert f"  {day(3)}: tokens (user_order/shop rewritten)\n" in said
    assert f"  {day(4)} to {day(5)}: item tokens ({BEFORE})\n" in said
    tokens, items = map(changed, before, versions(lake))
    assert tokens == [day(3)]
    assert items == [day(3), day(4), day(5)]
    assert content(lake) != old
    write_tokens.main(write_tokens.Args(domain=shop, lake=written, version="f", device="cpu"))
    assert content(lake) == content(written)


def test_days_of_the_middle_are_written_alone_and_what_that_makes_stale_is_said(
    shop: str, lake: str, written: str
) -> None:
    fill(shop, lake, *days_flags(span(4, 5)))
    assert "item tokens of 2 later days, from 2026-01-05 on" in fill(
        shop, lake, *days_flags(span(1))
    )
    calendar = iat("status", shop, lake)[1]
    assert "tokens of f: 3 of 6 days right, 3 missing\n  2026-01  .#..##\n" in calendar
    assert (
        f"item tokens of f: 1 of 6 days right, 3 missing, 2 {BEFORE}\n  2026-01  .#..~~" in calendar
    )
    fill(shop, lake)
    assert content(lake) == content(written)


def test_tokens_of_another_version_of_the_line_or_of_other_weights_are_stale(
    shop: str, lake: str, tmp_path: Path
) -> None:
    fill(shop, lake)
    other = tmp_path / "other.toml"
    other.write_text(Path(shop).read_text().replace("2h", "3h"))
    assert (
        "tokens of f: 0 of 6 days right, 6 publishing delay changed"
        in iat("status", str(other), lake)[1]
    )
    train(shop, lake, line="f", end=day(LEARNED), seed=1)
    assert "tokens of f: 0 of 6 days right, 6 version trained again" in iat("status", shop, lake)[1]
    fill(shop, lake)
    newer = train(shop, lake, line="f", end=day(LEARNED + 1))
    calendar = iat("status", shop, lake)[1]
    assert f"\nitem tokens of f: 0 of 6 days right, 6 written by f@{day(LEARNED)}\n" in calendar
    # The older one may still be asked for by name, and its days are right.
    assert "0 of 6 days to write" in fill(shop, lake, version=f"f@{day(LEARNED)}")
    fill(shop, lake, version=newer)
    assert {*content(lake)[0]["compressor_version"].to_pylist()} == {newer}


def test_tokens_that_were_not_summed_up_are_found_by_the_next_run(
    shop: str, lake: str, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(shop, lake)
    for place in (lake, written):
        build(place, load(shop), span(3), seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(token_steps, "sum_up", lambda work, days: RetryableError("a full disk"))
        assert iat("backfill", shop, lake, *of_tokens())[0] == 3
    calendar = iat("status", shop, lake)[1]
    assert "\ntokens of f: 6 of 6 days right\n" in calendar
    assert "\nitem tokens of f: 5 of 6 days right, 1 instance_tokens/shop rewritten\n" in calendar
    said = fill(shop, lake)
    assert "3 of 6 days to write, 2 steps" in said
    write_tokens.main(write_tokens.Args(domain=shop, lake=written, version="f", device="cpu"))
    assert content(lake) == content(written)


class Killed(BaseException):
    """What no step catches."""


@pytest.mark.parametrize("moment", ["third day", "sums", "item tokens"])
def test_a_backfill_that_is_cut_short_goes_on_where_it_was(
    shop: str, lake: str, written: str, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    num = {"third day": 2, "sums": 6, "item tokens": 6}[moment]
    write_alone, replace = write_tokens.write_alone, delta.replace
    done: list[Days] = []

    def write(args: Any, days: Days) -> None:
        if len(done) == num:
            raise Killed
        write_alone(args, days)
        done.append(days)

    def killed(*_: Any) -> None:
        raise Killed

    def half(lake: str, table: tables.Table, *more: Any, **given: Any) -> int:
        version = replace(lake, table, *more, **given)
        if table.name.startswith("item_tokens"):
            raise Killed
        return version

    with monkeypatch.context() as patch:
        patch.setattr(write_tokens, "write_alone", write)
        if moment == "sums":
            patch.setattr(write_tokens, "sum_up", killed)
        if moment == "item tokens":  # committed, and what is kept of them is not
            patch.setattr(delta, "replace", half)
        with pytest.raises(Killed):
            fill(shop, lake)
    before = versions(lake)[0]
    left = {"third day": "6 of 6 days to write, 5", "sums": "6 of 6 days to write, 1"}
    assert f"{left.get(moment, '0 of 6 days to write, 0')} steps" in fill(shop, lake)
    assert not {*changed(before, versions(lake)[0])} & {at for each in done for at in each}
    assert content(lake) == content(written)


def test_a_day_that_fails_holds_back_later_item_tokens_and_nothing_else(
    shop: str, lake: str, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(shop, lake, *days_flags(span(0, 1)))
    write_alone = write_tokens.write_alone

    def write(args: Any, days: Days) -> None:
        if day(3) in days:
            raise InputError("no such day")
        write_alone(args, days)

    with monkeypatch.context() as patch:
        patch.setattr(write_tokens, "write_alone", write)
        code, said = iat("backfill", shop, lake, *of_tokens())
    assert code == 2
    assert f"2 of 5 steps failed, the first {span(3)}: no such day" in said
    tokens, items = versions(lake)
    assert [*sorted(tokens)] == [at for at in LOG if at != day(3)]
    assert [*sorted(items)] == [*span(0, 1)]
    fill(shop, lake)
    assert content(lake) == content(written)


def test_tokens_wait_for_streams_that_could_not_be_written(
    shop: str, lake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of Spark are stood in for: streams of one day fail, those of the others are built."""
    changed_file = Path(lake).with_name("changed.toml")
    changed_file.write_text(Path(shop).read_text().replace('"us"}', '"us", request = "visitor"}'))
    made: list[date] = []

    def run_step(args: object, step: Step) -> None:
        if day(4) in step.days:
            raise InputError("a broken day")
        build(lake, load(str(changed_file)), step.days, seed=2)
        made.extend(step.days)

    monkeypatch.setattr(backfill, "run_step", run_step)
    flags = ("--tables", "streams", "tokens", "--compressor-version", "f", "--device", "cpu")
    code, said = iat("backfill", str(changed_file), lake, *flags)
    assert code == 2
    assert "3 of 13 steps failed" in said
    assert made == [at for at in LOG if at != day(4)]
    (tokens,) = versions(lake)
    assert sorted(tokens) == made


def test_a_streaming_line_is_refused_with_what_to_run_and_shown_from_its_first_day(
    shop: str, lake: str
) -> None:
    train(shop, lake, protocol="streaming", line="walked", start=day(1), end=day(4))
    before = versions(lake, "walked")
    code, said = iat("backfill", shop, lake, *of_tokens("walked"))
    assert code == 2
    assert f"iat train-compressor --domain {shop} --lake {lake} --parent walked" in said
    assert versions(lake, "walked") == before
    build(lake, load(shop), span(2), seed=1)
    calendar = iat("status", shop, lake)[1]
    assert (
        "\ntokens of walked: 2 of 5 days right, 2 missing, 1 user_order/shop rewritten\n"
        "  2026-01   #~#..\n"
    ) in calendar
    assert "\ntokens of f: 0 of 6 days right, 6 missing\n" in calendar


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (("--tables", "tokens"), "--tables with tokens needs --compressor-version"),
        (("--tables", "streams", "--compressor-version", "f"), "and the other way round"),
        (of_tokens("g"), "no compressor version or line called 'g'; the lake has: f@2026-01-04"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    shop: str, lake: str, flags: tuple[object, ...], why: str
) -> None:
    code, said = iat("backfill", shop, lake, *flags)
    assert (code, why in said) == (2, True), said


def test_a_version_of_another_domain_is_refused(shop: str, lake: str, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text(Path(shop).read_text().replace('name = "shop"', 'name = "elsewhere"'))
    code, said = iat("backfill", str(other), lake, *of_tokens())
    assert code == 2
    assert "compresses domain 'shop', not 'elsewhere'" in said


@pytest.mark.slow
def test_a_backfill_whose_workers_are_killed_goes_on_where_it_was(
    shop: str, lake: str, written: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "jobs.cli", "backfill", "--domain", shop, "--lake", lake]
    process = subprocess.Popen(
        [*map(str, (*command, *of_tokens()))], cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    place, until = Path(lake) / "instance_tokens/shop", time.monotonic() + 120
    while not list(place.glob("*/event_date=*/*")) and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    fill(shop, lake)
    assert content(lake) == content(written)
