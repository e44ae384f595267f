# SPDX-License-Identifier: Apache-2.0
"""The ops of a training step at the sizes of a recipe: arguments, implementations, and what the work must cost.

Clips are of unequal length, as in real data; tokens, masks, widths, heads, patches and front end are the recipe's.
Costs are the least possible: every input byte is read once, every output byte written once, nothing is computed twice.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import masktrain.kernels.block_marks.op as block_marks
import masktrain.kernels.dropout.op as dropout
import masktrain.kernels.log_mel.op as log_mel
import masktrain.kernels.mask_gather.op as mask_gather
import masktrain.kernels.mask_scatter.op as mask_scatter
import masktrain.kernels.masked_patch_loss.op as masked_patch_loss
import masktrain.kernels.ncut_scores.op as ncut_scores
import masktrain.kernels.patch_info_nce.op as patch_info_nce
import masktrain.kernels.patch_mad.op as patch_mad
import masktrain.kernels.philox.op as philox
import masktrain.kernels.resample.op as resample
import masktrain.kernels.select_tokens.op as select_tokens
import masktrain.kernels.varlen_attention.op as varlen_attention
import masktrain.kernels.window_attention.op as window_attention
from masktrain.kernels._dispatch import ENV, Implementation
from masktrain.kernels.philox import Purpose
from masktrain.masking.inverse_block import InverseBlockMasking
from masktrain.masking.strategies import ChunkMasking
from masktrain.masking.view import View
from masktrain.models.mae import MaeConfig
from masktrain.models.ssast import LEADING, SsastConfig
from masktrain.models.window_decoder import WINDOW, Windows, window_columns, window_rows
from masktrain.objectives.joint import JointConfig
from masktrain.training.recipe import Recipe
from masktrain.types import MaskPlan, Spectrogram, StepKey, TokenGrid, cumulative

# op -> the module with its public function, and the name of its table of implementations there
OPS: dict[str, tuple[ModuleType, str]] = {
    "philox_words": (philox, "IMPLEMENTATIONS"),
    "select_tokens": (select_tokens, "IMPLEMENTATIONS"),
    "block_marks": (block_marks, "IMPLEMENTATIONS"),
    "mask_gather": (mask_gather, "IMPLEMENTATIONS"),
    "patch_mad": (patch_mad, "IMPLEMENTATIONS"),
    "ncut_scores": (ncut_scores, "IMPLEMENTATIONS"),
    "mask_scatter": (mask_scatter, "IMPLEMENTATIONS"),
    "masked_patch_loss": (masked_patch_loss, "IMPLEMENTATIONS"),
    "patch_info_nce": (patch_info_nce, "IMPLEMENTATIONS"),
    "dropout": (dropout, "DROPOUT"),
    "attention_keep_padded": (dropout, "ATTENTION_KEEP_PADDED"),
    "varlen_attention": (varlen_attention, "IMPLEMENTATIONS"),
    "window_attention": (window_attention, "IMPLEMENTATIONS"),
    "resample": (resample, "IMPLEMENTATIONS"),
    "log_mel": (log_mel, "IMPLEMENTATIONS"),
}
ALL = tuple(OPS)
REPRESENTATIVES: dict[str, tuple[str, ...]] = {
    "mae_ast_frame": ALL,
    "mae_ast_patch": ("select_tokens", "block_marks", "mask_gather", "patch_mad", "masked_patch_loss"),
    "maskspec": (
        "mask_gather",
        "patch_mad",
        "mask_scatter",
        "masked_patch_loss",
        "varlen_attention",
        "resample",
        "log_mel",
    ),
    "audiomae": ("log_mel", "window_attention"),
    "msm_mae": (
        "log_mel",
        "mask_gather",
        "patch_mad",
        "mask_scatter",
        "masked_patch_loss",
        "varlen_attention",
    ),
    "ssast_patch": ("patch_info_nce", "varlen_attention"),
    "ssast_frame": ("mask_gather", "patch_mad", "masked_patch_loss"),
}
"""Recipes whose ops are verified and timed, each with the ops that have a form or a shape there that no recipe above
has: order of the tokens, patch, width of a head, front end, axis of a softmax."""
SEED = 20221
# Shares of the recipe's clip length that the clips of a case have, in turn.
LENGTHS = (1.0, 0.37, 0.83, 0.05, 0.61, 1.0, 0.94)


def implementations(op: str) -> tuple[Implementation, ...]:
    """Return the implementations of `op`, best first, as they are now."""
    module, table = OPS[op]
    found: tuple[Implementation, ...] = getattr(module, table)
    return found


@contextmanager
def forced(implementation: str) -> Iterator[None]:
    """Let every op that has it, also inside of other ops, take this implementation."""
    before = os.environ.get(ENV)
    os.environ[ENV] = implementation
    try:
        yield
    finally:
        if before is None:
            del os.environ[ENV]
        else:
            os.environ[ENV] = before


@dataclass(frozen=True)
class Cost:
    """moved: bytes that have to be read and written. done: operations of the matrix products."""

    moved: int
    done: int = 0


@dataclass(frozen=True)
class Case:
    """One op with arguments.

    call(*inputs, implementation=NAME) answers the output tensors; inputs are what may be drawn in another dtype and
    differentiated (those that require a gradient). exact: the output is made of integers alone, and every
    implementation has to give it bit for bit. dtype: of the floating point inputs. backward: its cost, None where
    nothing is differentiated. variant: options of the op that the sizes do not tell. packing: of attention, the
    cumulative lengths and the lengths.
    """

    op: str
    what: str
    call: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    dtype: torch.dtype
    sizes: dict[str, int]
    forward: Cost
    backward: Cost | None = None
    exact: bool = False
    variant: str = ""
    packing: tuple[Tensor, tuple[int, ...]] | None = None

    @property
    def name(self) -> str:
        """The recipe, its clips, and the variant of the op."""
        return f"{self.what}, {self.variant}" if self.variant else self.what

    @property
    def signature(self) -> tuple[object, ...]:
        """What is equal in cases that are the same work."""
        return (self.op, self.variant, self.dtype, *self.sizes.items())


def lengths_of(frames: int, clips: int, patch_time: int) -> tuple[int, ...]:
    """Return the frames of `clips` clips of at most `frames` frames, each of at least one patch."""
    return tuple(max(patch_time, int(frames * LENGTHS[i % len(LENGTHS)])) for i in range(clips))


class Problem:
    """A batch of a recipe on a device: spectrogram, mask plan, and the key of its randomness."""

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        clips: int,
        frames: int | None = None,
        *,
        uniform: bool = False,
    ) -> None:
        """frames: of the longest clip, by default as many as the recipe's clip length gives."""
        self.recipe, self.device, self.grid = recipe, device, recipe.grid
        longest = frames or recipe.frontend.frames_for(
            self.samples(recipe.frontend.sample_rate), recipe.frontend.sample_rate
        )
        self.lengths = (longest,) * clips if uniform else lengths_of(longest, clips, self.grid.patch_time)
        self.key = StepKey.make(SEED, 7, device)
        generator = torch.Generator().manual_seed(SEED)
        self.noise = partial(_noise, generator, device)
        ids = torch.randint(0, 1 << 31, (clips,), generator=generator).to(device)
        frames_ = self.noise((sum(self.lengths), recipe.frontend.n_mels), torch.float32) - 5
        self.spectrogram = Spectrogram(
            frames_, self.lengths, cumulative(self.lengths, torch.int64, device), ids
        )
        self.layout = self.grid.layout(self.spectrogram)
        self.mean = torch.full((1,), -5.0, device=device)
        self.scale = torch.full((1,), 0.5, device=device)
        self.view = View(1.0, self.spectrogram, self.mean, self.scale)
        self.plan = self.reference_plan()

    def reference_plan(self, draw: int = 0) -> MaskPlan:
        """Return a plan by the references on the CPU: a kernel that is wrong must not lead others out of bounds."""
        on_cpu = replace(
            self.spectrogram,
            frames=self.spectrogram.frames.cpu(),
            cu_frames=self.spectrogram.cu_frames.cpu(),
            clip_ids=self.spectrogram.clip_ids.cpu(),
        )
        with forced("reference"):
            view = View(1.0, on_cpu, self.mean.cpu(), self.scale.cpu())
            key = StepKey.make(SEED, 7, "cpu")
            plan = self.recipe.masking.plan(self.grid.layout(on_cpu), key, draw, view)
        tensors = {
            name: getattr(plan, name).to(self.device)
            for name in ("visible", "masked", "cu_visible", "cu_masked")
        }
        return replace(plan, layout=self.layout, **tensors)

    def samples(self, rate: int) -> int:
        """Samples of a clip of the recipe's length at `rate`."""
        return round((self.recipe.data.clip_seconds or 10.0) * rate)


