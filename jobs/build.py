"""Raw log -> every table that training reads, in one Spark session."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jobs import build_instances, build_samples, build_streams
from jobs.day_states import GROUPS, Group
from pipelines.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Args(build_instances.Args):
    """Build instances, then streams and histories, then ranker samples, of the same days.

    The same as `iat build-instances`, `iat build-streams` and `iat build-samples` one after the
    other, without starting Spark three times.
    """

    tables: tuple[Group, ...] = ("instances", "streams", "samples")
    """Which: a daily run checks the instances before it builds what is made of them."""

    def __post_init__(self) -> None:
        if not self.tables:
            raise InputError(f"--tables needs at least one of {', '.join(GROUPS)}")


def main(args: Args) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "instances" in args.tables:
        found["build-instances"] = build_instances.main(args)
        if args.dry_run:
            return found
    same: dict[str, Any] = {
        name: getattr(args, name)
        for name in ("domain", "lake", "start", "end", "master", "dry_run")
    }
    if "streams" in args.tables:
        found["build-streams"] = build_streams.main(build_streams.Args(**same))
    if "samples" in args.tables:
        found["build-samples"] = build_samples.main(build_samples.Args(**same))
    return found
