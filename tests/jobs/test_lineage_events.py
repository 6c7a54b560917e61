"""OpenLineage events of job runs, through the public client's own transports and settings."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from jobs import ledger
from jobs.lineage_events import Events
from pipelines import delta, tables
from pipelines.domain import parse
from tests.compressor.conftest import TINY

Event = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Args:
    lake: str
    domain: str = "tiny"
    dry_run: bool = False


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """The client copies an address to variables of its own, which are gone after the test."""
    yield
    for name in [name for name in os.environ if name.startswith("OPENLINEAGE")]:
        del os.environ[name]


@pytest.fixture
def sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that events go to, by the client's own configuration file."""
    config, events = tmp_path / "openlineage.yml", tmp_path / "events.jsonl"
    config.write_text(f"transport: {{type: file, log_file_path: {events}, append: true}}\n")
    monkeypatch.setenv("OPENLINEAGE_CONFIG", str(config))
    return events


def events_of(file: Path) -> list[Event]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def done(lake: str, args: Args | None = None) -> str:
    """A run that reads version 4 of a table and a log, and writes version 7 of another."""
    with ledger.job(lake, "build-streams", args or Args(lake=lake)) as run:
        source = "s3://key:hunter2@logs/events?sig=abc"
        commit = ledger.commit_of(run, parse(TINY), {"instances/tiny": 4, "source": source})
        run.outputs["user_order/tiny"] = 7
        assert commit["run"] == run.run
    return run.run


def test_a_run_is_a_start_and_a_complete_with_the_versions_it_read_and_wrote(
    sent: Path, tmp_path: Path
) -> None:
    run = done(str(tmp_path / "lake"))
    start, end = events_of(sent)
    assert [event["eventType"] for event in (start, end)] == ["START", "COMPLETE"]
    lake = (tmp_path / "lake").as_uri()
    for event in (start, end):
        assert event["run"]["runId"].replace("-", "") == run
        assert event["job"] == {"namespace": lake, "name": "build-streams.tiny", "facets": {}}
    table, log = end["inputs"]
    assert (table["namespace"], table["name"]) == (lake, "instances/tiny")
    assert table["facets"]["version"]["datasetVersion"] == "4"
    assert (log["namespace"], log["name"]) == ("s3://logs", "/events")
    (output,) = end["outputs"]
    assert (output["name"], output["facets"]["version"]["datasetVersion"]) == (
        "user_order/tiny",
        "7",
    )


def test_a_run_that_fails_says_so_and_no_credential_leaves(sent: Path) -> None:
    lake = "s3://key:hunter2@bucket/lake?sig=abc"
    events = Events(lake, "evaluate", "0" * 32)
    events.start()
    events.end({}, {}, f"ValueError: gone: {lake}")
    start, end = events_of(sent)
    assert end["eventType"] == "FAIL"
    message = end["run"]["facets"]["errorMessage"]["message"]
    assert message == "ValueError: gone: s3://bucket/lake"
    assert end["job"]["namespace"] == start["job"]["namespace"] == "s3://bucket/lake"
    assert "hunter2" not in sent.read_text()
    assert "sig=" not in sent.read_text()


def test_a_job_that_raises_is_a_fail(sent: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="gone"), ledger.job(str(tmp_path), "evaluate"):
        raise KeyError("gone")
    assert [event["eventType"] for event in events_of(sent)] == ["START", "FAIL"]


def test_a_dry_run_and_a_lake_without_settings_send_nothing(
    sent: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    done(str(tmp_path), Args(lake=str(tmp_path), dry_run=True))
    monkeypatch.setenv("OPENLINEAGE_DISABLED", "true")
    done(str(tmp_path))
    monkeypatch.delenv("OPENLINEAGE_DISABLED")
    monkeypatch.delenv("OPENLINEAGE_CONFIG")
    monkeypatch.setenv("HOME", str(tmp_path))
    # The client is not even loaded, nor missed.
    monkeypatch.setitem(sys.modules, "openlineage.client", None)
    done(str(tmp_path))
    assert not sent.exists()
    assert not [record for record in caplog.records if record.name == "jobs.lineage_events"]


@pytest.fixture
def server() -> Iterator[tuple[str, list[Event]]]:
    """A lineage server on this machine, and what it received."""
    received: list[Event] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            received.append(json.loads(body))
            self.send_response(201)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Not to the tests' output."""

    with HTTPServer(("127.0.0.1", 0), Handler) as made:
        thread = Thread(target=made.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{made.server_port}", received
        made.shutdown()
        thread.join()


def test_a_url_is_enough(
    server: tuple[str, list[Event]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, received = server
    monkeypatch.setenv("OPENLINEAGE_URL", url)
    done(str(tmp_path))
    assert [event["eventType"] for event in received] == ["START", "COMPLETE"]


@pytest.mark.parametrize("broken", ["nobody listens", "no client", "no such transport"])
def test_a_run_never_fails_for_its_events(
    broken: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = tmp_path / "openlineage.yml"
    kind = "pigeon" if broken == "no such transport" else "http"
    config.write_text(
        f"transport: {{type: {kind}, url: 'http://127.0.0.1:9', retry: {{total: 0}}}}"
    )
    monkeypatch.setenv("OPENLINEAGE_CONFIG", str(config))
    if broken == "no client":
        monkeypatch.setitem(sys.modules, "openlineage.client", None)
    done(str(tmp_path / "lake"))
    (report,) = delta.read(str(tmp_path / "lake"), tables.job_reports()).to_pylist()
    assert json.loads(report["report"])["status"] == "done"
    warned = [r for r in caplog.records if r.name == "jobs.lineage_events"]
    assert len(warned) == 1
