# SPDX-License-Identifier: Apache-2.0
"""One recipe's training step on both sides: masktrain's and the plain one, of the same weights, input and masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.plain.mae import PlainMae
from benchmarks.plain.mae_ast import PlainMaeAst
from benchmarks.plain.ssast import PlainSsast
from masktrain.models import registry
from masktrain.models.adapters import mae, mae_ast, ssast
from masktrain.models.mae import MaeConfig
from masktrain.models.mae_ast import MaeAstConfig
from masktrain.models.ssast import SsastConfig
from masktrain.objectives.joint import JointConfig
from masktrain.objectives.registry import total
from masktrain.training import optim
from masktrain.training.recipe import Recipe
from masktrain.types import MaskPlan, Spectrogram, StepKey, cumulative

LR = 1e-4


class Side:
    """A model with its optimiser; a subclass says what its loss is."""

    model: nn.Module

    def __init__(self, recipe: Recipe) -> None:
        self.optimizer = optim.build(self.model, recipe.optim, LR)

    def loss(self, *, dropout: bool = True) -> Tensor:
        """Return the loss (), with the recipe's dropout or without any."""
        raise NotImplementedError

    def step(self) -> None:
        """Do a whole step on the same batch."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()


class Ours(Side):
    """masktrain's step on log-mels of noise. Its masks are drawn in each step, from the same key."""

    def __init__(self, recipe: Recipe, clips: int, frames: int, dtype: torch.dtype = torch.float32) -> None:
        """frames: of every clip, full columns."""
        self.recipe = recipe
        torch.manual_seed(0)
        self.model: Any = registry.build(recipe.model, recipe.grid, recipe.input_norm).to(dtype).train()
        norm, bins = self.model.input_norm, recipe.frontend.n_mels
        if norm.config.kind == "per_bin":
            norm.set_bins(-5 + torch.randn(bins), 1 + torch.rand(bins))
        lengths = (frames,) * clips
        self.spectrogram = Spectrogram(
            -5 + 2 * torch.randn(clips * frames, bins, dtype=dtype),
            lengths,
            cumulative(lengths, torch.int64, "cpu"),
            torch.arange(clips),
        )
        self.key = StepKey.make(0, 0, "cpu")
        super().__init__(recipe)

    def plans(self) -> tuple[MaskPlan, ...]:
        """Draw the masks."""
        layout = self.recipe.grid.layout(self.spectrogram)
        return tuple(self.recipe.masking.plan(layout, self.key, i) for i in range(self.model.config.masks))

    def affine(self) -> tuple[Tensor, Tensor]:
        """Return mean and scale of the input."""
        norm = self.model.input_norm
        mean, scale = norm.affine(norm.statistics(self.spectrogram.frames) if norm.uses_batch else None)
        return mean.to(self.spectrogram.frames.dtype), scale.to(self.spectrogram.frames.dtype)

    def loss(self, *, dropout: bool = True) -> Tensor:
        """See Side."""
        plans, (mean, scale) = self.plans(), self.affine()
        prediction = self.model(self.spectrogram, plans, mean, scale, self.key if dropout else None)
        terms = self.recipe.objective.terms(prediction, self.spectrogram, plans, mean, scale)
        return total(terms, self.recipe.objective.counts(plans, self.recipe.grid))

    def flops(self) -> int:
        """Return the operations of a step by the formula."""
        count: int = self.model.train_flops(self.plans())
        return count


class Plain(Side):
    """The plain step of `ours`: input and masks are ready, where ours normalises and draws.

    A model of one pass is compared with the published two: the second mask of these is the first one again, or with
    `second_mask` another.
    """

    def __init__(self, ours: Ours, *, second_mask: bool = False) -> None:
        recipe, grid, frames = ours.recipe, ours.recipe.grid, ours.spectrogram.lengths[0]
        dtype = ours.spectrogram.frames.dtype
        plans, clips = ours.plans(), len(ours.spectrogram.lengths)
        tokens = plans[0].layout.lengths[0]
        visible, masked = (
            [_by_clip(getattr(p, n), tokens, clips) for p in plans] for n in ("visible", "masked")
        )
        time = grid.order == "time"
        patch = (grid.patch_time, grid.patch_freq) if time else (grid.patch_freq, grid.patch_time)
        image = ours.spectrogram.frames.view(clips, frames, -1)
        config, state = recipe.model, ours.model.state_dict()
        if not isinstance(config, MaeAstConfig):  # whose batch norm is part of the model
            mean, scale = ours.affine()
            image = (image - mean) * scale
        image = (image if time else image.transpose(1, 2))[:, None].contiguous()
        self.arguments: tuple[Any, ...]
        if isinstance(config, MaeConfig):
            assert config.cls_token and config.key_bias
            assert config.positions == config.decoder_positions == "sincos_2d"
            self.model = PlainMae(config, tuple(image.shape[2:]), patch, recipe.objective.norm_pix_loss)
            theirs = mae.export_state(state, grid)
            noise = torch.rand(clips, tokens, dtype=dtype)
            noise.scatter_add_(1, visible[0], torch.full_like(noise, -1.0))
            self.arguments = image, noise, visible[0].shape[1]
        elif isinstance(config, SsastConfig):
            assert recipe.objective == JointConfig(info_nce_axis="predictions")
            sizes = config.embed_dim, config.ffn_dim, config.heads, config.encoder_layers
            self.model = PlainSsast(tokens, patch, *sizes)
            theirs = ssast.export_state(state, grid)
            if second_mask:
                assert config.passes == 1
                again = recipe.masking.plan(plans[0].layout, ours.key, 1)
                masked.append(_by_clip(again.masked, tokens, clips))
            self.arguments = image, masked[0], masked[-1]
        else:
            assert recipe.objective == JointConfig() and config.norm == "post"
            assert config.encoder_layerdrop == config.decoder_layerdrop == config.activation_dropout == 0
            self.model = PlainMaeAst(config, patch)
            theirs = mae_ast.export_state(state)
            self.arguments = image, torch.cat([visible[0], masked[0]], dim=1), visible[0].shape[1]
        # strict but for the batch norm's own counter
        missing, unknown = self.model.load_state_dict(theirs, strict=False)
        assert not unknown and set(missing) <= {"batch_norm.num_batches_tracked"}, (missing, unknown)
        self.model.to(dtype).train()
        super().__init__(recipe)

    def loss(self, *, dropout: bool = True) -> Tensor:
        """See Side."""
        for module in self.model.modules():
            # statistics are those of the batch in both
            module.training = dropout or isinstance(module, nn.BatchNorm2d)
        loss: Tensor = self.model(*self.arguments)
        return loss


def _by_clip(ids: Tensor, tokens: int, clips: int) -> Tensor:
    """Return (clips, n) int64, counted within each clip, of packed ids of clips of equal counts."""
    return ids.long().view(clips, -1) - tokens * torch.arange(clips)[:, None]
