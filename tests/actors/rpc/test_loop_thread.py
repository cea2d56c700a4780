import asyncio
import threading

import pytest

from actors.rpc.loop_thread import LoopThread


def test_runs_on_a_thread_of_its_own() -> None:
    async def where() -> tuple[int, asyncio.AbstractEventLoop]:
        return threading.get_ident(), asyncio.get_running_loop()

    loop = LoopThread()
    assert loop.run(where()) != (threading.get_ident(), loop.loop)
    assert loop.run(where()) == loop.submit(where()).result()
    loop.stop()


def test_errors_come_back() -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    loop = LoopThread()
    with pytest.raises(ZeroDivisionError):
        loop.run(fail())
    loop.stop()


def test_a_timeout_cancels_the_work() -> None:
    over = threading.Event()

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            over.set()

    loop = LoopThread()
    with pytest.raises(TimeoutError):
        loop.run(wait(), timeout=0.05)
    assert over.wait(60)
    loop.stop()


def test_stop_lets_the_work_clean_up_and_ends_the_thread() -> None:
    started, cleaned = threading.Event(), threading.Event()

    async def wait() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.to_thread(cleaned.set)

    loop = LoopThread("net")
    future = loop.submit(wait())
    assert started.wait(5)
    loop.stop()
    loop.stop()
    assert cleaned.is_set()
    assert future.cancelled()
    assert "net" not in [thread.name for thread in threading.enumerate()]
