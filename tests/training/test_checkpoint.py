# SPDX-License-Identifier: Apache-2.0
"""Checkpoints come back bit for bit, or not at all: kills, full disks, concurrent writers, names, shapes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from masktrain.errors import CheckpointError, RunError
from masktrain.training import checkpoint, optim, storage
from masktrain.training.checkpoint import AsyncSaver, clean, latest, load, save, verify

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def state_of(step: int, size: int = 1000) -> tuple[dict[str, dict[str, Tensor]], dict[str, object]]:
    generator = torch.Generator().manual_seed(step)
    model = {"w": torch.randn(size, 3, generator=generator), "b": torch.randn(3, generator=generator)}
    moments = {"exp_avg.w": torch.randn(size, 3, generator=generator)}
    data = {"step": step, "lr": 0.1 / (step + 1), "text": f"ä{step}", "rows": [1, 2.5, None, True]}
    return {"model": model, "optimizer": moments}, data


def assert_same(found: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> None:
    assert found.keys() == expected.keys()
    for group, tensors in expected.items():
        assert found[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert bits(found[group][name]) == bits(tensor), (group, name)


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), flat.numpy().tobytes()


def newest(root: Path) -> Path:
    """Return the folder of the checkpoint that serves, and check that nothing newer is damaged."""
    found = latest(root)
    assert found.checkpoint is not None and found.damaged == ()
    return found.checkpoint.path


def hidden(root: Path) -> list[str]:
    return [name for name in os.listdir(root) if name.startswith(".")]


# --- saving and loading ---


def test_what_is_loaded_is_what_was_saved(tmp_path: Path) -> None:
    tensors, data = state_of(1000)
    path = save(tmp_path / "a" / "checkpoints", 1000, tensors, data, keep_last=1)
    assert path.name == "step_00001000"
    assert sorted(os.listdir(path)) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    found = load(path)
    assert (found.step, found.data) == (1000, data)
    assert_same(found.tensors, tensors)
    assert newest(path.parent) == path
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["version"], manifest["layout"], manifest["step"]) == (1, "full", 1000)
    (tmp_path / "other").touch()
    assert {file.stat().st_mode for file in path.iterdir()} == {(tmp_path / "other").stat().st_mode}


shapes = st.lists(st.integers(0, 4), max_size=3)


@settings(max_examples=60, deadline=None)
@given(
    spec=st.dictionaries(
        st.text(min_size=1, max_size=12),
        st.tuples(shapes, st.sampled_from(DTYPES)),
        max_size=6,
    ),
    seed=st.integers(0, 2**31),
)
def test_any_tensors_come_back_bit_for_bit(
    spec: dict[str, tuple[list[int], torch.dtype]], seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any bits (NaN payloads included), names and shapes."""
    path = tmp_path_factory.mktemp("files") / "x"
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (shape, dtype) in spec.items():
        count = int(torch.Size(shape).numel()) * dtype.itemsize
        high = 2 if dtype is torch.bool else 256
        raw = torch.randint(0, high, (count,), dtype=torch.uint8, generator=generator)
        tensors[name] = raw.view(dtype).reshape(shape)
    storage.write_tensors(path, tensors)
    assert_same({"": storage.read_tensors(path)}, {"": tensors})


def test_non_contiguous_and_shared_tensors(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"model": {"t": base.t(), "slice": base[:, ::2], "same": base, "zero": base[0, 0]}}
    with AsyncSaver(tmp_path, keep_last=1) as saver:
        saver.save(1, tensors, {})
    found = load(newest(tmp_path)).tensors
    assert all(torch.equal(found["model"][name], tensor) for name, tensor in tensors["model"].items())
    found["model"]["same"].zero_()
    assert found["model"]["zero"].shape == () and found["model"]["t"].sum() == base.sum()


def test_no_nan_in_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        save(tmp_path, 1, {}, {"loss": float("nan")}, keep_last=1)
    assert os.listdir(tmp_path) == []


