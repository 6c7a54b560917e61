"""Arms over the same samples: what instance tokens add to a strong ranker, with the controls that
make it honest.

FINDINGS of the design: rules of evidence. Every arm but "no history" holds match features over the
whole past and a
sequence with target attention; untrained and shuffled tokens stand beside trained ones.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from compressor import data as streams
from compressor.configs import Order, SourceConfig, Stored, TrainingConfig
from compressor.data import DAY_US, StreamData
from compressor.item_tokens import item_token_days
from compressor.nn.embedding import Vocabulary
from compressor.training import metrics
from compressor.walk import Trainer, fit, walk
from downstream.configs import RankerConfig, RankerTraining, arm
from downstream.data import RankerData, with_shuffled_tokens
from downstream.index_arrays import ItemArrays, LineArrays
from downstream.samples import Samples
from downstream.streaming import RankerTrainer
from downstream.streaming import fit as fit_ranker
from downstream.streaming import walk as walk_ranker
from downstream.user_index import IndexStore
from jobs import progress
from pipelines.days import as_date
from pipelines.domain import Domain

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One row of the comparison: which parts the ranker has and whose tokens it reads."""

    name: str
    parts: str
    """An arm of downstream.configs."""
    line: str = ""
    is_shuffled: bool = False
    beside: tuple[str, ...] = ()
    """Arms, other than the base, from which its difference is told."""


BASE = "base"
USER, USER_ITEM = "+ user-order tokens", "+ user-order and item tokens"
UNTRAINED, UNTRAINED_ITEM = "+ untrained tokens", "+ untrained and item tokens"
QUICK_ARMS = (
    Arm(name="no history", parts="none"),
    Arm(name=BASE, parts="base"),
    Arm(name="+ all logged fields, end to end", parts="end-to-end"),
    Arm(name="+ temporal-order tokens", parts="tokens", line="temporal", beside=(UNTRAINED,)),
    Arm(
        name=USER,
        parts="tokens",
        line="user",
        beside=("+ temporal-order tokens", UNTRAINED),
    ),
    Arm(name=USER_ITEM, parts="match", line="user", beside=(UNTRAINED_ITEM,)),
    Arm(name=UNTRAINED, parts="tokens", line="untrained"),
    Arm(name=UNTRAINED_ITEM, parts="match", line="untrained"),
)
FULL_ARMS = (
    *QUICK_ARMS,
    Arm(name=f"{USER}, shuffled", parts="tokens", line="user", is_shuffled=True, beside=(USER,)),
    Arm(
        name="+ temporal-order and item tokens",
        parts="match",
        line="temporal",
        beside=(UNTRAINED_ITEM,),
    ),
    Arm(name="user-order tokens only", parts="tokens-only", line="user"),
)
ALL_USERS_ARMS = (
    Arm(name=f"{USER}, all users", parts="tokens", line="user-all", beside=(USER,)),
    Arm(
        name=f"{USER_ITEM}, all users",
        parts="match",
        line="user-all",
        beside=(USER_ITEM, f"{UNTRAINED_ITEM}, all users"),
    ),
    Arm(
        name="+ temporal-order and item tokens, all users",
        parts="match",
        line="temporal-all",
        beside=(f"{USER_ITEM}, all users", f"{UNTRAINED_ITEM}, all users"),
    ),
    Arm(name=f"{UNTRAINED_ITEM}, all users", parts="match", line="untrained-all"),
)
VARIANT_ARMS = (
    Arm(name=f"{USER}, stored after SIT", parts="tokens", line="user-post-sit", beside=(USER,)),
    Arm(name=f"{USER}, read by DIN", parts="tokens-din", line="user", beside=(USER,)),
    Arm(
        name=f"{USER}, no past labels in the branch",
        parts="tokens-unlabelled",
        line="user",
        beside=(USER,),
    ),
)
"""What papers/iat 1.12 orders beside "+ user-order tokens": the same, with one choice of the design
undone. Where a log has fields known only after the event, tokens stored after SIT lack them too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """How a compressor line of the comparison is made."""

    name: str
    order: Order
    is_trained: bool = True
    is_all_users: bool = False
    stored: Stored = "pre-sit"
    """Training is the same either way."""


LINES = {
    line.name: line
    for line in (
        Line(name="temporal", order="temporal"),
        Line(name="user", order="user"),
        Line(name="user-post-sit", order="user", stored="post-sit"),
        Line(name="untrained", order="user", is_trained=False),
        Line(name="temporal-all", order="temporal", is_all_users=True),
        Line(name="user-all", order="user", is_all_users=True),
        Line(name="untrained-all", order="user", is_trained=False, is_all_users=True),
    )
}


@dataclass(frozen=True, slots=True)
class Predictions:
    """One arm's scores of samples it had not been trained on."""

    sample: Array
    score: Array
    seconds: float
    num_rows: int
    """Candidates that passed through training."""
    seed: int = 0


