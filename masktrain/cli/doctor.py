# SPDX-License-Identifier: Apache-2.0
"""`masktrain doctor`: what this machine offers, which implementation of each op serves here and why, what is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from masktrain.cli.options import parse, write_json


@dataclass(frozen=True)
class Options:
    """Say which kernels, attention and data path serve here, and what is missing."""

    verify: bool = False
    """Run each implementation against its reference: results, gradients and times; exit status 1 if one is wrong."""
    json: Path | None = None
    """Also write the report there."""


# package -> (distribution, what it is for, what serves without it)
OPTIONAL = {
    "nvidia.dali": ("nvidia-dali-cuda130", "decoding audio", "soundfile decodes"),
    "triton": ("triton", "fused GPU kernels", "the reference and native forms of each op"),
    "flash_attn": (
        "flash-attn",
        "attention on a GPU; no op uses it yet",
        "torch's own variable-length attention",
    ),
    "xformers": (
        "xformers",
        "attention on older GPUs; no op uses it yet",
        "torch's memory-efficient attention",
    ),
    "amp_C": ("NVIDIA apex, from source", "fused optimisers; nothing uses it yet", "torch's fused AdamW"),
}


# of the recipes that the kernels are verified at
SIZES = ("base", "tiny")


def main(arguments: list[str]) -> int:
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
    report: dict[str, Any] = {
        "machine": machine,
        "packages": packages,
        "ops": ops,
        "loader": loader,
        "not_supported": missing,
    }
    wrong = 0
    if options.verify:
        report["verify"], wrong = _verify(console)
    write_json(options.json, report)
    return 1 if wrong else 0


def _verify(console: Console) -> tuple[dict[str, Any], int]:
    """Verify every kernel, print what was found, and return it with the number of wrong ones."""
    from masktrain.recipes import find
    from masktrain.training.distributed import pick_device
    from masktrain.training.measure import Ceilings, Stopwatch
    from masktrain.training.op_cases import REPRESENTATIVES, representative_ops
    from masktrain.training.verify import UNAVAILABLE, WRONG, Verdict, table_of_absent, verify

    watch = Stopwatch(pick_device("auto"))
    ceilings = Ceilings(watch)
    found = [find(name, size) for size in SIZES for name in REPRESENTATIVES]
    recipes = [(recipe, representative_ops(recipe)) for recipe in found]
    verdicts: list[Verdict] = []
    with console.status("verifying") as status:
        for verdict in verify(recipes, watch.device, clock=(watch, ceilings)):
            if not verdicts or verdict.op != verdicts[-1].op:
                status.update(f"verifying {verdict.op}: {verdict.case}")
            verdicts.append(verdict)
    ran = [v for v in verdicts if v.status != UNAVAILABLE]
    wrong = [v for v in ran if v.status == WRONG]
    rows = [
        {
            "op": v.op,
            "implementation": v.implementation,
            "dtype": v.dtype,
            "case": v.case,
            "verdict": v.status,
            "error ratio": _number(v.error_ratio),
            "ms": _number(v.ms),
            "backward ms": _number(v.backward_ms),
            "MB moved": _number(v.moved and v.moved / 1e6),
            "share": "-" if v.share is None else f"{v.share:.1%} of {v.bound}",
        }
        for v in ran
    ]
    _print_rows(console, f"verification on {watch.device}: each implementation against its reference", rows)
    absent = [{"op": op, "implementation": name, "why": why} for op, name, why in table_of_absent(verdicts)]
    if absent:
        _print_rows(console, "implementations that cannot run here", absent)
    print(
        f"Copy: {ceilings.copy / 1e9:.1f} GB/s, read and written together. Shares are of this, or of a matrix product."
    )
    for v in wrong:
        print(f"WRONG: {v.op}, {v.implementation}, {v.dtype}, {v.case}: {v.detail}")
    checked = len(ran) - sum(v.implementation == "reference" and v.error_ratio is None for v in ran)
    print(f"{checked} results checked, {len(wrong)} wrong.")
    return {
        "copy_bytes_per_s": ceilings.copy,
        "wrong": len(wrong),
        "rows": [asdict(v) for v in verdicts],
    }, len(wrong)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


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

    from masktrain.kernels import _cuda_native, _native

    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "native library": _native.describe(),
        "CUDA library": _cuda_native.describe(),
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
        "V100 (sm_70)": "by construction only: fp16, padded attention through torch; not measured",
        "MP3 with DALI": "DALI decodes no MP3: soundfile does, and the log counts it",
    }
