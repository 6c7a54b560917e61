"""A task is a command line: which operator runs it, in which pool, how often it is tried, and what
the UI says of it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from airflow.sdk import BaseOperator, XComArg
from airflow.sdk.definitions.deadline import AsyncCallback, DeadlineAlert, DeadlineReference

from dags.alerts import failed
from dags.operators import IatOperator, IatSensor
from dags.settings import Schedule, Settings

Kind = Literal["light", "spark", "gpu"]
POOLS: Mapping[Kind, str] = {"light": "default_pool", "spark": "iat_spark", "gpu": "iat_gpu"}
"""Pools of one slot each (docs/airflow.md): one task at a time trains, one builds."""
MOST_DELAY = timedelta(minutes=30)


def of_all(settings: Settings) -> dict[str, Any]:
    """Arguments of every DAG."""
    default_args = {
        "retries": settings.retries,
        "retry_delay": timedelta(seconds=settings.retry_s),
        "retry_exponential_backoff": True,
        "max_retry_delay": MOST_DELAY,
        "execution_timeout": timedelta(hours=settings.timeout_hours),
        "on_failure_callback": failed,
    }
    return {"default_args": default_args, "tags": ["iat"]}


def of_domain(settings: Settings, domain: str, what: str) -> dict[str, Any]:
    """Arguments of a domain's DAGs: one run at a time, and an alert where `what` has not ended so
    long after it was queued."""
    schedule = settings.of(domain)
    late = DeadlineAlert(
        reference=DeadlineReference.DAGRUN_QUEUED_AT,
        interval=timedelta(hours=schedule.deadline_hours),
        callback=AsyncCallback("dags.alerts.late", kwargs={"what": what}),
    )
    return of_all(settings) | {
        "start_date": midnight(schedule.start),
        "max_active_runs": 1,
        "deadline": late,
        "tags": ["iat", domain],
    }


def midnight(day: date) -> datetime:
    """The first moment of a day, UTC."""
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


def task(
    settings: Settings,
    task_id: str,
    command: Sequence[str],
    doc: str,
    *,
    kind: Kind = "light",
    **more: Any,
) -> BaseOperator:
    """One command. What Spark runs goes where the setting `operator` says."""
    more |= {"task_id": task_id, "doc_md": described(settings, command, doc)}
    if kind == "spark" and settings.operator == "spark-submit":
        from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator

        return SparkSubmitOperator(**submitted(settings), application_args=list(command), **more)
    return here(settings, command, kind=kind, **more)


def here(settings: Settings, command: Sequence[str], *, kind: Kind, **more: Any) -> IatOperator:
    """One command, run where the task runs, whatever the setting says."""
    further = with_master(settings) if kind == "spark" else []
    return IatOperator(iat=settings.iat, command=[*command, *further], pool=POOLS[kind], **more)


def mapped(
    settings: Settings, task_id: str, commands: XComArg, doc: str, *, kind: Kind, at_once: int
) -> Any:
    """One task a command of a list that an earlier task gives, so many at once."""
    more: dict[str, Any] = {
        "task_id": task_id,
        "doc_md": doc,
        "max_active_tis_per_dagrun": at_once,
    }
    if kind == "spark" and settings.operator == "spark-submit":
        from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator

        return SparkSubmitOperator.partial(**submitted(settings), **more).expand(
            application_args=commands
        )
    name = "{{ task.command | join(' ') }}"
    return IatOperator.partial(
        iat=settings.iat, pool=POOLS[kind], map_index_template=name, **more
    ).expand(command=commands)


def sensor(
    settings: Settings, schedule: Schedule, task_id: str, command: Sequence[str], doc: str
) -> IatSensor:
    """A wait for a command to say yes, in the triggerer."""
    return IatSensor(
        task_id=task_id,
        iat=settings.iat,
        command=command,
        poke_interval=schedule.poll_s,
        timeout=timedelta(hours=schedule.wait_hours).total_seconds(),
        execution_timeout=None,
        doc_md=described(settings, command, doc),
    )


def with_master(settings: Settings) -> list[str]:
    """What a Spark command that runs here is told further."""
    return ["--master", settings.master] if settings.master else []


def described(settings: Settings, command: Sequence[str], doc: str) -> str:
    """What the UI shows of a task."""
    return f"{doc}\n\n    {Path(settings.iat).name} {shlex.join(map(str, command))}\n"


def submitted(settings: Settings) -> dict[str, Any]:
    """How spark-submit runs a command of the toolkit: the connection says on which master."""
    bin_folder = Path(settings.iat).parent
    python = str(bin_folder / "python")
    jars = sorted((bin_folder.parent / "share" / "iat" / "jars").glob("*.jar"))
    return {
        "conn_id": settings.spark_conn_id,
        "application": str(Path(__file__).parents[1] / "jobs" / "cli.py"),
        "jars": ",".join(map(str, jars)),
        "env_vars": {"PYSPARK_PYTHON": python, "PYSPARK_DRIVER_PYTHON": python},
        "pool": POOLS["spark"],
    }
