"""Erase users of a domain: their rows leave every table, index and raw sample, and do not come
back."""

from __future__ import annotations

import logging
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import tyro
from tqdm import tqdm

from compressor import item_erasure, predictions
from compressor.item_erasure import Sums
from compressor.training import checkpoint
from downstream.index_arrays import Meta
from downstream.user_index import UserIndex
from jobs import ledger
from pipelines import delta, forgotten, manifests, sources, tables
from pipelines import lines as compressor_lines
from pipelines.days import Days
from pipelines.domain import Domain
from pipelines.domain import load as load_domain
from pipelines.errors import InputError
from pipelines.keys import key_id
from pipelines.splits import users_kept
from pipelines.tables import Table

log = logging.getLogger(__name__)

Change = Callable[[pa.Table], pa.Table]

BY_USER: Sequence[Callable[[Domain], Table]] = (
    tables.materialized,
    lambda domain: tables.instance_tokens(domain.name),
    tables.ranker_samples,
    tables.histories,
    tables.user_order,
    tables.temporal_order,
    tables.instances,
)
"""Tables with a user_id, in the order in which they are rewritten: what others are made of last, so
that a run that goes on after a kill still finds the users' days."""

WIDE_ROWS = 1024
"""Rows of `materialized` that are held at a time: each is a whole past."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Erase users: their rows leave every table of the domain, one commit a table, and the indexes
    and raw samples named below; from then on no job writes a row of theirs.

    Item tokens that their tokens are summed into are summed up again without them. Old files hold
    the users until `iat vacuum` has removed them. The report lists the compressor versions that
    were trained on them: retire or retrain those. Run it again after a kill: it goes on.
    """

    domain: str
    """Name of a domain that comes with the toolkit, or a FILE.toml."""
    lake: str
    """Root folder or object-store URI of the Delta tables."""
    user: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """The user's own key, as in the raw log; may be given several times. It is stored nowhere."""
    users_file: Path | None = None
    """A text file of keys, one a line."""
    index: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """Folder of a user index to build again without them; may be given several times."""
    dry_run: bool = False
    """Say where the users are, and stop."""

    def __post_init__(self) -> None:
        if not self.user and self.users_file is None:
            raise InputError("whom to forget? Give --user KEY or --users-file FILE")
        if any(not key.strip() for key in self.user):
            raise InputError("--user needs a key, got an empty one")

    @property
    def user_ids(self) -> frozenset[int]:
        keys = list(self.user)
        if self.users_file is not None:
            keys += [x for x in self.users_file.read_text().splitlines() if x.strip()]
        return frozenset(map(key_id, keys))


@dataclass(frozen=True)
class Traces:
    """Where some users are."""

    rows: Mapping[str, int]
    """By table, where there are any."""
    seen: Mapping[int, frozenset[date]]
    """Each user's days."""
    days: Mapping[str, list[date]]
    """By table, the days that hold one of them."""
    sums: Mapping[str, Sums]
    """By line, the item tokens that hold some of their tokens."""


def main(args: Args) -> dict[str, Any]:
    domain, users = load_domain(args.domain), args.user_ids
    for folder in args.index:
        _of_domain(folder, domain)
    # The ledger keeps a run's arguments; it must not keep whom this one is about.
    with ledger.job(args.lake, "forget", replace(args, user=("...",), users_file=None)) as run:
        commit = ledger.commit_of(run, domain, {})
        if not args.dry_run:
            # Before anything is looked for: what no job writes from now on need not be found.
            forgotten.add(args.lake, domain, users, commit=commit)
        traces = find(args.lake, domain, users)
        num_raw = sources.forget(domain, args.lake, users, dry_run=True)
        result: dict[str, Any] = {
            "domain": domain.name,
            "users": len(users),
            "rows": {**traces.rows, **({f"raw/{domain.name}": num_raw} if num_raw else {})},
            "item_token_days": {line: len(each.days) for line, each in traces.sums.items()},
            "compressors": trained_on(args.lake, domain, traces.seen),
            "rankers": ranked(args.lake, domain, traces.seen),
            "indexes": [str(folder) for folder in args.index],
            "old_statistics": with_statistics(args.lake, domain),
        }
        if not args.dry_run:
            erase(args.lake, domain, users, traces, commit=commit)
            result["indexes"] = [
                str(folder) for folder in args.index if rebuilt(args.lake, domain, folder)
            ]
            run.add(rows=sum(result["rows"].values()))
            run.figures |= {name: result[name] for name in ("users", "compressors", "rankers")}
    sys.stdout.write(as_text(args, domain, result))
    return result


