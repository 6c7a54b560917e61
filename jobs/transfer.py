"""What other domains' tokens add to a ranker: arms over the same rows with the same budget."""

from __future__ import annotations

import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import tyro

from downstream.configs import RankerTraining, arm
from downstream.data import RankerData, with_shuffled_tokens
from downstream.rankers import RANKERS
from downstream.samples import Array
from downstream.transfer import SourceHistory
from downstream.user_index import UserIndex
from jobs import ledger, train_ranker
from jobs.train_ranker import FIRST_DAY, index_arrays, write_whole
from jobs.transfer_proof import SourceLine, prove
from jobs.verify import first_failures, signed
from jobs.verify_checks import passed
from pipelines import delta, forgotten, lines, manifests, tables
from pipelines.days import Days
from pipelines.domain import Domain
from pipelines.domain import load as load_domain
from pipelines.errors import CheckFailedError, InputError
from pipelines.manifests import Manifest

log = logging.getLogger(__name__)

ABOUT_PLACE = (
    "target", "source", "line", "lake", "out", "seeds", "proof_requests", "device", "dry_run",
)  # fmt: skip
"""Arguments that say where and on what, never what is trained; target, sources and lines are told
by name beside them."""
RUN, METRICS, PREDICTIONS = "run.json", "metrics.json", "predictions.parquet"
ALONE, OWN, ALL, OWN_ALL = "target alone", "+ own", "+ all sources", "+ own and all sources"
SHUFFLED = "shuffled"


