"""The import contract of `.importlinter`: the order of the folders, no circle, pure modules."""

import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def lint(folder: Path) -> tuple[int, str]:
    """(exit status, output) of import-linter in `folder`."""
    program = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([program, "--no-cache"], capture_output=True, text=True, cwd=folder, check=False)
    return done.returncode, done.stdout + done.stderr


def test_imports_follow_the_order_of_the_folders():
    status, printed = lint(ROOT)
    assert status == 0, printed


def test_an_import_against_the_order_is_found(tmp_path):
    """The contract itself can fail: a file of the ground that imports from the roof is named."""
    import shutil

    shutil.copytree(ROOT / "utils", tmp_path / "utils", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".importlinter", tmp_path)
    errors = tmp_path / "utils" / "errors.py"
    errors.write_text(errors.read_text() + "\nfrom utils.train.state import RunState\n")
    status, printed = lint(tmp_path)
    assert status == 1 and "utils.errors -> utils.train" in printed, printed
