# SPDX-License-Identifier: Apache-2.0
"""import and export: published weights come back bit for bit, and what does not fit is one message and status 2."""

from __future__ import annotations

import json
import os
import random
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import published
import pytest
import runs
import safetensors.torch
import torch
from torch import Tensor

from masktrain.config import from_dict
from masktrain.errors import CheckpointError, ConfigError
from masktrain.models import registry
from masktrain.recipes import find
from masktrain.training import checkpoint
from masktrain.training.checkpoint import Checkpoint
from masktrain.training.foreign import ForeignWeights, read_weights
from masktrain.training.recipe import Recipe
from masktrain.training.weights import fitting, import_weights, reference_state, timm_state

Cli = Callable[..., "subprocess.CompletedProcess[str]"]
GLOBAL = "--input-norm.kind global --input-norm.dataset-mean 0.5 --input-norm.dataset-std 2"
GOLDEN = {
    "mae_ast/A_random": "mae_ast_patch --model.heads 3 --model.decoder-heads 3 --frontend.mel.n-mels 64",
    "mae_ast/A_chunk": "mae_ast_patch --model.heads 4 --model.decoder-heads 4 --frontend.mel.n-mels 64",
    "mae_ast/A_frame": "mae_ast_frame --model.heads 4 --model.decoder-heads 4 --frontend.mel.n-mels 64 --tokens.patch-freq 64",
    "maskspec/A_maskspec": f"maskspec --model.heads 3 --model.decoder-heads 4 {GLOBAL}",
    "msm_mae/A_msm_mae": "msm_mae_orig --model.heads 3 --model.decoder-heads 4",
    "msm_mae/A_msm_mae_2ddec_normpix": "msm_mae_orig --model.heads 3 --model.decoder-heads 2 --tokens.patch-time 8",
    "m2d/A_msm_mae_norm_pix": "msm_mae --model.heads 3 --model.decoder-heads 2",
    "ssast/A_patch": "ssast_patch --model.heads 3 --frontend.mel.n-mels 64",
    "ssast/A_frame": "ssast_frame --model.heads 3",
    "audiomae/A_global": "audiomae --model.heads 3 --model.decoder-heads 4 --frontend.mel.n-mels 64",
    "audiomae/A_mask2d": "audiomae --model.heads 3 --model.decoder-heads 2",
    "audiomae/A_swin": "audiomae --model.heads 3",
}
# what the recorded state dicts leave out, and the published ones have
ADDED = {
    "mae_ast": {"batch_norm.num_batches_tracked"},
    "ssast": {"v.head.weight", "v.head.bias", "v.head_dist.weight", "v.head_dist.bias"},
}
FRAME = ["--as", *GOLDEN["mae_ast/A_frame"].split()]


def refused(done: subprocess.CompletedProcess[str], *named: str | Path) -> str:
    """Check that a command ended in one message and status 2 that names `named`; return the message."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("masktrain: ") and done.stderr.count("\n") == 1, done.stderr
    for name in named:
        assert str(name) in done.stderr, f"{name} is not in: {done.stderr}"
    return done.stderr


def finished(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same bits, shape and type."""
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def stored(folder: Path) -> tuple[Checkpoint, Recipe]:
    saved = checkpoint.latest(folder / "checkpoints").checkpoint
    assert saved is not None
    return saved, from_dict(Recipe, saved.data["recipe_config"], "recipe")


def write(path: Path, state: dict[str, Tensor]) -> Path:
    torch.save(state, path)
    return path


@pytest.fixture(scope="module")
def small() -> dict[str, Tensor]:
    """A small model under the names of M2D's MAE, as read from its file."""
    return published.msm_mae(48, 2, 1)


MSM = ["--as", "msm_mae", "--model.heads", "3"]


# --- round trips ---


