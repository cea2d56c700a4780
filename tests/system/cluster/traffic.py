"""A client sends requests with the `openai` package again and again, and compares every answer.

As a program, on a host, it is `python -m tests.system.cluster.traffic CASES URL KEYS CA STREAMS`
and runs until its standard input closes. CASES is a JSON file of requests for /v1/completions, each
with the `text` that must come back. It prints one line of JSON for each answer: if it was right,
how long it took and its longest silence. Requests sent before the end are answered before the end.
"""

import json
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import openai

from tests.system.cluster.hosts import await_

PAUSE_S = 0.5  # after a request that failed


class Traffic:
    """The program above, running somewhere, and the answers that it has reported so far."""

    def __init__(self, command: list[str]) -> None:
        self.running = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.answers: list[dict[str, Any]] = []
        self.judged = 0
        self.other: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def more(self, count: int, patience: float = 600.0) -> str:
        """Waits for `count` more answers and describes all since the last description.

        Raises AssertionError if one differs.
        """
        before = len(self.answers)
        await_(
            lambda: len(self.answers) >= before + count or not self.reader.is_alive(),
            f"{count} answers",
            patience,
        )
        return self.judge()

    def judge(self) -> str:
        since, self.judged = self.judged, len(self.answers)
        seen = self.answers[since : self.judged]
        wrong = [answer for answer in seen if not answer["right"]]
        assert seen, f"there were no answers: {''.join(self.other)}"
        assert not wrong, (
            f"{len(wrong)} of {len(seen)} answers were not as plain decoding: "
            f"{json.dumps(wrong[0])}"
        )
        gap = max(one["gap"] for one in seen)
        return (
            f"{len(seen)} answers, all as plain decoding; "
            f"the longest silence in one lasted {gap:.2f} s"
        )

    def end(self) -> str:
        assert self.running.stdin is not None
        self.running.stdin.close()
        self.reader.join(600)
        self.judged = 0
        return self.judge()

    def stop(self) -> None:
        self.running.kill()
        self.running.wait()

    def _read(self) -> None:
        assert self.running.stdout is not None
        for line in self.running.stdout:
            if line.startswith('{"case"'):
                self.answers.append(json.loads(line))
            else:
                self.other.append(line)


def main(cases: str, url: str, keys: str, ca: str, streams: str) -> None:
    trusted = openai.DefaultHttpxClient(verify=ssl.create_default_context(cafile=ca))
    key = Path(keys).read_text("utf-8").split(":")[1].strip()
    client = openai.OpenAI(
        base_url=url, api_key=key, http_client=trusted, max_retries=0, timeout=600
    )
    model = client.models.list().data[0].id
    known: list[dict[str, Any]] = json.loads(Path(cases).read_text("utf-8"))
    over = threading.Event()
    askers = [
        threading.Thread(target=ask, args=(client, model, known, over, lane))
        for lane in range(int(streams))
    ]
    for asker in askers:
        asker.start()
    sys.stdin.read()
    over.set()
    for asker in askers:
        asker.join()


def ask(
    client: openai.OpenAI,
    model: str,
    cases: list[dict[str, Any]],
    over: threading.Event,
    first: int,
) -> None:
    number = first
    while not over.is_set():
        case = cases[number % len(cases)]
        said: dict[str, Any] = {"case": number % len(cases)}
        begin = last = time.monotonic()
        text, gap = "", 0.0
        try:
            for piece in client.completions.create(model=model, stream=True, **case["request"]):
                now = time.monotonic()
                gap, last = max(gap, now - last), now
                text += piece.choices[0].text if piece.choices else ""
        except (openai.OpenAIError, httpx2.HTTPError) as error:
            said["error"] = f"{type(error).__name__}: {error}"
        said["right"] = text == case["text"] and "error" not in said
        if not said["right"]:
            said["text"], said["expected"] = text, case["text"]
        said |= {"seconds": round(time.monotonic() - begin, 3), "gap": round(gap, 3)}
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()
        number += 1
        if "error" in said:
            over.wait(PAUSE_S)


if __name__ == "__main__":
    main(*sys.argv[1:])
