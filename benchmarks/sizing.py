"""What an instance costs: bytes, files, shuffle, time and memory of every table, measured.

`make bench ONLY=sizing ARGS='--instances 10000000'`: the synthetic world's log, folded into a few
days, through the real jobs: instances, streams, histories, samples, tokens of an untrained
compressor, user index. Everything is a cost per instance, measured of a hundredth, a tenth and all
of the instances in one run: where ten times the instances cost more than BAR times as much each,
the row misses. A log four times as wide says what a feature costs. `benchmarks/sizing_plan.py`
makes the tables of docs/sizing.md from the rows.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from importlib import resources
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import CommitProperties, DeltaTable
from deltalake.transaction import AddAction, RemoveAction

from jobs import ledger
from pipelines import delta, raw_files, tables
from pipelines.days import Days
from pipelines.domain import Domain
from pipelines.domain import load as load_domain
from pipelines.sources import synthetic
from pipelines.sources.synthetic_world import World
from pipelines.tables import Table

FIRST = synthetic.FIRST_DAY
NUM_DAYS = 2
"""As many as this machine has cores: each day is one task."""
DAY_US = 86_400_000_000
TIMES_WIDER = 4
BAR = 1.2
ROWS_PER_USER = 80
"""Fewer than any block of the world's users has in all its days."""
MOST_TRAINED = 100_000
LINE = "sizing"
NUM_FILES, NUM_COMMITS = 100_000, 1_000
BUILT = ("instances", "temporal_order", "user_order", "histories", "ranker_samples")

Costs = dict[str, tuple[float, str]]
"""(value, unit) by name."""


def domain_file(times: int) -> str:
    """The synthetic domain over a log in place, its features `times` times."""
    text = (resources.files("pipelines") / "domains" / "synthetic.toml").read_text()
    text = text.replace('reader = "synthetic"', 'path = "log"')
    head, *features = text.split("[[feature]]")
    for copy in range(1, times):
        more = [re.sub(r'^name = "(\w+)"', rf'name = "\1_{copy}"', f, flags=re.M) for f in features]
        head += "".join(
            "[[feature]]" + re.sub(r'^column = "(\w+)"', rf'column = "\1_{copy}"', f, flags=re.M)
            for f in more
        )
    return "[[feature]]".join([head, *features])


