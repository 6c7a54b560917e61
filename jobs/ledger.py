"""One row of `job_reports` per job run: what it did, for how long, on what.

The figures are those of papers/resource_metrics.md that one machine can measure; a missing one says
why. The only clock of the toolkit: when a run started is a measured fact of it, and no other stored
value depends on it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import platform
import resource
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
from deltalake.exceptions import DeltaError

from jobs.lineage_events import Events
from pipelines import delta, tables
from pipelines.domain import Domain
from pipelines.errors import InputError, RetryableError
from pipelines.places import shown_in

log = logging.getLogger(__name__)

PACKAGES = (
    "instance-as-token",
    "torch",
    "pyspark",
    "delta-spark",
    "deltalake",
    "pyarrow",
    "numpy",
    "duckdb",
)


@dataclass(slots=True)
class Run:
    """A job run being measured; the job adds what only it knows: rows, bytes, further figures, the
    tables that it read and wrote."""

    job: str
    run: str
    rows: int | None = None
    bytes: int | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    """Versions of the tables read, by name; a raw log's place."""
    outputs: dict[str, int] = field(default_factory=dict)
    """Versions that the run made of its tables."""

    def add(self, *, rows: int = 0, num_bytes: int = 0) -> None:
        """Count `rows` more instances and `num_bytes` more bytes stored for them."""
        self.rows = (self.rows or 0) + rows
        self.bytes = (self.bytes or 0) + num_bytes


@contextmanager
def job(lake: str, name: str, args: object = None) -> Iterator[Run]:
    """Measures the block and writes its row, also when the block fails; a dry run writes nothing.

    A ledger that cannot be written is logged and never fails a job whose own work is done; nor do
    the run's lineage events, which are sent where OpenLineage is configured.
    """
    run = Run(name, uuid.uuid4().hex)
    is_dry = getattr(args, "dry_run", False)
    events = None if is_dry else Events(lake, name, run.run, getattr(args, "domain", ""))
    if events:
        events.start()
    started, start_s, start_cpu_s = datetime.now(UTC), time.perf_counter(), time.process_time()
    error: str | None = None
    try:
        yield run
    except BaseException as caught:
        error = shown_in(f"{type(caught).__name__}: {caught}")[:2000]
        raise
    finally:
        wall_s = time.perf_counter() - start_s
        report = _report(run, _plain(args), error, wall_s, time.process_time() - start_cpu_s)
        if events:
            _write(lake, run, started, wall_s, report)
            events.end(run.inputs, run.outputs, error)


def commit_of(run: Run, domain: Domain, inputs: Mapping[str, Any], **more: str) -> dict[str, str]:
    """What a commit of this run says of itself: job, run, code, domain file, what it read."""
    run.inputs |= inputs
    return {
        "job": run.job,
        "run": run.run,
        "code": code_version(),
        "domain": domain.name,
        "config": config_of(domain),
        "features": json.dumps(features_of(domain), sort_keys=True),
        "inputs": json.dumps(_shown(dict(inputs)), sort_keys=True, default=str),
        **more,
    }


def code_version() -> str:
    """The toolkit's version."""
    return metadata.version("instance-as-token")


def config_of(domain: Domain) -> str:
    """What tells one state of a domain file from another, as far as built days depend on it.

    Keys, labels, negatives, what is from the future, how the log is read and which of its events
    are the domain's; features apart
    (`features_of`). Not where the log is, so that it may be moved, nor the title, the share that
    may be rejected, or when tokens are published: no built row depends on these.
    """
    parts = (domain.columns, domain.negatives, *domain.labels)
    held = [dataclasses.asdict(part) if part is not None else None for part in parts]
    source = domain.source
    told = [domain.name, source.format, source.reader, domain.limits.latest, held]
    return _hash([*told, source.only] if source.only else told)


def features_of(domain: Domain) -> dict[str, str]:
    """What tells one state of each feature from another, by name."""
    return {f.name: _hash(dataclasses.asdict(f)) for f in domain.features}