@pytest.mark.parametrize("case", GOLDEN)
def test_golden_states_come_back_bit_for_bit(cli: Cli, tmp_path: Path, golden_dir: Path, case: str) -> None:
    name, *options = GOLDEN[case].split()
    file, out = golden_dir / f"{case}.state.npz", tmp_path / "out"
    finished(cli("import", file, "--as", name, *options, "-o", out))
    expected = {name: torch.from_numpy(value) for name, value in np.load(file).items()}
    for form in ("a.safetensors", "a.pth"):
        finished(cli("export", out, "--as", "reference", "-o", tmp_path / form))
        got = read_weights(tmp_path / form).state
        assert got.keys() - expected.keys() == ADDED.get(case.partition("/")[0], set())
        assert all(same(got[name], tensor) for name, tensor in expected.items())
    # and again: what was exported imports to the same
    finished(cli("import", tmp_path / "a.pth", "--as", name, *options, "-o", tmp_path / "again"))
    first, second = (stored(folder)[0].tensors for folder in (out, tmp_path / "again"))
    assert all(same(first["model"][name], tensor) for name, tensor in second["model"].items())


def test_pth_files_are_laid_out_as_the_reference_s(cli: Cli, tmp_path: Path, golden_dir: Path) -> None:
    for case, key, prefix in (("ssast/A_patch", None, "module."), ("m2d/A_msm_mae_norm_pix", "model", "")):
        name, *options = GOLDEN[case].split()
        out, file = tmp_path / name, tmp_path / f"{name}.pth"
        finished(cli("import", golden_dir / f"{case}.state.npz", "--as", name, *options, "-o", out))
        finished(cli("export", out, "--as", "reference", "-o", file))
        content = torch.load(file, weights_only=True)
        state = content if key is None else content[key]
        assert all(name.startswith(prefix) and isinstance(t, Tensor) for name, t in state.items())


FULL: dict[str, Callable[[], dict[str, Tensor]]] = {
    "maskspec": published.maskspec,
    "maskspec_small": lambda: published.maskspec(384),
    "maskspec_tiny": lambda: published.maskspec(192),
    "msm_mae": published.msm_mae,
    "msm_mae_orig": published.msm_mae_orig,
    "audiomae": published.audiomae,
    "ssast_patch": published.ssast,
    "ssast_frame": lambda: published.ssast(frame=True),
    "mae_ast_patch": published.mae_ast,
    "mae_ast_frame_6l": lambda: published.mae_ast(depth=6),
}


@pytest.mark.slow(
    covers=["masktrain/training/weights.py", "masktrain/training/foreign.py", "masktrain/models/adapters"]
)
@pytest.mark.parametrize("name", FULL)
def test_full_size_round_trip(tmp_path: Path, name: str) -> None:
    """The published names, shapes and lengths, in the recipe's own size: nothing has to be said beside the name."""
    expected = FULL[name]()
    weights = read_weights(write(tmp_path / "w.pth", expected))
    recipe = find(name)
    statistics = torch.ones(2, 128) if recipe.input_norm.kind == "per_bin" else None
    imported = import_weights(recipe, weights, statistics=statistics)
    # the positions of AudioMAE's weights are not those of the recipe
    told = [note.partition(":")[0] for note in imported.notes if note.startswith(("model.", "data."))]
    assert told == (["model.positions", "model.decoder_positions"] if name == "audiomae" else [])
    saved = Checkpoint(tmp_path, 0, {"model": imported.model, "reference": imported.kept}, {})
    exported = reference_state(saved, imported.recipe)
    got = {f"{exported.prefix}{key}": tensor for key, tensor in exported.state.items()}
    assert got.keys() == expected.keys()
    assert all(same(got[key], tensor) for key, tensor in expected.items())
    model = registry.build(imported.recipe.model, imported.recipe.grid, imported.recipe.input_norm)
    checkpoint.load_model(model, imported.model)
    if not name.startswith("mae_ast"):
        assert (
            timm_state(saved, imported.recipe).state["pos_embed"].shape[-1] == imported.recipe.model.embed_dim
        )


def test_of_published_tables_nothing_has_to_be_kept() -> None:
    """Ours are theirs to the bit, so a checkpoint need not carry the 295 MB of MAE-AST's."""
    state = published.mae_ast(32, 1)
    recipe = find("mae_ast_patch", "tiny")
    options = {"encoder_layers": 1, "embed_dim": 32, "heads": 2, "decoder_embed_dim": 32, "decoder_heads": 2}
    recipe = replace(recipe, model=replace(recipe.model, **options))
    imported = import_weights(recipe, ForeignWeights(state, {}))
    assert not [name for name in imported.kept if name.endswith(".pe")]


# --- what import takes from the file ---