def write_log(folder: Path, num_instances: int, times: int) -> None:
    """The first `num_instances` of the synthetic world, a Parquet file a day: its DAYS days are
    folded into NUM_DAYS, as many users as days were folded taking their places."""
    folder.mkdir()
    world = World(num_users=-(-num_instances // ROWS_PER_USER))
    schema, left = None, num_instances
    with contextlib.ExitStack() as open_files:
        writers: list[pq.ParquetWriter] = []
        for block in synthetic.events(world):
            rows = _folded(block.drop_columns(list(synthetic.TRUTH)), world.num_users)
            rows = _widened(rows.slice(0, left), times)
            left -= len(rows)
            day = pc.days_between(pa.scalar(FIRST, pa.date32()), rows["event_time"].cast("date32"))
            if schema is None:
                schema = rows.schema
                writers += [
                    open_files.enter_context(
                        pq.ParquetWriter(folder / f"{n}.parquet", schema, compression="zstd")
                    )
                    for n in range(NUM_DAYS)
                ]
            for number, writer in enumerate(writers):
                writer.write_table(rows.filter(pc.equal(day, number)))
            if not left:
                return
    raise AssertionError(f"the world has {left} instances too few: lower ROWS_PER_USER")


def _folded(rows: pa.Table, num_users: int) -> pa.Table:
    time_us = rows["event_time"].cast("int64").to_numpy()
    day = time_us // DAY_US - (FIRST - date(1970, 1, 1)).days
    moved = time_us - (day - day % NUM_DAYS) * DAY_US
    columns = {name: rows[name] for name in rows.column_names}
    columns["user_id"] = pa.array(rows["user_id"].to_numpy() + num_users * (day // NUM_DAYS))
    columns["event_time"] = pa.array(moved).cast(tables.UTC_TIME)
    return pa.table(columns)


def _widened(rows: pa.Table, times: int) -> pa.Table:
    columns = {name: rows[name] for name in rows.column_names}
    copies = {f"{n}_{c}": column for c in range(1, times) for n, column in columns.items()}
    return pa.table(columns | copies)


class Stage(NamedTuple):
    """One stage of Spark that ran."""

    rows_written: int
    core_s: float
    shuffle_bytes: int
    spilled_bytes: int


def stages_since(spark: Any, stage_id: int) -> tuple[list[Stage], int]:
    """Those after `stage_id`, in order, and the newest one's id."""
    context, jvm = spark.sparkContext, spark.sparkContext._jvm
    context._jsc.sc().listenerBus().waitUntilEmpty()
    none = context._gateway.new_array(jvm.double, 0), jvm.java.util.ArrayList()
    listed = context._jsc.sc().statusStore().stageList(None, False, False, *none)
    held = jvm.scala.jdk.javaapi.CollectionConverters.asJava(listed)
    found = sorted(
        (stage.stageId(), stage.attemptId(), stage)
        for stage in held
        if stage.stageId() > stage_id and str(stage.status()) == "COMPLETE"
    )
    stages = [
        Stage(
            int(stage.outputRecords()),
            stage.executorCpuTime() / 1e9,
            stage.shuffleWriteBytes(),
            stage.diskBytesSpilled(),
        )
        for _, _, stage in found
    ]
    return stages, max((number for number, _, _ in found), default=stage_id)


def by_table(stages: Sequence[Stage], names: Sequence[str], num_rows: int) -> dict[str, Stage]:
    """The sums of a job's stages by the table they were for: each ends with the stage that writes
    its `num_rows`; what follows the last is the last's too."""
    ends = [at for at, stage in enumerate(stages) if stage.rows_written == num_rows]
    if len(ends) != len(names):
        raise ValueError(
            f"{len(ends)} stages wrote {num_rows} rows; needed one for each of {names}"
        )
    bounds = [0, *(end + 1 for end in ends[:-1]), len(stages)]
    return {
        name: Stage(*map(sum, zip(*stages[begin:end], strict=True)))
        for name, begin, end in zip(names, bounds, bounds[1:], strict=False)
    }


@dataclass
class Used:
    """What some processes used while a block ran."""

    wall_s: float = 0.0
    core_s: float = 0.0
    """Of all their threads: what others do on the machine meanwhile is not in it."""
    memory: int = 0
    """Bytes, the most of their anonymous memory (what no page cache can give back), as seen 20
    times a second."""
    memory_before: int = 0

    @property
    def more_memory(self) -> int:
        return self.memory - self.memory_before


@contextmanager
def used(*pids: int) -> Iterator[Used]:
    """Measures the block, which prints nothing; without pids: this process."""
    pids = pids or (os.getpid(),)
    found, over = Used(memory_before=_memory(pids)), threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            found.memory = max(found.memory, _memory(pids))

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    started, core_s = time.perf_counter(), _core_s(pids)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield found
    finally:
        over.set()
        watcher.join()
    found.memory = max(found.memory, found.memory_before, _memory(pids))
    found.wall_s, found.core_s = time.perf_counter() - started, _core_s(pids) - core_s


def _memory(pids: Sequence[int]) -> int:
    lines = [x for pid in pids for x in Path(f"/proc/{pid}/status").read_text().splitlines()]
    return sum(int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon"))


def _core_s(pids: Sequence[int]) -> float:
    ticks = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(t[11]) + int(t[12]) for t in ticks) / os.sysconf("SC_CLK_TCK")


def build_tables(root: Path, num_instances: int, times: int, memory: str) -> Costs:
    """The log, and every table that Spark makes of it."""
    from jobs import build_instances, build_samples, build_streams
    from jobs.spark import session

    root.mkdir()
    (root / "sizing.toml").write_text(domain_file(times))
    write_log(root / "log", num_instances, times)
    found: Costs = {}
    log_bytes = sum(file.stat().st_size for file in (root / "log").iterdir())
    found["log, bytes"] = (log_bytes / num_instances, "bytes")
    domain, lake = load_domain(str(root / "sizing.toml")), str(root / "lake")
    spark = session(f"local[{NUM_DAYS}]", memory=memory)
    jvm: Any = spark.sparkContext._jvm
    java = int(jvm.java.lang.ProcessHandle.current().pid())
    same: dict[str, Any] = {"domain": str(root / "sizing.toml"), "lake": lake}
    work: dict[tuple[str, ...], Callable[[], Any]] = {
        BUILT[:1]: lambda: build_instances.main(build_instances.Args(**same)),
        BUILT[1:4]: lambda: build_streams.main(build_streams.Args(**same)),
        BUILT[4:]: lambda: build_samples.main(build_samples.Args(**same)),
    }
    _, newest = stages_since(spark, -1)
    for names, do in work.items():
        with used() as python, used(java) as held:
            do()
        job = names[0] if len(names) == 1 else "streams"
        core_s = python.core_s + held.core_s
        found[f"{job} job, wall s a million"] = (held.wall_s / num_instances * 1e6, "s")
        found[f"{job} job, core s a million"] = (core_s / num_instances * 1e6, "s")
        found[f"{job} job, memory of Java"] = (held.memory, "bytes at most")
        found[f"{job} job, memory of Python"] = (python.more_memory / num_instances, "bytes")
        stages, newest = stages_since(spark, newest)
        of_tasks = sum(stage.core_s for stage in stages)
        for name, stage in by_table(stages, names, num_instances).items():
            # Collecting garbage, planning and the driver are shared out by the tasks' time.
            share = stage.core_s / of_tasks
            found[f"{name}, core s a million"] = (share * core_s / num_instances * 1e6, "s")
            found[f"{name}, shuffled"] = (stage.shuffle_bytes / num_instances, "bytes")
            found[f"{name}, spilled"] = (stage.spilled_bytes / num_instances, "bytes")
    for name in BUILT:
        found |= stored(lake, getattr(tables, name)(domain), domain, num_instances)
    return found


def stored(lake: str, table: Table, domain: Domain, num_instances: int) -> Costs:
    """Bytes and files of a table, its bytes by kind of column, and of what its log says."""
    name, opened = table.name.partition("/")[0], delta.open_table(lake, table)
    added = pa.table(opened.get_add_actions(flatten=True))
    found: Costs = {
        f"{name}, bytes": (pc.sum(added["size_bytes"]).as_py() / num_instances, "bytes"),
        f"{name}, files a day": (len(added) / NUM_DAYS, "files"),
    }
    kinds = {f.stream_column: "number" if f.is_number else "category" for f in domain.features}
    sizes: dict[str, int] = defaultdict(int)
    for path in opened.file_uris():
        footer = pq.ParquetFile(path).metadata
        groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
        for column in (group.column(n) for group in groups for n in range(group.num_columns)):
            top = column.path_in_schema.partition(".")[0]
            sizes[kinds.get(top, _kind(top))] += column.total_compressed_size
    columns = [kinds.get(column) for column in table.schema.names]
    for kind, size in sizes.items():
        each = columns.count(kind) or 1
        unit = f"bytes, each of {each}" if each > 1 else "bytes, all"
        found[f"{name}, bytes of a {kind}"] = (size / num_instances / each, unit)
    return found | {f"{name}, {k}": (v, "bytes") for k, v in log_of(opened.table_uri).items()}


def _kind(column: str) -> str:
    """Of a column that is no feature."""
    return "label" if column.startswith("label_") else "token" if column == "token" else "key"


def log_of(folder: str) -> dict[str, float]:
    """Bytes that the last commit's JSON spends on each file it adds, and on all else."""
    place = Path(folder.removeprefix("file://"), "_delta_log")
    lines = max(place.glob("*.json")).read_text().splitlines()
    adds = [len(line) + 1 for line in lines if line.startswith('{"add"')]
    rest = sum(len(line) + 1 for line in lines) - sum(adds)
    return {"log of a commit": rest, "log of a file": sum(adds) / max(1, len(adds))}


def write_tokens(root: Path, num_instances: int, memory: str) -> Costs:
    """Tokens of every day by an untrained compressor; the first trained on, where that is quick."""
    import torch

    from compressor.configs import SourceConfig
    from jobs import train_compressor
    from jobs import write_tokens as job

    domain, lake = load_domain(str(root / "sizing.toml")), str(root / "lake")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    same: dict[str, Any] = {"domain": str(root / "sizing.toml"), "lake": lake, "device": "cpu"}
    end, a_day = FIRST + timedelta(days=1), num_instances / NUM_DAYS
    found: Costs = {}
    with used() as training:
        train_compressor.main(
            train_compressor.Args(
                **same, protocol="frozen", untrained=True, line=LINE, start=FIRST, end=end
            )
        )
    found["training, memory a row"] = (training.more_memory / a_day, "bytes")
    weights = sum(f.stat().st_size for f in Path(lake, "artifacts").rglob("*") if f.is_file())
    found["weights, bytes"] = (weights, "bytes in all")
    with used() as writing:
        for day in Days(FIRST, FIRST + timedelta(days=NUM_DAYS)):
            job.main(job.Args(**same, version=LINE, start=day, end=day + timedelta(days=1)))
    found["tokens, wall s a million"] = (writing.wall_s / num_instances * 1e6, "s")
    found["tokens, core s a million"] = (writing.core_s / num_instances * 1e6, "s")
    found["tokens, memory a row"] = (writing.more_memory / a_day, "bytes")
    found["tokens, width"] = (SourceConfig().bottleneck, "numbers")
    found |= stored(lake, tables.instance_tokens(domain.name), domain, num_instances)
    items = pa.table(delta.open_table(lake, tables.item_tokens(domain.name)).get_add_actions())
    size, rows = (pc.sum(items[c]).as_py() for c in ("size_bytes", "num_records"))
    found["item_tokens, bytes of an item and day"] = (size / rows, "bytes")
    if num_instances <= MOST_TRAINED:
        with used() as walking:
            train_compressor.main(train_compressor.Args(**same, line="trained", end=end))
        found["walk with training, core s a million"] = (walking.core_s / a_day * 1e6, "s")
    return found


def build_index(root: Path, num_instances: int, memory: str) -> Costs:
    """The user index of all days, with tokens."""
    domain = load_domain(str(root / "sizing.toml"))
    return index_costs(str(root / "lake"), domain, root / "index", LINE)


def index_costs(lake: str, domain: Domain, folder: Path, line: str) -> Costs:
    """What building the index of all days with a line's tokens costs, and what it then holds."""
    from downstream.index_arrays import ITEM_ARRAYS, ITEM_DAY, USERS
    from downstream.index_files import ROWS_AT_ONCE, Snapshot, Users
    from downstream.user_index import UserIndex

    with used() as counting:
        Users.read(Snapshot(lake).source(tables.histories(domain)))
    with used() as building:
        index = UserIndex.build(lake, domain, folder, days=None, lines=[line])
    num_events, num_users = len(index), len(index.users)
    user = np.repeat(np.arange(num_users), index.users.count)
    day = index.arrays["event_time_us"][index.rows] // DAY_US
    num_user_days = 1 + int(((np.diff(user) != 0) | (np.diff(day) != 0)).sum())
    sizes = {f.relative_to(folder): f.stat().st_size for f in folder.rglob("*.npy")}
    of_users = {f for f in sizes if f.name.startswith(f"{USERS}.")}
    of_events = {f for f in sizes if "." not in f.stem and f.stem not in (*ITEM_ARRAYS, ITEM_DAY)}
    return {
        "index, bytes of an event": (sum(sizes[f] for f in of_events) / num_events, "bytes"),
        "index, bytes of a user": (sum(sizes[f] for f in of_users) / num_users, "bytes"),
        "index, memory of a user and day": (counting.more_memory / num_user_days, "bytes"),
        "index, events of a user": (num_events / num_users, "events"),
        "index, wall s a million": (building.wall_s / num_events * 1e6, "s"),
        "index, core s a million": (building.core_s / num_events * 1e6, "s"),
        "index, memory a row at once": (
            building.more_memory / min(num_events, ROWS_AT_ONCE), "bytes",
        ),
    }  # fmt: skip


def log_costs(root: Path, num_files: int, num_commits: int) -> Costs:
    """What a table of many files, a log of many commits and a raw log of many files cost whoever
    opens them: no data file is written."""
    (root / "sizing.toml").write_text(domain_file(1))
    domain = load_domain(str(root / "sizing.toml"))
    table, draw = tables.instances(domain), np.random.default_rng(0)
    day, stats = str(FIRST), '{"numRecords":8000000}'
    added: list[AddAction | RemoveAction] = [
        AddAction(
            f"event_date={day}/part-{n:05d}-{draw.bytes(16).hex()}.c000.zstd.parquet",
            10**9, {"event_date": day}, 1_767_225_600_000, True, stats,
        )
        for n in range(num_files)
    ]  # fmt: skip

    def opened_in(lake: str) -> DeltaTable:
        place = delta.uri(lake, table)
        partition, settings = ["event_date"], delta.OF_EVENTS
        return DeltaTable.create(
            place, table.schema, partition_by=partition, configuration=settings
        )

    many_files, many_commits = (str(root / name) for name in ("files", "commits"))
    opened_in(many_files).create_write_transaction(added, "append", table.schema, ["event_date"])
    delta.open_table(many_files, table).create_checkpoint()
    log = Path(delta.uri(many_files, table), "_delta_log")
    checkpoint = sum(f.stat().st_size for f in log.glob("*.parquet"))
    with used() as opening:
        num_rows = delta.num_rows(many_files, table, Days(FIRST, FIRST + timedelta(days=1)))
    assert sum(num_rows.values()) == 8_000_000 * num_files
    found: Costs = {
        "checkpoint, bytes of a file": (checkpoint / num_files, "bytes"),
        "open table, s a million files": (opening.core_s / num_files * 1e6, "s"),
        "open table, memory of a file": (opening.more_memory / num_files, "bytes"),
    }
    said = {"start": day, "end": str(FIRST + timedelta(days=1)), "features": "f" * 700}
    commit = CommitProperties(custom_metadata={"iat": json.dumps(said)})
    opened = opened_in(many_commits)
    for one in added[:num_commits]:
        opened.create_write_transaction(
            [one], "append", table.schema, ["event_date"], commit_properties=commit
        )
    with used() as reading:
        num = sum(1 for _ in delta.commits(delta.open_table(many_commits, table)))
    assert num == num_commits
    found["read commits, s a million"] = (reading.core_s / num_commits * 1e6, "s")
    return found | raw_file_costs(str(root), domain, num_files)


def raw_file_costs(lake: str, domain: Domain, num_files: int) -> Costs:
    """What every run does with what is known of the raw log's files."""
    table = tables.raw_files(domain)
    rows = [
        {
            "file": f"day=2026-01-01/part-{n:05d}-c000.zstd.parquet",
            "stamp": f"{10**8 + n} 1767225600000000 [parquet, event_time, timestamp]",
            "event_date": FIRST,
            "num_events": 1_000_000,
            "content": Decimal(n * 2**63),
        }
        for n in range(num_files)
    ]
    with used() as writing:
        known = pa.Table.from_pylist(rows, table.schema)
        delta.replace(lake, table, known, None, commit={"job": "sizing"})
    size = pa.table(delta.open_table(lake, table).get_add_actions())
    with used() as reading:
        held = raw_files.known(lake, domain)
        assert held is not None
        listed = held.rows.to_pylist()
        held.marks()
        held.files_of(Days(FIRST, FIRST + timedelta(days=1)))
        assert len(listed) == num_files
    return {
        "raw_files, bytes of a file": (pc.sum(size["size_bytes"]).as_py() / num_files, "bytes"),
        "raw_files, s a million files": (
            (writing.core_s + reading.core_s) / num_files * 1e6, "s",
        ),
        "raw_files, memory of a file": (reading.more_memory / num_files, "bytes"),
    }  # fmt: skip


def apart(work: Callable[..., Costs], *args: Any) -> Costs:
    """In a process of its own, whose memory is its own and whose Java ends with it."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def run(num_instances: int, memory: str, root: Path) -> list[dict[str, Any]]:
    """The rows of the benchmark."""
    sizes = [num_instances // 100, num_instances // 10, num_instances]
    found: dict[tuple[int, int], Costs] = {}
    for size, times in [*((size, 1) for size in sizes), (sizes[1], TIMES_WIDER)]:
        place = root / f"{size}-{times}"
        costs = found[size, times] = apart(build_tables, place, size, times, memory)
        _told(f"{size:,} instances, {times} x features: tables", costs)
        if times == 1:
            costs |= apart(write_tokens, place, size, memory)
            costs |= apart(build_index, place, size, memory)
            _told(f"{size:,} instances: tokens and index", costs)
    (root / "logs").mkdir()
    logs = apart(log_costs, root / "logs", NUM_FILES, NUM_COMMITS)
    num_features = len(load_domain(str(root / f"{sizes[0]}-1" / "sizing.toml")).features)
    rows: list[dict[str, Any]] = []
    for (size, times), costs in found.items():
        smaller = found.get((size // 10, times), {})
        rows += rows_of(costs, smaller, size, times * num_features)
    commits = {name: logs.pop(name) for name in list(logs) if "commits" in name}
    rows += rows_of(commits, {}, NUM_COMMITS, num_features)
    return rows + rows_of(logs, {}, NUM_FILES, num_features)


def rows_of(
    costs: Costs, smaller: Mapping[str, tuple[float, str]], size: int, num_features: int
) -> list[dict[str, Any]]:
    """Each cost over what it was of a tenth of the instances."""
    made = []
    for name, (value, unit) in costs.items():
        before = smaller.get(name, (0.0, ""))[0]
        ratio = value / before if before else None
        made.append(
            {
                "name": name, "value": round(value, 3), "unit": unit,
                "instances": size, "features": num_features,
                "against": "a tenth of the instances" if ratio else None,
                "ratio": round(ratio, 3) if ratio else None, "bar": BAR if ratio else None,
                "met": ratio <= BAR if ratio else None, "machine": ledger.machine(),
            }
        )  # fmt: skip
    return made


def _told(what: str, costs: Costs) -> None:
    took = ", ".join(
        f"{n} {v:.0f}" for n, (v, _) in costs.items() if n.endswith("core s a million")
    )
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {what}: {took}\n")
    sys.stderr.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=10_000_000)
    parser.add_argument("--memory", default="4g", help="Spark's driver")
    parser.add_argument("--folder", type=Path, help="where the lakes are made (a temporary one)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.instances < 100_000:
        parser.error("--instances must be at least 100000: a hundredth of them is measured too")
    os.environ["TQDM_DISABLE"] = "1"
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = run(args.instances, args.memory, Path(folder))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        ratio = f"  {row['ratio']:.2f} x a tenth" if row["ratio"] else ""
        sys.stdout.write(
            f"{row['instances']:>12,d} x {row['features']:<3d} {row['name']:42s} "
            f"{row['value']:>16,.1f} {row['unit']:18s}{ratio}"
            f"{'   MISSES ' + str(row['bar']) if row['met'] is False else ''}\n"
        )


if __name__ == "__main__":
    main()
