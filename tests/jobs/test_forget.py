"""`iat forget`: a user leaves every table, index and cache, others stay as they were, and no job
brings the user back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from compressor.item_tokens import item_token_days
from downstream.user_index import UserIndex
from jobs import train_compressor
from jobs.cli import run
from pipelines import delta, forgotten, sources, tables
from pipelines.days import as_number
from pipelines.domain import parse
from pipelines.errors import RetryableError
from pipelines.keys import key_id, key_text
from pipelines.splits import users_kept
from pipelines.token_format import TokenFormat, decode
from tests.compressor.conftest import small_config
from tests.jobs.test_backfill import one, status
from tests.jobs.test_build_jobs import (
    ALL,
    FIRST,
    LOG,
    NEGATIVES,
    Row,
    Shop,
    clicks,
    content,
    days_flags,
    done,
    row,
    us,
)

KEY = "anna@example.org"
USER = key_id(KEY)
LAST = LOG.end - timedelta(days=1)
MORE = f"{NEGATIVES}\nlimits = {{max_quarantined_share = 0.5}}"
NOT_HERS = next(s for s in range(99) if not users_kept(np.array([USER]), 0.5, s)[0])
"""A seed with which half of the users are trained on, and not this one."""


def log() -> list[Row]:
    """A few users' clicks, one of them KEY's; an event of hers is rejected, and one of another."""
    rows = [r | {"visitor": KEY} if r["visitor"] == "user1" else r for r in clicks()]
    return [*rows, row(KEY, "1", us(LAST, 50), clicked=7), row("user2", "1", us(LAST), clicked=7)]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return Shop(tmp_path_factory.mktemp("shop")).write(log(), more=MORE)


@pytest.fixture(scope="module")
def whole(spark: SparkSession, shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lake with every table, two compressors, and an index beside it."""
    folder = tmp_path_factory.mktemp("whole")
    lake = str(folder / "lake")
    done("build", shop, lake)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            train_compressor, "SourceConfig", lambda order: small_config(order=order, context=8)
        )
        for flags in (("--line", "all"), ("--line", "half", "--user-share", "0.5")):
            words = ["train-compressor", "--domain", shop.file, "--lake", lake, "--device", "cpu"]
            assert run([*words, *flags, "--user-seed", str(NOT_HERS)]) == 0
    done("materialize", shop, lake, "--line", "all", "--length", 4)
    UserIndex.build(lake, shop.domain, folder / "index", days=None, lines=["all"], fields=True)
    return folder


@pytest.fixture
def place(whole: Path, tmp_path: Path) -> Path:
    """A copy to disturb."""
    return shutil.copytree(whole, tmp_path / "copy")


def erase(shop: Shop, place: Path, *flags: object) -> dict[str, Any]:
    words = ["forget", "--domain", shop.file, "--lake", place / "lake", "--user", KEY]
    told = place / "told.json"
    assert run([*map(str, (*words, *flags)), "--json", str(told)]) == 0
    found: dict[str, Any] = json.loads(told.read_text())
    return found


def everything(place: Path, shop: Shop) -> dict[str, list[Row]]:
    """Every table of the domain that holds users, row by row."""
    lake, domain = str(place / "lake"), shop.domain
    held = content(lake, domain)
    held["quarantine"] = delta.read(lake, tables.quarantine(domain)).to_pylist()
    held["materialized"] = delta.read(lake, tables.materialized(domain)).to_pylist()
    for line in ("all", "half"):
        tokens = tables.instance_tokens(domain.name)
        if delta.exists(lake, tokens):
            held[f"tokens of {line}"] = delta.read(lake, tokens, line=line).to_pylist()
    return held


def of_others(held: dict[str, list[Row]]) -> dict[str, list[Row]]:
    return {
        name: [r for r in rows if r.get("user_id") != USER and KEY not in r.get("raw", "")]
        for name, rows in held.items()
    }


def versions(place: Path, shop: Shop) -> list[int]:
    return [delta.open_table(str(place / "lake"), make(shop.domain)).version() for make in ALL]


