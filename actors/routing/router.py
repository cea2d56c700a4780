"""Spreads sessions over targets by load, and moves them to other targets when one is lost.

A session's output is recorded before its client sees it. The next target gets the record and
continues: a choice is a function of text, seed and position, so the text is the one that the lost
target would have written. Clients see at most a pause.
"""

import asyncio
import contextlib
import logging
import math
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial

from actors.fleet.fleet_state import TargetState
from actors.routing.routed_session import RoutedSession, TargetLife
from actors.routing.target_link import (
    RemoteTarget,
    TargetLink,
    feed_standby,
    least_loaded,
    listen,
    next_chunk,
)
from runtime.core.errors import InvalidRequest, Overloaded, TargetDied, TargetsLost, Unavailable
from runtime.core.messages import Chunk, Request

log = logging.getLogger(__name__)

TARGET_WAIT_S = 300.0  # in all since its last token, for a session without a deadline
DEADLINE_GRACE_S = 2.0  # for a target to end a session itself after its deadline
# A lost target is chosen after all others for this time: it looks idle until the next `update`.
SUSPECT_S = 3.0
# Before a session asks the same target again. The delay doubles until the session gets a token.
RETRY_DELAY_S, MAX_RETRY_DELAY_S = 0.5, 8.0
POLL_PERIOD_S = 0.5  # between two updates of the targets
MAX_FAILED_TARGETS = 8  # lost or unreachable in a row, without a token in between
MAX_DEATHS = 2  # of targets that held the session and delivered no token: it may be the cause

Connect = Callable[[str], RemoteTarget]  # from a target's address
GetTargets = Callable[[], Sequence[TargetState]]


