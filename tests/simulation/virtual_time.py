"""Event loops and threads of simulated processes, on one virtual clock.

One of them runs at a time, and which one is drawn from the seed, so a run repeats exactly. Threads
of the product stay threads; they hand over where they would block.
"""

import asyncio
import heapq
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import Empty
from random import Random
from sys import set_asyncgen_hooks
from typing import Any, TypeVar

Result = TypeVar("Result")

MIN_WAIT_S = 1e-6  # a shorter one could be lost in the rounding of the clock
MAX_BUSY_TURNS = 2000  # of a thread, without time passing: more are a busy loop


class FaultFoundError(AssertionError):
    """A promise of the product is broken."""


class KilledError(BaseException):
    """Ends the thread of a killed process."""


class World:
    """All processes, the clock and the timeline.

    `failure` is the first broken promise. `after_turn` is called after each turn with the process
    that had it.
    """

    def __init__(self, seed: str) -> None:
        self.random = Random(seed)
        self.now = 0.0
        self.loops: list[ProcessLoop] = []
        self.timeline: list[tuple[float, str, str]] = []
        self.turns = 0
        self.failure: str | None = None
        self.after_turn: Callable[[ProcessLoop], None] = lambda _: None
        self.back = taken_lock()  # released when the running thread gives way
        self.running_thread: VirtualThread | None = None
        self.fate = ProcessLoop(self, "fate")  # what happens to the others; never stops

    def log(self, who: str, what: str) -> None:
        self.timeline.append((self.now, who, what))

    def fail(self, why: str) -> None:
        """Record a broken promise; the run ends after this turn."""
        if self.failure is None:
            self.failure = why
            self.log("check", why)

    def run(self, is_over: Callable[[], bool], until: float) -> bool:
        """Give turns until `is_over` or a failure; return False if the clock reaches `until`
        before.
        """
        while not is_over() and self.failure is None:
            able = [loop for loop in self.loops if loop.is_able()]
            if not able:
                first = min((loop.next_timer() for loop in self.loops), default=until)
                if first >= until:
                    self.now = max(self.now, until)
                    return False
                self.now = max(self.now, first)
                continue
            loop = able[0] if len(able) == 1 else self.random.choice(able)
            self.turn(loop)
        return True

    def turn(self, loop: "ProcessLoop") -> None:
        """Run what is ready in one process."""
        self.turns += 1
        loop.turn()
        self.after_turn(loop)

    def reap(self) -> None:
        """End all threads and tasks, whatever they wait for."""
        self.failure = self.failure or ""  # what breaks from now on breaks by this
        for loop in self.loops:
            loop.kill()
        for loop in self.loops:
            loop.reap()
        self.loops.clear()


class NoSelector:
    """A selector without files."""

    def select(self, timeout: float | None = None) -> Sequence[Any]:
        return ()


