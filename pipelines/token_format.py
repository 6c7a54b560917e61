"""How a token is stored: codec and width, the table properties that declare them, and the decoder.

Part of the tables' public face, so here and not in `compressor`: a reader of tokens needs no model.
Codec `float16`: a token is its D values as little-endian float16, 2 D bytes. Item tokens keep their
decayed sums as little-endian float32 (`float32`), 4 D bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError

from pipelines import delta
from pipelines.errors import InputError
from pipelines.tables import Table

CODECS: Mapping[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
CODEC_KEY, WIDTH_KEY, LENGTH_KEY = "iat.codec", "iat.width", "iat.length"


@dataclass(frozen=True, slots=True)
class TokenFormat:
    """The codec of a table's vectors and how many values each has."""

    codec: str = "float16"
    width: int = 64

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise InputError(f"no codec called {self.codec!r}; known: {', '.join(CODECS)}")
        if not 1 <= self.width <= 1 << 16:
            raise InputError(f"a token's width must be from 1 to 65536, got {self.width}")

    @property
    def num_bytes(self) -> int:
        return self.width * CODECS[self.codec].itemsize

    def __str__(self) -> str:
        return f"{self.codec} x {self.width}"

    def properties(self) -> dict[str, str]:
        """The format as Delta table properties."""
        return {CODEC_KEY: self.codec, WIDTH_KEY: str(self.width)}


def declare(lake: str, table: Table, wanted: TokenFormat, *, length: int | None = None) -> None:
    """Make the table, with the format in its properties; refuse one that exists with another.

    `length`: of a table whose rows hold so many vectors each.
    """
    where = delta.uri(lake, table)
    properties = wanted.properties() | ({LENGTH_KEY: str(length)} if length is not None else {})
    if not DeltaTable.is_deltatable(where):
        try:
            DeltaTable.create(
                where,
                table.schema,
                mode="error",
                partition_by=list(table.partition_by),
                configuration=delta.CHECKPOINTS | delta.OF_EVENTS | properties,
                raise_if_key_not_exists=False,
            )
        except (DeltaError, CommitFailedError):
            # Another writer made it first: what it declared is checked below.
            if not DeltaTable.is_deltatable(where):
                raise
    check(delta.open_table(lake, table), table.name, wanted, length=length)


def check(table: DeltaTable, name: str, wanted: TokenFormat, *, length: int | None = None) -> None:
    """Refuse a table that declares another format, or length, than the wanted one."""
    found = declared(table)
    if found is not None and found != wanted:
        raise InputError(
            f"{name} holds {found} vectors and this run needs {wanted}; "
            "use the table's format, or write to another lake"
        )
    held = declared_length(table)
    if held is not None and length not in (None, held):
        raise InputError(
            f"{name} holds rows of {held} vectors and this run needs {length}: all of a table have "
            f"one length. Give --length {held}, or write to another lake, or remove the table and "
            "write its days again"
        )


def declared(table: DeltaTable) -> TokenFormat | None:
    """The format in the table's properties; None where nobody declared one."""
    found = table.metadata().configuration
    if CODEC_KEY not in found or WIDTH_KEY not in found:
        return None
    return TokenFormat(found[CODEC_KEY], int(found[WIDTH_KEY]))


def declared_length(table: DeltaTable) -> int | None:
    """How many vectors a row has by the table's properties; None where it is not said."""
    found = table.metadata().configuration.get(LENGTH_KEY)
    return None if found is None else int(found)


def of_line(
    opened: DeltaTable, name: str, line: str, batches: Iterable[pa.RecordBatch]
) -> TokenFormat:
    """A line's format, as the table `name` declares it, or else as its first token shows.

    Args:
        batches: the line's tokens, in a column `token`; the first one is looked at.
    """
    found = {part["compressor_line"] for part in opened.partitions()}
    if line not in found:
        held = ", ".join(sorted(found)) or "none"
        raise InputError(f"{name} has no tokens of line {line!r}; lines there: {held}")
    form = declared(opened)
    first = next((batch for batch in batches if len(batch)), None)
    if first is None:
        if form is None:
            raise InputError(
                f"{name} has no tokens of line {line!r} in the asked days, and declares no width"
            )
        return form
    num_bytes = len(first.column("token")[0].as_py())
    if form is None:
        return TokenFormat("float16", num_bytes // CODECS["float16"].itemsize)
    if num_bytes != form.num_bytes:
        raise InputError(
            f"{name} declares {form} ({form.num_bytes} bytes) and a token of line {line!r} "
            f"has {num_bytes} bytes; write the line again, or to another lake"
        )
    return form


def encode(vectors: npt.NDArray[Any], codec: str = "float16") -> pa.BinaryArray:
    """[n, D] finite numbers as one binary value a row, without a Python loop."""
    if vectors.ndim != 2:
        raise InputError(f"vectors to encode must be [n, D], got {list(vectors.shape)}")
    form = TokenFormat(codec, vectors.shape[1])
    with np.errstate(over="ignore"):  # too large for the codec is infinite, and refused below
        values = np.array(vectors, CODECS[codec], order="C")  # a copy: the caller may write on
    if not np.isfinite(values).all():
        num_bad = int((~np.isfinite(values)).any(axis=1).sum())
        raise InputError(
            f"{num_bad} of {len(values)} vectors are not finite as {form}; "
            "a diverged compressor writes no tokens"
        )
    num_bytes = len(values) * form.num_bytes
    if num_bytes > 2**31 - 1:
        raise InputError(f"{len(values)} vectors of {form} pass 2 GiB; encode them in chunks")
    offsets = np.arange(0, num_bytes + 1, form.num_bytes, dtype=np.int32)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(values)]
    return pa.BinaryArray.from_buffers(pa.binary(), len(values), buffers)


def decode(column: pa.Array | pa.ChunkedArray, wanted: TokenFormat) -> npt.NDArray[Any]:
    """Encoded vectors as [n, D] of the codec's dtype: views of the buffer, not copied by row."""
    if isinstance(column, pa.ChunkedArray):
        parts = [decode(chunk, wanted) for chunk in column.chunks if len(chunk)]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([np.empty((0, wanted.width), CODECS[wanted.codec]), *parts])
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise InputError(f"{wanted} vectors need a binary column, got {column.type}")
    if column.null_count:
        raise InputError(f"{column.null_count} of {len(column)} vectors are null; needed {wanted}")
    if not len(column):
        return np.empty((0, wanted.width), CODECS[wanted.codec])
    found = pc.unique(pc.binary_length(column)).to_pylist()
    if found != [wanted.num_bytes]:
        widths = ", ".join(str(n) for n in sorted(found))
        raise InputError(f"vectors of {wanted} need {wanted.num_bytes} bytes each, got {widths}")
    offset_type = np.int64 if pa.types.is_large_binary(column.type) else np.int32
    _, offsets, data = column.buffers()
    start = int(np.frombuffer(offsets, offset_type)[column.offset])
    count = len(column) * wanted.width
    values = np.frombuffer(data, CODECS[wanted.codec], count=count, offset=start)
    return values.reshape(len(column), wanted.width)
