"""What comes from outside runs nothing, leaves no folder, and what opens a lake is never told."""

from __future__ import annotations

import ast
import io
import json
import logging
import os
import pickle
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from hypothesis import example, given
from hypothesis import strategies as st
from pyspark.sql import SparkSession

from compressor import versions
from compressor.training import checkpoint
from downstream.index_arrays import load as load_array
from jobs import cli, ledger
from jobs.cli import run
from jobs.oracle import Oracle
from pipelines import delta, tables
from pipelines.column_facts import open_log
from pipelines.days import Days
from pipelines.domain import Domain, load, parse
from pipelines.errors import CheckFailedError, InputError, RetryableError
from pipelines.instances import checked
from pipelines.names import checked_line, checked_table
from pipelines.temporal_order import model_ready
from pipelines.token_sql import token_array

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipelines", "compressor", "downstream", "jobs")
DAY = date(2026, 1, 1)
ONE_DAY = Days(DAY, date(2026, 1, 2))
HOSTILE = [
    "..", "../x", "a/../../x", "/etc/passwd", "~/x", "a\\..\\b", ".hidden", "%2e%2e%2fx",
    "x' OR '1' = '1", "x'; DROP TABLE log; --", 'x"; DROP TABLE log; --', "a`b", "a`; DROP", "a;b",
    "a b", "line\nbreak", "line\n", "tab\t", "nul\0", "$(id)", "{x}", "${x}", "*", "[a]",
    "\uff4cine", "l\u0456ne", "line\u2028", "\u202eenil", "\uff11", "é",
]  # fmt: skip


def domain(**changed: Any) -> Domain:
    raw: dict[str, Any] = {
        "name": "shop",
        "source": {"path": "x.parquet"},
        "columns": {"user": "u", "item": "i", "time": "t"},
        "label": [{"name": "click", "column": "c"}],
        "feature": [{"name": "item", "column": "i", "side": "item", "buckets": 64}],
    }
    return parse(raw | changed)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_domain_file_cannot_name_what_is_no_name(name: str) -> None:
    feature = {"name": "item", "column": "i"}
    for changed in (
        {"name": name},
        {"label": [{"name": name, "column": "c"}]},
        {"feature": [feature | {"name": name}]},
        {"feature": [feature | {"table": name}]},
    ):
        with pytest.raises(InputError, match="name must be lower-case letters"):
            domain(**changed)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_line_or_version_or_table_can_end_no_text_and_leave_no_folder(
    name: str, lake: str
) -> None:
    tokens = tables.instance_tokens("shop")
    empty = tokens.schema.empty_table()
    with pytest.raises(InputError, match="is no compressor line"):
        delta.replace(lake, tokens, empty, ONE_DAY, commit={}, line=name)
    for parts in ((name, "v"), ("line", name)):
        with pytest.raises(InputError, match="is no compressor"):
            versions.folder(lake, *parts)
    for part in (name, f"instances/{name}"):
        with pytest.raises(InputError, match="is no table name"):
            delta.uri(lake, tables.Table(part, tokens.schema, (), ()))
    flags = ["--domain", "synthetic", "--lake", lake, "--line", name]
    assert run(["train-compressor", *flags]) == cli.WRONG_INPUT


@given(st.text(max_size=12))
@example("a/..")
@example("..")
def test_every_name_that_passes_stays_where_it_is_put(name: str) -> None:
    for check in (checked_line, checked_table):
        try:
            check(name)
        except InputError:
            continue
        place = Path(os.path.normpath(Path("/lake", name)))
        assert Path("/lake") in place.parents
        assert name.isascii()
        assert not set(name) & set("'\"`;\\\n\0 ")


@pytest.mark.parametrize("name", ["../jobs/x", "/etc/passwd", "..", "shop\n", "grocery/../grocery"])
def test_a_domain_is_one_of_ours_or_a_file(name: str) -> None:
    with pytest.raises(InputError, match="no domain called"):
        load(name)


@pytest.mark.parametrize("day", ["2026-01-01' OR '1'='1", "2026-01-01; DROP", "\uff12026-01-01"])
def test_a_day_is_a_day(day: str, lake: str) -> None:
    with pytest.raises(SystemExit) as left:
        run(["status", "--domain", "synthetic", "--lake", lake, "--start", day])
    assert left.value.code == 2


