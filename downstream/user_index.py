"""Histories and tokens of all users, user-major and memory-mapped, and the TokenStore over them.

One folder holds arrays of rows and says which rows are whose, built once from the lake's tables and
then extended by what they have gained; a user's past as of a moment is found by binary search.
Rules of time: DESIGN.md section 5.

Shape legend: B queries, L sequence length, D token width, N rows, S id slots, M numbers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from downstream.index_arrays import (
    FIELD_ARRAYS,
    KEY_ARRAYS,
    USERS,
    Array,
    ItemArrays,
    LineArrays,
    Meta,
    histories_of,
    line_of,
    load,
    load_line,
    load_segments,
    user_major_order,
)
from downstream.segments import Segments, SegmentTensors
from downstream.token_store import HistoryRow, ItemRow, ItemTokens, Tokens
from pipelines.days import Days
from pipelines.domain import Domain
from pipelines.errors import InputError

IN_MEMORY = "memory"
"""The line's name in an index made from arrays."""
LINE = 64
"""Bytes of a line of a processor's caches."""
FILLED = 0.7
"""Of a CUDA device's free memory, that tokens may take; the rest is for what is computed."""


@dataclass(frozen=True)
class UserIndex:
    """Arrays of events, and whose they are: a user's in order of (event_time, instance_id).

    Side columns are called as in the table; an unknown label is -1 and its label_time_us NEVER_US.
    """

    meta: Meta
    users: Segments
    arrays: Mapping[str, Array]
    lines: Mapping[str, LineArrays]

    @classmethod
    def build(
        cls,
        lake: str,
        domain: Domain,
        folder: Path,
        *,
        days: Days | None,
        lines: Sequence[str] = (),
        fields: bool = False,
        only_users: Sequence[int] | None = None,
        versions: Mapping[str, int] | None = None,
    ) -> UserIndex:
        """Build the whole index from the lake's tables, in place of what `folder` held.

        It costs O(all days); see `extended` for a day more.

        Args:
            fields: all model-ready features of the events too.
            only_users: these users' histories only, and no item tokens; quick for a few.
            versions: of tables by name; the newest of those that are not given.
        """
        from downstream.index_build import build

        build(
            lake, domain, folder, days=days, lines=lines, fields=fields, only_users=only_users,
            versions=versions,
        )  # fmt: skip
        return cls.open(folder)

    @classmethod
    def extended(
        cls,
        lake: str,
        domain: Domain,
        folder: Path,
        *,
        days: Days | None,
        lines: Sequence[str] = (),
        fields: bool = False,
    ) -> UserIndex:
        """The index in `folder` as its tables are now; built if there is none.

        It costs O(days that have changed in the tables since), and reads no others. Who has opened
        the index keeps what was opened. It is built as a whole where the changed days cannot be
        told (after an erasure, or of a table made anew), or where half of its rows would be waste.

        Args:
            days: what it must hold; one that holds more stays so.
            lines, fields: of an index that is not there yet; one that is keeps its own.
        """
        from downstream.index_build import build
        from downstream.index_extend import extend

        meta = Meta.read(folder) if folder.exists() else None
        if meta is not None:
            days, lines, fields = meta.days_with(days), [*meta.lines], meta.has_fields
        if meta is None or not extend(lake, domain, folder, days=days):
            build(lake, domain, folder, days=days, lines=lines, fields=fields)
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> UserIndex:
        """The index in a folder, memory-mapped."""
        while True:
            meta = Meta.read(folder)
            names = [*KEY_ARRAYS, *meta.side, *meta.label_arrays]
            names += FIELD_ARRAYS if meta.has_fields else ()
            try:
                users = load_segments(folder, USERS, meta.generation, meta.base)
                arrays = {name: load(folder, name)[: meta.num_rows] for name in names}
                lines = {line: load_line(folder, meta, line) for line in meta.lines}
            except FileNotFoundError:
                if meta == Meta.read(folder):
                    raise
                continue
            if meta == Meta.read(folder):  # else it was written meanwhile
                return cls(meta, users, arrays, lines)

    @classmethod
    def from_arrays(
        cls,
        *,
        user_id: Array,
        event_time_us: Array,
        item_id: Array,
        instance_id: Array | None = None,
        side: Mapping[str, Array] | None = None,
        labels: Mapping[str, tuple[Array, Array]] | None = None,
        tokens: LineArrays | None = None,
    ) -> UserIndex:
        """An index in memory of rows [N] that are already sorted (see `user_major_order`).

        `labels`: name -> (-1 unknown, 0 or 1; label_time_us). `tokens` becomes the line IN_MEMORY.
        """
        instance_id = np.arange(len(user_id)) if instance_id is None else instance_id
        order = user_major_order(user_id, event_time_us, instance_id)
        if not np.array_equal(order, np.arange(len(order))):
            raise ValueError("rows must be sorted by (user_id, event_time, instance_id)")
        arrays: dict[str, Array] = {
            "event_time_us": np.asarray(event_time_us, np.int64),
            "instance_id": np.asarray(instance_id, np.int64),
            "item_id": np.asarray(item_id, np.int64),
            "request_id": np.asarray(instance_id, np.int64),
        }
        arrays |= {name: np.asarray(column, np.int32) for name, column in (side or {}).items()}
        for name, (value, time_us) in (labels or {}).items():
            arrays[f"label_{name}"] = np.asarray(value, np.int8)
            arrays[f"label_time_us_{name}"] = np.asarray(time_us, np.int64)
        names = list(side or {})
        meta = Meta(
            domain=IN_MEMORY, side=names, labels=list(labels or {}), match=names, base=len(order),
            num_rows=len(order),
        )  # fmt: skip
        lines = {IN_MEMORY: tokens} if tokens is not None else {}
        return cls(meta, Segments.of_sorted(user_id), arrays, lines)

    def __len__(self) -> int:
        """Events; the arrays may have more rows, which are nobody's (see `rows`)."""
        return self.users.total

    @property
    def num_rows(self) -> int:
        return len(self.arrays["event_time_us"])

    @property
    def is_compact(self) -> bool:
        """Whether the arrays are the events, in order of (user, event_time, instance_id)."""
        return not len(self.users.pages) and len(self) == self.num_rows

    @property
    def rows(self) -> Array:
        """[events] The events' rows in the arrays, in order of (user, event_time, instance_id)."""
        return self.users.rows()

    def compacted(self) -> UserIndex:
        """The same events and items, and no other rows, in memory where they lie otherwise."""
        if self.is_compact:
            lines = {n: replace(of, items=of.items.compacted()) for n, of in self.lines.items()}
            return replace(self, lines=lines)
        rows, held = self.rows, self.users
        lines = {
            name: LineArrays(line.token[rows], line.available_us[rows], line.items.compacted())
            for name, line in self.lines.items()
        }
        return UserIndex(
            replace(self.meta, base=len(rows), num_rows=len(rows)),
            Segments.of(held.key, held.count, held.bucket, held.newest_us),
            {name: array[rows] for name, array in self.arrays.items()},
            lines,
        )

    def line(self, name: str) -> LineArrays:
        """One line's tokens; a line that the index was built without is refused."""
        if name not in self.lines:
            held = ", ".join(sorted(self.lines)) or "none"
            raise InputError(
                f"line {name!r} was asked for and the index of {self.meta.domain} holds: {held}; "
                "build the index with that line"
            )
        return self.lines[name]


