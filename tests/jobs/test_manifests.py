"""Manifests and `iat vacuum`: a training run can be repeated bit for bit until it is released."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from jobs import ledger, train_compressor, train_ranker, vacuum
from pipelines import delta, forgotten, manifests, tables
from pipelines.days import Days
from pipelines.domain import Domain
from pipelines.errors import InputError
from tests.compressor.conftest import small_config
from tests.downstream.conftest import small
from tests.jobs.test_compressor_jobs import args, day, domain, items_of, log_rows, tokens_of

CHANGED = Days(day(2), day(3))


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small weights and a small domain."""
    monkeypatch.setattr(
        train_compressor, "SourceConfig", lambda order: small_config(order=order, context=8)
    )
    monkeypatch.setattr(train_ranker, "arm", small)
    for job in (train_compressor, train_ranker):
        monkeypatch.setattr(job, "load_domain", domain)
    return


def as_made(table: tables.Table, rows: pa.Table) -> pa.Table:
    return rows.select(table.schema.names).cast(table.schema)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A lake with all that both commands read."""
    lake, spec = str(tmp_path_factory.mktemp("whole") / "lake"), domain()
    rows = log_rows(spec).append_column("as_of", log_rows(spec)["event_time"])
    real = rows.filter(pc.invert(rows["is_sampled"]))
    for make in (tables.user_order, tables.histories, tables.ranker_samples):
        table = make(spec)
        kept = real if make is tables.histories else rows
        delta.replace(lake, table, as_made(table, kept), None, commit={"job": "test"})
    return lake


@pytest.fixture
def lake(whole: str, tmp_path: Path) -> str:
    return shutil.copytree(whole, tmp_path / "lake").as_posix()


def rewrite(lake: str, spec: Domain) -> None:
    """Another build of one day: every label turned over."""
    for table in (tables.user_order(spec), tables.histories(spec), tables.ranker_samples(spec)):
        rows = delta.read(lake, table, CHANGED)
        place = rows.schema.get_field_index("label_buy")
        turned = pc.subtract(1, rows["label_buy"]).cast(pa.int8())
        changed = rows.set_column(place, rows.schema.field(place), turned)
        delta.replace(lake, table, changed, CHANGED, commit={"job": "test"})


def freed(lake: str, *released: str) -> dict[str, Any]:
    return vacuum.main(vacuum.Args(lake=lake, retention_hours=0, release=released))


def manifest_in(lake: str, line: str) -> Path:
    (found,) = Path(lake, "artifacts", "compressors", line).glob("*/manifest.json")
    return found


def weights(lake: str, line: str) -> bytes:
    folder = manifest_in(lake, line).parent
    return (folder / "tensors.safetensors").read_bytes()


@pytest.mark.parametrize("protocol", ["streaming", "frozen"])
def test_a_compressor_is_trained_again_bit_for_bit_over_what_it_read(
    lake: str, protocol: Any
) -> None:
    train_compressor.main(args(lake, protocol=protocol, epochs=2, user_share=0.8, seed=3))
    made = manifest_in(lake, "user")
    rewrite(lake, domain())
    told = freed(lake)
    (name,) = told["kept"]["user_order/tiny"]
    assert name == manifests.read(made)[0].name
    result = train_compressor.main(args(lake, manifest=made))
    assert result["line"] == "user-again"
    assert weights(lake, "user-again") == weights(lake, "user")
    if protocol == "streaming":
        assert tokens_of(lake, "user-again").equals(tokens_of(lake, "user"))
        assert items_of(lake, "user-again").equals(items_of(lake, "user"))
    # The tables as they are now give another compressor, and the repeated run is the same run.
    train_compressor.main(
        args(lake, protocol=protocol, epochs=2, user_share=0.8, seed=3, line="new")
    )
    assert weights(lake, "new") != weights(lake, "user")
    assert manifests.read(manifest_in(lake, "user-again")) == manifests.read(made)


def ranker(lake: str, out: Path, **given: Any) -> train_ranker.Args:
    return train_ranker.Args(domain="tiny", lake=lake, out=str(out), device="cpu", **given)


def test_a_ranker_predicts_again_bit_for_bit_what_it_did(lake: str, tmp_path: Path) -> None:
    train_compressor.main(args(lake))
    first = train_ranker.main(ranker(lake, tmp_path / "a", arm="match", line="user", seed=2))
    rewrite(lake, domain())
    train_compressor.main(args(lake, seed=1))
    told = freed(lake)
    for name in ("histories", "ranker_samples", "instance_tokens", "item_tokens"):
        assert first["manifest"] in told["kept"][f"{name}/tiny"]
    again = ranker(lake, tmp_path / "b", manifest=tmp_path / "a" / "manifest.json")
    assert train_ranker.main(again)["manifest"] == first["manifest"]
    train_ranker.main(ranker(lake, tmp_path / "c", arm="match", line="user", seed=2))
    a, b, c = (pq.read_table(tmp_path / x / "predictions.parquet") for x in "abc")
    assert b.equals(a)
    assert not c.equals(a)
    model = [(tmp_path / x / "model" / "tensors.safetensors").read_bytes() for x in "ab"]
    assert model[0] == model[1]


def test_what_no_manifest_pins_any_more_is_removed(lake: str, tmp_path: Path) -> None:
    train_compressor.main(args(lake))
    made = manifest_in(lake, "user")
    name = manifests.read(made)[0].name
    rewrite(lake, domain())
    table = tables.user_order(domain())
    old = set(delta.open_table(lake, table, 1).file_uris())
    now = delta.read(lake, table)
    vacuum.main(vacuum.Args(lake=lake))  # a week is not over
    assert all(Path(file).exists() for file in old)
    told = freed(lake)
    assert told["tables"]["user_order/tiny"]["files"] == 0
    assert told["tables"]["histories/tiny"]["files"] == 1  # nothing pins the rewritten day
    assert told["kept"]["user_order/tiny"][name]["files"] == 1
    dry = vacuum.main(vacuum.Args(lake=lake, retention_hours=0, release=(name,), dry_run=True))
    assert dry["tables"]["user_order/tiny"]["files"] == 1
    assert all(Path(file).exists() for file in old)
    told = freed(lake, name)
    assert told["tables"]["user_order/tiny"] == dry["tables"]["user_order/tiny"]
    assert told["tables"]["user_order/tiny"]["bytes"] > 0
    assert [Path(file).exists() for file in old].count(False) == 1
    assert delta.read(lake, table).equals(now)
    with pytest.raises(InputError, match=r"pins version 1 of user_order/tiny, and 1 of its 7"):
        train_compressor.main(args(lake, manifest=made))
    with pytest.raises(InputError, match=f"no live manifest called '{name}'"):
        freed(lake, name)


def test_a_forgotten_user_is_read_by_no_training(lake: str) -> None:
    (user, *_) = delta.read(lake, tables.user_order(domain()))["user_id"].to_pylist()
    train_compressor.main(args(lake))
    made = manifest_in(lake, "user")
    forgotten.add(lake, domain(), [user], commit={"job": "test"})
    with pytest.raises(InputError, match="users were forgotten since"):
        train_compressor.main(args(lake, manifest=made))
    train_compressor.main(args(lake, line="other"))
    assert user in tokens_of(lake, "user")["user_id"].to_pylist()
    assert user not in tokens_of(lake, "other")["user_id"].to_pylist()


def test_leftovers_of_killed_writes_go_and_files_in_use_stay(lake: str) -> None:
    table = tables.user_order(domain())
    folder = Path(delta.open_table(lake, table).file_uris()[0]).parent
    left = [
        folder / "part-killed.parquet",
        Path(lake, "instances", "tiny", "event_date=x", "p.parquet"),
        Path(lake, "artifacts", "compressors", "user", ".user@1-abc", "tensors.safetensors"),
        Path(lake, "raw", "tiny", "events-1.77.tmp"),
    ]  # fmt: skip
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    before = delta.read(lake, table)
    assert vacuum.main(vacuum.Args(lake=lake))["tables"]["leftovers"]["files"] == 0
    assert all(path.exists() for path in left)  # a job may be writing them
    old = time.time() - vacuum.SAFE_HOURS * 3600 - 60
    for path in left:
        for each in (path, path.parent, path.parent.parent):
            os.utime(each, (old, old))
    told = vacuum.main(vacuum.Args(lake=lake))
    assert not any(path.exists() for path in left)
    assert told["tables"]["leftovers"]["files"] == 3
    assert delta.read(lake, table).equals(before)


def test_a_manifest_that_no_longer_fits_is_refused(
    lake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_compressor.main(args(lake, end=day(2)))
    made = manifest_in(lake, "user")
    again = args(lake, manifest=made)

    def refused(says: str, given: train_compressor.Args = again) -> None:
        with pytest.raises(InputError, match=says):
            train_compressor.main(given)

    with monkeypatch.context() as patched:
        patched.setattr(ledger, "code_version", lambda: "9.9")
        refused("written by version .* of the toolkit and this is 9.9")
    spec = domain()
    one, *others = spec.features
    renamed = replace(spec, features=(replace(one, column="elsewhere"), *others))
    later = replace(spec, tokens=replace(spec.tokens, delay="1d"))
    for changed in (renamed, later):
        with monkeypatch.context() as patched:
            patched.setattr(train_compressor, "load_domain", lambda name, held=changed: held)
            refused("the domain file of tiny has changed")
    with monkeypatch.context() as patched:
        patched.setattr(
            train_compressor, "SourceConfig", lambda order: small_config(order=order, context=4)
        )
        refused("own settings")
    held = json.loads(made.read_text())
    other = tmp_path / "manifest.json"
    other.write_text(json.dumps(held | {"user_share": 0.5}))
    refused("changed by hand", replace(again, manifest=other))
    other.write_text(json.dumps(held | {"digest": "0"}))
    refused("its digest differs", replace(again, manifest=other))
    other.write_text("{")
    refused("is no manifest", replace(again, manifest=other))
    with pytest.raises(InputError, match="is of `iat train-compressor`, not of `iat train-ranker`"):
        train_ranker.main(ranker(lake, tmp_path / "a", manifest=made))
