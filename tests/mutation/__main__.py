"""`make mutants`: changes one place of a file at a time and looks whether its tests notice.

mutmut makes and runs the mutants. Each file gets a folder in build/mutants, so that nothing in the
checkout is touched. The tests of a file are those of its module in modules.toml.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import chdir, suppress
from pathlib import Path
from typing import Annotated

import typer
from mutmut.configuration import reset_config
from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.utils.format_utils import get_mutant_name, mangled_name_from_mutant_name
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests.mutation.mutants import (
    GOAL,
    Equal,
    FileResult,
    Module,
    Mutant,
    chosen,
    compare,
    is_equal,
    is_wording,
    read_equal,
    read_modules,
    sample,
    summary,
    verdict,
)
from tests.support.paths import ROOT

HERE = Path(__file__).parent
BUILD = ROOT / "build" / "mutants"
POLL_PERIOD_S = 1.0
CONFIG = """
[tool.mutmut]
source_paths = [{package}]
only_mutate = [{file}]
pytest_add_cli_args_test_selection = {tests}
pytest_add_cli_args = ["-p", "no:cacheprovider"]
process_isolation = "forkserver"
timeout_multiplier = 5.0
"""


def main(
    files: Annotated[
        str, typer.Option(help="patterns of files or names of modules; 'all'; default: changed")
    ] = "",
    most: Annotated[int, typer.Option(min=0, help="mutants per file, evenly spread; 0: all")] = 100,
    base: Annotated[str, typer.Option(help="files changed since this branch's base")] = "main",
) -> None:
    """Run mutants of some files and print how many their tests kill.

    Ctrl-C or SIGTERM ends the run; what was run until then is printed.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console(soft_wrap=True)
    modules = read_modules((HERE / "modules.toml").read_text())
    equal = read_equal((HERE / "equal.toml").read_text())
    patterns = ["*"] if files == "all" else files.split() or changed_files(base)
    todo = chosen(modules, patterns)
    if not todo:
        known = ", ".join(module.name for module in modules)
        where = files or f"the changes since {base}"
        console.print(f"no mutated module in {where}: give FILES=all, a file, or one of {known}")
        raise typer.Exit(2 if files else 0)
    results = []
    for file, module in todo:
        result, interrupted = run_file(file, module, equal, most, console)
        results.append(result)
        for survivor in result.survivors:
            text = f"  survived: - {survivor.line}\n            + {survivor.mutant}"
            console.print(text, markup=False, highlight=False)
        if interrupted:
            console.print(f"interrupted after {result.run} mutants of {file}")
            break
    table = Table()
    table.add_column("file", no_wrap=True, min_width=max(len(file) for file, _ in todo))
    for heading in ("mutants", "run", "killed", "survived", "equal", "share"):
        table.add_column(heading, justify="right", min_width=len(heading))
    rows = summary(results)
    for row in rows:
        table.add_row(*row, end_section=row is rows[-2])
    console.print(table)
    (BUILD / "results.json").write_text(json.dumps(rows, indent=1))
    run, killed = sum(r.run for r in results), sum(r.killed for r in results)
    if killed < GOAL * run:
        console.print(f"fewer than {GOAL:.0%} killed: add tests, or list equal ones in equal.toml")
        raise typer.Exit(1)


def changed_files(base: str) -> list[str]:
    """Return the files that differ from the merge base with `base`, committed or not."""
    start = git("merge-base", base, "HEAD")
    return git("diff", "--name-only", start[0]) + git("ls-files", "-o", "--exclude-standard")


