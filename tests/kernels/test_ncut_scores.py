# SPDX-License-Identifier: Apache-2.0
"""ncut_scores against dense generalised eigenvectors in float64, on features of real audio and on graded ones, against
the published partitions and masks, and on what has no sides."""

from __future__ import annotations

import csv
from dataclasses import replace
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import masktrain
from torch import Tensor

from masktrain.evaluation.encoder import load_encoder
from masktrain.frontend.frontend import Frontend
from masktrain.kernels import _native
from masktrain.kernels._dispatch import KernelUnavailable
from masktrain.kernels._testing import poisoned_memory
from masktrain.kernels.ncut_scores import ncut_foreground, ncut_scores, reference
from masktrain.kernels.ncut_scores.reference import LEAD
from masktrain.masking.plan import unmasked
from masktrain.models import registry
from masktrain.recipes import find
from masktrain.types import AudioBatch, cumulative

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WAYS = [{"implementation": "reference", "gram": gram} for gram in ("explicit", "implicit")]
if DEVICE == "cpu" and _native.cpu() is not None:
    WAYS.append({"implementation": "native", "gram": "auto"})
CLIPS = 6
RATIO = 0.75


def solve(features: Tensor, n_tokens: tuple[int, ...], **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Scores and foreground."""
    cu = cumulative(n_tokens, torch.int32, DEVICE)
    scores = ncut_scores(features.to(DEVICE), cu, n_tokens, **options)
    del options["rule"]
    sides = ncut_foreground(features.to(DEVICE), cu, n_tokens, **options)
    assert scores.dtype == (
        torch.float64 if features.dtype == torch.float64 else torch.float32
    ) and scores.shape == sides.shape == (sum(n_tokens),)
    return scores.cpu().numpy(), sides.cpu().numpy()


def paper(features: Tensor, n_tokens: tuple[int, ...], **options: Any) -> tuple[np.ndarray, np.ndarray]:
    return solve(features, n_tokens, rule="paper", **options)


def unit(features: Tensor) -> np.ndarray:
    x = features.double().numpy()
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def dense(features: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vector and foreground of one clip by the definition, and 1 - eigenvalues, the largest first."""
    x = unit(features)
    affinity = 1 + x @ x.T
    degree = np.diag(affinity.sum(1))
    values, vectors = scipy.linalg.eigh(degree - affinity, degree, subset_by_index=[0, min(2, len(x) - 1)])
    y = vectors[:, 1]
    side = y > y.mean()
    return y, side if side[np.abs(y).argmax()] else ~side, 1 - values


def lead_of(y: np.ndarray) -> float:
    """By how much the largest |entry| of one side exceeds that of the other."""
    high, low = np.abs(y[y > y.mean()]).max(), np.abs(y[y <= y.mean()]).max()
    return float(abs(high - low) / max(high, low))


def similarity(features: Tensor, side: np.ndarray) -> np.ndarray:
    x = unit(features)
    centroid = x[side].mean(0)
    return (1 + x @ (centroid / np.linalg.norm(centroid))) / 2


def masked(scores: np.ndarray, ratio: float = RATIO) -> np.ndarray:
    n = len(scores)
    chosen = np.zeros(n, bool)
    chosen[np.argsort(-scores, kind="stable")[: n - int(n * (1 - ratio))]] = True
    return chosen


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum())


def rayleigh(features: Tensor, side: np.ndarray) -> float:
    """The normalised cut of a partition: the smaller, the better."""
    x = unit(features)
    affinity = 1 + x @ x.T
    between = affinity[side][:, ~side].sum()
    return float(between / affinity[side].sum() + between / affinity[~side].sum())


