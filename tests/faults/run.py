"""`make faults N=200`: randomised schedules of kills, races, reorderings, full disks and wrong
clocks over every job that writes, each compared row for row with an undisturbed run."""

from __future__ import annotations

import argparse
import logging
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from tests.faults import schedules
from tests.faults.plants import PLANTS
from tests.faults.schedules import FAULTS, JOBS, Outcome
from tests.faults.workers import Pool
from tests.faults.world import DAYS, World

log = logging.getLogger(__name__)


def main() -> int:
    """0 where nothing is lost, duplicated or leaked; with a planted fault, where it is caught."""
    parser = argparse.ArgumentParser(prog="make faults", description=__doc__)
    parser.add_argument("--num", type=int, default=20, help="schedules")
    parser.add_argument("--seed", type=int, help="of the first schedule; the others follow")
    parser.add_argument("--job", choices=sorted(set(JOBS)), help="faults of one job alone")
    parser.add_argument("--fault", choices=sorted(set(FAULTS)), help="of one kind")
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
    """One after the other; a planted fault is looked for until it is caught."""
    started = time.monotonic()
    # What Java has loaded by then is loaded a third faster by those that come after.
    classes = world.folder / "classes.jsa"
    right = Pool(java=f"-XX:ArchiveClassesAtExit={classes}", spare=1)
    try:
        _build(world, right)
        for worker in right.every:
            worker.leave()
    finally:
        right.end()
    log.info("undisturbed lakes built in %.0f s", time.monotonic() - started)
    jobs, faults = [args.job] if args.job else JOBS, [args.fault] if args.fault else FAULTS
    if not schedules.can_mount():
        log.warning("no right to mount a small disk here: full disks are not tried")
        faults = [fault for fault in faults if fault != "disk"]
    pool, outcomes = Pool(args.plant, f"-XX:SharedArchiveFile={classes}"), []
    try:
        for seed in tqdm(seeds, unit="schedule", mininterval=5):
            outcomes.append(schedules.run(seed, world, pool, jobs=jobs, faults=faults))
            log.info("%s: %s", outcomes[-1].name, "right" if outcomes[-1].is_right else "WRONG")
            if args.plant and not outcomes[-1].is_right:
                break
    finally:
        pool.end()
    return outcomes


def _build(world: World, pool: Pool) -> None:
    """Both lakes, undisturbed."""
    world.write_logs()
    for state in ("old", "new"):
        flags = ["--domain", world.shop(state).file, "--lake", str(world.lake(state))]
        days = ["--start", str(DAYS.start), "--end", str(DAYS.end)]
        commands = [("spark", ["build", *flags, *days, "--master", "local[2]"])]
        if state == "new":
            train = ["train-compressor", *flags, "--device", "cpu", "--start"]
            last = str(list(DAYS)[-1])
            commands += [
                ("torch", [*train, str(DAYS.start), "--end", last]),
                ("torch", [*train, last, "--end", str(DAYS.end), "--parent", "user"]),
            ]
        for kind, argv in commands:
            worker = pool.take(kind)  # type: ignore[arg-type]
            worker.give(argv)
            code = worker.code(schedules.TIMEOUT_S)
            if code != 0:
                raise RuntimeError(f"{argv[0]} undisturbed: exit code {code}\n{worker.tail()}")
            pool.give_back(worker)


if __name__ == "__main__":
    sys.exit(main())
