"""iat_backfill: days that are missing or stale, of any domain: a plan, and a task a part of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from airflow.sdk import DAG, Param
from airflow.sdk import task as python_task

from dags.commands import Flag, job
from dags.settings import Settings
from dags.tasks import here, mapped, of_all, task, with_master

BUILT = ("instances", "streams", "samples")
FILE = "{{ domain_files[params.domain] }}"
EVENTS = "{{ domain_events[params.domain] | join('\n') }}"
"""What else reads the domain's log."""


def backfill(settings: Settings) -> DAG:
    """Safe while daily runs go on: whole days are replaced in one commit, and days that are right
    are not touched."""
    files = {name: str(path) for name, path in settings.domain_files.items()}
    events = {name: [*settings.of(name).events] for name in files}
    days: dict[str, Flag] = {"start": "{{ params.start }}", "end": "{{ params.end }}"}
    where: dict[str, Flag] = {"domain": FILE, "lake": settings.lake}
    has_tokens = "'tokens' in params.tables"
    with DAG(
        "iat_backfill",
        schedule=None,
        max_active_runs=2,
        params={
            "domain": Param(next(iter(files), ""), type="string", enum=[*files] or [""]),
            "start": Param("2026-01-01", type="string", format="date", description="First day"),
            "end": Param("2026-01-02", type="string", format="date", description="Day after last"),
            "tables": Param(
                [*BUILT], type="array", items={"type": "string", "enum": [*BUILT, "tokens"]}
            ),
            "version": Param(
                "", type="string", description="Of tokens: a frozen version or line; empty: the "
                "approved line walks on",
            ),
            "days_at_once": Param(1, type="integer", minimum=1, description="Days of one task"),
        },
        user_defined_macros={"domain_files": files, "domain_events": events},
        doc_md=__doc__,
        **of_all(settings),
    ) as dag:  # fmt: skip
        plan = here(
            settings,
            job("backfill", "--dry-run", EVENTS, **where, **days, tables=[*BUILT],
                days_at_once="{{ params.days_at_once }}"),
            kind="spark",
            task_id="plan",
            doc_md="Which days are missing or stale, and why; rows, bytes and time. In the log, "
            "and as the XCom.",
        )  # fmt: skip
        local = settings.operator == "local"
        further = ["--lake", settings.lake, *(with_master(settings) if local else [])]
        parts = commands(cast(Any, plan.output), files, events, further)
        build = mapped(
            settings, "build", parts,
            "Write the days of one part of the plan; those that are right by then stay.",
            kind="spark", at_once=settings.runs_at_once,
        )  # fmt: skip
        frozen = task(
            settings,
            "write_tokens",
            job("backfill", **where, **days, tables=["tokens"],
                compressor_version="{{ params.version }}"),
            "Tokens of a frozen version: instance tokens, then item tokens, oldest first.",
            kind="gpu",
            only_if=f"{{{{ {has_tokens} and params.version != '' }}}}",
            trigger_rule="none_failed",
        )  # fmt: skip
        walk = task(
            settings,
            "walk_compressor",
            job("walk-compressor", **where, **days),
            "The approved line walks on, over the days that are there now.",
            kind="gpu",
            only_if=f"{{{{ {has_tokens} and params.version == '' }}}}",
            trigger_rule="none_failed",
        )
        build >> [frozen, walk]
    return dag


@python_task
def commands(
    plan: Mapping[str, Any],
    files: Mapping[str, str],
    events: Mapping[str, list[str]],
    further: list[str],
    params: Mapping[str, Any] | None = None,
) -> list[list[str]]:
    """A command a part of the plan."""
    asked = params or {}
    domain = asked["domain"]
    tables = [table for table in BUILT if table in asked["tables"]]
    return [
        job("backfill", *further, *events[domain], domain=files[domain], start=step["start"],
            end=step["end"], tables=tables, days_at_once=asked["days_at_once"])
        for step in plan["steps"]
        if {*tables} & {*step["why"]}
    ]  # fmt: skip
