# SPDX-License-Identifier: Apache-2.0
"""The README shows what the benchmark rows hold, and the commands that it names exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from masktrain.cli import COMMANDS
from masktrain.recipes import RECIPES

REPO = Path(__file__).resolve().parent.parent
README = (REPO / "README.md").read_text()


def test_results_are_those_of_the_rows() -> None:
    script = REPO / "benchmarks" / "readme_results.py"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_commands_recipes_and_files_exist() -> None:
    for command in re.findall(r"^ +(?:torchrun .*--no-python )?masktrain (\w+)", README, re.MULTILINE):
        assert command in COMMANDS, command
    for recipe in re.findall(r"mae_ast_\w*[a-z0-9]", README):
        assert recipe in RECIPES, recipe
    for path in re.findall(r"\]\(([^)]+)\)", README):
        assert (REPO / path).is_file(), path
    for folder in re.findall(r"^\| `([^`]+)/`", README, re.MULTILINE):
        assert (REPO / folder).is_dir(), folder


def test_the_two_commands_stand_alone() -> None:
    assert "\n    pip install -e '.[cu13]' && masktrain run --recipe mae_ast_frame\n" in README
    assert "\n    pip install -e '.[test]' && pytest\n" in README