def check_clip(features: Tensor, scores: np.ndarray, side: np.ndarray, *, what: str) -> None:
    """One clip against the dense solution of the same features."""
    y, wanted, values = dense(features)
    if (values[1] - values[2]) / values[1] < 0.02:
        assert rayleigh(features, side) <= rayleigh(features, wanted) * 1.01, what
        return
    if lead_of(y) < 2 * LEAD:
        # either side, but one of them
        wanted = wanted if (side == wanted).mean() > 0.5 else ~wanted
    assert (side == wanted).mean() >= 0.98, what
    assert jaccard(masked(scores), masked(similarity(features, wanted))) >= 0.97, what


def check_batch(features: Tensor, n_tokens: tuple[int, ...], *, what: str, **options: Any) -> None:
    scores, side = paper(features, n_tokens, **options)
    assert ((scores >= 0) & (scores <= 1)).all()
    for i, (start, n) in enumerate(zip(accumulate((0, *n_tokens)), n_tokens, strict=False)):
        clip = slice(start, start + n)
        check_clip(features[clip], scores[clip], side[clip], what=f"{what}, clip {i}")


@cache
def audio(data_dir: Path, seconds: float) -> AudioBatch:
    """Clips of ESC-10 behind each other, so that each lasts `seconds`, and no two begin alike."""
    with open(data_dir / "esc10.csv", newline="") as file:
        paths = [row["path"] for row in csv.DictReader(file)][:: 400 // CLIPS]
    read = [soundfile.read(data_dir / path, dtype="float32") for path in paths[:CLIPS]]
    rate = read[0][1]
    n = int(seconds * rate)
    joined = [np.concatenate([read[(i + k) % CLIPS][0] for k in range(3)])[:n] for i in range(CLIPS)]
    ids = torch.arange(CLIPS)
    samples = torch.from_numpy(np.concatenate(joined))
    return AudioBatch(samples, (n,) * CLIPS, (rate,) * CLIPS, ids, torch.zeros_like(ids))


def features_of(recipe: Any, model: Any, data_dir: Path, columns: int) -> tuple[Tensor, tuple[int, ...]]:
    """The last layer's output for clips of so many patch columns, as training sees them."""
    frames = columns * recipe.grid.patch_time
    seconds = (frames + 4) / recipe.frontend.frame_rate + 0.1
    spectrogram = Frontend(recipe.frontend)(audio(data_dir, seconds))
    lengths = (frames,) * CLIPS
    cropped = torch.cat([spectrogram.clip(i)[:frames] for i in range(CLIPS)])
    spectrogram = replace(
        spectrogram, frames=cropped, lengths=lengths, cu_frames=cumulative(lengths, torch.int64, "cpu")
    )
    layout = recipe.grid.layout(spectrogram)
    mean, scale = cropped.mean().view(1), 0.5 / cropped.std().view(1)
    last = model.encoder.config.layers
    with torch.no_grad():
        found = model.eval().encoded(spectrogram, unmasked(layout), mean, scale, {last})
    return found[last].tokens, layout.lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "columns"), [("msm_mae", 38), ("audiomae", 64)])
def test_untrained_encoder_on_real_audio(data_dir: Path, name: str, columns: int, dtype: torch.dtype) -> None:
    recipe = find(name, "tiny")
    torch.manual_seed(0)
    model = registry.build(recipe.model, recipe.grid, recipe.input_norm)
    features, n_tokens = features_of(recipe, model, data_dir, columns)
    assert n_tokens == ((190,) if name == "msm_mae" else (512,)) * CLIPS
    for way in WAYS:
        check_batch(features.to(dtype), n_tokens, **way, what=f"{name} {dtype} {way}")


@pytest.mark.slow(covers=["kernels/ncut_scores", "csrc/cpu/ncut_scores.cpp"])
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("name", "columns"), [("msm_mae", 38), ("audiomae", 64)])
def test_trained_encoder_on_real_audio(tmp_path: Path, data_dir: Path, name: str, columns: int) -> None:
    run = tmp_path / "run"
    options = ("--size", "tiny", "--device", "cpu", "--steps", 300, "--train.pictures", 0, "--out", run)
    done = masktrain(
        "run", "--recipe", name, "--data", data_dir / "esc10.csv", *map(str, options), timeout=1000
    )
    assert done.returncode == 0, done.stderr
    encoder = load_encoder(run, "cpu")
    features, n_tokens = features_of(encoder.recipe, encoder.model, data_dir, columns)
    for dtype in (torch.float32, torch.bfloat16):
        for way in WAYS:
            check_batch(features.to(dtype), n_tokens, **way, what=f"{name} {dtype} {way}")


