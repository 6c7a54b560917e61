"""Remove files that no version in use refers to, and say what that freed and what was kept."""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tyro
from deltalake import DeltaTable
from tqdm import tqdm

from pipelines import delta, manifests, tables
from pipelines.domain import load as load_domain
from pipelines.errors import InputError

log = logging.getLogger(__name__)

SAFE_HOURS = 168
"""A week, as Delta has it: no job writes a file, or reads an old version, for longer."""
OF_DOMAIN = (
    "instances", "quarantine", "temporal_order", "user_order", "histories", "ranker_samples",
    "instance_tokens", "item_tokens", "materialized", "forgotten", "raw_files",
)  # fmt: skip
OF_LAKE = (tables.compressor_versions, tables.job_reports, tables.manifests)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Remove files that the tables no longer refer to, and what killed or failed writes left.

    What the manifest of a training run pins is kept until `--release` names it, unless users were
    forgotten since: then it goes. Every older version of a table that no manifest pins stops being
    readable.
    """

    lake: str
    """Root folder or object-store URI of the Delta tables."""
    domain: str = ""
    """Name of a domain that comes with the toolkit, or a FILE.toml; empty: every table there is."""
    retention_hours: int = SAFE_HOURS
    """Keep what was in use, or written, within so many hours. Less than a week breaks jobs that
    are running: 0 only while none is."""
    release: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Name of a manifest whose run need not be repeated any more; may be given several times."""
    dry_run: bool = False
    """Say what would be removed, and stop."""

    def __post_init__(self) -> None:
        if self.retention_hours < 0:
            raise InputError(f"--retention-hours must be at least 0, got {self.retention_hours}")


class Found(NamedTuple):
    """Files and their bytes."""

    files: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.files:,d} files, {self.bytes / 1e6:,.1f} MB"


def main(args: Args) -> dict[str, Any]:
    domain = load_domain(args.domain).name if args.domain else ""
    names = list(_tables_of(args.lake, domain))
    if args.retention_hours < SAFE_HOURS:
        log.warning("a job that runs now may fail: --retention-hours is below %d", SAFE_HOURS)
    if not args.dry_run:
        for name in args.release:
            manifests.release(args.lake, name)
    pins = pinned(args.lake, released=args.release)
    freed: dict[str, Found] = {}
    kept: dict[str, dict[str, Found]] = {}
    lost: dict[str, list[str]] = {}
    for name in tqdm(names, desc="vacuum", unit="table", delay=2):
        freed[name], kept[name], lost[name] = clean(args, name, pins.get(name, {}))
    if "://" not in args.lake:
        left = list(leftovers(Path(args.lake), domain, args.retention_hours))
        freed["leftovers"] = remove(left, dry_run=args.dry_run)
    result = {
        "tables": {name: found._asdict() for name, found in freed.items()},
        "kept": {
            name: {manifest: found._asdict() for manifest, found in by.items()}
            for name, by in kept.items()
            if by
        },
        "not_kept": {name: who for name, who in lost.items() if who},
        "released": list(args.release),
        "retention_hours": args.retention_hours,
    }
    sys.stdout.write(as_text(args, freed, kept, lost))
    return result


def _tables_of(lake: str, domain: str) -> Iterator[str]:
    """Names of the tables there are, of one domain where it is given."""
    if "://" in lake:
        if not domain:
            raise InputError(f"{lake} is an object store: say of which --domain")
        declared = [f"{name}/{domain}" for name in OF_DOMAIN] + [make().name for make in OF_LAKE]
        yield from (n for n in declared if DeltaTable.is_deltatable(f"{lake.rstrip('/')}/{n}"))
        return
    root = Path(lake)
    if not root.is_dir():
        raise InputError(f"there is no lake at {lake}")
    logs = [*root.glob("*/_delta_log"), *root.glob("*/*/_delta_log")]
    for name in sorted(str(path.parent.relative_to(root)) for path in logs):
        if not domain or "/" not in name or name.endswith(f"/{domain}"):
            yield name


