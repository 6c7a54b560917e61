"""`iat transfer` and `iat transfer-report` on two small worlds in real tables: a source that knows
something of the target, one that does not, and a fetch that reads the future."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from downstream.configs import RankerConfig, RankerTraining, arm
from downstream.transfer import SourceHistory
from downstream.user_index import IndexStore
from jobs import cli, evaluate, train_ranker, transfer, transfer_report
from jobs.verify import is_intact
from pipelines import delta, manifests, tables
from pipelines.errors import CheckFailedError, InputError
from tests.jobs.transfer_world import COMMIT, FIRST, NUM_DAYS, add_line, domain, make_world

SMALL = RankerConfig(
    embedding=4, width=16, num_tokens=8, depth=1, heads=2, history_length=8, query_width=8
)
DAYS = str(train_ranker.Days(FIRST, FIRST + timedelta(days=NUM_DAYS)))


@pytest.fixture(scope="module", autouse=True)
def _small() -> Iterator[None]:
    """Small rankers, and the world's domains."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "load_domain", domain)
        patch.setattr(transfer, "arm", lambda name: arm(name, SMALL))
        patch.setattr(
            transfer,
            "RankerTraining",
            lambda seed: RankerTraining(
                seed=seed, learning_rate=4e-3, batch_candidates=64, average=0.9
            ),
        )
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_world(tmp_path_factory.mktemp("world") / "lake", num_users=60)


