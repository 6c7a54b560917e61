"""Which users and which days are for what: deterministic, by hash and by date."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def users_kept(user_id: npt.NDArray[np.int64], share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Whether each row's user is in a random `share` of users: a function of (user_id, seed)
    alone."""
    with np.errstate(over="ignore"):
        state = user_id.astype(np.int64).view(np.uint64) ^ np.uint64(
            (seed + 1) * 0x9E3779B97F4A7C15 % 2**64
        )
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
        state ^= state >> np.uint64(31)
    return (state >> np.uint64(11)).astype(np.float64) / 2**53 < share
