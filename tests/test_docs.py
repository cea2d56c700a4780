"""The documents hold: every link leads somewhere, every command shown exists with its flags."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from actors.cli import app
from tests.support.paths import ROOT

README_LINES = 150

PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "deploy/*.md", "bench/results/*.md", "models/**/*.md")
    for path in ROOT.glob(pattern)
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.M | re.S)
INLINE = re.compile(r"`([^`\n]+)`")
INDENTED = re.compile(r"^ {4,}(\S.*)$", re.M)


def ids(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in headings}


def commands(page: Path) -> list[str]:
    """Returns every command on the page, from code blocks and code in prose."""
    text = page.read_text("utf-8")
    blocks = FENCE.findall(text)
    rest = FENCE.sub("", text)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [*lines, *INDENTED.findall(rest), *INLINE.findall(rest)]


def calls(page: Path, name: str) -> list[list[str]]:
    """The arguments of each call of the program `name` on the page."""
    found = []
    for line in commands(page):
        match = re.search(
            rf"(?:^|[\s'\"$&;|]|\.venv/bin/){name}((?: [^'\"#|&;<>]+|'[^']*'|\"[^\"]*\"| )*)", line
        )
        if match is not None and line[: match.start()].strip() in (
            "",
            "$",
            ".venv/bin/",
            "ray exec",
        ):
            found.append(shlex.split(match.group(1)))
    return found


def subcommand(words: list[str]) -> tuple[TyperCommand | TyperGroup, list[str]]:
    """The command that these words name, and the words that follow it."""
    command = get_command(app)
    while isinstance(command, TyperGroup) and words and not words[0].startswith("-"):
        name, *words = words
        assert name in command.commands, f"there is no command {name!r}"
        command = command.commands[name]
    assert isinstance(command, TyperCommand | TyperGroup)
    return command, words


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text("utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        goal = (page.parent / path).resolve() if path else page
        assert goal.exists(), f"{link} leads nowhere"
        if anchor:
            assert anchor in anchors(goal), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_command_exists_with_its_flags(page: Path) -> None:
    for words in calls(page, "outrider"):
        command, rest = subcommand(words)
        known = {
            flag for option in command.params for flag in (*option.opts, *option.secondary_opts)
        }
        for word in rest:
            if re.fullmatch(r"--?[a-z][\w-]*(=.*)?", word):
                flag = word.partition("=")[0]
                assert flag in known | {"--help"}, f"outrider {' '.join(words)}: no flag {flag}"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_make_target_exists(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    for words in calls(page, "make"):
        for word in words:
            if re.fullmatch(r"[a-z][a-z-]*", word):
                assert word in targets, f"make {word}: no such target"


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_every_module_and_test_that_is_run_exists(page: Path) -> None:
    for words in calls(page, "python"):
        if words[:1] == ["-m"] and words[1].partition(".")[0] in (
            "actors",
            "bench",
            "experiments",
            "protos",
            "tests",
            "training",
        ):
            assert importlib.util.find_spec(words[1]) is not None, (
                f"python -m {words[1]}: no such module"
            )
    for words in calls(page, "pytest"):
        for word in words:
            if word.startswith("tests"):
                assert (ROOT / word.partition("::")[0]).exists(), f"{word}: no such test"


def test_the_files_that_architecture_names_exist() -> None:
    names = {path.name for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    for name in re.findall(r"`([\w/]+\.py)`", (ROOT / "ARCHITECTURE.md").read_text("utf-8")):
        assert (ROOT / name).exists() if "/" in name else name in names, name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= README_LINES


def test_something_is_checked() -> None:
    """The patterns above find what they are made for."""
    readme, guide = ROOT / "README.md", ROOT / "docs" / "cli.md"
    assert ["serve"] in calls(readme, "outrider")
    assert ["test"] in calls(readme, "make")
    assert any("--in-process" in words for words in calls(guide, "outrider"))
    assert any(
        words[:1] == ["tests/contracts/test_exactness.py"]
        for words in calls(ROOT / "docs" / "guarantees.md", "pytest")
    )