@dataclass(frozen=True, kw_only=True)
class Args:
    """Train a target domain's ranker alone and beside tokens of other domains that share its users.

    One run is one target, ranker and seed: target alone; + own tokens; + each source's tokens;
    + all sources' tokens; + own and all; and, as a control, + all with each day's tokens dealt out
    again. All arms pass the same rows in the streaming protocol: each day is predicted with
    yesterday's weights, then trained on. A run first proves that no source event at or after as_of
    was read (exit code 1 if one was), then trains what OUT does not hold yet. Runs of other
    targets, rankers and seeds may share OUT; `iat transfer-report` makes one table of them.
    """

    target: str
    """Domain that is ranked: a name, or a FILE.toml."""
    source: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Domain whose tokens are read, as DOMAIN or DOMAIN=LINE (a name or a FILE.toml, and its
    compressor line, where it has several); may be given several times."""
    lake: str
    """Root folder of the Delta tables."""
    out: Path
    """Folder of the results: one folder a run, one in it an arm, as `iat evaluate` reads them."""
    line: str = ""
    """The target's own compressor line; empty: its only one."""
    ranker: str = "din"
    """din or transformer."""
    seed: int = 0
    """Of the run, or of the first one."""
    seeds: int = 1
    """Runs, one after the other, of seeds from --seed on; for many at once give each its --seed."""
    start: date | None = None
    """First day of samples (UTC); empty: the table's first."""
    end: date | None = None
    """The day after the last; empty: the table's end."""
    proof_requests: int = 200
    """Requests whose source events are compared with the oracle's and whose future is disturbed."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    dry_run: bool = False
    """Say what would be trained, and stop."""

    def __post_init__(self) -> None:
        if not self.source:
            raise InputError("--source is needed: a domain whose tokens the target's ranker reads")
        if self.seeds < 1:
            raise InputError(f"--seeds must be at least 1, got {self.seeds}")
        if self.proof_requests < 1:
            raise InputError(f"--proof-requests must be at least 1, got {self.proof_requests}")
        if self.ranker not in RANKERS:
            raise InputError(f"no ranker called {self.ranker!r}; known: {', '.join(RANKERS)}")

    @property
    def chosen_seeds(self) -> list[int]:
        return list(range(self.seed, self.seed + self.seeds))


@dataclass(frozen=True)
class TransferArm:
    """One row of the table: which tokens the ranker reads."""

    name: str
    parts: str
    """An arm of downstream.configs: base, or tokens (its own)."""
    sources: tuple[str, ...] = ()
    is_shuffled: bool = False
    """The sources' tokens are dealt out again among each day's events."""

    @property
    def folder(self) -> str:
        return "-".join(self.name.replace("+", "").replace(",", "").split())


def arms_of(sources: Sequence[str]) -> tuple[TransferArm, ...]:
    """The base first; with one source, it is all of them."""
    every = tuple(sources)
    both, whole = (OWN_ALL, ALL) if len(every) > 1 else (f"+ own and {every[0]}", f"+ {every[0]}")
    single = [TransferArm(f"+ {name}", "base", (name,)) for name in every]
    return (
        TransferArm(ALONE, "base"),
        TransferArm(OWN, "tokens"),
        *single,
        *([TransferArm(ALL, "base", every)] if len(every) > 1 else []),
        TransferArm(both, "tokens", every),
        TransferArm(f"{whole}, {SHUFFLED}", "base", every, is_shuffled=True),
    )


def main(args: Args) -> dict[str, Any]:
    target, line, sources = chosen(args)
    arms = arms_of([source.domain.name for source in sources])
    told: dict[str, Any] = {
        "target": target.name,
        "line": line,
        "ranker": args.ranker,
        "seeds": args.chosen_seeds,
    }
    told |= {"sources": {s.domain.name: s.line for s in sources}, "arms": [a.name for a in arms]}
    asked = train_ranker.Args(
        domain=args.target, lake=args.lake, out=str(args.out), ranker=args.ranker, arm="tokens",
        line=line, start=args.start, end=args.end, device=args.device,
    )  # fmt: skip
    days, version = train_ranker.sample_days(asked, target)
    told["days"] = str(days)
    if args.dry_run:
        sys.stdout.write(
            f"would train over {days}, seeds {args.chosen_seeds}:\n  "
            + "\n  ".join(a.name for a in arms)
            + "\n"
        )
        return told
    with ledger.job(args.lake, "transfer", args) as row, tempfile.TemporaryDirectory() as temp:
        data, read, digest = loaded(asked, target, sources, days, version, Path(temp))
        row.inputs |= read
        runs = []
        for seed in args.chosen_seeds:
            manifest = manifest_of(args, target, line, sources, days, read, seed)
            run = Run(args, target, sources, arms, data, days, manifest, digest, seed)
            runs.append(run.finished())
            row.add(rows=sum(a["trained_rows"] for a in runs[-1]["arms"].values()))
            sys.stdout.write(as_text(runs[-1]))
    return told | {"runs": runs}


def loaded(
    asked: train_ranker.Args,
    target: Domain,
    sources: Sequence[SourceLine],
    days: Days,
    version: int,
    folder: Path,
) -> tuple[RankerData, dict[str, int], str]:
    """The target's samples beside its own past and the sources' (indexes in the folder, which is
    read as long as the data is), the tables' versions, and the digest of it all."""
    samples, lake = tables.ranker_samples(target), asked.lake
    rows = delta.read(lake, samples, days, version=version)
    rows = forgotten.without(rows, forgotten.ids(lake, target))
    index = train_ranker.user_index(asked, target, days, folder / "target", None)
    before = Days(FIRST_DAY, days.end)
    indexes = [
        UserIndex.build(lake, s.domain, folder / str(i), days=before, lines=[s.line])
        for i, s in enumerate(sources)
    ]
    data = train_ranker.load_data(asked, target, days, index, rows)
    data = data.with_sources(
        [_history(data, s, i, target) for s, i in zip(sources, indexes, strict=True)]
    )
    read = {**index.meta.tables, samples.name: version}
    for each in indexes:
        read |= each.meta.tables
    digest = manifests.digest(rows, *(a for i in (index, *indexes) for a in index_arrays(i)))
    return data, read, digest


def chosen(args: Args) -> tuple[Domain, str, list[SourceLine]]:
    """The target, its line, and the sources with theirs; InputError for what cannot be."""
    target = load_domain(args.target)
    sources: list[SourceLine] = []
    for text in args.source:
        name, line = _parted(text)
        domain = load_domain(name)
        if domain.name == target.name:
            raise InputError(
                f"--source {text} is the target {target.name} itself, whose own tokens are read by "
                f"the arm {OWN!r}: name another domain"
            )
        if domain.name in [s.domain.name for s in sources]:
            raise InputError(f"--source {text}: {domain.name} is given twice")
        sources.append(SourceLine(domain, line_of(args.lake, domain, line, f"--source {text}")))
    line = line_of(args.lake, target, args.line, "--line")
    return target, line, sources