def test_a_user_leaves_every_table_and_everyone_else_stays(
    shop: Shop, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(place, shop)
    assert all(len(of_others(before)[name]) < len(rows) for name, rows in before.items())
    told = erase(shop, place)
    assert everything(place, shop) == of_others(before)
    num_before, num_others = (sum(map(len, x.values())) for x in (before, of_others(before)))
    assert sum(told["rows"].values()) == num_before - num_others
    assert told["compressors"] == [f"all@{LAST}"]
    said = capsys.readouterr().out
    assert "its owner's and stays as it is" in said
    assert KEY not in said
    # Days are as right as before, and a second run finds nothing to do.
    _, calendar = status(shop, place / "lake")
    # Built tables, tokens of two lines, samples with those of one.
    assert calendar.count("4 of 4 days right") == 3 + 2 * 2 + 1
    then = versions(place, shop)
    assert erase(shop, place)["rows"] == {}
    assert versions(place, shop) == then


def test_files_stay_one_a_day_and_sorted(shop: Shop, place: Path) -> None:
    erase(shop, place)
    table = tables.user_order(shop.domain)
    files = delta.open_table(str(place / "lake"), table).file_uris()
    assert len({Path(file).parent for file in files}) == len(files)
    for file in files:
        held = pq.read_table(file)
        assert held.equals(held.sort_by([(name, "ascending") for name in table.sort_by]))


def test_item_tokens_are_those_of_the_others_alone(shop: Shop, place: Path) -> None:
    lake, name = str(place / "lake"), shop.domain.name
    table = tables.item_tokens(name)
    before = delta.read(lake, table)
    erase(shop, place)
    after = delta.read(lake, table)
    assert after.schema == before.schema
    assert not after.equals(before)
    for line in ("all", "half"):
        tokens = delta.read(lake, tables.instance_tokens(name), line=line)
        width = TokenFormat("float16", 16)
        wanted = item_token_days(
            tokens["item_id"].to_numpy(),
            np.array([as_number(day) for day in tokens["event_date"].to_pylist()]),
            decode(tokens["token"], width),
        )
        rows = delta.read(lake, table, line=line).sort_by(
            [("item_id", "ascending"), ("event_date", "ascending")]
        )
        assert rows["item_id"].to_pylist() == wanted.item_id.tolist()
        np.testing.assert_array_equal(rows["decayed_count"].to_numpy(), wanted.decayed_count)
        sums = decode(rows["decayed_sum"], TokenFormat("float32", 16))
        np.testing.assert_allclose(sums, wanted.decayed_sum, rtol=1e-6, atol=1e-7)


def places_of(lake: Path, ids: set[int]) -> set[str]:
    """Top folders of the lake with a file in which the key or one of the ids is found: in its bytes
    (as text, or as eight of them), or in a decoded column of a Parquet file."""
    signs = [KEY.encode(), *(str(x).encode() for x in ids)]
    signs += [x.to_bytes(8, "little", signed=True) for x in ids]
    found = set()
    for file in (path for path in lake.rglob("*") if path.is_file()):
        held = file.read_bytes()
        is_there = any(sign in held for sign in signs)
        if held[:4] == b"PAR1":
            rows = pq.ParquetFile(file).read()
            told = json.dumps(rows.to_pylist(), default=str)
            is_there |= KEY in told or any(str(x) in told for x in ids)
        if is_there:
            found.add(str(file.relative_to(lake)).split("/", 1)[0])
    return found


def test_after_a_vacuum_no_byte_of_the_user_is_left(shop: Shop, place: Path) -> None:
    lake = place / "lake"
    held = delta.read(str(lake), tables.instances(shop.domain)).to_pylist()
    ids = {USER, *(r["instance_id"] for r in held if r["user_id"] == USER)}
    everywhere = {
        "instances", "quarantine", "temporal_order", "user_order", "histories", "ranker_samples",
        "instance_tokens", "materialized", "artifacts",
    }  # fmt: skip
    assert places_of(lake, ids) == everywhere
    erase(shop, place)
    everywhere.remove("artifacts")  # predictions are no table, and have no version of before
    assert places_of(lake, ids) == everywhere | {"forgotten"}  # files of before hold them still
    words = ["vacuum", "--lake", str(lake), "--retention-hours", "0"]
    told = place / "freed.json"
    assert run([*words, "--json", str(told)]) == 0
    assert places_of(lake, ids) == {"forgotten"}
    # What two training runs had pinned is given up, and the report says so.
    assert len(json.loads(told.read_text())["not_kept"]["user_order/shop"]) == 2


def test_an_older_table_gets_statistics_out_of_its_log(shop: Shop, place: Path) -> None:
    table = tables.histories(shop.domain)
    opened = delta.open_table(str(place / "lake"), table)
    opened.alter.set_table_properties({delta.NUM_INDEXED: "32"})
    assert erase(shop, place)["old_statistics"] == [table.name]
    assert delta.has_properties(str(place / "lake"), table, delta.OF_EVENTS)


def test_an_index_is_built_again_without_the_user(shop: Shop, place: Path) -> None:
    folder = place / "index"
    old = UserIndex.open(folder)
    assert USER in old.users.key
    assert erase(shop, place, "--index", folder)["indexes"] == [str(folder)]
    new = UserIndex.open(folder)
    assert new.users.key.tolist() == [u for u in old.users.key if u != USER]
    assert list(new.lines) == ["all"]
    assert new.meta.has_fields
    assert erase(shop, place, "--index", folder)["indexes"] == []


@pytest.mark.parametrize("at", range(0, 9, 4))
def test_a_run_that_is_killed_goes_on(
    shop: Shop, place: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, items = everything(place, shop), tables.item_tokens(shop.domain.name)
    rewrite, num_calls = delta.rewrite, 0

    def killed(*given: Any, **more: Any) -> None:
        nonlocal num_calls
        if num_calls == at:
            raise KeyboardInterrupt
        num_calls += 1
        rewrite(*given, **more)

    with monkeypatch.context() as patched:
        patched.setattr(delta, "rewrite", killed)
        with pytest.raises(KeyboardInterrupt):
            erase(shop, place)
    assert erase(shop, place)["compressors"] == [f"all@{LAST}"]
    assert everything(place, shop) == of_others(before)
    held = delta.read(str(place / "lake"), items)
    erase(shop, place)
    assert delta.read(str(place / "lake"), items).equals(held)


def test_late_events_of_the_user_do_not_come_back(
    spark: SparkSession, shop: Shop, place: Path, tmp_path: Path
) -> None:
    erase(shop, place)
    late = [
        row(KEY, "3", us(LAST, 70)), row(KEY, "3", us(LAST, 71), clicked=9),
        row("user3", "3", us(LAST, 72)),
    ]  # fmt: skip
    other = Shop(tmp_path / "other").write([*log(), *late], more=MORE)
    lake, told = place / "lake", tmp_path / "told.json"
    said = done("build-instances", other, lake, *days_flags(one(LAST)), "--json", told)
    held = everything(place, other)
    assert held == of_others(held)
    hers = [r for r in [*log(), *late] if r["visitor"] == KEY and r["shown_at"] >= us(LAST)]
    assert json.loads(told.read_text())["forgotten"] == len(hers) > 2
    assert f"{len(hers)} events of forgotten users left out" in said.out
    users = delta.read(str(lake), tables.instances(other.domain), one(LAST))["user_key"]
    assert "user3" in users.to_pylist()


def test_rows_that_are_not_yet_erased_are_not_read_on(
    spark: SparkSession, shop: Shop, place: Path
) -> None:
    lake, domain = str(place / "lake"), shop.domain
    forgotten.add(lake, domain, [USER], commit={"job": "test"})
    for command in ("build-streams", "build-samples"):
        done(command, shop, lake)
    assert USER in delta.read(lake, tables.instances(domain))["user_id"].to_pylist()
    for make in ALL[1:]:
        users = delta.read(lake, make(domain))["user_id"].to_pylist()
        assert users
        assert USER not in users


def test_a_broken_row_that_holds_the_key_is_the_users(spark: SparkSession, tmp_path: Path) -> None:
    broken = [f"{KEY},1,2,3,4,5,6,7,8", "user2,1,2,3,4,5,6,7,8"]
    other = Shop(tmp_path / "shop", "csv").write(clicks(), more=MORE)
    with other.log.open("a") as file:
        file.write("\r\n".join(broken) + "\r\n")
    domain, lake = other.domain, str(tmp_path / "lake")
    forgotten.add(lake, domain, [USER], commit={"job": "test"})
    done("build-instances", other, lake)
    (held,) = delta.read(lake, tables.quarantine(domain))["raw"].to_pylist()
    assert "user2" in held
    met = pa.chunked_array([[held, held.replace("user2", KEY)]])
    assert forgotten.of_raw(met, domain, {USER}).to_pylist() == [False, True]


def test_a_job_that_ran_meanwhile_fails_and_is_worth_a_retry(shop: Shop, tmp_path: Path) -> None:
    lake, domain = str(tmp_path), shop.domain
    forgotten.add(lake, domain, [1, 2], commit={"job": "test"})
    with forgotten.kept_out(lake, domain) as gone:
        assert gone == {1, 2}
    said = "1 users of shop were forgotten while this ran"
    with pytest.raises(RetryableError, match=said), forgotten.kept_out(lake, domain):
        forgotten.add(lake, domain, [2, 3], commit={"job": "test"})
    assert forgotten.ids(lake, domain) == {1, 2, 3}


@pytest.mark.parametrize("moment", ["before its rows are read", "after"])
def test_a_day_rewritten_meanwhile_is_not_undone(shop: Shop, place: Path, moment: str) -> None:
    lake, table = str(place / "lake"), tables.histories(shop.domain)
    rows = delta.read(lake, table, one(FIRST))
    num_tries = 0

    def other_writer() -> None:
        delta.replace(lake, table, rows.slice(0, 3), one(FIRST), commit={"job": "other"})

    def changed() -> Callable[[pa.Table], pa.Table]:
        nonlocal num_tries
        num_tries += 1
        if num_tries == 1 and moment == "before its rows are read":
            other_writer()

        def change(held: pa.Table) -> pa.Table:
            if num_tries == 1 and moment == "after":
                other_writer()
            return held

        return change

    delta.rewrite(lake, table, [FIRST], changed, commit={"job": "test"})
    assert num_tries == 2
    assert len(delta.read(lake, table, one(FIRST))) == 3


def test_the_ledger_does_not_say_who_it_was(shop: Shop, place: Path, tmp_path: Path) -> None:
    (tmp_path / "keys.txt").write_text(f"{KEY}\n\nuser0\n")
    told = erase(shop, place, "--users-file", tmp_path / "keys.txt")
    assert told["users"] == 2
    reports = delta.read(str(place / "lake"), tables.job_reports()).to_pylist()
    (report,) = [r["report"] for r in reports if r["job"] == "forget"]
    assert KEY not in report
    assert json.loads(report)["figures"]["compressors"] == told["compressors"]
    assert set(forgotten.ids(str(place / "lake"), shop.domain)) == {USER, key_id("user0")}


def test_a_raw_sample_of_the_toolkits_own_loses_the_user(tmp_path: Path) -> None:
    domain = parse(
        {
            "name": "own",
            "source": {"reader": "completejourney"},
            "columns": {"user": "household_id", "item": "i", "time": "t"},
            "label": [{"name": "buy", "always": 1}],
            "feature": [{"name": "item", "column": "i", "side": "item"}],
        }
    )
    path = tmp_path / "raw" / "own" / "events-0.parquet"
    path.parent.mkdir(parents=True)
    held = pa.table({"household_id": [1.0, 7.0, None, 7.0, 2.0], "i": ["a", "b", "c", "d", "e"]})
    pq.write_table(held, path)
    users = {key_id("7")}
    assert sources.forget(domain, tmp_path, users, dry_run=True) == 2
    assert pq.read_table(path) == held
    assert sources.forget(domain, tmp_path, users, dry_run=False) == 2
    assert pq.read_table(path)["i"].to_pylist() == ["a", "c", "e"]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_keys_are_read_as_the_build_job_reads_them() -> None:
    values = [None, " ", "a b", 7, 7.0, 7.5, True, float("nan")]
    wanted = [None, None, "a b", "7", "7", "7.5", "true", None]
    assert [key_text(value) for value in values] == wanted


def test_who_and_which_index_must_be_said(shop: Shop, place: Path) -> None:
    words = ["forget", "--domain", shop.file, "--lake", str(place / "lake")]
    assert run(words) == 2
    assert run([*words, "--user", " "]) == 2
    assert run([*words, "--user", "x", "--index", str(place)]) == 2
    before = versions(place, shop)
    assert run([*words, "--user", KEY, "--dry-run"]) == 0
    assert versions(place, shop) == before
    assert not delta.exists(str(place / "lake"), tables.forgotten(shop.domain))
