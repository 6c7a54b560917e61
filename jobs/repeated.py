"""A training run that repeats another, by its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from jobs import ledger
from pipelines import manifests
from pipelines.domain import Domain
from pipelines.manifests import Manifest

DATES = ("start", "end", "test_start")


def repeated(
    manifest: Path | None, lake: str, job: str, domain: Domain
) -> tuple[Manifest | None, str]:
    """The manifest that a job was told to repeat, all that it pins there, and the digest of what it
    read; None and "" without one."""
    if manifest is None:
        return None, ""
    held, digest = manifests.read(manifest)
    manifests.check(
        lake, held, job=job, domain=domain.name,
        config=ledger.file_of(domain), code=ledger.code_version(),
    )  # fmt: skip
    return held, digest


def as_args(told: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest's arguments as a command takes them."""
    return {k: date.fromisoformat(v) if k in DATES and v else v for k, v in told.items()}
