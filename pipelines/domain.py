"""A domain file (TOML) -> a validated spec: where the events are, what the columns mean, which
features exist.

Every message names the field, what was needed and what came; a misspelt name suggests the right
one.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from datetime import date, timedelta
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pipelines.errors import InputError

Kind = Literal["category", "multi-category", "number", "sequence"]
Side = Literal["user", "item", "context", "event"]
Known = Literal["request", "after"]
Derive = Literal["hour", "weekday", "month", "day-of-year"]
Transform = Literal["none", "log"]
TimeUnit = Literal["timestamp", "iso", "s", "ms", "us"]
Format = Literal["parquet", "csv", "delta"]

NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
DURATION = re.compile(r"(\d+)(s|m|h|d)")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where the raw events are: files in a known format, or a named reader of a public log."""

    format: Format = "parquet"
    path: str = ""
    reader: str = ""
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict, hash=False)
    """Raw column -> the values, as text, of the events that are the domain's; empty: all are."""

    def __post_init__(self) -> None:
        _one_of("source.format", self.format, Format)
        kept = {column: _texts(f"[source] only.{column}", x) for column, x in self.only.items()}
        object.__setattr__(self, "only", kept)
        if bool(self.path) == bool(self.reader):
            raise InputError(
                "[source] needs either `path` (with `format`) or `reader`; give exactly one"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Which raw columns hold the keys and the time."""

    user: str
    item: str
    time: str
    request: str = ""
    """Rows of one request share it; empty: the user and the instant are the request."""
    time_unit: TimeUnit = "timestamp"

    def __post_init__(self) -> None:
        _one_of("columns.time_unit", self.time_unit, TimeUnit)


@dataclass(frozen=True, kw_only=True, slots=True)
class Label:
    """One task: which rows are positive, and when that became known."""

    name: str
    column: str = ""
    at_least: float | None = None
    """Positive where the column reaches this value; None: the column itself is 0 or 1."""
    always: int | None = None
    """For logs that hold only positives (sampled negatives are the zeros)."""
    time_column: str = ""
    """When the label became known; empty: `delay` after the event."""
    delay: str = "0s"
    window: str = "30d"
    """A label known later than this after its event is not waited for: it stays unknown."""

    def __post_init__(self) -> None:
        _check_name("label", self.name)
        if (self.always is None) == (not self.column):
            raise InputError(
                f"label {self.name!r} needs either `column` or `always`; give exactly one"
            )
        if self.always not in (None, 0, 1):
            raise InputError(f"label {self.name!r}: `always` must be 0 or 1, got {self.always}")
        duration(self.delay, f"label {self.name!r} delay")
        duration(self.window, f"label {self.name!r} window")


@dataclass(frozen=True, kw_only=True, slots=True)
class Feature:
    """One logged field and how models read it."""

    name: str
    column: str = ""
    derive: Derive | None = None
    """Computed from the event time instead of read from a column."""
    kind: Kind = "category"
    side: Side = "context"
    """user | item | context (shared by the request) | event (a fact of this user with this
    item)."""
    known: Known = "request"
    """`after`: known only after the event (price paid, watch time): enters the token, never the
    prediction."""
    buckets: int = 1 << 16
    table: str = ""
    """Features that name the same table share its embeddings; empty: a table of its own."""
    max_length: int = 8
    """multi-category and sequence: at most this many values (a sequence keeps its last ones)."""
    separator: str = "|"
    transform: Transform = "none"
    center: float = 0.0
    scale: float = 1.0
    """A number is read as (transform(x) - center) / scale."""

    def __post_init__(self) -> None:
        _check_name("feature", self.name)
        if self.table:
            _check_name("feature table", self.table)
        where = f"feature {self.name!r}"
        for key, allowed in (
            ("kind", Kind),
            ("side", Side),
            ("known", Known),
            ("transform", Transform),
        ):
            _one_of(f"{where} {key}", getattr(self, key), allowed)
        if self.derive is not None:
            _one_of(f"{where} derive", self.derive, Derive)
        if (self.derive is None) == (not self.column):
            raise InputError(f"{where} needs either `column` or `derive`; give exactly one")
        if not 4 <= self.buckets <= 1 << 30:
            raise InputError(f"{where}: buckets must be from 4 to 2^30, got {self.buckets}")
        if not 1 <= self.max_length <= 256:
            raise InputError(f"{where}: max_length must be from 1 to 256, got {self.max_length}")
        if not (self.scale > 0 and math.isfinite(self.scale) and math.isfinite(self.center)):
            raise InputError(f"{where}: scale must be positive and finite, got {self.scale}")

    @property
    def is_number(self) -> bool:
        return self.kind == "number"

    @property
    def is_list(self) -> bool:
        return self.kind in ("multi-category", "sequence")

    @property
    def embedding_table(self) -> str:
        return self.table or self.name

    @property
    def stream_column(self) -> str:
        """The column's name in `instances` (readable) and in the streams (hashed or scaled)."""
        return f"f_{self.name}"

    @property
    def meaning(self) -> dict[str, Any]:
        """What a stored value of it is: with another meaning the same value would be another one.

        Where the raw value is read from (`column`, `separator`) is not part of it.
        """
        found: dict[str, Any] = {"kind": self.kind, "side": self.side, "known": self.known}
        if self.derive is not None:
            found["derive"] = self.derive
        if self.is_number:
            return found | {
                "transform": self.transform, "center": self.center, "scale": self.scale
            }  # fmt: skip
        found |= {"buckets": self.buckets, "table": self.embedding_table}
        return found | {"max_length": self.max_length} if self.is_list else found


@dataclass(frozen=True, kw_only=True, slots=True)
class Negatives:
    """Sampled negatives for a log that holds only positives: same day, not taken by the user that
    day."""

    per_positive: int = 4
    seed: int = 17

    def __post_init__(self) -> None:
        if not 1 <= self.per_positive <= 100:
            raise InputError(
                f"negatives.per_positive must be from 1 to 100, got {self.per_positive}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Publishing:
    """When a token can first be read: the midnight after its event's day, plus `delay`."""

    delay: str = "0s"

    def __post_init__(self) -> None:
        duration(self.delay, "tokens.delay")

    @property
    def delay_us(self) -> int:
        return int(duration(self.delay, "tokens.delay") / timedelta(microseconds=1))


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """When bad input stops being an exception and becomes a fault."""

    max_quarantined_share: float = 0.05
    latest: str = ""
    """Events at or after this day (YYYY-MM-DD) are from the future; empty: the end of the asked
    days."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_quarantined_share <= 1:
            raise InputError(
                f"limits.max_quarantined_share must be from 0 to 1, got "
                f"{self.max_quarantined_share}"
            )
        if self.latest and not _is_day(self.latest):
            raise InputError(
                f"limits.latest must be a day such as '2026-01-31', got {self.latest!r}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Domain:
    """One ranking task with its own log, features and labels."""

    name: str
    source: Source
    columns: Columns
    labels: tuple[Label, ...]
    features: tuple[Feature, ...]
    negatives: Negatives | None = None
    tokens: Publishing = field(default_factory=Publishing)
    limits: Limits = field(default_factory=Limits)
    title: str = ""
    folder: Path = Path()
    """The folder of the domain file: relative source paths start here."""

    def __post_init__(self) -> None:
        _check_name("domain", self.name)
        if not self.labels:
            raise InputError(f"domain {self.name!r} needs at least one [[label]]")
        if not self.features:
            raise InputError(f"domain {self.name!r} needs at least one [[feature]]")
        for what, names in (
            ("feature", [f.name for f in self.features]),
            ("label", [x.name for x in self.labels]),
        ):
            for name in names:
                if names.count(name) > 1:
                    raise InputError(f"domain {self.name!r}: {what} {name!r} is declared twice")
        tables: dict[str, Feature] = {}
        for feature in self.features:
            if feature.is_number:
                continue
            first = tables.setdefault(feature.embedding_table, feature)
            if first.buckets != feature.buckets:
                raise InputError(
                    f"features {first.name!r} and {feature.name!r} share table "
                    f"{feature.embedding_table!r} "
                    f"but have {first.buckets} and {feature.buckets} buckets; give them the same"
                )
        if self.negatives:
            for feature in self.features:
                if feature.side == "event" and feature.known == "request":
                    raise InputError(
                        f"feature {feature.name!r}: a sampled negative has no value for side = "
                        f'"event" at its '
                        'request; set known = "after" (it then enters tokens only), or side = '
                        '"item"'
                    )

    @property
    def label(self) -> Label:
        """The main task: the first label."""
        return self.labels[0]

    @property
    def raw_columns(self) -> tuple[str, ...]:
        """Every raw column that the domain file names, once, in its order."""
        keys = [self.columns.user, self.columns.item, self.columns.time, self.columns.request]
        labels = [name for label in self.labels for name in (label.column, label.time_column)]
        features = [f.column for f in self.features]
        return tuple(dict.fromkeys(c for c in [*keys, *labels, *features, *self.source.only] if c))

    @property
    def side_features(self) -> tuple[Feature, ...]:
        """The categorical item fields (the item itself too) that a history carries beside its
        tokens."""
        return tuple(
            f
            for f in self.features
            if f.kind == "category" and f.side == "item" and f.known == "request"
        )

    @property
    def match_features(self) -> tuple[Feature, ...]:
        """The categorical item fields whose exact matches in the user's past are counted (beside
        the item)."""
        return tuple(f for f in self.side_features if f.column != self.columns.item)


def duration(text: str, where: str) -> timedelta:
    """`30s`, `15m`, `2h` or `7d` as a timedelta."""
    found = DURATION.fullmatch(text)
    if not found:
        raise InputError(
            f"{where} must be a whole number with s, m, h or d, such as '30m'; got {text!r}"
        )
    return timedelta(seconds=int(found[1]) * SECONDS[found[2]])


def _is_day(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def known_domains() -> list[str]:
    """Names of the domain files that come with the toolkit."""
    return sorted(
        p.name.removesuffix(".toml")
        for p in resources.files("pipelines.domains").iterdir()
        if p.name.endswith(".toml")
    )


def load(name_or_file: str) -> Domain:
    """The domain called `name_or_file`, or read from the TOML file of that path."""
    path = Path(name_or_file)
    if path.suffix != ".toml":
        names = known_domains()
        path = Path(str(resources.files("pipelines.domains") / f"{name_or_file}.toml"))
        if name_or_file not in names:
            raise InputError(
                f"no domain called {name_or_file!r}{suggest(name_or_file, names)}; known: "
                f"{', '.join(names)}; or give a FILE.toml"
            )
    raw, folder = _read(path), path.resolve().parent
    try:
        if "base" in raw:
            raw, folder = _over_base(raw, folder)
        return parse(raw, folder=folder)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"no domain file at {path}; `iat init DATA` drafts one")
    try:
        return tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not valid TOML: {error}") from error


def _over_base(own: dict[str, Any], folder: Path) -> tuple[dict[str, Any], Path]:
    """The file that `base` names, with what this one says in its place: [tables] key by key,
    [[lists]] and values whole. Relative source paths start at the file that names them."""
    named = own.pop("base")
    if not isinstance(named, str) or not named.endswith(".toml"):
        raise InputError(
            f"base must be the path of a domain file, such as 'shop.toml'; got {named!r}"
        )
    if "name" not in own:
        raise InputError(
            "a domain file with a `base` needs a `name` of its own: it names the tables"
        )
    base = _read(folder / named)
    if "base" in base:
        raise InputError(f"base {named!r} has a `base` itself; name that file, {base['base']!r}")
    if "path" not in own.get("source", {}):
        folder = (folder / named).resolve().parent
    for key, held in base.items():
        if isinstance(held, dict) and isinstance(own.get(key, {}), dict):
            own[key] = held | own.get(key, {})
    return base | own, folder


def parse(raw: Mapping[str, Any], *, folder: Path = Path()) -> Domain:
    """A domain from its TOML content."""
    known = [
        "name",
        "title",
        "source",
        "columns",
        "label",
        "feature",
        "negatives",
        "tokens",
        "limits",
    ]
    _refuse_unknown("the domain file", raw, known)
    for needed in ("name", "source", "columns", "label", "feature"):
        if needed not in raw:
            raise InputError(f"the domain file needs `{needed}`, which is missing")
    return Domain(
        name=raw["name"],
        title=raw.get("title", ""),
        folder=folder,
        source=_build(Source, raw["source"], "[source]"),
        columns=_build(Columns, raw["columns"], "[columns]"),
        labels=tuple(_build(Label, row, "[[label]]") for row in _rows(raw["label"], "label")),
        features=tuple(
            _build(Feature, row, "[[feature]]") for row in _rows(raw["feature"], "feature")
        ),
        negatives=_build(Negatives, raw["negatives"], "[negatives]")
        if "negatives" in raw
        else None,
        tokens=_build(Publishing, raw.get("tokens", {}), "[tokens]"),
        limits=_build(Limits, raw.get("limits", {}), "[limits]"),
    )


def check_columns(domain: Domain, found: Sequence[str]) -> None:
    """Refuse a source that lacks a column the domain file names, suggesting the nearest one."""
    missing = [c for c in domain.raw_columns if c not in found]
    if missing:
        wanted = "; ".join(f"{c!r}{suggest(c, found)}" for c in missing)
        raise InputError(
            f"domain {domain.name!r} names columns that the events lack: {wanted}. The events "
            f"have: {', '.join(found)}"
        )


Config = TypeVar("Config")


def _build(kind: type[Config], raw: Any, where: str) -> Config:
    if not isinstance(raw, dict):
        raise InputError(f"{where} must be a table of keys, got {type(raw).__name__}")
    label = f"{where} {raw['name']!r}" if isinstance(raw.get("name"), str) else where
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    _refuse_unknown(label, raw, list(known))
    for name, spec in known.items():
        is_needed = spec.default is MISSING and spec.default_factory is MISSING
        if is_needed and name not in raw:
            raise InputError(f"{label} needs `{name}`, which is missing")
    values = {
        name: _typed(f"{label} {name}", str(known[name].type), value) for name, value in raw.items()
    }
    return kind(**values)


def _typed(where: str, kind: str, value: Any) -> Any:
    """The value, if it is of the annotated kind; whole numbers serve as floats."""
    if kind.startswith("Mapping"):
        if not isinstance(value, dict):
            raise InputError(
                f'{where} must be a table of lists, such as {{ column = ["value"] }}; got {value!r}'
            )
        return value
    wanted = kind.split(" | ")[0]
    allowed: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float)}
    types = allowed.get(wanted, (str,))
    is_right = isinstance(value, types) and not isinstance(value, bool)
    if not is_right:
        raise InputError(
            f"{where} must be of type {wanted if wanted in allowed else 'string'}, got {value!r}"
        )
    return float(value) if wanted == "float" else value


def _texts(where: str, raw: Any) -> tuple[str, ...]:
    """A list of values as texts, each once, in order: how it is written changes nothing."""
    is_list = isinstance(raw, list | tuple) and raw
    if not is_list or not all(isinstance(x, str | int) and not isinstance(x, bool) for x in raw):
        raise InputError(
            f"{where} must be a list of at least one text or whole number: the values to keep; "
            f"got {raw!r}"
        )
    return tuple(sorted({str(x) for x in raw}))


def _rows(raw: Any, name: str) -> list[Any]:
    if not isinstance(raw, list):
        raise InputError(f"write [[{name}]] with two brackets: there may be several")
    return raw


def _refuse_unknown(where: str, raw: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in raw:
        if name not in known:
            raise InputError(
                f"{where} has no key {name!r}{suggest(name, known)}; known: {', '.join(known)}"
            )


def _one_of(where: str, value: object, allowed: Any) -> None:
    if value not in get_args(allowed):
        raise InputError(
            f"{where} must be one of {', '.join(map(str, get_args(allowed)))}; got "
            f"{value!r}{suggest(str(value), get_args(allowed))}"
        )


def _check_name(what: str, name: object) -> None:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise InputError(
            f"a {what} name must be lower-case letters, digits and _, starting with a letter; got "
            f"{name!r}"
        )


def suggest(name: str, among: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, among, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
