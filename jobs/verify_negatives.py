"""Do sampled negatives give themselves away? What needs no user must not tell them from real rows.

As-of popularity and as-of recency of the candidate item know nothing of the user, so over real rows
and their same-day negatives each alone scores AUC .5; drawn from the same week, recency scores .44
(FINDINGS.md section 1.1). "As of" is the streaming protocol's: events strictly before the row's
*day*, which is all that weights and item tokens of the day before have seen. Events of the same day
before the instant are no fair measure: a negative was sold that day by construction, the positive's
own sale is the row itself. Both are in the notes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from compressor.training.metrics import user_bootstrap
from jobs.oracle import Oracle
from jobs.verify_checks import Check
from pipelines.days import Days

TOLERANCE = 0.015
MAX_ROWS = 400_000
RULE = f"95% interval over users holds .5, or |AUC - .5| < {TOLERANCE}"
NEVER_DAYS = 1e6
"""Recency of an item never sold before: longer ago than anything."""
SCORES = {
    "popularity": "as-of popularity of negatives",
    "recency": "as-of recency of negatives",
    "taken": "the user's own same-day events",
}


def check_negatives(oracle: Oracle, days: Days | None, seed: int) -> list[Check]:
    """AUC of each score alone, real rows against sampled ones, by day (and by instant in notes)."""
    rows = candidates(oracle, days, seed)
    is_real = ~np.asarray(rows.column("is_sampled").to_numpy(zero_copy_only=False), bool)
    if oracle.domain.negatives is None or is_real.all() or not is_real.any():
        note = "the domain samples no negatives"
        return [
            Check(name=name, rows=0, differences=0, passed=None, note=note)
            for name in SCORES.values()
        ]
    user = rows.column("user").to_numpy()
    checks = []
    for score, name in SCORES.items():
        found = user_bootstrap(user, is_real, _scores(rows, score), ["auc"], seed=seed)["auc"]
        is_fair = found.low <= 0.5 <= found.high or abs(found.value - 0.5) < TOLERANCE
        note = f"AUC {found.value:.4f} [{found.low:.4f}, {found.high:.4f}]"
        if score != "taken":
            now = user_bootstrap(
                user, is_real, _scores(rows, f"{score}_now"), ["auc"], num=1, seed=seed
            )
            note += f"; by instant {now['auc'].value:.4f}"
        failing = [] if is_fair else [{"score": score, "auc": found.value, "rule": RULE}]
        checks.append(
            Check(
                name=name, rows=len(is_real), differences=int(not is_fair), passed=is_fair,
                note=note, failing=failing,
            )
        )  # fmt: skip
    return checks


def candidates(oracle: Oracle, days: Days | None, seed: int) -> pa.Table:
    """Rows of random users, with what the item's past by anyone says before their day and instant.

    Columns: user, is_sampled, popularity and recency (days; null: never), the same `_now` as of the
    instant, and taken: whether the user took the item earlier that day.
    """
    asked = f"AND {days.predicate()}" if days else ""
    counts = oracle.table(
        f"""SELECT user_id, count(*) AS num FROM samples WHERE true {asked}
        GROUP BY user_id ORDER BY user_id"""
    )
    users = np.asarray(counts.column("user_id").to_numpy(), np.int64)
    order = np.random.default_rng(seed).permutation(len(users))
    total = np.cumsum(np.asarray(counts.column("num").to_numpy())[order])
    chosen = users[order[: max(1, int(np.searchsorted(total, MAX_ROWS)))]] if len(users) else users
    oracle.sql.register("chosen_users", pa.table({"user_id": chosen}))
    for name, query in STEPS.items():
        oracle.run(f"CREATE OR REPLACE TEMP TABLE {name} AS {query.format(asked=asked)}")
    return oracle.table(
        """SELECT a.user, a.is_sampled,
                  d.popularity::DOUBLE AS popularity, date_diff('day', d.day, a.day) AS recency,
                  n.popularity::DOUBLE AS popularity_now,
                  (a.event_us - n.event_us) / 86400e6 AS recency_now,
                  coalesce(o.first_us < a.event_us, false)::DOUBLE AS taken
        FROM asked a
        ASOF LEFT JOIN by_day d ON d.item_key = a.item_key AND d.day < a.day
        ASOF LEFT JOIN by_instant n ON n.item_key = a.item_key AND n.event_us < a.event_us
        LEFT JOIN own o
            ON o.user_key = a.user_key AND o.item_key = a.item_key AND o.day = a.day
        ORDER BY a.instance_id"""
    )


# Each step is stored before the next: a plan over the lake's files knows no sizes, and chose joins
# that took minutes in place of seconds.
STEPS = {
    "row": """SELECT instance_id, user_key, user_id AS user, item_key, event_date AS day,
        epoch_us(event_time) AS event_us, is_sampled FROM instances
        WHERE user_id IN (SELECT user_id FROM chosen_users) {asked}""",
    "asked": "SELECT * FROM row SEMI JOIN samples s USING (instance_id)",
    "event": """SELECT item_key, user_key, event_date AS day, epoch_us(event_time) AS event_us
        FROM instances WHERE NOT is_sampled""",
    "by_day": """SELECT item_key, day,
        sum(count(*)) OVER (PARTITION BY item_key ORDER BY day) AS popularity
        FROM event GROUP BY item_key, day""",
    "by_instant": """SELECT item_key, event_us,
        sum(count(*)) OVER (PARTITION BY item_key ORDER BY event_us) AS popularity
        FROM event GROUP BY item_key, event_us""",
    "own": """SELECT user_key, item_key, day, min(event_us) AS first_us
        FROM event WHERE user_key IN (SELECT user_key FROM asked) GROUP BY ALL""",
}


def _scores(rows: pa.Table, name: str) -> npt.NDArray[Any]:
    """A column as scores: popularity as log counts, recency of a new item as endless."""
    missing = NEVER_DAYS if name.startswith("recency") else 0
    values = np.asarray(rows.column(name).fill_null(missing).to_numpy(), np.float64)
    return np.log1p(values) if name.startswith("popularity") else values
