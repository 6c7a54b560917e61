"""What a table was made of, by which run, code and domain file, up to the raw log: from commits."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Annotated, Any, NamedTuple

import pyarrow as pa
import tyro

from pipelines import delta, tables
from pipelines.days import Days
from pipelines.domain import load as load_domain
from pipelines.errors import InputError
from pipelines.names import checked_table
from pipelines.places import shown
from pipelines.tables import Table
from pipelines.written import days_written

VERSIONS = tables.compressor_versions().name
MOST_SPANS = 3
"""Stretches of days that a line for people names."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Show from which versions of which tables a table (or one day of it) was made, by which job,
    run, code and domain file, and those in turn, up to the raw log.

    Known from the commits of the tables and from the rows of the compressor versions: no other
    data is read.
    """

    table: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TABLE")]
    """Its name below the lake: user_order/DOMAIN, or user_order with --domain; or
    compressor_versions."""
    lake: str
    """Root folder or object-store URI of the Delta tables."""
    domain: str = ""
    """Name of a domain that comes with the toolkit, or a FILE.toml."""
    day: date | None = None
    """Only this day (UTC); empty: every day that the table has."""
    version: str = ""
    """Only this compressor version, or line (for tokens: of its line); empty: every one."""


class Key(NamedTuple):
    """A commit by its table's version, or a compressor version by its name."""

    table: str
    version: int | str


@dataclass(slots=True)
class Node:
    """What one commit says of some of the days that it was the last to write."""

    commit: Mapping[str, str]
    days: set[date] = field(default_factory=set)
    made_of: list[Key] = field(default_factory=list)

    @property
    def inputs(self) -> Mapping[str, int]:
        """Versions of the tables read, by name."""
        return {name: at for name, at in self._read().items() if isinstance(at, int)}

    @property
    def source(self) -> str | None:
        """The raw log read, if one was."""
        return next((shown(str(at)) for at in self._read().values() if isinstance(at, str)), None)

    def _read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.commit.get("inputs", "{}"))
        return found


class Lake:
    """The commits of a lake's tables and the rows of its compressor versions, each read once."""

    def __init__(self, lake: str) -> None:
        self.lake = lake
        self._commits: dict[str, list[tuple[int, Mapping[str, str]]]] = {}
        has_versions = delta.exists(lake, tables.compressor_versions())
        rows = delta.read(lake, tables.compressor_versions()).to_pylist() if has_versions else []
        self.versions = {str(row["compressor_version"]): row for row in rows}

    def commits(self, name: str) -> list[tuple[int, Mapping[str, str]]]:
        """Newest first; none where there is no such table."""
        if name not in self._commits:
            table = named(name)
            there = delta.exists(self.lake, table)
            opened = delta.open_table(self.lake, table) if there else None
            self._commits[name] = list(delta.commits(opened)) if opened else []
        return self._commits[name]


class Lineage:
    """Commits and compressor versions, with those that each was made of."""

    def __init__(self, lake: Lake) -> None:
        self.lake = lake
        self.nodes: dict[Key, Node] = {}
        self._waiting: deque[tuple[Key, set[date]]] = deque()

    def of_table(self, name: str, day: date | None, line: str | None) -> list[Key]:
        """The commits that the table (its day, its line) is of, with all before them."""
        commits = self.lake.commits(name)
        lines = {commit.get("line") for _, commit in commits if "start" in commit}
        roots: list[Key] = []
        for each in sorted(lines, key=str) if line is None else [line]:
            found = {at: on.version for at, on in days_written(commits, line=each).items()}
            asked = found.keys() if day is None else found.keys() & {day}
            roots += self._commits_of(name, {at: found[at] for at in asked})
        self._follow()
        return list(dict.fromkeys(roots))

    def of_versions(self, names: Iterable[str]) -> list[Key]:
        """The compressor versions, with all before them."""
        roots = [self._version(name) for name in names]
        self._follow()
        return roots

    def _follow(self) -> None:
        while self._waiting:
            key, days = self._waiting.popleft()
            node = self.nodes[key]
            above = [
                up
                for name, at in node.inputs.items()
                for up in self._commits_of(name, self._days_at(name, days, at))
            ]
            row = self.lake.versions.get(str(key.version)) if key.table == VERSIONS else None
            made_by = row["parent_version"] if row else node.commit.get("compressor_version")
            if made_by and (key.table != VERSIONS or row):
                above.append(self._version(made_by))
            node.made_of = list(dict.fromkeys([*node.made_of, *above]))

    def _days_at(self, name: str, days: set[date], version: int) -> dict[date, int]:
        """By day the last commit of a table at a version; the version itself where none says so."""
        found = days_written(self.lake.commits(name), until=version)
        return {day: found[day].version if day in found else version for day in days}

    def _commits_of(self, name: str, versions: Mapping[date, int]) -> list[Key]:
        """Notes which commit wrote which days."""
        commits = dict(self.lake.commits(name))
        by_version: dict[int, set[date]] = {}
        for day, version in versions.items():
            by_version.setdefault(version, set()).add(day)
        for version, days in sorted(by_version.items()):
            self._note(Key(name, version), commits.get(version, {}), days)
        return [Key(name, version) for version in sorted(by_version)]

    def _version(self, name: str) -> Key:
        """Notes a compressor version; what it read is in its row."""
        row = self.lake.versions.get(name)
        told = (commit for _, commit in self.lake.commits(VERSIONS))
        commit = next((c for c in told if c.get("compressor_version") == name), {})
        days: set[date] = set()
        if row is not None:
            commit = {**commit, "inputs": row["input_versions"]}
            days = set(Days(row["start"], row["end"]))
        self._note(Key(VERSIONS, name), commit, days)
        return Key(VERSIONS, name)

    def _note(self, key: Key, commit: Mapping[str, str], days: set[date]) -> None:
        is_new = key not in self.nodes
        node = self.nodes.setdefault(key, Node(commit))
        more = days - node.days
        node.days |= more
        if is_new or more:
            self._waiting.append((key, more))


