"""Check a batch whose processes are all killed at random moments: each item is answered once, with
the same tokens as without kills.

`python -m bench.chaos.batch --items 500 --kills 5` serves the shipped pair on its own Ray. It
answers the items by plain decoding, and then again with drafters. At random moments it kills the
command and all of Ray (head, controller, target, drafter, gateway) and starts both again. The exit
code is 1 if the goal is missed.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from actors.launch import local_ray
from bench.reports.grid import Grid

OUTRIDER = [sys.executable, "-c", "from actors.cli import main; main()"]
POLL_PERIOD_S = 0.05
PROMPTS = ("def f{}(self, path):", "import os\nclass A{}:", "for item{} in ", "# {} is")
TEMPERATURES = (0.0, 0.7, 1.0)
FAILURE_KINDS = ("missing", "doubled", "failed", "differing")  # each must be 0


def request_body(number: int, tokens: int, speculation: bool) -> dict[str, Any]:
    """Return the body of an item, greedy or sampled."""
    prompt = PROMPTS[number % len(PROMPTS)].format(number)
    return {
        "model": "target",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": TEMPERATURES[number % len(TEMPERATURES)],
        "seed": number,
        "logprobs": 0,
        "speculative": {"enabled": speculation},
    }


def write_items(file: Path, items: int, tokens: int, speculation: bool) -> None:
    with file.open("w") as lines:
        for number in range(items):
            asked = request_body(number, tokens, speculation)
            line = {
                "custom_id": f"item-{number}",
                "method": "POST",
                "url": "/v1/completions",
                "body": asked,
            }
            lines.write(json.dumps(line) + "\n")


def serve() -> None:
    subprocess.run(
        [*OUTRIDER, "serve", "--port", "0", "--json"], check=True, stdout=subprocess.DEVNULL
    )


def submit(file: Path, out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*OUTRIDER, "submit", str(file), "-o", str(out), "--json"], stdout=subprocess.DEVNULL
    )


def kill_all(running: subprocess.Popen[bytes]) -> int:
    """Send SIGKILL to the command and to every process of Ray; return the number of processes."""
    running.kill()
    running.wait()
    ray = local_ray.find()
    members = {} if ray is None else local_ray.session_processes(ray.session)
    local_ray.send_signal(members, signal.SIGKILL)
    while ray is not None and local_ray.session_processes(ray.session):
        time.sleep(POLL_PERIOD_S)
    if ray is not None:
        local_ray.end(ray)  # remove its files
    return len(members) + 1


def count_answers(out: Path) -> int:
    return out.read_bytes().count(b"\n") if out.exists() else 0


def read_answers(out: Path) -> tuple[dict[str, Any], int]:
    """Return the answer to each item, and the number of lines."""
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    found = {}
    for line in lines:
        choices = line["response"]["body"].get("choices")
        found[line["custom_id"]] = choices and (
            choices[0]["logprobs"]["tokens"],
            choices[0]["text"],
            choices[0]["finish_reason"],
        )
    return found, len(lines)


def run(items: int, kills: int, tokens: int, seed: int, folder: Path) -> dict[str, Any]:
    """Run the check and return its figures.

    `killed` lists the processes of each kill, `at` the items that had been answered by then.
    """
    plain_in, plain_out, chaos_in, chaos_out = (
        folder / f"{name}.jsonl" for name in ("plain", "plain-out", "chaos", "chaos-out")
    )
    write_items(plain_in, items, tokens, speculation=False)
    write_items(chaos_in, items, tokens, speculation=True)
    serve()
    if submit(plain_in, plain_out).wait():
        raise SystemExit("the batch without kills failed: see its message above")
    moments = sorted(random.Random(seed).sample(range(items * 9 // 10), kills))
    killed, at, began = [], [], time.monotonic()
    for moment in moments:
        running = submit(chaos_in, chaos_out)
        while count_answers(chaos_out) <= moment and running.poll() is None:
            time.sleep(POLL_PERIOD_S)
        at.append(count_answers(chaos_out))
        killed.append(kill_all(running))
        serve()
    failed = submit(chaos_in, chaos_out).wait()
    plain, _ = read_answers(plain_out)
    found, lines = read_answers(chaos_out)
    return {
        "items": items,
        "kills": kills,
        "killed": killed,
        "at": at,
        "seconds": round(time.monotonic() - began, 1),
        "lines": lines,
        "missing": len(plain.keys() - found.keys()),
        "doubled": lines - len(found),
        "failed": sum(not said for said in found.values()) + (items if failed else 0),
        "differing": sum(found[name] != said for name, said in plain.items() if name in found),
    }


def results_grid(found: dict[str, Any]) -> Grid:
    rows = (
        ("items; lines of answers", f"{found['items']}; {found['lines']}"),
        (
            "missing, doubled, failed, differing",
            ", ".join(str(found[what]) for what in FAILURE_KINDS),
        ),
        ("processes killed each time", ", ".join(map(str, found["killed"]))),
        ("answers before each kill", ", ".join(map(str, found["at"]))),
        ("from the first start to the last answer", f"{found['seconds']:.0f} s"),
    )
    return Grid("a batch whose every process is killed", ("what", "result"), rows, ("result",))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=24, help="maximum for each item")
    parser.add_argument("--seed", type=int, default=0, help="seed of the kill times")
    parser.add_argument("--json", type=Path, help="write the result into this file")
    options = parser.parse_args()
    signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
    )  # so that Ray is stopped too
    with tempfile.TemporaryDirectory(prefix="outrider-batch-") as folder:
        os.environ |= {"XDG_CACHE_HOME": f"{folder}/cache", "XDG_DATA_HOME": f"{folder}/data"}
        os.environ.pop("RAY_ADDRESS", None)
        try:
            found = run(options.items, options.kills, options.tokens, options.seed, Path(folder))
        finally:
            if (left := local_ray.find()) is not None:
                local_ray.end(left)
    Console(highlight=False).print(results_grid(found).terminal())
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(any(found[what] for what in FAILURE_KINDS))


if __name__ == "__main__":
    main()
