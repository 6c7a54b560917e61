"""The sizing page: what its formulas say, and that its tables are what they give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from benchmarks import sizing, sizing_plan
from benchmarks.sizing import Stage, by_table
from benchmarks.sizing_plan import Measured, Plan
from downstream.index_files import ROWS_AT_ONCE
from pipelines import delta, tables
from pipelines.domain import load
from tests.downstream.test_index_extend import LINE, write_day
from tests.downstream.test_user_index import DOMAIN


def _rows(name: str, values: dict[tuple[int, int], float]) -> list[dict[str, Any]]:
    return [
        {"name": name, "instances": n, "features": f, "value": value}
        for (n, f), value in values.items()
    ]


def test_a_cost_is_of_the_most_instances_and_of_a_feature_more_what_a_wider_log_cost() -> None:
    m = Measured(_rows("a, bytes", {(10, 20): 9.0, (100, 20): 7.0, (10, 80): 39.0}))
    assert (m.cost("a, bytes"), m.cost("a, bytes", 20)) == (7.0, 7.0)
    assert m.cost("a, bytes", 30) == 7.0 + 10 * (39.0 - 9.0) / 60


def test_a_day_of_a_table() -> None:
    rows = _rows("a, bytes", {(10, 20): 50.0}) + _rows("a, core s a million", {(10, 20): 40.0})
    m, plan = Measured(rows), Plan(instances=10**8, features=20)
    assert sizing_plan.table_bytes(m, plan, "a") == 5e9
    assert sizing_plan.core_s(m, plan, "a") == 4000
    assert sizing_plan.files(plan) == 13


def test_a_day_has_buckets_of_four_million_rows_and_the_index_holds_one_at_least() -> None:
    m = Measured(_rows("index, memory a row at once", {(10, 20): 100.0}))
    plan = Plan(instances=10**8, features=20, index_days=60)
    assert sizing_plan.buckets(plan) == 25
    assert sizing_plan.index_memory(m, plan, 25) == 4e8
    assert sizing_plan.index_memory(m, plan, 16) == 100 * 1e8 / 16
    assert sizing_plan.index_memory(m, plan, 1000) == 100 * ROWS_AT_ONCE


def test_checkpoints_that_are_all_kept_grow_with_the_square_of_the_days() -> None:
    m = Measured(_rows("checkpoint, bytes of a file", {(10, 20): 100.0}))
    plan = Plan(instances=8_000_000, features=20, kept_days=200)
    assert sizing_plan.checkpoint_bytes(m, plan) == 20_000
    assert sizing_plan.all_checkpoints_bytes(m, plan) == 200_000


def test_time_is_of_each_further_instance_and_bytes_are_of_the_last() -> None:
    rows = _rows("a, core s a million", {(10, 20): 100.0, (100, 20): 19.0})
    rows += _rows("a, bytes", {(10, 20): 100.0, (100, 20): 19.0})
    m = Measured(rows)
    assert (m.cost("a, core s a million"), m.cost("a, bytes")) == (10.0, 19.0)


def test_a_table_costs_the_stages_up_to_the_one_that_writes_it() -> None:
    stages = [
        Stage(0, 1.0, 500, 0), Stage(9, 2.0, 0, 7),
        Stage(0, 4.0, 300, 0), Stage(9, 8.0, 0, 0), Stage(1, 16.0, 0, 0),
    ]  # fmt: skip
    assert by_table(stages, ["a", "b"], 9) == {
        "a": Stage(9, 3.0, 500, 7),
        "b": Stage(10, 28.0, 300, 0),
    }
    with pytest.raises(ValueError, match="1 stages wrote 9 rows"):
        by_table(stages[:2], ["a", "b"], 9)


def test_the_log_has_the_instances_asked_for_in_whole_days_and_its_wide_twin_four_times_the_columns(
    tmp_path: Path,
) -> None:
    sizing.write_log(tmp_path / "log", 3000, 4)
    days = [pq.read_table(file) for file in sorted((tmp_path / "log").iterdir())]
    assert sum(map(len, days)) == 3000
    for number, day in enumerate(days):
        assert {moment.day for moment in day["event_time"].to_pylist()} == {number + 1}
        assert day["offer_3"] == day["offer"]
    keys = [
        row
        for day in days
        for row in zip(*(day[c].to_pylist() for c in ("request_id", "item_id")), strict=True)
    ]
    assert len(set(keys)) == 3000
    (tmp_path / "sizing.toml").write_text(sizing.domain_file(4))
    domain = load(str(tmp_path / "sizing.toml"))
    assert set(domain.raw_columns) <= set(days[0].column_names)
    (tmp_path / "sizing.toml").write_text(sizing.domain_file(1))
    assert len(domain.features) == 4 * len(load(str(tmp_path / "sizing.toml")).features)


def test_many_files_and_commits_are_priced(tmp_path: Path) -> None:
    costs = sizing.log_costs(tmp_path, 500, 12)
    assert 50 < costs["checkpoint, bytes of a file"][0] < 500
    assert all(value >= 0 for value, _ in costs.values())


def test_an_index_is_priced(tmp_path: Path) -> None:
    lake = str(tmp_path / "lake")
    for number in range(3):
        write_day(lake, number)
    costs = sizing.index_costs(lake, DOMAIN, tmp_path / "index", LINE)
    assert costs["index, bytes of a user"][0] >= 7 * 8
    assert costs["index, bytes of an event"][0] >= 4 * 8  # keys and time
    users = delta.read(lake, tables.histories(DOMAIN))["user_id"]
    assert costs["index, events of a user"][0] == len(users) / len(users.unique())


def test_the_pages_tables_are_what_the_formulas_give() -> None:
    page = sizing_plan.PAGE.read_text()
    assert sizing_plan.written_into(page, Measured.read(sizing_plan.ROWS)) == page


def test_every_measured_row_is_a_benchmarks_row() -> None:
    for row in json.loads(sizing_plan.ROWS.read_text()):
        assert row.keys() >= {"name", "value", "unit", "against", "ratio", "bar", "met", "machine"}
