"""Compressor versions: a folder with weights, vocabulary and optimiser state, and a row of lineage
in Delta."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from compressor.configs import SourceConfig, TrainingConfig
from compressor.nn.embedding import Vocabulary
from compressor.training import checkpoint
from compressor.walk import Trainer
from pipelines import delta, lines, tables
from pipelines.days import Days
from pipelines.domain import Domain
from pipelines.errors import InputError
from pipelines.names import checked_line

STATUSES = ("candidate", "approved", "retired")


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """What a version is and where it came from: its manifest."""

    line: str
    name: str
    parent: str
    domain: str
    protocol: str
    start: date
    end: date
    """Trained on [start, end)."""
    config: SourceConfig
    training: TrainingConfig
    input_versions: Mapping[str, int]
    user_share: float
    user_seed: int
    is_trained: bool = True

    def is_same_run(self, other: Version) -> bool:
        """Whether both come from one command over the same input, up to where it has come."""
        return replace(self, name="", end=other.end) == replace(other, name="")


def folder(lake: str, line: str, name: str) -> Path:
    """Where a version's weights are: beside the lake's tables."""
    return line_folder(lake, line) / checked_line(name, "compressor version")


def line_folder(lake: str, line: str) -> Path:
    """Where the weights of all of a line's versions are."""
    if "://" in lake:
        raise InputError(
            f"compressor weights are kept in a local lake for now; {lake} is an object store: pass "
            f"a local --lake"
        )
    return Path(lake, "artifacts", "compressors", checked_line(line))


def save(
    lake: str,
    version: Version,
    trainer: Trainer,
    vocabulary: Vocabulary,
    metrics: Mapping[str, Any],
    commit: Mapping[str, str],
) -> Path:
    """Weights first, then the row that names them: a killed save leaves no row without weights."""
    place = folder(lake, version.line, version.name)
    tensors = trainer.state()
    tensors |= {f"vocabulary.{t}": torch.from_numpy(b) for t, b in vocabulary.buckets.items()}
    checkpoint.save(
        place,
        tensors,
        {"version": asdict(version), "num_steps": trainer.num_steps, "metrics": dict(metrics)},
    )
    row = {
        "compressor_line": version.line,
        "compressor_version": version.name,
        "parent_version": version.parent,
        "domain": version.domain,
        "order": version.config.order,
        "protocol": version.protocol,
        "start": version.start,
        "end": version.end,
        "status": "candidate",
        "width": version.config.bottleneck,
        "codec": "float16",
        "config": json.dumps(
            {"source": asdict(version.config), "training": asdict(version.training)}, sort_keys=True
        ),
        "metrics": json.dumps(dict(metrics), sort_keys=True),
        "input_versions": json.dumps(dict(version.input_versions), sort_keys=True),
        "artifact": str(place),
    }
    table = tables.compressor_versions()
    where = f"compressor_version = '{checked_line(version.name, 'compressor version')}'"
    delta.replace(
        lake,
        table,
        pa.Table.from_pylist([row], table.schema),
        None,
        line=version.line,
        where=where,
        commit={**commit, "line": version.line, "compressor_version": version.name},
    )
    return place


def load(
    lake: str, name: str, domain: Domain, device: str, *, newer: Vocabulary | None = None
) -> tuple[Trainer, Vocabulary, Version]:
    """A version ready to predict, write tokens or train on; `newer` adds rows for ids that the
    version never saw."""
    row = lines.find(lake, name)
    if row["domain"] != domain.name:
        raise InputError(
            f"version {row['compressor_version']} compresses domain {row['domain']!r}, not "
            f"{domain.name!r}"
        )
    tensors, meta = checkpoint.load(Path(row["artifact"]))
    version = _manifest(meta["version"])
    old = Vocabulary(
        {
            n.removeprefix("vocabulary."): t.numpy()
            for n, t in tensors.items()
            if n.startswith("vocabulary.")
        }
    )
    vocabulary = old.union(newer) if newer is not None else old
    trainer = Trainer.create(version.config, version.training, domain, vocabulary, device)
    rows = vocabulary.rows_of(old)
    grown = checkpoint.grown(tensors, trainer.model, trainer.optimizer, rows)
    try:
        trainer.restore(grown)
    except RuntimeError as error:
        raise InputError(
            f"version {version.name} does not fit the features of {domain.name}: {error}; it was "
            "trained before the domain file changed. Train a new line, or give the file of then"
        ) from error
    trainer.num_steps = meta["num_steps"]
    return trainer, vocabulary, version


def within(lake: str, line: str, days: Days) -> list[Version]:
    """The manifests of a line's versions that end inside `days` or with them."""
    return [
        _manifest(checkpoint.meta(Path(row["artifact"]))["version"])
        for row in lines.ending(lake, line, days)
    ]


def _manifest(held: Mapping[str, Any]) -> Version:
    """A manifest as JSON keeps it."""
    kept = dict(held)
    config, training = SourceConfig(**kept.pop("config")), TrainingConfig(**kept.pop("training"))
    start, end = (date.fromisoformat(kept.pop(key)) for key in ("start", "end"))
    return Version(**kept, start=start, end=end, config=config, training=training)


def days_of(version: Version) -> Days:
    return Days(version.start, version.end)
