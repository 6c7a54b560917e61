"""Airflow's own REST interface, as far as the tests ask it."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

ENDED = ("success", "failed", "skipped", "upstream_failed", "removed")


@dataclass
class Client:
    """One Airflow, by its address and login."""

    address: str
    user: str
    password: str
    token: str = field(default="", repr=False)

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """The reply of a call below /api/v2."""
        if not self.token:
            login = {"username": self.user, "password": self.password}
            self.token = self._sent("POST", "/auth/token", login)["access_token"]
        return self._sent(method, f"/api/v2{path}", body)

    def _sent(self, method: str, path: str, body: Mapping[str, Any] | None) -> Any:
        request = urllib.request.Request(
            self.address + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"}
            | ({"Authorization": f"Bearer {self.token}"} if self.token else {}),
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.loads(reply.read() or b"null")
        except urllib.error.HTTPError as error:
            said = error.read()[:2000]
            raise AssertionError(f"{method} {path}: {error.code} {said!r}") from error

    def dags(self) -> dict[str, Any]:
        return {dag["dag_id"]: dag for dag in self.ask("GET", "/dags?limit=100")["dags"]}

    def import_errors(self) -> list[str]:
        return [e["stack_trace"] for e in self.ask("GET", "/importErrors")["import_errors"]]

    def switch(self, dag: str, *, on: bool) -> None:
        self.ask("PATCH", f"/dags/{dag}", {"is_paused": not on})

    def runs(self, dag: str) -> list[dict[str, Any]]:
        """Oldest first."""
        found = self.ask("GET", f"/dags/{dag}/dagRuns?limit=100&order_by=id")
        runs: list[dict[str, Any]] = found["dag_runs"]
        return runs

    def trigger(self, dag: str, conf: Mapping[str, Any] | None = None, **given: Any) -> str:
        """The id of a new run."""
        body = {"logical_date": None, "conf": dict(conf or {}), **given}
        run: str = self.ask("POST", f"/dags/{dag}/dagRuns", body)["dag_run_id"]
        return run

    def tasks(self, dag: str, run: str) -> dict[str, dict[str, Any]]:
        """The task instances of a run by task (and, of a mapped one, its place)."""
        path = f"/dags/{dag}/dagRuns/{quote(run, safe='')}/taskInstances?limit=100"
        return {
            t["task_id"] + (f"[{t['map_index']}]" if t["map_index"] >= 0 else ""): t
            for t in self.ask("GET", path)["task_instances"]
        }

    def states(self, dag: str, run: str) -> dict[str, str]:
        return {name: t["state"] for name, t in self.tasks(dag, run).items()}

    def xcom(self, dag: str, run: str, task: str, key: str = "return_value") -> Any:
        path = f"/dags/{dag}/dagRuns/{quote(run, safe='')}/taskInstances/{task}/xcomEntries/{key}"
        return self.ask("GET", f"{path}?deserialize=true")["value"]

    def log(self, dag: str, run: str, task: str, attempt: int = 1) -> str:
        path = f"/dags/{dag}/dagRuns/{quote(run, safe='')}/taskInstances/{task}/logs/{attempt}"
        lines = self.ask("GET", path)["content"]
        return "\n".join(str(line.get("event", line)) for line in lines)

    def wait_for_dag(self, dag: str, timeout_s: float = 120) -> None:
        """Until the DAG files have been read; no file may have an error."""
        wait(self.dags, lambda dags: dag in dags or self.import_errors(), timeout_s, dag)
        assert not self.import_errors(), "\n".join(self.import_errors())

    def wait_for_task(self, dag: str, run: str, task: str, state: str, timeout_s: float) -> None:
        """Until a task of a run is in a state."""
        wait(lambda: self.states(dag, run).get(task), lambda s: s == state, timeout_s, task)

    def wait_for_runs(self, dag: str, num: int, timeout_s: float) -> list[dict[str, Any]]:
        """Until so many runs of a DAG have ended."""
        return wait(
            lambda: [run for run in self.runs(dag) if run["state"] in ENDED],
            lambda ended: len(ended) >= num,
            timeout_s,
            f"{num} runs of {dag}",
        )


def wait(
    ask: Callable[[], Any], is_done: Callable[[Any], bool], timeout_s: float, what: str
) -> Any:
    """What `ask` gives once it is done; AssertionError where that takes too long."""
    until = time.monotonic() + timeout_s
    while not is_done(found := ask()):
        assert time.monotonic() < until, f"{what}: not within {timeout_s} s, but {found}"
        time.sleep(1)
    return found