def find(lake: str, domain: Domain, users: frozenset[int]) -> Traces:
    """The users' rows and days in every table of the domain."""
    rows: Counter[str] = Counter()
    days: dict[str, list[date]] = {}
    seen: dict[int, set[date]] = {}
    is_one = ds.field("user_id").isin(pa.array(sorted(users), pa.int64()))
    for table in [make(domain) for make in BY_USER]:
        if not delta.exists(lake, table):
            continue
        dataset = delta.files(delta.open_table(lake, table))
        found = dataset.to_table(["user_id", "event_date"], filter=is_one)
        rows[table.name] = len(found)
        days[table.name] = sorted(found["event_date"].unique().to_pylist())
        for row in found.group_by(["user_id", "event_date"]).aggregate([]).to_pylist():
            seen.setdefault(row["user_id"], set()).add(row["event_date"])
    quarantine = tables.quarantine(domain)
    if delta.exists(lake, quarantine):
        scanned = delta.files(delta.open_table(lake, quarantine))
        theirs = [
            batch.column("event_date").filter(
                forgotten.of_raw(pa.chunked_array([batch.column("raw")]), domain, users)
            )
            for batch in scanned.to_batches(columns=["raw", "event_date"])
        ]
        rows[quarantine.name] = sum(map(len, theirs))
        days[quarantine.name] = sorted({day for part in theirs for day in part.to_pylist()})
    return Traces(
        {name: num for name, num in rows.items() if num},
        {user: frozenset(held) for user, held in seen.items()},
        days,
        item_erasure.holding(lake, domain.name, users),
    )


def erase(
    lake: str,
    domain: Domain,
    users: frozenset[int],
    traces: Traces,
    *,
    commit: Mapping[str, str],
) -> None:
    """The users leave, table by table; they are kept out already."""
    for table in _events_tables(lake, domain):
        delta.ensure_properties(lake, table, delta.OF_EVENTS)
    if traces.sums:
        item_erasure.erase(lake, domain.name, users, traces.sums, commit=commit)

    def others(rows: pa.Table) -> pa.Table:
        return forgotten.without(rows, users)

    def of_others(rows: pa.Table) -> pa.Table:
        return rows.filter(pc.invert(forgotten.of_raw(rows["raw"], domain, users)))

    steps = [(tables.quarantine(domain), of_others)]
    steps += [(make(domain), others) for make in BY_USER]
    for table, change in tqdm(steps, desc=f"forgetting in {domain.name}", unit="table"):
        is_wide = table.name == tables.materialized(domain).name
        delta.rewrite(
            lake, table, traces.days.get(table.name, []), partial(_same, change), commit=commit,
            rows_at_once=WIDE_ROWS if is_wide else None,
        )  # fmt: skip
    if "://" not in lake:  # weights, and what they predicted, are in local lakes alone
        for row in compressor_lines.newest(lake, domain.name):
            predictions.forget(lake, row["compressor_line"], users)
    sources.forget(domain, lake, users, dry_run=False)


def _same(change: Change) -> Change:
    """A change that carries nothing from day to day is its own fresh start."""
    return change


