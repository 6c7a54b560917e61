"""iat_ranker_<domain>: rankers predict the days that have tokens now, then learn from them."""

from __future__ import annotations

from pathlib import Path

from airflow.sdk import DAG, Param

from dags.commands import job
from dags.daily import tokens_of
from dags.settings import Settings
from dags.tasks import of_domain, task

NEWEST = (
    "{{{{ params.{key} "
    "or (triggering_asset_events.values() | sum(start=[]) | last).extra.{key} }}}}"
)
"""A parameter of a run by hand, or what the newest event that started the run says."""


def ranker(settings: Settings, domain: str, file: Path) -> DAG:
    """Runs when tokens were written. A ranker names the line that it reads, so that another line
    begins a ranker of its own in a folder of its own."""
    schedule = settings.of(domain)
    line, end = NEWEST.format(key="line"), NEWEST.format(key="end")
    with DAG(
        f"iat_ranker_{domain}",
        schedule=[tokens_of(domain)],
        params={
            "line": Param("", type="string", description="By hand: the line whose tokens are read"),
            "first": Param("", type="string", description="By hand: the ranker's first day, UTC"),
            "end": Param("", type="string", description="By hand: the day after the last, UTC"),
        },
        doc_md=__doc__,
        **of_domain(settings, domain, f"the rankers of {domain}"),
    ) as dag:
        for each in schedule.rankers:
            name = f"{each['ranker']}_{each['arm']}"
            task(
                settings,
                f"walk_{name}",
                job(
                    "walk-ranker", *schedule.train, domain=file, lake=settings.lake,
                    ranker=each["ranker"], arm=each["arm"], line=line,
                    out=f"{settings.work}/rankers/{domain}/{name}",
                    index=f"{settings.work}/index/{domain}/{line}",
                    start=NEWEST.format(key="first"), end=end, window=schedule.window,
                ),
                "Predict each day that is ready with yesterday's weights, tell its AUC, GAUC and "
                "log loss, and go on training. Days walked before stay as they were predicted.",
                kind="gpu",
            )  # fmt: skip
    return dag
