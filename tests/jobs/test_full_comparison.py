"""A comparison that is cut goes on where it was, and says the same as one that was not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from compressor.configs import SourceConfig, TrainingConfig
from downstream.configs import RankerConfig, RankerTraining
from downstream.samples import Samples
from jobs import cli, compare, full_comparison, prepared, vacuum
from jobs.compare import Args
from jobs.comparison import FULL_ARMS, VARIANT_ARMS, Arm, border, window
from jobs.full_comparison import Crew, Plan, Results, Task, Workspace
from pipelines import delta, manifests, tables
from pipelines.domain import Domain, parse
from pipelines.errors import InputError
from pipelines.features import FeatureArrays

DAY_US = 86_400_000_000
NUM_DAYS = 14
CREW = Crew(line_processes=0, arm_processes=1)
ARMS = (
    Arm(name="base", parts="base"),
    Arm(name="+ user-order and item tokens", parts="match", line="user"),
    Arm(
        name="+ untrained tokens, all users",
        parts="tokens",
        line="untrained-all",
        beside=("+ user-order and item tokens", "an arm that is not there"),
    ),
)


def tiny() -> Domain:
    def feature(name: str, side: str, **more: Any) -> dict[str, Any]:
        return {"name": name, "column": name, "side": side, "buckets": 64, **more}

    features = [feature("user", "user"), feature("item", "item"), feature("category", "item")]
    features += [feature("price", "event", known="after", kind="number")]
    columns = {"user": "user", "item": "item", "time": "time", "request": "request"}
    label = {"name": "buy", "always": 1}
    raw = {"name": "tiny", "source": {"path": "x"}, "columns": columns, "label": [label]}
    return parse({**raw, "negatives": {"per_positive": 1}, "feature": features})


def stream_rows(domain: Domain, num_users: int = 6) -> pa.Table:
    """Each user most days: two items bought and two that were not, of which the even are liked."""
    random = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for user in range(1, num_users + 1):
        for day in range(NUM_DAYS):
            if random.random() < 0.2:
                continue
            now = (20_000 + day) * DAY_US + int(random.integers(DAY_US))
            for candidate in range(4):
                is_bought = candidate < 2
                item = 2 * int(random.integers(8)) + int(not is_bought or random.random() < 0.2)
                rows.append(
                    {
                        "instance_id": len(rows),
                        "user_id": user,
                        "item_id": item,
                        "request_id": user * 1000 + day,
                        "event_time": now,
                        "event_date": 20_000 + day,
                        "is_sampled": not is_bought,
                        "user_bucket": 0,
                        "label_buy": int(is_bought),
                        "label_time_buy": now,
                        "f_user": user,
                        "f_item": item + 1,
                        "f_category": item % 5 + 1,
                        "f_price": float(random.normal()) if is_bought else None,
                    }
                )
    schema = tables.user_order(domain).schema
    columns = {name: pa.array([r[name] for r in rows]) for name in schema.names}
    dates = columns["event_date"].cast(pa.int32())
    return pa.table({**columns, "event_date": dates}).cast(schema)


def plan_of(**changes: Any) -> Plan:
    plan = Plan(
        domain=tiny(),
        arms=ARMS,
        seeds=(0, 1),
        ranker="din",
        user_share=0.6,
        source=SourceConfig(embedding=4, width=16, num_tokens=8, depth=1, bottleneck=8, heads=2),
        compressor=TrainingConfig(batch_units=8, epochs=1),
        config=RankerConfig(
            embedding=4, width=16, depth=1, heads=2, history_length=6, query_width=8
        ),
        training=RankerTraining(batch_candidates=20, epochs=1, pass_steps=1),
    )
    return replace(plan, **changes)


def run(plan: Plan, folder: Path, **more: Any) -> dict[str, Any]:
    return full_comparison.run(plan, lambda: stream_rows(plan.domain), folder, crew=CREW, **more)


def made(plan: Plan, folder: Path) -> tuple[Workspace, dict[str, Any]]:
    """Every line and arm made in this process, and the report of them."""
    full_comparison.prepare(plan, stream_rows(plan.domain), folder / "data")
    workspace = Workspace(plan, folder)
    for task in [task for tasks in full_comparison.tasks_of(plan) for task in tasks]:
        workspace.run(task)
    report = full_comparison.report_of(plan, folder)
    assert report["missing"] == []
    return workspace, report


def told(report: dict[str, Any]) -> str:
    """The report without what a clock says."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in _rows(report)]
    lines = [{k: v for k, v in line.items() if k != "seconds"} for line in report["lines"]]
    return json.dumps([rows, lines, report["samples"], report["missing"]], sort_keys=True)


