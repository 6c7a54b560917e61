"""A real Airflow over a real log: twenty households' first week of groceries, in a lake of its own.

Run by `make test-airflow`, which makes Airflow's environment; `make test` leaves these out.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from jobs import airflow as local_airflow
from jobs.airflow import Local
from pipelines import delta, sources, tables
from pipelines.domain import Domain, load
from tests.airflow.client import Client
from tests.conftest import ROOT

collect_ignore_glob = [] if os.environ.get("IAT_TEST_AIRFLOW") else ["test_*.py"]

FIRST, NUM_DAYS, USERS, WINDOW, PORT = date(2017, 1, 1), 5, 20, 3, 8641
DOMAINS = ("scheduled", "backwards", "killed", "twice", "bad")
"""Copies of one log under other names, one for each thing that is shown."""
IAT = ROOT / ".venv" / "bin" / "iat"


def day(number: int) -> date:
    return FIRST + timedelta(days=number)


@dataclass
class World:
    """Where everything is."""

    folder: Path

    @property
    def lake(self) -> str:
        return str(self.folder / "lake")

    @property
    def settings(self) -> Path:
        return self.folder / "airflow.toml"

    @property
    def alerts(self) -> Path:
        """What has been told to the command that IAT_ALERT names."""
        return self.folder / "alerts.txt"

    def domain_file(self, name: str) -> Path:
        return self.folder / "domains" / f"{name}.toml"

    def domain(self, name: str) -> Domain:
        return load(str(self.domain_file(name)))

    def iat(self, *words: str, name: str) -> None:
        """A command about a domain, as a person gives it."""
        line = [str(IAT), *words, "--domain", str(self.domain_file(name)), "--lake", self.lake]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"

    def by_hand(self, name: str, num_days: int) -> dict[str, Any]:
        """What a domain's first days leave when a person gives the commands: in a lake of its own,
        for what an instance is called depends on its domain's name."""
        lake = self.folder / "by-hand" / name
        given = ["--domain", self.domain_file(name), "--lake", lake]
        given += ["--start", FIRST, "--end", day(num_days)]
        walk = ["--begin", FIRST, "--window", WINDOW, "--order", "user"]
        for words in (["build", *given], ["walk-compressor", *given, *walk]):
            line = [IAT, *map(str, words)]
            done = subprocess.run(line, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return self.rows(name, str(lake))

    def rows(self, name: str, lake: str | None = None) -> dict[str, Any]:
        """Everything that days leave, by table."""
        spec = self.domain(name)
        of = (
            tables.instances(spec), tables.temporal_order(spec), tables.user_order(spec),
            tables.histories(spec), tables.ranker_samples(spec), tables.instance_tokens(name),
            tables.item_tokens(name),
        )  # fmt: skip
        return {table.name.split("/")[0]: delta.read(lake or self.lake, table) for table in of}

    def write(self, name: str, text: str) -> None:
        self.domain_file(name).parent.mkdir(parents=True, exist_ok=True)
        self.domain_file(name).write_text(text)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Domain files, the log as a file a day, settings."""
    made = World(tmp_path_factory.mktemp("airflow"))
    grocery = load("grocery")
    events = pq.read_table(sources.prepare(grocery, made.folder / "source", limit_users=USERS))
    of = pc.cast(events["event_time"], "date32")
    text = (ROOT / "pipelines" / "domains" / "grocery.toml").read_text()
    for name in DOMAINS:
        folder = made.folder / "raw" / name
        folder.mkdir(parents=True)
        for number in range(NUM_DAYS + 1):
            pq.write_table(
                events.filter(pc.equal(of, day(number))), folder / f"{day(number)}.parquet"
            )
        here = text.replace('name = "grocery"', f'name = "{name}"', 1)
        made.write(name, here.replace('reader = "completejourney"', f'path = "{folder}"', 1))
    lines = [
        'lake = "lake"', 'work = "work"', 'domains = "domains"', f'iat = "{IAT}"', "retry_s = 1.0",
    ]  # fmt: skip
    for name in DOMAINS:
        last = day(3) if name in ("scheduled", "bad") else day(NUM_DAYS)
        lines += [
            f"[domain.{name}]", f"start = {FIRST}", f"end = {last}", "poll_s = 2.0",
            f"window = {WINDOW}",
            "trailing = 3",
            "judged = 3",
            "margin = 1.0",
            # About ten seconds, which no run keeps.
            *(["deadline_hours = 0.003"] if name == "bad" else []),
            f"catchup = {'true' if name in ('scheduled', 'bad') else 'false'}",
        ]  # fmt: skip
    made.settings.write_text("\n".join(lines) + "\n")
    alert = made.folder / "alert"
    alert.write_text(f'#!/bin/sh\necho "$1" >> "{made.alerts}"\n')
    alert.chmod(0o755)
    os.environ["IAT_ALERT"] = str(alert)
    return made


@pytest.fixture(scope="session")
def local(world: World) -> Iterator[Local]:
    """Airflow, started and stopped as `make airflow` and `make airflow-stop` do."""
    made = Local(home=world.folder / "home", settings=world.settings, port=PORT)
    supervisor = local_airflow.start(made)
    try:
        yield made
    finally:
        assert local_airflow.stop(made)
        assert supervisor.wait(10) == 0


@pytest.fixture(scope="session")
def airflow(local: Local) -> Client:
    client = Client(local.address, *local_airflow.login(local))
    client.wait_for_dag("iat_daily_scheduled")
    return client
