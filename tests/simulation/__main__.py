"""`python -m tests.simulation` simulates seeds until a promise is broken, and replays one seed."""

import argparse
import logging
import os
import sys
import time

from tests.simulation.planted import PLANTED, QUICK_SEEDS
from tests.simulation.search import command, failures, shrink, simulate
from tests.simulation.simulation import Result

MAX_FAILURES = 5  # that are shrunk and shown


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, help="number of seeds (default: 200; planted: enough)")
    parser.add_argument("--first", type=int, default=0, help="first seed (default: 0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--minutes", type=float, help="end after so many minutes")
    parser.add_argument("--seed", type=int, help="replay this seed and show its timeline")
    parser.add_argument("--without", default="", help="parts of the scenario to leave out")
    parser.add_argument(
        "--plant",
        default="",
        choices=["", "all", "quick", *PLANTED],
        help="fault to plant in the product",
    )
    return parser.parse_args()


def main() -> int:
    """Return 1 if a promise is broken; with --plant, if the planted fault is not found."""
    given = arguments()
    if given.seed is not None:
        logging.getLogger().setLevel(logging.WARNING)
        left_out = frozenset(filter(None, given.without.split(",")))
        result = simulate(given.seed, left_out, given.plant)
        show(result)
        return 1 if result.failure else 0
    logging.disable(logging.CRITICAL)
    if given.plant:
        quick = [name for name, plant in PLANTED.items() if plant.seeds == QUICK_SEEDS]
        names = {"all": list(PLANTED), "quick": quick}.get(given.plant, [given.plant])
        missed = [name for name in names if not find_planted(name, given)]
        say(f"{len(names) - len(missed)} of {len(names)} planted faults found")
        return 1 if missed else 0
    return 1 if search(given) else 0


def search(given: argparse.Namespace) -> int:
    """Simulate seeds, show what fails, and return the number of failures."""
    began, done, failed = time.monotonic(), 0, list[tuple[int, str]]()
    wanted = given.seeds or 200
    for seed, failure in failures(range(given.first, given.first + wanted), given.jobs):
        done += 1
        if failure:
            failed.append((seed, failure))
            say(f"seed {seed}: {failure}")
        elapsed = time.monotonic() - began
        progress(f"{done} of {wanted} seeds, {done / elapsed:.1f} a second, {len(failed)} failed")
        if len(failed) >= MAX_FAILURES or (given.minutes and elapsed > given.minutes * 60.0):
            break
    elapsed = time.monotonic() - began
    say(f"{done} seeds in {elapsed:.0f} s ({done / elapsed:.1f} a second), {len(failed)} failed")
    for seed, _ in failed:
        smallest = shrink(seed, tell=progress)
        show(simulate(seed, smallest.left_out))
        say(f"replay: {command(smallest)}")
    return len(failed)


def find_planted(name: str, given: argparse.Namespace) -> bool:
    """Search for a planted fault; return whether it was found, and say where."""
    wanted = given.seeds or PLANTED[name].seeds
    seeds = range(given.first, given.first + wanted)
    for number, (seed, failure) in enumerate(failures(seeds, given.jobs, name), 1):
        if failure:
            say(f"{name}: found after {number} seeds, in seed {seed}: {failure}")
            return True
        progress(f"{name}: {number} of {wanted} seeds")
    say(f"{name}: NOT FOUND within {wanted} seeds")
    return False


def show(result: Result) -> None:
    """Write the timeline of a run."""
    for at, who, what in result.timeline:
        say(f"{at:9.4f} {who:12} {what}")
    for name, outcome in result.outcomes.items():
        say(f"{name}: {outcome or 'has not ended'}")
    say(f"FAILED: {result.failure}" if result.failure else "all promises are kept")


def say(line: str) -> None:
    sys.stdout.write(f"\r\x1b[K{line}\n" if sys.stdout.isatty() else f"{line}\n")
    sys.stdout.flush()


def progress(line: str) -> None:
    if sys.stdout.isatty():
        sys.stdout.write(f"\r\x1b[K{line}")
        sys.stdout.flush()


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order of sets is part of a run
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]])
    sys.exit(main())
