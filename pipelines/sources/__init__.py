"""Readers of public logs: each writes one flat Parquet event log, read like any other."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Collection
from pathlib import Path

from pipelines import forgotten
from pipelines.domain import Domain, check_columns
from pipelines.errors import InputError
from pipelines.sources import completejourney, movielens, synthetic
from pipelines.sources.sample import Sample

log = logging.getLogger(__name__)

READERS: dict[str, Callable[[Path, Sample], None]] = {
    "completejourney": completejourney.write,
    "movielens": movielens.write,
    "synthetic": synthetic.write,
}
FORMAT = 2
"""Part of every file's key: raise it when a reader's columns or values change."""


def prepare(
    domain: Domain,
    lake: Path | str,
    *,
    data: Path | None = None,
    limit_users: int | None = None,
    seed: int = 0,
    days: int | None = None,
) -> Path:
    """The domain's raw event log as one Parquet file below the lake; made once, then reused.

    Args:
        data: the folder of a log that its reader cannot bring along (MovieLens).
        limit_users: keep a seeded random sample; a larger sample holds every smaller one.
        seed: of the sample, and of the synthetic world itself.
        days: keep the first this many days of the log.

    Raises:
        InputError: no such reader, no data where it looks, or a column that the domain file names
            is not there.
    """
    write = _reader(domain)
    sample = Sample(data=data, limit_users=limit_users, seed=seed, days=days)
    path = (
        _folder(lake) / "raw" / domain.name / f"events-{_key(domain.source.reader, sample)}.parquet"
    )
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        half_written = path.with_name(f"{path.stem}.{os.getpid()}.tmp")
        try:
            write(half_written, sample)
            half_written.replace(path)
        finally:
            half_written.unlink(missing_ok=True)
        log.info("wrote %s", path)
    _check(domain, path)
    return path


def forget(domain: Domain, lake: Path | str, users: Collection[int], *, dry_run: bool) -> int:
    """Take the users' events out of every raw file that `prepare` has written below the lake; gives
    their number. A log that is read in place is its owner's and stays as it is."""
    import pyarrow.parquet as pq

    if not domain.source.reader:
        return 0
    num_rows = 0
    for path in sorted((_folder(lake) / "raw" / domain.name).glob("events-*.parquet")):
        column = pq.read_table(path, columns=[domain.columns.user])[domain.columns.user]
        found = int(forgotten.of_keys(column, users).true_count)
        num_rows += found
        if found and not dry_run:
            _without(path, domain.columns.user, users)
    return num_rows


def _without(path: Path, user_column: str, users: Collection[int]) -> None:
    """The same file without the users' rows, whole or not at all."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    part = path.with_name(f"{path.stem}.{os.getpid()}.tmp")
    try:
        with (
            pq.ParquetFile(path) as source,
            pq.ParquetWriter(part, source.schema_arrow, compression="zstd") as writer,
        ):
            for batch in source.iter_batches(122_880):
                rows = pa.Table.from_batches([batch])
                theirs = forgotten.of_keys(rows[user_column], users)
                writer.write_table(rows.filter(pc.invert(theirs)))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _reader(domain: Domain) -> Callable[[Path, Sample], None]:
    name = domain.source.reader
    if not name:
        raise InputError(
            f"domain {domain.name!r} has no `reader`: "
            f"its events are read from {domain.source.path} directly"
        )
    if name not in READERS:
        near = difflib.get_close_matches(name, READERS, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise InputError(f"[source] has no reader {name!r}{hint}; known: {', '.join(READERS)}")
    return READERS[name]


def _folder(lake: Path | str) -> Path:
    text = str(lake).removeprefix("file://")
    if "://" in text:
        raise InputError(
            f"a public log is prepared in a local folder, and the lake is {lake}; prepare it in a "
            "local lake, upload the file, and point `path` of [source] at it"
        )
    return Path(text)


def _key(reader: str, sample: Sample) -> str:
    facts = [FORMAT, reader, sample.limit_users, sample.seed, sample.days, sample.fingerprint()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def _check(domain: Domain, path: Path) -> None:
    """Every named column is there, and none is the truth that only a synthetic world knows."""
    import pyarrow.parquet as pq

    told = [c for c in domain.raw_columns if c in synthetic.TRUTH]
    if told:
        raise InputError(
            f"domain {domain.name!r} names {told[0]!r}, the best prediction of who knows how the "
            "labels were drawn; no model may see it"
        )
    check_columns(domain, pq.read_schema(path).names)
