"""iat_daily_<domain>: a day's events become instances, streams, tokens and a longer user index."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

from airflow.sdk import DAG, Asset, chain

from dags.commands import DAY, Flag, job
from dags.compat import CronDataIntervalTimetable
from dags.settings import Settings
from dags.tasks import midnight, of_domain, sensor, task


def tokens_of(domain: str) -> Asset:
    """The asset whose events say which days of a domain have tokens now."""
    return Asset(f"iat_tokens_{domain}")


def daily(settings: Settings, domain: str, file: Path) -> DAG:
    """The day's run. Days may be run in any order: what depends on earlier days (the compressor
    line) goes forward as far as it can, and a later run of an earlier day takes it further."""
    schedule = settings.of(domain)
    where: dict[str, Flag] = {"domain": file, "lake": settings.lake}
    walked = "{{ ti.xcom_pull(task_ids='walk_compressor') | tojson }}"
    line = "{{ ti.xcom_pull(task_ids='walk_compressor')['line'] }}"
    with DAG(
        f"iat_daily_{domain}",
        schedule=CronDataIntervalTimetable(schedule.cron, timezone="UTC"),
        # `end` is the day after the last: no run's days begin there.
        end_date=midnight(schedule.end) - timedelta(microseconds=1) if schedule.end else None,
        catchup=schedule.catchup,
        doc_md=__doc__,
        **of_domain(settings, domain, f"the daily run of {domain}"),
    ) as dag:
        build = task(
            settings,
            "build_instances",
            job("build-instances", *schedule.events, **where, **DAY),
            "Raw events to instances. What breaks a rule goes to quarantine; past the domain "
            "file's share the task fails, and the instances stay as they were.",
            kind="spark",
        )
        check_instances = task(
            settings,
            "check_instances",
            job("check", tables=["instances"], **where, **DAY),
            "Keys, order and labels of the day's instances. Fails the day, and nothing of other "
            "days but the tokens after it.",
        )
        streams = task(
            settings,
            "build_streams_and_samples",
            job("build", tables=["streams", "samples"], **where, **DAY),
            "Both streams, histories and ranker samples, in one Spark session.",
            kind="spark",
        )
        check_streams = task(
            settings,
            "check_streams",
            job("check", tables=["instances", "streams", "samples"], **where, **DAY),
            "The same instances everywhere, and nothing far from the week before.",
        )
        walk = task(
            settings,
            "walk_compressor",
            job(
                "walk-compressor", *schedule.train, **where, **DAY, begin=schedule.start,
                order=schedule.order, window=schedule.window,
            ),
            "The approved compressor line predicts the day, is trained on it if its figures are "
            "sane, and writes its tokens and item tokens; so for every day that waits behind it. "
            "Skipped, with what follows, where an earlier day is missing.",
            kind="gpu",
            skip_without="days",
        )  # fmt: skip
        check_tokens = task(
            settings,
            "check_tokens",
            job("check", tables=["tokens"], **where, **DAY),
            "**The alert.** Fails, and blocks nothing, where the day's training was refused (its "
            "tokens are yesterday's weights'), or its tokens are not as they should be.",
            retries=0,
        )
        index = task(
            settings,
            "extend_index",
            job("index", **where, index=f"{settings.work}/index/{domain}/{line}", line=line),
            "The user index of the line, by the days that changed. Its end is the token asset's "
            "event, with the days in it.",
            announces=tokens_of(domain),
            told=walked,
        )
        steps = [build, check_instances, streams, check_streams, walk]
        if schedule.wait_hours:
            arrived = job("arrived", *schedule.events, **where, **DAY)
            doc = "Until the raw log has come to the day."
            steps.insert(0, sensor(settings, schedule, "wait_for_events", arrived, doc))
        chain(*steps, [check_tokens, index])
    return dag
