"""What a real scheduler leaves in the lake: by schedule, backwards, killed, twice, bad input."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.airflow import HOST, Local
from pipelines import approvals
from tests.airflow.client import ENDED, Client, wait
from tests.airflow.conftest import FIRST, NUM_DAYS, World, day

DAY_S = 900
"""A run may take so long; on a busy machine it does."""
TASKS = {
    "wait_for_events", "build_instances", "check_instances", "build_streams_and_samples",
    "check_streams", "walk_compressor", "check_tokens", "extend_index",
}  # fmt: skip


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Row for row, table for table."""
    assert ours.keys() == theirs.keys()
    for name, table in ours.items():
        assert len(table), name
        assert table.equals(theirs[name]), name


def test_it_listens_on_loopback_alone(local: Local, airflow: Client) -> None:
    assert airflow.dags()
    mine = {int(pid) for pid in descendants(int(local.pid_file.read_text()))}
    ports = listening(mine)
    assert (HOST, local.port) in ports
    assert {host for host, _ in ports} <= {HOST, "::1"}


def test_days_run_by_schedule_are_those_run_by_hand(airflow: Client, world: World) -> None:
    airflow.switch("iat_ranker_scheduled", on=True)
    airflow.switch("iat_daily_scheduled", on=True)
    runs = airflow.wait_for_runs("iat_daily_scheduled", 3, 3 * DAY_S)
    assert [run["state"] for run in runs] == ["success"] * 3
    for run in runs:
        states = airflow.states("iat_daily_scheduled", run["dag_run_id"])
        assert states == dict.fromkeys(TASKS, "success")
    assert_same(world.rows("scheduled"), world.by_hand("scheduled", 3))


def test_rankers_follow_the_token_asset(airflow: Client, world: World) -> None:
    """One of its events each day, with the day in it; every day is predicted once."""
    events = airflow.ask("GET", "/assets/events?limit=100")["asset_events"]
    told = [event["extra"] for event in events if event["extra"].get("domain") == "scheduled"]
    assert sorted(d for extra in told for d in extra["days"]) == [str(day(n)) for n in range(3)]
    assert {extra["line"] for extra in told} == {"scheduled-user"}
    folder = world.folder / "work" / "rankers" / "scheduled" / "din_match" / "scheduled-user"
    wait(
        lambda: sorted(path.stem for path in (folder / "predictions").glob("*.parquet")),
        lambda days: days == [str(day(n)) for n in range(3)],
        DAY_S,
        "predictions of the three days",
    )
    runs = airflow.runs("iat_ranker_scheduled")
    wait(
        lambda: [run["state"] for run in airflow.runs("iat_ranker_scheduled")],
        lambda states: all(state == "success" for state in states),
        DAY_S,
        f"{len(runs)} runs of the ranker",
    )
    told = airflow.xcom("iat_ranker_scheduled", runs[0]["dag_run_id"], "walk_din_match")
    assert told["line"] == "scheduled-user"


