"""Who loads does not hold up those that serve."""

import os
import sys
from pathlib import Path

import pytest

from actors.cpu_affinity import LOADING_NICENESS, import_at_low_priority

LOWEST = 19
NOTES = "import os\nfound = os.nice(0)\n"


def test_what_is_loaded_gently_is_loaded_at_low_priority_and_nothing_else_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "loaded_gently.py").write_text(NOTES)
    monkeypatch.syspath_prepend(tmp_path)
    before = os.nice(0)
    import_at_low_priority("loaded_gently")
    assert sys.modules.pop("loaded_gently").found == min(before + LOADING_NICENESS, LOWEST)
    assert os.nice(0) == before


def test_what_cannot_be_loaded_says_so_to_who_imports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_inside.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    import_at_low_priority("broken_inside")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        __import__("broken_inside")
