"""What a process holds of the machine, read from Linux's /proc."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True, slots=True)
class ProcessStats:
    """The holdings of a process.

    memory    bytes of its own, without pages of files, which the system drops at will; includes
              those shared
    shared    bytes of shared memory that it has touched
    files     open file descriptors
    threads   threads
    children  processes that it has started, and those that they have started
    """

    memory: int
    shared: int
    files: int
    threads: int
    children: int


def read_process(pid: int, parents: Mapping[int, int]) -> ProcessStats | None:
    """Return what the process holds; None if it is gone. `parents` is that of `read_parents`."""
    try:
        status = parse_status((PROC / str(pid) / "status").read_text())
        files = sum(1 for _ in (PROC / str(pid) / "fd").iterdir())
    except OSError:
        return None
    if "RssAnon" not in status:  # a zombie holds nothing
        return None
    sizes = {name: status[name] << 10 for name in ("RssAnon", "RssShmem", "VmSwap")}
    return ProcessStats(
        sum(sizes.values()),
        sizes["RssShmem"],
        files,
        status["Threads"],
        sum(1 for _ in descendants(pid, parents)),
    )


def parse_status(text: str) -> dict[str, int]:
    """Return the numbers in a `status` file of /proc; sizes are in KiB."""
    fields = (line.partition(":") for line in text.splitlines())
    words = ((name, value.split()) for name, _, value in fields)
    return {name: int(value[0]) for name, value in words if value and value[0].isdecimal()}


def read_parents() -> dict[int, int]:
    """Return the parent of each process of the machine."""
    found = {}
    for folder in PROC.iterdir():
        if folder.name.isdecimal():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has just ended
            found[int(folder.name)] = int(fields[1])
    return found


def descendants(pid: int, parents: Mapping[int, int]) -> Iterator[int]:
    """Yield the processes that this one has started, and those that they have started."""
    for child, parent in parents.items():
        if parent == pid:
            yield child
            yield from descendants(child, parents)


def find_by_command(pids: Iterator[int], names: tuple[str, ...]) -> dict[str, int]:
    """Return those of the processes whose command has one of these names, by name."""
    found = {}
    for pid in pids:
        try:
            name = (PROC / str(pid) / "comm").read_text().strip()
        except OSError:
            continue
        if name in names:
            found[name] = pid
    return found