def test_sizes_statistics_and_lengths_are_those_of_the_file(
    cli: Cli, tmp_path: Path, small: dict[str, Tensor]
) -> None:
    state = {**small, "pos_embed": published.grid_table(48, 5, 20), "decoder_pos_embed": published.grid_table(384, 5, 20)}  # fmt: skip
    out, report = tmp_path / "out", tmp_path / "report.json"
    file = write(tmp_path / "w.pth", {"model": state, "args": {"lr": 1}})
    done = cli("import", file, *MSM, "-o", out, "--json", report)
    finished(done)
    saved, recipe = stored(out)
    assert (recipe.model.embed_dim, recipe.model.encoder_layers, recipe.model.ffn_dim) == (48, 2, 192)
    assert recipe.data.target_length == 320 and recipe.frontend == find("msm_mae").frontend
    stats = small["norm_stats"]
    assert torch.equal(torch.tensor([recipe.input_norm.dataset_mean, recipe.input_norm.dataset_std]), stats)
    assert saved.step == 0 and saved.data["imported"]["project"] == "nttcslab/m2d, its MAE"
    # every note is printed, and all are in the report
    said = json.loads(report.read_text())
    assert len(said["notes"]) == 2 and all(note in done.stdout for note in said["notes"])
    finished(cli("export", out, "--as", "reference", "-o", tmp_path / "a.safetensors"))
    got = read_weights(tmp_path / "a.safetensors").state
    assert got.keys() == state.keys() and all(same(got[name], tensor) for name, tensor in state.items())


def test_the_transposed_table_of_audiomae_is_recognised(tmp_path: Path) -> None:
    recipe = find("audiomae")
    model = replace(recipe.model, encoder_layers=1, embed_dim=48, ffn_dim=192, heads=3)
    state = published.audiomae(48, 1)
    for own in ("sincos_2d", "sincos_2d_transposed"):
        changed = replace(recipe, model=replace(model, positions=own, decoder_positions=own))
        got = import_weights(changed, ForeignWeights(state, {})).recipe.model
        assert (got.positions, got.decoder_positions) == ("sincos_2d_transposed",) * 2
    straight = {**state, "pos_embed": published.grid_table(48, 64, 8)}
    assert import_weights(changed, ForeignWeights(straight, {})).recipe.model.positions == "sincos_2d"


def test_per_bin_statistics(cli: Cli, tmp_path: Path) -> None:
    file = write(tmp_path / "w.pth", published.maskspec(48, 1, 1))
    options = ["--as", "maskspec", "--model.heads", "3"]
    refused(cli("import", file, *options, "-o", tmp_path / "out"), "--statistics", "mean_std_128.npy")
    mean, std = np.linspace(-1, 1, 128, dtype=np.float32), np.linspace(0.1, 1, 128, dtype=np.float32)
    saved: dict[str, Any] = {"frame_mean": mean, "frame_std": std}
    np.save(tmp_path / "s.npy", saved, allow_pickle=True)  # type: ignore[arg-type]
    finished(cli("import", file, *options, "-o", tmp_path / "out", "--statistics", tmp_path / "s.npy"))
    model = stored(tmp_path / "out")[0].tensors["model"]
    assert np.array_equal(model["input_norm.bin_mean"], mean)
    assert np.array_equal(model["input_norm.bin_std"], std)
    np.save(tmp_path / "64.npy", np.ones((2, 64)))
    begin = ["import", file, *options, "-o", tmp_path / "other", "--statistics"]
    refused(cli(*begin, tmp_path / "64.npy"), "64 mel bins")
    refused(cli(*begin, tmp_path / "w.pth"), "w.pth")
    refused(cli(*begin, tmp_path / "s.npy", *GLOBAL.split()), "'per_bin'")


