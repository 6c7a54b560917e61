"""`make faults N=200`: randomised schedules of kills, races, reorderings, full disks and wrong
clocks over every job that writes, each compared row for row with an undisturbed run."""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from tests.faults import schedules
from tests.faults.plants import PLANTS
from tests.faults.schedules import FAULTS, JOBS, Outcome
from tests.faults.workers import Kind, Pool
from tests.faults.world import DAYS, FORGOTTEN, FROZEN, World

log = logging.getLogger(__name__)

AS_FROZEN = ("--protocol", "frozen", "--line", FROZEN)


def main() -> int:
    """0 where nothing is lost, duplicated or leaked; with a planted fault, where it is caught."""
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__)
    parser.add_argument("--num", type=int, default=20, help="schedules")
    parser.add_argument("--seed", type=int, help="of the first schedule; the others follow")
    parser.add_argument("--job", choices=sorted(set(JOBS)), help="faults of one job alone")
    parser.add_argument("--fault", choices=sorted(set(FAULTS)), help="of one kind")
    parser.add_argument("--at-once", type=int, default=2, help="schedules")
    parser.add_argument("--plant", choices=PLANTS, default="", help="a fault of the writing code")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    first = args.seed if args.seed is not None else random.SystemRandom().randrange(10**6)
    log.info("%d schedules, seeds %d to %d", args.num, first, first + args.num - 1)
    with tempfile.TemporaryDirectory(prefix="iat-faults-") as folder:
        os.environ["TMPDIR"] = folder  # what killed workers leave behind goes with it
        outcomes = run_all(range(first, first + args.num), args, World(Path(folder)))
    found = schedules.total(outcomes)
    for outcome in outcomes:
        if not outcome.is_right:
            sys.stdout.write(f"{outcome.name}: " + "\n  ".join(["", *outcome.told[:5]]) + "\n")
    sys.stdout.write(
        f"faults that met a command at work: {found['hit']}\n"
        f"tried {len(outcomes)}, lost {found['lost']}, duplicated {found['duplicated']}, "
        f"leaked {found['leaked']}\n"
    )
    is_wrong = any(not outcome.is_right for outcome in outcomes)
    return int(is_wrong != bool(args.plant))


def run_all(seeds: range, args: argparse.Namespace, world: World) -> list[Outcome]:
    """Some at once; a planted fault is looked for until it is caught."""
    started = time.monotonic()
    right = Pool(spare=1)
    try:
        _build(world, right)
    finally:
        right.end()
    log.info("undisturbed lakes built in %.0f s", time.monotonic() - started)
    jobs, faults = [args.job] if args.job else JOBS, [args.fault] if args.fault else FAULTS
    if not schedules.can_mount():
        log.warning("no right to mount a small disk here: full disks are not tried")
        faults = [fault for fault in faults if fault != "disk"]
    pool, outcomes = Pool(args.plant), []
    threads = ThreadPoolExecutor(args.at_once)
    try:
        running = [
            threads.submit(schedules.run, seed, world, pool, jobs=jobs, faults=faults)
            for seed in seeds
        ]
        with logging_redirect_tqdm():
            for done in tqdm(as_completed(running), total=len(running), unit="schedule"):
                outcomes.append(done.result())
                log.info("%s: %s", outcomes[-1].name, "right" if outcomes[-1].is_right else "WRONG")
                if args.plant and not outcomes[-1].is_right:
                    break
    finally:
        threads.shutdown(cancel_futures=True)
        pool.end()
    return outcomes


def _build(world: World, pool: Pool) -> None:
    """The lakes, undisturbed."""
    world.write_logs()
    days = ["--start", str(DAYS.start), "--end", str(DAYS.end)]
    last = str(list(DAYS)[-1])
    for state, of in {"old": None, "new": None, "frozen": "new", "forgot": "frozen"}.items():
        if of is not None:
            shutil.copytree(world.lake(of), world.lake(state))
        shop = world.shop("old" if state == "old" else "new")
        flags = ["--domain", shop.file, "--lake", str(world.lake(state))]
        train = ["train-compressor", *flags, "--device", "cpu", "--start"]
        build = ["build", *flags, *days, "--master", "local[2]"]
        commands: dict[str, list[tuple[Kind, list[str]]]] = {
            "old": [("spark", build)],
            "new": [
                ("spark", build),
                ("torch", [*train, str(DAYS.start), "--end", last]),
                ("torch", [*train, last, "--end", str(DAYS.end), "--parent", "user"]),
            ],
            "frozen": [
                ("torch", [*train, str(DAYS.start), "--end", last, *AS_FROZEN]),
                ("torch", ["write-tokens", *flags, *days, "--version", FROZEN, "--device", "cpu"]),
            ],
            "forgot": [("torch", ["forget", *flags, "--user", FORGOTTEN])],
        }
        for kind, argv in commands[state]:
            worker = pool.take(kind)
            worker.give(argv)
            code = worker.code(schedules.TIMEOUT_S)
            if code != 0:
                raise RuntimeError(f"{argv[0]} undisturbed: exit code {code}\n{worker.tail()}")
            pool.give_back(worker)


if __name__ == "__main__":
    sys.exit(main())