def graded(n: int, width: int, ratio: float, seed: int, offset: float = 1.0) -> Tensor:
    """Features around one direction, off which the squared singular values fall by `ratio` from one to the next."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rank = min(n, width) - 1
    left, right = (torch.linalg.qr(normal(size, rank)).Q for size in (n, width))
    sizes = ratio ** (torch.arange(rank) / 2)
    direction = torch.nn.functional.normalize(normal(width), dim=0)
    return ((left * sizes) @ right.T * n**0.5 + offset * direction).float()


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(way.values()))
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0])
def test_graded_gaps(ratio: float, way: dict[str, str]) -> None:
    features = torch.cat([graded(190, 96, ratio, seed, offset) for seed in range(2) for offset in (1, 30)])
    check_batch(features, (190,) * 4, **way, what=f"{ratio} {way}")


def test_nearly_equal_features_keep_their_cut() -> None:
    """Cosines of 1 - 1e-7: their own matrix holds nothing but rounding in float32."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0)
    other = torch.randn(64, generator=generator)
    other = torch.nn.functional.normalize(other - (other @ direction) * direction, dim=0)
    group = torch.arange(120) % 5 == 0
    noise = 3e-6 * torch.randn(120, 64, generator=generator)
    features = direction + 5e-4 * group[:, None] * other + noise
    for way in WAYS:
        _, side = paper(features, (120,), **way)
        assert (side == group.numpy()).all()


@settings(max_examples=12, deadline=None)
@given(
    n_tokens=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    width=st.integers(1, 24),
    kind=st.sampled_from(["noise", "equal", "zero", "rank 1", "some zero", "not finite", "huge", "tiny"]),
    seed=st.integers(0, 2**16),
)
@pytest.mark.parametrize("bipartition", ["ncut", "pca", "unnormalised"])
@pytest.mark.parametrize("rule", ["paper", "s1_code"])
def test_any_input_has_scores_in_range(
    rule: str, bipartition: str, n_tokens: list[int], width: int, kind: str, seed: int
) -> None:
    """Finite, and the foreground of a clip is never empty."""
    generator = torch.Generator().manual_seed(seed)
    n, lengths = sum(n_tokens), tuple(n_tokens)
    features = torch.randn(n, width, generator=generator)
    if kind == "equal":
        features = features[:1].expand(n, width)
    elif kind == "zero":
        features = torch.zeros(n, width)
    elif kind == "rank 1":
        features = features[:, :1] * torch.randn(width, generator=generator)
    elif kind in ("huge", "tiny"):
        features = features * (1e30 if kind == "huge" else 1e-30)
    else:
        strange = {"some zero": (0.0,), "not finite": (torch.nan, torch.inf, -torch.inf)}.get(kind, ())
        for i, value in enumerate(strange):
            features[i::5] = value
    for way in WAYS[1:] if bipartition != "unnormalised" else WAYS[:1]:
        with poisoned_memory():
            scores, side = solve(features, lengths, rule=rule, bipartition=bipartition, **way)
        assert ((scores >= 0) & (scores <= 1)).all()
        for start, count in zip(accumulate((0, *lengths)), lengths, strict=False):
            clip = slice(start, start + count)
            assert not count or side[clip].any()
            if count and (kind in ("equal", "zero") or count == 1):
                assert np.ptp(scores[clip]) <= 1e-6
                assert bipartition == "unnormalised" or side[clip].all()


