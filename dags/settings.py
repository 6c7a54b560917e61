"""Where the lake, the domain files and the toolkit are, and when each domain's DAGs run: one TOML
file, named by the environment variable IAT_AIRFLOW (docs/airflow.md explains every key)."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any

VARIABLE = "IAT_AIRFLOW"
OPERATORS = ("local", "spark-submit")


class SettingsError(ValueError):
    """What is wrong with the file, and what to write instead."""


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One domain: when its DAGs run, and with what."""

    start: date = date(2026, 1, 1)
    """Its first day: of the daily DAG, and of the first compressor line."""
    end: date | None = None
    """The day after the last that is scheduled."""
    cron: str = "0 0 * * *"
    """When a daily run begins, UTC; its days are those between two such moments, so these are
    midnights."""
    catchup: bool = False
    """Whether days since `start` that were never run are run when the DAG is switched on."""
    retrain: str = ""
    """Cron of the DAG that trains a new line; empty: by hand."""
    wait_hours: float = 20.0
    """How long a run waits for its events before it fails; 0: it does not wait."""
    poll_s: float = 300.0
    """Between two looks at the log."""
    deadline_hours: float = 24.0
    """A daily run that is not done by then raises an alert."""
    order: str = "user"
    """Of compressor lines."""
    window: int = 30
    """Days before each day that a line reads."""
    trailing: int = 90
    """Days that a new line is trained on."""
    judged: int = 7
    """Of these, the last that it is compared on."""
    margin: float = 0.005
    """Loss of AUC with which a new line is still approved."""
    rankers: tuple[Mapping[str, str], ...] = ({"ranker": "din", "arm": "match"},)
    """Rankers that go on day by day."""
    events: tuple[str, ...] = ()
    """Further arguments of what reads the raw log (--limit-users 60)."""
    train: tuple[str, ...] = ()
    """Further arguments of what trains (--device cuda)."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all DAGs share."""

    lake: str
    domains: Path
    """Folder of domain files; each that is put there gets its DAGs."""
    work: str
    """Folder of what is no table: user indexes, rankers, transfer experiments."""
    iat: str
    """The toolkit's command."""
    operator: str = "local"
    """local: commands run where the task runs. spark-submit: those of Spark go to `spark_conn_id`,
    the rest run locally."""
    spark_conn_id: str = "spark_default"
    master: str = ""
    """--master of Spark commands; empty: the toolkit's default (all cores of the machine)."""
    retries: int = 3
    retry_s: float = 60.0
    """Before the first retry; doubled for each one after it, up to half an hour."""
    timeout_hours: float = 6.0
    """Of one task."""
    runs_at_once: int = 2
    """Mapped tasks of a backfill that run at the same time."""
    schedules: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Tables [domain.NAME] of the file."""

    def of(self, domain: str) -> Schedule:
        """The schedule of a domain, by its name."""
        return _made(Schedule, self.schedules.get(domain, {}), f"[domain.{domain}]")

    @property
    def domain_files(self) -> dict[str, Path]:
        """Domain files by the name that each gives its domain; SettingsError for one that is no
        TOML or has a name twice."""
        if not self.domains.is_dir():
            raise SettingsError(f"domains = {self.domains}: there is no such folder; make it first")
        found: dict[str, Path] = {}
        for path in sorted(self.domains.glob("*.toml")):
            try:
                name = tomllib.loads(path.read_text())["name"]
            except (tomllib.TOMLDecodeError, KeyError, UnicodeDecodeError) as error:
                raise SettingsError(
                    f"{path} is no domain file: {error!r}; mend it, or give it another ending"
                ) from error
            if name in found:
                raise SettingsError(f"{path} and {found[name]} both name their domain {name!r}")
            found[name] = path
        return found


def load(path: str | None = None) -> Settings:
    """The settings of a file (None: the one that IAT_AIRFLOW names); paths in it start at its
    folder."""
    named = path or os.environ.get(VARIABLE)
    if not named:
        raise SettingsError(f"set {VARIABLE} to the TOML file that says where the lake is")
    file = Path(named).absolute()
    try:
        held = tomllib.loads(file.read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{VARIABLE} = {file} cannot be read: {error}") from error
    schedules = held.pop("domain", {})
    for name in ("lake", "work", "iat", "domains"):
        if name not in held:
            raise SettingsError(f"{file} needs `{name}`")
        is_command = name == "iat" and "/" not in held[name]  # found on the PATH
        held[name] = held[name] if is_command else _placed(str(held[name]), file.parent)
    held["domains"] = Path(held["domains"])
    settings = _made(Settings, held | {"schedules": schedules}, str(file))
    if settings.operator not in OPERATORS:
        raise SettingsError(f"{file}: operator must be one of {OPERATORS}")
    return settings


def _placed(path: str, folder: Path) -> str:
    """A path as seen from anywhere; a URI stays as it is."""
    return path if "://" in path else os.path.normpath(folder / path)


def _made(kind: Any, given: Mapping[str, Any], where: str) -> Any:
    """A dataclass of what a table holds; SettingsError for a key or a type it does not know."""
    known = {f.name: f for f in fields(kind)}
    if unknown := sorted({*given} - {*known}):
        raise SettingsError(
            f"{where}: there is no {', '.join(unknown)}; known: {', '.join(sorted(known))}"
        )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    for name, value in values.items():
        default = known[name].default
        example = date(2026, 1, 1) if name == "end" else default
        wanted = (int, float) if isinstance(example, float) else type(example)
        is_checked = isinstance(example, str | int | float | bool | tuple | date)
        if is_checked and not isinstance(value, wanted):
            raise SettingsError(f"{where}: {name} must be like {example!s}, got {value!r}")
    return kind(**values)
