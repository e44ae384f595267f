# SPDX-License-Identifier: Apache-2.0
"""How fast are the native CPU kernels beside plain PyTorch, and beside what the published code does?

    python benchmarks/cpu_kernels.py [--only OP ...] [--rounds 7] [--threads 1 2] [--out benchmarks/results/cpu/kernels.jsonl]

Every provider of an op runs in every round, in turn, so that a busy machine is busy for all of them. A row is one
provider at one size: median, 20th and 80th percentile of the rounds in milliseconds. Where a provider is an
implementation of ours, its result is compared with the reference first.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from masktrain.frontend.presets import preset
from masktrain.kernels import _native
from masktrain.kernels.block_marks import block_marks
from masktrain.kernels.log_mel import log_mel
from masktrain.kernels.log_mel.filters import mel_filters
from masktrain.kernels.mask_gather import mask_gather
from masktrain.kernels.mask_scatter import mask_scatter
from masktrain.kernels.masked_patch_loss import masked_patch_loss
from masktrain.kernels.patch_mad import patch_mad
from masktrain.kernels.resample import resample, resampled_length
from masktrain.kernels.resample.reference import Plan, weight_matrix
from masktrain.kernels.select_tokens import select_tokens
from masktrain.training.run_dir import cpu_model

SECONDS = 0.05
"""Least time of one measurement: shorter calls are repeated."""

OURS = ("native", "reference")


@dataclass(frozen=True)
class Case:
    """One op at one size: what each provider runs; `work`: what is done per call, by unit, for the rates."""

    op: str
    size: dict[str, Any]
    providers: dict[str, Callable[[], Any]]
    work: dict[str, float]
    tolerance: float | None = 0.0
    """Of native against reference; 0: the same bits."""


def ours(function: Callable[[str], Any]) -> dict[str, Callable[[], Any]]:
    """Return our two implementations as providers."""
    return {name: partial(function, name) for name in OURS}


def log_mel_cases() -> Iterator[Case]:
    for name in ("audiomae", "m2d", "passt"):
        yield log_mel_case(name, clips=4, seconds=10)


def log_mel_case(name: str, clips: int, seconds: int) -> Case:
    spec = preset(name).mel
    lengths = (seconds * spec.sample_rate,) * clips
    x = 0.1 * torch.randn(sum(lengths), generator=torch.Generator().manual_seed(0))
    filters = mel_filters(spec).float()
    window = torch.hann_window(spec.win_length, periodic=False)
    centre = spec.framing == "centre"

    def stft() -> Tensor:
        """Without removal of means and pre-emphasis, in float32: less work, and less accurate."""
        spectrum = torch.stft(
            x.view(clips, -1),
            spec.n_fft,
            spec.hop,
            spec.win_length,
            window,
            center=centre,
            return_complex=True,
        )
        return (filters @ spectrum.abs().square()).clamp_min(spec.eps).log()

    return Case(
        "log_mel",
        {"preset": name, "clips": clips, "seconds": seconds},
        ours(lambda i: log_mel(x, lengths, spec, implementation=i)[0]) | {"torch.stft, mel, log": stft},
        {"clips": clips},
        1e-4,
    )


def resample_cases() -> Iterator[Case]:
    for rate, target in ((44_100, 16_000), (48_000, 16_000), (8_000, 16_000), (44_100, 32_000)):
        yield resample_case(rate, target, seconds=5)


def resample_case(rate: int, target: int, seconds: int) -> Case:
    """float64 results of float32 samples, as the front end asks for them. The baseline is one strided convolution with
    all phases of the same filter: what published resamplers in PyTorch do."""
    lengths = (rate * seconds,)
    x = 0.1 * torch.randn(rate * seconds, generator=torch.Generator().manual_seed(0))
    whole = Plan.make(rate, target)
    one_period = replace(whole, advance=whole.down, outputs=whole.up, blocks=1, width=whole.up)
    weights = weight_matrix(one_period, 0).T[:, None].contiguous()
    count, reach = resampled_length(rate * seconds, rate, target), one_period.reach

    def convolution() -> Tensor:
        padded = torch.nn.functional.pad(x.double(), (reach, one_period.span + whole.down))
        phases = torch.nn.functional.conv1d(padded[None, None], weights, stride=whole.down)
        return phases[0].T.reshape(-1)[:count]

    return Case(
        "resample",
        {"rate": rate, "target": target, "seconds": seconds},
        ours(lambda i: resample(x, lengths, (rate,), target, dtype=torch.float64, implementation=i)[0])
        | {"conv1d over phases": convolution},
        {"seconds": seconds},
        1e-13,
    )


def spectrograms(clips: int, frames: int) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    columns, freq = frames // 16, 8
    return {
        "frames": torch.randn(clips * frames, 128, generator=g),
        "cu_frames": torch.arange(clips + 1) * frames,
        "cu_tokens": torch.arange(clips + 1, dtype=torch.int32) * (columns * freq),
        "mean": torch.tensor([-4.2]),
        "scale": torch.tensor([0.11]),
        "freq": freq,
        "patch_freq": 16,
        "patch_time": 16,
    }


def some_tokens(total: int, share: float) -> Tensor:
    order = torch.randperm(total, generator=torch.Generator().manual_seed(2))
    return order[: int(total * share)].sort().values.to(torch.int32)


def mask_gather_cases() -> Iterator[Case]:
    for clips, share, order in (
        (64, 0.2, "time"),
        (64, 0.8, "time"),
        (64, 0.8, "freq"),
        (256, 0.5, "time"),
        (256, 0.5, "freq"),
    ):
        yield mask_gather_case(clips, share, order)


def mask_gather_case(clips: int, share: float, order: str) -> Case:
    data = spectrograms(clips, 1024)
    index = some_tokens(clips * 512, share)
    axes = (0, 1, 3, 2, 4) if order == "time" else (0, 3, 1, 4, 2)
    flat = torch.randn(len(index), 256)
    target = torch.empty_like(flat)

    def eager() -> Tensor:
        patches = data["frames"].view(clips, 64, 16, 8, 16)
        return ((patches + 4.2) * 0.11).permute(axes).reshape(-1, 256).index_select(0, index)

    return Case(
        "mask_gather",
        {"clips": clips, "frames": 1024, "bins": 128, "share": share, "order": order},
        ours(lambda i: mask_gather(**data, index=index, order=order, implementation=i))
        | {
            "patchify, index_select": eager,
            "copy of the output": lambda: target.copy_(flat),
            "copy into new memory": flat.clone,
        },
        {"GB": 2 * 4 * flat.numel() / 1e9},
    )


def loss_cases() -> Iterator[Case]:
    for normalise in (False, True):
        yield loss_case(normalise)


def loss_case(normalise: bool) -> Case:
    clips, frames = 32, 1024
    data = spectrograms(clips, frames)
    masked = some_tokens(clips * 512, 496 / 512)
    pred = torch.randn(len(masked), 256).requires_grad_()

    def both_passes(implementation: str) -> Tensor:
        loss = masked_patch_loss(
            pred, **data, masked=masked, order="time", norm_pix_loss=normalise, implementation=implementation
        )
        return torch.autograd.grad(loss, pred)[0]

    def eager() -> Tensor:
        patches = (data["frames"].view(clips, 64, 16, 8, 16) + 4.2) * 0.11
        target = patches.transpose(2, 3).reshape(-1, 256).index_select(0, masked)
        if normalise:
            variance, mean = torch.var_mean(target, dim=1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        return torch.autograd.grad((pred - target).square().sum(), pred)[0]

    return Case(
        "masked_patch_loss",
        {"clips": clips, "tokens": len(masked), "values": 256, "norm_pix_loss": normalise, "pass": "both"},
        ours(both_passes) | {"patchify, index_select, mse": eager},
        {"GB": 4 * 5 * pred.numel() / 1e9},
        1e-4,
    )


def mad_cases() -> Iterator[Case]:
    for order in ("time", "freq"):
        yield mad_case(order)


def mad_case(order: str) -> Case:
    clips = 64
    data = spectrograms(clips, 1024)
    axes = (0, 1, 3, 2, 4) if order == "time" else (0, 3, 1, 4, 2)

    def eager() -> Tensor:
        patches = ((data["frames"].view(clips, 64, 16, 8, 16) + 4.2) * 0.11).permute(axes).reshape(-1, 256)
        return (patches - patches.mean(1, keepdim=True)).abs().mean(1)

    return Case(
        "patch_mad",
        {"clips": clips, "frames": 1024, "bins": 128, "order": order},
        ours(lambda i: patch_mad(**data, n_tokens=(512,) * clips, order=order, implementation=i))
        | {"patchify, mean, abs, mean": eager},
        {"GB": 4 * data["frames"].numel() / 1e9},
    )


def mask_scatter_cases() -> Iterator[Case]:
    for clips, width in ((1, 128), (8, 192), (64, 768)):
        yield mask_scatter_case(clips, width)


def mask_scatter_case(clips: int, width: int) -> Case:
    """Both passes."""
    total = clips * 512
    visible = some_tokens(total, 0.25)
    hidden = torch.ones(total, dtype=torch.bool)
    hidden[visible.long()] = False
    masked = hidden.nonzero()[:, 0].to(torch.int32)
    x = torch.randn(len(visible), width).requires_grad_()
    token = torch.randn(width).requires_grad_()
    restore = torch.cat([visible, masked]).argsort()
    direction, into = torch.randn(total, width), torch.empty(total, width)

    def gradients(out: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(out, (x, token), direction)])

    return Case(
        "mask_scatter",
        {"clips": clips, "tokens": 512, "width": width, "share": 0.25, "pass": "both"},
        ours(lambda i: gradients(mask_scatter(x, token, visible, masked, implementation=i)))
        | {
            "cat, index_select": lambda: gradients(
                torch.cat([x, token.expand(len(masked), -1)]).index_select(0, restore)
            ),
            "copy of the output": lambda: into.copy_(direction),
            "copy into new memory": direction.clone,
        },
        {"GB": 4 * 4 * direction.numel() / 1e9},
        1e-3,
    )


def selection_cases() -> Iterator[Case]:
    for clips in (64, 512):
        for with_classes in (False, True):
            yield selection_case(clips, with_classes)
        yield weighted_case(clips)


def selection_case(clips: int, with_classes: bool) -> Case:
    n, visible = 512, 128
    cu = torch.arange(clips + 1, dtype=torch.int32) * n
    arguments = (cu, (n,) * clips, (visible,) * clips, torch.tensor([1, 2]), torch.arange(clips))
    classes = torch.randint(0, 2, (clips * n,), dtype=torch.uint8) if with_classes else None
    weights = torch.rand(clips, n)

    def argsort() -> tuple[Tensor, Tensor]:
        noise = torch.rand(clips, n)
        if classes is not None:
            noise = noise + classes.view(clips, n)
        order = noise.argsort(dim=1)
        return order[:, :visible], order[:, visible:]

    return Case(
        "select_tokens",
        {"clips": clips, "tokens": n, "visible": visible, "classes": with_classes},
        ours(lambda i: torch.cat(select_tokens(*arguments, classes=classes, implementation=i)))
        | {"rand, argsort": argsort, "multinomial": lambda: torch.multinomial(weights, visible)},
        {"clips": clips},
    )


def weighted_case(clips: int) -> Case:
    n, visible = 512, 128
    cu = torch.arange(clips + 1, dtype=torch.int32) * n
    arguments = (cu, (n,) * clips, (visible,) * clips, torch.tensor([1, 2]), torch.arange(clips))
    scores = torch.rand(clips, n, generator=torch.Generator().manual_seed(3))
    return Case(
        "select_tokens",
        {"clips": clips, "tokens": n, "visible": visible, "scores": True},
        ours(lambda i: torch.cat(select_tokens(*arguments, scores=scores.view(-1), implementation=i)))
        | {"multinomial": lambda: torch.multinomial(scores, n - visible)},
        {"clips": clips},
    )


def loop_of_blocks(clips: int, columns: int, rows: int, wanted: int) -> list[set[int]]:
    """Blocks of side 3 to 5 at random starts until more than `wanted` cells are marked: a loop per clip, a set per
    clip, and the first `wanted` of it as a tensor, as the published code is built."""
    result = []
    for _ in range(clips):
        side = random.choice((3, 4, 5))
        marked: set[int] = set()
        while len(marked) <= wanted:
            start = random.randrange(columns * rows)
            for i in range(side):
                for j in range(side):
                    cell = start + rows * i + j
                    if cell < columns * rows:
                        marked.add(cell)
        result.append(torch.tensor(list(marked)[:wanted]))
    return torch.stack(result)


def block_cases() -> Iterator[Case]:
    for share in (0.25, 0.75):
        for growth in ("wrap", "clipped"):
            for clips in (64, 512):
                yield block_case(clips, share, growth)


def block_case(clips: int, share: float, growth: str) -> Case:
    columns, rows = 64, 8
    n = columns * rows
    wanted = int(n * share)
    cu = torch.arange(clips + 1, dtype=torch.int32) * n
    arguments = (cu, (n,) * clips, (wanted,) * clips, torch.tensor([1, 2]), torch.arange(clips))
    return Case(
        "block_marks",
        {"clips": clips, "tokens": n, "share": share, "growth": growth},
        ours(lambda i: block_marks(*arguments, freq=rows, order="time", growth=growth, implementation=i))
        | {"loops over blocks": lambda: loop_of_blocks(clips, columns, rows, wanted)},
        {"clips": clips},
    )


CASES = {
    "resample": resample_cases,
    "log_mel": log_mel_cases,
    "mask_gather": mask_gather_cases,
    "patch_mad": mad_cases,
    "mask_scatter": mask_scatter_cases,
    "masked_patch_loss": loss_cases,
    "select_tokens": selection_cases,
    "block_marks": block_cases,
}


def agree(case: Case) -> None:
    """Assert that the native result is that of the reference."""
    if case.tolerance is None:
        return
    native, reference = (case.providers[name]() for name in OURS)
    if case.tolerance == 0:
        assert torch.equal(native, reference), f"{case.op} {case.size}: native differs from the reference"
    else:
        assert (native - reference).abs().max() <= case.tolerance, f"{case.op} {case.size}: native differs"


def seconds_of(function: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def measure(case: Case, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of a call of each provider in each round."""
    calls = {}
    for name, function in case.providers.items():
        function()
        calls[name] = max(1, round(SECONDS / seconds_of(function, 1)))
    times: dict[str, list[float]] = {name: [] for name in case.providers}
    for _ in range(rounds):
        for name, function in case.providers.items():
            times[name].append(seconds_of(function, calls[name]))
    return times