def iat_processes(name: str, command: str) -> list[int]:
    """Running commands of a domain."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = place.read_bytes().split(b"\0")
            if command.encode() in words and any(f"/{name}.toml".encode() in w for w in words):
                found.append(int(place.parent.name))
    return found


def once_at_work(name: str, command: str, table: str, world: World) -> int:
    """A command of a domain, once it has begun to write: half way."""
    log = Path(world.lake, table, "_delta_log")
    before = len(list(log.glob("*.json")))

    def look() -> list[int]:
        found = iat_processes(name, command)
        return found if len(list(log.glob("*.json"))) > before or table == "" else []

    (pid, *_) = wait(look, bool, DAY_S, f"{command} of {name} at work")
    return int(pid)


def test_a_task_killed_half_way_is_tried_again_and_leaves_the_same(
    airflow: Client, world: World
) -> None:
    dag = "iat_daily_killed"
    airflow.switch(dag, on=True)
    run = run_of(airflow, dag, 0)
    for command, table in (
        ("build-instances", "quarantine/killed"),
        ("build", "temporal_order/killed"),
        ("walk-compressor", "instance_tokens/killed"),
    ):
        os.kill(once_at_work("killed", command, table, world), signal.SIGKILL)
    wait_for_end(airflow, dag, run)
    tasks = airflow.tasks(dag, run)
    assert {name: task["state"] for name, task in tasks.items()} == dict.fromkeys(TASKS, "success")
    hit = ("build_instances", "build_streams_and_samples", "walk_compressor")
    assert [tasks[name]["try_number"] for name in hit] == [2, 2, 2]
    assert_same(world.rows("killed"), world.by_hand("killed", 1))


def test_a_run_waits_in_the_triggerer_until_its_events_are_there(
    airflow: Client, world: World
) -> None:
    dag, late = "iat_daily_killed", [day(NUM_DAYS - 1), day(NUM_DAYS)]
    raw = world.folder / "raw" / "killed"
    held = {name: (raw / f"{name}.parquet").read_bytes() for name in late}
    for name in late:
        (raw / f"{name}.parquet").unlink()
    airflow.switch(dag, on=True)
    run = run_of(airflow, dag, NUM_DAYS - 1)
    airflow.wait_for_task(dag, run, "wait_for_events", "deferred", DAY_S)
    time.sleep(10)  # a few looks
    assert airflow.states(dag, run)["wait_for_events"] == "deferred"
    for name, rows in held.items():
        (raw / f"{name}.parquet").write_bytes(rows)
    airflow.wait_for_task(dag, run, "wait_for_events", "success", DAY_S)
    airflow.ask("PATCH", f"/dags/{dag}/dagRuns/{run}", {"state": "failed"})


@pytest.mark.slow
def test_two_live_copies_of_a_task_leave_the_same(airflow: Client, world: World) -> None:
    """The task's own process is killed, and not the command that it started: the retry runs beside
    what is left of the first attempt."""
    dag = "iat_daily_twice"
    airflow.switch(dag, on=True)
    run = run_of(airflow, dag, 0)
    seen: dict[str, bool] = {}
    for command in ("build-instances", "build", "walk-compressor"):
        first = wait(lambda c=command: iat_processes("twice", c), bool, DAY_S, command)[0]
        os.kill(first, signal.SIGSTOP)  # so that it is there until the second has begun
        os.kill(parent(first), signal.SIGKILL)
        wait(lambda c=command, f=first: {*iat_processes("twice", c)} - {f}, bool, DAY_S, command)
        os.kill(first, signal.SIGCONT)
        seen[command] = True
    airflow.wait_for_runs(dag, 1, DAY_S)
    assert airflow.states(dag, run) == dict.fromkeys(TASKS, "success")
    wait(lambda: iat_processes("twice", "walk-compressor"), lambda left: not left, DAY_S, "the end")
    assert_same(world.rows("twice"), world.by_hand("twice", 1))
    assert len(seen) == 3


@pytest.mark.slow
def test_a_backfill_of_airflow_itself_newest_first_leaves_the_same(
    airflow: Client, local: Local, world: World
) -> None:
    dag = "iat_daily_backwards"
    airflow.switch(dag, on=True)
    command = ["backfill", "create", "--dag-id", dag, "--from-date", str(FIRST), "--to-date",
               str(day(NUM_DAYS - 1)), "--run-backwards", "--max-active-runs", "2"]  # fmt: skip
    local.run(*command)
    runs = airflow.wait_for_runs(dag, NUM_DAYS, NUM_DAYS * DAY_S)
    assert [run["state"] for run in runs] == ["success"] * NUM_DAYS
    assert_same(world.rows("backwards"), world.by_hand("backwards", NUM_DAYS))
    started = sorted(runs, key=lambda run: run["start_date"])
    assert started[0]["data_interval_start"] > started[-1]["data_interval_start"]


@pytest.mark.slow
def test_a_day_of_bad_input_fails_and_blocks_only_what_depends_on_it(
    airflow: Client, world: World
) -> None:
    dag = "iat_daily_bad"
    place = world.folder / "raw" / "bad" / f"{day(1)}.parquet"
    good = pq.read_table(place)
    at = good.column_names.index("household_id")
    none = pa.nulls(len(good), good.schema.field(at).type)
    pq.write_table(good.set_column(at, "household_id", none), place)
    airflow.switch(dag, on=True)
    runs = airflow.wait_for_runs(dag, 3, 3 * DAY_S)
    assert [run["state"] for run in runs] == ["success", "failed", "success"]
    states = [airflow.states(dag, run["dag_run_id"]) for run in runs]
    assert states[1]["build_instances"] == "failed"
    assert {states[1][name] for name in TASKS - {"build_instances", "wait_for_events"}} == {
        "upstream_failed"
    }
    tried = airflow.tasks(dag, runs[1]["dag_run_id"])["build_instances"]["try_number"]
    assert tried == 1  # wrong input is not tried again
    alerts = world.alerts.read_text()
    assert f"failed: {dag} build_instances of {runs[1]['dag_run_id']}" in alerts
    assert "late: the daily run of bad" in alerts
    waiting = {"walk_compressor", "check_tokens", "extend_index"}
    assert {states[2][name] for name in waiting} == {"skipped"}
    assert {states[2][name] for name in TASKS - waiting} == {"success"}
    assert "its instances are missing" in airflow.log(dag, runs[2]["dag_run_id"], "walk_compressor")
    # The log is mended and the day is run again: the line goes on through the day behind it.
    pq.write_table(good, place)
    body = {"dry_run": False, "only_failed": True}
    airflow.ask("POST", f"/dags/{dag}/dagRuns/{runs[1]['dag_run_id']}/clear", body)
    wait(
        lambda: airflow.states(dag, runs[1]["dag_run_id"]),
        lambda states: states == dict.fromkeys(TASKS, "success"),
        DAY_S,
        "the mended day",
    )
    assert_same(world.rows("bad"), world.by_hand("bad", 3))


@pytest.mark.slow
def test_missing_days_are_filled_by_a_task_a_part_and_the_line_walks_on(
    airflow: Client, world: World
) -> None:
    """After the day that was run twice: its two next days."""
    dag = "iat_backfill"
    airflow.switch(dag, on=True)
    conf = {
        "domain": "twice", "start": str(FIRST), "end": str(day(3)),
        "tables": ["instances", "streams", "samples", "tokens"],
    }  # fmt: skip
    run = airflow.trigger(dag, conf)
    airflow.wait_for_runs(dag, 1, DAY_S)
    states = airflow.states(dag, run)
    assert states == {
        "plan": "success", "commands": "success", "build[0]": "success", "build[1]": "success",
        "walk_compressor": "success", "write_tokens": "skipped",
    }  # fmt: skip
    plan = airflow.xcom(dag, run, "plan")
    assert [step["start"] for step in plan["steps"]] == [str(day(1)), str(day(2))]
    assert_same(world.rows("twice"), world.by_hand("twice", 3))


@pytest.mark.slow
def test_a_new_line_is_compared_approved_and_rolled_back(airflow: Client, world: World) -> None:
    dag, line = "iat_compressor_scheduled", f"scheduled-user-{day(3):%Y%m%d}"
    airflow.switch(dag, on=True)
    run = airflow.trigger(dag, {"until": str(day(3))})
    airflow.wait_for_runs(dag, 1, DAY_S)
    assert {*airflow.states(dag, run).values()} == {"success"}
    evidence = airflow.xcom(dag, run, "compare")["evidence"]
    assert evidence["against"] == "scheduled-user"
    assert evidence["difference"]["low"] <= evidence["difference"]["high"]
    spec = world.domain("scheduled")
    held = approvals.approved(world.lake, spec)
    assert held is not None
    assert (held.line, held.earlier) == (line, ("scheduled-user",))
    world.iat("rollback", name="scheduled")
    held = approvals.approved(world.lake, spec)
    assert held is not None
    assert held.line == "scheduled-user"


@pytest.mark.slow
def test_a_transfer_experiment_is_a_task_a_run_and_one_report(
    airflow: Client, world: World
) -> None:
    dag = "iat_transfer"
    airflow.switch(dag, on=True)
    conf = {"sources": ["scheduled"], "targets": ["backwards"], "rankers": ["din"], "seeds": 2,
            "lines": {"scheduled": "scheduled-user"}, "name": "trial"}  # fmt: skip
    run = airflow.trigger(dag, conf)
    airflow.wait_for_runs(dag, 1, 2 * DAY_S)
    assert airflow.states(dag, run) == dict.fromkeys(
        ("commands", "run[0]", "run[1]", "report"), "success"
    )
    assert airflow.xcom(dag, run, "report")
    made = sorted(path.name for path in (world.folder / "work" / "transfer" / "trial").iterdir())
    assert made == ["backwards.din.seed0", "backwards.din.seed1"]


def wait_for_end(airflow: Client, dag: str, run: str) -> None:
    path = f"/dags/{dag}/dagRuns/{run}"
    wait(lambda: airflow.ask("GET", path)["state"], lambda s: s in ENDED, DAY_S, run)


def run_of(airflow: Client, dag: str, number: int) -> str:
    """A run of one day, begun by hand."""
    when = f"{day(number)}T00:00:00Z"
    body = {"logical_date": when, "data_interval_start": when,
            "data_interval_end": f"{day(number + 1)}T00:00:00Z"}  # fmt: skip
    run: str = airflow.ask("POST", f"/dags/{dag}/dagRuns", body)["dag_run_id"]
    return run


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def descendants(pid: int) -> set[int]:
    """A process and all that it started."""
    parents = {}
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(place.name)] = parent(int(place.name))
    found = {pid}
    while new := {child for child, of in parents.items() if of in found} - found:
        found |= new
    return found


def listening(pids: set[int]) -> set[tuple[str, int]]:
    """Addresses at which these processes wait for connections (Linux: /proc/net)."""
    sockets = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                sockets.add(str(link.readlink()))
    found = set()
    for kind, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{kind}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                host, port = words[1].split(":")
                raw = b"".join(bytes.fromhex(host[i : i + 8])[::-1] for i in range(0, len(host), 8))
                found.add((socket.inet_ntop(family, raw), int(port, 16)))
    return found
