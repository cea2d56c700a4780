"""Lists the drafting methods and the heads: the modules in runtime/drafters and runtime/heads."""

import pkgutil
from collections.abc import Iterable

import runtime.drafters
import runtime.heads


def drafting_methods() -> list[str]:
    """Return the names of the drafting methods: the files in runtime/drafters."""
    return module_names(runtime.drafters.__path__)


def head_methods() -> list[str]:
    """Return the names of the heads: the files in runtime/heads."""
    return module_names(runtime.heads.__path__)


def module_names(folders: Iterable[str]) -> list[str]:
    return sorted(
        module.name.replace("_", "-")
        for module in pkgutil.iter_modules(folders)
        if module.name != "base"
    )


def module_name(method: str) -> str:
    """Return the module that implements a drafting method or a head."""
    return method.replace("-", "_")
