"""iat_transfer: do the tokens of other domains help a target's ranker? A task a run, one report."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

from airflow.sdk import DAG, Param
from airflow.sdk import task as python_task

from dags.commands import job
from dags.settings import Settings
from dags.tasks import mapped, of_all, task

OUT = "{{ params.name or run_id | replace(':', '-') }}"


def transfer(settings: Settings) -> DAG:
    """Every target with every ranker and seed: alone, with its own tokens, and with those of each
    source and of all of them, on the same rows with the same budget."""
    files = {name: str(path) for name, path in settings.domain_files.items()}
    names: dict[str, Any] = {"type": "array", "items": {"type": "string", "enum": [*files] or [""]}}
    with DAG(
        "iat_transfer",
        schedule=None,
        max_active_runs=1,
        params={
            "sources": Param([], description="Domains whose tokens are read", **names),
            "targets": Param([], description="Domains whose rankers read them", **names),
            "rankers": Param(["din"], type="array", items={"type": "string"}),
            "seeds": Param(1, type="integer", minimum=1, description="Seeds of each"),
            "lines": Param(
                {}, type="object", description="Compressor line by domain; of others their only one"
            ),
            "name": Param("", type="string", description="Folder of the results; empty: the run's"),
        },
        doc_md=__doc__,
        **of_all(settings),
    ) as dag:
        out = f"{settings.work}/transfer/{OUT}"
        runs = mapped(
            settings, "run", commands(files, settings.lake, out),
            "All arms of one target, ranker and seed. A run that was killed goes on where it was.",
            kind="gpu", at_once=1,
        )  # fmt: skip
        report = task(
            settings,
            "report",
            job("transfer-report", out=out),
            "Every arm with intervals over users and seeds, coverage, and whether the proof holds "
            "that no source event at or after the moment of asking was read.",
        )
        runs >> report
    return dag


@python_task
def commands(
    files: Mapping[str, str], lake: str, out: str, params: Mapping[str, Any] | None = None
) -> list[list[str]]:
    """A command a target, ranker and seed."""
    asked = params or {}
    lines = asked["lines"]
    sources = []
    for name in asked["sources"]:
        line = f"={lines[name]}" if name in lines else ""
        sources += ["--source", f"{files[name]}{line}"]
    return [
        job("transfer", *sources, lake=lake, target=files[target], ranker=ranker, seed=seed,
            line=lines.get(target), out=out)
        for target, ranker, seed in product(
            asked["targets"], asked["rankers"], range(asked["seeds"])
        )
    ]  # fmt: skip
