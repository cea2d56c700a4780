"""Call a function in a separate process, which has its own cores and threads and ends with the
call."""

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypeVar

from runtime.core.errors import OutriderError, Unavailable

Given = TypeVar("Given")
Found = TypeVar("Found")


def call_in_subprocess(function: Callable[[Given], Found], given: Given) -> Found:
    """Return `function(given)` from a new process; both must be picklable.

    Raises the OutriderError that the function raises, or Unavailable if the process dies.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=serve_call, args=(theirs, function, given), name=function.__name__, daemon=True
    )
    process.start()
    theirs.close()
    try:
        found: Found | OutriderError = ours.recv()
    except EOFError as error:
        process.join()
        raise Unavailable(
            f"{function.__name__} ended with code {process.exitcode}: see its message above"
        ) from error
    finally:
        process.terminate()
        process.join()
    if isinstance(found, OutriderError):
        raise found
    return found


def serve_call(connection: Connection, function: Callable[[Given], Found], given: Given) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C goes to the caller, which ends this process
    try:
        connection.send(function(given))
    except OutriderError as error:
        connection.send(error)