def trained_on(lake: str, domain: Domain, seen: Mapping[int, frozenset[date]]) -> list[str]:
    """Compressor versions that learned from a day of one of the users; one whose checkpoint is gone
    counts as trained on everyone."""
    table = tables.compressor_versions()
    if not seen or not delta.exists(lake, table):
        return []
    ids = np.asarray(sorted(seen), np.int64)
    found = []
    for row in delta.read(lake, table).to_pylist():
        if row["domain"] != domain.name:
            continue
        try:
            told = checkpoint.meta(Path(row["artifact"]))["version"]
        except InputError:
            told = {"user_share": 1.0, "user_seed": 0, "is_trained": True}
        kept = users_kept(ids, told["user_share"], told["user_seed"])
        days = Days(row["start"], row["end"])
        had_days = [any(day in days for day in seen[int(user)]) for user in ids]
        if told["is_trained"] and (kept & np.asarray(had_days)).any():
            found.append(row["compressor_version"])
    return sorted(found)


def ranked(lake: str, domain: Domain, seen: Mapping[int, frozenset[date]]) -> dict[str, str]:
    """Ranker runs with a manifest that read a day of one of the users: name and folder."""
    ids = np.asarray(sorted(seen), np.int64)
    found = {}
    for manifest, place in manifests.live(lake, domain.name):
        kept = users_kept(ids, manifest.user_share, manifest.user_seed)
        had_days = [any(day in manifest.span for day in seen[int(user)]) for user in ids]
        if manifest.job != "train-compressor" and (kept & np.asarray(had_days, bool)).any():
            found[manifest.name] = place
    return found


def with_statistics(lake: str, domain: Domain) -> list[str]:
    """Tables made before the toolkit kept file statistics out of their logs: old commits of theirs
    may name a user_id as a file's smallest or largest."""
    return [
        table.name
        for table in _events_tables(lake, domain)
        if not delta.has_properties(lake, table, delta.OF_EVENTS)
    ]


def _events_tables(lake: str, domain: Domain) -> list[Table]:
    made = [make(domain) for make in (*BY_USER, tables.quarantine)]
    return [table for table in made if delta.exists(lake, table)]


def _of_domain(folder: Path, domain: Domain) -> Meta:
    meta = Meta.read(folder)
    if meta.domain != domain.name:
        raise InputError(f"--index {folder} is of domain {meta.domain!r}, not {domain.name!r}")
    return meta


def rebuilt(lake: str, domain: Domain, folder: Path) -> bool:
    """Whether the index was built again: it was older than the lake's tables, or was extended and
    so may hold rows of before; one that cannot be built is removed."""
    meta = _of_domain(folder, domain)
    made = [make(domain) for make in BY_USER] + [tables.item_tokens(domain.name)]
    held = [table for table in made if table.name in meta.tables]
    is_current = all(delta.open_table(lake, t).version() == meta.tables[t.name] for t in held)
    if is_current and not meta.generation:
        return False
    try:
        UserIndex.build(
            lake, domain, folder, days=meta.held_days, lines=[*meta.lines], fields=meta.has_fields
        )
    except InputError as error:
        log.warning("the index in %s is removed, it cannot be built again: %s", folder, error)
        shutil.rmtree(folder)
    return True


def as_text(args: Args, domain: Domain, result: Mapping[str, Any]) -> str:
    """What was found and done, for people; never whom it was about."""
    done = "would be erased" if args.dry_run else "erased"
    rows = result["rows"]
    lines = [f"{domain.name}: {result['users']} users, {sum(rows.values()):,d} rows {done}"]
    lines += [f"  {name:32s} {num:>10,d}" for name, num in rows.items()]
    for line, num in result["item_token_days"].items():
        lines.append(f"  item tokens of line {line}: {num} days summed up again without them")
    lines += [f"  index {folder}" for folder in result["indexes"]]
    if result["compressors"]:
        lines.append("trained on them (retire or train again): " + ", ".join(result["compressors"]))
    lines += [f"trained on them: {name} in {place}" for name, place in result["rankers"].items()]
    if result["old_statistics"]:
        lines.append(
            "old commits of these tables may name a user_id as the smallest or largest of a file: "
            + ", ".join(result["old_statistics"])
        )
    if not domain.source.reader:
        lines.append(f"the raw log, {domain.source.path}, is its owner's and stays as it is")
    lines.append("files of before hold them until `iat vacuum` has removed those")
    return "\n".join(lines) + "\n"