def test_two_tokens_and_symmetric_clips_do_not_depend_on_rounding() -> None:
    """Sides of the same largest entry: the smaller one is the foreground, or that without the first token."""
    two = torch.tensor([[1.0, 0.2], [0.1, 1.0]])
    assert paper(two, (2,))[1].tolist() == paper(two.flip(0), (2,))[1].tolist() == [False, True]
    generator = torch.Generator().manual_seed(3)
    half = torch.randn(40, 6, generator=generator)
    # the reflection exchanges the two halves
    mirrored = torch.cat(
        [
            half + torch.tensor([4.0] + [0.0] * 5),
            half * torch.tensor([-1.0] + [1.0] * 5) - torch.tensor([4.0] + [0.0] * 5),
        ]
    )
    wanted = None
    for scale in (1.0, 0.3, 7.0, 1 / 3):
        for way in WAYS:
            for dtype in (torch.float32, torch.float64):
                if dtype == torch.float64 and way["implementation"] == "native":
                    continue
                side = paper((mirrored.double() * scale).to(dtype), (80,), **way)[1]
                wanted = side if wanted is None else wanted
                assert (side == wanted).all()
    assert wanted is not None and not wanted[0]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(way.values()))
def test_a_clip_does_not_depend_on_its_neighbours(way: dict[str, str]) -> None:
    """On the CPU to the bit; elsewhere clips share batched products, and agree to rounding."""
    lengths = (57, 190, 1, 120, 2, 0, 190, 33)
    features = torch.cat([graded(max(n, 3), 48, 0.7, n)[:n] for n in lengths])
    together = paper(features, lengths, **way)
    for start, n in zip(accumulate((0, *lengths)), lengths, strict=False):
        alone = paper(features[start : start + n], (n,), **way)
        if DEVICE == "cpu":
            assert (alone[0] == together[0][start : start + n]).all()
        np.testing.assert_allclose(alone[0], together[0][start : start + n], atol=1e-5)
        assert (alone[1] == together[1][start : start + n]).all()


def test_ragged_clips_in_one_batched_product() -> None:
    """The form that GPUs take, also here: clips filled up to the longest."""
    lengths = (57, 190, 1, 120, 2, 0, 33)
    features = torch.cat([graded(max(n, 3), 48, 0.7, n)[:n] for n in lengths])
    for gram in ("explicit", "implicit"):
        for bipartition in ("ncut", "pca", "unnormalised"):
            options = {"gram": gram, "bipartition": bipartition, "rule": "s1_code"}
            wanted = solve(features, lengths, implementation="reference", **options)
            cu = cumulative(lengths, torch.int32, "cpu")
            found = reference.solve_batch(features, cu, lengths, **options)
            np.testing.assert_allclose(found[0].numpy(), wanted[0], atol=1e-5)
            assert (found[1].numpy() == wanted[1]).all()


@pytest.mark.parametrize("rule", ["paper", "s1_code"])
@pytest.mark.parametrize("bipartition", ["ncut", "pca"])
def test_both_products_and_dtypes_agree(rule: str, bipartition: str) -> None:
    lengths = (150, 70)
    features = torch.cat([graded(n, 40, 0.6, n) for n in lengths])
    options = {"rule": rule, "bipartition": bipartition}
    truth, sides = solve(features.double(), lengths, **options)
    for way in WAYS:
        scores, found = solve(features, lengths, **way, **options)
        np.testing.assert_allclose(scores, truth, atol=1e-5)
        assert (found == sides).all()


def test_autocast_and_length_of_rows_change_nothing() -> None:
    features = graded(100, 32, 0.6, 1)
    wanted = paper(features, (100,))[0]
    with torch.autocast(DEVICE, torch.bfloat16):
        np.testing.assert_array_equal(paper(features, (100,))[0], wanted)
    rows = 2.0 ** torch.arange(100).remainder(9).sub(4)
    np.testing.assert_allclose(paper(features * rows[:, None], (100,))[0], wanted, atol=1e-6)


SETTINGS = ("m2d_pos", "m2d_signed", "wide_pos", "wide_signed")