def _parted(text: str) -> tuple[str, str]:
    """DOMAIN and LINE of DOMAIN or DOMAIN=LINE; a file's path may hold a = itself."""
    name, equals, line = text.rpartition("=")
    return (name, line) if equals and not line.endswith(".toml") else (text, "")


def line_of(lake: str, domain: Domain, asked: str, flag: str) -> str:
    """The compressor line of a domain that is asked for, or its only one."""
    known = [row["compressor_line"] for row in lines.newest(lake, domain.name)]
    held = f"the lake has of {domain.name}: {', '.join(known) or 'none'}"
    if asked and asked not in known:
        raise InputError(f"{flag}: {asked!r} is no compressor line of {domain.name}; {held}")
    if not asked and len(known) != 1:
        how = "train one (`iat train-compressor`)" if not known else "say which"
        raise InputError(f"{flag} needs one compressor line of {domain.name}; {held}; {how}")
    return asked or known[0]


def _history(
    data: RankerData, source: SourceLine, index: UserIndex, target: Domain
) -> SourceHistory:
    t, name = data.tensors, source.domain.name
    users = np.unique(data.samples.user_id)
    num_shared = int(np.isin(users, index.users.key).sum())
    if not num_shared:
        raise InputError(
            f"source {name} shares no user with {target.name}: none of {len(users)} users of the "
            f"samples is among the {len(index.users.key)} of histories/{name}. User ids are hashes "
            "of the `user` column as text: both domains must name the same keys there"
        )
    log.info("%s: %d of %d users are there too", name, num_shared, len(users))
    return SourceHistory.of(index, source.line, t.user_G, t.as_of_G)


def manifest_of(
    args: Args,
    target: Domain,
    line: str,
    sources: Sequence[SourceLine],
    days: Days,
    read: Mapping[str, int],
    seed: int,
) -> Manifest:
    """What a run reads, and how."""
    resolved = replace(args, start=days.start, end=days.end, seed=seed)
    files = {s.domain.name: [s.line, ledger.file_of(s.domain)] for s in sources}
    more = {
        "line": line, "sources": files, "configs": [asdict(arm(p)) for p in ("base", "tokens")],
        "training": asdict(RankerTraining(seed=seed)),
    }  # fmt: skip
    return Manifest.of(
        "transfer", resolved, ABOUT_PLACE, domain=target.name, config=ledger.file_of(target),
        code=ledger.code_version(), tables=read, days=[str(days.start), str(days.end)],
        user_share=1.0, user_seed=0, more=more,
    )  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One target, ranker and seed."""

    args: Args
    target: Domain
    sources: Sequence[SourceLine]
    arms: Sequence[TransferArm]
    data: RankerData
    days: Days
    manifest: Manifest
    digest: str
    seed: int

    @property
    def folder(self) -> Path:
        return self.args.out / f"{self.target.name}.{self.args.ranker}.seed{self.seed}"

    def finished(self) -> dict[str, Any]:
        """The run's report, once it is proved and every arm is there."""
        self.claim()
        manifests.register(self.args.lake, self.manifest, str(self.folder.absolute()))
        proof = self.proved()
        report = {
            "target": self.target.name,
            "ranker": self.args.ranker,
            "seed": self.seed,
            "protocol": "streaming",
            "days": str(self.days),
            "line": self.manifest.more["line"],
            "sources": {s.domain.name: s.line for s in self.sources},
            "manifest": self.manifest.name,
            "digest": self.digest,
            "coverage": coverage(self.data),
            "proof": proof,
            "arms": {each.name: self.trained(each) for each in self.arms},
        }
        _write_json(self.folder / RUN, report)
        return report

    def claim(self) -> None:
        """Make the folder this run's; one that holds a run of other settings or rows is refused."""
        path = self.folder / manifests.FILE
        if path.exists():
            held, digest = manifests.read(path)
            ours, theirs = _settings(self.manifest), _settings(held)
            differing = sorted(k for k in ours | theirs if ours.get(k) != theirs.get(k))
            if differing:
                raise InputError(
                    f"{self.folder} is of a run with other {', '.join(differing)}; remove it, or "
                    "give another --out"
                )
            if digest != self.digest:
                raise InputError(
                    f"{self.folder} is of a run over other rows: the tables have changed since it "
                    "was begun. Remove it, give another --out, or the days of then (--start, --end)"
                )
        self.folder.mkdir(parents=True, exist_ok=True)
        manifests.write(self.folder, self.manifest, self.digest)

    def proved(self) -> dict[str, Any]:
        """The signed proof, which is repeated by every call; CheckFailedError where it fails."""
        args = self.args
        checks = prove(
            self.data, args.lake, SourceLine(self.target, self.manifest.more["line"]),
            self.sources, arm("base"), args.ranker, self.days,
            num=args.proof_requests, seed=self.seed,
        )  # fmt: skip
        report = signed(
            {
                "domain": self.target.name,
                "tables": dict(self.manifest.tables),
                "requests": args.proof_requests,
                "checks": [asdict(each) for each in checks],
                "passed": passed(checks),
            }
        )
        _write_json(self.folder / "proof.json", report)
        if not report["passed"]:
            raise CheckFailedError(first_failures(report), report)
        return report

    def trained(self, chosen: TransferArm) -> dict[str, Any]:
        """An arm's figures; its predictions lie beside them."""
        folder = self.folder / chosen.folder
        if (folder / METRICS).exists():
            held: dict[str, Any] = json.loads((folder / METRICS).read_text())
            return held
        folder.mkdir(parents=True, exist_ok=True)
        data = self.data.with_sources(
            [
                s.with_store(with_shuffled_tokens(s.store, self.seed)) if chosen.is_shuffled else s
                for s in self.data.sources
                if s.name in chosen.sources
            ]
        )
        config, training = arm(chosen.parts), RankerTraining(seed=self.seed)
        log.info("%s, seed %d: %s", self.target.name, self.seed, chosen.name)
        result = train_ranker.run(
            data, self.args.ranker, config, training, self.days, progress=folder / "progress"
        )
        named = {
            "domain": self.target.name, "ranker": self.args.ranker, "arm": chosen.name, "line": "",
            "protocol": "streaming", "seed": self.seed,
        }  # fmt: skip
        rows = train_ranker.predictions(data, result.score_n, named)
        write_whole(folder / PREDICTIONS, lambda path: pq.write_table(rows, path))
        trainer = result.trainer
        report = {
            "sources": list(chosen.sources),
            "num_predicted": len(rows),
            "trained_rows": trainer.num_rows,
            "steps": trainer.num_steps,
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            "seconds": result.seconds,
        }
        _write_json(folder / METRICS, report)
        shutil.rmtree(folder / "progress", ignore_errors=True)
        return report


