"""`iat lineage`: of what a day was made, through every table, from commits alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs import ledger, lineage
from jobs.cli import run
from pipelines import delta, tables
from pipelines.days import Days
from pipelines.domain import Domain, parse
from pipelines.errors import InputError
from pipelines.tables import Table
from tests.compressor.conftest import TINY

FIRST = date(2024, 3, 1)
LOG = Days(FIRST, FIRST + timedelta(days=6))
SECRET = "s3://key:hunter2@logs/events?sig=abc"


@pytest.fixture
def domain() -> Domain:
    return parse(TINY | {"name": "tiny"})


def day(number: int) -> date:
    return FIRST + timedelta(days=number)


class Lake:
    """Commits as the jobs leave them, over tables without a row."""

    def __init__(self, place: Path, domain: Domain) -> None:
        self.place, self.domain = str(place), domain

    def commit(
        self, job: str, table: Table, days: Days, inputs: Mapping[str, Any], **more: str
    ) -> int:
        said = ledger.commit_of(ledger.Run(job, f"run-of-{job}"), self.domain, inputs, **more)
        rows = table.schema.empty_table()
        return delta.replace(self.place, table, rows, days, commit=said, line=more.get("line"))

    def version(self, name: str, parent: str, days: Days, inputs: Mapping[str, int]) -> None:
        table = tables.compressor_versions()
        row = dict.fromkeys(table.schema.names) | {
            "compressor_line": "user", "compressor_version": name, "parent_version": parent,
            "start": days.start, "end": days.end, "input_versions": json.dumps(inputs),
        }  # fmt: skip
        said = ledger.commit_of(ledger.Run("train-compressor", "run-of-train"), self.domain, inputs)
        delta.replace(
            self.place, table, pa.Table.from_pylist([row], table.schema), None, line="user",
            where=f"compressor_version = '{name}'", commit={**said, "compressor_version": name},
        )  # fmt: skip


@pytest.fixture
def lake(tmp_path: Path, domain: Domain) -> str:
    """Instances of all days, then of the second again; streams of them; two daily versions and
    their tokens; the tokens of another line."""
    made = Lake(tmp_path, domain)
    instances, stream = tables.instances(domain), tables.user_order(domain)
    tokens = tables.instance_tokens(domain.name)
    first = made.commit("build-instances", instances, LOG, {"source": SECRET})
    made.commit("build-streams", stream, LOG, {instances.name: first})
    again = made.commit("build-instances", instances, Days(day(1), day(2)), {"source": SECRET})
    newest = made.commit("build-streams", stream, Days(day(1), day(2)), {instances.name: again})
    read = {stream.name: newest}
    made.version("user@a", "", Days(day(0), day(2)), read)
    made.version("user@b", "user@a", Days(day(0), day(4)), read)
    for name, days in (("user@a", Days(day(0), day(2))), ("user@b", Days(day(2), day(4)))):
        made.commit("train-compressor", tokens, days, read, line="user", compressor_version=name)
    made.commit("write-tokens", tokens, LOG, read, line="other", compressor_version="other@1")
    return made.place


def found(lake: str, table: str, **given: Any) -> dict[str, Any]:
    return lineage.main(lineage.Args(table=table, lake=lake, **given))


def above(result: Mapping[str, Any], key: Mapping[str, Any]) -> list[tuple[str, int | str]]:
    (node,) = (
        x for x in result["commits"] if (x["table"], x["version"]) == (key["table"], key["version"])
    )
    return [(up["table"], up["version"]) for up in node["made_of"]]


def test_a_day_of_tokens_is_followed_up_to_the_raw_log(lake: str) -> None:
    result = found(lake, "instance_tokens/tiny", day=day(3), version="user")
    (root,) = result["roots"]
    assert above(result, root) == [("user_order/tiny", 1), ("compressor_versions", "user@b")]
    rows = {(row["table"], row["version"]): row for row in result["commits"]}
    assert rows["instance_tokens/tiny", root["version"]]["days"] == [str(Days(day(3), day(4)))]
    # What the version learned: every day of the stream, of which the second was written again.
    b = {"table": "compressor_versions", "version": "user@b"}
    assert above(result, b) == [
        ("user_order/tiny", 1), ("user_order/tiny", 2), ("compressor_versions", "user@a"),
    ]  # fmt: skip
    assert rows["user_order/tiny", 2]["days"] == [str(Days(day(1), day(2)))]
    assert above(result, {"table": "user_order/tiny", "version": 2}) == [("instances/tiny", 2)]
    assert above(result, {"table": "user_order/tiny", "version": 1}) == [("instances/tiny", 1)]
    source = rows["instances/tiny", 1]
    assert (source["job"], source["run"]) == ("build-instances", "run-of-build-instances")
    assert source["source"] == "s3://logs/events"
    assert source["code"] == ledger.code_version()


def test_a_table_is_of_the_last_commit_of_each_of_its_days(lake: str) -> None:
    result = found(lake, "user_order/tiny")
    days = {row["version"]: row["days"] for row in result["commits"] if row["table"] != "x"}
    assert [root["version"] for root in result["roots"]] == [1, 2]
    assert days[1] == [str(Days(day(0), day(1))), str(Days(day(2), day(6)))]


def test_a_line_hides_no_commit_of_another(lake: str) -> None:
    both = found(lake, "instance_tokens/tiny", day=day(0))
    assert len(both["roots"]) == 2
    lines = {row["line"] for row in both["commits"] if row["table"] == "instance_tokens/tiny"}
    assert lines == {"user", "other"}


def test_what_was_read_is_the_last_commit_up_to_the_version_read(lake: str, domain: Domain) -> None:
    """Instances that are written after the streams are none of theirs."""
    Lake(Path(lake), domain).commit(
        "build-instances", tables.instances(domain), LOG, {"source": SECRET}
    )
    result = found(lake, "user_order/tiny", day=day(0))
    assert above(result, result["roots"][0]) == [("instances/tiny", 1)]


def test_the_tree_names_every_commit_once_and_no_credential(
    lake: str, domain: Domain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--lake", lake, "--day", str(day(3)), "--version", "user@b"]
    assert run(["lineage", "instance_tokens/tiny", *flags, "--json", str(tmp_path / "x.json")]) == 0
    told = capsys.readouterr().out
    config = ledger.config_of(domain)
    assert told.splitlines()[:4] == [
        f"instance_tokens/tiny @ 2  {day(3)}  train-compressor, run run-of-train, "
        f"code {ledger.code_version()}, config {config}",
        f"  user_order/tiny @ 1  {day(0)}, {day(2)} to {day(3)}  build-streams, run run-of-build, "
        f"code {ledger.code_version()}, config {config}",
        f"    instances/tiny @ 1  {day(0)}, {day(2)} to {day(3)}  build-instances, run "
        f"run-of-build, code {ledger.code_version()}, config {config}",
        "      s3://logs/events",
    ]
    assert "  version user@b" in told
    assert "\n  version user@a" in told  # beside the version that grew out of it
    assert "hunter2" not in told + (tmp_path / "x.json").read_text()


def test_compressor_versions_have_a_lineage_of_their_own(lake: str) -> None:
    result = found(lake, "compressor_versions", version="user@b")
    (root,) = result["roots"]
    assert root == {"table": "compressor_versions", "version": "user@b"}
    names = {row["version"]: row["run"] for row in result["commits"] if "vers" in row["table"]}
    assert names == {"user@b": "run-of-train", "user@a": "run-of-train"}
    assert len(found(lake, "compressor_versions")["roots"]) == 2


@pytest.mark.parametrize(
    ("table", "given", "said"),
    [
        ("user_order/tiny", {"day": day(9)}, f"wrote {day(9)}"),
        ("histories/tiny", {}, "has no table histories/tiny"),
        ("../elsewhere", {}, "is no table name"),
        ("instance_tokens/tiny", {"version": "usr"}, "the lake has: user@a, user@b"),
    ],
)
def test_what_is_not_there_is_said(lake: str, table: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        found(lake, table, **given)
