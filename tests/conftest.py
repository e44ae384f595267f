# SPDX-License-Identifier: Apache-2.0
"""Where the golden data and the real audio are, and which slow tests run.

A slow test names what it covers: `@pytest.mark.slow(covers=["masktrain/training", ...])`. `--slow changed` runs those
whose covered sources differ from the ones that tests/slow_record.json says they last passed with; `--slow all` runs
all and writes the record anew.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import interpreter
import pytest
import torch

# A shell that starts the tests in the background has them ignore Ctrl-C, and so every process that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Triton decides when a kernel's module is imported whether to interpret it: before anything imports triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    interpreter.patch()

REPO = Path(__file__).resolve().parent.parent
RECORD = REPO / "tests" / "slow_record.json"


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Outputs of the original projects' code, one folder each."""
    root = Path(os.environ.get("MASKTRAIN_GOLDEN_DIR", REPO.parent / "shared" / "golden"))
    if not root.is_dir():
        pytest.skip(f"no golden data at {root}; set MASKTRAIN_GOLDEN_DIR")
    return root


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """ESC-10 and FSDD: real audio with esc10.csv and fsdd.csv."""
    root = Path(os.environ.get("MASKTRAIN_DATA_DIR", REPO.parent / "shared" / "data"))
    if not (root / "esc10.csv").is_file():
        pytest.skip(f"no real audio at {root}; set MASKTRAIN_DATA_DIR")
    return root


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow",
        choices=("none", "changed", "all"),
        default="none",
        help="slow tests to run: none, those whose sources changed since they last passed, or all (and record it)",
    )


def _sources_digest(item: pytest.Item) -> str:
    marker = item.get_closest_marker("slow")
    assert marker is not None
    files = {Path(item.path)}
    for covered in marker.kwargs["covers"]:
        path = REPO / covered
        assert path.exists(), f"{item.nodeid}: covers {covered}, which does not exist"
        files |= (
            {path}
            if path.is_file()
            else {p for p in path.rglob("*") if p.suffix in (".py", ".cpp", ".h", ".cu")}
        )
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(str(path.relative_to(REPO)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mode = config.getoption("--slow")
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for item in items:
        if item.get_closest_marker("slow") is None:
            continue
        digest = _sources_digest(item)
        item.user_properties.append(("sources", digest))
        if mode == "none":
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow changed or --slow all"))
        elif mode == "changed" and record.get(item.nodeid, {}).get("sources") == digest:
            item.add_marker(
                pytest.mark.skip(reason="slow: passed with these sources, see tests/slow_record.json")
            )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    if report.when == "call" and report.passed and item.config.getoption("--slow") != "none":
        sources = dict(item.user_properties).get("sources")
        if sources:
            record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
            seconds = round(time.time() - call.start, 1)
            record[item.nodeid] = {"sources": sources, "passed": date.today().isoformat(), "seconds": seconds}
            RECORD.write_text(json.dumps(dict(sorted(record.items())), indent=1) + "\n")
    return report
