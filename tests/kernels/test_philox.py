# SPDX-License-Identifier: Apache-2.0
"""Random words: the published vectors, one set of bits from every implementation, and uniformity."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from masktrain.kernels import _native
from masktrain.kernels.philox import Purpose, host_words, philox_words, uniform
from masktrain.kernels.philox.reference import philox_4x32

IMPLEMENTATIONS = ["reference"] + (["native"] if _native.cpu() else [])

# Counter, key and result of Philox 4x32-10 as Random123 publishes them (its kat_vectors).
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]

seeds = st.integers(0, 2**48 - 1)
words32 = st.integers(0, 2**32 - 1)


def hexes(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def key(seed: int, step: int) -> Tensor:
    return torch.tensor([seed, step])


@pytest.fixture(params=range(3), ids=["base", "avx2", "avx512"])
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    """Each instruction set of the native library that this CPU has."""
    library = _native.cpu()
    if library is None:
        pytest.skip(f"{_native.why_not()}")
    best = library.mt_cpu_level()
    if library.mt_set_cpu_level(request.param) != request.param:
        pytest.skip(f"this CPU has {_native.LEVELS[best]} at most")
    yield request.param
    library.mt_set_cpu_level(best)


@pytest.mark.parametrize(("counter", "keys", "expected"), KNOWN_ANSWERS)
def test_published_vectors_on_ints_and_tensors(counter: str, keys: str, expected: str) -> None:
    arguments = hexes(counter) + hexes(keys)
    assert list(philox_4x32(*arguments)) == hexes(expected)
    assert [int(w) for w in philox_4x32(*(torch.tensor(a) for a in arguments))] == hexes(expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_published_zero_vector_through_the_op(implementation: str) -> None:
    """The only published counter whose block is near the beginning of a stream."""
    words = philox_words(key(0, 0), torch.tensor([0]), 4, purpose=0, implementation=implementation)
    assert words[0].tolist() == hexes(KNOWN_ANSWERS[0][2])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_each_field_has_its_place(implementation: str) -> None:
    """Word by word against the plain block function, with a different value in every field."""
    seed, step, clip, purpose, stream = 0xABCD_12345678, 0x11111111, 0x22222222, 0x3333, 0x44444444
    words = philox_words(
        key(seed, step),
        torch.tensor([clip]),
        11,
        purpose=purpose,
        stream=stream,
        implementation=implementation,
    )
    for position in range(11):
        block = philox_4x32(position // 4, stream, clip, step, 0x12345678, 0x3333_ABCD)
        assert int(words[0, position]) == block[position % 4]


@settings(max_examples=60, deadline=None)
@given(
    seed=seeds,
    step=words32,
    ids=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5),
    n=st.integers(0, 70),
    purpose=st.sampled_from(Purpose),
    stream=words32,
)
def test_native_reference_and_host_agree(
    seed: int, step: int, ids: list[int], n: int, purpose: Purpose, stream: int
) -> None:
    tensor_ids = torch.tensor(ids, dtype=torch.int64)
    expected = [host_words(seed, step, i, n, purpose=purpose, stream=stream) for i in ids]
    for implementation in IMPLEMENTATIONS:
        got = philox_words(
            key(seed, step), tensor_ids, n, purpose=purpose, stream=stream, implementation=implementation
        )
        assert got.shape == (len(ids), n) and got.dtype == torch.int64
        assert got.tolist() == expected


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 31, 32, 33, 63, 64, 65, 511, 512, 513, 4099])
def test_every_instruction_set_gives_the_same_bits(level: int, n: int) -> None:
    arguments = (key(2**48 - 1, 2**32 - 1), torch.tensor([0, 1, 2**32 - 1, -1, 7]), n)
    options = {"purpose": Purpose.MASK, "stream": 2**32 - 1}
    native = philox_words(*arguments, **options, implementation="native")
    assert torch.equal(native, philox_words(*arguments, **options, implementation="reference"))


@pytest.mark.skipif(_native.cpu() is None, reason="no native library")
def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    arguments = (key(5, 6), torch.arange(40), 1001)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(philox_words(*arguments, purpose=Purpose.MASK, implementation="native"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_strided_ids_and_counter(implementation: str) -> None:
    ids, counter = torch.arange(20)[::3], torch.tensor([5, 0, 6, 0])[::2]
    got = philox_words(counter, ids, 9, purpose=Purpose.MASK, implementation=implementation)
    expected = philox_words(key(5, 6), ids.clone(), 9, purpose=Purpose.MASK, implementation=implementation)
    assert torch.equal(got, expected)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, step=words32, clip=words32, n=st.integers(1, 40), longer=st.integers(0, 40))
def test_a_shorter_draw_is_the_beginning_of_a_longer_one(
    seed: int, step: int, clip: int, n: int, longer: int
) -> None:
    short = host_words(seed, step, clip, n, purpose=Purpose.CROP)
    assert host_words(seed, step, clip, n + longer, purpose=Purpose.CROP)[:n] == short


def test_any_change_of_the_key_changes_the_words() -> None:
    base = {"seed": 3, "step": 4, "id": 5, "n": 4, "purpose": Purpose.CROP, "stream": 6}
    seen = {tuple(host_words(**base))}
    for change in (
        {"seed": 4},
        {"seed": 3 + 2**32},
        {"seed": 3 + 2**47},
        {"step": 5},
        {"id": 6},
        {"purpose": Purpose.MASK},
        {"stream": 7},
    ):
        seen.add(tuple(host_words(**(base | change))))
    assert len(seen) == 8


def test_purposes_are_distinct() -> None:
    """Their numbers are part of the recorded randomness of every run, and of csrc."""
    assert {p.name: p.value for p in Purpose} == {
        "ORDER": 1,
        "CROP": 2,
        "REPLACE": 3,
        "MASK": 4,
        "MASK_SHAPE": 5,
        "DROPOUT": 6,
        "ATTENTION_DROPOUT": 7,
        "LAYERDROP": 8,
        "INIT": 9,
        "DEMO": 10,
        "FRAME_CROP": 11,
        "BASELINE": 12,
        "AUGMENT": 13,
        "MEL_JITTER": 14,
    }


def test_uniform_is_the_word_over_two_to_the_32() -> None:
    ids = torch.arange(50)
    u = uniform(key(1, 2), ids, 33, purpose=Purpose.MASK)
    words = philox_words(key(1, 2), ids, 33, purpose=Purpose.MASK)
    assert u.dtype == torch.float64 and float(u.min()) >= 0 and float(u.max()) < 1
    assert torch.equal((u * 2**32).to(torch.int64), words)


def test_words_are_uniform_and_uncorrelated() -> None:
    """Chi-square of the upper 8 bits in each of three directions, and correlations between neighbours."""
    u = uniform(key(11, 12), torch.arange(256), 1024, purpose=Purpose.MASK)
    for name, values in (("all", u.flatten()), ("first of each id", u[:, 0]), ("of one id", u[0])):
        bins = 256 if name == "all" else 16
        counts = torch.bincount((values * bins).long(), minlength=bins).double()
        expected = values.numel() / bins
        chi2 = float(((counts - expected) ** 2 / expected).sum())
        z = (chi2 - (bins - 1)) / math.sqrt(2 * (bins - 1))
        assert abs(z) < 5, name
    centred = u - 0.5
    for a, b in ((centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1])):
        z = float((a * b).sum()) / (math.sqrt(a.numel()) / 12)
        assert abs(z) < 5


@pytest.mark.skipif(_native.cpu() is None, reason="no native library")
def test_opcheck() -> None:
    arguments = (key(5, 6), torch.arange(3), 9, int(Purpose.MASK), 4)
    torch.library.opcheck(torch.ops.masktrain.philox_words.default, arguments)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_compiled_once_for_all_steps(implementation: str) -> None:
    def draw(counter: Tensor, ids: Tensor) -> Tensor:
        return philox_words(counter, ids, 9, purpose=Purpose.MASK, implementation=implementation)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(draw, fullgraph=True)
    ids, seen = torch.arange(4), set()
    for step in range(4):
        words = compiled(key(2**47 + 3, step), ids)
        assert torch.equal(words, draw(key(2**47 + 3, step), ids))
        seen.add(tuple(words.flatten().tolist()))
    assert len(seen) == 4
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"counter": torch.zeros(3, dtype=torch.int64)}, ValueError, "counter must have shape"),
        ({"counter": torch.zeros(2)}, TypeError, "counter must be int64"),
        ({"counter": [1, 2]}, TypeError, "counter must be a tensor"),
        ({"ids": torch.zeros(2, dtype=torch.int32)}, TypeError, "ids must be int64"),
        ({"ids": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, "ids must have shape"),
        ({"ids": torch.zeros(2, dtype=torch.int64, device="meta")}, ValueError, "counter must be on meta"),
        ({"n": -1}, ValueError, "n must be at least 0"),
        ({"purpose": 1 << 16}, ValueError, "purpose must lie in"),
        ({"stream": -1}, ValueError, "stream must lie in"),
    ],
)
def test_wrong_arguments_are_named(change: dict, error: type[Exception], match: str) -> None:
    arguments = {"counter": key(1, 2), "ids": torch.arange(2), "n": 3, "purpose": 4, "stream": 0} | change
    with pytest.raises(error, match=f"philox_words: {match}"):
        philox_words(**arguments)
