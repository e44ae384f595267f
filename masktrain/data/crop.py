# SPDX-License-Identifier: Apache-2.0
"""Where a clip is cut, in source samples: integers only, so the same on every machine."""

from __future__ import annotations

from masktrain.kernels.philox import Purpose, host_words


def crop_length(num_samples: int, sample_rate: int, clip_seconds: float | None) -> int:
    """Return the samples of a crop: `clip_seconds` at the file's own rate, at most the file; None: the
    file."""
    if clip_seconds is None:
        return num_samples
    return min(num_samples, max(1, round(clip_seconds * sample_rate)))


def crop_start(seed: int, epoch: int, clip_id: int, num_samples: int, length: int) -> int:
    """Return the first sample of the random crop of a clip in an epoch, uniform over [0, num_samples -
    length].

    Two 32-bit words make one of 64 bits, w, and the start is (w (num_samples - length + 1)) >> 64: the share
    of no start differs from another's by more than 2^-64, however long the file.
    """
    places = num_samples - length + 1
    if places == 1:
        return 0
    high, low = host_words(seed, epoch, clip_id, 2, purpose=Purpose.CROP)
    return ((high << 32 | low) * places) >> 64
