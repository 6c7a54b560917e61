"""Manifests: what a training run read, pinned: which version of which table, which days, by which
arguments, domain file and code.

Every run's manifest is a row of the lake's table `manifests` from before it reads until it is
released, so that vacuum, which sees the lake alone, finds it; and a file next to what was trained.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError

from pipelines import delta, tables
from pipelines.days import Days
from pipelines.errors import InputError

FILE = "manifest.json"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a run needs to read the same batches again."""

    job: str
    domain: str
    config: str
    """Of the domain file."""
    code: str
    args: Mapping[str, Any]
    """Of the command, without where it wrote and on what it ran."""
    tables: Mapping[str, int]
    """Name -> version."""
    days: Sequence[str]
    """[start, end) of what it was trained on."""
    user_share: float
    user_seed: int
    more: Mapping[str, Any] = field(default_factory=dict)
    """What else the job needs to read the same."""

    @classmethod
    def of(cls, job: str, args: Any, left_out: Sequence[str], **given: Any) -> Manifest:
        """From a command's arguments; every value as its JSON file gives it back."""
        kept = {k: v for k, v in asdict(args).items() if k not in left_out}
        plain: dict[str, Any] = json.loads(json.dumps({"args": kept, **given}, default=str))
        return cls(job=job, **plain)

    @property
    def span(self) -> Days:
        return Days(*map(date.fromisoformat, self.days))

    def reads(self, domain: str) -> bool:
        """Whether the run is of this domain, or reads its tokens beside those of its own."""
        return domain == self.domain or any(t.endswith(f"/{domain}") for t in self.tables)

    @property
    def name(self) -> str:
        """The same run over the same tables has the same name."""
        told = json.dumps(asdict(self), sort_keys=True, default=str)
        return f"{self.job}-{hashlib.sha256(told.encode()).hexdigest()[:12]}"


def register(lake: str, manifest: Manifest, place: str, *, is_newest_alone: bool = False) -> None:
    """From now on vacuum keeps what the manifest pins; `place` says where the run writes.

    `is_newest_alone`: in place of what the same job has registered of the same place before.
    """
    row = {
        "name": manifest.name,
        "domain": manifest.domain,
        "job": manifest.job,
        "place": place,
        "manifest": json.dumps(asdict(manifest), sort_keys=True, default=str),
    }
    table = tables.manifests()
    rows = pa.Table.from_pylist([row], table.schema)
    commit = {"job": manifest.job, "manifest": manifest.name}
    where = _named(manifest.name)
    if is_newest_alone:
        where = f"place = {_quoted(place)} AND job = {_quoted(manifest.job)}"
    delta.replace(lake, table, rows, None, commit=commit, where=where)


def release(lake: str, name: str) -> None:
    """Vacuum keeps nothing for this manifest any more."""
    known = [each.name for each, _ in live(lake)]
    if name not in known:
        raise InputError(
            f"no live manifest called {name!r} in {lake}; there are: {', '.join(known) or 'none'}"
        )
    table = tables.manifests()
    commit = {"job": "vacuum", "released": name}
    delta.replace(lake, table, table.schema.empty_table(), None, commit=commit, where=_named(name))


def live(lake: str, domain: str = "") -> list[tuple[Manifest, str]]:
    """Every manifest that is not released (of one domain: that reads its tables), and where its run
    wrote."""
    table = tables.manifests()
    if not delta.exists(lake, table):
        return []
    rows = delta.read(lake, table).sort_by("name").to_pylist()
    found = [(Manifest(**json.loads(row["manifest"])), row["place"]) for row in rows]
    return [(each, place) for each, place in found if not domain or each.reads(domain)]


def write(folder: Path, manifest: Manifest, digest: str) -> None:
    """The file FILE in a folder, whole or not at all."""
    text = json.dumps(
        {"name": manifest.name, "digest": digest, **asdict(manifest)},
        indent=1,
        sort_keys=True,
        default=str,
    )
    part = folder / f".{FILE}.{os.getpid()}"
    part.write_text(text + "\n")
    part.replace(folder / FILE)


def read(path: Path) -> tuple[Manifest, str]:
    """A manifest file (or the folder that holds one), and the digest of the data that was read."""
    path = path / FILE if path.is_dir() else path
    try:
        held = json.loads(path.read_text())
        name, digest = held.pop("name"), held.pop("digest")
        manifest = Manifest(**held)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--manifest {path} is no manifest of a training run: {error}") from error
    if manifest.name != name:
        raise InputError(
            f"--manifest {path} was changed by hand: it no longer fits its name {name}"
        )
    return manifest, digest


def check_digest(found: str, held: str) -> None:
    """InputError where the tables are there and yet hold other rows."""
    if held and found != held:
        raise InputError(
            "what the manifest pins reads otherwise than it did (its digest differs): a table was "
            "made anew under the same name, or users were forgotten since; train without --manifest"
        )


def check(lake: str, manifest: Manifest, *, job: str, domain: str, config: str, code: str) -> None:
    """InputError unless this command, domain file and code are those of the manifest and all that
    it pins is there."""
    if manifest.domain != domain:
        raise InputError(f"--manifest is of domain {manifest.domain!r}, not {domain!r}")
    if manifest.job != job:
        raise InputError(f"--manifest is of `iat {manifest.job}`, not of `iat {job}`")
    if manifest.config != config:
        raise InputError(
            f"the domain file of {manifest.domain} has changed since the manifest was written: its "
            "batches would differ. Bring the old file back, or train without --manifest"
        )
    if manifest.code != code:
        raise InputError(
            f"the manifest was written by version {manifest.code} of the toolkit and this is "
            f"{code}: install that one, or train without --manifest"
        )
    for name, version in manifest.tables.items():
        gone = missing(lake, name, version)
        if gone:
            raise InputError(
                f"the manifest pins version {version} of {name}, and {gone}: the run cannot be "
                "repeated. Was it released and vacuumed, or were users forgotten since?"
            )


def missing(lake: str, name: str, version: int) -> str:
    """What of a table's version is gone; empty: nothing."""
    try:
        opened = DeltaTable(f"{lake.rstrip('/')}/{name}", version=version)
        files = delta.files(opened)
    except (DeltaError, OSError) as error:
        return f"its log no longer has it ({str(error)[:80]})"
    gone = [x for x in files.filesystem.get_file_info(files.files) if not x.is_file]
    return f"{len(gone)} of its {len(files.files)} files are gone" if gone else ""


def digest(*parts: pa.Table | npt.NDArray[Any]) -> str:
    """Of rows and arrays in their order, value by value."""
    found = xxhash.xxh3_128()
    for part in parts:
        if isinstance(part, np.ndarray):
            found.update(np.ascontiguousarray(part).data)
            continue
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, part.schema) as stream:
            stream.write_table(part.combine_chunks())
        found.update(sink.getvalue())
    return str(found.hexdigest())


def digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _named(name: str) -> str:
    return f"name = {_quoted(name)}"


def _quoted(text: str) -> str:
    return "'{}'".format(text.replace("'", "''"))