def test_columns_and_values_of_a_log_are_only_ever_columns_and_values(spark: SparkSession) -> None:
    """As names of raw columns, separators, keys and values, through Spark."""
    values, names = HOSTILE[:12], [n for n in HOSTILE if "\0" not in n]
    features = [
        {"name": f"x{n}", "column": name, "separator": name, "kind": "multi-category"}
        for n, name in enumerate(names)
    ]
    spec = domain(
        columns={"user": names[0], "item": names[1], "time": "event", "time_unit": "us"},
        label=[{"name": "click", "always": 1}],
        feature=features,
    )
    first_us = 1_767_225_600_000_000
    log = [dict.fromkeys(names, v) | {"event": first_us + n} for n, v in enumerate(values)]
    schema = ", ".join(f"`{name.replace('`', '``')}` string" for name in names) + ", event long"
    frame = spark.createDataFrame([tuple(row.values()) for row in log], schema)
    found = model_ready(checked(frame, spec, ONE_DAY), spec).collect()
    assert {row["rule"] for row in found} == {None}
    assert sorted(row["user_key"] for row in found) == sorted(values)
    for row in found:
        for n, separator in enumerate(names):
            parts = [part for part in row["user_key"].split(separator) if part.strip(" ")]
            assert len(row[f"f_x{n}"]) == min(len(parts), 8), (separator, row["user_key"])
    tokens = spark.createDataFrame([(b"\x00\x3c",)], "`a``, 1/0, ``b` binary")
    assert tokens.select(token_array("a`, 1/0, `b").alias("t")).collect()[0]["t"] == [1.0]


def test_a_users_key_and_a_line_are_parameters_of_the_oracles_questions(lake: str) -> None:
    spec = domain()
    for table in (
        tables.instances(spec), tables.ranker_samples(spec), tables.histories(spec),
        tables.instance_tokens("shop"), tables.item_tokens("shop"), tables.compressor_versions(),
    ):  # fmt: skip
        delta.replace(lake, table, table.schema.empty_table(), None, commit={})
    for line in HOSTILE:
        oracle = Oracle(lake, spec, line)
        assert oracle.strays()[0] == 0
        assert len(oracle.policy()) == 0


@pytest.fixture
def hostile_log(tmp_path: Path) -> Path:
    """A file of a hostile name with hostile columns and values."""
    rng = np.random.default_rng(0)
    file = tmp_path / "a'); DROP VIEW log; --.parquet"
    texts = [t for t in HOSTILE if "\0" not in t]
    columns: dict[str, Any] = {
        'user"; DROP VIEW log; --': [texts[n] for n in rng.integers(0, len(texts), 400)],
        "item' OR 1=1 \n[[label]]\nname = 'planted'": [f"i{n % 9}" for n in range(400)],
        "time": [datetime(2026, 1, 1, n % 24, tzinfo=UTC) for n in range(400)],
        "same\nname = 'planted'": ["x"] * 400,
        "odd\x7f\\": [f"{n % 3}" for n in range(400)],
    }
    pq.write_table(pa.table(columns), file)
    return file


def test_a_draft_of_a_hostile_log_says_what_the_log_says_and_no_more(
    hostile_log: Path, tmp_path: Path
) -> None:
    facts = open_log(str(hostile_log)).facts()
    assert list(facts) == pq.read_schema(hostile_log).names
    out = tmp_path / "shop.toml"
    assert run(["init", str(hostile_log), "--out", str(out), "--name", "shop"]) == cli.DONE
    text = out.read_text().replace('# user = ""', 'user = "u"').replace('# item = ""', 'item = "i"')
    out.write_text(text.replace('# time = ""', 'time = "t"'))
    spec = load(str(out))
    named = {f.column for f in spec.features if f.column} - {"u", "i"}
    assert named <= set(facts)
    assert "odd\x7f\\" in named
    assert [label.name for label in spec.labels] == ["taken"]
    for name in (n for n in HOSTILE if "\0" not in n):  # no command line holds that one
        assert run(["init", str(hostile_log), "--name", name]) == cli.WRONG_INPUT


FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve",
                     "marshal"}  # fmt: skip
FORBIDDEN_CALLS = {"torch.load", "torch.jit.load", "torch.hub.load", "pd.read_pickle",
                   "pandas.read_pickle", "yaml.load", "np.fromfile", "eval", "exec"}  # fmt: skip


