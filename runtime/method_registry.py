"""Names of the drafting methods and heads: the modules in runtime/drafters and runtime/heads."""

import pkgutil
from collections.abc import Iterable

import runtime.drafters
import runtime.heads


def drafting_methods() -> list[str]:
    """Names of the drafting methods: the files in runtime/drafters."""
    return module_names(runtime.drafters.__path__)


def head_methods() -> list[str]:
    """Names of the heads: the files in runtime/heads."""
    return module_names(runtime.heads.__path__)


def module_names(folders: Iterable[str]) -> list[str]:
    return sorted(
        module.name.replace("_", "-")
        for module in pkgutil.iter_modules(folders)
        if module.name != "base"
    )


def module_name(method: str) -> str:
    """The file's name of a drafting method or a head."""
    return method.replace("-", "_")
