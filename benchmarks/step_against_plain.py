# SPDX-License-Identifier: Apache-2.0
"""How fast is a training step beside a plain PyTorch transcription of the same method, on the CPU?

    python benchmarks/step_against_plain.py [--only CASE ...] [--rounds 7] [--threads 2]
                                            [--out benchmarks/results/cpu/steps.jsonl]

The plain step (benchmarks/plain) embeds all patches, shuffles and gathers, keeps attention weights and logits as
tensors and takes every row through every layer, eagerly. Both sides have the same weights, clips, masks, float32,
threads, dropout and optimiser (torch's fused one), and start with equal losses without dropout: this is checked
in each run. A step is zero_grad, forward, loss, backward, update. Ours also normalises its input and draws its masks
within the step; the plain one is given both ready. Layerdrop is off on both sides.

A row is one case: milliseconds of both sides over interleaved rounds, the ratio plain / ours of each round, and of
- peak_mib: of a process that does two steps of one side, above what it had before it built the model. Weights,
  gradients and moments are in it. Large tensors are mapped one by one there, so that what is freed is given back.
- saved_mib: what autograd keeps between forward and backward, weights apart.
- gflop: operations of the matrix products of one step on one clip as torch's counter sees them, losses included,
  with our attention in its explicit form; analytic: by our formula, without the losses.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from benchmarks.plain.pair import Ours, Plain, Side  # noqa: E402
from masktrain.recipes import find  # noqa: E402
from masktrain.training.bench import provenance  # noqa: E402
from masktrain.training.op_cases import forced  # noqa: E402
from masktrain.training.recipe import Recipe  # noqa: E402

RECIPES = (
    "maskspec",
    "msm_mae",
    "audiomae",
    "ssast_patch",
    "ssast_frame",
    "mae_ast_patch",
    "mae_ast_frame",
)
CLIPS = {"base": 4, "tiny": 32}
SSAST_TINY_CLIPS = 8
"""All tokens of two passes are as many rows as 32 clips of the others have, and plain attention keeps squares."""
TOLERANCE = 1e-5
"""Of the losses, relative."""
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """One recipe in one size; one_pass: of SSAST, one pass of ours against the published two."""

    recipe: str
    size: str
    one_pass: bool = False

    @property
    def name(self) -> str:
        """What --only takes."""
        return f"{self.recipe}-{self.size}" + ("-one-pass" if self.one_pass else "")

    @property
    def clips(self) -> int:
        """Clips of a step."""
        few = self.size == "tiny" and self.recipe.startswith("ssast")
        return SSAST_TINY_CLIPS if few else CLIPS[self.size]

    def resolved(self) -> Recipe:
        """Return the recipe as it is measured."""
        recipe = find(self.recipe, self.size)
        changes: dict[str, Any] = (
            {"encoder_layerdrop": 0.0} if hasattr(recipe.model, "encoder_layerdrop") else {}
        )
        if self.one_pass:
            changes["passes"] = 1
        return replace(recipe, model=replace(recipe.model, **changes))

    def ours(self, clips: int) -> Ours:
        """Return our side, on clips of the published length in full columns."""
        recipe = self.resolved()
        assert recipe.data.target_length is not None
        grid = recipe.grid
        return Ours(recipe, clips, grid.patch_time * (recipe.data.target_length // grid.patch_time))

    def plain(self, ours: Ours) -> Plain:
        """Return the plain side."""
        return Plain(ours, second_mask=self.one_pass)


CASES = {
    case.name: case
    for size in CLIPS
    for recipe in RECIPES
    for case in (Case(recipe, size), *([Case(recipe, size, True)] if recipe.startswith("ssast") else []))
}


def check_losses(case: Case, ours: Ours) -> tuple[float, float]:
    """Return both losses without dropout and under the same masks. Raises AssertionError if they differ."""
    with torch.no_grad():
        both = ours.loss(dropout=False).item(), Plain(ours).loss(dropout=False).item()
    assert abs(both[0] - both[1]) <= TOLERANCE * abs(both[1]), f"{case.name}: the losses are {both}"
    return both


def seconds_of(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def race(sides: tuple[Side, Side], rounds: int) -> tuple[list[float], list[float]]:
    """Return the seconds of a step of each side in each round; who begins changes."""
    for side in sides:
        side.step()
    times: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds):
        for j in (0, 1) if i % 2 == 0 else (1, 0):
            times[j].append(seconds_of(sides[j].step))
    return times


def saved_bytes(side: Side) -> int:
    """Return the bytes that autograd keeps for backward, weights and input apart."""
    own = {p.untyped_storage().data_ptr() for p in side.model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # or its address would be used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        side.loss()
    return sum(kept.values())


def flops(case: Case) -> dict[str, int]:
    """Return the operations of a step on one clip: of both sides as counted, and by our formula."""
    ours = case.ours(1)
    plain = case.plain(ours)
    counts = {}
    for name, side in (("ours", ours), ("plain", plain)):
        with FlopCounterMode(display=False) as counter, forced("reference"):
            # dropout is no matrix product, and its reference is slow
            side.loss(dropout=False).backward()
        counts[name] = counter.get_total_flops()
    return counts | {"analytic": ours.flops()}


def resident(field: str) -> int:
    """Return the bytes that this process has in memory: VmRSS now, VmHWM at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak(case: Case, which: str) -> int:
    """Return the bytes that two steps of one side need at most, the model included. For a process of its own."""
    x = torch.randn(512, 512, requires_grad=True)
    (x @ x).relu().sum().backward()  # loads what any model loads
    before = resident("VmRSS")
    ours = case.ours(case.clips)
    side: Side = ours
    if which == "plain":
        side = case.plain(ours)
        del ours
    for _ in range(2):
        side.step()
    return resident("VmHWM") - before