def test_missing_names_are_drawn_as_for_a_new_run(tmp_path: Path, cli: Cli, small: dict[str, Tensor]) -> None:
    encoder = {n: t for n, t in small.items() if not n.startswith(("decoder", "mask_token"))}
    file = write(tmp_path / "w.pth", encoder)
    text = refused(cli("import", file, *MSM, "-o", tmp_path / "out"), "missing mask_token")
    assert "decoder_embed.weight" in text
    allowed = ["--allow-missing", "decoder_*", "--allow-missing", "mask_token"]
    done = cli("import", file, *MSM, *allowed, "-o", tmp_path / "out")
    finished(done)
    assert "decoder_blocks.0.attn.qkv.weight" in done.stdout
    saved, recipe = stored(tmp_path / "out")
    model = saved.tensors["model"]
    torch.manual_seed(recipe.seed)
    new = registry.build(recipe.model, recipe.grid, recipe.input_norm).state_dict()
    for name, tensor in model.items():
        drawn = name.startswith(("decoder", "mask_token", "bridge", "reconstruction_head"))
        assert same(tensor, new[name]) == drawn or name.endswith((".bias", "norm.weight")), name
    assert torch.equal(model["encoder.norm.weight"], small["norm.weight"])


def test_names_that_are_ignored(tmp_path: Path, cli: Cli, small: dict[str, Tensor]) -> None:
    trained = {**small, "pos_embed": small["pos_embed"] + 1, "head.weight": torch.ones(3), "head.n": torch.eye(2).to_sparse()}  # fmt: skip
    file = write(tmp_path / "w.pth", trained)
    begin = ["import", file, *MSM, "-o", tmp_path / "out"]
    refused(cli(*begin), "head.n", "sparse")
    refused(cli(*begin, "--ignore", "head.n"), "pos_embed", "--ignore pos_embed")
    refused(cli(*begin, "--ignore", "head.n", "--ignore", "pos_embed"), "unknown head.weight")
    refused(cli(*begin, "--ignore", "heed.*"), "--ignore heed.*", "holds no such name")
    begin += ["--ignore", "head.*", "--ignore", "pos_embed"]
    refused(cli(*begin, "--allow-missing", "blocks.9.norm1.wait"), "--allow-missing", "no such name")
    finished(cli(*begin))
    finished(cli("export", tmp_path / "out", "--as", "reference", "-o", tmp_path / "a.safetensors"))
    got = read_weights(tmp_path / "a.safetensors").state
    assert got.keys() == small.keys()
    assert (got["pos_embed"] - small["pos_embed"]).abs().max() < 1e-6  # ours in its place
    # a name that tells another project is left out before that is asked
    other = write(tmp_path / "o.pth", {**published.maskspec(48, 1, 1), "norm_stats": torch.ones(2)})
    begin = ["import", other, "--as", "maskspec", "--model.heads", "3", *GLOBAL.split(), "-o", tmp_path / "o"]
    refused(cli(*begin), "the file has norm_stats")
    finished(cli(*begin, "--ignore", "norm_stats"))


def test_other_number_formats_and_nan(tmp_path: Path, cli: Cli, small: dict[str, Tensor]) -> None:
    half = {n: t.half() for n, t in small.items()}
    half["norm.weight"][3] = float("nan")
    done = cli("import", write(tmp_path / "w.pth", half), *MSM, "-o", tmp_path / "out")
    finished(done)
    assert "float16" in done.stdout
    assert "NaN" in done.stdout + done.stderr and "encoder.norm.weight" in done.stdout + done.stderr
    model = stored(tmp_path / "out")[0].tensors["model"]
    assert torch.equal(model["encoder.norm.bias"], half["norm.bias"].float())
    whole = {**small, "norm.weight": torch.ones(48, dtype=torch.int64)}
    refused(
        cli("import", write(tmp_path / "i.pth", whole), *MSM, "-o", tmp_path / "other"),
        "norm.weight",
        "int64",
    )


def test_a_run_starts_from_what_was_imported(cli: Cli, tmp_path: Path, golden_dir: Path, good: Path) -> None:
    """With the options that import prints, and the weights are those of the file."""
    report, out, run = tmp_path / "report.json", tmp_path / "my weights", tmp_path / "run"
    file = golden_dir / "mae_ast/A_frame.state.npz"
    finished(cli("import", file, *FRAME, "-o", out, "--json", report))
    command = shlex.split(json.loads(report.read_text())["run"])
    assert command[0] == "masktrain" and command[-2:] == ["--init-from", str(out)]
    more = (
        "--steps 1 --optim.lr 1e-30 --train.pictures 0 --batch-size 8 --device cpu --loader soundfile".split()
    )
    finished(cli(*command[1:], *more, "--data", good, "--out", run))
    before, after = stored(out)[0].tensors["model"], stored(run)[0].tensors["model"]
    learned = [name for name in before if not name.startswith("input_norm.")]
    assert all(torch.equal(before[name], after[name]) for name in learned)
    # another number of heads has the same shapes, and is refused
    command[command.index("--model.heads") + 1] = "6"
    refused(
        cli(*command[1:], *more, "--data", good, "--out", tmp_path / "new"),
        "model.heads",
    )