def pinned(lake: str, *, released: Sequence[str]) -> dict[str, dict[int, list[str]]]:
    """By table, the versions that live manifests pin, and whose they are."""
    found: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    for manifest, _ in manifests.live(lake):
        if manifest.name not in released:
            for name, version in manifest.tables.items():
                found[name][version].append(manifest.name)
    return found


def clean(
    args: Args, name: str, pins: Mapping[int, list[str]]
) -> tuple[Found, dict[str, Found], list[str]]:
    """Of one table: what was freed; what was kept, by manifest; manifests that keep nothing."""
    place = f"{args.lake.rstrip('/')}/{name}"
    opened = DeltaTable(place)
    since = _last_erasure(opened)
    keep: list[int] = []
    kept: dict[str, Found] = {}
    lost: list[str] = []
    current = set(delta.files(opened).files)
    for version, names in sorted(pins.items()):
        if version < since or manifests.missing(args.lake, name, version):
            lost += names
            continue
        keep.append(version)
        old = DeltaTable(place, version=version)
        alone = sorted(set(delta.files(old).files) - current)
        if alone:
            kept |= dict.fromkeys(names, _measured(old, alone))
    unused = _vacuum(opened, args, keep, dry_run=True)
    freed = _measured(opened, unused)
    if unused and not args.dry_run:
        _vacuum(opened, args, keep, dry_run=False)
    return freed, kept, sorted(lost)


def _vacuum(opened: DeltaTable, args: Args, keep: list[int], *, dry_run: bool) -> list[str]:
    return opened.vacuum(
        args.retention_hours,
        dry_run=dry_run,
        enforce_retention_duration=False,
        full=True,
        keep_versions=keep or None,
    )


def _last_erasure(opened: DeltaTable) -> int:
    """The version by which users have left the table; what is older may hold them."""
    return next((v for v, commit in delta.commits(opened) if commit.get("job") == "forget"), 0)


def _measured(opened: DeltaTable, files: Sequence[str]) -> Found:
    system = delta.files(opened).filesystem
    sizes = [info.size for info in system.get_file_info(list(files)) if info.is_file]
    return Found(len(sizes), sum(sizes))


def leftovers(lake: Path, domain: str, hours: int) -> Iterator[Path]:
    """Below a local lake: tables that were never committed, and raw samples whose making was cut
    short (of one domain where it is given), and such checkpoints; untouched for so many hours."""
    half_made = [
        path
        for group in OF_DOMAIN
        for path in lake.glob(f"{group}/{domain or '*'}")
        if path.is_dir() and not list(path.glob("_delta_log/*"))
    ]
    hidden = [*lake.glob("artifacts/compressors/*/.*"), *lake.glob(f"raw/{domain or '*'}/*.tmp")]
    for path in sorted({*half_made, *hidden}):
        newest = max(each.stat().st_mtime for each in [path, *path.rglob("*")])
        if newest <= time.time() - hours * 3600:
            yield path


def remove(paths: Sequence[Path], *, dry_run: bool) -> Found:
    files = [x for path in paths for x in [path, *path.rglob("*")] if x.is_file()]
    found = Found(len(files), sum(file.stat().st_size for file in files))
    for path in [] if dry_run else paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return found


def as_text(
    args: Args,
    freed: Mapping[str, Found],
    kept: Mapping[str, Mapping[str, Found]],
    lost: Mapping[str, Sequence[str]],
) -> str:
    """What was freed and kept, a line a table, for people."""
    done = "would free" if args.dry_run else "freed"
    total = Found(sum(x.files for x in freed.values()), sum(x.bytes for x in freed.values()))
    lines = [f"{done} {total}, unused for {args.retention_hours} hours"]
    for name, found in freed.items():
        if found.files or kept.get(name) or lost.get(name):
            lines.append(f"  {name:32s} {found}")
        for manifest, held in kept.get(name, {}).items():
            lines.append(f"    kept for {manifest}: {held}")
        for manifest in lost.get(name, []):
            lines.append(f"    {manifest} pins a version that is gone, or older than an erasure")
    if any(kept.values()):
        lines.append("--release NAME gives up what is kept for a run")
    return "\n".join(lines) + "\n"