@pytest.mark.parametrize("setting", SETTINGS)
def test_published_partitions_and_masks(golden_dir: Path, setting: str) -> None:
    """Of the code beside the masking paper: un-normalised, and by the exact principal direction."""
    with np.load(golden_dir / "masking" / "A_sgim.npz") as arrays:
        golden = {key.split("/", 1)[1]: arrays[key] for key in arrays if key.startswith(setting + "/")}
    features = torch.from_numpy(golden["features_x1024"].astype(np.float32) / 1024)
    clips, n, width = features.shape
    flat, lengths = features.view(-1, width), (n,) * clips
    ratio = 0.7 if n == 190 else 0.8
    label = f"r{ratio * 100:.0f}"
    checked = 0

    scores, sides = (
        a.reshape(clips, n) for a in solve(flat, lengths, rule="s1_code", bipartition="unnormalised")
    )
    for i in range(clips):
        if golden["spectral_float64_cos"][i] < 1 - 1e-6:
            continue  # the published vector is not determined in float32
        vector, side = golden["spectral_vector"][i], golden["spectral_side"][i]
        clear = np.abs(vector) > 1e-3 * np.abs(vector).max()
        same = sides[i][clear] == side[clear]
        assert same.all() or not same.any()
        if len(set(sides[i] == side)) == 1 and golden["spectral_score_gap"][i] > 1e-6:
            np.testing.assert_allclose(1 - 2 * scores[i], golden["spectral_score"][i], atol=1e-5)
            assert (masked(scores[i], ratio) == golden[f"spectral_mask_{label}"][i]).all()
            checked += 1

    scores, sides = (a.reshape(clips, n) for a in solve(flat, lengths, rule="s1_code", bipartition="pca"))
    for i in range(clips):
        x = unit(features[i])
        projection = x @ golden["pca_exact_direction"][i]
        distance = projection - projection.mean()
        clear = np.abs(distance) > 1e-4 * np.abs(distance).max()
        same = sides[i][clear] == (distance > 0)[clear]
        assert same.all() or not same.any()
        in_order = np.sort(scores[i])
        gap = in_order[int(n * (1 - ratio))] - in_order[int(n * (1 - ratio)) - 1]
        if clear.all() and gap > 1e-6:
            assert (masked(scores[i], ratio) == golden[f"pca_exact_mask_{label}"][i]).all()
            checked += 1
    assert checked >= clips
    for dtype in (torch.float32, torch.bfloat16):
        check_batch(flat.to(dtype), lengths, what=f"{setting} {dtype}")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.zeros(4, 3, dtype=torch.int32)}, TypeError, "features must be float16"),
        ({"features": torch.zeros(5, 3)}, ValueError, r"shape \(4, D\), received \(5, 3\)"),
        ({"cu_tokens": torch.tensor([0, 4])}, TypeError, "cu_tokens must be int32"),
        ({"n_tokens": (2, 2)}, ValueError, "cu_tokens must have shape"),
        ({"n_tokens": (-4,)}, ValueError, "n_tokens must hold numbers >= 0"),
        ({"rule": "newest"}, ValueError, "rule must be one of 'paper', 's1_code', received 'newest'"),
        ({"bipartition": "kmeans"}, ValueError, "bipartition must be one of 'ncut', 'pca', 'unnormalised'"),
        ({"gram": None}, ValueError, "gram must be one of 'auto', 'explicit', 'implicit'"),
        ({"features": torch.zeros(4, 3, requires_grad=True)}, ValueError, "must not require a gradient"),
        ({"implementation": "triton"}, KernelUnavailable, "no implementation 'triton'"),
    ],
)  # fmt: skip
def test_mistakes_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {
        "features": torch.zeros(4, 3),
        "cu_tokens": torch.tensor([0, 4], dtype=torch.int32),
        "n_tokens": (4,),
    }
    with pytest.raises(error, match=message):
        ncut_scores(**(arguments | change))