def test_keep_last(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        save(tmp_path, step, *state_of(step), keep_last=2)
    assert sorted(os.listdir(tmp_path)) == ["step_00000015", "step_00000020"]


def test_keep_last_counts_only_sound_ones(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        save(tmp_path, step, *state_of(step), keep_last=9)
    (tmp_path / "step_00000015" / "manifest.json").unlink()
    save(tmp_path, 20, *state_of(20), keep_last=2)
    assert sorted(os.listdir(tmp_path)) == ["step_00000010", "step_00000015", "step_00000020"]


def test_keep_last_never_removes_what_is_newer(tmp_path: Path) -> None:
    save(tmp_path, 30, *state_of(30), keep_last=1)
    save(tmp_path, 20, *state_of(20), keep_last=1)
    assert sorted(os.listdir(tmp_path)) == ["step_00000020", "step_00000030"]


def test_a_valid_checkpoint_of_the_step_stays_and_a_damaged_one_is_replaced(tmp_path: Path) -> None:
    path = save(tmp_path, 5, *state_of(5), keep_last=1)
    before = (path / "manifest.json").stat().st_ino
    save(tmp_path, 5, *state_of(6), keep_last=1)
    assert (path / "manifest.json").stat().st_ino == before
    with open(path / "model.safetensors", "r+b") as file:
        file.truncate(100)
    save(tmp_path, 5, *state_of(5), keep_last=1)
    assert_same(load(path).tensors, state_of(5)[0])
    assert os.listdir(tmp_path) == ["step_00000005"]


def test_latest_passes_damaged_ones_over_by_name(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step, *state_of(step), keep_last=9)
    (tmp_path / "step_00000004" / "state.json").unlink()
    with open(tmp_path / "step_00000003" / "optimizer.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    found = latest(tmp_path)
    assert found.checkpoint is not None and found.checkpoint.path == tmp_path / "step_00000002"
    assert_same(found.checkpoint.tensors, state_of(2)[0])
    assert len(found.damaged) == 2
    assert "step_00000004" in found.damaged[0] and "state.json is missing" in found.damaged[0]
    assert "step_00000003" in found.damaged[1] and "SHA-256" in found.damaged[1]


def test_latest_without_any(tmp_path: Path) -> None:
    assert latest(tmp_path / "absent") == checkpoint.Latest(None, ())
    (tmp_path / "step_00000001").mkdir()
    (tmp_path / "step_1").mkdir()
    (tmp_path / "notes.txt").write_text("")
    found = latest(tmp_path)
    assert found.checkpoint is None and len(found.damaged) == 1


def test_latest_refuses_a_renamed_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 5, *state_of(5), keep_last=1)
    shutil.copytree(tmp_path / "step_00000005", tmp_path / "step_00000009")
    found = latest(tmp_path)
    assert found.checkpoint is not None and found.checkpoint.path == tmp_path / "step_00000005"
    assert "another step" in found.damaged[0]


def test_clean_removes_leftovers_only(tmp_path: Path) -> None:
    path = save(tmp_path, 5, *state_of(5), keep_last=1)
    shutil.copytree(path, tmp_path / ".step_00000009.0123456789abcdef.partial")
    shutil.copytree(path, tmp_path / ".step_00000001.0123456789abcdef.removed")
    (tmp_path / ".step_00000009.partial").mkdir()
    (tmp_path / ".notes").write_text("")
    assert len(clean(tmp_path)) == 2
    assert sorted(os.listdir(tmp_path)) == [".notes", ".step_00000009.partial", "step_00000005"]
    assert clean(tmp_path) == () and clean(tmp_path / "absent") == ()


def test_hashing_needs_constant_memory(tmp_path: Path) -> None:
    import tracemalloc

    save(tmp_path, 1, {"model": {"w": torch.zeros(12_000_000)}}, {}, keep_last=1)
    tracemalloc.start()
    verify(tmp_path / "step_00000001")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


# --- failures ---


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failure_at_any_point_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Each wait for the disk fails in turn; only the last one of a save comes after the new name is given."""
    save(tmp_path, 1, *state_of(1), keep_last=1)
    real, failures = os.fsync, 0
    for fail_at in range(100):
        calls = 0

        def fsync(descriptor: int, fail_at: int = fail_at) -> None:
            nonlocal calls
            calls += 1
            if calls == fail_at + 1:
                raise OSError(code, os.strerror(code))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        try:
            save(tmp_path, 2, *state_of(2), keep_last=1)
        except RunError as error:
            failures += 1
            assert "step 2" in str(error) and str(tmp_path) in str(error) and "--resume" in str(error)
            assert hidden(tmp_path) == []
            assert verify(tmp_path / "step_00000001").step == 1
        else:
            break
        finally:
            monkeypatch.setattr(os, "fsync", real)
    # model, optimizer, state, manifest, their folder, the folder above
    assert failures == 6 and newest(tmp_path) == tmp_path / "step_00000002"


def test_what_reads_back_differently_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, *state_of(1), keep_last=1)
    real = storage.write

    def faulty(path: Path, content: bytes) -> None:
        real(path, content)
        if path.name == "manifest.json":  # all that was written before is recorded by now
            path.with_name("state.json").write_bytes(b"{ }")

    monkeypatch.setattr(storage, "write", faulty)
    with pytest.raises(RunError, match="reads back differently"):
        save(tmp_path, 2, *state_of(2), keep_last=1)
    assert os.listdir(tmp_path) == ["step_00000001"]


def test_a_file_in_the_folders_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="could not be written"):
        save(tmp_path / "file" / "checkpoints", 1, *state_of(1), keep_last=1)


SAVE_ONCE_MORE = """
import resource, signal, sys
from pathlib import Path
import torch
from masktrain.errors import RunError
from masktrain.training import checkpoint
root, limit, size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
if sys.argv[4] == "first":
    checkpoint.save(root, 1, {"model": {"w": torch.ones(1000)}}, {}, keep_last=1)
if sys.argv[5]:
    import subprocess
    subprocess.run(sys.argv[5], shell=True, check=True)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    checkpoint.save(root, 2, {"model": {"w": torch.ones(size)}}, {}, keep_last=1)
except RunError as error:
    print(error)
found = checkpoint.latest(root)
print(found.checkpoint.path.name, len(found.damaged), len(list(root.iterdir())))
"""


def run_script(script: str, *args: str, prefix: tuple[str, ...] = ()) -> str:
    done = subprocess.run(
        [*prefix, sys.executable, "-c", script, *args],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    out = run_script(SAVE_ONCE_MORE, str(tmp_path), "100000", "1000000", "first", "")
    assert "limit on file sizes" in out and out.splitlines()[-1] == "step_00000001 0 1"


def in_own_mount(folder: Path) -> tuple[str, ...]:
    """Return the command prefix that mounts a 1 MiB file system on `folder` for one process."""
    mount = f'mount -t tmpfs -o size=1m tmpfs {folder} && exec "$@"'
    prefix = ("unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh")
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    return prefix


def test_a_full_disk(tmp_path: Path) -> None:
    prefix = in_own_mount(tmp_path)
    out = run_script(SAVE_ONCE_MORE, str(tmp_path), "0", "1000000", "first", "", prefix=prefix)
    assert "no space is left" in out and "free)" in out and "--resume" in out
    assert out.splitlines()[-1] == "step_00000001 0 1"


def test_a_read_only_disk(tmp_path: Path) -> None:
    prefix = in_own_mount(tmp_path)
    remount = f"mount -o remount,ro {tmp_path}"
    out = run_script(SAVE_ONCE_MORE, str(tmp_path), "0", "1000", "first", remount, prefix=prefix)
    assert "may not be written" in out and "--out" in out
    assert out.splitlines()[-1] == "step_00000001 0 1"


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from masktrain.training import checkpoint
root, kills = Path(sys.argv[1]), int(sys.argv[2])
random.seed(int(sys.argv[3]))

def state(step):
    g = torch.Generator().manual_seed(step)
    tensors = {"model": {"w": torch.randn(20000, generator=g)}, "extra": {"n": torch.tensor(step)}}
    return tensors, {"step": step}

def child(step, pipe):
    with checkpoint.AsyncSaver(root, keep_last=2) as saver:
        while True:
            step += 1
            saver.save(step, *state(step))
            if step % 2:
                saver.wait()
                os.write(pipe, step.to_bytes(8, "little"))

step = leftovers = 0
for kill in range(kills):
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        child(step, write)
    os.close(write)
    began = time.monotonic()
    told = os.read(read, 8) if kill % 4 else b""  # every fourth is killed from its very start on
    time.sleep(random.uniform(0.0, max(0.02, time.monotonic() - began)))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    told += b"".join(iter(lambda: os.read(read, 1 << 16), b""))
    os.close(read)
    promised = int.from_bytes(told[-8:], "little") if told else step
    found = checkpoint.latest(root)
    assert not found.damaged, found.damaged
    loaded = found.checkpoint
    if loaded is None:
        assert promised == 0, promised
    else:
        assert loaded.step >= promised, (loaded.step, promised)
        tensors, data = state(loaded.step)
        assert loaded.data == data
        assert torch.equal(loaded.tensors["model"]["w"], tensors["model"]["w"])
        assert int(loaded.tensors["extra"]["n"]) == loaded.step
        step = loaded.step
    leftovers += len(checkpoint.clean(root))
    again = checkpoint.latest(root).checkpoint
    assert (again and again.path) == (loaded and loaded.path)
print(step, leftovers)
"""


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """After each SIGKILL the newest checkpoint is whole and not older than what was promised."""
    step, leftovers = run_script(KILLED, str(tmp_path), "6", "7").split()
    assert int(step) >= 4 and int(leftovers) >= 1


@pytest.mark.slow(covers=["masktrain/training/checkpoint.py", "masktrain/training/storage.py"])
def test_killed_often(tmp_path: Path) -> None:
    for seed in range(5):
        run_script(KILLED, str(tmp_path / str(seed)), "100", str(seed))


# --- concurrency ---


def test_a_reader_beside_the_writer(tmp_path: Path) -> None:
    """While checkpoints come and go, `latest` names a valid one and calls none damaged."""
    save(tmp_path, 1, *state_of(1), keep_last=1)
    done = threading.Event()

    def write() -> None:
        for step in range(2, 15):
            save(tmp_path, step, *state_of(step), keep_last=1)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = []
    while not done.is_set():
        seen.append(newest(tmp_path).name)
    writer.join()
    assert seen == sorted(seen) and len(set(seen)) > 3


def test_two_writers_of_the_same_steps(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def write() -> None:
        try:
            for step in range(1, 15):
                save(tmp_path, step, *state_of(step), keep_last=2)
        except BaseException as error:
            errors.append(error)

    writers = [threading.Thread(target=write) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert errors == []
    assert "step_00000014" in os.listdir(tmp_path) and hidden(tmp_path) == []
    assert_same(load(tmp_path / "step_00000014").tensors, state_of(14)[0])


# --- the background saver ---


def test_async_save_holds_the_values_of_the_call(tmp_path: Path) -> None:
    tensors, data = state_of(1, size=200_000)
    with AsyncSaver(tmp_path, keep_last=5) as saver:
        for step in range(1, 6):
            data["step"] = step
            tensors["model"]["w"].fill_(step)
            saver.save(step, tensors, data)
            tensors["model"]["w"].fill_(-1.0)
            data["step"] = -1
    for step in range(1, 6):
        found = load(tmp_path / checkpoint.folder_name(step))
        assert found.data["step"] == step
        assert bool((found.tensors["model"]["w"] == step).all())


def test_async_save_while_shapes_and_names_change(tmp_path: Path) -> None:
    with AsyncSaver(tmp_path, keep_last=5) as saver:
        saver.save(1, {"model": {"a": torch.ones(3), "b": torch.ones(2)}}, {})
        saver.save(2, {"model": {"a": torch.ones(4, dtype=torch.float64)}, "extra": {}}, {})
    assert load(tmp_path / "step_00000001").tensors["model"].keys() == {"a", "b"}
    second = load(tmp_path / "step_00000002").tensors
    assert second.keys() == {"model", "extra"} and bits(second["model"]["a"])[:2] == (torch.float64, (4,))


@pytest.mark.parametrize("where", ["check", "wait", "close", "save"])
def test_async_errors_surface(tmp_path: Path, where: str) -> None:
    (tmp_path / "file").write_text("")
    saver = AsyncSaver(tmp_path / "file" / "checkpoints", keep_last=1)
    saver.save(1, *state_of(1))
    assert saver._thread is not None
    saver._thread.join()
    calls = {"check": saver.check, "wait": saver.wait, "close": saver.close}
    with pytest.raises(RunError, match="step 1"):
        calls.get(where, lambda: saver.save(2, *state_of(2)))()
    saver.close()  # an error is told once


def test_async_check_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(checkpoint, "save", lambda *_: gate.wait(60))
    saver = AsyncSaver(tmp_path, keep_last=1)
    saver.save(1, *state_of(1))
    saver.check()
    gate.set()
    saver.close()


def test_an_error_of_the_run_is_not_replaced_by_one_of_the_saver(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KeyError, match="of the run"), AsyncSaver(tmp_path / "file" / "x", 1) as saver:
        saver.save(1, *state_of(1))
        raise KeyError("of the run")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_async_save_from_a_gpu(tmp_path: Path) -> None:
    tensor = torch.zeros(8_000_000, device="cuda")
    with AsyncSaver(tmp_path, keep_last=5) as saver:
        for step in range(1, 4):
            for _ in range(50):  # still under way on the device when the save begins
                tensor.add_(1)
            saver.save(step, {"model": {"w": tensor}}, {})
            tensor.mul_(1)
    for step in range(1, 4):
        found = load(tmp_path / checkpoint.folder_name(step)).tensors["model"]["w"]
        assert bool((found == 50 * step).all())


# --- model and optimiser ---


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.skipped = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor, *, skip: bool) -> Tensor:
        x = self.first(x)
        return self.norm(x if skip else self.skipped(x))


CONFIG = optim.OptimConfig(kind="adamw", lr=0.01, weight_decay=0.1)


def train(model: Layers, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad(set_to_none=True)
        (model(x, skip=step % 3 != 2) ** 3).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("until", [0, 1, 2, 3, 5])
def test_model_and_optimizer_go_on_bit_for_bit(tmp_path: Path, until: int) -> None:
    """Also before any update, and while a layer has had none yet (steps 0 and 1 skip it)."""
    torch.manual_seed(0)
    model = Layers()
    optimizer = optim.build(model, CONFIG, 0.01)
    train(model, optimizer, range(until))
    tensors, groups = checkpoint.optimizer_state(optimizer)
    assert any(name.endswith("skipped.weight") for name in tensors) == (until > 2)
    path = save(
        tmp_path, until, {"model": model.state_dict(), "optimizer": tensors}, {"groups": groups}, keep_last=1
    )
    train(model, optimizer, range(until, 8))

    torch.manual_seed(1)
    again = Layers()
    resumed = optim.build(again, CONFIG, 0.5)
    train(again, resumed, range(100, 103))  # a state of its own, to be replaced entirely
    found = load(path)
    checkpoint.load_model(again, found.tensors["model"])
    checkpoint.load_optimizer(resumed, found.tensors["optimizer"], found.data["groups"])
    assert resumed.param_groups[0]["lr"] == 0.01
    assert optim.updates_made(resumed) == until
    train(again, resumed, range(until, 8))
    assert_same({"": dict(again.state_dict())}, {"": dict(model.state_dict())})
    assert_same({"": checkpoint.optimizer_state(resumed)[0]}, {"": checkpoint.optimizer_state(optimizer)[0]})


def test_loading_copies(tmp_path: Path) -> None:
    model = Layers()
    optimizer = optim.build(model, CONFIG, 0.01)
    train(model, optimizer, range(4))
    tensors, groups = checkpoint.optimizer_state(optimizer)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    other = Layers()
    second = optim.build(other, CONFIG, 0.01)
    checkpoint.load_optimizer(second, kept, groups)
    before = {name: bits(tensor) for name, tensor in kept.items()}
    train(other, second, range(4, 6))
    assert {name: bits(tensor) for name, tensor in kept.items()} == before


def test_every_unfit_name_of_a_model_is_listed() -> None:
    model = Layers()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del tensors["first.weight"]
    tensors["second.weight"] = torch.zeros(2)
    tensors["norm.weight"] = torch.zeros(5)
    tensors["first.bias"] = torch.zeros(4, dtype=torch.float16)
    tensors["norm.bias"] += 1
    before = {name: bits(tensor) for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_model(model, tensors)
    text = str(caught.value)
    for part in (
        "missing: 'first.weight'",
        "unexpected: 'second.weight'",
        "'norm.weight': expected (4,)",
        "received (5,)",
        "'first.bias'",
        "float16",
    ):
        assert part in text
    assert {name: bits(tensor) for name, tensor in model.state_dict().items()} == before


def test_every_unfit_part_of_an_optimizer_is_listed() -> None:
    model = Layers()
    optimizer = optim.build(model, CONFIG, 0.01)
    train(model, optimizer, range(3))
    tensors, groups = checkpoint.optimizer_state(optimizer)
    before = {name: bits(tensor) for name, tensor in tensors.items()}
    bad = {name: tensor.clone() for name, tensor in tensors.items()}
    del bad["exp_avg.first.weight"]
    bad["exp_avg.unknown"] = torch.zeros(1)
    bad["exp_avg_sq.first.bias"] = torch.zeros(9)
    bad["step.norm.bias"] = torch.zeros(1)
    bad["nonsense"] = torch.zeros(1)
    other = json.loads(json.dumps(groups))
    other[0]["weight_decay"] = 0.3
    other[1]["params"].reverse()
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_optimizer(optimizer, bad, other)
    text = str(caught.value)
    for part in (
        "missing: 'exp_avg.first.weight'",
        "unexpected: 'exp_avg.unknown'",
        "'exp_avg_sq.first.bias'",
        "'step.norm.bias'",
        "unexpected: 'nonsense'",
        "matrices: weight_decay differs",
        "vectors: params differs",
    ):
        assert part in text
    assert {name: bits(t) for name, t in checkpoint.optimizer_state(optimizer)[0].items()} == before


@pytest.mark.parametrize("groups", [None, {}, [], [1, 2], [{}, {}], [{"lr": 1}, []]])
def test_groups_of_any_kind_are_refused(groups: object) -> None:
    optimizer = optim.build(Layers(), CONFIG, 0.01)
    with pytest.raises(CheckpointError):
        checkpoint.load_optimizer(optimizer, {}, groups)  # type: ignore[arg-type]


def test_a_learning_rate_that_is_no_number_is_refused() -> None:
    optimizer = optim.build(Layers(), CONFIG, 0.01)
    tensors, groups = checkpoint.optimizer_state(optimizer)
    groups[1]["lr"] = "0.1"
    with pytest.raises(CheckpointError, match="vectors: lr is no number"):
        checkpoint.load_optimizer(optimizer, tensors, groups)