def run_arm(
    chosen: Arm,
    data: RankerData,
    ranker: str,
    config: RankerConfig,
    training: RankerTraining,
    days: range,
    *,
    test_from: int | None = None,
) -> Predictions:
    """Train and predict one arm: streaming over `days`, or frozen (fit before `test_from`, predict
    the rest)."""
    started = time.perf_counter()
    if chosen.is_shuffled:
        data = data.with_store(with_shuffled_tokens(data.store, training.seed))
    trainer = RankerTrainer.create(ranker, arm(chosen.parts, config), training, data)
    if test_from is None:
        results = list(progress.ticked(walk_ranker(trainer, data, days)))
        sample, score = (
            np.concatenate([r.sample for r in results]),
            np.concatenate([r.score for r in results]),
        )
    else:
        for _ in fit_ranker(trainer, data, range(days.start, test_from)):
            pass
        sample, score = trainer.predict(data, data.of_days(test_from, days.stop))
    seconds = time.perf_counter() - started
    return Predictions(sample, score, seconds, trainer.num_rows, training.seed)


@dataclass(frozen=True, slots=True)
class LineResult:
    """A line's tokens of every event of a stream, in (user, time, instance) order, and its item
    tokens."""

    tokens: LineArrays
    source_auc: float
    seconds: float
    drift: list[tuple[int, float]] = field(default_factory=list)
    """(day, mean cosine of that day's stored tokens against the last weights'); none for tokens
    stored post-SIT."""


def make_line(
    line: Line,
    data: StreamData,
    domain: Domain,
    vocabulary: Vocabulary,
    days: range,
    source: SourceConfig,
    training: TrainingConfig,
    device: str,
    *,
    frozen_at: int | None = None,
) -> LineResult:
    """Walk the days (or fit on those before `frozen_at`) and keep all tokens in memory."""
    started = time.perf_counter()
    config = replace(source, order=line.order)
    trainer = Trainer.create(config, training, domain, vocabulary, device)
    token = np.zeros((len(data.events), config.bottleneck), np.float16)
    rows: list[Array] = []
    scores: list[Array] = []
    if frozen_at is None:
        for result in walk(
            trainer, data, list(days), is_training=line.is_trained, stored=line.stored
        ):
            token[data.event_before[result.event_row]] = result.token
            rows.append(result.row)
            scores.append(result.score)
    else:
        if line.is_trained:
            for _ in fit(trainer, data, range(days.start, frozen_at)):
                pass
        if line.stored == "post-sit":
            event_row, read = trainer.tokens_after_sit(data, data.day_units())
            token[data.event_before[event_row]] = read
        else:
            token[:] = trainer.tokens(data, data.events)
        row, score = trainer.predict(data, data.day_units(range(frozen_at, days.stop)))
        rows.append(row)
        scores.append(score)
    label = data.tensors.label_N.cpu().numpy()[np.concatenate(rows)]
    known = ~np.isnan(label)
    source_auc = metrics.auc(label[known], np.concatenate(scores)[known])
    tokens = line_arrays(data, token, domain)
    drift = drift_of(trainer, data, token) if line.stored == "pre-sit" else []
    return LineResult(tokens, source_auc, time.perf_counter() - started, drift)