def _noise(
    generator: torch.Generator,
    device: torch.device,
    shape: Sequence[int],
    dtype: torch.dtype,
    grad: bool = False,
) -> Tensor:
    drawn = torch.randn(tuple(shape), generator=generator)
    return drawn.to(device, dtype).requires_grad_(grad)


def ops_of(recipe: Recipe) -> tuple[str, ...]:
    """Return the ops that `cases` has for a recipe, in the order of OPS."""
    absent = set()
    if not isinstance(recipe.masking, ChunkMasking):
        absent.add("block_marks")
    if not isinstance(recipe.objective, JointConfig):
        absent.add("patch_info_nce")
    if isinstance(recipe.model, SsastConfig):
        absent.add("mask_scatter")
    if not _has_windows(recipe):
        absent.add("window_attention")
    if not _rate(recipe, "dropout"):
        absent.add("dropout")
    if not _rate(recipe, "attention_dropout"):
        absent.add("attention_keep_padded")
    return tuple(op for op in OPS if op not in absent)


def representative_ops(recipe: Recipe) -> tuple[str, ...]:
    """Return the ops that a recipe stands for; none if it is no representative."""
    return tuple(op for op in ops_of(recipe) if op in REPRESENTATIVES.get(recipe.name, ()))


def _has_windows(recipe: Recipe) -> bool:
    return getattr(recipe.model, "decoder", None) == "window"