def dangers(source: str) -> Iterator[str]:
    """What in a source could run code that a file brings along."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
        elif isinstance(node, ast.Call):
            names = []
            called = ast.unparse(node.func)
            given = {k.arg: ast.unparse(k.value) for k in node.keywords}
            is_numpy = called in ("np.load", "numpy.load")
            if called in FORBIDDEN_CALLS or given.get("allow_pickle", "False") != "False":
                yield ast.unparse(node)
            elif is_numpy and "allow_pickle" not in given:
                yield f"{ast.unparse(node)} without allow_pickle=False"
        else:
            continue
        yield from (n for n in names if n.split(".")[0] in FORBIDDEN_MODULES)
        yield from (n for n in names if n in FORBIDDEN_CALLS)


def test_no_source_of_ours_can_load_a_pickle() -> None:
    files = [f for package in PACKAGES for f in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 80
    assert {str(f): found for f in files if (found := [*dangers(f.read_text())])} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from joblib import load", "import torch\ntorch.load(f)", "np.load(f)",
        "np.load(f, allow_pickle=True)", "np.load(f, allow_pickle=flag)", "from torch import load",
        "import os, dill.x", "eval(text)", "x.y(allow_pickle=1)",
    ],
)  # fmt: skip
def test_the_scan_finds(source: str) -> None:
    assert [*dangers(source)]


class Planted:
    """Unpickled, it makes a file."""

    def __init__(self, at: Path) -> None:
        self.at = at

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.at,)


def test_a_planted_array_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    np.save(tmp_path / "objects.npy", np.array([Planted(ran)], object), allow_pickle=True)
    (tmp_path / "pickled.npy").write_bytes(pickle.dumps(Planted(ran)))
    (tmp_path / "empty.npy").write_bytes(b"")
    for name in ("objects", "pickled", "empty"):
        with pytest.raises(InputError, match="is no array of numbers"):
            load_array(tmp_path, name)
    assert not ran.exists()
    with (tmp_path / "objects.npy").open("rb") as file:
        np.load(file, allow_pickle=True)
    assert ran.exists()  # it would have


def test_a_planted_checkpoint_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    ran, folder = tmp_path / "ran", tmp_path / "version"
    folder.mkdir()
    (folder / "meta.json").write_text("{}")
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as file:
        file.writestr("archive/data.pkl", pickle.dumps(Planted(ran)))
    for planted in (pickle.dumps(Planted(ran)), zipped.getvalue(), b""):
        (folder / "tensors.safetensors").write_bytes(planted)
        with pytest.raises(InputError, match="is no safetensors file"):
            checkpoint.load(folder)
    assert not ran.exists()


SECRETS = ("AKIAKEY", "s3cr3t", "SIGNATURE", "TOKEN")
LAKES = [
    "s3://AKIAKEY:s3cr3t@bucket/lake",
    "s3://AKIAKEY:s3cr/3t@bucket/lake?token=TOKEN",
    "https://account.blob.core.windows.net/lake?sv=1&sig=SIGNATURE",
    "abfss://container@account.dfs.core.windows.net/lake?sig=SIGNATURE",
    "memory://TOKEN@host/lake#SIGNATURE",
]


def secrets_in(text: str) -> list[str]:
    return [s for s in (*SECRETS, "s3cr", "3t@") if s in text]


@pytest.mark.parametrize("uri", LAKES)
def test_no_error_of_ours_tells_what_opens_a_lake(uri: str) -> None:
    for kind in (InputError, RetryableError, CheckFailedError):
        error = kind(f"the lake {uri} has no table {uri}/instances/shop; run the job first")
        for text in (str(error), repr(error), str(pickle.loads(pickle.dumps(error)))):
            assert secrets_in(text) == []
            assert "lake" in text


@dataclass(frozen=True)
class Args:
    lake: str
    data: Path
    lines: tuple[str, ...]


@pytest.mark.parametrize("uri", LAKES)
def test_neither_the_ledger_nor_a_commit_tells_what_opens_a_lake(uri: str, lake: str) -> None:
    args = Args(uri, Path(uri), (uri,))
    spec = domain()
    table = tables.histories(spec)

    def work() -> None:
        with ledger.job(lake, "evaluate", args) as run:
            run.figures["source"] = uri
            commit = ledger.commit_of(run, spec, {"source": uri})
            delta.replace(lake, table, table.schema.empty_table(), ONE_DAY, commit=commit)
            raise OSError(f"cannot reach {uri}: Generic error: GET {uri}&x=1")

    with pytest.raises(OSError, match="cannot reach"):
        work()
    (row,) = delta.read(lake, tables.job_reports()).to_pylist()
    assert secrets_in(row["report"]) == []
    assert json.loads(row["report"])["args"]["lake"].endswith("lake")
    assert secrets_in(json.dumps(DeltaTable(delta.uri(lake, table)).history())) == []
    written = [f.read_text(errors="replace") for f in Path(lake).rglob("_delta_log/*.json")]
    assert secrets_in(" ".join(written)) == []


@pytest.mark.parametrize(
    "flags",
    [
        ["status", "--domain", "synthetic"],
        ["write-tokens", "--domain", "synthetic", "--version", "user"],
        ["fetch", "--domain", "synthetic", "--user", "1", "--as-of", "2026-01-01"],
        ["quickstart"],
    ],
    ids=lambda flags: flags[0],
)
def test_a_command_on_a_lake_that_is_not_there_names_it_without_its_secrets(
    flags: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
    assert run([*flags, "--lake", "memory://AKIAKEY:s3cr3t@bucket/lake?sig=SIGNATURE"]) != cli.DONE
    said = "".join(capfd.readouterr())
    assert "bucket/lake" in said
    assert secrets_in(said) == []


def test_logs_and_tracebacks_leave_secrets_out(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(argv: list[str]) -> int:
        logging.getLogger("x").warning("writing to %s", LAKES[0])
        raise KeyError(LAKES[1])

    run(["status", "--domain", "nothing", "--lake", LAKES[0]])  # sets the log up
    monkeypatch.setattr(cli, "run", fail)
    with pytest.raises(SystemExit) as left:
        cli.main([])
    said = capfd.readouterr().err
    assert left.value.code == 1
    assert "writing to s3://bucket/lake" in said
    assert "KeyError: 's3://bucket/lake'" in said
    assert secrets_in(said) == []