def peak_elsewhere(case: Case, which: str, threads: int) -> int:
    """Return `peak` of a fresh process."""
    command = [sys.executable, __file__, "--only", case.name, "--peak", which, "--threads", str(threads)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def spread(values: list[float], factor: float = 1.0) -> dict[str, float]:
    """Return median, p20 and p80."""
    fifths = quantiles(values, n=5, method="inclusive")
    found = {"median": median(values), "p20": fifths[0], "p80": fifths[-1]}
    return {name: round(factor * value, 4) for name, value in found.items()}


def measure(case: Case, rounds: int, threads: int) -> dict[str, Any]:
    """Return the row of a case."""
    load = os.getloadavg()[0]
    ours = case.ours(case.clips)
    losses = check_losses(case, ours)
    plain = case.plain(ours)
    plans = ours.plans()
    saved = {"ours": saved_bytes(ours), "plain": saved_bytes(plain)}
    times = race((ours, plain), rounds)
    lengths = ours.spectrogram.lengths
    del ours, plain
    count = flops(case)
    peaks = {which: peak_elsewhere(case, which, threads) for which in ("ours", "plain")}
    return {
        "case": case.name, "recipe": case.recipe, "size": case.size, "passes": "1 against 2" if case.one_pass else "same",
        "clips": case.clips, "frames": lengths[0], "tokens": plans[0].layout.lengths[0], "visible": plans[0].n_visible[0],
        "ours_ms": spread(times[0], 1e3), "plain_ms": spread(times[1], 1e3),
        "ratio": spread([b / a for a, b in zip(*times, strict=True)]), "rounds": rounds,
        "loss_ours": losses[0], "loss_plain": losses[1],
        "peak_mib": {which: round(value / MIB, 1) for which, value in peaks.items()},
        "peak_ratio": round(peaks["plain"] / peaks["ours"], 3),
        "saved_mib": {which: round(value / MIB, 1) for which, value in saved.items()},
        "saved_ratio": round(saved["plain"] / saved["ours"], 3),
        "gflop": {which: round(value / 1e9, 3) for which, value in count.items()},
        "flop_ratio": round(count["plain"] / count["ours"], 3),
        "executed_over_analytic": round(count["ours"] / count["analytic"], 4),
        **provenance(torch.device("cpu")),
        "threads": threads, "load": [round(load, 2), round(os.getloadavg()[0], 2)],
    }  # fmt: skip


def main() -> None:
    """Measure the cases."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES)
    )
    parser.add_argument("--rounds", type=int, default=7, help="steps of each side, at least 5")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, help="file of JSON lines to append to")
    # what a process of its own does: see peak_elsewhere
    parser.add_argument("--peak", choices=("ours", "plain"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        case = CASES[arguments.only[0]]
        print(peak(case, arguments.peak))
        return
    if arguments.rounds < 5:
        parser.error("--rounds must be at least 5")
    for name in arguments.only:
        row = measure(CASES[name], arguments.rounds, arguments.threads)
        ratio = row["ratio"]
        print(
            f"{name:28} {row['ours_ms']['median']:9.1f} ms, plain {row['plain_ms']['median']:9.1f} ms: "
            f"{ratio['median']:.2f}x ({ratio['p20']:.2f} to {ratio['p80']:.2f}), peak {row['peak_ratio']:.2f}x, "
            f"saved {row['saved_ratio']:.2f}x, FLOP {row['flop_ratio']:.2f}x, executed/analytic "
            f"{row['executed_over_analytic']:.4f}, load {row['load']}",
            flush=True,
        )
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
