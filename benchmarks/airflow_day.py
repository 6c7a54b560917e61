"""What Airflow adds to a day: the same days by a scheduler and by the bare commands, in turns.

`make bench ONLY=airflow_day`: a small log of one Parquet file a day. Each day is run once by
`iat_daily_<domain>` on a local Airflow and once by its commands one after the other, each in a
process of its own; which comes first takes turns. The first day, on which tables are made, is left
out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.day_cost import DOMAIN, FIRST, write_day
from jobs import airflow as local_airflow
from jobs import ledger
from jobs.airflow import Local
from jobs.setup import VENV
from jobs.setup_airflow import set_up
from tests.airflow.client import ENDED, Client, wait

MOST_S = 90.0
RUN_S = 1800
NAMES = ("scheduled", "bare")
SETTINGS = """
lake = "lake"
work = "work"
domains = "domains"
iat = "{iat}"
[domain.scheduled]
start = {first}
# Nothing is scheduled by itself: every run is asked for.
end = {end}
window = 3
"""


class Turn(NamedTuple):
    """One day both ways, in seconds."""

    total: float
    """From when Airflow was asked to the run's end."""
    tasks: dict[str, float]
    bare: dict[str, float]


def commands(file: Path, lake: Path, work: Path, day: date) -> dict[str, list[str]]:
    """A day's, by the DAG's tasks."""
    where = ["--domain", str(file), "--lake", str(lake)]
    given = [*where, "--start", str(day), "--end", str(day + timedelta(days=1))]
    line = f"{file.stem}-user"
    index = ["index", *where, "--index", str(work / "index" / file.stem / line), "--line", line]
    walk = ["--begin", str(FIRST), "--order", "user", "--window", "3"]
    return {
        "wait_for_events": ["arrived", *given],
        "build_instances": ["build-instances", *given],
        "check_instances": ["check", "--tables", "instances", *given],
        "build_streams_and_samples": ["build", "--tables", "streams", "samples", *given],
        "check_streams": ["check", "--tables", "instances", "streams", "samples", *given],
        "walk_compressor": ["walk-compressor", *given, *walk],
        "check_tokens": ["check", "--tables", "tokens", *given],
        "extend_index": index,
    }


def bare(root: Path, day: date) -> dict[str, float]:
    """Seconds of each command of a day."""
    found = {}
    file = root / "domains" / "bare.toml"
    for name, words in commands(file, root / "lake", root / "work", day).items():
        started = time.perf_counter()
        line = [str(VENV / "bin" / "iat"), *words]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{line}: {done.stderr[-2000:]}")
        found[name] = time.perf_counter() - started
    return found


def scheduled(client: Client, day: date) -> tuple[float, dict[str, float]]:
    """Seconds from when a run was asked for to its end, and of each of its tasks."""
    dag, asked = "iat_daily_scheduled", datetime.now(UTC)
    start, end = (f"{d}T00:00:00Z" for d in (day, day + timedelta(days=1)))
    body = {"logical_date": start, "data_interval_start": start, "data_interval_end": end}
    run = client.ask("POST", f"/dags/{dag}/dagRuns", body)["dag_run_id"]
    path = f"/dags/{dag}/dagRuns/{run}"
    ended = wait(lambda: client.ask("GET", path), lambda r: r["state"] in ENDED, RUN_S, str(day))
    if ended["state"] != "success":
        raise SystemExit(f"{run}: {client.states(dag, run)}")
    tasks = {name: float(task["duration"]) for name, task in client.tasks(dag, run).items()}
    return (datetime.fromisoformat(ended["end_date"]) - asked).total_seconds(), tasks


def measure(client: Client, root: Path, num_days: int, num_events: int) -> list[dict[str, Any]]:
    """The rows of the benchmark."""
    turns: list[Turn] = []
    for number in range(num_days + 1):
        day = FIRST + timedelta(days=number)
        for name in NAMES:
            write_day(root / name, day, num_events, num_events // 5)
        if number % 2:
            alone = bare(root, day)
            total, tasks = scheduled(client, day)
        else:
            total, tasks = scheduled(client, day)
            alone = bare(root, day)
        sys.stderr.write(f"{day}: Airflow {total:.0f} s, bare {sum(alone.values()):.0f} s\n")
        turns += [Turn(total, tasks, alone)] if number else []
    for name in turns[0].tasks:
        task_s, alone_s = (
            statistics.median(of[name] for of in held)
            for held in ([t.tasks for t in turns], [t.bare for t in turns])
        )
        sys.stderr.write(f"  {name:28s} task {task_s:6.1f} s, command {alone_s:6.1f} s\n")
    added_s = statistics.median(turn.total - sum(turn.bare.values()) for turn in turns)
    bare_s = statistics.median(sum(turn.bare.values()) for turn in turns)
    total_s = statistics.median(turn.total for turn in turns)
    return [
        {
            "name": "what Airflow adds to a day", "value": added_s, "unit": "s",
            "against": f"bare commands, {bare_s:.0f} s", "ratio": total_s / bare_s,
            "bar": MOST_S, "met": added_s <= MOST_S, "machine": ledger.machine(),
        }
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--days", type=int, default=4)
    parser.add_argument("--events", type=int, default=5_000, help="a day")
    parser.add_argument("--port", type=int, default=8642)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    set_up()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "domains").mkdir()
        for name in NAMES:
            (root / name).mkdir()
            text = DOMAIN.replace('"days"', f'"{name}"').replace(
                'path = "log"', f'path = "../{name}"'
            )
            (root / "domains" / f"{name}.toml").write_text(text)
        file = root / "airflow.toml"
        file.write_text(
            SETTINGS.format(iat=VENV / "bin" / "iat", first=FIRST, end=FIRST + timedelta(days=60))
        )
        local = Local(home=root / "home", settings=file, port=args.port)
        supervisor = local_airflow.start(local)
        try:
            client = Client(local.address, *local_airflow.login(local))
            client.wait_for_dag("iat_daily_scheduled")
            client.switch("iat_daily_scheduled", on=True)
            rows = measure(client, root, args.days, args.events)
        finally:
            local_airflow.stop(local)
            supervisor.wait(30)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    for row in rows:
        missed = "" if row["met"] else f"   MISSES {row['bar']:.0f} s"
        sys.stdout.write(f"{row['name']}: {row['value']:.1f} s over {row['against']}{missed}\n")


if __name__ == "__main__":
    main()
