"""Import statements follow the layers of ARCHITECTURE.md, and files follow their rules."""

import ast
import subprocess
import sys
from collections import defaultdict
from fnmatch import fnmatch
from graphlib import TopologicalSorter

import pytest

from tests.support.paths import ROOT

FOLDERS = (
    "runtime",
    "actors",
    "protos",
    "models",
    "training",
    "bench",
    "experiments",
    "tests",
    "deploy",
)
FILES = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*.py")
)
SOURCES = [file for file in FILES if "_pb2" not in file]

# A file of runtime/ belongs to the first layer with a pattern for it. It may use its own layer
# and those before it.
LAYERS = (
    (
        "*__init__",
        "core/cache_folder",
        "core/clock",
        "core/cpu_partition",
        "core/draft_nodes",
        "core/errors",
        "core/features",
        "core/limits",
        "core/messages",
        "core/node_keys",
        "core/node_table",
        "core/sampling_params",
        "core/tree",
        "scoring/expected_tokens",
        "telemetry/chrome_trace",
        "telemetry/reports",
        "telemetry/tracing",
    ),
    (
        "*/base",
        "core/links",
        "core/noise",
        "core/sampler_reference",
        "core/accepted_path",
        "draft/frontier",
        "scoring/agreement",
        "scoring/calibration",
        "scoring/gate_account",
        "scoring/speculation_gate",
        "target/stop_checker",
    ),
    (
        "target/session",
        "core/tree_builder",
        "drafters/ngram",
        "models/catalogue",
        "models/prefill",
        "models/toy",
        "models/vocab_check",
        "scoring/*",
        "schedulers/*",
        "target/admission",
        "target/batch",
        "target/commands",
        "target/drafter_manager",
        "target/feature_sender",
        "target/request_state",
        "target/verifier",
        "telemetry/metrics",
    ),
    ("config", "deployment_builder", "method_registry", "model_paths"),
    ("kv/*", "kernels/*", "models/*", "drafters/*", "heads/*"),
    ("target/*", "draft/*"),
    ("scheduler_factory", "sim/*"),
)
LIBRARIES: tuple[set[str], ...] = (
    {"numpy"},
    {"numpy"},
    {"numpy"},
    {"pydantic", "yaml"},
    {
        "numpy",
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "huggingface_hub",
        "gguf",
        "filelock",
        "llguidance",
        "llvmlite",
    },
    {"numpy"},
    {"numpy", "pydantic"},
)
NEVER: tuple[set[str], ...] = (
    set(),
    {"asyncio", "time", "random"},
    {"asyncio"},
    {"asyncio"},
    {"asyncio"},
    set(),
    {"asyncio", "time", "random"},
)
HIDDEN = {
    "runtime/drafters/*": ("target/session", "core/accepted_path", "target/*"),
    "runtime/heads/*": ("target/session", "core/accepted_path", "target/*"),
    "runtime/schedulers/*": ("target/session", "core/tree", "core/accepted_path"),
}


def layer(name: str) -> int:
    """Of a module of runtime/, given as a path without ".py"."""
    found = [
        number
        for number, patterns in enumerate(LAYERS)
        if any(fnmatch(name, pattern) for pattern in patterns)
    ]
    assert found, f"runtime/{name}.py has no layer: name it in LAYERS and in ARCHITECTURE.md"
    return found[0]


def imports(source: str) -> set[str]:
    """Returns this project's files as paths without ".py" and other modules by top-level name.

    A package is its __init__. Lazy imports count too.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse((ROOT / source).read_text("utf-8"))):
        match node:
            case ast.Import(names):
                found.update(alias.name for alias in names)
            case ast.ImportFrom(str(module), names, 0):
                found.update(
                    f"{module}.{alias.name}" if is_ours(f"{module}.{alias.name}") else module
                    for alias in names
                )
            case ast.ImportFrom():
                pytest.fail(f"{source}:{node.lineno}: a relative import")
    tops = {name: name.partition(".")[0] for name in found}
    return {path_of(name) if top in FOLDERS else top for name, top in tops.items()}


def is_ours(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or path.is_dir()


def path_of(name: str) -> str:
    path = name.replace(".", "/")
    return f"{path}/__init__" if (ROOT / path).is_dir() else path


@pytest.mark.parametrize("source", [source for source in SOURCES if source.startswith("runtime/")])
def test_runtime_keeps_its_layers(source: str) -> None:
    own = layer(source.removeprefix("runtime/").removesuffix(".py"))
    for name in imports(source):
        if name.startswith("runtime/"):
            assert layer(name.removeprefix("runtime/")) <= own, (
                f"{source} imports {name} of a layer above it"
            )
        else:
            assert name in sys.stdlib_module_names - NEVER[own] | LIBRARIES[own], (
                f"{source} (layer {own}) imports {name}"
            )
    for pattern, hidden in HIDDEN.items():
        if fnmatch(source, pattern):
            assert not [
                name
                for name in imports(source)
                if any(fnmatch(name, f"runtime/{one}") for one in hidden)
            ], source


@pytest.mark.parametrize(
    "source", [source for source in SOURCES if not source.startswith(("runtime/", "tests/"))]
)
def test_the_rest_looks_inwards_only(source: str) -> None:
    folder, used = source.partition("/")[0], imports(source)
    folders = {name.partition("/")[0] for name in used if "/" in name}
    if folder not in ("actors", "bench", "experiments"):
        assert "actors" not in folders, f"{source} imports actors"
        assert used.isdisjoint({"ray", "grpc", "http", "fastapi", "uvicorn"}), (
            f"{source} does the work of actors"
        )
    if folder == "protos":
        assert folders <= {"protos", "runtime"}, source
        assert all(
            layer(name.removeprefix("runtime/")) == 0
            for name in used
            if name.startswith("runtime/")
        ), source


def package_of(file: str) -> str:
    """Return the package of a file, at most two folders deep."""
    return "/".join(file.split("/")[:-1][:2])


def test_no_packages_import_each_other() -> None:
    uses = defaultdict[str, set[str]](set)
    for source in SOURCES:
        if not source.startswith("tests/"):
            used = {package_of(name) for name in imports(source) if "/" in name}
            uses[package_of(source)] |= used - {package_of(source)}
    TopologicalSorter(uses).prepare()  # raises CycleError


HEAVY = ("torch", "transformers", "ray", "grpc", "matplotlib")


@pytest.mark.parametrize(
    "program",
    [
        "import runtime.target.target",
        "from actors.cli import app; app(['--help'], standalone_mode=False)",
    ],
)
def test_neither_the_target_nor_help_loads_a_heavy_library(program: str) -> None:
    program += f"; import sys; print(*{{*{HEAVY}}} & set(sys.modules), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stderr.split() == []


def test_files_are_short_and_hide_no_module_of_the_standard_library() -> None:
    assert [
        source for source in SOURCES if len((ROOT / source).read_text("utf-8").splitlines()) > 400
    ] == []
    names = {part.removesuffix(".py"): source for source in SOURCES for part in source.split("/")}
    assert {name: source for name, source in names.items() if name in sys.stdlib_module_names} == {}