def _rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for rows in report["windows"].values() for row in rows]


@pytest.mark.slow
def test_a_run_that_is_cut_and_resumed_says_what_a_whole_one_says(tmp_path: Path) -> None:
    plan = plan_of()
    whole = run(plan, tmp_path / "whole")
    assert whole["missing"] == []
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "whole", cut)
    results = Results(cut)
    # As a kill leaves it: a line and an arm not made, another arm half written.
    for task in (Task("line", "user", 1), Task("arm", ARMS[1].name, 1)):
        shutil.rmtree(results.path(task))
    half = results.path(Task("arm", ARMS[2].name, 0))
    half.rename(half.with_name(f".{half.name}.1"))
    partial = full_comparison.report_of(plan, cut)
    assert {row["num_seeds"] for row in _rows(partial)} == {1, 2}
    assert len(partial["missing"]) == 3
    assert told(run(plan, cut)) == told(whole)


def test_a_frozen_comparison_reports_the_test_days_alone(tmp_path: Path) -> None:
    plan = plan_of(protocol="frozen", seeds=(0,))
    workspace, report = made(plan, tmp_path)
    ((base, items, untrained),) = report["windows"].values()
    assert "beside" not in base | items
    # With one seed an AUC's difference is that of the two AUCs.
    (found,) = untrained["beside"].values()
    assert found["diff_auc"] == pytest.approx(untrained["auc"] - items["auc"])
    assert found["diff_low"] <= found["diff_auc"] <= found["diff_high"]
    assert f"    over {items['name']}: " in full_comparison.print_windows(report | {"seconds": 1})
    held = prepared.opened(Results(tmp_path).path(Task("arm", "base", 0)))
    days = workspace.samples().samples.as_of_us[held["sample"]] // DAY_US
    assert days.min() >= workspace.border(full_comparison.FROZEN_TEST)


CROWDED = np.array([0] * 60 + [1] * 25 + [2] * 10 + [9] * 5) * DAY_US


def crowded_samples(label: float = 1.0) -> Samples:
    """A hundred rows of which ten days hold 60, 25, 10 and, on the last one, 5."""
    n = len(CROWDED)
    none = np.zeros(n, np.int64)
    nothing = FeatureArrays(*(np.zeros((n, 0)) for _ in range(2)))
    labels = np.full(n, label, np.float32)
    return Samples(none, none, none, none, CROWDED, nothing, nothing, labels, none)


def test_borders_go_by_shares_of_days_or_of_labelled_rows() -> None:
    samples, days = crowded_samples(), range(10)
    assert [border(samples, days, share) for share in (0, 0.5, 0.85, 1)] == [0, 5, 8, 10]
    assert [border(samples, days, share, "rows") for share in (0, 0.5, 0.85, 1)] == [0, 0, 1, 10]
    assert [border(samples, days, share, "rows") for share in (0.9, 0.97)] == [2, 9]
    assert window(samples, days, 0.85, 1).sum() == 5
    assert window(samples, days, 0.9, 1, "rows").sum() == 15
    # Rows without a label do not count.
    some = crowded_samples()
    some.label[:60] = np.nan
    assert border(some, days, 0.5, "rows") == 1
    assert window(some, days, 0, 1, "rows").sum() == 40
    assert window(crowded_samples(np.nan), days, 0.5, 1, "rows").sum() == 0


@pytest.mark.parametrize("protocol", ["frozen", "streaming"])
def test_every_variant_of_the_user_order_arm_has_an_interval(protocol: str, tmp_path: Path) -> None:
    plan = plan_of(protocol=protocol, seeds=(0,), arms=(*ARMS[:1], *VARIANT_ARMS))
    _, report = made(plan, tmp_path)
    for rows in report["windows"].values():
        assert [row["name"] for row in rows] == ["base", *(arm.name for arm in VARIANT_ARMS)]
        for row in rows[1:]:
            assert row["diff_low"] <= row["diff_auc"] <= row["diff_high"]
            assert row["diff_low"] < row["diff_high"]
    # The two lines are of one training and differ in what they store.
    user, post_sit = sorted(report["lines"], key=lambda line: line["line"])
    assert user["source_auc"] == post_sit["source_auc"]
    tokens = [
        prepared.line(prepared.opened(Results(tmp_path).path(Task("line", name, 0)))).token
        for name in ("user", "user-post-sit")
    ]
    assert (tokens[0] != tokens[1]).any(axis=1).all()


@pytest.mark.parametrize("variants", [True, False])
def test_a_plan_lists_the_variants_where_they_are_asked_for(variants: bool, tmp_path: Path) -> None:
    asked = Args(domain="tiny", lake="lake", out=tmp_path, device="cpu", variants=variants)
    names = [arm.name for arm in compare.plan_of(asked, tiny()).arms]
    usual = [arm.name for arm in FULL_ARMS]
    assert names == usual + [arm.name for arm in VARIANT_ARMS] * variants


