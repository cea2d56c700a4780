"""Makes several hosts out of one machine.

Each host has its own network, processes, mounts, name and SSH server, and reaches only the others.
Everything depends on processes started here: the namespaces have no names and end with them. It
needs root, Linux with overlayfs, iproute2, util-linux, openssh-server and rsync.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.support.paths import ROOT

NEEDED = ("ip", "unshare", "nsenter", "setpriv", "ssh", "ssh-keygen", "rsync", "/usr/sbin/sshd")
PATIENCE_S = 20.0  # for a host to answer


def missing() -> str:
    """Returns why hosts cannot be made here; empty if they can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "needs root on Linux"
    absent = [tool for tool in NEEDED if shutil.which(tool) is None]
    if absent:
        packages = "iproute2 util-linux openssh-client openssh-server rsync"
        return f"needs {', '.join(absent)}: apt-get install {packages}"
    done = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--fork", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"needs namespaces: {done.stderr.strip()}" if done.returncode else ""


@dataclass(frozen=True, slots=True)
class Hosts:
    """`processes` are the hosts' first processes, by real id; `switch` holds their network."""

    addresses: Mapping[str, str]
    processes: Mapping[str, int]
    switch: int

    def command(self, host: str, command: str) -> list[str]:
        """What runs a line of shell on a host, as a user who logs in there would."""
        inside = [
            "nsenter",
            "-t",
            str(self.processes[host]),
            "-m",
            "-u",
            "-i",
            "-n",
            "-p",
            "-r",
            "-w",
        ]
        clean = [
            "env",
            "-i",
            "HOME=/root",
            "TERM=dumb",
            "LANG=C.UTF-8",
            "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
        ]
        return [*inside, *clean, "bash", "-c", f"cd; . ~/.bashrc; {command}"]

    def run(self, host: str, command: str, patience: float = 600.0) -> str:
        """Returns the output; raises CalledProcessError or, after `patience` s, TimeoutExpired."""
        done = subprocess.run(
            self.command(host, command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
            timeout=patience,
        )
        return done.stdout

    def cut(self, host: str) -> None:
        """Pull its cable: silence, no reset."""
        in_network(self.switch, "ip", "link", "set", f"to-{host}", "down")

    def mend(self, host: str) -> None:
        in_network(self.switch, "ip", "link", "set", f"to-{host}", "up")

    def power_off(self, host: str) -> None:
        """All its processes at once."""
        os.kill(self.processes[host], signal.SIGKILL)


@contextlib.contextmanager
def hosts(addresses: Mapping[str, str]) -> Iterator[Hosts]:
    """Makes hosts of these names (at most 10 letters) and IPv4 addresses in one /24 network.

    They answer SSH and end with the block.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="outrider-hosts-"))
        stack.callback(shutil.rmtree, folder)
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "id")], check=True
        )
        lines = [
            "127.0.0.1 localhost",
            *(f"{address} {name}" for name, address in addresses.items()),
        ]
        (folder / "hosts").write_text("\n".join(lines) + "\n")

        switch = first_process(
            stack, ["unshare", "--net", "--fork", "--kill-child", "sleep", "infinity"]
        )
        in_network(switch, "ip", "link", "add", "switch", "type", "bridge")
        in_network(switch, "ip", "link", "set", "switch", "up")
        processes = {}
        for name, address in addresses.items():
            script = [
                "bash",
                str(Path(__file__).with_name("host.sh")),
                name,
                str(folder),
                str(ROOT),
            ]
            spaces = [
                "--net",
                "--mount",
                "--uts",
                "--ipc",
                "--pid",
                "--mount-proc",
                "--fork",
                "--kill-child",
            ]
            process = processes[name] = first_process(stack, ["unshare", *spaces, *script])
            in_network(
                switch,
                "ip",
                "link",
                "add",
                f"to-{name}",
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                str(process),
            )
            in_network(switch, "ip", "link", "set", f"to-{name}", "master", "switch", "up")
            in_network(process, "ip", "link", "set", "lo", "up")
            in_network(process, "ip", "address", "add", f"{address}/24", "dev", "eth0")
            in_network(process, "ip", "link", "set", "eth0", "up")
        made = Hosts(dict(addresses), processes, switch)
        for name, address in addresses.items():
            await_(partial(answers, made, name, address), f"SSH on {name}")
        yield made


def first_process(stack: contextlib.ExitStack, command: Sequence[str]) -> int:
    """Starts `unshare --fork ...` and returns its child's id.

    It is killed with the stack and with this process.
    """
    running = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *command], stdin=subprocess.DEVNULL
    )
    stack.callback(running.wait)
    stack.callback(running.kill)
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    await_(
        lambda: bool(children.read_text().split()) or running.poll() is not None,
        f"the child of {command[0]}",
    )
    if running.poll() is not None:
        raise RuntimeError(
            f"{' '.join(command)} has ended with code {running.returncode}: see its message above"
        )
    return int(children.read_text().split()[0])


def in_network(process: int, *command: str) -> None:
    subprocess.run(["nsenter", "-t", str(process), "-n", *command], check=True)


def answers(made: Hosts, host: str, address: str) -> bool:
    knock = [
        "nsenter",
        "-t",
        str(made.processes[host]),
        "-n",
        "bash",
        "-c",
        f"exec 3<>/dev/tcp/{address}/22",
    ]
    return subprocess.run(knock, capture_output=True, check=False).returncode == 0


def await_(true: Callable[[], bool], what: str, patience: float = PATIENCE_S) -> None:
    """Raises TimeoutError where it does not become true in time."""
    deadline = time.monotonic() + patience
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come within {patience:g} s")
        time.sleep(0.05)
