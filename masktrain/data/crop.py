# SPDX-License-Identifier: Apache-2.0
"""Where a clip is cut, in source samples: integers only, so the same on every machine."""

from __future__ import annotations

from fractions import Fraction

from masktrain.kernels.philox import Purpose, host_words


def crop_length(num_samples: int, sample_rate: int, clip_seconds: float | None) -> int:
    """Return the samples of a crop: `clip_seconds` at the file's own rate, at most the file; None: the
    file."""
    if clip_seconds is None:
        return num_samples
    return min(num_samples, max(1, round(clip_seconds * sample_rate)))


def crop_start(
    seed: int,
    epoch: int,
    clip_id: int,
    num_samples: int,
    length: int,
    column: Fraction = Fraction(1),
) -> int:
    """Return the first sample of the random crop of a clip in an epoch, uniform over the multiples of `column`
    samples in [0, num_samples - length], each rounded down.

    Two 32-bit words make one of 64 bits, w, and with n places the start is that of place (w n) >> 64: the share
    of no place differs from another's by more than 2^-64, however long the file.
    """
    places = int((num_samples - length) / column) + 1
    if places == 1:
        return 0
    high, low = host_words(seed, epoch, clip_id, 2, purpose=Purpose.CROP)
    return int(((high << 32 | low) * places >> 64) * column)
