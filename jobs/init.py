"""Draft a domain file from an event log."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from pipelines.column_facts import open_log
from pipelines.domain import load
from pipelines.draft import Draft, draft
from pipelines.draft_roles import slug
from pipelines.errors import InputError

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Args:
    """Draft a commented domain file from a Parquet, CSV or Delta event log.

    Guesses which columns are user, item, time, request and labels by name and type, and each
    feature's kind, side, buckets and scaling by what the column holds. Every guess says what was
    seen; what could not be guessed is named and must be filled in before the file loads.
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """The event log: a Parquet or CSV file, a folder of them, or a Delta table."""
    out: Path | None = None
    """The file to write; empty: NAME.toml in this folder."""
    name: str = ""
    """The domain's name; empty: the data's."""
    force: bool = False
    """Replace the file if it exists."""


def main(args: Args) -> dict[str, Any]:
    name = args.name or slug(Path(args.data.rstrip("/")).name.split(".")[0])
    out = args.out or Path(f"{name}.toml")
    if out.suffix != ".toml":
        raise InputError(f"--out must end with .toml, for domain files are known by it; got {out}")
    if out.exists() and not args.force:
        raise InputError(f"{out} exists and was perhaps edited; --force replaces it")
    found = draft(open_log(args.data), name=name, path=_source_path(args.data, out))
    _write(out, found.text)
    if not found.missing:
        load(str(out))
    sys.stdout.write(describe(out, found))
    return {
        "file": str(out),
        "name": name,
        "num_features": found.num_features,
        "fill_in": found.missing,
        "left_out": found.left_out,
    }


def describe(out: Path, found: Draft) -> str:
    """What was written and what is left to do, for people."""
    lines = [f"{out}: {found.num_features} features, {len(found.left_out)} columns left out"]
    if found.missing:
        named = ", ".join(f"[columns] {key}" for key in found.missing)
        lines.append(f"fill in {named}: no column's name told which it is")
    lines.append(f"read its comments, then: iat build-instances --domain {out}")
    return "\n".join(lines) + "\n"


def _source_path(data: str, out: Path) -> str:
    """The log as the domain file names it: relative if below the file's folder."""
    if "://" in data:
        return data
    path, folder = Path(data).resolve(), out.resolve().parent
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def _write(out: Path, text: str) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    half_written = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    half_written.write_text(text)
    half_written.replace(out)
