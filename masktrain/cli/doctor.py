# SPDX-License-Identifier: Apache-2.0
"""`masktrain doctor`: what this machine offers, which implementation of each op serves here and why, what is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from masktrain.cli.options import parse, write_json


@dataclass(frozen=True)
class Options:
    """Say which kernels, attention and data path serve here, and what is missing."""

    json: Path | None = None
    """Also write the report there."""


# package -> (distribution, what it is for, what serves without it)
OPTIONAL = {
    "nvidia.dali": ("nvidia-dali-cuda130", "decoding audio", "soundfile decodes"),
    "triton": ("triton", "fused GPU kernels", "the reference and native forms of each op"),
    "flash_attn": ("flash-attn", "attention on a GPU", "torch's own variable-length attention"),
    "xformers": ("xformers", "attention on older GPUs", "torch's memory-efficient attention"),
    "amp_C": ("NVIDIA apex, from source", "fused optimisers", "torch's fused AdamW"),
}


def main(arguments: list[str]) -> None:
    """Run `masktrain doctor`."""
    options = parse(Options, "doctor", arguments)
    machine, packages, ops, loader, missing = _machine(), _packages(), _ops(), _loader(), _not_supported()
    # a pipe has no width: print whole sentences there
    console = Console() if sys.stdout.isatty() else Console(width=200)
    _print_pairs(console, "machine", machine)
    _print_rows(console, "optional packages", packages)
    _print_rows(console, "ops", ops)
    _print_pairs(console, "data path", loader)
    _print_pairs(console, "not supported or not measured", missing)
    write_json(
        options.json,
        {"machine": machine, "packages": packages, "ops": ops, "loader": loader, "not_supported": missing},
    )


def _print_pairs(console: Console, title: str, pairs: dict[str, str]) -> None:
    table = Table("what", "found", title=title, title_justify="left", box=None, show_header=False)
    for name, value in pairs.items():
        table.add_row(name, str(value))
    console.print(table)
    console.print()


def _print_rows(console: Console, title: str, rows: list[dict[str, str]]) -> None:
    table = Table(*rows[0], title=title, title_justify="left", box=None)
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    console.print()


def _machine() -> dict[str, str]:
    import torch

    from masktrain.kernels import _native

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "native library": _native.describe(),
        "nvcc": shutil.which("nvcc") or "not found: nothing here needs it",
    }
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            found[f"cuda:{index}"] = (
                f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory >> 30} GiB"
            )
    else:
        built = torch.version.cuda
        found["cuda"] = (
            "no device: this torch is built for the CPU only"
            if built is None
            else f"no device: torch is built for CUDA {built} and finds no usable GPU or driver"
        )
    return found


def _packages() -> list[dict[str, str]]:
    rows = []
    for module, (distribution, purpose, instead) in OPTIONAL.items():
        try:
            present = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # the parent package is absent
            present = False
        try:
            status = version(distribution) if present else "missing"
        except PackageNotFoundError:
            status = "present"
        rows.append(
            {"package": distribution, "status": status, "for": purpose, "instead": "" if present else instead}
        )
    return rows


def _ops() -> list[dict[str, str]]:
    from masktrain.training.distributed import pick_device
    from masktrain.training.kernel_choices import kernel_choices

    return [
        {
            "op": c.op,
            "serves": c.name,
            "passed over": "; ".join(f"{n}: {why}" for n, why in c.passed_over) or "-",
        }
        for c in kernel_choices(pick_device("auto"))
    ]


def _loader() -> dict[str, str]:
    from masktrain.data.loader import choose_loader

    name, reason = choose_loader("auto")
    return {name: reason}


def _not_supported() -> dict[str, Any]:
    return {
        "GPU speed and memory": "not measured: nothing of this release has run on a GPU yet",
        "V100 (sm_70)": "by construction only: fp16, torch's memory-efficient attention; not measured",
        "MP3 with DALI": "DALI decodes no MP3: soundfile does, and the log counts it",
    }
