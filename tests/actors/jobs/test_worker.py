"""The job loop bounds the items in flight, retries, stops on errors and has one owner."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import fsspec
import pytest

from actors.jobs import folders, registry
from actors.jobs.aimd import MAX_PAUSE_S, MIN_PAUSE_S, AimdWindow
from actors.jobs.index import Totals
from actors.jobs.items import Answer, Item
from actors.jobs.job import open_job
from actors.jobs.lease import LEASE_S, Lease
from actors.jobs.worker import MAX_ATTEMPTS, NO_ANSWER_TIMEOUT_S, Clock, answer_job
from actors.openai.errors import to_api_error
from runtime.core.errors import InvalidRequest, Overloaded, TargetsLost, Unavailable
from tests.support.jobs_harness import Echo, answers, batch, line, live


class Scripted(Echo):
    """Does what `script` says with an item, before it answers as Echo."""

    def __init__(self, script: Callable[["Scripted", Item], Awaitable[Answer | None]]) -> None:
        super().__init__()
        self.script = script

    async def answer(self, item: Item) -> Answer:
        return await self.script(self, item) or await super().answer(item)


class Hours:
    """A clock that moves when somebody sleeps."""

    def __init__(self) -> None:
        self.time = 0.0
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds

    @property
    def clock(self) -> Clock:
        return Clock(lambda: self.time, self.sleep)


def run(
    file: Path, out: Path, answerer: Echo, most: int = 8, hours: Hours | None = None
) -> list[Totals]:
    shown: list[Totals] = []
    with open_job(str(file), str(out)) as job:
        assert asyncio.run(answer_job(job, answerer, most, shown.append, (hours or Hours()).clock))
    return shown


def test_several_are_in_flight_and_never_more_than_allowed(tmp_path: Path) -> None:
    echo = Echo()
    shown = run(batch(tmp_path / "in.jsonl", 200), tmp_path / "out.jsonl", echo, most=8)
    assert echo.most == 8
    assert len(answers((tmp_path / "out.jsonl").read_bytes())) == 200
    assert shown[0] == Totals(200, 0, 0, 0)
    assert shown[-1] == Totals(200, 200, 0, 600)


def test_a_deployment_that_admits_few_gets_few(tmp_path: Path) -> None:
    """Refused items are asked again, and what is in flight settles at what is admitted."""
    admits, refused = 3, 0

    async def script(echo: Scripted, item: Item) -> None:
        nonlocal refused
        if echo.flying >= admits:
            refused += 1
            raise Overloaded("full")

    echo, hours = Scripted(script), Hours()
    run(batch(tmp_path / "in.jsonl", 200), tmp_path / "out.jsonl", echo, most=64, hours=hours)
    assert len(answers((tmp_path / "out.jsonl").read_bytes())) == 200
    assert echo.most == admits
    assert refused < 200
    assert hours.slept == [], (
        "there was always somebody in flight whose end told that there is room"
    )


def test_an_outage_is_sat_out(tmp_path: Path) -> None:
    outage = 9

    async def script(echo: Scripted, item: Item) -> None:
        nonlocal outage
        if outage:
            outage -= 1
            raise Unavailable("no target")

    hours = Hours()
    run(batch(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", Scripted(script), hours=hours)
    assert len(answers((tmp_path / "out.jsonl").read_bytes())) == 5
    assert hours.slept == sorted(hours.slept)
    assert hours.slept[-1] > MIN_PAUSE_S


def test_an_outage_without_end_is_given_up_and_nothing_is_lost(tmp_path: Path) -> None:
    async def script(echo: Scripted, item: Item) -> None:
        if item.custom_id != "item-0":
            raise Unavailable("no target")

    file, out, hours = batch(tmp_path / "in.jsonl"), tmp_path / "out.jsonl", Hours()
    with pytest.raises(Unavailable, match=r"no target.*resume"):
        run(file, out, Scripted(script), hours=hours)
    assert hours.time > NO_ANSWER_TIMEOUT_S
    assert max(hours.slept) == MAX_PAUSE_S
    assert list(answers(out.read_bytes())) == ["item-0"]
    run(file, out, Echo())
    assert len(answers(out.read_bytes())) == 5


def test_an_error_is_the_answer_of_its_item_alone(tmp_path: Path) -> None:
    async def script(echo: Scripted, item: Item) -> Answer | None:
        return Answer(400, {"error": {"message": "no"}}) if item.custom_id == "item-2" else None

    file, out = batch(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    with file.open("a") as more:
        more.write(json.dumps({"custom_id": "crooked", "method": "PUT"}) + "\n")
    shown = run(file, out, Scripted(script))
    found = answers(out.read_bytes())
    assert {name: one["response"]["status_code"] for name, one in found.items()} == {
        "item-0": 200,
        "item-1": 200,
        "item-2": 400,
        "item-3": 200,
        "item-4": 200,
        "crooked": 400,
    }
    assert shown[-1].failed == 2


@pytest.mark.parametrize("fault", [409, 500, 502, 504, "exception"])
def test_a_fault_of_the_server_is_asked_again_and_then_believed(
    fault: int | str, tmp_path: Path
) -> None:
    tries = 0

    async def script(echo: Scripted, item: Item) -> Answer | None:
        nonlocal tries
        if item.custom_id != "item-2":
            return None
        tries += 1
        if isinstance(fault, str):
            raise ZeroDivisionError
        return Answer(fault, {"error": {}})

    out = tmp_path / "out.jsonl"
    run(batch(tmp_path / "in.jsonl"), out, Scripted(script))
    assert tries == MAX_ATTEMPTS
    assert answers(out.read_bytes())["item-2"]["response"]["status_code"] == (
        500 if fault == "exception" else fault
    )


def test_an_item_that_may_be_what_ends_targets_is_not_asked_again(tmp_path: Path) -> None:
    tries = 0

    async def script(echo: Scripted, item: Item) -> Answer | None:
        nonlocal tries
        if item.custom_id != "item-2":
            return None
        tries += 1
        return Answer(500, to_api_error(TargetsLost("2 targets died")).body())

    out = tmp_path / "out.jsonl"
    run(batch(tmp_path / "in.jsonl"), out, Scripted(script))
    assert tries == 1
    assert (
        answers(out.read_bytes())["item-2"]["response"]["body"]["error"]["code"] == "targets_lost"
    )


def test_what_is_wrong_with_all_items_ends_the_job_and_keeps_what_there_is(tmp_path: Path) -> None:
    async def script(echo: Scripted, item: Item) -> None:
        if item.custom_id == "item-3":
            raise InvalidRequest("refuses the key")

    file, out = batch(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    with pytest.raises(InvalidRequest, match="refuses the key"):
        run(file, out, Scripted(script), most=1)
    assert sorted(answers(out.read_bytes())) == ["item-0", "item-1", "item-2"]


def test_cancelled_it_stops_leaves_nothing_in_flight_and_goes_on_later(tmp_path: Path) -> None:
    file, out = batch(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"

    async def script(echo: Scripted, item: Item) -> None:
        if item.custom_id == "item-2":
            [job] = registry.list_jobs()
            assert job.state == "running"
            registry.cancel_job(job.record.id)
        if item.custom_id == "item-3":
            echo.flying += 1
            try:
                await asyncio.Event().wait()
            finally:
                echo.flying -= 1

    echo = Scripted(script)
    assert not live(file, out, echo, most=4)
    assert echo.flying == 0
    [job] = registry.list_jobs()
    assert job.state == "cancelled"
    assert job.totals.done < 5
    assert live(file, out, Echo())
    [job] = registry.list_jobs()
    assert job.state == "finished"
    assert len(answers(out.read_bytes())) == 5
    with pytest.raises(InvalidRequest, match="finished"):
        registry.cancel_job(job.record.id)


def test_finished_it_asks_nothing_more(tmp_path: Path) -> None:
    file, out = batch(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    assert live(file, out, Echo())
    again = Echo()
    assert live(file, out, again)
    assert not again.asked
    out.unlink()
    with pytest.raises(InvalidRequest, match="is missing"):
        live(file, out, Echo())


def test_two_at_one_time_are_one_too_many(tmp_path: Path) -> None:
    file, out = str(batch(tmp_path / "in.jsonl")), str(tmp_path / "out.jsonl")
    with (
        open_job(file, out),
        pytest.raises(Unavailable, match="works on the job"),
        open_job(file, out),
    ):
        pytest.fail("the second was let in")
    with open_job(file, out) as job:
        assert job.totals.items == 5


def test_a_lease_keeps_other_machines_off_until_it_expires() -> None:
    fs, time = fsspec.filesystem("memory"), 0.0
    first = Lease(fs, "/leases/job", lambda: time, "host-1")
    second = Lease(fs, "/leases/job", lambda: time, "host-2")
    first.hold()
    with pytest.raises(Unavailable, match="host-1"):
        second.hold()
    time = LEASE_S - 1
    first.hold()
    time = LEASE_S + 1
    with pytest.raises(Unavailable, match="host-1"):
        second.hold()
    time = 3 * LEASE_S
    second.hold()
    with pytest.raises(Unavailable, match="host-2"):
        first.hold()
    first.release()
    third = Lease(fs, "/leases/job", lambda: time, "host-3")
    with pytest.raises(Unavailable, match="host-2"):
        third.hold()
    second.release()
    third.hold()
    Lease(fs, "/leases/job", lambda: time, "host-3").hold()  # the one before on this host is gone
    third.release()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("", "no items"),
        ("\n\n", "no items"),
        (line("a") + "\nnonsense\n", "line 2"),
        (
            line("a") + "\n" + line("b") + "\n" + line("a") + "\n",
            "line 3 has the custom_id of line 1, 'a'",
        ),
    ],
)
def test_a_file_that_cannot_be_answered_is_refused_and_leaves_nothing(
    content: str, named: str, tmp_path: Path
) -> None:
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_text(content)
    with pytest.raises(InvalidRequest, match=named), open_job(str(file), str(out)):
        pytest.fail("it was begun")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_an_output_of_something_else_is_left_alone(tmp_path: Path) -> None:
    file, other, out = (
        batch(tmp_path / "in.jsonl"),
        batch(tmp_path / "other.jsonl", 3),
        tmp_path / "out.jsonl",
    )
    out.write_text("precious\n")
    with pytest.raises(InvalidRequest, match=r"out\.jsonl exists"):
        live(file, out, Echo())
    assert out.read_text() == "precious\n"
    with pytest.raises(InvalidRequest, match=r"in\.jsonl exists"):
        live(file, file, Echo())
    out.unlink()
    assert live(file, out, Echo())
    before = out.read_bytes()
    with pytest.raises(InvalidRequest, match="another file"):
        live(other, out, Echo())
    assert out.read_bytes() == before
    with pytest.raises(InvalidRequest, match="does not exist"):
        live(file, tmp_path / "nowhere" / "out.jsonl", Echo())
    with pytest.raises(InvalidRequest, match="nosuch"):
        live(file, "nosuch://bucket/out.jsonl", Echo())


def test_a_state_that_is_damaged_is_said_to_be_so(tmp_path: Path) -> None:
    file, out = batch(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    assert live(file, out, Echo())
    (tmp_path / "out.jsonl.job" / folders.INDEX).write_bytes(b"nonsense" * 1000)
    with pytest.raises(Unavailable, match=r"out\.jsonl\.job"):
        live(file, out, Echo())
    assert registry.list_jobs() == []


def test_the_window_grows_by_answers_and_shrinks_to_what_was_not_refused() -> None:
    window = AimdWindow(6)
    assert window.free(0) == 4
    for _ in range(100):
        window.on_answer()
    assert [window.free(flying) for flying in (0, 5, 6, 7)] == [6, 1, 0, 0]
    window.on_refusal(3)
    assert window.free(0) == 3
    window.on_refusal(0)
    assert window.free(0) == 1
    assert window.pause == 4 * MIN_PAUSE_S / 2
    window.on_answer()
    assert window.pause == 0
    assert window.free(0) == 2
    assert AimdWindow(1).free(0) == 1


def test_a_fault_of_this_process_is_answered_in_openais_body_and_quotes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def script(echo: Scripted, item: Item) -> None:
        if item.custom_id == "item-1":
            raise KeyError("a secret of the item")

    out = tmp_path / "out.jsonl"
    run(batch(tmp_path / "in.jsonl", 2), out, Scripted(script))
    assert answers(out.read_bytes())["item-1"]["response"]["body"] == {
        "error": {
            "message": "internal error",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        }
    }
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert said == ["an item has failed: KeyError"] * MAX_ATTEMPTS


def test_what_was_refused_is_asked_before_what_is_new(tmp_path: Path) -> None:
    asked: list[str] = []

    async def script(echo: Scripted, item: Item) -> None:
        asked.append(item.custom_id)
        if asked == ["item-0"]:
            raise Overloaded("full")

    run(batch(tmp_path / "in.jsonl", 4), tmp_path / "out.jsonl", Scripted(script), most=1)
    assert asked == ["item-0", "item-0", "item-1", "item-2", "item-3"]