def test_a_dry_run_names_the_variants_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "load_domain", lambda name: tiny())
    lake, domain = str(tmp_path / "lake"), tiny()
    delta.replace(lake, tables.user_order(domain), stream_rows(domain), None, commit={})
    flags = ["--domain", "tiny", "--lake", lake, "--out", str(tmp_path / "out")]
    assert cli.run(["compare", *flags, "--variants", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert all(arm.name in printed for arm in VARIANT_ARMS)
    assert not (tmp_path / "out").exists()


def test_a_comparison_is_repeated_over_what_it_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_this_process(plan: Plan, results: Results, *tasks: Any) -> None:
        workspace = Workspace(plan, results.folder)
        for task in [*tasks[1], *tasks[2]]:
            workspace.run(task)

    monkeypatch.setattr(full_comparison, "_run_tasks", in_this_process)
    monkeypatch.setattr(compare, "load_domain", lambda name: tiny())
    monkeypatch.setattr(
        compare, "plan_of", lambda args, _: plan_of(arms=ARMS[:1], seeds=tuple(range(args.seeds)))
    )
    lake, table = str(tmp_path / "lake"), tables.user_order(tiny())

    def made(out: str, **more: Any) -> dict[str, Any]:
        place = tmp_path / out
        return compare.main(Args(domain="tiny", lake=lake, out=place, device="cpu", **more))

    rows = stream_rows(tiny())
    delta.replace(lake, table, rows, None, commit={})
    first = made("first", seeds=1)
    at = rows.schema.get_field_index("label_buy")
    turned = pc.subtract(1, rows["label_buy"]).cast(pa.int8())
    delta.replace(lake, table, rows.set_column(at, "label_buy", turned), None, commit={})
    kept = vacuum.main(vacuum.Args(lake=lake, retention_hours=0))["kept"]
    assert list(kept[table.name]) == [first["manifest"]]
    manifest = tmp_path / "first" / "manifest.json"
    with pytest.raises(InputError, match="of a run with other digest"):
        made("first", seeds=1)  # goes on over other rows, though as many
    again = made("again", manifest=manifest)
    assert told(again) == told(first) != told(made("anew", seeds=1))
    assert manifests.read(tmp_path / "again") == manifests.read(manifest)
    vacuum.main(vacuum.Args(lake=lake, retention_hours=0, release=(first["manifest"],)))
    with pytest.raises(InputError, match="pins version"):
        made("late", manifest=manifest)


def test_a_run_at_its_limit_reports_what_is_there(tmp_path: Path) -> None:
    plan = plan_of(seeds=(0,))
    rows = stream_rows(plan.domain)
    full_comparison.prepare(plan, rows, tmp_path / "data")
    Workspace(plan, tmp_path).run(Task("arm", "base", 0))
    report = run(plan, tmp_path, limit_s=0.0)
    assert [row["name"] for row in report["windows"]["last 15% of time"]] == ["base"]
    assert len(report["missing"]) == 4


def test_a_folder_of_other_settings_is_refused(tmp_path: Path) -> None:
    Results(tmp_path).claim(plan_of(), "rows")
    Results(tmp_path).claim(plan_of(seeds=(0, 1, 2)), "rows")
    with pytest.raises(InputError, match="other ranker;"):
        Results(tmp_path).claim(plan_of(ranker="transformer"), "rows")


def test_prepared_rows_of_other_users_are_refused(tmp_path: Path) -> None:
    rows = stream_rows(tiny())
    full_comparison.prepare(plan_of(arms=ARMS[:1]), rows, tmp_path)
    full_comparison.prepare(plan_of(arms=ARMS[:1], protocol="frozen"), rows, tmp_path)
    with pytest.raises(InputError, match="other user_share"):
        full_comparison.prepare(plan_of(arms=ARMS[:1], user_share=0.5), rows, tmp_path)


def test_what_workers_map_is_what_was_built(tmp_path: Path) -> None:
    domain = tiny()
    rows = stream_rows(domain)
    held = prepared.stream_arrays(rows, domain)
    prepared.save(tmp_path / "own", held)
    data, vocabulary = prepared.stream(prepared.opened(tmp_path / "own"), "cpu")
    again = prepared.stream_arrays(rows, domain)
    for name, array in prepared.opened(tmp_path / "own").items():
        np.testing.assert_array_equal(array, again[name])
    assert len(data) == len(rows)
    assert vocabulary.num_rows > 1
