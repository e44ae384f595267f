# SPDX-License-Identifier: Apache-2.0
"""Commands run within the test's own process: an import of torch for all of them, and no exception gets lost."""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import runs

from masktrain.cli import _main

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run `masktrain ARGUMENTS` here. An exception that is not a clean exit comes out as it is."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = _main([str(a) for a in arguments])
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Return `call`."""
    return call


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 40 short clips."""
    return runs.make_clips(tmp_path_factory.mktemp("good") / "clips")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Return a function that mounts a small file system: mounted("ro"), mounted("size=1m")."""
    places: list[Path] = []

    def mount(options: str, name: str = "mounted") -> Path:
        place = tmp_path / name
        place.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("no file system can be mounted here")
        places.append(place)
        return place

    yield mount
    for place in reversed(places):
        subprocess.run(["umount", "-l", str(place)], check=False)
