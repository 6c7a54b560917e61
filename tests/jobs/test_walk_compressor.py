"""`iat walk-compressor`, `iat approve`, `iat rollback`: a line that goes forward over days built in
any order, behind a gate."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from compressor import versions
from compressor.gate import DayFigures, GateLimits, why_refused
from compressor.training import checkpoint
from jobs import approve, check_tables, ledger, rollback, train_compressor, walk_compressor
from pipelines import approvals, delta, lines, manifests, tables
from pipelines.days import Days
from pipelines.domain import Domain, parse
from pipelines.errors import CheckFailedError, InputError
from tests.compressor.conftest import TINY, small_config
from tests.jobs.test_check_tables import as_declared, day_rows

DOMAIN = parse(TINY | {"tokens": {"delay": "2h"}})
FIRST, NUM_DAYS, LINE = date(2026, 1, 1), 6, "tiny-user"
Change = Callable[[pa.Table], pa.Table]
JOBS = (train_compressor, walk_compressor, approve, rollback, check_tables)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small weights, and the tiny domain under any name."""
    patch(monkeypatch)


def patch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        train_compressor,
        "SourceConfig",
        lambda order: small_config(order=order, context=4, sit_layers=1),
    )
    for job in JOBS:
        monkeypatch.setattr(job, "load_domain", lambda _: DOMAIN)


def day(number: int) -> date:
    return FIRST + timedelta(days=number)


def learnable(rows: pa.Table) -> pa.Table:
    """Rows whose label can be told from a feature that is known at the request."""
    stock = np.where(rows["is_sampled"], -1.0, 1.0)
    return with_column(rows, "f_stock", pa.array(stock))