def main(args: Args) -> dict[str, Any]:
    name = _full_name(args)
    lake = Lake(args.lake)
    if not lake.commits(name):
        delta.open_table(args.lake, named(name))  # says so where there is none
        raise InputError(
            f"no commit of {name} says who wrote it: it was not written by this toolkit"
        )
    lineage = Lineage(lake)
    if name == VERSIONS:
        roots = lineage.of_versions(_versions_asked(lake, args.version))
    else:
        line = _line_asked(lake, args.version) if args.version else None
        roots = lineage.of_table(name, args.day, line)
    if not roots:
        raise InputError(f"no commit of {name} says that it wrote {_asked(args)}; `iat status`")
    sys.stdout.write(as_text(roots, lineage.nodes))
    return {
        "table": name,
        "day": args.day,
        "roots": [key._asdict() for key in roots],
        "commits": [as_row(key, node) for key, node in lineage.nodes.items()],
    }


def named(name: str) -> Table:
    """A table of which only the name is known; InputError where it is no name."""
    return Table(checked_table(name), pa.schema([]), (), ())


def _full_name(args: Args) -> str:
    if "/" in args.table or not args.domain:
        return args.table
    return f"{args.table}/{load_domain(args.domain).name}"


def _versions_asked(lake: Lake, asked: str) -> list[str]:
    return [
        name
        for name, row in sorted(lake.versions.items(), key=lambda item: item[1]["end"])
        if asked in ("", name, row["compressor_line"])
    ]


def _line_asked(lake: Lake, asked: str) -> str:
    found = _versions_asked(lake, asked)
    if not found:
        known = ", ".join(sorted(lake.versions)) or "none"
        raise InputError(f"no compressor version or line called {asked!r}; the lake has: {known}")
    return str(lake.versions[found[0]]["compressor_line"])


def _asked(args: Args) -> str:
    what = str(args.day) if args.day else "any day"
    return f"{what} of {args.version}" if args.version else what


def as_row(key: Key, node: Node) -> dict[str, Any]:
    """One commit for --json; what it does not say is null."""
    told = ("job", "run", "code", "config", "domain", "line", "compressor_version")
    return {
        "table": key.table,
        "version": key.version,
        "days": [str(span) for span in spans(node.days)],
        **{word: node.commit.get(word) for word in told},
        "source": node.source,
        "made_of": [up._asdict() for up in node.made_of],
    }


def as_text(roots: Iterable[Key], nodes: Mapping[Key, Node]) -> str:
    """A tree: below each commit those that it was made of; one met again is not unfolded again.

    A compressor version stands below the tokens that it wrote, and its parent beside it.
    """
    lines: list[str] = []
    unfolded: set[Key] = set()
    waiting = [(0, key) for key in reversed(list(roots))]
    while waiting:
        depth, key = waiting.pop()
        node, is_again = nodes[key], key in unfolded
        unfolded.add(key)
        lines.append("  " * depth + _line(key, node) + ("  (see above)" if is_again else ""))
        if is_again:
            continue
        if node.source:
            lines.append("  " * (depth + 1) + node.source)
        for up in reversed(node.made_of):
            is_parent = key.table == up.table == VERSIONS
            waiting.append((depth if is_parent else depth + 1, up))
    return "\n".join(lines) + "\n"


def _line(key: Key, node: Node) -> str:
    said = node.commit
    name = f"version {key.version}" if key.table == VERSIONS else f"{key.table} @ {key.version}"
    days = spans(node.days)
    told = ", ".join(map(_span, days[:MOST_SPANS])) + (", ..." if len(days) > MOST_SPANS else "")
    by = f"{said['job']}, run {said.get('run', '?')[:12]}" if "job" in said else "nobody said who"
    words = [f"{word} {said[word]}" for word in ("code", "config") if word in said]
    return "  ".join(part for part in (name, told, ", ".join([by, *words])) if part)


def _span(days: Days) -> str:
    last = days.end - timedelta(days=1)
    return str(last) if len(days) == 1 else f"{days.start} to {last}"


def spans(days: Iterable[date]) -> list[Days]:
    """The days as stretches without a gap."""
    found: list[Days] = []
    for day in sorted(days):
        start = found.pop().start if found and found[-1].end == day else day
        found.append(Days(start, day + timedelta(days=1)))
    return found