@pytest.fixture(scope="module")
def done(world: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished run beside both sources."""
    out = tmp_path_factory.mktemp("done") / "out"
    return out, transfer.main(args(world, out))


def args(lake: str, out: Path, **given: Any) -> transfer.Args:
    given = {"source": ("ads", "news"), "proof_requests": 80} | given
    return transfer.Args(target="shop", lake=lake, out=out, device="cpu", **given)


def test_a_source_that_knows_something_helps_and_one_that_does_not_does_not(
    done: tuple[Path, dict[str, Any]],
) -> None:
    out, result = done
    assert result["arms"] == [
        "target alone", "+ own", "+ ads", "+ news", "+ all sources", "+ own and all sources",
        "+ all sources, shuffled",
    ]  # fmt: skip
    report = transfer_report.main(transfer_report.Args(out=out, bootstraps=100))
    (found,) = report["transfers"]
    gain = {row["name"]: row["difference"]["auc"] for row in found["arms"][1:]}
    for name in ("+ ads", "+ all sources", "+ own and all sources"):
        assert gain[name]["low"] > 0.1
    for name in ("+ news", "+ all sources, shuffled"):
        assert gain[name]["low"] < 0
    assert found["beside_shuffled"]["auc"]["low"] > 0.1
    assert found["same_budget"]
    assert len({row["trained_rows"] for row in found["arms"]}) == 1
    assert found["arms"][0]["parameters"] < found["arms"][2]["parameters"]
    assert (found["days"], found["seeds"], found["line"]) == (DAYS, [0], "shop")
    assert found["sources"] == {"ads": "ads", "news": "news"}
    proof = result["runs"][0]["proof"]
    assert is_intact(proof)
    assert found["proof"]["passed"]
    assert found["proof"]["differences"] == 0
    assert "proof holds: 15 checks" in transfer_report.as_text(report)


def test_coverage_is_counted_over_users_and_samples(done: tuple[Path, dict[str, Any]]) -> None:
    told = done[1]["runs"][0]["coverage"]
    assert set(told) == {"ads", "news", "all sources"}
    assert told["ads"]["users"] == 1
    # On the first day nothing is published yet.
    assert 0.5 < told["ads"]["samples"] < 1 - 1 / NUM_DAYS + 0.01
    total = told["ads"]["events"] + told["news"]["events"]
    assert told["all sources"]["events"] == pytest.approx(total)


def test_predictions_are_what_iat_evaluate_reads(done: tuple[Path, dict[str, Any]]) -> None:
    folders = sorted((done[0] / "shop.din.seed0").glob("*/predictions.parquet"))
    assert len(folders) == 7
    report = evaluate.main(evaluate.Args(predictions=tuple(folders), bootstraps=5))
    assert report["num_rows"] == pq.read_metadata(folders[0]).num_rows
    assert "din + own streaming" in [row["name"] for row in report["arms"]]


def test_a_second_call_trains_nothing_and_says_the_same(
    done: tuple[Path, dict[str, Any]], world: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_ranker, "run", None)
    assert transfer.main(args(world, done[0])) == done[1]


def test_a_run_that_was_cut_trains_what_is_left(
    done: tuple[Path, dict[str, Any]], world: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, trained = tmp_path / "out", []
    shutil.copytree(done[0], out)
    cut = out / "shop.din.seed0" / "ads"
    before = pq.read_table(cut / "predictions.parquet")
    (cut / "metrics.json").unlink()
    (out / "shop.din.seed0" / "run.json").unlink()
    with pytest.raises(InputError, match=r"no finished run .* begun: shop.din.seed0"):
        transfer_report.main(transfer_report.Args(out=out))
    run = train_ranker.run
    monkeypatch.setattr(train_ranker, "run", lambda *a, **k: trained.append(a) or run(*a, **k))
    transfer.main(args(world, out))
    assert len(trained) == 1
    assert pq.read_table(cut / "predictions.parquet").equals(before)


def test_a_folder_of_other_settings_or_rows_is_refused(
    done: tuple[Path, dict[str, Any]], world: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="is of a run with other sources; remove it, or give"):
        transfer.main(args(world, done[0], source=("ads",)))
    with pytest.raises(InputError, match="is of a run with other days, start; remove"):
        transfer.main(args(world, done[0], start=FIRST + timedelta(days=1)))
    lake = str(shutil.copytree(world, tmp_path / "lake"))
    table = tables.instance_tokens("ads")
    rows = delta.read(lake, table)
    delta.replace(lake, table, rows.slice(1), None, commit=COMMIT)
    with pytest.raises(InputError, match="over other rows: the tables have changed"):
        transfer.main(args(lake, done[0]))


def test_seeds_of_other_rows_are_not_one_table(
    done: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(done[0], out)
    second = Path(shutil.copytree(out / "shop.din.seed0", out / "shop.din.seed1"))
    told = json.loads((second / "run.json").read_text())
    (second / "run.json").write_text(json.dumps(told | {"seed": 1, "digest": "another"}))
    with pytest.raises(InputError, match="of one target and ranker and of other digest"):
        transfer_report.main(transfer_report.Args(out=out))
    told["proof"]["passed"] = False
    shutil.rmtree(second)
    (out / "shop.din.seed0" / "run.json").write_text(json.dumps(told))
    with pytest.raises(CheckFailedError, match="the proof of shop, din failed"):
        transfer_report.main(transfer_report.Args(out=out, bootstraps=2))


def test_seeds_are_one_table_and_each_has_a_budget_of_its_own(
    done: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = Path(shutil.copytree(done[0], tmp_path / "out"))
    second = Path(shutil.copytree(out / "shop.din.seed0", out / "shop.din.seed1"))
    for file in second.glob("*/predictions.parquet"):
        rows = pq.read_table(file)
        named = json.loads(rows.schema.metadata[b"iat"]) | {"seed": 1}
        pq.write_table(rows.replace_schema_metadata({"iat": json.dumps(named)}), file)
    told = json.loads((second / "run.json").read_text()) | {"seed": 1}
    for arm_told in told["arms"].values():
        arm_told["trained_rows"] += 10
    for more, is_same in ((0, True), (1, False)):
        told["arms"]["+ ads"]["trained_rows"] += more
        (second / "run.json").write_text(json.dumps(told))
        report = transfer_report.main(transfer_report.Args(out=out, bootstraps=5))
        (found,) = report["transfers"]
        assert (found["seeds"], found["same_budget"]) == ([0, 1], is_same)
        assert found["arms"][1]["paired_seeds"] == [0, 1]


def test_what_a_run_reads_is_pinned_for_every_domain(
    done: tuple[Path, dict[str, Any]], world: str
) -> None:
    (named,) = {run["manifest"] for run in done[1]["runs"]}
    for name in ("shop", "ads", "news"):
        assert named in [manifest.name for manifest, _ in manifests.live(world, name)]
    assert manifests.live(world, "other") == []
    held, _ = manifests.read(done[0] / "shop.din.seed0")
    assert {"ranker_samples/shop", "instance_tokens/ads", "histories/news"} <= set(held.tables)


def test_a_dry_run_says_the_arms_and_writes_nothing(world: str, tmp_path: Path) -> None:
    told = transfer.main(
        args(world, tmp_path / "out", source=("ads",), seed=3, seeds=2, dry_run=True)
    )
    assert told["arms"] == [
        "target alone", "+ own", "+ ads", "+ own and ads", "+ ads, shuffled"
    ]  # fmt: skip
    assert told["seeds"] == [3, 4]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"source": ("shop",)}, "--source shop is the target shop itself"),
        ({"source": ("ads", "ads=ads")}, "--source ads=ads: ads is given twice"),
        ({"source": ()}, "--source is needed"),
        ({"source": ("ads=none",)}, "'none' is no compressor line of ads; the lake has"),
        ({"source": ("ads=shop",)}, "'shop' is no compressor line of ads"),
        ({"source": ("games",)}, "needs one compressor line of games; .*: none; train one"),
        ({"line": "ads"}, "--line: 'ads' is no compressor line of shop"),
        ({"seeds": 0}, "--seeds must be at least 1"),
        ({"proof_requests": 0}, "--proof-requests must be at least 1"),
        ({"ranker": "dim"}, "no ranker called 'dim'"),
        ({"start": date(2030, 1, 1)}, "2030"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_wrong_input_is_named(world: str, tmp_path: Path, given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        transfer.main(args(world, tmp_path / "out", **given))


def test_of_several_lines_one_must_be_named(world: str, tmp_path: Path) -> None:
    lake = str(shutil.copytree(world, tmp_path / "lake"))
    add_line(lake, "second", "ads")
    with pytest.raises(InputError, match="the lake has of ads: ads, second; say which"):
        transfer.main(args(lake, tmp_path / "out"))
    told = transfer.main(args(lake, tmp_path / "out", source=("ads=ads",), dry_run=True))
    assert told["sources"] == {"ads": "ads"}
    with pytest.raises(InputError, match="'second'"):  # it has written nothing
        transfer.main(args(lake, tmp_path / "out", source=("ads=second",)))


def test_domains_that_share_no_user_are_refused(tmp_path: Path) -> None:
    lake = make_world(tmp_path / "lake", num_users=5, first_user=1000)
    with pytest.raises(InputError, match="source ads shares no user with shop: none of 5 users"):
        transfer.main(args(lake, tmp_path / "out", source=("ads",)))


def planted(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """A fetch that sees what is published at as_of itself, or happens then; or is another's."""
    rows, positions = SourceHistory.rows, IndexStore.positions
    if fault == "published":
        monkeypatch.setattr(
            SourceHistory, "rows", lambda self, r, as_of, length: rows(self, r, as_of + 1, length)
        )
    elif fault == "late":
        later = 3 * 86_400_000_000
        monkeypatch.setattr(
            IndexStore, "positions", lambda self, user, as_of: positions(self, user, as_of + later)
        )
        monkeypatch.setattr(
            SourceHistory,
            "rows",
            lambda self, r, as_of, length: rows(self, r, as_of + later, length),
        )
    else:

        def of_another(self: IndexStore, user: Tensor, as_of: Tensor) -> tuple[Tensor, Tensor]:
            return positions(self, user.roll(1), as_of)

        monkeypatch.setattr(IndexStore, "positions", of_another)


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("published", "nothing at or after as_of"),
        ("late", "a disturbed future moves no logit"),
        ("another's", "ads: events"),
    ],
)
def test_a_planted_fault_fails_the_proof(
    world: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, named: str
) -> None:
    planted(monkeypatch, fault)
    with pytest.raises(CheckFailedError) as failed:
        transfer.main(args(world, tmp_path / "out", source=("ads",)))
    broken = [c["name"] for c in failed.value.result["checks"] if c["passed"] is False]
    assert any(named in name for name in broken)
    assert "ads: events" in broken
    proof = json.loads((tmp_path / "out" / "shop.din.seed0" / "proof.json").read_text())
    assert not proof["passed"]


