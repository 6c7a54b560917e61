"""Every arm of a comparison over several seeds, on a lake whose streams are built: what instance
tokens add, with the controls that make it honest."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from jobs import full_comparison, ledger, report
from jobs.comparison import ALL_USERS_ARMS, FULL_ARMS, VARIANT_ARMS, Arm, SplitBy
from jobs.full_comparison import Plan, print_windows
from jobs.repeated import as_args, repeated
from jobs.train_compressor import device_of
from pipelines import delta, manifests, tables
from pipelines.domain import Domain
from pipelines.domain import load as load_domain
from pipelines.errors import InputError
from pipelines.manifests import Manifest

log = logging.getLogger(__name__)

ABOUT_PLACE = ("domain", "lake", "out", "manifest", "device", "limit_s", "dry_run")
"""Arguments that say where and on what, never what is read or trained."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Compare rankers with and without instance tokens: all arms, several seeds, paired intervals.

    Reads the user-order stream of a built lake; tokens stay in OUT, beside everything that is
    finished, so that a run that was cut goes on where it was. Prints one table per window and
    writes OUT/report.json, OUT/report.html, and OUT/manifest.json, by which --manifest repeats the
    runs and vacuum keeps what they read.
    """

    domain: str
    """Name of a domain that comes with the toolkit, or a FILE.toml."""
    lake: str
    """Root folder or object-store URI of the Delta tables."""
    out: Path
    """Folder of the results."""
    protocol: Literal["streaming", "frozen"] = "streaming"
    """streaming: predict each day, then train on it, then write its tokens. frozen: compressor on
    the first 45% of days, rankers on the days to 85%, tested on the rest."""
    split_by: SplitBy = "days"
    """What those shares, and the 15% windows of the report, are of: days, or labelled rows (for a
    log most of whose events lie in few of its days)."""
    ranker: Literal["din", "transformer"] = "din"
    """How the ranker reads the hand-made sequence."""
    seeds: int = 5
    """Runs of every arm; intervals resample users and seeds."""
    user_share: float = 1.0
    """Rank this share of users (by hash); below 1, arms with an all-users compressor are added."""
    user_seed: int = 0
    """Which users the share keeps."""
    variants: bool = False
    """Add the paper's variants of the user-order arm: tokens stored after SIT, the branch read by
    DIN, the branch without past labels."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    limit_s: float | None = None
    """Wait for no result after so many seconds: report what is there."""
    manifest: Path | None = None
    """Repeat the runs of this OUT/manifest.json: its arguments, over the table version they read.
    """
    dry_run: bool = False
    """Say what would be compared, and stop."""

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise InputError(f"--seeds must be at least 1, got {self.seeds}")
        if not 0 < self.user_share <= 1:
            raise InputError(f"--user-share must be above 0 and at most 1, got {self.user_share}")


def main(args: Args) -> dict[str, Any]:
    domain = load_domain(args.domain)
    held, digest = repeated(args.manifest, args.lake, "compare", domain)
    if held is not None:
        given = {name: getattr(args, name) for name in ABOUT_PLACE}
        args = Args(**given, **as_args(held.args))
    plan, stream = plan_of(args, domain), tables.user_order(domain)
    if held is None:
        days, version = delta.days_of(args.lake, stream)
    else:
        days, version = held.span, held.tables[stream.name]
    if args.dry_run:
        names = [arm.name for arm in plan.arms]
        sys.stdout.write(
            f"would compare, {args.protocol}, {args.seeds} seeds, {days}:\n  "
            + "\n  ".join(names)
            + "\n"
        )
        return {"domain": domain.name, "arms": names, "days": str(days)}

    # Compressors of an arm may read all users, whatever the ranker's share.
    manifest = Manifest.of(
        "compare", args, ABOUT_PLACE, domain=domain.name, config=ledger.file_of(domain),
        code=ledger.code_version(), tables={stream.name: version},
        days=[str(days.start), str(days.end)], user_share=1.0, user_seed=0, more=plan.settings(),
    )  # fmt: skip
    if held is not None and held != manifest:
        raise InputError(
            f"--manifest {args.manifest}: the settings of compressors or rankers have changed "
            "since it was written; compare without --manifest"
        )

    def rows() -> pa.Table:
        return delta.read(args.lake, stream, days, version=version)

    with ledger.job(args.lake, "compare", args) as run:
        manifests.register(args.lake, manifest, str(args.out.absolute()))
        found = full_comparison.run(plan, rows, args.out, limit_s=args.limit_s, digest=digest)
        manifests.write(args.out, manifest, found["digest"])
        run.add(rows=found["samples"])
        run.figures |= {"windows": found["windows"]}
    found["days"] = str(days)
    found["input_versions"] = {stream.name: version}
    found["manifest"] = manifest.name
    report.write_report(args.out / "report.html", page_of(found))
    sys.stdout.write(f"{print_windows(found)}\nreport: {args.out / 'report.html'}\n")
    return found


def plan_of(args: Args, domain: Domain) -> Plan:
    """All arms, at the sizes of `iat train-ranker`."""
    arms: tuple[Arm, ...] = FULL_ARMS + (ALL_USERS_ARMS if args.user_share < 1 else ())
    arms += VARIANT_ARMS if args.variants else ()
    return Plan(
        domain=domain,
        arms=arms,
        seeds=tuple(range(args.seeds)),
        protocol=args.protocol,
        split_by=args.split_by,
        ranker=args.ranker,
        user_share=args.user_share,
        user_seed=args.user_seed,
        device=device_of(args.device),
    )


def page_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """The report of jobs/report.py: the first window as its table, the others below."""
    (first, arms), *others = found["windows"].items()
    settings = {name: found[name] for name in ("seeds", "user_share", "samples", "ranker")}
    lines = {f"{x['line']} seed {x['seed']}": x["source_auc"] for x in found["lines"]}
    return {
        "domain": found["domain"],
        "protocol": found["protocol"],
        "created_for": f"{found['days']}, {first}",
        "arms": arms,
        "windows": dict(others),
        "settings": settings | {"source AUC": lines} | found["settings"],
        "timings": [{"step": "this call", "seconds": found["seconds"]}],
    }
