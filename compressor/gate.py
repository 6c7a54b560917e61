"""Is a day's training sane? Its figures against those of the week before (a gate of daily runs).

A day is predicted with the weights of the day before it, so its AUC and log loss say as much of the
day (labels that went missing, features that broke) as of the weights; the training loss says
whether the steps diverged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median, stdev
from typing import NamedTuple

from pipelines.errors import InputError

TRAILING_DAYS = 7
ENOUGH_DAYS = 3
"""Days of the week before that a figure needs to be judged by."""
SURE = 3.0
"""Standard deviations beyond which a day's AUC is not chance: of the day's own rows, or of the days
of the week before, which of few users differ by more than their rows say."""


class DayFigures(NamedTuple):
    """What a walk tells of one day; NaN where nothing was labelled or trained on."""

    auc: float
    """Of the day's rows, predicted before training on the day."""
    log_loss: float
    """Of the same."""
    loss: float
    """Mean over the training steps of the day."""
    positives: int
    negatives: int

    @property
    def auc_error(self) -> float:
        """Standard error of the AUC (Hanley and McNeil, 1982); infinite where one class is
        missing."""
        if not self.positives or not self.negatives:
            return math.inf
        a = self.auc
        first, second = a / (2 - a), 2 * a * a / (1 + a)
        spread = (self.positives - 1) * (first - a * a) + (self.negatives - 1) * (second - a * a)
        return math.sqrt(max(0.0, a * (1 - a) + spread) / (self.positives * self.negatives))


@dataclass(frozen=True, kw_only=True, slots=True)
class GateLimits:
    """How far a day's figures may be from the medians of the week before."""

    auc_drop: float = 0.05
    """Of AUC, below; three standard deviations, if those are more."""
    loss_rise: float = 0.5
    """Of the log loss and of the training loss, above, as a share."""

    def __post_init__(self) -> None:
        if not 0 < self.auc_drop <= 1 or self.loss_rise <= 0:
            raise InputError(
                f"--auc-drop must be above 0 and at most 1, and --loss-rise above 0: got "
                f"{self.auc_drop} and {self.loss_rise}"
            )


class RefusedError(Exception):
    """A day's training is not kept."""


Gate = Callable[[DayFigures], None]
"""Raises RefusedError where a day's training must not be kept."""


def why_refused(day: DayFigures, week: Sequence[DayFigures], limits: GateLimits) -> str:
    """What is wrong with the day; empty where nothing is, or where the week is too short to say."""
    if math.isinf(day.loss):
        return "its training loss is not finite"
    bars = (
        ("AUC", day.auc, -1.0, [d.auc for d in week]),
        ("log loss", day.log_loss, 1.0, [d.log_loss for d in week]),
        ("training loss", day.loss, 1.0, [d.loss for d in week]),
    )
    for name, value, sign, before in bars:
        held = [each for each in before if math.isfinite(each)]
        if math.isnan(value) or len(held) < ENOUGH_DAYS:
            continue
        usual = median(held)
        most = limits.loss_rise * usual
        if name == "AUC":
            most = max(limits.auc_drop, SURE * day.auc_error, SURE * stdev(held))
        if sign * (value - usual) > most:
            return (
                f"its {name} is {value:.4f}, and {usual:.4f} in the week before "
                f"(at most {most:.4f} {'above' if sign > 0 else 'below'} it)"
            )
    return ""