def with_column(rows: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return rows.set_column(rows.column_names.index(name), name, values)


def turned(rows: pa.Table) -> pa.Table:
    """With labels that say the opposite."""
    return with_column(rows, "label_buy", pc.subtract(1, rows["label_buy"].cast(pa.int8())))


def build(lake: str, number: int, change: Change = lambda rows: rows) -> None:
    """A day of every table that Spark builds, with the commits that Spark's jobs leave."""
    of = Days(day(number), day(number + 1))
    rows = change(learnable(day_rows(day(number))))
    real = rows.filter(pc.invert(rows["is_sampled"]))
    run = ledger.Run("test", "test")
    instances = tables.instances(DOMAIN)
    held = instance_rows(instances, rows)
    at = delta.replace(lake, instances, held, of, commit=ledger.commit_of(run, DOMAIN, {}))
    commit = ledger.commit_of(run, DOMAIN, {instances.name: at})
    for table in (tables.temporal_order(DOMAIN), tables.user_order(DOMAIN)):
        delta.replace(lake, table, as_declared(table, rows), of, commit=commit)
    samples, histories = tables.ranker_samples(DOMAIN), tables.histories(DOMAIN)
    delta.replace(lake, samples, as_declared(samples, rows), of, commit=commit)
    delta.replace(lake, histories, as_declared(histories, real), of, commit=commit)


def instance_rows(table: tables.Table, rows: pa.Table) -> pa.Table:
    """Keys and labels; readable features are not looked at here."""
    found = {
        f.name: pa.nulls(len(rows), f.type)
        if f.name.startswith("f_") or f.name not in rows.column_names
        else rows[f.name].cast(f.type)
        for f in table.schema
    }
    return pa.table(found, table.schema)


def walk(lake: str, number: int, **given: Any) -> dict[str, Any]:
    """What the daily run of a day calls."""
    args = {"begin": FIRST, "window": 3, "device": "cpu", "start": day(number)} | given
    end = day(number + 1)
    return walk_compressor.main(
        walk_compressor.Args(domain="tiny", lake=lake, **({"end": end} | args))
    )


def left_by(lake: str, line: str = LINE) -> tuple[Any, ...]:
    """All that a line leaves: both tables, and its weights day by day."""
    of = (tables.instance_tokens("tiny"), tables.item_tokens("tiny"))
    rows = [delta.read(lake, table, line=line).to_pydict() for table in of]
    weights = {}
    for version in versions.within(lake, line, Days(FIRST, day(99))):
        tensors, _ = checkpoint.load(versions.folder(lake, line, version.name))
        weights[version.name] = {name: t.numpy().tobytes() for name, t in tensors.items()}
    return rows, weights


def daily(lake: str, order: Sequence[int]) -> list[dict[str, Any]]:
    results = []
    for number in order:
        build(lake, number)
        results.append(walk(lake, number))
    return results


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Days in order, one after the other."""
    lake = str(tmp_path_factory.mktemp("quiet"))
    with pytest.MonkeyPatch.context() as patched:
        patch(patched)
        for number, result in enumerate(daily(lake, range(NUM_DAYS))):
            assert result["walked"] == result["days"] == [str(day(number))]
    return lake


@pytest.mark.parametrize("order", [range(NUM_DAYS)[::-1], (3, 0, 4, 1, 5, 2)], ids=str)
def test_days_built_in_any_order_leave_the_same_line(
    tmp_path: Path, quiet: str, order: Sequence[int]
) -> None:
    results = daily(str(tmp_path), order)
    assert left_by(str(tmp_path)) == left_by(quiet)
    walked = [walked for result in results for walked in result["walked"]]
    assert walked == [str(day(n)) for n in range(NUM_DAYS)]
    assert results[0]["days"] == []
    assert results[0]["waits"] == f"{FIRST}: its instances are missing"


def test_a_run_killed_between_days_goes_on_and_tells_of_its_own_day(
    tmp_path: Path, quiet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lake = str(tmp_path)
    for number in range(NUM_DAYS):
        build(lake, number)
    judged, save = train_compressor.run_judged, versions.save

    def killed(args: Any, *more: Any, **given: Any) -> Any:
        if args.start == day(2):
            monkeypatch.setattr(versions, "save", broken)
        return judged(args, *more, **given)

    def broken(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(train_compressor, "run_judged", killed)
    with pytest.raises(KeyboardInterrupt):
        walk(lake, NUM_DAYS - 1, start=FIRST)
    monkeypatch.setattr(train_compressor, "run_judged", judged)
    monkeypatch.setattr(versions, "save", save)
    result = walk(lake, NUM_DAYS - 1, start=FIRST)
    assert result["walked"] == [str(day(n)) for n in range(2, NUM_DAYS)]
    assert result["days"] == [str(day(n)) for n in range(NUM_DAYS)]
    assert left_by(lake) == left_by(quiet)
    again = walk(lake, NUM_DAYS - 1, start=FIRST)
    assert (again["walked"], again["days"]) == ([], result["days"])
    assert left_by(lake) == left_by(quiet)


def test_nothing_of_later_days_reaches_a_day(tmp_path: Path, quiet: str) -> None:
    lake = str(tmp_path)
    daily(lake, range(3))
    for number in range(3, NUM_DAYS):
        build(lake, number, lambda rows: turned(with_column(rows, "f_item", pa.array([9] * 240))))
    walk(lake, NUM_DAYS - 1)
    for index in (0, 1):
        ours, theirs = (left_by(each)[0][index] for each in (lake, quiet))
        kept = [n for n, of in enumerate(ours["event_date"]) if of < day(3)]
        assert kept
        assert all([ours[c][n] for n in kept] == [theirs[c][n] for n in kept] for c in ours)


def test_a_line_waits_at_a_day_whose_check_fails(tmp_path: Path) -> None:
    lake = str(tmp_path)
    daily(lake, range(2))

    def twice(rows: pa.Table) -> pa.Table:
        ids = rows["instance_id"].to_pylist()
        return with_column(rows, "instance_id", pa.array([*ids[:-1], ids[0]]))

    build(lake, 2, twice)
    build(lake, 3)
    result = walk(lake, 3)
    assert result["days"] == []
    assert result["waits"].startswith(f"{day(2)}: iat check fails")
    build(lake, 2)
    assert walk(lake, 2)["walked"] == [str(day(2)), str(day(3))]


def test_a_day_out_of_line_is_not_trained_on(tmp_path: Path, quiet: str) -> None:
    lake = str(tmp_path)
    daily(lake, range(4))
    build(lake, 4, turned)
    result = walk(lake, 4)
    assert [*result["refused"]] == [str(day(4))]
    assert "AUC" in result["refused"][str(day(4))]
    weights = left_by(lake)[1]
    before, after = (weights[f"{LINE}@{day(n)}"] for n in (3, 4))
    shared = [name for name in before if before[name] == after.get(name)]
    assert {name for name in before if name.startswith(("model.", "average."))} <= {*shared}
    args = {"domain": "tiny", "lake": lake, "start": day(4), "end": day(5)}
    check_tables.main(check_tables.Args(**args, tables=("instances", "streams")))
    with pytest.raises(CheckFailedError, match="yesterday's weights wrote its tokens: its AUC"):
        check_tables.main(check_tables.Args(**args, tables=("tokens",)))
    # Those of a day that was trained on are other weights' tokens.
    ours, theirs = (delta.read(each, tables.instance_tokens("tiny"), Days(day(4), day(5)))
                    for each in (lake, quiet))  # fmt: skip
    assert ours["instance_id"].equals(theirs["instance_id"])
    assert not ours["token"].equals(theirs["token"])
    # What the refused training pinned is let go; what wrote the day is a compressor that learned.
    pinned = [manifest.args for manifest, _ in manifests.live(lake, "tiny")]
    assert [args["untrained"] for args in pinned if args["start"] == str(day(4))] == [True]
    (version,) = versions.within(lake, LINE, Days(day(4), day(5)))
    assert version.is_trained
    build(lake, 5)
    assert walk(lake, 5)["refused"] == {}
    check_tables.main(
        check_tables.Args(**args | {"start": day(5), "end": day(6)}, tables=("tokens",))
    )


def test_labels_known_after_the_day_decide_nothing(tmp_path: Path) -> None:
    """Neither whether the day is trained on, nor by which weights its tokens are written."""
    left = []
    for change in (lambda rows: rows, turned):
        lake = str(tmp_path / str(len(left)))
        daily(lake, range(4))

        def late(rows: pa.Table, change: Change = change) -> pa.Table:
            moment = pc.add(rows["label_time_buy"].cast(pa.int64()), 86_400_000_000)
            kind = rows.schema.field("label_time_buy").type
            return with_column(change(rows), "label_time_buy", moment.cast(kind))

        build(lake, 4, late)
        result = walk(lake, 4)
        assert (result["walked"], result["refused"]) == ([str(day(4))], {})
        left.append(left_by(lake))
    assert left[0] == left[1]


FIGURES = DayFigures(auc=0.8, log_loss=0.4, loss=0.5, positives=1000, negatives=1000)


@pytest.mark.parametrize(
    ("changes", "week", "says"),
    [
        ({}, 7, ""),
        ({"auc": 0.74}, 7, "AUC"),
        ({"auc": 0.76}, 7, ""),
        ({"auc": 0.74}, 2, ""),
        ({"auc": 0.74, "positives": 20, "negatives": 20}, 7, ""),
        ({"auc": 0.1, "positives": 20, "negatives": 20}, 7, "AUC"),
        ({"log_loss": 0.61}, 7, "log loss"),
        ({"loss": 0.76}, 7, "training loss"),
        ({"loss": float("inf")}, 0, "not finite"),
        ({"auc": float("nan"), "log_loss": float("nan"), "loss": float("nan")}, 7, ""),
    ],
)
def test_a_day_is_refused_by_the_week_before_it(
    changes: dict[str, float], week: int, says: str
) -> None:
    found = why_refused(FIGURES._replace(**changes), [FIGURES] * week, GateLimits())
    assert says in found
    assert bool(found) == bool(says)


def test_a_week_whose_days_differ_allows_a_day_to_differ() -> None:
    week = [FIGURES._replace(auc=auc) for auc in (0.7, 0.9, 0.75, 0.85, 0.8)]
    assert not why_refused(FIGURES._replace(auc=0.6), week, GateLimits())
    assert why_refused(FIGURES._replace(auc=0.5), week, GateLimits())


def test_figures_of_a_long_walk_judge_the_day_after_it(tmp_path: Path) -> None:
    lake = str(tmp_path)
    for number in range(5):
        build(lake, number)
    train_compressor.main(
        train_compressor.Args(domain="tiny", lake=lake, end=day(5), device="cpu", line="long")
    )
    assert len(walk_compressor.figures_before(lake, "long", day(5))) == 5
    build(lake, 5, turned)
    assert walk(lake, 5, line="long")["refused"]


def test_the_first_line_is_approved_and_named_lines_approve_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lake = str(tmp_path)
    build(lake, 0)
    with pytest.raises(InputError, match="give --begin DAY"):
        walk(lake, 0, begin=None)
    with pytest.raises(InputError, match="no line called 'other'"):
        walk(lake, 0, line="other")
    walk(lake, 0)
    held = approvals.approved(lake, DOMAIN)
    assert held is not None
    assert (held.line, held.earlier) == (LINE, ())
    with pytest.raises(InputError, match="nothing to roll tiny back to"):
        rollback.main(rollback.Args(domain="tiny", lake=lake))
    assert f"its next day is {day(1)}" in capsys.readouterr().out


def approved_line(lake: str, line: str, **given: Any) -> dict[str, Any]:
    return approve.main(approve.Args(domain="tiny", lake=lake, line=line, **given))


def test_a_switch_and_a_roll_back_never_mix_lines(tmp_path: Path, quiet: str) -> None:
    lake = str(tmp_path)
    daily(lake, range(3))
    before = left_by(lake)
    train = {"domain": "tiny", "lake": lake, "device": "cpu", "end": day(3), "line": "new"}
    train_compressor.main(train_compressor.Args(**train, start=day(1), seed=5))
    approved_line(lake, "new")
    build(lake, 3)
    result = walk(lake, 3)
    assert (result["line"], result["walked"]) == ("new", [str(day(3))])
    assert left_by(lake) == before
    rollback.main(rollback.Args(domain="tiny", lake=lake))
    result = walk(lake, 3)
    assert (result["line"], result["walked"]) == (LINE, [str(day(3))])
    for number in (4, 5):
        build(lake, number)
    walk(lake, 5)
    assert left_by(lake) == left_by(quiet)
    assert lines.find(lake, "new")["end"] == day(4)


def test_a_line_that_is_worse_is_not_approved(tmp_path: Path) -> None:
    lake = str(tmp_path)
    daily(lake, range(4))
    train: dict[str, Any] = {"domain": "tiny", "lake": lake, "device": "cpu", "end": day(4)}
    for line, given in (("worse", {"untrained": True}), ("same", {"seed": 0})):
        train_compressor.main(train_compressor.Args(**train, line=line, window=3, **given))
    judged = {"start": day(2), "end": day(4)}
    with pytest.raises(CheckFailedError, match="worse may be worse than tiny-user") as caught:
        approved_line(lake, "worse", **judged)
    assert caught.value.result is not None
    assert caught.value.result["evidence"]["difference"]["high"] < 0
    held = approvals.approved(lake, DOMAIN)
    assert held is not None
    assert held.line == LINE
    found = approved_line(lake, "same", **judged)
    assert found["evidence"]["difference"]["value"] == pytest.approx(0, abs=1e-9)
    assert (found["approved"], found["earlier"]) == ("same", [LINE])
    with pytest.raises(InputError, match="kept no predictions of 2026-01-06"):
        approved_line(lake, LINE, start=day(5), end=day(6))
    assert json.dumps(approved_line(lake, LINE, dry_run=True))
    held = approvals.approved(lake, DOMAIN)
    assert held is not None
    assert held.line == "same"


def test_names_that_are_no_line_of_the_domain_are_refused(quiet: str) -> None:
    with pytest.raises(InputError, match="no compressor version or line called 'x'"):
        approved_line(quiet, "x")
    with pytest.raises(InputError, match="is not a line of tiny"):
        approved_line(quiet, f"{LINE}@{day(2)}")
    with pytest.raises(InputError, match="approved"):
        train_compressor.Args(domain="tiny", lake=quiet, line="approved")


def test_domains_have_approvals_of_their_own(tmp_path: Path, quiet: str) -> None:
    def other(name: str) -> Domain:
        return parse(TINY | {"name": name})

    assert approvals.approved(quiet, other("else")) is None