@pytest.mark.parametrize("is_source", [True, False], ids=["a source's", "the target's"])
def test_a_line_frozen_on_later_days_fails_the_proof(
    world: str, tmp_path: Path, is_source: bool
) -> None:
    lake = str(shutil.copytree(world, tmp_path / "lake"))
    name = ("shop", "ads")[is_source]
    add_line(lake, name, name, protocol="frozen", end=FIRST + timedelta(days=5))
    with pytest.raises(CheckFailedError, match="compressor line is neutral: 1 of 1 differ"):
        transfer.main(args(lake, tmp_path / "out", source=("ads",)))


def test_the_commands_leave_with_the_codes_that_say_what_happened(
    world: str, done: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["transfer", "--target", "shop", "--lake", world, "--device", "cpu"]
    several = ["--source", "ads", "--source", "news=news", "--out", str(tmp_path / "out")]
    assert cli.run([*words, *several, "--dry-run"]) == 0
    assert cli.run([*words, *several[:2], *several[:2], *several[4:]]) == 2
    file = tmp_path / "report.json"
    report = ["transfer-report", "--out", str(done[0]), "--bootstraps", "3", "--json", str(file)]
    assert cli.run(report) == 0
    assert json.loads(file.read_text())["transfers"][0]["target"] == "shop"
    planted(monkeypatch, "late")
    assert cli.run([*words, *several]) == 1