def line_arrays(data: StreamData, token: Array, domain: Domain) -> LineArrays:
    """Tokens [E, D] with the moments they may be read from, and the item tokens they sum to."""
    event_day = data.day[data.events]
    items = item_token_days(data.item_id[data.events], event_day, token)
    delay_us = domain.tokens.delay_us
    item_available_us = (items.day.astype(np.int64) + 1) * DAY_US + delay_us
    found = ItemArrays.of(items.item_id, item_available_us, items.decayed_sum, items.decayed_count)
    return LineArrays(token, (event_day + 1) * DAY_US + delay_us, found)


def drift_of(
    trainer: Trainer, data: StreamData, token: Array, num_days: int = 12
) -> list[tuple[int, float]]:
    """Cosine of stored tokens against the same events under the last weights, on days spread over
    the range."""
    event_day = data.day[data.events]
    days = np.unique(event_day)
    found = []
    for day in days[np.linspace(0, len(days) - 1, min(num_days, len(days))).astype(int)]:
        at = np.flatnonzero(event_day == day)[:2000]
        now, then = (
            trainer.tokens(data, data.events[at]).astype(np.float32),
            token[at].astype(np.float32),
        )
        norm = np.linalg.norm(now, axis=1) * np.linalg.norm(then, axis=1)
        found.append((int(day), float(((now * then).sum(1) / np.maximum(norm, 1e-6)).mean())))
    return found


def store_of(store: IndexStore, line: LineArrays) -> IndexStore:
    """The same histories with a line's tokens."""
    return store.with_tokens(line.token, line.available_us, line.items)


def restrict(result: LineResult, keep: Array) -> LineResult:
    """The tokens of some events only (a ranker's users); item tokens stay those of all users."""
    tokens = LineArrays(
        result.tokens.token[keep], result.tokens.available_us[keep], result.tokens.items
    )
    return LineResult(tokens, result.source_auc, result.seconds, result.drift)


WINDOW_METRICS = ("auc", "gauc", "log_loss", "normalised_entropy")


SplitBy = Literal["days", "rows"]


def border(samples: Samples, days: range, share: float, by: SplitBy = "days") -> int:
    """The day on which a share of the days, or of the labelled samples, has passed.

    A log whose events crowd into few of its days has next to no samples in its last days.
    """
    if by == "days" or not 0 < share < 1:
        return days.start + round(len(days) * share)
    day = samples.as_of_us[~np.isnan(samples.label)] // DAY_US
    return int(np.quantile(day, share, method="lower")) if len(day) else days.stop


def window(
    samples: Samples, days: range, first_share: float, last_share: float, by: SplitBy = "days"
) -> Array:
    """Samples of the days between two borders, label known."""
    begin, end = (border(samples, days, share, by) for share in (first_share, last_share))
    day = samples.as_of_us // DAY_US
    return (day >= begin) & (day < end) & ~np.isnan(samples.label)


def scores_of(predictions: Predictions, num_samples: int) -> Array:
    """Scores by sample; NaN where not predicted."""
    out = np.full(num_samples, np.nan, np.float64)
    out[predictions.sample] = predictions.score
    return out


@dataclass(frozen=True, slots=True)
class WindowScores:
    """The rows of a window that every arm and seed has predicted."""

    user: Array
    label: Array
    scores: Mapping[str, Array]
    """[seeds, rows] by arm."""
    arms: Mapping[str, Sequence[Predictions]]

    def of(self, arm: Arm) -> WindowScores:
        """What the arm's row is made of: the arm, the base and the arms that it stands beside."""
        kept = [n for n in (arm.name, BASE, *arm.beside) if n in self.scores]
        arms = {n: [replace(p, sample=_NONE, score=_NONE) for p in self.arms[n]] for n in kept}
        return WindowScores(self.user, self.label, {n: self.scores[n] for n in kept}, arms)


_NONE = np.zeros(0)


def on_window(
    arms: Mapping[str, Sequence[Predictions]], samples: Samples, inside: Array
) -> WindowScores:
    """Scores of all arms on the window's samples."""
    at = np.flatnonzero(inside)
    scores = {
        name: np.stack([scores_of(p, len(samples))[at] for p in found])
        for name, found in arms.items()
    }
    predicted = np.ones(len(at), bool)
    for of_arm in scores.values():
        predicted &= ~np.isnan(of_arm).any(axis=0)
    scores = {name: of_arm[:, predicted] for name, of_arm in scores.items()}
    at = at[predicted]
    return WindowScores(samples.user_id[at], samples.label[at], scores, dict(arms))