def _settings(manifest: Manifest) -> dict[str, Any]:
    """All of a manifest that another run in its folder must share; by name."""
    told = asdict(manifest)
    told.pop("tables")  # another version may hold the same rows: their digest says
    args, more = told.pop("args"), told.pop("more")
    return told | args | more


def coverage(data: RankerData) -> dict[str, dict[str, float]]:
    """By source: the share of users and of samples that see at least one of its tokens, and how
    many a sample sees."""
    starts = np.append(data.pieces.request_start, len(data))
    weight, user = np.diff(starts), data.tensors.user_G.cpu().numpy()
    num_users = len(np.unique(user))
    seen = {s.name: s.num_visible_G.cpu().numpy() for s in data.sources}
    if len(seen) > 1:
        seen[ALL.removeprefix("+ ")] = np.sum([*seen.values()], axis=0)

    def of(num: Array) -> dict[str, float]:
        return {
            "users": len(np.unique(user[num > 0])) / max(1, num_users),
            "samples": float(np.average(num > 0, weights=weight)),
            "events": float(np.average(num, weights=weight)),
        }

    return {name: of(num) for name, num in seen.items()}


def _write_json(path: Path, held: Mapping[str, Any]) -> None:
    text = json.dumps(held, indent=1, sort_keys=True, default=str)
    write_whole(path, lambda part: part.write_text(text + "\n"))


def as_text(run: Mapping[str, Any]) -> str:
    """What a run did, for people; its metrics are the report's."""
    head = "{target} · {ranker} · seed {seed} · {days}".format(**run)
    seconds = sum(a["seconds"] for a in run["arms"].values())
    checks = run["proof"]["checks"]
    return f"{head}: {len(run['arms'])} arms, {seconds:.0f} s; {len(checks)} checks hold\n"
