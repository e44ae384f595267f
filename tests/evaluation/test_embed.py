# SPDX-License-Identifier: Apache-2.0
"""`masktrain embed`, and the wrapper that `masktrain export --as evar` writes."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import sys
import types
from pathlib import Path

import encoders
import numpy as np
import pytest
import soundfile
import torch

from masktrain.cli import _main
from masktrain.evaluation.encoder import load_encoder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoders.save(tmp_path_factory.mktemp("run") / "run", "mae_ast_patch", target_length=48)


def call(*arguments: object) -> tuple[int, str]:
    """Return the status and what was said on standard error."""
    error = io.StringIO()
    with contextlib.redirect_stderr(error), contextlib.redirect_stdout(io.StringIO()):
        status = _main([str(a) for a in arguments])
    return status, error.getvalue()


def test_files_of_any_length(run: Path, tmp_path: Path) -> None:
    encoders.write_tones(tmp_path, ["a.wav", "b.flac", "c.wav"], (0.4, 3.1, 0.9))
    out, report = tmp_path / "out.npz", tmp_path / "report.json"
    files = [tmp_path / name for name in ("a.wav", "b.flac", "c.wav")]
    assert call("embed", "--checkpoint", run, *files, "-o", out, "--batch-size", 2, "--json", report) == (
        0,
        "",
    )
    found = np.load(out)
    encoder = load_encoder(run, "cpu")
    width = 8 * encoder.width
    counts = np.diff(found["cu_frames"])
    # 0.4, 3.1 and 0.9 s have 38, 308 and 88 whole frames of 10 ms
    assert counts.tolist() == [2, 19, 5] and found["frames"].shape == (26, width)
    assert found["clips"].shape == (3, width) and found["frames"].dtype == np.float32
    assert [Path(p).name for p in found["paths"]] == ["a.wav", "b.flac", "c.wav"]
    for clip, (start, end) in enumerate(zip(found["cu_frames"], found["cu_frames"][1:], strict=False)):
        assert np.allclose(found["clips"][clip], found["frames"][start:end].mean(0), atol=1e-5)
        times = found["timestamps_ms"][start:end]
        # 16 frames of 10 ms, centred on 25 ms windows that begin every 10 ms
        assert np.allclose(times, 87.5 + 160 * np.arange(end - start))
        samples, _ = soundfile.read(files[clip], dtype="float32")
        alone = encoders.batch((1.0,))
        alone = type(alone)(
            torch.from_numpy(samples), (len(samples),), (16000,), torch.tensor([0]), torch.tensor([0])
        )
        expected = encoder.frames(alone, (2,)).values[2].numpy()
        assert np.allclose(found["frames"][start:end], expected, atol=2e-5)
    said = json.loads(report.read_text())
    assert said["layer"] == 2 and said["files"] == 3 and said["fingerprint"] == str(found["fingerprint"])


def test_layer_and_pool(run: Path, tmp_path: Path) -> None:
    encoders.write_tones(tmp_path, ["a.wav"], 0.4)
    out = tmp_path / "out.npz"
    status = call("embed", "--checkpoint", run, tmp_path / "a.wav", "-o", out, "--layer", 1, "--pool", "mean")
    assert status == (0, "")
    encoder = load_encoder(run, "cpu")
    samples, _ = soundfile.read(tmp_path / "a.wav", dtype="float32")
    batch = encoders.batch((0.4,))
    batch = type(batch)(torch.from_numpy(samples), batch.lengths, (16000,), batch.clip_ids, batch.starts)
    expected = encoder.frames(batch, (1,), "mean").values[1].numpy()
    assert np.allclose(np.load(out)["frames"], expected, atol=1e-6)


def test_a_short_file_is_filled_and_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoders.write_tones(tmp_path, ["a.wav"], 0.05)
    assert (
        _main(["embed", "--checkpoint", str(run), str(tmp_path / "a.wav"), "-o", str(tmp_path / "o.npz")])
        == 0
    )
    said = "".join(capsys.readouterr())
    assert "1 of 1 clips are shorter than a patch" in said and "a.wav" in said
    assert np.load(tmp_path / "o.npz")["cu_frames"].tolist() == [0, 1]


def test_bad_requests_of_embed(run: Path, tmp_path: Path) -> None:
    encoders.write_tones(tmp_path, ["a.wav"], 0.4)
    (tmp_path / "no.wav").write_text("no audio")
    audio, out = tmp_path / "a.wav", ("-o", tmp_path / "out.npz")
    for arguments, word in (
        (("--checkpoint", run, *out), "no audio was given"),
        ((audio, *out), "--checkpoint is missing"),
        ((audio, "--checkpoint", tmp_path, *out), str(tmp_path)),
        ((audio, "--checkpoint", run, "-o", tmp_path / "out.csv"), ".npz"),
        ((audio, "--checkpoint", run, "-o", tmp_path / "x" / "out.npz"), "does not exist"),
        ((audio, "--checkpoint", run, *out, "--layer", 3), "the layers 1 to 2; received 3"),
        ((audio, "--checkpoint", run, *out, "--batch-size", 0), "at least 1"),
        ((tmp_path / "no.wav", "--checkpoint", run, *out), "no.wav"),
        ((tmp_path / "absent.wav", "--checkpoint", run, *out), "absent.wav"),
    ):
        status, error = call("embed", *arguments)
        assert status == 2 and word in error and "Traceback" not in error, (arguments, error)
    assert not (tmp_path / "out.npz").exists() and not list(tmp_path.glob(".*"))
    (tmp_path / "out.npz").write_text("mine")
    assert "exists already" in call("embed", audio, "--checkpoint", run, *out)[1]


def test_the_wrapper_runs_in_evar(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "wrapper"
    assert call("export", run, "--as", "evar", "-o", out) == (0, "")
    assert sorted(p.name for p in out.iterdir()) == ["ar_masktrain.py", "masktrain.yaml"]
    lines = [line for line in (out / "masktrain.yaml").read_text().splitlines() if not line.startswith("#")]
    config = {name: json.loads(value) for name, value in (line.split(": ", 1) for line in lines)}
    assert config["weight_file"] == str(run) and config["sample_rate"] == 16000 and config["n_mels"] == 128

    class BaseAudioRepr(torch.nn.Module):
        """What evar/ar_base.py has: it keeps the config."""

        def __init__(self, cfg: dict) -> None:
            super().__init__()
            self.cfg = types.SimpleNamespace(**cfg)

    base = types.ModuleType("evar.ar_base")
    base.BaseAudioRepr = BaseAudioRepr
    monkeypatch.setitem(sys.modules, "evar", types.ModuleType("evar"))
    monkeypatch.setitem(sys.modules, "evar.ar_base", base)
    spec = importlib.util.spec_from_file_location("ar_masktrain", out / "ar_masktrain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.AR_MASKTRAIN(_Config(config))
    audio = encoders.batch((0.7, 0.7)).samples.view(2, -1)
    frames, clips = model.encode_frames(audio), model(audio)
    assert frames.shape == (2, config["feature_d"], 4) and clips.shape == (2, config["feature_d"])
    expected = load_encoder(run, "cpu").pooled(encoders.batch((0.7, 0.7)), (2,))[0]
    assert torch.allclose(clips, expected, atol=2e-5)
    assert "exists already" in call("export", run, "--as", "evar", "-o", out)[1]
    assert "--columns" in call("export", run, "--as", "evar", "-o", tmp_path / "b", "--columns", 3)[1]


class _Config(dict):  # type: ignore[type-arg]
    """EVAR's config answers to names as well."""

    __getattr__ = dict.__getitem__
