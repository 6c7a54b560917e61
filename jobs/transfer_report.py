"""One table of all transfer runs below a folder: arms, intervals, coverage, budget, proof."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from jobs import evaluate
from jobs.evaluate import Scored
from jobs.transfer import ALONE, PREDICTIONS, RUN, SHUFFLED, arms_of
from pipelines import manifests
from pipelines.errors import CheckFailedError, InputError

BUDGET = ("num_predicted", "trained_rows", "steps")
"""What all arms of a run must have the same of; which rows are replayed, its seed decides."""
SAME = ("days", "line", "sources", "digest")
"""What all seeds must have the same of."""


@dataclass(frozen=True, kw_only=True)
class Args:
    """Make one table of the `iat transfer` runs below OUT.

    Per target and ranker: AUC, GAUC and LogLoss of every arm with 95% intervals over users, paired
    differences to the target alone over users and seeds, the share of users and samples that see a
    source's tokens, what each arm was given, and whether every run proved that it read nothing of a
    source's future (exit code 1 if not). A run that is not finished is named and left out.
    """

    out: Path
    """Folder given to `iat transfer` as --out, or one that holds several of them."""
    start: date | None = None
    """First day of the window (UTC); empty: all."""
    end: date | None = None
    """The day after the window's last; empty: all."""
    bootstraps: int = 200
    """Resamples behind each interval."""

    def __post_init__(self) -> None:
        if self.bootstraps < 1:
            raise InputError(f"--bootstraps must be at least 1, got {self.bootstraps}")


def main(args: Args) -> dict[str, Any]:
    runs, unfinished = found_below(args.out)
    groups: dict[tuple[str, str], list[tuple[Path, Mapping[str, Any]]]] = {}
    for folder, run in runs:
        groups.setdefault((run["target"], run["ranker"]), []).append((folder, run))
    window = (args.start, args.end)
    transfers = [of_group(group, window, args.bootstraps) for group in groups.values()]
    report = {
        "out": str(args.out),
        "window": [str(args.start or ""), str(args.end or "")],
        "transfers": transfers,
        "unfinished": unfinished,
    }
    sys.stdout.write(as_text(report))
    failed = [f"{t['target']}, {t['ranker']}" for t in transfers if not t["proof"]["passed"]]
    if failed:
        raise CheckFailedError(f"the proof of {'; '.join(failed)} failed or is missing", report)
    return report


def found_below(out: Path) -> tuple[list[tuple[Path, Mapping[str, Any]]], list[str]]:
    """Folders and reports of finished runs, in order; names of those that were begun."""
    if not out.is_dir():
        raise InputError(f"--out {out} is no folder; `iat transfer --out` makes it")
    folders = [
        path.parent
        for path in sorted(out.rglob(manifests.FILE))
        if manifests.read(path)[0].job == "transfer"
    ]
    done = [f for f in folders if (f / RUN).is_file()]
    unfinished = [str(f.relative_to(out)) for f in folders if f not in done]
    if not done:
        begun = f", only runs that were begun: {', '.join(unfinished)}" if unfinished else ""
        raise InputError(f"no finished run of `iat transfer` below {out}{begun}")
    return [(f, json.loads((f / RUN).read_text())) for f in done], unfinished