def file_of(domain: Domain) -> str:
    """What tells one state of a domain file from another for a training run: what built days depend
    on, its features, and when tokens are published."""
    parts = [config_of(domain), features_of(domain), dataclasses.asdict(domain.tokens)]
    return _hash(parts)


def _hash(held: object) -> str:
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:16]


def machine() -> dict[str, Any]:
    """What the run ran on: cores, memory, system, and the GPU if torch sees one."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    torch = sys.modules.get("torch")
    has_gpu = torch is not None and torch.cuda.is_available()
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": memory,
        "system": f"{platform.system()} {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if torch is not None and has_gpu else None,
    }


def versions() -> dict[str, str]:
    """Version of Python and of every package that shapes results, where installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def peak_rss_bytes() -> int:
    """Most memory this process and each of its children (Spark's JVM) held; peaks are added up."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak + sum(_children_peaks(os.getpid()))


def _children_peaks(pid: int) -> Iterator[int]:
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue  # it ended meanwhile
        parents.setdefault(parent, []).append(int(entry.parent.name))
    waiting = parents.get(pid, [])
    while waiting:
        child = waiting.pop()
        waiting += parents.get(child, [])
        try:
            status = Path(f"/proc/{child}/status").read_text()
        except OSError:
            continue
        yield from (int(x.split()[1]) * 1024 for x in status.splitlines() if x.startswith("VmHWM"))


def _report(run: Run, args: Any, error: str | None, wall_s: float, cpu_s: float) -> dict[str, Any]:
    torch = sys.modules.get("torch")
    has_gpu = torch is not None and torch.cuda.is_available()
    gpu_bytes = torch.cuda.max_memory_allocated() if torch is not None and has_gpu else None
    missing = {
        "rows": "the job counts no rows" if run.rows is None else "",
        "bytes_per_instance": "" if run.bytes and run.rows else "nothing stored per instance",
        "peak_gpu_bytes": "" if has_gpu else "no GPU in use",
    }
    return {
        "job": run.job,
        "run": run.run,
        "args": args,
        "status": "failed" if error else "done",
        "error": error,
        "rows": run.rows,
        "bytes": run.bytes,
        "bytes_per_instance": run.bytes / run.rows if run.bytes and run.rows else None,
        "rows_per_s": run.rows / wall_s if run.rows else None,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_gpu_bytes": gpu_bytes,
        "machine": machine(),
        "versions": versions(),
        "figures": run.figures,
        "missing": [{"metric": k, "reason": v} for k, v in missing.items() if v],
    }


def _write(
    lake: str, run: Run, started: datetime, wall_s: float, report: Mapping[str, Any]
) -> None:
    table = tables.job_reports()
    row = {
        "run_date": started.date(),
        "job": run.job,
        "run": run.run,
        "started": started,
        "wall_s": wall_s,
        "report": json.dumps(_shown(report), sort_keys=True, default=str),
    }
    # The predicate names this run alone: a race costs a retry and never another run's row.
    where = f"run_date = '{started.date()}' AND run = '{run.run}'"
    try:
        rows = pa.Table.from_pylist([row], schema=table.schema)
        delta.replace(lake, table, rows, None, commit={"job": run.job, "run": run.run}, where=where)
    except (RetryableError, InputError, DeltaError, OSError) as error:
        log.warning("this run is not in the ledger: %s", error)


def _shown(held: Any) -> Any:
    """The same with every place in it as people may see it."""
    if isinstance(held, Mapping):
        return {key: _shown(value) for key, value in held.items()}
    if isinstance(held, list | tuple):
        return [_shown(value) for value in held]
    return shown_in(str(held)) if isinstance(held, str | Path) else held


def _plain(args: object) -> Any:
    if dataclasses.is_dataclass(args) and not isinstance(args, type):
        return dataclasses.asdict(args)
    return args
