"""iat_compressor_<domain>: a new compressor line on the trailing days, against the approved one."""

from __future__ import annotations

from pathlib import Path

from airflow.sdk import DAG, Param

from dags.commands import Flag, job
from dags.compat import CronDataIntervalTimetable
from dags.settings import Settings
from dags.tasks import of_domain, task

UNTIL = "(params.until or ((data_interval_end or logical_date or dag_run.run_after) | ds))"
"""The day after the last that the new line is trained on."""


def compressor(settings: Settings, domain: str, file: Path) -> DAG:
    """By hand or by `retrain`. The line that is approved now stays, tokens and all: `iat rollback`
    goes back to it. Rankers go on reading the line that they name."""
    schedule = settings.of(domain)
    where: dict[str, Flag] = {"domain": file, "lake": settings.lake}
    line = f"{domain}-{schedule.order}-{{{{ {UNTIL} | replace('-', '') }}}}"
    until = f"{{{{ {UNTIL} }}}}"
    trained: dict[str, Flag] = {"start": days_before(schedule.trailing), "end": until}
    judged: dict[str, Flag] = {"start": days_before(schedule.judged), "end": until}
    with DAG(
        f"iat_compressor_{domain}",
        schedule=CronDataIntervalTimetable(schedule.retrain, timezone="UTC")
        if schedule.retrain
        else None,
        catchup=False,
        params={
            "until": Param(
                "", type="string", description="The day after the last trained on; empty: today"
            )
        },
        doc_md=__doc__,
        **of_domain(settings, domain, f"the new compressor line of {domain}"),
    ) as dag:
        train = task(
            settings,
            "train_new_line",
            job(
                "train-compressor", *schedule.train, **where, **trained, line=line,
                order=schedule.order, window=schedule.window,
            ),
            "Walks the trailing days from fresh weights: predict, train, write the day's tokens. "
            "The last of them are what it is compared on.",
            kind="gpu",
        )  # fmt: skip
        check = task(
            settings,
            "check_tokens",
            job("check", tables=["tokens"], **where, **trained),
            "A finite token of the declared width for every event.",
        )
        compare = task(
            settings,
            "compare",
            job(
                "approve", "--dry-run", **where, **judged, line=line, margin=schedule.margin
            ),
            "AUC of both lines on the last days, as each predicted them before training on them, "
            "and the paired interval of the difference over users. Fails where the new line may be "
            "worse by more than the margin; the approved one then stays.",
        )  # fmt: skip
        index = task(
            settings,
            "build_index",
            job("index", **where, index=f"{settings.work}/index/{domain}/{line}", line=line),
            "The new line's user index, for rankers that will read it.",
        )
        approve = task(
            settings,
            "approve",
            job("approve", **where, **judged, line=line, margin=schedule.margin),
            "The daily run walks the new line from its next run on.",
        )
        train >> check >> compare >> index >> approve
    return dag


def days_before(number: int) -> str:
    """The day so many days before the end."""
    return f"{{{{ macros.ds_add({UNTIL}, -{number}) }}}}"