def git(*arguments: str) -> list[str]:
    command = ["git", "-C", str(ROOT), *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise typer.BadParameter(f"{done.stderr.strip()}: give FILES=... or BASE=...")
    return done.stdout.splitlines()


def run_file(
    file: str, module: Module, equal: list[Equal], most: int, console: Console
) -> tuple[FileResult, bool]:
    """Make and run the mutants of one file; tell whether the run was interrupted."""
    folder = prepare(file, module)
    with chdir(folder):
        everything = make_mutants(file)
    open_ones = [mutant for mutant in everything if not is_wording(mutant)]
    unequal = [mutant for mutant in open_ones if not is_equal(mutant, equal)]
    wanted = sample(unequal, most)
    codes = run_mutants(folder, file, wanted, console) if wanted else {}
    tried = [mutant for mutant in wanted if mutant.name in codes]
    survivors = [mutant for mutant in tried if verdict(codes[mutant.name]) == "survived"]
    result = FileResult(
        file,
        made=len(open_ones),
        run=len(tried),
        killed=len(tried) - len(survivors),
        equal=len(open_ones) - len(unequal),
        survivors=tuple(survivors),
    )
    return result, len(tried) < len(wanted)


def prepare(file: str, module: Module) -> Path:
    """Make the folder in which mutmut runs: links to the checkout, and a configuration."""
    folder = BUILD / file.removesuffix(".py").replace("/", ".")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "mutants").mkdir(parents=True)
    package = file.partition("/")[0]
    for name in (package, "tests"):  # mutmut copies these
        (folder / name).symlink_to(ROOT / name)
    for path in ROOT.iterdir():
        if path.name not in (package, "tests", "build", "pyproject.toml"):
            (folder / "mutants" / path.name).symlink_to(path)
    own = CONFIG.format(
        package=json.dumps(package), file=json.dumps(file), tests=json.dumps(module.tests)
    )
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + own)
    return folder


def make_mutants(file: str) -> list[Mutant]:
    """Return all mutants of a file. The working folder is the one that `prepare` made."""
    reset_config()
    made = mutate_file_contents(file, Path(file).read_text())
    lines, spans = made.code.splitlines(), made.line_span_by_function_name

    def source(function: str) -> str:
        span = spans[function]
        return "\n".join(lines[span.start - 1 : span.end]).replace(function, "")

    return [
        compare(
            get_mutant_name(Path(file), name),
            file,
            source(mangled_name_from_mutant_name(name) + "__mutmut_orig"),
            source(name),
        )
        for name in made.mutant_names
    ]


def run_mutants(folder: Path, file: str, mutants: list[Mutant], console: Console) -> dict[str, int]:
    """Run mutants one at a time and return the exit codes of their tests, by name.

    Interrupted, it returns those that are known. Raises typer.Exit if mutmut fails, above all
    because the tests fail without a mutant.
    """
    names, log = [mutant.name for mutant in mutants], folder / "mutmut.log"
    interrupted = False
    command = [str(Path(sys.executable).parent / "mutmut"), "run", "--max-children", "1", *names]
    environment = os.environ | {
        "PYTHONPATH": "",
        "OMP_NUM_THREADS": "1",
        "OUTRIDER_TEST_MUTANTS": "1",
    }
    with (
        log.open("w") as output,
        subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
        ) as progress,
    ):
        try:
            task = progress.add_task(file, total=len(names))
            while process.poll() is None:
                time.sleep(POLL_PERIOD_S)
                progress.update(task, completed=len(exit_codes(folder, file, names)))
        except KeyboardInterrupt:
            interrupted = True
        codes = exit_codes(folder, file, names)
        with suppress(ProcessLookupError):  # its workers too
            os.killpg(process.pid, signal.SIGKILL)
    if not interrupted and (process.returncode or len(codes) < len(names)):
        console.print(log.read_text()[-4000:], markup=False)
        console.print(f"{file}: mutmut has run {len(codes)} of {len(names)} mutants; see {log}")
        raise typer.Exit(3)
    return codes


def exit_codes(folder: Path, file: str, names: list[str]) -> dict[str, int]:
    """Return the exit codes known so far; mutmut may be writing its file at this moment."""
    try:
        known = json.loads((folder / "mutants" / f"{file}.meta").read_text())["exit_code_by_key"]
    except (OSError, json.JSONDecodeError):
        return {}
    return {name: known[name] for name in names if known.get(name) is not None}


if __name__ == "__main__":
    typer.run(main)
