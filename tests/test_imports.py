# SPDX-License-Identifier: Apache-2.0
"""Imports go downward only, optional packages are imported in one file each, and importing masktrain is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent

BASE = {"types", "config", "errors", ""}
SIBLINGS = {"data", "frontend", "masking", "models"}
# layer -> the layers of masktrain that it may import
ALLOWED = {
    "types": {"errors"},
    "config": {"errors"},
    "errors": set(),
    "": set(),
    "data": BASE | {"kernels"},
    "frontend": BASE | {"kernels"},
    "masking": BASE | {"kernels"},
    "models": BASE | {"kernels"},
    "objectives": BASE | SIBLINGS | {"kernels"},
    "training": BASE | SIBLINGS | {"kernels", "objectives"},
    "recipes": BASE | SIBLINGS | {"kernels", "objectives", "training"},
    "evaluation": BASE | SIBLINGS | {"kernels", "objectives", "training"},
    "cli": BASE | SIBLINGS | {"kernels", "objectives", "training", "recipes", "evaluation"},
    "kernels": {"kernels"},
}
# package -> the files that may import it
ONLY_IN = {
    "triton": ("kernels/_triton.py", "kernels/*/_triton.py"),
    "nvidia": ("masktrain/data/dali_loader.py",),
    "tensorboard": ("masktrain/training/loggers.py",),
    "matplotlib": ("masktrain/training/drawing.py",),
    "soundfile": ("masktrain/data/decode.py", "masktrain/data/demo.py"),
    "flash_attn": (),
    "xformers": (),
    "apex": (),
    "wandb": (),
    "kernels": (),
}


def sources() -> list[Path]:
    files = [p for p in (REPO / "masktrain").rglob("*.py") if "kernels" not in p.relative_to(REPO).parts]
    return sorted(files + list((REPO / "kernels").rglob("*.py")))


def imports(path: Path) -> list[tuple[str, int]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(name, node.lineno) for name in names]
    return found


def layer_of(module: str) -> str:
    parts = module.split(".")
    known = parts[1] if len(parts) > 1 else ""
    return known if known in ALLOWED else ""


def own_layer(path: Path) -> str:
    parts = path.relative_to(REPO).parts
    if parts[0] == "kernels":
        return "kernels"
    return parts[1] if len(parts) > 2 else parts[1].removesuffix(".py").replace("__init__", "")


def test_sources_are_found() -> None:
    assert len(sources()) > 40


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(REPO)))
def test_imports_go_downward(path: Path) -> None:
    own = own_layer(path)
    for module, line in imports(path):
        if module.split(".")[0] == "masktrain":
            layer = layer_of(module)
            assert layer == own or layer in ALLOWED[own], f"{path}:{line}: {own!r} must not import {module}"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(REPO)))
def test_optional_packages_stay_in_their_file(path: Path) -> None:
    relative = path.relative_to(REPO)
    for module, line in imports(path):
        name = module.split(".")[0]
        if module.startswith("torch.utils.tensorboard"):
            name = "tensorboard"
        if name in ONLY_IN:
            allowed = any(relative.match(pattern) for pattern in ONLY_IN[name])
            assert allowed, f"{path}:{line}: {name} is imported in {ONLY_IN[name] or 'no file'} only"


def test_importing_masktrain_is_light() -> None:
    heavy = (
        "torch triton numpy nvidia flash_attn xformers apex wandb matplotlib tensorboard soundfile".split()
    )
    code = f"import sys, masktrain, masktrain.cli; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
