"""Run by Airflow's own Python: what the DAG files say, as JSON; every command as a run would fill
it in."""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

DAY = datetime(2017, 1, 1, tzinfo=UTC)
WALKED = {
    "domain": "grocery", "line": "grocery-user", "first": "2017-01-01", "days": ["2017-01-01"],
    "end": "2017-01-02",
}  # fmt: skip
STEP = {"start": "2017-01-01", "end": "2017-01-02", "why": {"streams": "missing"}}


def main() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found = importlib.import_module("dags.iat")
    dags = {name: dag for name, dag in vars(found).items() if name.startswith("iat_")}
    described = {
        "version": importlib.import_module("airflow").__version__,
        "warnings": [str(w.message) for w in told if "deprecat" in w.category.__name__.lower()
                     or "Removed" in w.category.__name__],
        "dags": {name: of_dag(dag) for name, dag in dags.items()},
    }  # fmt: skip
    json.dump(described, sys.stdout)


def of_dag(dag: Any) -> dict[str, Any]:
    return {
        "doc": dag.doc_md,
        "timetable": type(dag.timetable).__name__,
        "catchup": dag.catchup,
        "deadline_s": [alert.interval.total_seconds() for alert in listed(dag.deadline)],
        "tasks": {task.task_id: of_task(dag, task) for task in dag.tasks},
    }


def listed(held: Any) -> list[Any]:
    return held if isinstance(held, list) else [held] if held else []


def of_task(dag: Any, task: Any) -> dict[str, Any]:
    kept = task.partial_kwargs if hasattr(task, "partial_kwargs") else vars(task)
    return {
        "type": task.task_type if hasattr(task, "task_type") else type(task).__name__,
        "doc": kept.get("doc_md") or getattr(task, "doc_md", None),
        "pool": kept.get("pool", "default_pool"),
        "retries": task.retries,
        "backoff": bool(task.retry_exponential_backoff),
        "timeout_s": task.execution_timeout.total_seconds() if task.execution_timeout else None,
        "alert": bool(task.on_failure_callback),
        "commands": commands_of(dag, task),
        "downstream": sorted(task.downstream_task_ids),
    }


def commands_of(dag: Any, task: Any) -> list[list[str]]:
    """As a run would fill them in; of a task that makes commands, all that it makes."""
    files = (dag.user_defined_macros or {}).get("domain_files", {"grocery": ""})
    params = dict(dag.params.dump())
    params |= {"domain": next(iter(files)), "sources": ["grocery"], "targets": ["movielens"],
               "version": "grocery-user"}  # fmt: skip
    if task.task_id == "commands":
        files = {"grocery": "grocery", "movielens": "movielens", params["domain"]: "grocery"}
        plan = {"steps": [STEP]}
        function = task.python_callable
        if "transfer" in dag.dag_id:
            made: list[list[str]] = function(files, "lake", "out", params)
        else:
            made = function(plan, files, {params["domain"]: []}, ["--lake", "lake"], params)
        return made
    if not isinstance(getattr(task, "command", None), list | tuple):
        return []
    from dags.operators import words

    event = SimpleNamespace(extra=WALKED)
    context = {
        "params": params,
        "data_interval_start": DAY,
        "data_interval_end": DAY.replace(day=2),
        "logical_date": DAY,
        "run_id": "manual__2017",
        "dag_run": SimpleNamespace(run_after=DAY),
        "ti": SimpleNamespace(xcom_pull=lambda task_ids: WALKED),
        "macros": importlib.import_module("airflow.sdk.execution_time.macros"),
        "triggering_asset_events": {"asset": [event]},
        **(dag.user_defined_macros or {}),
    }
    environment = dag.get_template_env()
    return [words([environment.from_string(str(word)).render(context) for word in task.command])]


if __name__ == "__main__":
    main()