class IndexStore:
    """The TokenStore over a UserIndex, bound to one line (None: histories without tokens).

    On the CPU its tensors are the index's memory maps; on a CUDA device everything is resident, and
    compacted first. Tokens that would take more than FILLED of the device's free memory lie in
    page-locked memory of the host instead, and are read over the bus: the same, more slowly.
    """

    def __init__(
        self, index: UserIndex, line: str | None, device: str | torch.device = "cpu"
    ) -> None:
        self.device = torch.device(device)
        self.index = index = index if self.device.type == "cpu" else index.compacted()
        self.users = SegmentTensors(index.users, self.device)
        self.columns = {
            name: self._resident(array)
            for name, array in index.arrays.items()
            if name not in ("instance_id", "request_id", *FIELD_ARRAYS)
        }
        self.side = [*index.meta.side, *(f"label_{name}" for name in index.meta.labels)]
        self._fields: tuple[Tensor, Tensor] | None = None
        self.kernels, self.windows = _compiled(self.device, index)
        if self.kernels:
            self.sides = self.kernels.Sides(
                self.side,
                self._in_one_piece(self.side, torch.int32),
                self._in_one_piece([f"label_time_us_{x}" for x in index.meta.labels], torch.int64),
            )
        held = index.line(line) if line is not None else LineArrays.none(index.num_rows)
        self._bind(held.token, held.available_us, held.items)

    @classmethod
    def from_rows(
        cls,
        rows: Iterable[HistoryRow],
        *,
        width: int,
        items: Iterable[ItemRow] = (),
        side: Sequence[str] = (),
        labels: Sequence[str] = (),
        device: str | torch.device = "cpu",
    ) -> IndexStore:
        """The store over rows in memory, as InMemoryTokenStore takes them (tokens as float16)."""
        found = sorted(rows, key=lambda r: (r.user_id, r.event_time_us, r.instance_id))
        tokens = line_of(found, items, width)
        index = UserIndex.from_arrays(**histories_of(found, side, labels), tokens=tokens)
        return cls(index, IN_MEMORY, device)

    def with_tokens(
        self,
        token: Array | Tensor,
        available_us: Array | Tensor,
        item_tokens: ItemArrays | None = None,
    ) -> IndexStore:
        """The same histories with other tokens [N, D], rows as in the index's arrays.

        Nothing is rebuilt, and memory is shared where the device is the same: tokens may be
        written in place as the days go by.
        """
        other = copy.copy(self)
        other._bind(token, available_us, item_tokens or ItemArrays.none(token.shape[1]))
        return other

    def plain(self) -> IndexStore:
        """The same store with nothing compiled: what that must equal bit for bit, and slower."""
        other = copy.copy(self)
        other.kernels = other.windows = None
        return other

    def __len__(self) -> int:
        return len(self.index)

    @property
    def num_rows(self) -> int:
        """Of the index's arrays, and so of tokens."""
        return self.index.num_rows

    @property
    def width(self) -> int:
        return int(self.token_ND.shape[1])

    def positions(self, user_ids: Tensor, as_of_us: Tensor) -> tuple[Tensor, Tensor]:
        """(user_B, num_B): the user's place among the index's, and how many events are before
        as_of. A user not known has place -1 and no events."""
        _check_lengths(user_ids, as_of_us)
        user_ids, as_of_us = user_ids.to(self.device), as_of_us.to(self.device)
        times_N = self.columns["event_time_us"]
        if compiled := self.kernels or self.windows:
            return compiled.positions(
                self.users, times_N, user_ids.contiguous(), as_of_us.contiguous()
            )
        user_B, is_known_B = self.users.find(user_ids)
        num_B = self.users.count_before(times_N, user_B, as_of_us)
        return torch.where(is_known_B, user_B, -1), torch.where(is_known_B, num_B, 0)

    def fetch(
        self, user_ids: Tensor, as_of_us: Tensor, length: int, out: Tokens | None = None
    ) -> Tokens:
        """See TokenStore.fetch; every tensor is on the store's device.

        `out`: what an earlier fetch of this store gave, which may be written over: on the CPU, new
        memory costs more time than what comes into it. ValueError where that was another shape.
        """
        user_B, num_B = self.positions(user_ids, as_of_us)
        return self.past(user_B, num_B, as_of_us.to(self.device), length, out=out)

    def past(
        self,
        user_B: Tensor,
        num_B: Tensor,
        as_of_B: Tensor,
        length: int,
        *,
        side: Sequence[str] | None = None,
        has_tokens: bool = True,
        dtype: torch.dtype | None = None,
        out: Tokens | None = None,
    ) -> Tokens:
        """What `fetch` gives, of places and numbers from `positions`.

        Args:
            side: the side columns that are needed; None: all.
            has_tokens: False: they get width 0.
            dtype: of the tokens; None: as stored.
            out: as `fetch` has it, of these tokens and side columns.
        """
        _check_lengths(user_B, num_B, as_of_B)
        names, token_ND = self.side if side is None else side, self.token_ND
        token_ND, columns = token_ND if has_tokens else token_ND[:, :0], self.columns
        if out is not None:
            _check_out(out, _empty(len(user_B), length, token_ND, names, device="meta"))
        as_of_B, times_N = as_of_B.contiguous(), columns["event_time_us"]
        if self.windows:
            found = out or _empty(len(user_B), length, token_ND, names)
            self.windows.newest(
                self.users, times_N, user_B, num_B, as_of_B, token_ND, self.available_us_N,
                {name: (columns[name], self._known_us(name)) for name in names}, found,
            )  # fmt: skip
            return found if dtype is None else found._replace(token_BLD=found.token_BLD.to(dtype))
        if self.kernels:
            row_BL, mask_BL, gap_s_BL, token_BLD, token_mask_BL, side_of = self.kernels.newest(
                self.users, times_N, user_B, num_B, as_of_B, token_ND, self.available_us_N,
                self.sides, names, length, dtype,
            )  # fmt: skip
            return Tokens(token_BLD, mask_BL, token_mask_BL, gap_s_BL, side_of, row_BL)
        row_BL, mask_BL = self.newest(user_B, num_B, length)
        gap_s_BL = self.gap_s_at(row_BL, mask_BL, as_of_B)
        token_BLD, token_mask_BL = self.tokens_at(row_BL, mask_BL, as_of_B)
        token_BLD = token_BLD[..., : token_ND.shape[1]].to(dtype or token_BLD.dtype)
        side_of = {name: self.side_at(name, row_BL, mask_BL, as_of_B) for name in names}
        return Tokens(token_BLD, mask_BL, token_mask_BL, gap_s_BL, side_of, row_BL)

    def newest(self, user_B: Tensor, num_B: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """(row_BL, mask_BL): the rows of the last of each user's first `num` events, left-padded
        with -1."""
        return self.users.newest(user_B, num_B, length)

    def tokens_at(self, row_BL: Tensor, mask_BL: Tensor, as_of_B: Tensor) -> tuple[Tensor, Tensor]:
        """(token_BLD, token_mask_BL) of rows of `newest`: 0 where not published before as_of."""
        if self.kernels:
            return self.kernels.tokens_at(
                self.token_ND, self.available_us_N, row_BL, mask_BL, as_of_B
            )
        published_BL = self._take(self.available_us_N, row_BL) < as_of_B[:, None]
        token_mask_BL = mask_BL & published_BL
        token_BLD = self._take(self.token_ND, row_BL)
        if self.device.type == "cpu":
            # Only the rows that need it: a pass over all takes as long as the gather.
            hidden = (~token_mask_BL).flatten().nonzero().squeeze(1)
            token_BLD.flatten(0, 1).index_fill_(0, hidden, 0)
        else:
            token_BLD.masked_fill_(~token_mask_BL[..., None], 0)
        return token_BLD, token_mask_BL

    def gap_s_at(self, row_BL: Tensor, mask_BL: Tensor, as_of_B: Tensor) -> Tensor:
        """Seconds from the events of `newest` to as_of, [B, L] float32; 0 at padding."""
        gap_us_BL = as_of_B[:, None] - self._take(self.columns["event_time_us"], row_BL)
        return torch.where(mask_BL, (gap_us_BL.double() / 1e6).float(), 0.0)

    def side_at(self, name: str, row_BL: Tensor, mask_BL: Tensor, as_of_B: Tensor) -> Tensor:
        """One of `side` at rows of `newest`, [B, L] int32; a label not known by as_of is 0."""
        time_us_N = self._known_us(name)
        if self.kernels:
            return self.kernels.side_at(self.columns[name], time_us_N, row_BL, mask_BL, as_of_B)
        value_BL = self._take(self.columns[name], row_BL).int()
        if time_us_N is not None:
            is_known_BL = (value_BL >= 0) & (self._take(time_us_N, row_BL) < as_of_B[:, None])
            return torch.where(mask_BL & is_known_BL, value_BL + 1, 0)
        return torch.where(mask_BL, value_BL, 0)

    def rows_at(self, matrix_NF: Tensor, row_BL: Tensor) -> Tensor:
        """[B, L, F] Rows of a matrix beside the index's arrays, contiguous; at padding row 0."""
        if self.kernels:
            return self.kernels.rows_at(matrix_NF, row_BL)
        return matrix_NF[row_BL.clamp(min=0)]

    def _in_one_piece(self, names: Sequence[str], dtype: torch.dtype) -> Tensor:
        """[len(names), N] Some columns, which from now on lie there."""
        found = torch.empty(len(names), self.num_rows, dtype=dtype, device=self.device)
        for column_N, name in zip(found, names, strict=True):
            column_N.copy_(self.columns[name])
            self.columns[name] = column_N
        return found

    def _known_us(self, name: str) -> Tensor | None:
        """[N] When each value of a label became known; None: the column is no label."""
        if not name.startswith("label_"):
            return None
        return self.columns["label_time_us_" + name.removeprefix("label_")]

    def fetch_items(self, item_ids: Tensor, as_of_us: Tensor) -> ItemTokens:
        """See TokenStore.fetch_items."""
        return self.items_at(self.item_rows(item_ids, as_of_us))

    def item_rows(self, item_ids: Tensor, as_of_us: Tensor) -> Tensor:
        """[B] Where the newest value of each item published before as_of is; -1 without one."""
        as_of_us = as_of_us.to(self.device)
        item_B, is_known_B = self.items.find(item_ids.to(self.device))
        num_B = self.items.count_before(self._item_available_us_R, item_B, as_of_us)
        row_B = self.items.rows(item_B, num_B - 1)
        return torch.where(is_known_B & (num_B > 0), row_B, -1)

    def items_at(self, row_B: Tensor) -> ItemTokens:
        """The item tokens at rows of `item_rows`."""
        mask_B = row_B >= 0
        count_B = torch.where(mask_B, self._take(self._item_count_R, row_B), 0.0)
        mean_BD = self._take(self._item_sum_RD, row_B) / count_B[:, None]
        return ItemTokens(torch.where(mask_B[:, None], mean_BD, 0.0), mask_B, count_B)

    def fetch_fields(self, row_BL: Tensor) -> tuple[Tensor, Tensor]:
        """All model-ready features of the events at `row_BL`: ids [B, L, S] and numbers [B, L, M].

        Padding (-1) reads as missing: id 0, number NaN. The index must be built with `fields`.
        """
        if self._fields is None:
            if "ids" not in self.index.arrays:
                raise InputError("the index holds no logged fields; build it with fields=True")
            arrays = self.index.arrays
            self._fields = (self._resident(arrays["ids"]), self._resident(arrays["numbers"]))
        is_padding_BL1 = (row_BL < 0)[..., None]
        ids_NS, numbers_NM = self._fields
        ids_BLS = self._take(ids_NS, row_BL).masked_fill_(is_padding_BL1, 0)
        numbers_BLM = self._take(numbers_NM, row_BL).masked_fill_(is_padding_BL1, float("nan"))
        return ids_BLS, numbers_BLM

    def _bind(self, token: Array | Tensor, available: Array | Tensor, items: ItemArrays) -> None:
        num_rows = self.num_rows
        if len(token) != num_rows or len(available) != num_rows:
            raise ValueError(
                f"tokens need one row per event of the index, {num_rows}; "
                f"got {len(token)} tokens, {len(available)} available times"
            )
        if items.decayed_sum.shape[1] != token.shape[1]:
            raise ValueError(
                f"items have width {items.decayed_sum.shape[1]}, tokens {token.shape[1]}"
            )
        self.token_ND = self._placed(token)
        self.available_us_N = self._resident(available)
        self.items = SegmentTensors(items.segments, self.device)
        self._item_available_us_R = self._resident(items.available_us)
        self._item_sum_RD = self._resident(items.decayed_sum)
        self._item_count_R = self._resident(items.decayed_count)

    def _placed(self, token: Array | Tensor) -> Tensor:
        """Tokens where a fetch reads them."""
        is_far = self.device.type == "cuda" and not (isinstance(token, Tensor) and token.is_cuda)
        if is_far and token.nbytes > FILLED * torch.cuda.mem_get_info(self.device)[0]:
            held = np.asarray(token)
            dtype = torch.from_numpy(np.empty(0, held.dtype)).dtype
            found = torch.empty(held.shape, dtype=dtype, pin_memory=True)
            np.copyto(found.numpy(), held)
            return found
        return self._resident(token)

    def _resident(self, array: Array | Tensor) -> Tensor:
        if isinstance(array, Tensor):
            return array.to(self.device)
        array = np.ascontiguousarray(array)
        return torch.from_numpy(array if array.flags.writeable else array.copy()).to(self.device)

    @staticmethod
    def _take(column_N: Tensor, row: Tensor) -> Tensor:
        """column[row] with any value at row -1."""
        if not len(column_N):
            return column_N.new_zeros(*row.shape, *column_N.shape[1:])
        flat = column_N.index_select(0, row.clamp(min=0).flatten().to(column_N.device))
        return flat.to(row.device).view(*row.shape, *column_N.shape[1:])


def _check_lengths(*asked: Tensor) -> None:
    """Compiled code would read beyond the shorter one."""
    shapes = [list(tensor.shape) for tensor in asked]
    if asked[0].dim() != 1 or shapes != [shapes[0]] * len(shapes):
        raise ValueError(f"one user and one moment a request are needed, [B] each; got {shapes}")


def _check_out(out: Tokens, wanted: Tokens) -> None:
    """ValueError where compiled code would write beyond it, or leave something as it was."""
    found, needed = _tensors(out), _tensors(wanted)
    for name, tensor in needed.items():
        other = found.get(name)
        if (
            other is None
            or not other.is_contiguous()
            or ((other.shape, other.dtype) != (tensor.shape, tensor.dtype))
        ):
            got = "nothing" if other is None else f"{list(other.shape)} of {other.dtype}"
            raise ValueError(
                "out must be what a fetch of this store and of this shape gave: "
                f"{name} {list(tensor.shape)} of {tensor.dtype}, contiguous; got {got}"
            )


def _empty(
    num: int, length: int, token_ND: Tensor, side: Iterable[str], device: str = "cpu"
) -> Tokens:
    """Memory for a fetch on the CPU; on "meta": only what it would be."""

    def of(dtype: torch.dtype, *more: int) -> Tensor:
        shape = (num, length, *more)
        if device == "meta":
            return torch.empty(shape, dtype=dtype, device=device)
        # NumPy asks for huge pages, which come several times faster, but aligns to 16 bytes.
        num_bytes = math.prod(shape) * dtype.itemsize
        room = np.empty(num_bytes + LINE, np.uint8)
        begin = -room.ctypes.data % LINE
        return torch.from_numpy(room[begin : begin + num_bytes]).view(dtype).view(shape)

    return Tokens(
        token_BLD=of(token_ND.dtype, token_ND.shape[1]),
        mask_BL=of(torch.bool),
        token_mask_BL=of(torch.bool),
        gap_s_BL=of(torch.float32),
        side={name: of(torch.int32) for name in side},
        row_BL=of(torch.int64),
    )


def _tensors(tokens: Tokens) -> dict[str, Tensor]:
    """By name, side columns among them."""
    found = tokens._asdict()
    return found | found.pop("side")


def _compiled(
    device: torch.device, index: UserIndex
) -> tuple[ModuleType | None, ModuleType | None]:
    """What is compiled of a fetch, for a CUDA device and for the CPU, where there is anything to
    fetch."""
    if not index.num_rows:
        return None, None
    if device.type == "cuda":
        from downstream import gather

        return gather, None
    from downstream import windows

    return None, windows
