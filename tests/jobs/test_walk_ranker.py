"""`iat walk-ranker`: one command a day or one over many, killed or not, ends in the same ranker."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from compressor.training import checkpoint, metrics
from downstream import saved
from downstream.daily import State
from downstream.user_index import UserIndex
from jobs import cli, evaluate, train_compressor, walk_ranker
from pipelines import delta, manifests, tables
from pipelines.days import Days
from pipelines.errors import InputError
from pipelines.tables import Table
from pipelines.token_format import TokenFormat, declare
from tests.compressor.conftest import small_config
from tests.downstream.conftest import small
from tests.jobs import test_compressor_jobs as log
from tests.jobs.test_compressor_jobs import NUM_DAYS, day, domain, unreadable

BUILT = (tables.user_order, tables.histories, tables.ranker_samples)
NOT_WRITTEN = "its samples are not written (iat build-samples)"
TOKENS = (tables.instance_tokens("tiny"), tables.item_tokens("tiny"))
FORMATS = {
    table.name: TokenFormat(codec, 16)
    for table, codec in zip(TOKENS, ("float16", "float32"), strict=True)
}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small weights and a small domain."""
    patch(monkeypatch)


def patch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk_ranker, "arm", small)
    monkeypatch.setattr(walk_ranker, "load_domain", domain)


def one(number: int) -> Days:
    return Days(day(number), day(number + 1))


def build(lake: str, number: int, tables_of: Sequence[Callable[..., Table]] = BUILT) -> None:
    """A day of the tables that rankers and compressors read."""
    spec = domain()
    rows = log.log_rows(spec)
    rows = rows.filter(pc.equal(rows["event_date"], day(number)))
    if number > 4:  # items that nobody has seen before
        rows = changed(rows, "f_item", pc.add(rows["f_item"], 30))
    rows = rows.append_column("as_of", rows["event_time"])
    for make in tables_of:
        table = make(spec)
        kept = rows.filter(pc.invert(rows["is_sampled"])) if make is tables.histories else rows
        made = kept.select(table.schema.names).cast(table.schema)
        delta.replace(lake, table, made, one(number), commit={"job": "test"})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A lake with every day's tables, and their tokens of the line "user"."""
    lake = str(tmp_path_factory.mktemp("whole") / "lake")
    for number in range(NUM_DAYS):
        build(lake, number)
    with pytest.MonkeyPatch.context() as patched:
        small_source = small_config(order="user", context=8)
        patched.setattr(train_compressor, "SourceConfig", lambda order: small_source)
        patched.setattr(train_compressor, "load_domain", domain)
        train_compressor.main(log.args(lake))
    return lake


def publish(whole: str, lake: str, number: int, line: str = "user") -> None:
    """A day's tokens as they are in the whole lake, and then the version that wrote them."""

    def of_line(rows: pa.Table, table: Table) -> pa.Table:
        place = rows.schema.get_field_index("compressor_line")
        return rows.set_column(
            place, table.schema.field(place), pa.array([line] * len(rows), pa.string())
        )

    for table in TOKENS:
        declare(lake, table, FORMATS[table.name])
        rows = of_line(delta.read(whole, table, one(number), line="user"), table)
        delta.replace(lake, table, rows, one(number), line=line, commit={"job": "test"})
    table = tables.compressor_versions()
    (row, *_) = delta.read(whole, table).to_pylist()
    row |= {"compressor_line": line, "compressor_version": f"{line}@{day(number)}"}
    row["end"] = day(number + 1)
    rows = pa.Table.from_pylist([row], table.schema)
    where = f"compressor_version = '{row['compressor_version']}'"
    delta.replace(lake, table, rows, None, line=line, where=where, commit={"job": "test"})


@pytest.fixture
def lake(whole: str, tmp_path: Path) -> str:
    return shutil.copytree(whole, tmp_path / "lake").as_posix()


def args(lake: str, out: Path, **given: Any) -> walk_ranker.Args:
    held = {"arm": "match", "line": "user", "device": "cpu", "end": day(NUM_DAYS)}
    return walk_ranker.Args(domain="tiny", lake=lake, out=str(out), **{**held, **given})