def of_group(
    group: Sequence[tuple[Path, Mapping[str, Any]]],
    window: tuple[date | None, date | None],
    bootstraps: int,
) -> dict[str, Any]:
    """All seeds of one target and ranker."""
    first_folder, first = group[0]
    for folder, run in group[1:]:
        differing = [k for k in SAME if run[k] != first[k]]
        if differing:
            raise InputError(
                f"{folder} and {first_folder} are of one target and ranker and of other "
                f"{', '.join(differing)}: report them from folders of their own"
            )
    arms = arms_of([*first["sources"]])
    files = [
        evaluate.read(folder / each.folder / PREDICTIONS, *window)._replace(name=each.name)
        for each in arms
        for folder, _ in group
    ]
    found = evaluate.compare(files, num=bootstraps)
    by_name = {row["name"]: row for row in found["arms"]}
    for each in arms:
        budgets = [run["arms"][each.name] for _, run in group]
        by_name[each.name] |= {
            k: sum(b[k] for b in budgets) / len(budgets) for k in (*BUDGET, "parameters", "seconds")
        }
    given = [{tuple(a[k] for k in BUDGET) for a in run["arms"].values()} for _, run in group]
    proofs = [run["proof"] for _, run in group]
    return {
        "target": first["target"],
        "ranker": first["ranker"],
        "line": first["line"],
        "sources": first["sources"],
        "days": first["days"],
        "protocol": first["protocol"],
        "seeds": sorted(run["seed"] for _, run in group),
        "num_rows": found["num_rows"],
        "num_users": found["num_users"],
        "arms": found["arms"],
        "beside_shuffled": beside_shuffled(files, bootstraps),
        "coverage": first["coverage"],
        "same_budget": all(len(each) == 1 for each in given),
        "proof": {
            "passed": all(p["passed"] for p in proofs),
            "checks": sum(len(p["checks"]) for p in proofs),
            "rows": sum(c["rows"] for p in proofs for c in p["checks"]),
            "differences": sum(c["differences"] for p in proofs for c in p["checks"]),
        },
    }


def beside_shuffled(files: Sequence[Scored], bootstraps: int) -> dict[str, Any]:
    """The sources' tokens less the same ones dealt out again: what is not only when the user was
    there."""
    control = next(f.name for f in files if f.name.endswith(f", {SHUFFLED}"))
    name = control.removesuffix(f", {SHUFFLED}")
    pair = [f for wanted in (control, name) for f in files if f.name == wanted]
    compared = evaluate.compare(pair, num=bootstraps)["arms"][1]
    return {"name": f"{name} less {control}", **compared["difference"]}


def as_text(report: Mapping[str, Any]) -> str:
    """The tables for people: differences in 1e-3."""
    out = []
    for each in report["transfers"]:
        seeds = ", ".join(map(str, each["seeds"]))
        out.append(
            f"{each['target']} · {each['ranker']} · {each['protocol']} · {each['days']} · seeds "
            f"{seeds}: {each['num_rows']} rows of {each['num_users']} users"
        )
        width = max(len(row["name"]) for row in each["arms"])
        out.append(
            f"  {'':{width}}  AUC                     over {ALONE}          GAUC     LogLoss  "
            "parameters"
        )
        for row in each["arms"]:
            auc = "{value:.4f} [{low:.4f}, {high:.4f}]".format(**row["auc"])
            line = f"  {row['name']:{width}}  {auc}"
            if "difference" in row:
                d = row["difference"]
                line += f"  {_thousandths(d['auc']):22} {1e3 * d['gauc']['value']:+8.2f}"
                line += f" {1e3 * d['log_loss']['value']:+8.2f}"
            else:
                line += f"  {'':22} {row['gauc']['value']:8.4f} {row['log_loss']['value']:8.4f}"
            out.append(f"{line}  {row['parameters']:,.0f}")
        beside = each["beside_shuffled"]
        out.append(f"  {beside['name']}: {_thousandths(beside['auc'])} e-3")
        for name, share in each["coverage"].items():
            out.append(
                f"  {name}: seen by {share['users']:.1%} of users, {share['samples']:.1%} of "
                f"samples; {share['events']:.0f} events a sample"
            )
        base = each["arms"][0]
        same = "the same rows and steps" if each["same_budget"] else "NOT the same rows and steps"
        out.append(
            f"  budget: {base['trained_rows']:,.0f} rows, {base['steps']:,.0f} steps; {same} in "
            "all arms of a run"
        )
        proof = each["proof"]
        verdict = "holds" if proof["passed"] else "FAILED"
        out.append(
            f"  proof {verdict}: {proof['checks']} checks of {proof['rows']:,d} rows, "
            f"{proof['differences']} differ\n"
        )
    if report["unfinished"]:
        out.append(f"not finished, left out: {', '.join(report['unfinished'])}\n")
    return "\n".join(out)


def _thousandths(interval: Mapping[str, float]) -> str:
    d = {k: 1e3 * v for k, v in interval.items()}
    return "{value:+.2f} [{low:+.2f}, {high:+.2f}]".format(**d)