def rows_of(case: Case, rounds: int, threads: int) -> Iterator[dict[str, Any]]:
    load = os.getloadavg()[0]
    times = measure(case, rounds)
    for name, seconds in times.items():
        middle, fifths = median(seconds), quantiles(seconds, n=5, method="inclusive")
        row = {
            "op": case.op,
            "provider": name,
            "size": case.size,
            "threads": threads,
            "median_ms": round(1e3 * middle, 4),
            "p20_ms": round(1e3 * fifths[0], 4),
            "p80_ms": round(1e3 * fifths[-1], 4),
            "rounds": rounds,
        }
        row |= {f"{unit}/s": round(amount / middle, 2) for unit, amount in case.work.items()}
        yield row | {
            "machine": cpu_model(),
            "cores": os.cpu_count(),
            "load_before": round(load, 2),
            "instruction_set": _native.LEVELS[_native.require().mt_cpu_level()],
            "torch": torch.__version__,
            "date": date.today().isoformat(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), help="ops to measure")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each provider, at least 5")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, help="file of JSON lines to append to")
    arguments = parser.parse_args()
    if arguments.rounds < 5:
        parser.error("--rounds must be at least 5")
    for op in arguments.only:
        for case in CASES[op]():
            agree(case)
            for threads in arguments.threads:
                torch.set_num_threads(threads)
                for row in rows_of(case, arguments.rounds, threads):
                    rates = " ".join(f"{row[f'{unit}/s']:>9g} {unit}/s" for unit in case.work)
                    size = " ".join(f"{k}={v}" for k, v in case.size.items())
                    print(
                        f"{op:18} {row['provider']:28} {threads} {row['median_ms']:>9.3f} ms {rates}  {size}",
                        flush=True,
                    )
                    if arguments.out:
                        arguments.out.parent.mkdir(parents=True, exist_ok=True)
                        with arguments.out.open("a") as file:
                            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
