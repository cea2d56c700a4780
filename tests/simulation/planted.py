"""Faults to plant in the product: each must be found, or the simulation looks at too little.

A fault is a change of source text in one function, so it goes stale as loudly as a patch: text
that is not there exactly once raises AssertionError.
"""

import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

QUICK_SEEDS = 20
MANY_SEEDS = 10_000


@dataclass(frozen=True, slots=True)
class Plant:
    """Replaces texts in a function, given as "module:function" or "module:Class.method".

    `seeds` is how many are enough to find it: `make test` looks for those with QUICK_SEEDS.
    """

    where: str
    changes: tuple[tuple[str, str], ...]
    seeds: int


def plant(
    where: str, old: str, new: str, *more: tuple[str, str], seeds: int = QUICK_SEEDS
) -> Plant:
    return Plant(where, ((old, new), *more), seeds)


ROUTED = "actors.routing.routed_session:RoutedSession"
REQUESTS = "runtime.target.request_manager:RequestManager"
PLANTED = {
    "epoch used again": plant(f"{ROUTED}.fence", "self.epoch += 1", "pass"),
    "journal without some tokens": plant(
        f"{ROUTED}.append",
        "position != len(self.output)",
        "False",
        ("extend(tokens)", "extend(tokens[:1])"),
        seeds=MANY_SEEDS,
    ),
    "journal not handed on": plant(
        f"{ROUTED}.next_request",
        "committed=tuple(self.output)",
        "committed=tuple(self.output[:-1])",
    ),
    "slot freed twice": plant(
        f"{REQUESTS}.finish",
        "self.admission.release(state.slots)",
        "self.admission.release(2 * state.slots)",
    ),
    "slot never freed": plant(f"{REQUESTS}.finish", "self.admission.release(state.slots)", "pass"),
    "more sessions than memory": plant(
        "runtime.target.admission:Admission.next", "self.reserved + need > self.budget", "False"
    ),
    "the last waits least": plant(
        "runtime.target.admission:Admission.next", "popleft()", "pop()", seeds=MANY_SEEDS
    ),
    "cancelled work goes on": plant(
        "runtime.target.target:Target.generate", "if not over:", "if False:"
    ),
    "one name for two sessions": plant(
        "runtime.target.target:Target.generate",
        "if request.session in self._sessions:",
        "if False:",
        seeds=MANY_SEEDS,
    ),
    "name of a session never free": plant(
        "runtime.target.target:Target.generate", "self._sessions.discard(request.session)", "pass"
    ),
    "deadline not kept": plant(
        f"{REQUESTS}.expire", "command.expires <= now", "False", seeds=MANY_SEEDS
    ),
    "drafter not told of an end": plant(
        f"{REQUESTS}.finish",
        "self.drafters.notify(session, Close(session.id))",
        "pass",
        seeds=MANY_SEEDS,
    ),
    "stream's end not told": plant(
        "runtime.draft.draft_host:DraftHost.speculate",
        "self.draft_engine.inbox.put(StreamClosed(stream))",
        "pass",
    ),
    "session committed after its end": plant(
        "runtime.target.committer:Committer.commit",
        "decision is not None and self.requests.is_running(item.state)",
        "decision is not None",
    ),
    "choice read from the wrong row": plant(
        "runtime.core.accepted_path:accept_path_by_row",
        "node, row = child, row_of[child]",
        "node, row = child, row",
    ),
    "guess sees its sibling": plant(
        "runtime.core.tree:TokenTree.ancestor_mask",
        "lines.append(1 << row if above is None else lines[above] | 1 << row)",
        "lines.append(1 << row | (lines[row - 1] if row else 0))",
    ),
    "rejected guess stays in the cache": plant(
        "runtime.target.batch:keep_accepted",
        "[prefix + row for row in accepted_rows(nodes, path)[1:]]",
        "[prefix + 1 + row for row in range(len(path))]",
    ),
    "root not moved after a miss": plant(
        "runtime.core.tree:TokenTree.reroot",
        "self.clear(text_key(tokens, self.key[0]), tokens[-1])",
        "self.key[0] = text_key(tokens, self.key[0])",
    ),
    "root found by its name": plant(
        "runtime.core.tree:TokenTree.reroot",
        "node = self.descend(tokens)",
        "name = text_key(tokens, self.key[0]); "
        "node = next((m[name] for m in self.nodes_by_key.values() if name in m), None)",
        seeds=MANY_SEEDS,
    ),
    "cached beginning too long": plant(
        "runtime.kv.prefix_cache:common_length",
        "int(differs.argmax()) if differs.any() else n",
        "min(n, int(differs.argmax()) + 1) if differs.any() else n",
        seeds=MANY_SEEDS,
    ),
    "noise of the wrong place": plant(
        "runtime.core.sampler_reference:SamplingInput.positions",
        "[len(self.text) + len(path) for path in self.paths]",
        "[len(self.text) for path in self.paths]",
    ),
    "stop strings forgotten on the way": plant(
        "runtime.target.target:resume_stop_checker",
        "for token in request.committed:",
        "for token in request.committed[:0]:",
    ),
    "old call holds up the session": plant(
        "actors.routing.router:Router._calling",
        'if error.param != "session" or not session.begun:',
        "if True:",
        seeds=MANY_SEEDS,
    ),
    "lost target asked again at once": plant(
        "actors.routing.router:Router._exclude",
        "asyncio.get_running_loop().time() + delay",
        "0.0",
        seeds=MANY_SEEDS,
    ),
    "stale commit accepted": plant(
        "runtime.draft.draft_engine:DraftEngine.commit",
        "or event.base + len(event.tokens) <= have",
        "",
        ("decided = event.tokens[have - event.base :]", "decided = event.tokens"),
        ("if event.base <= have:", "if True:"),
        ("if state.tree.key[0] != event.key:", "if False:"),
        seeds=MANY_SEEDS,
    ),
    "honest drafter shut out": plant(
        "actors.rpc.reply_budget:grant_for",
        "FRAMES_PER_EVENT,",
        "1,",
        seeds=MANY_SEEDS,
    ),
    "client hears that a target ends": plant(
        f"{ROUTED}.take", 'if chunk.finish_reason == "cancelled":', "if False:"
    ),
    "prompt counted by each target": plant(f"{ROUTED}.total", "prompt_tokens=prompt,", ""),
    "drafter never left": plant(
        "runtime.target.target:Target._follow",
        "self.engine.inbox.put(Leave(name, send))",
        "pass",
    ),
    "drafter keeps what has ended": plant(
        "runtime.draft.draft_engine:DraftEngine.handle",
        "case Close():\n            self.forget(name)",
        "case Close():\n            pass",
        seeds=MANY_SEEDS,
    ),
    "call of a lost client goes on": plant(
        "actors.rpc.client:GrpcTarget.generate", "call.cancel()", "pass", seeds=MANY_SEEDS
    ),
    "call to a drafter left open": plant(
        "actors.rpc.client:GrpcLink.speculate",
        "await asyncio.gather(forwarding, return_exceptions=True)\n            call.cancel()",
        "await asyncio.gather(forwarding, return_exceptions=True)",
        seeds=MANY_SEEDS,
    ),
    "events lost when the wire is busy": plant(
        "actors.rpc.frames:coalesce",
        "some = waiting.copy()",
        "some = waiting[:1]",
        seeds=MANY_SEEDS,
    ),
    "stop lost in a step": plant(
        "runtime.target.engine:Engine.step", "self.inbox.put(Stop())", "pass"
    ),
    "withdrawn request begins": plant(
        "runtime.target.admission:Admission.withdraw", "self.waiting.remove(admitted)", "pass"
    ),
    "cached texts without a bound": plant(
        "runtime.kv.prefix_cache:PrefixCache._evict",
        "while self.kept and self.slots > self.max_slots - self.reserved:",
        "while 0:",
        seeds=MANY_SEEDS,
    ),
    "torn end of an output kept": plant(
        "actors.jobs.outputs:FileOutput.resume",
        "opened.truncate(mark.position)",
        "pass",
        seeds=MANY_SEEDS,
    ),
    "answers recorded before they are written": plant(
        "actors.jobs.job:Job.save",
        'mark = self._output.append(b"".join(lines))',
        "mark = self._index.mark()",
        (
            "self.totals = self.totals.plus(",
            'self._output.append(b"".join(lines)); self.totals = self.totals.plus(',
        ),
        seeds=MANY_SEEDS,
    ),
    "answers written and not recorded": plant(
        "actors.jobs.index:JobIndex._transaction", '"COMMIT"', '"ROLLBACK"'
    ),
}