# --- what is refused ---


def test_weights_of_another_recipe(cli: Cli, tmp_path: Path, golden_dir: Path) -> None:
    def told(case: str, name: str, *named: str) -> None:
        done = cli("import", golden_dir / f"{case}.state.npz", "--as", name, "-o", tmp_path / "out")
        refused(done, *named)

    told("ssast/A_frame", "ssast_patch", "128 mel bins x 2 frames", "16 x 16", "Or is it ssast_frame?")
    told("ssast/A_patch", "maskspec", "It looks like ssast_patch or ssast_frame")
    told("maskspec/A_maskspec", "mae_ast_patch", "It looks like", "maskspec")
    told("msm_mae/A_msm_mae", "msm_mae", "It looks like msm_mae_orig")
    told("audiomae/A_swin", "maskspec", "It looks like audiomae")
    told("m2d/A_m2d", "msm_mae", "It looks like m2d, which cannot be imported")
    told("eat/A_eat", "maskspec", "none of the known ones")
    told("mae_ast/A_frame", "mae_ast_patch", "128 values", "mae_ast_frame")


def test_the_number_of_mel_bins(cli: Cli, tmp_path: Path) -> None:
    """It stands in no weight of these models, and decides what a token is."""
    state = {**published.ssast(48, 1), "module.p_input_fdim": torch.tensor(64)}
    begin = ["-o", tmp_path / "out", "--model.heads", "3", "--as"]
    refused(
        cli("import", write(tmp_path / "s.pth", state), *begin, "ssast_patch"), "--frontend.mel.n-mels 64"
    )
    state = {**published.ssast(48, 1), "module.p_input_tdim": torch.tensor(1040)}
    refused(
        cli("import", write(tmp_path / "s.pth", state), *begin, "ssast_patch"), "1040 frames", "64 columns"
    )
    state = {**published.mae_ast(48, 1, 9), "layer_norm.weight": torch.ones(80)}
    done = cli(
        "import", write(tmp_path / "m.pth", state), *begin, "mae_ast_patch", "--model.decoder-heads", "3"
    )
    refused(done, "--frontend.mel.n-mels 80")


def test_any_state_dict_is_refused_or_read(small: dict[str, Tensor]) -> None:
    """Names left out or added, tensors of other shapes and types: weights of the model, or a message."""
    rng = random.Random(0)
    ssast = {n.removeprefix("module."): t for n, t in published.ssast(48, 1).items()}
    sources = [("msm_mae", small), ("ssast_patch", ssast), ("mae_ast_patch", published.mae_ast(48, 1, 9))]
    read = 0
    for _ in range(60):
        name, good = rng.choice(sources)
        state = dict(good)
        for key in rng.sample(list(state), rng.randint(0, 2)):
            tensor = state.pop(key)
            change = rng.randrange(8)
            if change == 0:
                state[key] = tensor[None]
            elif change == 1:
                state[key] = tensor.reshape(-1)
            elif change == 2:
                state[key] = tensor.new_zeros(0)
            elif change == 3:
                state[key] = tensor.new_zeros(0, *tensor.shape)
            elif change == 4:
                state[key] = torch.tensor(float("nan"))
            elif change == 5:
                state[key] = torch.cat([tensor.reshape(-1), tensor.reshape(-1)[:1]])
            elif change == 6:
                state[key.replace(".0.", ".77.")] = tensor
        weights = ForeignWeights(state, {})
        try:
            recipe, _ = fitting([find(name)], weights, ("model.heads", "model.decoder_heads"))
            heads = {f: 3 for f in ("heads", "decoder_heads") if hasattr(recipe.model, f)}
            sizes = {"embed_dim": 48, **({"decoder_embed_dim": 48} if name == "mae_ast_patch" else {})}
            recipe = replace(recipe, model=replace(recipe.model, **sizes, **heads))
            imported = import_weights(recipe, weights)
        except (CheckpointError, ConfigError) as error:
            assert str(error).isprintable()
        else:
            read += 1
            model = registry.build(imported.recipe.model, imported.recipe.grid, imported.recipe.input_norm)
            checkpoint.load_model(model, imported.model)
    assert read > 5


