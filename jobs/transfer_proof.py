"""Proof that a ranker which reads other domains' tokens read nothing of their future.

An oracle in SQL, which shares nothing with the fetch code, says over a source's `instances` and
`instance_tokens` what a request may see: the newest events before it whose token was published
before it, of the user of that readable key. Then all else of the sources is changed at random, and
no logit may move; and what may be seen is changed, and the logits of whoever sees any must move.

Shape legend: n requests asked for, G requests of the data, L sequence length.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from downstream.configs import RankerConfig
from downstream.data import RankerData
from downstream.rankers import make_ranker
from downstream.samples import Array
from downstream.transfer import SourceHistory
from downstream.user_index import UserIndex
from jobs.oracle import Oracle, Sample, decode
from jobs.verify import broken_protocol
from jobs.verify_checks import PADDING, Check, check
from jobs.verify_disturb import disturb
from pipelines import delta, duck, tables
from pipelines.days import Days
from pipelines.domain import Domain
from pipelines.errors import InputError, RetryableError

NOBODY = -1
"""A user whom a disturbed lake does not have."""
BATCH = 128
"""Requests fetched or scored at once."""


@dataclass(frozen=True)
class SourceLine:
    """A domain and the compressor line whose tokens are read of it."""

    domain: Domain
    line: str


@dataclass(frozen=True)
class Asked:
    """The requests that are proved, [n] each."""

    request: Array
    """Their places among the data's."""
    instance_id: Array
    """One sample of each."""
    user_id: Array
    item_id: Array
    as_of_us: Array

    def __len__(self) -> int:
        return len(self.request)

    @classmethod
    def draw(cls, data: RankerData, num: int, seed: int) -> Asked:
        """Random requests; half of them with something to see in a source, where so many have."""
        random, samples = np.random.default_rng(seed), data.samples
        seen = torch.stack([s.num_visible_G > 0 for s in data.sources]).any(dim=0).cpu().numpy()
        order = random.permutation(len(seen))
        first = order[seen[order]][: num // 2]
        rest = order[~np.isin(order, first)][: num - len(first)]
        request = np.sort(np.concatenate([first, rest]))
        at = data.pieces.order[data.pieces.request_start[request]]
        names = ("instance_id", "user_id", "item_id", "as_of_us")
        return cls(request, **{name: getattr(samples, name)[at] for name in names})

    def show(self, row: int, **more: Any) -> dict[str, Any]:
        told = {"instance_id": int(self.instance_id[row]), "as_of_us": int(self.as_of_us[row])}
        return told | more


def prove(
    data: RankerData,
    lake: str,
    target: SourceLine,
    sources: Sequence[SourceLine],
    config: RankerConfig,
    ranker: str,
    days: Days,
    *,
    num: int,
    seed: int,
) -> list[Check]:
    """All checks of the data's sources, which are `sources` in their order. Of the target its line
    alone: what is read of its own past is `iat verify`'s to prove."""
    asked = Asked.draw(data, num, seed)
    own = Oracle(lake, target.domain, target.line)
    found = [check_line(own, target.domain.name, days)]
    for source, held in zip(sources, data.sources, strict=True):
        oracle = Oracle(lake, source.domain, source.line)
        stale = {t: v for t, v in held.store.index.meta.tables.items() if t in oracle.versions}
        if any(oracle.versions[t] != v for t, v in stale.items()):
            raise RetryableError(f"{source.domain.name} in {lake} was written since it was read")
        found += compare(held, oracle, lake, target.domain, asked, config.history_length)
        found += [check_all(held, data, config.history_length), check_line(oracle, held.name, days)]
    model = noisy_ranker(data, config, ranker, seed)
    before = logits(model, data, config, asked)
    with tempfile.TemporaryDirectory(prefix="iat-transfer-") as folder:
        later, notes = [], []
        for source, held in zip(sources, data.sources, strict=True):
            other, note = disturbed(held, source, lake, asked, data, Path(folder) / held.name, seed)
            later.append(other)
            notes.append(f"{held.name}: {note}")
        after = logits(model, data.with_sources(later), config, asked)
    found.append(
        check(
            "a disturbed future moves no logit",
            (before != after).any(axis=1),
            lambda row: asked.show(row, before=before[row].tolist(), after=after[row].tolist()),
            "; ".join(notes),
        )
    )
    return [*found, check_reach(model, data, config, asked, before)]


def compare(
    held: SourceHistory, oracle: Oracle, lake: str, target: Domain, asked: Asked, length: int
) -> Iterator[Check]:
    """What is read of a source, event by event, against the oracle."""
    wanted = newest_visible(oracle, lake, target, asked, length)
    at = wanted.column("k").to_numpy(), length - wanted.column("back").to_numpy()
    request = torch.from_numpy(asked.request).to(held.user_place_G.device)
    as_of = torch.from_numpy(asked.as_of_us).to(request.device)
    row, mask = (x.cpu().numpy() for x in held.rows(request, as_of, length))
    read = held.sequence(request, as_of, length, domain=1)
    ids = np.asarray(held.store.index.arrays["instance_id"])
    instance = np.where(mask, ids[np.maximum(row, 0)], PADDING)

    def compared(what: str, got: Array, values: Array, fill: Any, note: str = "") -> Check:
        dense = np.full(got.shape, fill, got.dtype)
        dense[at] = values
        differ = (got != dense).reshape(*mask.shape, -1).any(axis=2)

        def show(row: int) -> dict[str, Any]:
            step = int(np.flatnonzero(differ[row])[-1])
            said = {"expected": dense[row, step].tolist(), "fetched": got[row, step].tolist()}
            return asked.show(row, events_back=length - step, **said)

        return check(f"{held.name}: {what}", differ.any(axis=1), show, note)

    num_covered = int(mask.any(axis=1).sum())
    note = f"{int(mask.sum())} events read, {num_covered} requests have any"
    yield compared("events", instance, wanted.column("instance_id").to_numpy(), PADDING, note)
    gap_s = (wanted.column("gap_us").to_numpy() / 1e6).astype(np.float32)
    yield compared("ages", read.gap_s_RL.cpu().numpy(), gap_s, 0)
    if read.token_RLD is not None:
        token = decode(wanted.column("token"))
        token = token if len(token) else np.zeros((0, held.store.width))
        yield compared("tokens", read.token_RLD.cpu().numpy(), token, 0)
    for place, label in enumerate(oracle.domain.labels):
        values = wanted.column(f"label_{label.name}").to_numpy()
        yield compared(f"label {label.name}", read.label_RLK[..., place].cpu().numpy(), values, 0)


def newest_visible(
    oracle: Oracle, lake: str, target: Domain, asked: Asked, length: int
) -> pa.Table:
    """By brute force: of each request k the newest `length` events of its user in the source that
    happened, and whose token was published, strictly before it; `back` 1 is the newest."""
    table = tables.instances(target)
    duck.register(oracle.sql, "target", delta.dataset(delta.open_table(lake, table), table))
    told = pa.table({"k": np.arange(len(asked)), "instance_id": asked.instance_id})
    oracle.sql.register("asked", told)
    oracle.run(
        """CREATE OR REPLACE TEMP TABLE request AS
        SELECT k, user_key, epoch_us(event_time) AS as_of_us
        FROM asked JOIN target USING (instance_id)"""
    )
    num_found = len(oracle.table("SELECT k FROM request"))
    if num_found != len(asked):
        raise InputError(
            f"{len(asked) - num_found} of {len(asked)} rows of ranker_samples/{target.name} have "
            "no instance; run `iat build-samples` again"
        )
    labels = "".join(
        f""", CASE WHEN label_{x.name} IS NULL OR label_time_{x.name} IS NULL
              OR epoch_us(label_time_{x.name}) >= as_of_us THEN 0
              ELSE 1 + label_{x.name} END AS label_{x.name}"""
        for x in oracle.domain.labels
    )
    return oracle.table(
        f"""SELECT k, i.instance_id, as_of_us - epoch_us(i.event_time) AS gap_us, t.token,
            row_number() OVER (PARTITION BY k ORDER BY i.event_time DESC, i.instance_id DESC)
            AS back {labels}
        FROM request r JOIN instances i ON i.user_key = r.user_key AND NOT i.is_sampled
        JOIN tokens t ON t.instance_id = i.instance_id AND t.compressor_line = $line
        WHERE epoch_us(i.event_time) < as_of_us AND epoch_us(t.available_time) < as_of_us
        QUALIFY back <= $length ORDER BY k, back DESC""",
        {"line": oracle.line, "length": length},
    )


def check_all(held: SourceHistory, data: RankerData, length: int) -> Check:
    """Of every request of the run, not of a sample: whether anything read is of its moment or
    later."""
    as_of, wrong = data.tensors.as_of_G, []
    for request in torch.arange(len(as_of), device=as_of.device).split(BATCH):
        row, mask = held.rows(request, as_of[request], length)
        event = held.store.columns["event_time_us"][row.clamp(min=0)]
        available = held.store.available_us_N[row.clamp(min=0)]
        is_late = torch.maximum(event, available) >= as_of[request, None]
        wrong.append((mask & is_late).any(dim=1))
    is_wrong = torch.cat(wrong).cpu().numpy()
    return check(
        f"{held.name}: nothing at or after as_of",
        is_wrong,
        lambda row: {"request": row, "as_of_us": int(as_of[row])},
        "all requests",
    )


def check_line(oracle: Oracle, name: str, days: Days) -> Check:
    """No token may come from weights that saw a later event of the source than its reader may."""
    rows = [row | {"ranker_day": days.start} for row in oracle.protocol(None).to_pylist()]
    failing = [
        {"version": row["version"], "tokens": row["num"], "why": broken_protocol(row)}
        for row in rows
    ]
    failing = [row for row in failing if row["why"]]
    return Check(
        name=f"{name}: compressor line is neutral",
        rows=len(rows),
        differences=len(failing),
        passed=not failing and bool(rows),
        note=f"line {oracle.line}",
        failing=failing[:5],
    )


def disturbed(
    held: SourceHistory,
    source: SourceLine,
    lake: str,
    asked: Asked,
    data: RankerData,
    folder: Path,
    seed: int,
) -> tuple[SourceHistory, str]:
    """The source for the same requests, from a lake in which all that they may not see is another;
    and how much of it is."""
    zero = np.zeros(len(asked), np.int64)
    columns = {name: getattr(asked, name) for name in ("user_id", "as_of_us", "item_id")}
    columns |= {f"bucket_{f.name}": zero for f in source.domain.side_features}
    other = str(folder / "lake")
    sample = Sample(pa.table(columns))
    made = disturb(lake, other, source.domain, source.line, sample, seed)
    index = UserIndex.build(other, source.domain, folder / "index", days=None, lines=[source.line])
    user = torch.full_like(data.tensors.user_G, NOBODY)
    user[torch.from_numpy(asked.request)] = torch.from_numpy(made.user_id).to(user.device)
    again = SourceHistory.of(index, source.line, user, data.tensors.as_of_G, name=held.name)
    return again, made.summary.rpartition(",")[0]


def noisy_ranker(data: RankerData, config: RankerConfig, ranker: str, seed: int) -> nn.Module:
    """A ranker of the data in which no parameter is zero and so hides what it multiplies: what
    moves no input of it moves no ranker."""
    model = make_ranker(ranker, config, data.inputs, data.vocabulary, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.to(data.device).eval()


@torch.no_grad()
def logits(model: nn.Module, data: RankerData, config: RankerConfig, asked: Asked) -> Array:
    """[n, most samples of a request]; NaN never, 0 where a request has fewer."""
    pieces = np.flatnonzero(np.isin(data.pieces.request, asked.request))
    row = np.searchsorted(asked.request, data.pieces.request[pieces])
    found = np.zeros((len(asked), data.piece_size * (int(np.bincount(row).max()))), np.float32)
    used = np.zeros(len(asked), np.int64)
    for start in range(0, len(pieces), BATCH):
        part = pieces[start : start + BATCH]
        batch = data.batch(part, config)
        logit, mask = model(batch).float().cpu().numpy(), batch.mask_RC.cpu().numpy()
        for k, values, is_there in zip(row[start : start + BATCH], logit, mask, strict=True):
            kept = values[is_there]
            found[k, used[k] : used[k] + len(kept)] = kept
            used[k] += len(kept)
    return found


def check_reach(
    model: nn.Module, data: RankerData, config: RankerConfig, asked: Asked, before: Array
) -> Check:
    """The proof has teeth: other tokens in place of those that may be seen move the logits of
    whoever sees any, and of nobody else."""
    others = []
    for held in data.sources:
        moved: Tensor = held.store.token_ND + 1
        others.append(held.with_store(held.store.with_tokens(moved, held.store.available_us_N)))
    after = logits(model, data.with_sources(others), config, asked)
    request = torch.from_numpy(asked.request)
    sees_any = torch.stack([s.num_visible_G.cpu()[request] > 0 for s in data.sources]).any(dim=0)
    is_wrong = (before != after).any(axis=1) != sees_any.numpy()
    return check(
        "other tokens move the logits of who sees any",
        is_wrong,
        lambda row: asked.show(row, sees_any=bool(sees_any[row])),
        f"{int(sees_any.sum())} requests see any",
    )