@pytest.fixture(scope="module")
def undisturbed(whole: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one command over all days leaves."""
    out = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patched:
        patch(patched)
        walk_ranker.main(args(whole, out))
    return out / "user"


def content(folder: Path) -> dict[str, Any]:
    """All that a ranker's folder holds, but for which table versions were read."""
    found: dict[str, Any] = {"metrics": json.loads((folder / "metrics.json").read_text())}
    for path in sorted((folder / "predictions").iterdir()):
        found[path.name] = path.read_bytes()
    for name in ("state", "model"):
        found[name] = (folder / name / checkpoint.TENSORS).read_bytes()
    found["meta"] = checkpoint.meta(folder / "state")
    return found


def test_day_by_day_is_all_at_once_whatever_is_there_of_later_days(
    whole: str, undisturbed: Path, tmp_path: Path
) -> None:
    lake, index, out = str(tmp_path / "lake"), str(tmp_path / "index"), tmp_path / "out"
    walked = []
    for number in range(NUM_DAYS):
        build(lake, number)
        given = {"index": index, "end": day(number + 1)}
        if number > 1:
            early = walk_ranker.main(args(lake, out, **given))
            assert early["days"] == early["metrics"] == []
            assert early["next_day"] == str(day(number))
            assert f"line user has tokens up to {day(number - 2)}" in early["waits"]
        publish(whole, lake, max(0, number - 1))
        result = walk_ranker.main(args(lake, out, **given))
        assert result["waits"] is None
        walked += result["days"]
        if number == 4:
            UserIndex.build(whole, domain(), tmp_path / "later", days=None, lines=["user"])
            later = {"index": str(tmp_path / "later"), "end": day(5)}
            walk_ranker.main(args(whole, tmp_path / "early", **later))
            assert content(out / "user") == content(tmp_path / "early" / "user")
    assert walked == [str(day(n)) for n in range(NUM_DAYS)]
    assert content(out / "user") == content(undisturbed)


def test_the_same_command_again_changes_nothing(lake: str, undisturbed: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    again = walk_ranker.main(args(lake, undisturbed.parent))
    assert (again["days"], again["waits"], again["next_day"]) == ([], None, str(day(NUM_DAYS)))
    now = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*") if path.is_file()}
    assert {**now, undisturbed / ".lock": 0} == {**files, undisturbed / ".lock": 0}


def test_metrics_are_of_the_predictions_made_before_training(undisturbed: Path) -> None:
    told = json.loads((undisturbed / "metrics.json").read_text())["days"]
    assert [each["day"] for each in told] == [str(day(n)) for n in range(NUM_DAYS)]
    assert [each["predicted"] > 0 for each in told] == [n not in (0, 3) for n in range(NUM_DAYS)]
    files = [undisturbed / "predictions" / f"{each['day']}.parquet" for each in told]
    for last, of in ((1, told[-1]), (7, told[-1]["week"])):
        rows = pa.concat_tables([pq.read_table(file) for file in files[-last:]])
        label, score = (rows[name].to_numpy() for name in ("label", "score"))
        assert of["auc"] == pytest.approx(metrics.auc(label, score))
        assert of["log_loss"] == pytest.approx(metrics.log_loss(label, score))
        assert of["labelled"] == of["predicted"] == len(rows)
    assert told[0]["loss"] > 0
    assert told[3] == {**told[3], "samples": 0, "loss": None, "steps": 0, "auc": None}


def test_evaluate_reads_a_folder_of_days_as_one(lake: str, undisturbed: Path) -> None:
    walk_ranker.main(args(lake, undisturbed.parent, arm="base", line=""))
    folders = (undisturbed.parent / "none" / "predictions", undisturbed / "predictions")
    report = evaluate.main(evaluate.Args(predictions=folders, bootstraps=2))
    told = json.loads((undisturbed / "metrics.json").read_text())["days"]
    assert report["num_rows"] == sum(each["labelled"] for each in told)
    base, match = report["arms"]
    assert (base["name"], match["name"]) == ("din base streaming", "din match user streaming")
    assert match["auc"]["value"] == pytest.approx(told[-1]["week"]["auc"])
    assert match["paired_seeds"] == [0]


STEPS = ("predictions", "model", "state", "metrics.json")


@pytest.mark.parametrize("at", STEPS)
def test_a_run_that_dies_before_any_step_goes_on_and_gives_the_same(
    lake: str, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    with monkeypatch.context() as patched:
        die(patched, at, interrupt)
        with pytest.raises(KeyboardInterrupt):
            walk_ranker.main(args(lake, tmp_path))
    reached = walk_ranker.main(args(lake, tmp_path, dry_run=True))["next_day"]
    assert reached == str(day(3 if at == "metrics.json" else 2))
    walk_ranker.main(args(lake, tmp_path))
    assert content(tmp_path / "user") == content(undisturbed)


def interrupt() -> None:
    raise KeyboardInterrupt


def die(patched: pytest.MonkeyPatch, at: str, end: Callable[[], None]) -> None:
    """End just before a step of the third day."""
    place, name = {
        "predictions": (walk_ranker, "write_predictions"),
        "model": (saved, "save"),
        "state": (State, "save"),
        "metrics.json": (walk_ranker, "write_metrics"),
    }[at]
    done, seen = getattr(place, name), []

    def step(*given: Any) -> None:
        seen.append(given)
        if len(seen) == (4 if at == "metrics.json" else 3):
            end()
        done(*given)

    patched.setattr(place, name, step)


def killed(lake: str, out: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patch(patched)
        die(patched, "state", lambda: os.kill(os.getpid(), signal.SIGKILL))
        walk_ranker.main(args(lake, out))


def test_a_run_that_is_killed_for_real_leaves_its_lock_and_its_work(
    lake: str, undisturbed: Path, tmp_path: Path
) -> None:
    process = multiprocessing.get_context("spawn").Process(target=killed, args=(lake, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list((tmp_path / "user" / "predictions").iterdir())) == 3
    assert (
        State.load(tmp_path / "user" / "state").next_day
        == State.load(undisturbed / "state").next_day - 6
    )
    walk_ranker.main(args(lake, tmp_path))
    assert content(tmp_path / "user") == content(undisturbed)


def test_two_at_once_walk_each_day_once(lake: str, undisturbed: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: walk_ranker.main(args(lake, tmp_path)), range(2)))
    assert sorted(len(each["days"]) for each in found) == [0, NUM_DAYS]
    assert content(tmp_path / "user") == content(undisturbed)


def test_another_line_is_another_ranker(
    whole: str, lake: str, undisturbed: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(undisturbed.parent, tmp_path / "out"))
    for number in range(3):
        publish(whole, lake, number, line="next")
    result = walk_ranker.main(args(lake, out, line="next"))
    assert result["days"] == [str(day(n)) for n in range(4)]
    assert result["next_day"] == str(day(4))
    assert f"line next has tokens up to {day(2)}" in result["waits"]
    assert content(out / "user") == content(undisturbed)
    # Its tokens are those of the other line, and so are its predictions.
    ours, theirs = (
        pq.read_table(out / x / "predictions" / f"{day(2)}.parquet") for x in ("next", "user")
    )
    assert ours.equals(theirs)
    with pytest.raises(InputError, match="must be a line of tiny; it is version"):
        walk_ranker.main(args(lake, out, line=f"next@{day(1)}"))


def test_predictions_of_a_day_depend_on_nothing_of_it_or_later_but_its_requests(
    lake: str, undisturbed: Path, tmp_path: Path
) -> None:
    spec, later = domain(), Days(day(4), day(NUM_DAYS))
    for table in (tables.ranker_samples(spec), tables.histories(spec)):
        rows = delta.read(lake, table, later)
        rows = changed(rows, "label_buy", pc.subtract(1, rows["label_buy"]))
        if table.name.startswith("histories"):
            rows = changed(rows, "f_item", pc.add(rows["f_item"], 30))
        delta.replace(lake, table, rows, later, commit={"job": "test"})
    table = TOKENS[0]
    rows = delta.read(lake, table, later, line="user")
    noise = np.random.default_rng(0).normal(size=(len(rows), 16)).astype(np.float16)
    rows = changed(rows, "token", pa.array([each.tobytes() for each in noise]))
    delta.replace(lake, table, rows, later, line="user", commit={"job": "test"})
    walk_ranker.main(args(lake, tmp_path))

    def scores(folder: Path, number: int) -> list[float]:
        rows = pq.read_table(folder / "predictions" / f"{day(number)}.parquet")
        return rows["score"].to_pylist()

    same = [scores(tmp_path / "user", n) == scores(undisturbed, n) for n in range(NUM_DAYS)]
    assert same == [True] * 5 + [False] * 3


def changed(rows: pa.Table, name: str, values: Any) -> pa.Table:
    place = rows.schema.get_field_index(name)
    return rows.set_column(
        place, rows.schema.field(place), values.cast(rows.schema.field(place).type)
    )


def test_a_windowed_ranker_reads_its_window_alone(lake: str, whole: str, tmp_path: Path) -> None:
    index, out, window = str(tmp_path / "index"), tmp_path / "out", 2
    daily = str(tmp_path / "daily")
    publish(whole, daily, 0)
    for number in range(NUM_DAYS):
        build(daily, number)
        publish(whole, daily, max(0, number - 1))
        given = {"window": window} if number < 2 else {}
        given["end"] = day(number + 1)
        with unreadable(daily, until=day(number - window)):
            walk_ranker.main(args(daily, out, index=index, **given))
    walk_ranker.main(args(lake, tmp_path / "whole", window=window))
    ours = content(out / "user")
    assert ours == content(tmp_path / "whole" / "user")
    walk_ranker.main(args(lake, tmp_path / "unlimited", end=day(6)))
    name = f"{day(5)}.parquet"
    assert ours[name] != content(tmp_path / "unlimited" / "user")[name]


def test_a_ranker_keeps_what_it_was_begun_with(lake: str, tmp_path: Path) -> None:
    begun = args(lake, tmp_path, end=day(2), window=3, start=day(0))
    walk_ranker.main(begun)
    for changes, said in (
        ({"seed": 1}, "seed: 0 there, 1 asked for"),
        ({"window": 0}, "window: 3 there, 0 asked for"),
        ({"start": day(1)}, f"start: {day(0)} there, {day(1)} asked for"),
        ({"ranker": "transformer"}, "ranker: din there, transformer asked for"),
        ({"arm": "tokens"}, "arm: match there, tokens asked for; config: other item_tokens"),
    ):
        with pytest.raises(InputError, match=f"other settings.*{said}"):
            walk_ranker.main(replace(begun, end=day(3), **changes))
    with pytest.MonkeyPatch.context() as patched:
        spec = domain()
        more = replace(spec.features[0], buckets=32)
        patched.setattr(
            walk_ranker, "load_domain", lambda _: replace(spec, features=(more, *spec.features[1:]))
        )
        with pytest.raises(InputError, match="features: other user"):
            walk_ranker.main(replace(begun, end=day(3)))
    assert walk_ranker.main(args(lake, tmp_path, end=day(3)))["days"] == [str(day(2))]


def test_a_day_waits_for_its_tables_and_says_so(tmp_path: Path) -> None:
    lake, base = str(tmp_path / "lake"), {"arm": "base", "line": ""}
    with pytest.raises(
        InputError, match="ranker_samples/tiny has no days; run `iat build-samples`"
    ):
        walk_ranker.main(args(lake, tmp_path, **base))
    for number in (0, 1, 3):
        build(lake, number, [tables.ranker_samples])
    for number in (0, 3):
        build(lake, number, [tables.histories])
    dry = walk_ranker.main(args(lake, tmp_path / "dry", **base, dry_run=True))
    assert (dry["days"], (tmp_path / "dry").exists()) == ([str(day(0))], False)
    result = walk_ranker.main(args(lake, tmp_path, **base))
    assert result["days"] == [str(day(0))]
    assert result["waits"] == "its histories are not written (iat build-streams)"
    build(lake, 1, [tables.histories])
    result = walk_ranker.main(args(lake, tmp_path, **base))
    assert (result["days"], result["waits"]) == ([str(day(1))], NOT_WRITTEN)
    build(lake, 2)
    # The fourth day was written, and empty.
    assert walk_ranker.main(args(lake, tmp_path, **base))["days"] == [str(day(2)), str(day(3))]


def test_the_newest_run_alone_pins_tables(lake: str, tmp_path: Path) -> None:
    for end in (2, 3):
        walk_ranker.main(args(lake, tmp_path, end=day(end)))
    walk_ranker.main(args(lake, tmp_path / "other", end=day(3)))
    live = {place: each for each, place in manifests.live(lake) if each.job == "walk-ranker"}
    held = {place: each for place, each in live.items() if place.startswith(str(tmp_path))}
    places = [str(out.absolute() / "user") for out in (tmp_path, tmp_path / "other")]
    assert sorted(held) == sorted(places)
    newest = held[places[0]]
    assert newest.days == [str(day(0)), str(day(3))]
    assert newest.tables["ranker_samples/tiny"] == NUM_DAYS
    assert manifests.read(tmp_path / "user")[0] == newest


def test_the_command_says_what_it_did(
    lake: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--domain", "tiny", "--lake", lake, "--out", str(tmp_path), "--line", "user"]
    flags += ["--arm", "match", "--device", "cpu", "--json", str(tmp_path / "told.json")]
    assert cli.run(["walk-ranker", *flags, "--end", str(day(3))]) == cli.DONE
    said = capsys.readouterr().out
    assert f"{day(2)}  AUC 0." in said
    assert f"week since {day(0)}: AUC 0." in said
    told = json.loads((tmp_path / "told.json").read_text())
    assert set(told) == {key.split(" (")[0] for key in cli.JSON_KEYS["walk-ranker"].split(", ")}
    assert cli.run(["walk-ranker", *flags, "--end", str(day(3))]) == cli.DONE
    assert json.loads((tmp_path / "told.json").read_text())["days"] == []