def test_widths_leave_the_number_of_heads_open(cli: Cli, tmp_path: Path) -> None:
    file = write(tmp_path / "w.pth", published.ssast(256, 1))
    begin = ["import", file, "--as", "ssast_patch", "-o", tmp_path / "out"]
    refused(cli(*begin), "embed_dim 256", "--model.heads", "would be 4")
    refused(cli(*begin, "--model.heads", "5"), "model.embed_dim")
    finished(cli(*begin, "--model.heads", "4"))
    # a width that a named size has needs no more
    finished(cli("import", write(tmp_path / "s.pth", published.ssast(384, 1)), "--as", "ssast_patch", "-o", tmp_path / "small"))  # fmt: skip
    assert stored(tmp_path / "small")[1].model.heads == 6


def test_options_that_contradict_the_file(cli: Cli, tmp_path: Path, small: dict[str, Tensor]) -> None:
    begin = ["import", write(tmp_path / "w.pth", small), *MSM, "-o", tmp_path / "out"]
    for option, value, named in (
        ("--model.embed-dim", "96", "48"),
        ("--model.encoder-layers", "3", "2"),
        ("--data.target-length", "160", "608"),
        ("--input-norm.dataset-mean", "-7", "-7.04"),
        ("--model.positions", "sincos_2d_transposed", "sincos_2d"),
    ):
        refused(cli(*begin, option, value), option, named)
    refused(cli(*begin, "--model.no-key-bias"), "--model.key-bias")
    refused(cli(*begin, "--frontend.mel.n-mels", "64"), "pos_embed")
    finished(cli(*begin, "--model.embed-dim", "48"))


def test_bad_requests_of_import(cli: Cli, tmp_path: Path, small: dict[str, Tensor]) -> None:
    file, out = write(tmp_path / "w.pth", small), ["-o", tmp_path / "out"]
    (tmp_path / "empty.pth").write_bytes(b"")
    refused(cli("import", tmp_path / "absent.pth", *MSM, *out), "absent.pth", "missing")
    refused(cli("import", tmp_path, *MSM, *out), tmp_path, "directory")
    refused(cli("import", tmp_path / "empty.pth", *MSM, *out), "empty.pth", "empty")
    refused(cli("import", *MSM, *out), "one file")
    refused(cli("import", file, file, *MSM, *out), "one file")
    refused(cli("import", file, *out), "--as")
    refused(cli("import", file, "--as", "maskspek", *out), "maskspek", "Did you mean 'maskspec'")
    refused(cli("import", file, *MSM, *out, "--size", "huge"), "--size", "huge")
    refused(cli("import", file, *MSM, *out, "--nothing", "1"), "--nothing")
    refused(cli("import", file, *MSM, *out, "--seed", "-1"), "seed")
    refused(cli("import", file, *MSM, *out, "--json", tmp_path), "--json")
    refused(cli("import", file, *MSM, "-o", file / "below"), "--out", "cannot be written")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    refused(cli("import", file, *MSM, *out), "exists already")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    refused(cli("import", file, *MSM, "-o", tmp_path / "dangling"), "exists already")


def test_bad_requests_of_export(cli: Cli, tmp_path: Path, golden_dir: Path) -> None:
    source = tmp_path / "source"
    finished(cli("import", golden_dir / "mae_ast/A_frame.state.npz", *FRAME, "-o", source))
    target = ["-o", tmp_path / "a.safetensors"]
    reference = ["--as", "reference"]
    refused(cli("export", source, *target), "--as")
    refused(cli("export", source, "--as", "onnx", *target), "onnx", "reference, timm")
    refused(cli("export", *reference, *target), "one run")
    refused(cli("export", tmp_path / "absent", *reference, *target), "absent", "no such folder")
    refused(cli("export", tmp_path, *reference, *target), tmp_path)
    refused(cli("export", source, "--as", "timm", *target), "mae_ast_frame", "class token")
    refused(cli("export", source, *reference, "-o", tmp_path / "a.onnx"), ".safetensors, .pth")
    refused(cli("export", source, *reference, "-o", source / "x" / "a.pth"), "--out", "No such file")
    refused(cli("export", source, *reference, *target, "--columns", "0"), "--columns")
    assert not list(tmp_path.glob("*.safetensors")) and not list(tmp_path.glob(".*"))
    (tmp_path / "a.safetensors").write_text("mine")
    refused(cli("export", source, *reference, *target), "exists already")
    assert (tmp_path / "a.safetensors").read_text() == "mine"
    # a single checkpoint serves as well as its run; damaged, neither does
    only = source / "checkpoints" / "step_00000000"
    finished(cli("export", only, *reference, "-o", tmp_path / "b.safetensors"))
    (only / "model.safetensors").write_bytes(b"x")
    for path in (source, only):
        refused(cli("export", path, *reference, "-o", tmp_path / "c.pth"), "model.safetensors")


