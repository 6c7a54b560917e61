"""Prove on a sample of ranker rows that nothing they read was unknown when they asked.

A brute-force oracle, SQL over the instances, must give the very histories, labels, tokens, match
features and item tokens that the fetch code gives. Then every event at or after each row's moment
is changed at random and everything is fetched again: nothing may move. Then sampled negatives must
not give themselves away, and the compressor line must have kept a protocol in which no row reads a
token that has seen its label.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jobs.oracle import Oracle, Sample
from jobs.verify_checks import (
    Check,
    Expected,
    Opener,
    ask,
    check,
    compare_disturbed,
    compare_histories,
    compare_item_tokens,
    compare_matches,
    open_reader,
    passed,
)
from jobs.verify_disturb import disturb
from jobs.verify_negatives import check_negatives
from pipelines.days import Days
from pipelines.domain import Domain, load
from pipelines.errors import CheckFailedError, InputError, RetryableError

log = logging.getLogger(__name__)

NUM_STEPS = 6


@dataclass(frozen=True, kw_only=True)
class Args:
    """Prove that ranker rows read nothing from their future, and write a signed report.

    Compares fetched histories, labels, tokens, match features and item tokens of a random sample of
    rows with a brute-force oracle, changes every later event and fetches again, and checks that
    sampled negatives do not give themselves away. Exit code 1, with the first failing rows, if
    anything is found.
    """

    domain: str
    """Name of a domain, or a FILE.toml."""
    lake: str
    """Root of the lake: a folder or an object-store URI."""
    line: str
    """Compressor line whose tokens the rows read."""
    start: date | None = None
    """First day of the ranker rows (UTC); empty: the table's first."""
    end: date | None = None
    """Day after the last; empty: the table's end."""
    samples: int = 200
    """Ranker rows to verify, half of them sampled negatives where there are any."""
    length: int = 256
    """Events of history to compare."""
    seed: int = 0
    """Which rows are drawn and how their future is changed."""
    report: Path | None = None
    """Write the signed report (JSON) here."""
    dry_run: bool = False
    """Say what would be verified, at which table versions, and stop."""

    def __post_init__(self) -> None:
        for name in ("samples", "length"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1, got {getattr(self, name)}")

    @property
    def days(self) -> Days | None:
        if self.start is None and self.end is None:
            return None
        return Days(self.start or date.min, self.end or date.max)


def main(args: Args) -> dict[str, Any]:
    domain = load(args.domain)
    if args.dry_run:
        versions = Oracle(args.lake, domain, args.line).versions
        log.info("would verify %d rows of %s at %s", args.samples, domain.name, versions)
        return {"domain": domain.name, "line": args.line, "tables": versions}
    report = verify(
        domain, args.lake, args.line,
        days=args.days, num_samples=args.samples, length=args.length, seed=args.seed,
    )  # fmt: skip
    sys.stdout.write(table_text(report))
    if args.report is not None:
        args.report.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")
    if not report["passed"]:
        raise CheckFailedError(first_failures(report), report)
    return report


def verify(
    domain: Domain,
    lake: str,
    line: str,
    *,
    days: Days | None = None,
    num_samples: int = 200,
    length: int = 256,
    seed: int = 0,
    opener: Opener | None = None,
) -> dict[str, Any]:
    """The signed report: `checks` as rows, `tables` as the versions read, `passed`, `signature`."""
    oracle = Oracle(lake, domain, line)
    sample = oracle.choose(days, num_samples, seed)
    opener = opener or open_reader(domain, line)
    steps = _steps(domain, lake, oracle, sample, days, length, seed, opener)
    checks = list(tqdm(steps, total=NUM_STEPS, desc="verify", unit="step", delay=5))
    flat = [each for step in checks for each in step]
    if not oracle.is_current():
        raise RetryableError(f"the lake {lake} was written while it was verified; verify again")
    report = {
        "domain": domain.name,
        "line": line,
        "days": str(days) if days else "all",
        "settings": {"samples": len(sample), "length": length, "seed": seed},
        "tables": oracle.versions,
        "checks": [asdict(each) for each in flat],
        "passed": passed(flat),
    }
    return signed(report)


def _steps(
    domain: Domain, lake: str, oracle: Oracle, sample: Sample, days: Days | None, length: int,
    seed: int, opener: Opener,
) -> Iterator[list[Check]]:  # fmt: skip
    yield [check_pointers(sample)]
    with tempfile.TemporaryDirectory(prefix="iat-verify-") as folder:
        reader = opener(lake, Path(folder) / "index")
        buckets, conflicts = oracle.buckets()
        yield [_values_check(buckets, conflicts)]
        found = ask(reader, sample, length)
        expected = Expected.of(oracle, len(sample), length)
        yield [
            *compare_histories(sample, found, expected, buckets),
            compare_matches(sample, found, oracle.matches()),
            compare_item_tokens(sample, found, oracle.item_tokens()),
        ]
        other = str(Path(folder) / "lake")
        changed = disturb(lake, other, domain, oracle.line, sample, seed)
        again = ask(
            opener(other, Path(folder) / "disturbed"),
            sample,
            length,
            user_id=changed.user_id,
            item_token_of=changed.item_id,
            instance_of=changed.instance_of,
        )
        yield [compare_disturbed(sample, found, again, changed.summary)]
    yield check_negatives(oracle, days, seed)
    yield [check_policy(oracle), check_strays(oracle), check_protocol(oracle, days)]


def check_pointers(sample: Sample) -> Check:
    """Each ranker row must be its instance's: there, of the same moment and day."""
    as_of, day = sample.rows.column("as_of_us"), sample.rows.column("day")
    event, event_day = sample.rows.column("event_us"), sample.rows.column("event_day")
    wrong = [
        event[i].as_py() is None or as_of[i] != event[i] or day[i] != event_day[i]
        for i in range(len(sample))
    ]
    return check(
        "rows point at their instances",
        np.array(wrong, bool),
        lambda row: {k: str(v) for k, v in sample.rows.slice(row, 1).to_pylist()[0].items()},
    )


def _values_check(buckets: Mapping[str, Mapping[str, int]], conflicts: Any) -> Check:
    """Hashed side information must be a function of the readable values."""
    num_values = sum(len(found) for found in buckets.values())
    num_buckets = sum(len(set(found.values())) for found in buckets.values())
    return Check(
        name="side information is its hashed value",
        rows=num_values,
        differences=len(conflicts),
        passed=not len(conflicts),
        note=f"{num_values - num_buckets} of {num_values} values share a bucket",
        failing=conflicts.slice(0, 5).to_pylist(),
    )


def check_policy(oracle: Oracle) -> Check:
    """Every token must say that it is readable when the domain's policy says so."""
    found = oracle.policy().to_pylist()
    wrong = [row for row in found if row["available_us"] != row["wanted_us"]]
    return Check(
        name="tokens published as the policy says",
        rows=sum(row["num"] for row in found),
        differences=sum(row["num"] for row in wrong),
        passed=not wrong,
        failing=[row | {"event_date": str(row["event_date"])} for row in wrong[:5]],
    )


def check_strays(oracle: Oracle) -> Check:
    """Only real events may have tokens."""
    total, found = oracle.strays()
    failing = [r | {"event_date": str(r["event_date"])} for r in found.slice(0, 5).to_pylist()]
    return Check(
        name="tokens are of real events",
        rows=total,
        differences=len(found),
        passed=not len(found),
        failing=failing,
    )


def check_protocol(oracle: Oracle, days: Days | None) -> Check:
    """No token may come from weights that saw the labels of rows that read it.

    Streaming: tokens of a day are written by weights that saw no later day. Frozen: by weights that
    saw only days before the ranker's first.
    """
    found = oracle.protocol(days).to_pylist()
    failing = []
    for row in found:
        why = broken_protocol(row)
        if why:
            failing.append({"version": row["version"], "tokens": row["num"], "why": why})
    protocols = ", ".join(sorted({str(row["line_protocols"]) for row in found})) or "no tokens"
    return Check(
        name="compressor line is neutral",
        rows=len(found),
        differences=len(failing),
        passed=not failing and bool(found),
        note=f"protocol {protocols}",
        failing=failing[:5],
    )


def broken_protocol(row: Mapping[str, Any]) -> str:
    """Why tokens of this version are not neutral, or nothing."""
    protocol = row["protocol"] or row["line_protocols"]
    if protocol == "frozen":
        if row["end"] is None:
            return "the version that wrote the tokens has no row in compressor_versions"
        if row["end"] > row["ranker_day"]:
            return f"trained until {row['end']}, the ranker starts on {row['ranker_day']}"
        return ""
    if protocol != "streaming":
        return f"the line's protocol is {protocol}, needed streaming or frozen"
    _, _, name = row["version"].rpartition("@")
    try:
        last_day = date.fromisoformat(name)
    except ValueError:
        return f"a streaming version is called LINE@DAY, got {row['version']!r}"
    if last_day > row["first_day"]:
        return f"weights of {last_day} wrote tokens of {row['first_day']}"
    return ""


def signed(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report with the SHA-256 of its content, the table versions included."""
    digest = hashlib.sha256(_canonical(report)).hexdigest()
    return {**report, "signature": {"algorithm": "sha256", "digest": digest}}


def is_intact(report: Mapping[str, Any]) -> bool:
    """Whether the report is what was signed."""
    held = report.get("signature")
    return isinstance(held, Mapping) and signed(report)["signature"] == held


def _canonical(report: Mapping[str, Any]) -> bytes:
    content = {key: value for key, value in report.items() if key != "signature"}
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def table_text(report: Mapping[str, Any]) -> str:
    """The checks as a plain table."""
    lines = [f"verify {report['domain']}, line {report['line']}, days {report['days']}"]
    for each in report["checks"]:
        verdict = {True: "holds", False: "FAILED", None: "does not apply"}[each["passed"]]
        figures = f"{each['rows']:>10,} {each['differences']:>8,}  {verdict:<14}"
        lines.append(f"{each['name']:<38} {figures} {each['note']}".rstrip())
    lines[1:1] = [f"{'check':<38} {'rows':>10} {'differ':>8}  verdict"]
    lines.append(f"sha256 {report['signature']['digest']}")
    return "\n".join(lines) + "\n"


def first_failures(report: Mapping[str, Any]) -> str:
    """What failed, with the first rows of each check."""
    lines = []
    for each in report["checks"]:
        if each["passed"] is False:
            lines.append(f"{each['name']}: {each['differences']} of {each['rows']} differ")
            lines += [f"  {json.dumps(row, default=str)}" for row in each["failing"]]
    return "\n".join(lines)
