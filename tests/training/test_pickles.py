# SPDX-License-Identifier: Apache-2.0
"""Pickles read as data: plain values come out as Python's own reader has them, and nothing named is imported or called."""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import pickle
import random
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from masktrain.training import pickles
from masktrain.training.pickles import Call, Name, Persistent, PickleError, read_pickle

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False)
    | st.text(max_size=6)
    | st.binary(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.tuples(inner)
        | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


def without_bytes(value: Any) -> bool:
    """Whether a pickle of every protocol holds it as it is: below protocol 3, bytes are a call."""
    if isinstance(value, dict):
        return all(map(without_bytes, value.values()))
    if isinstance(value, list | tuple):
        return all(map(without_bytes, value))
    return not isinstance(value, bytes)


@settings(max_examples=300, deadline=None)
@given(value=plain, protocol=st.integers(0, 5))
def test_plain_values_come_out_as_they_went_in(value: Any, protocol: int) -> None:
    if protocol >= 3 or without_bytes(value):
        assert read_pickle(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("protocol", range(6))
def test_objects_are_records(protocol: int) -> None:
    space = argparse.Namespace(lr=1.0, names=["a"])
    ordered = collections.OrderedDict(a=1, b=[2])
    got = read_pickle(pickle.dumps({"args": space, "state": ordered, "set": {1}, "type": Path}, protocol))
    assert isinstance(got["args"], Call)
    assert got["args"].state == {"lr": 1.0, "names": ["a"]}
    assert got["args"].name in ("argparse.Namespace", "copy_reg._reconstructor", "copyreg._reconstructor")
    assert got["state"].name == "collections.OrderedDict"
    held = got["state"].items or dict(got["state"].args[0])  # protocol 0 and 1 give the pairs as an argument
    assert held == {"a": 1, "b": [2]}
    assert isinstance(got["set"], Call)
    assert got["type"] == Name("pathlib.Path")


def test_shared_values_stay_shared() -> None:
    inner = [1]
    got = read_pickle(pickle.dumps([inner, inner]))
    assert got[0] is got[1]


def test_references_are_kept() -> None:
    class Writer(pickle.Pickler):
        def persistent_id(self, value: object) -> object:
            return ("storage", 7) if value == "there" else None

    import io

    stream = io.BytesIO()
    Writer(stream).dump(["there", "here"])
    assert read_pickle(stream.getvalue()) == [Persistent(("storage", 7)), "here"]


class Runs:
    """What its pickle runs when it is read in the usual way."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.called = function, args

    def __reduce__(self) -> Any:
        return self.called


class Chained:
    """A call of what a call returns, with a state and items."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Runs, (os.mkdir, str(self.marker)), {"state": Runs(os.mkdir, str(self.marker))}


BOMBS = {
    "mkdir": lambda m: pickle.dumps(Runs(os.mkdir, str(m))),
    "system": lambda m: pickle.dumps(Runs(os.system, f"mkdir {m}")),
    "eval": lambda m: pickle.dumps(Runs(eval, f"__import__('os').mkdir({str(m)!r})")),
    "state": lambda m: pickle.dumps(Chained(m)),
    "opcode INST": lambda m: b"(S" + repr(str(m)).encode() + b"\nios\nmkdir\n.",
    "opcode OBJ": lambda m: b"(cos\nmkdir\nS" + repr(str(m)).encode() + b"\no.",
    "opcode NEWOBJ": lambda m: b"\x80\x02cos\nmkdir\nX" + len(str(m)).to_bytes(4, "little") + str(m).encode() + b"\x85\x81.",
    "build then call": lambda m: b"\x80\x02cos\nmkdir\n)\x81}b(S" + repr(str(m)).encode() + b"\ntR.",
    "string that names": lambda m: b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93(X" + len(str(m)).to_bytes(4, "little") + str(m).encode() + b"tR.",
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
def test_nothing_is_run(kind: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    content = BOMBS[kind](marker)
    with contextlib.suppress(PickleError):
        read_pickle(content)
    assert not marker.exists()
    if kind not in ("opcode OBJ", "opcode NEWOBJ", "build then call"):  # those fail there, too
        pickle.loads(content)
        assert marker.exists()  # the payload does work


def test_nothing_is_imported() -> None:
    for module in ("this", "antigravity"):
        sys.modules.pop(module, None)
        got = read_pickle(b"\x80\x02c" + module.encode() + b"\nx\n)R.")
        assert got.name == f"{module}.x"
        assert module not in sys.modules


REFUSED = {
    "empty": b"",
    "no end": b"\x80\x02}",
    "nothing on the stack": b".",
    "two on the stack": b"NN.",
    "open mark": b"(N.",
    "pop of nothing": b"0.",
    "mark of nothing": b"1.",
    "memo of nothing": b"h\x05.",
    "tuple of nothing": b"\x87.",
    "set in a list": b"]X\x01\x00\x00\x00aNs.",
    "append to a dict": b"}Na.",
    "append to nothing": b"Na.",
    "state of a list": b"]}b.",
    "odd pairs": b"}(NNNu.",
    "extension": b"\x82\x01.",
    "buffer": b"\x97.",
    "unknown": b"\xff.",
    "text cut short": b"X\xff\xff\xff\x7fabc",
    "long cut short": b"\x8b\xff\xff\xff\x7f" + b"1" * 9,
    "8-byte length": b"\x8e" + b"\xff" * 8 + b"a.",
    "negative length": b"T\xff\xff\xff\xff.",
    "no number": b"Ix\n.",
    "digits": b"L" + b"9" * 100_000 + b"L\n.",
    "utf-8": b"X\x01\x00\x00\x00\xff.",
    "name that is none": b"\x80\x04K\x01K\x02\x93.",
    "trash": bytes(range(256)),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_pickle(kind: str) -> None:
    with pytest.raises(PickleError) as caught:
        read_pickle(REFUSED[kind])
    assert len(str(caught.value)) < 200


def test_announced_sizes_take_no_memory() -> None:
    tracemalloc.start()
    for content in (
        b"N" + b"r\xff\xff\xff\x7f" + b".",  # a memo index of 2^31
        b"X\xff\xff\xff\x7fabc",
        b"\x96" + b"\xff" * 7 + b"\x00a.",
    ):
        with contextlib.suppress(PickleError):
            read_pickle(content)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.timeout(20)
def test_deep_and_doubling_nests() -> None:
    deep = read_pickle(b"]" * 100_000 + b"a" * 99_999 + b".")
    assert len(deep) == 1
    del deep
    # each tuple holds the one before twice: 2^200 to whom follows them all, as a hash would
    content = b"\x80\x02}" + b"N" + b"2\x86" * 200 + b"Ns."
    assert read_pickle(content) == {}


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MAX_BYTES", 100)
    monkeypatch.setattr(pickles, "MAX_OPERATIONS", 50)
    with pytest.raises(PickleError, match="bytes"):
        read_pickle(b"N" * 101)
    with pytest.raises(PickleError, match="operations"):
        read_pickle(b"N" + b"0N" * 40 + b".")
    assert read_pickle(b"N" + b"0N" * 20 + b".") is None


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_damaged_pickles_are_refused_or_read() -> None:
    """Flipped, cut and shuffled bytes of a real one: a value or PickleError, and nothing else."""
    good = pickle.dumps({"a": collections.OrderedDict(w=[1, 2.5, "x"]), "n": argparse.Namespace(b=1)}, 2)
    rng = random.Random(0)
    refused = 0
    for _ in range(3000):
        bad = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        try:
            read_pickle(bytes(bad[: rng.randint(1, len(bad))] if rng.random() < 0.3 else bad))
        except PickleError:
            refused += 1
    assert refused > 1000
