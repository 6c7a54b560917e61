"""What the workers of a comparison read, built once and memory-mapped: streams, index, samples.

A folder of sorted .npy files each; a worker that starts later, or in a later run, builds nothing
again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from compressor import data as streams
from compressor.data import StreamData, StreamTensors
from compressor.nn.embedding import Vocabulary
from downstream.data import RankerData, match_of
from downstream.index_arrays import ItemArrays, LineArrays, load
from downstream.inputs import RankerInputs
from downstream.samples import Samples
from downstream.segments import Segments
from downstream.user_index import IndexStore, UserIndex
from pipelines import tables
from pipelines.domain import Domain
from pipelines.features import FeatureArrays, FeatureLayout, arrays, times_us

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]


def save(folder: Path, held: Arrays) -> None:
    """One file an array; the folder appears whole or not at all."""
    part = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name, array in held.items():
        np.save(part / f"{name}.npy", array)
    shutil.rmtree(folder, ignore_errors=True)
    part.replace(folder)


def opened(folder: Path) -> dict[str, Array]:
    """The arrays of a folder, memory-mapped, by name."""
    names = sorted(path.name.removesuffix(".npy") for path in folder.glob("*.npy"))
    return {name: load(folder, name) for name in names}


def part_of(held: Arrays, name: str) -> dict[str, Array]:
    """The arrays called NAME.x, by x."""
    return {k.removeprefix(f"{name}."): v for k, v in held.items() if k.startswith(f"{name}.")}


def named(held: Arrays, name: str) -> dict[str, Array]:
    """The inverse of `part_of`."""
    return {f"{name}.{k}": v for k, v in held.items()}


def stream_arrays(rows: pa.Table, domain: Domain) -> dict[str, Array]:
    """Stream rows as StreamData over a vocabulary of all of them."""
    vocabulary = streams.vocabulary_of(rows, domain)
    data = streams.load(rows, domain, vocabulary, "cpu")
    tensors = {f.name: getattr(data.tensors, f.name).numpy() for f in fields(StreamTensors)}
    own = {f.name: getattr(data, f.name) for f in fields(StreamData) if f.name != "tensors"}
    buckets = {table: np.asarray(found) for table, found in vocabulary.buckets.items()}
    return named(own, "data") | named(tensors, "tensor") | named(buckets, "bucket")


def stream(held: Arrays, device: str) -> tuple[StreamData, Vocabulary]:
    """The inverse of `stream_arrays`, its tensors on a device."""
    tensors = {
        name: torch.from_numpy(array).to(device) for name, array in part_of(held, "tensor").items()
    }
    data = StreamData(**part_of(held, "data"), tensors=StreamTensors(**tensors))
    return data, Vocabulary(part_of(held, "bucket"))


def ranker_arrays(rows: pa.Table, domain: Domain, device: str) -> dict[str, Array]:
    """Stream rows as an index with all logged fields, samples, and their match features."""
    samples, index = Samples.of(samples_of(rows, domain), domain), index_of(rows, domain)
    match = match_of(samples, RankerInputs.of(domain, num_match=0), IndexStore(index, None, device))
    own = {f.name: getattr(samples, f.name) for f in fields(Samples)}
    flat = {name: array for name, array in own.items() if isinstance(array, np.ndarray)}
    for name in ("request", "candidate"):
        flat |= named({"ids": own[name].ids, "numbers": own[name].numbers}, name)
    events = {**index.arrays, "user_id": np.repeat(index.users.key, index.users.count)}
    return named(events, "index") | named(flat, "sample") | {"match": match.cpu().numpy()}


def samples_held(held: Arrays) -> Samples:
    """The samples of `ranker_arrays`."""
    flat = part_of(held, "sample")
    given: dict[str, Any] = {name: array for name, array in flat.items() if "." not in name}
    for name in ("request", "candidate"):
        given[name] = FeatureArrays(**part_of(flat, name))
    return Samples(**given)


def ranker(held: Arrays, domain: Domain, device: str) -> RankerData:
    """The inverse of `ranker_arrays`, on a device."""
    side = [f.stream_column for f in domain.side_features]
    index = part_of(held, "index")
    found = UserIndex.from_arrays(
        user_id=index["user_id"],
        event_time_us=index["event_time_us"],
        item_id=index["item_id"],
        instance_id=index["instance_id"],
        side={name: index[name] for name in side},
        labels={
            x.name: (index[f"label_{x.name}"], index[f"label_time_us_{x.name}"])
            for x in domain.labels
        },
    )
    logged = {name: index[name] for name in ("ids", "numbers")}
    store = IndexStore(replace(found, arrays={**found.arrays, **logged}), None, device)
    match = torch.from_numpy(held["match"])
    inputs = RankerInputs.of(domain, num_match=match.shape[1], token_width=store.width)
    delay_us = domain.tokens.delay_us
    return RankerData.from_arrays(
        inputs, samples_held(held), store, match, delay_us=delay_us, fields=True
    )


ITEM_ARRAYS = ("available_us", "decayed_sum", "decayed_count")


def line_arrays(line: LineArrays) -> dict[str, Array]:
    items = {name: getattr(line.items, name) for name in ITEM_ARRAYS}
    items |= {"item_id": line.items.segments.key, "num": line.items.segments.count}
    return {"token": line.token, "available_us": line.available_us} | named(items, "item")


def line(held: Arrays) -> LineArrays:
    """The inverse of `line_arrays`."""
    of = part_of(held, "item")
    items = ItemArrays(Segments.of(of["item_id"], of["num"]), *(of[name] for name in ITEM_ARRAYS))
    return LineArrays(held["token"], held["available_us"], items)


def samples_of(rows: pa.Table, domain: Domain) -> pa.Table:
    """Stream rows as ranker samples: the columns of that table, event_time as as_of."""
    names = ["as_of" if name == "event_time" else name for name in rows.schema.names]
    table = tables.ranker_samples(domain)
    return (
        rows.rename_columns(names)
        .select(table.schema.names)
        .sort_by([(c, "ascending") for c in table.sort_by])
    )


def index_of(rows: pa.Table, domain: Domain) -> UserIndex:
    """An index in memory of the rows' events, with all logged fields."""
    events = rows.filter(pc.invert(rows.column("is_sampled")))
    events = events.sort_by([(c, "ascending") for c in ("user_id", "event_time", "instance_id")])
    side = {
        f.stream_column: events.column(f.stream_column).to_numpy() for f in domain.side_features
    }
    labels = {
        x.name: (
            pc.fill_null(events.column(f"label_{x.name}"), -1).to_numpy(),
            times_us(events, f"label_time_{x.name}"),
        )
        for x in domain.labels
    }
    index = UserIndex.from_arrays(
        user_id=events.column("user_id").to_numpy(),
        event_time_us=times_us(events, "event_time"),
        item_id=events.column("item_id").to_numpy(),
        instance_id=events.column("instance_id").to_numpy(),
        side=side,
        labels=labels,
    )
    found = arrays(events, FeatureLayout.of(domain))
    return replace(
        index,
        # As in a stored index: the item's own column would count its matches a second time.
        meta=replace(index.meta, match=[f.stream_column for f in domain.match_features]),
        arrays={**index.arrays, "ids": found.ids, "numbers": found.numbers},
    )


def once(folder: Path, build: Callable[[], Arrays]) -> dict[str, Array]:
    """The arrays of a folder, built if it is not there."""
    if not folder.exists():
        save(folder, build())
    return opened(folder)