def test_columns_of_exported_tables(cli: Cli, tmp_path: Path, small: dict[str, Tensor]) -> None:
    finished(cli("import", write(tmp_path / "w.pth", small), *MSM, "-o", tmp_path / "out"))
    finished(cli("export", tmp_path / "out", "--as", "timm", "--columns", "7", "-o", tmp_path / "a.safetensors"))  # fmt: skip
    got = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert (got["pos_embed"] - published.grid_table(48, 5, 7)).abs().max() < 1e-6
    state = {n.removeprefix("module."): t for n, t in published.ssast(48, 1).items()}
    finished(cli("import", write(tmp_path / "s.pth", state), "--as", "ssast_patch", "--model.heads", "3", "-o", tmp_path / "s"))  # fmt: skip
    refused(cli("export", tmp_path / "s", "--as", "timm", "--columns", "7", "-o", tmp_path / "b.pth"), "64 columns")  # fmt: skip


def test_a_forged_checkpoint_is_refused(tmp_path: Path, small: dict[str, Tensor]) -> None:
    """A recipe and tensors that do not belong together end in a message before anything is computed from them."""
    recipe = find("msm_mae", "tiny")
    model = registry.build(recipe.model, recipe.grid, recipe.input_norm).state_dict()
    name = "encoder.norm.weight"
    for change in (
        {name: model[name][:5]},
        {name: model[name].double()},
        {"more": torch.ones(1)},
        {"\x1b[31m": torch.ones(1)},
    ):
        with pytest.raises(CheckpointError, match="not those of its recipe") as caught:
            reference_state(Checkpoint(tmp_path, 0, {"model": {**model, **change}}, {}), recipe)
        assert str(caught.value).isprintable()
    with pytest.raises(CheckpointError):
        reference_state(Checkpoint(tmp_path, 0, {}, {}), recipe)
    open_length = replace(recipe, data=replace(recipe.data, target_length=None))
    with pytest.raises(ConfigError, match="--columns"):
        reference_state(Checkpoint(tmp_path, 0, {"model": model}, {}), open_length)


def test_a_full_or_read_only_disk(
    cli: Cli, tmp_path: Path, mounted: Callable[..., Path], small: dict[str, Tensor]
) -> None:
    file = write(tmp_path / "w.pth", small)
    place = mounted("size=1m")
    refused(cli("import", file, *MSM, "-o", place / "out"), "--out", "No space left")
    assert list(place.iterdir()) == []
    finished(cli("import", file, *MSM, "-o", tmp_path / "out"))
    for form in ("a.safetensors", "a.pth"):
        refused(cli("export", tmp_path / "out", "--as", "reference", "-o", place / form), "--out", "No space")
        assert list(place.iterdir()) == []
    readonly = mounted("ro", "readonly")
    refused(cli("import", file, *MSM, "-o", readonly / "out"), "--out", "Read-only")
    refused(
        cli("export", tmp_path / "out", "--as", "reference", "-o", readonly / "a.pth"), "--out", "Read-only"
    )


def test_help_needs_neither_torch_nor_a_file() -> None:
    for command in ("import", "export"):
        code = f"import sys; from masktrain.cli import _main; s = _main(['{command}', '--help']); sys.exit(s or 'torch' in sys.modules)"  # fmt: skip
        done = subprocess.run([runs.COMMAND[0], "-c", code], capture_output=True, text=True, env=os.environ)
        assert done.returncode == 0 and "--as" in done.stdout, done.stdout + done.stderr
