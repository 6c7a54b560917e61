"""Batches for a training loop of one's own: shuffled, resumable at the exact batch, split by rank.

An epoch's order is a function of (seed, epoch) alone, the same on every device and for every number
of ranks. It is dealt out in rounds of `world_size` batches, a block of the order to each rank; what
is left for the last round is dealt out evenly. So every piece is in exactly one batch of one rank,
and all ranks have equally many batches of one shape: short ones are filled up with pieces of
nothing (mask False, sample -1, label NaN), which no loss or gradient sees, and where fewer pieces
are left than ranks, some ranks' last batch holds nothing else.

The device is never waited for, and per batch nothing is copied to it: it sorts the epoch's order
itself, and looks up there which pieces a batch holds.

Shape legend: P pieces of the days, T batches, R pieces of a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compressor.training.capture import Captured
from downstream.batch import RankerBatch
from downstream.configs import RankerConfig
from downstream.data import RankerData
from downstream.samples import Array
from pipelines.errors import InputError

AT_ONCE = 256
"""Batches whose pieces are looked up together."""
BITS = 2**64


class RankerLoader:
    """One pass over the days' pieces each time it is iterated over; `len` is a pass's batches.

    A pass that was left goes on at its next batch, here or, from `state_dict`, in a later process.
    """

    def __init__(
        self,
        data: RankerData,
        config: RankerConfig,
        *,
        days: range,
        pieces_a_batch: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shuffle: bool = True,
        known_before_us: int | None = None,
        captured: bool = False,
    ) -> None:
        """Of all pieces whose request is on `days` (since 1970).

        Args:
            config: what a batch holds (`RankerData.batch`).
            pieces_a_batch: of each rank.
            shuffle: False: by time, for scoring.
            known_before_us: labels known at this moment or later are unknown.
            captured: on a CUDA device, a batch is one launch and lies where the one before it lay:
                read it, or copy it, before the next one.

        Raises:
            InputError: sizes that do not fit, or days without any sample.
        """
        if pieces_a_batch < 1:
            raise InputError(f"pieces_a_batch must be at least 1, got {pieces_a_batch}")
        if world_size < 1 or not 0 <= rank < world_size:
            raise InputError(
                "world_size must be at least 1 and rank in [0, world_size), "
                f"got rank {rank} of {world_size}"
            )
        if days.step != 1:
            raise InputError(f"days must follow each other, got {days}")
        if captured and data.device.type != "cuda":
            raise InputError(
                f"captured batches need a CUDA device, and the data is on {data.device}"
            )
        self._piece_P = data.of_days(days.start, days.stop)
        if not len(self._piece_P):
            raise InputError(f"no sample is on days [{days.start}, {days.stop}) since 1970")
        self.data, self.config, self.days = data, config, days
        self.pieces_a_batch, self.seed, self.shuffle = pieces_a_batch, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.known_before_us, self.captured = known_before_us, captured
        self.epoch, self.next_batch = 0, 0
        """Where the next iteration begins."""
        held, none_3 = data.pieces, np.zeros((3, 1), np.int64)
        of_3P = np.stack([held.size, held.start, held.request])[:, self._piece_P]
        self._piece_3X = torch.from_numpy(np.hstack([of_3P, none_3])).to(data.device)
        if config.item_tokens:
            # Found once for all samples, by copies that wait: not in the middle of a pass.
            _ = data.item_row_n
        self._graph: Captured[RankerBatch] | None = None
        self._piece_3R = self._piece_3X.new_zeros(3, pieces_a_batch)

    def __len__(self) -> int:
        return -(-len(self._piece_P) // (self.pieces_a_batch * self.world_size))

    def __iter__(self) -> Iterator[RankerBatch]:
        """The rest of the epoch; afterwards the next one."""
        epoch, num = self.epoch, len(self)
        order_P = self._order(epoch)
        for start in range(self.next_batch, num, AT_ONCE):
            place_TR = self._places(start, min(start + AT_ONCE, num))
            # Place -1, of nothing, is the last column.
            place_TR = torch.where(place_TR >= 0, order_P[place_TR], -1)
            piece_3TR = self._piece_3X[:, place_TR]
            for batch, piece_3R in enumerate(piece_3TR.unbind(1), start=start):
                self.epoch, self.next_batch = divmod(epoch * num + batch + 1, num)
                yield self._gather(piece_3R)

    def pieces(self, epoch: int, batch: int) -> Array:
        """Which of the data's pieces a batch holds, in order; waits for the device."""
        (place_R,) = self._places(batch, batch + 1)
        return self._piece_P[self._order(epoch)[place_R[place_R >= 0]].cpu().numpy()]

    def state_dict(self) -> dict[str, Any]:
        """Where the loader is, as JSON holds it: the same on every rank."""
        return {**self._identity(), "epoch": self.epoch, "batch": self.next_batch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at the batch after the last one that was given when `state` was taken.

        Raises:
            InputError: a state of a loader of other samples, seed or sizes: its next batch is none
                of this one's.
        """
        for name, mine in self._identity().items():
            if state.get(name) != mine:
                raise InputError(
                    f"this state is of a loader whose {name} was {state.get(name)}, and here it is "
                    f"{mine}; load it into a loader made as that one was"
                )
        epoch, batch = int(state["epoch"]), int(state["batch"])
        if epoch < 0 or not 0 <= batch < len(self):
            raise InputError(f"this state is at batch {batch} of epoch {epoch}, which is none")
        self.epoch, self.next_batch = epoch, batch

    def _identity(self) -> dict[str, Any]:
        """What the order of batches, and what they hold of the samples, depends on."""
        return {
            "samples": self._digest,
            "days": [self.days.start, self.days.stop],
            "pieces_a_batch": self.pieces_a_batch,
            "world_size": self.world_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "known_before_us": self.known_before_us,
        }

    @cached_property
    def _digest(self) -> str:
        """Of the samples, and of how they are cut into pieces."""
        found, held = hashlib.blake2b(digest_size=16), self.data.pieces
        for array in (self.data.samples.instance_id[held.order], held.start, held.size):
            found.update(np.ascontiguousarray(array).data)
        return found.hexdigest()

    def _order(self, epoch: int) -> Tensor:
        """[P] The places of the days' pieces, as the epoch has them."""
        num, device = len(self._piece_P), self.data.device
        if not self.shuffle:
            return torch.arange(num, device=device)
        return shuffled(num, self.seed, epoch, device)

    def _places(self, start: int, stop: int) -> Tensor:
        """[T, R] Where in the epoch's order the pieces of this rank's batches are; -1: nothing."""
        size, world, device = self.pieces_a_batch, self.world_size, self.data.device
        batch_T1 = torch.arange(start, stop, device=device)[:, None]
        step_R = torch.arange(size, device=device)
        place_TR = (batch_T1 * world + self.rank) * size + step_R
        num_rounds, num_left = divmod(len(self._piece_P), size * world)
        if num_left and stop > num_rounds:
            first, end = (num_left * r // world for r in (self.rank, self.rank + 1))
            place_R = num_rounds * size * world + first + step_R
            place_TR[-1] = torch.where(step_R < end - first, place_R, -1)
        return place_TR

    def _gather(self, piece_3R: Tensor) -> RankerBatch:
        if not self.captured:
            return self._batch(piece_3R)
        if self._graph is None:
            self._graph = Captured(lambda: self._batch(self._piece_3R))
        self._piece_3R.copy_(piece_3R)
        self._graph.replay()
        return self._graph.result

    def _batch(self, piece_3R: Tensor) -> RankerBatch:
        return self.data.gather(piece_3R, self.data.piece_size, self.config, self.known_before_us)


def shuffled(num: int, seed: int, epoch: int, device: torch.device | str = "cpu") -> Tensor:
    """[num] A permutation of 0 .. num - 1: a function of (num, seed, epoch), whatever the device.

    Numbers are sorted by a hash (splitmix64's finalizer, Steele et al., OOPSLA 2014) that gives no
    two of them the same value.
    """
    key = _mixed(_mixed(seed % BITS) + epoch % BITS)
    x_P = torch.arange(num, device=device) * _signed(0x9E3779B97F4A7C15) + _signed(key)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x_P = (x_P ^ _shifted(x_P, shift)) * _signed(factor)
    return torch.argsort(x_P ^ _shifted(x_P, 31))


def _shifted(x_P: Tensor, by: int) -> Tensor:
    """To the right, as of unsigned numbers."""
    return (x_P >> by) & (2 ** (64 - by) - 1)


def _signed(value: int) -> int:
    """The int64 of the same bits."""
    return value - BITS if value >= BITS // 2 else value


def _mixed(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) % BITS
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ (value >> shift)) * factor % BITS
    return value ^ (value >> 31)