class ProcessLoop(asyncio.BaseEventLoop):
    """The event loop of one simulated process, which may be stopped and killed.

    `stopped_since` is None while it runs.
    """

    def __init__(self, world: World, name: str) -> None:
        super().__init__()
        self.world, self.name = world, name
        self.stopped_since: float | None = None
        self.dead = False
        self.threads: list[VirtualThread] = []
        self.kept: set[asyncio.Task[Any]] = set()  # asyncio forgets tasks that nobody can wake
        self._selector = NoSelector()
        self.set_exception_handler(self._report)
        self.set_task_factory(self._new_task)
        world.loops.append(self)

    # What asyncio asks of a loop

    def time(self) -> float:
        return self.world.now

    def _process_events(self, events: object) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def call_soon_threadsafe(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def _new_task(self, _: object, work: Any, **options: Any) -> asyncio.Task[Any]:
        task: asyncio.Task[Any] = asyncio.Task(work, loop=self, **options)
        self.kept.add(task)
        task.add_done_callback(self.kept.discard)
        return task

    def run_in_executor(  # type: ignore[override]
        self, executor: None, func: Callable[..., Result], *args: Any
    ) -> asyncio.Future[Result]:
        """Runs the function on a thread of its own."""
        future: asyncio.Future[Result] = self.create_future()

        def run() -> None:
            try:
                result = func(*args)
            except Exception as error:  # noqa: BLE001 (as an executor does)
                if not future.cancelled():
                    future.set_exception(error)
            else:
                if not future.cancelled():
                    future.set_result(result)

        VirtualThread(self, run).start()
        return future

    def _report(self, _: object, context: dict[str, Any]) -> None:
        if not self.dead:
            what = f"{context.get('message')}: {context.get('exception')!r}"
            self.world.fail(f"unexpected error in {self.name}: {what}")

    # What the world asks of it

    def is_able(self) -> bool:
        if self.dead or self.stopped_since is not None:
            return False
        return bool(self._ready) or self.next_timer() <= self.world.now  # type: ignore[attr-defined]

    def next_timer(self) -> float:
        """Return when it has something to do."""
        if self.dead or self.stopped_since is not None:
            return float("inf")
        scheduled = self._scheduled  # type: ignore[attr-defined]
        while scheduled and scheduled[0].cancelled():
            heapq.heappop(scheduled)._scheduled = False
        return scheduled[0].when() if scheduled else float("inf")

    def turn(self) -> None:
        with self._running():
            self._run_once()  # type: ignore[attr-defined]

    @contextmanager
    def _running(self) -> Iterator[None]:
        asyncio._set_running_loop(self)
        set_asyncgen_hooks(
            firstiter=self._asyncgen_firstiter_hook,  # type: ignore[attr-defined]
            finalizer=self._asyncgen_finalizer_hook,  # type: ignore[attr-defined]
        )
        try:
            yield
        finally:
            set_asyncgen_hooks(None, None)
            asyncio._set_running_loop(None)

    def kill(self) -> None:
        """End its threads where they wait; nothing on it runs any more."""
        self.dead = True
        for thread in self.threads:
            thread.kill()

    def reap(self, close: bool = True) -> None:
        """End the tasks of a dead process, unheard."""
        for _ in range(50):
            if not self.kept:
                break
            for task in tuple(self.kept):
                task.cancel()
            self._scheduled.clear()  # type: ignore[attr-defined]
            self.turn()
        self._ready.clear()  # type: ignore[attr-defined]
        for thread in self.threads:
            thread.kill()
        if close:
            self.close()

    def tasks(self) -> list[str]:
        """Return the coroutines that have not ended."""
        return sorted(getattr(task.get_coro(), "__qualname__", "?") for task in self.kept)


def taken_lock() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


class VirtualThread:
    """A thread of a simulated process, with the methods of threading.Thread that the product uses.

    It runs between two waits without interruption.
    """

    def __init__(self, loop: ProcessLoop, target: Callable[[], object]) -> None:
        self.loop, self.world, self.target = loop, loop.world, target
        self.alive = self.killed = False
        self.go = taken_lock()
        self.thread: threading.Thread | None = None
        self.wait_number = 0
        self.parked = False
        self.joining: list[VirtualThread] = []
        self.busy_since, self.busy_turns = -1.0, 0

    def start(self) -> None:
        self.alive = self.parked = True
        self.loop.threads.append(self)
        self.loop.call_soon(self._wake, self.wait_number)

    def is_alive(self) -> bool:
        return self.alive

    def join(self) -> None:
        """Wait, on another virtual thread, until this one has ended."""
        while self.alive:
            waiting = current_thread(self.loop)
            self.joining.append(waiting)
            waiting.park(None)

    def _main(self) -> None:
        self.go.acquire()
        try:
            if not self.killed:
                self.target()
        except KilledError:
            pass
        except BaseException as error:  # noqa: BLE001 (the product's thread would die of it)
            if not self.killed:
                self.world.fail(f"a thread of {self.loop.name} died: {error!r}")
        finally:
            self.alive = False
            for waiting in self.joining:
                waiting.wake()
            self.world.back.release()

    def _run(self) -> None:
        """Let it run until it waits or ends."""
        if self.thread is None:
            self.thread = threading.Thread(target=self._main, daemon=True)
            self.thread.start()
        self.parked = False
        before, self.world.running_thread = self.world.running_thread, self
        self.go.release()
        self.world.back.acquire()
        self.world.running_thread = before
        if not self.alive:
            self.thread.join()
            if self in self.loop.threads and not self.killed:
                self.loop.threads.remove(self)

    def _wake(self, wait_number: int) -> None:
        if self.parked and wait_number == self.wait_number:
            self._run()

    def wake(self) -> None:
        """End its present wait. Called by whatever it waits for."""
        self.loop.call_soon(self._wake, self.wait_number)

    def park(self, timeout: float | None) -> None:
        """Wait until `wake`, or for so many seconds."""
        if self.killed:
            raise KilledError
        self.wait_number += 1
        if timeout is not None:
            self.loop.call_later(max(timeout, MIN_WAIT_S), self._wake, self.wait_number)
        self.parked = True
        self.world.back.release()
        self.go.acquire()
        if self.killed:
            raise KilledError

    def check_busy(self) -> None:
        """Fail if it has looked so often without waiting: time does not pass in a busy loop."""
        if self.busy_since != self.world.now:
            self.busy_since, self.busy_turns = self.world.now, 0
        self.busy_turns += 1
        if self.busy_turns > MAX_BUSY_TURNS:
            self.world.fail(f"a thread of {self.loop.name} is in a busy loop")
            self.park(3600.0)

    def kill(self) -> None:
        if self.alive and not self.killed:
            self.killed = True
            if self.thread is None:
                self.alive = False
            elif self.parked:
                self._run()


def current_thread(loop: ProcessLoop) -> VirtualThread:
    thread = loop.world.running_thread
    assert thread is not None, f"the event loop of {loop.name} would block"
    return thread


def sleep(loop: ProcessLoop, seconds: float) -> None:
    """Let virtual time pass on the running thread."""
    current_thread(loop).park(seconds)


class VirtualQueue:
    """A queue.SimpleQueue of one process."""

    def __init__(self, loop: ProcessLoop) -> None:
        self.loop = loop
        self.items: deque[Any] = deque()
        self.waiting: VirtualThread | None = None
        self.longest = 0

    def put(self, item: object) -> None:
        self.items.append(item)
        self.longest = max(self.longest, len(self.items))
        if self.waiting is not None:
            self.waiting.wake()

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        if not self.items:
            thread = current_thread(self.loop)
            if block:
                self.waiting = thread
                try:
                    thread.park(timeout)
                finally:
                    self.waiting = None
            else:
                thread.check_busy()
            if not self.items:
                raise Empty
        return self.items.popleft()

    def qsize(self) -> int:
        return len(self.items)

    def empty(self) -> bool:
        return not self.items


class VirtualLock:
    """A threading.Lock of one process."""

    def __init__(self, loop: ProcessLoop) -> None:
        self.loop, self.held = loop, False
        self.waiting: deque[VirtualThread] = deque()

    def __enter__(self) -> None:
        while self.held:
            thread = current_thread(self.loop)
            self.waiting.append(thread)
            thread.park(None)
        self.held = True

    def __exit__(self, *_: object) -> None:
        self.held = False
        if self.waiting:
            self.waiting.popleft().wake()
