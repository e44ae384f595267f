# SPDX-License-Identifier: Apache-2.0
"""What a strategy may look at beside the token grid: how far the run is, the spectrogram, features of the encoder.

A strategy says in `needs` how much of it: "nothing" (its plan takes no view), "progress", "spectrogram", or "features".
Who draws the masks (the training step, `mask show`, a benchmark) supplies the view.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from masktrain.types import Spectrogram


@dataclass(frozen=True)
class View:
    """One micro-batch, as a strategy sees it.

    progress: share of the run's schedule that lies behind, in [0, 1]. spectrogram: the batch; mean, scale: the affine
    of its input norm, as the model applies it: (x - mean) * scale. Whoever can supply features overrides `features`.
    """

    progress: float
    spectrogram: Spectrogram
    mean: Tensor
    scale: Tensor

    def features(self, layer: int | None) -> Tensor:
        """Return (N, D) features of all tokens, unmasked and without gradient: the output of encoder layer `layer`,
        counted from 1, or of the last one for None (with the final norm, if there is one)."""
        raise NotImplementedError

    def stored_scores(self) -> Tensor | None:
        """Return (N,) float32 scores that were computed earlier for these tokens, or None where fresh ones are due."""
        return None