class Router:
    """Routes sessions. All methods must be called on one event loop.

    target_wait_s  seconds that a session without a deadline waits for targets, all its waits
                   since its last token together
    lost           sessions that had to leave a target, by its name
    """

    def __init__(self, connect: Connect, target_wait_s: float = TARGET_WAIT_S) -> None:
        self.connect, self.target_wait_s = connect, target_wait_s
        self.lost: Counter[str] = Counter()
        self._links: dict[TargetLife, TargetLink] = {}
        self._assigned = 0
        self._changed = asyncio.Event()  # replaced at each update
        self._closing: set[asyncio.Task[None]] = set()

    @property
    def ready(self) -> bool:
        """Tells whether a target accepts sessions."""
        return any(link.state.state == "ready" for link in self._links.values())

    def update(self, targets: Sequence[TargetState]) -> None:
        """Sets the current targets.

        Sessions leave a target at once if it is gone, has another incarnation, or is starting
        again.
        """
        told = {
            (state.name, state.incarnation, state.address): state
            for state in targets
            if state.state != "starting"
        }
        for life in self._links.keys() - told.keys():
            self._remove_link(self._links.pop(life))
        for life, state in told.items():
            link = self._links.get(life)
            if link is not None:
                link.state, link.others = state, max(0, state.sessions - link.sessions)
            elif state.state == "ready":
                self._add_link(life, state)
        loop = asyncio.get_running_loop()
        for link in self._links.values():
            for name, work in (
                ("heartbeats", partial(listen, link, self._hears_another)),
                ("standby", partial(feed_standby, link)),
            ):
                if name not in link.tasks or link.tasks[name].done():
                    link.tasks[name] = loop.create_task(work())
        self._changed.set()
        self._changed = asyncio.Event()

    async def close(self) -> None:
        """Closes all connections. Sessions that still run find no target any more."""
        self.update(())
        await asyncio.gather(*self._closing)

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """Yields the output in chunks, as if by one target.

        The last chunk has a finish reason and the statistics of all targets involved. A session
        that has delivered tokens ends with finish reason "deadline" after its deadline. Closing the
        iterator cancels the work at the target at once.

        Raises InvalidRequest as the target does; Overloaded if two targets, or the only one, refuse
        a new session; TargetsLost if two targets died with it and it made no progress; Unavailable
        if no target was available in time, or too many were lost in a row.
        """
        now = asyncio.get_running_loop().time
        ends = math.inf if request.deadline is None else now() + request.deadline
        session = RoutedSession(request, now(), ends)
        try:
            while not session.over:
                link = await self._next_target(session)
                if link is None:
                    yield session.deadline_chunk(now())
                    return
                asked = session.next_request(now())
                async with self._calling(link, session, asked) as call:
                    while not session.over:
                        chunk = await next_chunk(link, call, session.ends + DEADLINE_GRACE_S)
                        if chunk is None:
                            yield session.deadline_chunk(now())
                            continue
                        shown = session.take(chunk, asked.epoch, now())
                        self._tell_standby(link, session)
                        yield shown
        finally:
            self._leave_standby(session)

    async def _next_target(self, session: RoutedSession) -> TargetLink | None:
        """Returns a target for the session, or None if its deadline passes after it has delivered
        tokens.

        Raises Unavailable if no target is available in time.
        """
        now = asyncio.get_running_loop().time
        began, limited = now(), session.ends < math.inf
        patience = session.ends - session.began if limited else self.target_wait_s
        until = session.ends if limited else began + patience - session.waited
        while (at := now()) < until:
            if (link := self._choose(session)) is not None:
                session.waited += at - began
                return link
            again = min([until, *(time for time in session.excluded_until.values() if time > at)])
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(again):
                    await self._changed.wait()
        if session.was_heard and limited:
            return None
        raise Unavailable(
            f"no target accepted the session within {patience:.1f} s: see `outrider status`"
        )

    def _choose(self, session: RoutedSession) -> TargetLink | None:
        """Returns the target to ask now, if there is one."""
        now = asyncio.get_running_loop().time()
        open_to = {
            life: link.load(now)
            for life, link in self._links.items()
            if link.state.state == "ready" and session.excluded_until.get(life, -math.inf) <= now
        }
        if (standby := session.standby) in open_to and not open_to[standby].suspect:
            return self._links[standby]
        life = least_loaded(open_to)
        return None if life is None else self._links[life]

    def _tell_standby(self, link: TargetLink, session: RoutedSession) -> None:
        """Tells a target other than `link` what is new of the session, so that it could take it
        over. With a single target nobody is told.
        """
        standby = self._links.get(session.standby) if session.standby else None
        if standby is None or standby is link or standby.state.state != "ready":
            self._leave_standby(session)
            now = asyncio.get_running_loop().time()
            others = {
                life: replace(load, sessions=load.sessions + len(other.feed.texts))
                for life, other in self._links.items()
                if other is not link and other.state.state == "ready"
                for load in (other.load(now),)
                if not load.suspect
            }
            session.standby = least_loaded(others)
            standby = self._links.get(session.standby) if session.standby else None
        if standby is not None and not session.over:
            standby.feed.update(session)

    def _leave_standby(self, session: RoutedSession) -> None:
        if session.standby and (link := self._links.get(session.standby)) is not None:
            link.feed.remove(session)
        session.standby = None

    @asynccontextmanager
    async def _calling(
        self, link: TargetLink, session: RoutedSession, request: Request
    ) -> AsyncIterator[AsyncGenerator[Chunk, None]]:
        """Yields the call to this target and closes it.

        Suppresses a loss or a refusal if another target may be asked.
        """
        self._assigned += 1
        link.last_assigned = self._assigned
        link.sessions += 1
        try:
            async with aclosing(link.remote.generate(request)) as call:
                yield call
        except Overloaded:
            self._exclude(link, session)
            if not session.begun and (session.calls > 1 or self._choose(session) is None):
                raise
        except InvalidRequest as error:
            if error.param != "session" or not session.begun:
                raise
            self._exclude(link, session)  # the target has not noticed yet that the last call ended
        except Unavailable as error:
            self._lose(link, session, error)
            if len(session.died_with_it) >= MAX_DEATHS:
                raise TargetsLost(
                    f"{MAX_DEATHS} targets died while they held this request,"
                    " which made no progress: no other target is given it"
                ) from error
            if len(session.failed_targets) >= MAX_FAILED_TARGETS:
                lives = len(session.failed_targets)
                raise Unavailable(
                    f"{lives} targets were lost one after the other without a token of this"
                    " session: see their logs"
                ) from error
        finally:
            link.sessions -= 1

    def _exclude(self, link: TargetLink, session: RoutedSession) -> None:
        """Delays the session's next call to this target, each time twice as long."""
        delay = session.delays.get(link.life, RETRY_DELAY_S)
        session.delays[link.life] = min(MAX_RETRY_DELAY_S, 2.0 * delay)
        session.excluded_until[link.life] = asyncio.get_running_loop().time() + delay

    def _lose(self, link: TargetLink, session: RoutedSession, error: Unavailable) -> None:
        now = asyncio.get_running_loop().time()
        if not link.removed and now >= link.suspect_until:
            log.warning(
                "target %s is lost or refuses sessions, which continue elsewhere: %s",
                link.state.name,
                error,
            )
        self.lost[link.state.name] += 1
        link.suspect_until = now + SUSPECT_S
        self._exclude(link, session)
        session.failed_targets.add(link.life)
        if isinstance(error, TargetDied) and not session.brought_tokens:
            session.died_with_it.add(link.life)
        session.leave()

    def _add_link(self, life: TargetLife, state: TargetState) -> None:
        try:
            self._links[life] = TargetLink(
                life, self.connect(state.address), state, others=state.sessions
            )
        except (
            InvalidRequest
        ) as error:  # certificates expired or just being replaced; retried later
            log.warning("target %s cannot be called: %s", state.name, error)

    def _hears_another(self, link: TargetLink) -> bool:
        return any(
            other.silence.is_heard
            for other in self._links.values()
            if other is not link and other.state.state == "ready" and other.silence is not None
        )

    def _remove_link(self, link: TargetLink) -> None:
        """Wakes its readers and closes its connection, which ends the calls that nobody reads right
        now.
        """
        link.removed = True
        link.wake_readers()
        closing = asyncio.get_running_loop().create_task(link.close())
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)


@asynccontextmanager
async def updated_router(router: Router, get_targets: GetTargets) -> AsyncIterator[Router]:
    """Yields the router and updates it periodically; closes it at the end of the block.

    `get_targets` is called on another thread. While it raises an error, the targets stay as they
    were; an error other than Unavailable is logged.
    """
    watching = asyncio.create_task(poll_targets(router, get_targets))
    try:
        yield router
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await router.close()


async def poll_targets(router: Router, get_targets: GetTargets) -> None:
    while True:
        try:
            router.update(await asyncio.to_thread(get_targets))
        except Unavailable:
            pass  # the sessions that wait for a target say so
        except Exception as error:
            # Asked again: the view must not freeze for good.
            log.error("the targets cannot be updated: %s", type(error).__name__, exc_info=error)
        await asyncio.sleep(POLL_PERIOD_S)