SHORT = {"log_loss": "logloss", "normalised_entropy": "ne"}
DIFFERENCES = {"auc": "diff_auc", "gauc": "diff_gauc", "log_loss": "diff_logloss"}


def arm_row(
    name: str, held: WindowScores, *, beside: Sequence[str] = (), bootstraps: int = 200
) -> dict[str, Any]:
    """An arm's metrics with intervals over users (mean over seeds), and its differences to the base
    over users and the seeds that both have; under "beside", AUC differences to other arms."""
    user, label, found = held.user, held.label, held.arms[name]
    row: dict[str, Any] = {"name": name, "num_rows": len(label), "num_seeds": len(found)}
    by_seed = [
        metrics.user_bootstrap(user, label, score, WINDOW_METRICS, num=bootstraps)
        for score in held.scores[name]
    ]
    for metric in WINDOW_METRICS:
        key = SHORT.get(metric, metric)
        value, low, high = np.mean([drawn[metric] for drawn in by_seed], axis=0)
        row |= {key: float(value), f"{key}_low": float(low), f"{key}_high": float(high)}
    if name != BASE and _paired_seeds(held, name, BASE):
        row["paired_seeds"] = _paired_seeds(held, name, BASE)
        for metric, key in DIFFERENCES.items():
            value, low, high = _difference(held, name, BASE, metric, bootstraps)
            short = "diff" if metric == "auc" else key
            row |= {key: value, f"{short}_low": low, f"{short}_high": high}
    others = [other for other in beside if _paired_seeds(held, name, other)]
    if others:
        row["beside"] = {
            other: dict(
                zip(
                    ("diff_auc", "diff_low", "diff_high"),
                    _difference(held, name, other, "auc", bootstraps),
                    strict=True,
                )
            )
            for other in others
        }
    row["seconds"] = float(np.mean([p.seconds for p in found]))
    row["trained_rows"] = int(np.mean([p.num_rows for p in found]))
    return row


def _paired_seeds(held: WindowScores, name: str, other: str) -> list[int]:
    theirs = [p.seed for p in held.arms.get(other, ())]
    return [p.seed for p in held.arms[name] if p.seed in theirs]


def _difference(
    held: WindowScores, name: str, other: str, metric: str, bootstraps: int
) -> metrics.Interval:
    """One arm less another, over users and the seeds that both have."""
    paired = _paired_seeds(held, name, other)
    ours, theirs = (
        held.scores[n][[[p.seed for p in held.arms[n]].index(seed) for seed in paired]]
        for n in (name, other)
    )
    return metrics.paired_difference(held.user, held.label, ours, theirs, metric, num=bootstraps)


def summarise(
    arms: Mapping[str, Sequence[Predictions]],
    samples: Samples,
    inside: Array,
    *,
    bootstraps: int = 200,
) -> list[dict[str, Any]]:
    """One row per arm on the window's samples (`arm_row`)."""
    held = on_window(arms, samples, inside)
    return [arm_row(name, held, bootstraps=bootstraps) for name in arms]


def weekly_auc(samples: Samples, predictions: Predictions, days: range) -> list[dict[str, Any]]:
    """Progressive AUC week by week."""
    score = scores_of(predictions, len(samples))
    week = (samples.as_of_us // DAY_US - days.start) // 7
    is_known = ~np.isnan(score) & ~np.isnan(samples.label)
    found = []
    for number in np.unique(week[is_known]):
        at = is_known & (week == number)
        start = as_date(days.start) + timedelta(days=int(number) * 7)
        found.append({"start": str(start), "auc": metrics.auc(samples.label[at], score[at])})
    return found


def stream_of(rows: Any, domain: Domain, device: str) -> tuple[StreamData, Vocabulary]:
    """Stream rows as device-resident data with a vocabulary of all of them."""
    vocabulary = streams.vocabulary_of(rows, domain)
    return streams.load(rows, domain, vocabulary, device), vocabulary


def quiet_threads(num: int) -> None:
    """Limit torch's threads, for several processes on one machine."""
    torch.set_num_threads(num)