def _rate(recipe: Recipe, name: str) -> float:
    """A rate of the recipe's model, 0 where it has no such dropout."""
    return float(getattr(recipe.model, name, 0.0))


def cases(problem: Problem, dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """Yield the cases of every op of a step of the recipe, float32 first."""
    what = f"{problem.recipe.name} {problem.recipe.size}, {len(problem.lengths)} clips"
    for make in (_random, _weights, _frontend):
        yield from make(problem, what)
    for dtype in dtypes:
        for make_in in (_guide, _patches, _rows, _attention):
            yield from make_in(problem, what, dtype)


def _order(grid: TokenGrid) -> str:
    return "time outer" if grid.order == "time" else "frequency outer"


def _tuple(function: Callable[..., Any], first_only: bool = False) -> Callable[..., tuple[Tensor, ...]]:
    def call(*inputs: Tensor, **options: Any) -> tuple[Tensor, ...]:
        found = function(*inputs, **options)
        if isinstance(found, Tensor):
            return (found,)
        return (found[0],) if first_only else tuple(found)

    return call


def _random(problem: Problem, what: str) -> Iterator[Case]:
    """What draws: integers, the same bits everywhere."""
    layout, key, clips = problem.layout, problem.key, len(problem.lengths)
    tokens, n_visible = layout.lengths, problem.plan.n_visible
    total, longest = sum(tokens), max(tokens)
    sizes = {"clips": clips, "tokens": total}
    common: dict[str, Any] = {"dtype": torch.int64, "exact": True}

    words = partial(philox.philox_words, n=longest, purpose=Purpose.MASK)
    yield Case(
        "philox_words", what, _tuple(lambda c, i, **o: words(c, i, **o)), (key.counter, layout.clip_ids),
        sizes={"clips": clips, "words": longest}, forward=Cost(clips * longest * 8), **common,
    )  # fmt: skip

    def select(
        cu: Tensor, counter: Tensor, ids: Tensor, classes: Tensor | None = None, **options: Any
    ) -> Any:
        return select_tokens.select_tokens(cu, tokens, n_visible, counter, ids, classes=classes, **options)

    place = (layout.cu_tokens, key.counter, layout.clip_ids)
    yield Case("select_tokens", what, _tuple(select), place, sizes=sizes, forward=Cost(4 * total), **common)
    masking = problem.recipe.masking
    if not isinstance(masking, ChunkMasking):
        return

    def mark(cu: Tensor, counter: Tensor, ids: Tensor, **options: Any) -> Tensor:
        n_marked = tuple(n - v for n, v in zip(tokens, n_visible, strict=True))
        return block_marks.block_marks(
            cu, tokens, n_marked, counter, ids, freq=problem.grid.freq, order=problem.grid.order,
            sides=masking.sides, growth=masking.growth, truncation=masking.truncation,
            spare_first=masking.spare_first, **options,
        )  # fmt: skip

    yield Case("block_marks", what, _tuple(mark), place, sizes=sizes, forward=Cost(total), **common)

    def inverse(cu: Tensor, counter: Tensor, ids: Tensor, **options: Any) -> Tensor:
        masking = InverseBlockMasking()
        return block_marks.block_marks(
            cu, tokens, None, counter, ids, freq=problem.grid.freq, order=problem.grid.order, growth="clamped",
            sides=(masking.side,), blocks=tuple(masking.blocks(n) for n in tokens), **options,
        )  # fmt: skip

    yield Case(
        "block_marks", what, _tuple(inverse), place, sizes=sizes, forward=Cost(total), variant="clamped",
        **common,
    )  # fmt: skip
    with forced("reference"):
        marks = mark(*(x.cpu() for x in place)).to(problem.device)
    yield Case(
        "select_tokens", what, _tuple(select), (*place, marks), sizes=sizes, forward=Cost(5 * total),
        variant="with classes", **common,
    )  # fmt: skip


def _weights(problem: Problem, what: str) -> Iterator[Case]:
    """What masks by the content of patches: exact, given the spectrogram or the scores."""
    layout, key, grid = problem.layout, problem.key, problem.grid
    tokens, n_visible, total = layout.lengths, problem.plan.n_visible, sum(layout.lengths)
    frames, sizes = problem.spectrogram.frames, {"clips": len(problem.lengths), "tokens": total}

    def weigh(
        frames: Tensor, cu_frames: Tensor, cu: Tensor, mean: Tensor, scale: Tensor, **options: Any
    ) -> Any:
        return patch_mad.patch_mad(
            frames, cu_frames, cu, tokens, mean=mean, scale=scale, freq=grid.freq, patch_freq=grid.patch_freq,
            patch_time=grid.patch_time, order=grid.order, **options,
        )  # fmt: skip

    data = (frames, layout.cu_frames, layout.cu_tokens, problem.mean, problem.scale)
    yield Case(
        "patch_mad", what, _tuple(weigh), data, torch.float32, sizes | {"values": grid.patch_values},
        Cost(total * (4 * grid.patch_values + 4)), exact=True, variant=_order(grid),
    )  # fmt: skip

    def select(cu: Tensor, counter: Tensor, ids: Tensor, scores: Tensor, **options: Any) -> Any:
        return select_tokens.select_tokens(cu, tokens, n_visible, counter, ids, scores=scores, **options)

    scores = problem.noise((total,), torch.float32).square()
    yield Case(
        "select_tokens", what, _tuple(select), (layout.cu_tokens, key.counter, layout.clip_ids, scores), torch.int64,
        sizes, Cost(8 * total), exact=True, variant="with scores",
    )  # fmt: skip


def _guide(problem: Problem, what: str, dtype: torch.dtype) -> Iterator[Case]:
    """What masks by the encoder's features."""
    layout, tokens = problem.layout, problem.layout.lengths
    total, width = sum(tokens), int(problem.recipe.model.embed_dim)
    # A third of the tokens are of another kind, which no rounding puts on the wrong side.
    kind = torch.arange(total, device=problem.device).remainder(3) == 0
    features = problem.noise((total, width), torch.float32) + 2 * kind[:, None]
    products = sum(2 * n * min(n, width) * width for n in tokens)

    def score(features: Tensor, cu: Tensor, **options: Any) -> Tensor:
        return ncut_scores.ncut_scores(features, cu, tokens, **options)

    yield Case(
        "ncut_scores", what, _tuple(score), (features.to(dtype), layout.cu_tokens), dtype,
        {"clips": len(tokens), "tokens": total, "width": width},
        Cost(total * (width * dtype.itemsize + 4), products),
    )  # fmt: skip


def _frontend(problem: Problem, what: str) -> Iterator[Case]:
    """Waveform to log-mel; a few clips, since every clip is the same work."""
    mel = problem.recipe.frontend.mel
    clips = min(4, len(problem.lengths))
    for op, rate in (("resample", 44100), ("log_mel", mel.sample_rate)):
        full = (
            problem.samples(rate)
            * max(problem.lengths)
            // problem.recipe.frontend.frames_for(problem.samples(rate), rate)
        )
        lengths = tuple(max(rate // 10, int(full * LENGTHS[i])) for i in range(clips))
        wave = (0.1 * problem.noise((sum(lengths),), torch.float32)).clamp(-1, 1)
        if op == "resample":
            function = partial(_resample, lengths=lengths, rate=rate, target=mel.sample_rate)
            written = sum(-(-n * mel.sample_rate // rate) for n in lengths)
        else:
            function = partial(_log_mel, lengths=lengths, spec=mel)
            written = sum(mel.frames(n) for n in lengths) * mel.n_mels
        yield Case(
            op, what, _tuple(function, first_only=True), (wave,), torch.float32,
            {"clips": clips, "samples": sum(lengths), "rate": rate}, Cost(4 * (sum(lengths) + written)),
            variant=f"to {mel.sample_rate} Hz" if op == "resample" else problem.recipe.frontend.preset,
        )  # fmt: skip


def _resample(wave: Tensor, *, lengths: tuple[int, ...], rate: int, target: int, **options: Any) -> Any:
    return resample.resample(wave, lengths, (rate,) * len(lengths), target, **options)


def _log_mel(wave: Tensor, *, lengths: tuple[int, ...], spec: Any, **options: Any) -> Any:
    return log_mel.log_mel(wave, lengths, spec, **options)


def _patches(problem: Problem, what: str, dtype: torch.dtype) -> Iterator[Case]:
    """What reads patches of the spectrogram, and the losses."""
    grid, plan, layout, size = problem.grid, problem.plan, problem.layout, dtype.itemsize
    values, frames = grid.patch_values, problem.spectrogram.frames
    n_visible, n_masked = len(plan.visible), len(plan.masked)
    patches: dict[str, Any] = {
        "freq": grid.freq, "patch_freq": grid.patch_freq, "patch_time": grid.patch_time, "order": grid.order,
    }  # fmt: skip

    def gather(frames: Tensor, mean: Tensor, scale: Tensor, **options: Any) -> Tensor:
        wanted = torch.float64 if frames.dtype == torch.float64 else dtype
        return mask_gather.mask_gather(
            frames, layout.cu_frames, layout.cu_tokens, plan.visible, mean=mean, scale=scale, dtype=wanted,
            **patches, **options,
        )  # fmt: skip

    data = (frames, problem.mean, problem.scale)
    yield Case(
        "mask_gather", what, _tuple(gather), data, dtype, {"tokens": n_visible, "values": values},
        Cost(n_visible * values * (4 + size)), variant=_order(grid),
    )  # fmt: skip

    pred = problem.noise((n_masked, values), dtype, True)
    sizes = {"tokens": n_masked, "values": values}
    for norm in (False, True):

        def loss(
            pred: Tensor, frames: Tensor, mean: Tensor, scale: Tensor, norm: bool = norm, **options: Any
        ) -> Tensor:
            return masked_patch_loss.masked_patch_loss(
                pred, frames, layout.cu_frames, layout.cu_tokens, plan.masked, mean=mean, scale=scale,
                norm_pix_loss=norm, **patches, **options,
            )  # fmt: skip

        yield Case(
            "masked_patch_loss", what, _tuple(loss), (pred, *data), dtype, sizes,
            Cost(n_masked * values * (4 + size)), Cost(n_masked * values * (4 + 2 * size)),
            variant=_order(grid) + (", target standardised" if norm else ""),
        )  # fmt: skip

    objective = problem.recipe.objective
    if not isinstance(objective, JointConfig):
        return
    # float32 targets and products of about the size that they have in training
    target = 0.3 * problem.noise((n_masked, values), torch.float32)
    predicted = (0.3 * problem.noise((n_masked, values), torch.float32)).to(dtype).requires_grad_()
    square = sum(n * n for n in plan.n_masked)

    def contrast(pred: Tensor, target: Tensor, **options: Any) -> Tensor:
        return patch_info_nce.patch_info_nce(
            pred, target, plan.cu_masked, plan.n_masked, axis=objective.info_nce_axis, **options
        )

    moved = n_masked * values
    yield Case(
        "patch_info_nce", what, _tuple(contrast), (predicted, target), dtype, sizes,
        Cost(moved * (4 + size), 2 * values * square), Cost(moved * (4 + 2 * size), 2 * values * square),
        variant=f"softmax over {objective.info_nce_axis}",
    )  # fmt: skip


def _rows(problem: Problem, what: str, dtype: torch.dtype) -> Iterator[Case]:
    """What is done to rows of the decoder's width."""
    model, plan, size = problem.recipe.model, problem.plan, dtype.itemsize
    if isinstance(model, SsastConfig):
        return
    width, n_visible, total = model.decoder_embed_dim, len(plan.visible), sum(problem.layout.lengths)
    x = problem.noise((n_visible, width), dtype, True)
    token = problem.noise((width,), torch.float32, True)

    def scatter(x: Tensor, token: Tensor, **options: Any) -> Tensor:
        return mask_scatter.mask_scatter(x, token, plan.visible, plan.masked, **options)

    moved = (n_visible + total) * width * size
    yield Case(
        "mask_scatter",
        what,
        _tuple(scatter),
        (x, token),
        dtype,
        {"rows": total, "width": width},
        Cost(moved),
        Cost(moved),
    )

    rate = _rate(problem.recipe, "dropout")
    if not rate:
        return
    lengths = torch.tensor(problem.layout.lengths, device=problem.device)
    ids = problem.layout.clip_ids.repeat_interleave(lengths, output_size=total)
    starts = problem.layout.cu_tokens[:-1].long().repeat_interleave(lengths, output_size=total)
    positions = torch.arange(total, device=problem.device) - starts
    rows = problem.noise((total, width), dtype, True)

    def drop(x: Tensor, **options: Any) -> Tensor:
        return dropout.dropout(x, rate, problem.key.counter, ids, positions, site=4105, **options)

    moved = 2 * total * width * size
    yield Case(
        "dropout",
        what,
        _tuple(drop),
        (rows,),
        dtype,
        {"rows": total, "width": width},
        Cost(moved),
        Cost(moved),
    )


def _attention(problem: Problem, what: str, dtype: torch.dtype) -> Iterator[Case]:
    """Attention of every stack, without dropout of its weights and with that of the recipe."""
    model, plan, layout, key = problem.recipe.model, problem.plan, problem.layout, problem.key
    rate = _rate(problem.recipe, "attention_dropout")
    if dtype == torch.float32 and rate:

        def keep(zero: Tensor, **options: Any) -> Tensor:
            return dropout.attention_keep_padded(
                plan.n_visible,
                model.heads,
                rate,
                key.counter,
                layout.clip_ids,
                site=24,
                dtype=zero.dtype,
                **options,
            )

        cells = len(plan.n_visible) * model.heads * max(plan.n_visible) ** 2
        yield Case(
            "attention_keep_padded", what, _tuple(keep), (torch.zeros((), device=problem.device),), dtype,
            {"clips": len(plan.n_visible), "heads": model.heads, "longest": max(plan.n_visible)}, Cost(4 * cells),
        )  # fmt: skip
    if isinstance(model, SsastConfig):
        extra = LEADING
        stacks = {"encoder": (layout.lengths, model.heads, model.embed_dim)}
    else:
        extra = int(getattr(model, "cls_token", False))
        stacks = {
            "encoder": (plan.n_visible, model.heads, model.embed_dim),
            "decoder": (layout.lengths, model.decoder_heads, model.decoder_embed_dim),
        }
    if _has_windows(problem.recipe):
        del stacks["decoder"]
        yield from _windows(problem, what, dtype)
    for stack, (tokens, heads, width) in stacks.items():
        lengths = tuple(n + extra for n in tokens)
        cu = cumulative(lengths, torch.int32, problem.device)
        shape = (sum(lengths), heads, width // heads)
        q, k, v = (problem.noise(shape, dtype, True) for _ in range(3))
        square = sum(n * n for n in lengths)
        for p in (0.0, rate) if rate else (0.0,):
            function = partial(_attend, cu=cu, lengths=lengths, p=p, key=key, clip_ids=layout.clip_ids)
            sizes = {"rows": shape[0], "longest": max(lengths), "heads": heads, "width": shape[2]}
            moved, done = q.numel() * q.element_size(), 4 * width * square
            yield Case(
                "varlen_attention", what, _tuple(function), (q, k, v), dtype, sizes, Cost(4 * moved, done),
                Cost(8 * moved, 2 * done), variant=f"{stack}, dropout {p:g}", packing=(cu, lengths),
            )  # fmt: skip


def _windows(problem: Problem, what: str, dtype: torch.dtype) -> Iterator[Case]:
    """Attention of the window decoder, of plain and of shifted windows."""
    model, layout = problem.recipe.model, problem.layout
    assert isinstance(model, MaeConfig)
    heads, width, height = model.decoder_heads, model.decoder_embed_dim, window_rows(problem.grid)
    qkv = problem.noise((sum(layout.lengths), 3, heads, width // heads), dtype, True)
    tau = torch.full((heads,), 0.5, device=problem.device, requires_grad=True)
    bias = problem.noise((heads, WINDOW * height, WINDOW * height), torch.float32, True)
    for shifted in (False, True):
        cu = Windows(layout).cu_rows(shifted)
        columns = [n for c in layout.columns for n in window_columns(c, shifted)]
        done = 4 * width * (problem.grid.freq // height) * sum((n * height) ** 2 for n in columns)
        moved = qkv.numel() * qkv.element_size() // 3
        attend = partial(window_attention.window_attention, cu=cu)
        yield Case(
            "window_attention", what, _tuple(attend), (qkv, tau, bias), dtype,
            {"rows": len(qkv), "windows": len(cu) - 1, "heads": heads, "width": width // heads},
            Cost(4 * moved, done), Cost(7 * moved, 2 * done), variant="shifted" if shifted else "plain",
        )  # fmt: skip


def _attend(
    q: Tensor, k: Tensor, v: Tensor, *, cu: Tensor, lengths: tuple[int, ...], p: float, key: StepKey, clip_ids: Tensor,
    **options: Any,
) -> Tensor:  # fmt: skip
    return varlen_attention.varlen_attention(
        q, k, v, cu, lengths, dropout_p=p, counter=key.counter, clip_ids=clip_ids, site=16, **options
    )