@lru_cache
def function_of(where: str) -> tuple[Any, str, Any]:
    """Return the owner of a function, its name and the function."""
    module_name, path = where.split(":")
    owner: Any = importlib.import_module(module_name)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    return owner, name, inspect.getattr_static(owner, name)


@lru_cache
def changed(name: str) -> Any:
    """Return the function of a planted fault."""
    found = PLANTED[name]
    _, function_name, function = function_of(found.where)
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in found.changes:
        assert source.count(old) == 1, (
            f"{name}: {old!r} is {source.count(old)} times in {found.where}"
        )
        source = source.replace(old, new)
    scope: dict[str, Any] = {}
    exec(
        "from __future__ import annotations\n" + source, inspect.unwrap(function).__globals__, scope
    )
    return scope[function_name]


@contextmanager
def planted(name: str) -> Iterator[None]:
    """Plant a fault for the length of the block; none if the name is empty."""
    if not name:
        yield
        return
    owner, function_name, function = function_of(PLANTED[name].where)
    new = changed(name)
    owners = [owner] if not isinstance(owner, ModuleType) else importers(function)
    for one in owners:
        setattr(one, function_name, new)
    try:
        yield
    finally:
        for one in owners:
            setattr(one, function_name, function)


def importers(function: Any) -> list[ModuleType]:
    """Return the modules that know a function by its name."""
    return [
        module
        for module in tuple(sys.modules.values())
        if getattr(module, function.__name__, None) is function
    ]
