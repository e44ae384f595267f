# SPDX-License-Identifier: Apache-2.0
"""Linear classifiers on frozen features, many at once: every seed, split, layer and learning rate is one run of a
batch, and one step is one batched product for all of them.

The protocol is EVAR's (nttcslab/eval-audio-repr: lineareval.py; daisukelab/general-learning: MLP/torch_mlp_clf2.py):
features standardised on the training part, one linear layer, Adam with a fixed rate and weight decay 1e-8 in its L2
form, batches of 200, at most 200 epochs, stop after 20 epochs without improvement of the metric on a validation part
(a random tenth of the training part where the task brings none), best weights restored. The loss is the mean over
clips and classes of -y log softmax, binary cross-entropy for several labels a clip.

EVAR's quirks are behind `evar_compat`, see `ProbeConfig`. Random streams are our own: one for each seed and split,
so that runs of one seed and split that differ in layer, head or rate see the same splits, batches and (for equal
widths) initial weights, and can be compared in pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from masktrain.errors import ConfigError, DataError
from masktrain.evaluation.metrics import (
    accuracy,
    average_precisions,
    batched_accuracy,
    batched_average_precision,
)

Array = NDArray[Any]
Tensors = dict[str, Tensor]

BETAS, EPSILON = (0.9, 0.999), 1e-8  # Adam's, as torch has them
SPLIT_ATTEMPTS = 100  # random validation parts tried for one with every class
GROUP_BYTES = 1 << 29  # of gathered features that are trained on at once


@dataclass(frozen=True)
class ProbeConfig:
    """epochs: at most. patience: epochs without improvement that end a run. batch_size: at most.

    evar_compat reproduces EVAR: metrics are computed on float32 sigmoids, which saturate, and the first of several
    saturated classes wins; the scaler is fitted, and the batch size taken, before the validation part is split off;
    an epoch that reaches the best value again counts as an improvement. Without it metrics come from logits, scaler
    and batch size from the clips that are trained on, and among epochs of the same metric the lower validation loss
    is the better one.
    """

    epochs: int = 200
    patience: int = 20
    batch_size: int = 200
    weight_decay: float = 1e-8
    valid_share: float = 0.1
    evar_compat: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "patience", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: must be at least 1; received {getattr(self, name)}.")
        if not 0 < self.valid_share < 1:
            raise ConfigError(f"valid_share: must lie between 0 and 1; received {self.valid_share}.")
        if not (self.weight_decay >= 0 and math.isfinite(self.weight_decay)):
            raise ConfigError(f"weight_decay: must be at least 0; received {self.weight_decay}.")


@dataclass(frozen=True, eq=False)
class Run:
    """One classifier to train. train, valid, test: rows of the features; valid None: split off from train.
    split: number of the split, part of the random stream. layer: which feature matrix. lr: learning rate."""

    train: Array
    valid: Array | None
    test: Array
    seed: int
    split: int = 0
    layer: int = 0
    lr: float = 3e-4


@dataclass(frozen=True, eq=False)
class Fit:
    """A run and what came of it. score: on the test rows. outputs: (n_test, K) float32, what the score was computed
    from: logits, or their sigmoids with evar_compat. best_epoch: counted from 0. valid, valid_loss: of that epoch.
    parameters: the head's, of that epoch."""

    run: Run
    score: float
    outputs: Array
    best_epoch: int
    epochs_run: int
    valid: float
    valid_loss: float
    parameters: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Epoch:
    """An epoch of the runs that still train: for progress and for tests. runs: their places in the list of runs.
    parameters: (R, ...) after the epoch. train_loss: (R,) mean over the epoch's batches, each before its step.
    valid: (R,) metric after the epoch. All live: copy what is kept."""

    number: int
    runs: Sequence[int]
    parameters: Mapping[str, Tensor]
    train_loss: Tensor
    valid: Tensor


# --- heads ---


class Head(Protocol):
    """What stands between the features and the loss. Tensors of R runs have a leading dimension R."""

    device: torch.device
    clips: int

    def bytes_per_clip(self) -> int:
        """Return the bytes that one run gathers for one clip of a batch."""
        ...

    def constants(self, runs: Sequence[Run], fitted_on: Sequence[Array]) -> Tensors:
        """Return what stays fixed while training: the scalers, fitted on the given rows."""
        ...

    def initial(self, runs: Sequence[Run], classes: int, generators: Sequence[torch.Generator]) -> Tensors:
        """Return the initial parameters."""
        ...

    def logits(
        self, parameters: Mapping[str, Tensor], constants: Mapping[str, Tensor], rows: Tensor
    ) -> Tensor:
        """Return (R, b, K) for (R, b) int64 rows of the features."""
        ...


def _scaler(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return (D,) mean and population standard deviation of (n, D) in float64; 1 for a constant column, found as
    scikit-learn's StandardScaler finds it."""
    values = values.double()
    mean, variance = values.mean(0), values.var(0, correction=0)
    eps = torch.finfo(torch.float64).eps
    constant = variance <= len(values) * eps * variance + (len(values) * mean * eps) ** 2
    return mean, torch.where(constant, 1.0, variance).sqrt()


def _stacked(scalers: list[tuple[Tensor, Tensor]]) -> Tensors:
    return {
        "mean": torch.stack([mean for mean, _ in scalers]).float(),
        "scale": torch.stack([scale for _, scale in scalers]).float(),
    }


def _linear(width: int, classes: int, generators: Sequence[torch.Generator], device: torch.device) -> Tensors:
    """Return weights (R, K, D) and biases (R, K) as torch.nn.Linear draws them: uniform within 1 / sqrt(D)."""
    bound = 1 / math.sqrt(width)
    weights = [torch.rand(classes, width, generator=g) for g in generators]
    biases = [torch.rand(classes, generator=g) for g in generators]
    return {
        "weight": ((2 * torch.stack(weights) - 1) * bound).to(device),
        "bias": ((2 * torch.stack(biases) - 1) * bound).to(device),
    }


def _classify(x: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    return torch.baddbmm(parameters["bias"][:, None], x, parameters["weight"].transpose(1, 2))


class LinearHead:
    """One linear layer on the features of one layer (`Run.layer`). features: (L, C, D) float32."""

    def __init__(self, features: Tensor) -> None:
        self.features = features.contiguous()
        self.device = features.device
        self.clips = features.shape[1]

    def bytes_per_clip(self) -> int:
        """Return the bytes that one run gathers for one clip of a batch."""
        return 4 * self.features.shape[2]

    def constants(self, runs: Sequence[Run], fitted_on: Sequence[Array]) -> Tensors:
        """Return mean and scale (R, D) of each run's layer."""
        known: dict[
            tuple[int, bytes], tuple[Tensor, Tensor]
        ] = {}  # runs that differ in the rate share theirs
        for run, rows in zip(runs, fitted_on, strict=True):
            key = (run.layer, rows.tobytes())
            if key not in known:
                known[key] = _scaler(self.features[run.layer, torch.from_numpy(rows).to(self.device)])
        scalers = [known[run.layer, rows.tobytes()] for run, rows in zip(runs, fitted_on, strict=True)]
        layer = torch.tensor([run.layer for run in runs], device=self.device)
        return {"layer": layer, **_stacked(scalers)}

    def initial(self, runs: Sequence[Run], classes: int, generators: Sequence[torch.Generator]) -> Tensors:
        """Return weight (R, K, D) and bias (R, K)."""
        return _linear(self.features.shape[2], classes, generators, self.device)

    def logits(
        self, parameters: Mapping[str, Tensor], constants: Mapping[str, Tensor], rows: Tensor
    ) -> Tensor:
        """Return (R, b, K)."""
        places = (constants["layer"][:, None] * self.clips + rows).flatten()
        x = self.features.flatten(0, 1).index_select(0, places).unflatten(0, rows.shape)
        # in place: these copies are most of the work
        return _classify(x.sub_(constants["mean"][:, None]).div_(constants["scale"][:, None]), parameters)


class WeightedHead:
    """A linear layer on the sum of all layers, each standardised, under softmax weights that are learned (SUPERB's
    weighting); it starts at equal weights. features: (L, C, D) float32."""

    def __init__(self, features: Tensor) -> None:
        self.features = features.transpose(0, 1).contiguous()
        self.device = features.device
        self.clips = features.shape[1]

    def bytes_per_clip(self) -> int:
        """Return the bytes that one run gathers for one clip of a batch."""
        return 4 * self.features[0].numel()

    def constants(self, runs: Sequence[Run], fitted_on: Sequence[Array]) -> Tensors:
        """Return mean and scale (R, L, D)."""
        scalers = [_scaler(self.features[torch.from_numpy(r).to(self.device)]) for r in fitted_on]
        return _stacked(scalers)

    def initial(self, runs: Sequence[Run], classes: int, generators: Sequence[torch.Generator]) -> Tensors:
        """Return weight (R, K, D), bias (R, K) and mix (R, L)."""
        _, layers, width = self.features.shape
        mix = torch.zeros(len(runs), layers, device=self.device)
        return _linear(width, classes, generators, self.device) | {"mix": mix}

    def logits(
        self, parameters: Mapping[str, Tensor], constants: Mapping[str, Tensor], rows: Tensor
    ) -> Tensor:
        """Return (R, b, K)."""
        x = self.features[rows].sub_(constants["mean"][:, None]).div_(constants["scale"][:, None])
        return _classify(torch.einsum("rbld,rl->rbd", x, parameters["mix"].softmax(1)), parameters)


class AttentiveHead:
    """A linear layer on the tokens of a clip, pooled by their softmax weights under one learned query.

    weight of token x: exp(q . (x / scale) / sqrt(D)). The query starts at 0, where the pooled vector is the mean of
    the tokens; mean and scale are those of the clips' mean vectors, so that this head starts as the linear one.
    tokens: (N, D) float32, packed. cu_tokens: C + 1 cumulative counts.
    """

    def __init__(self, tokens: Tensor, cu_tokens: Sequence[int]) -> None:
        counts = torch.tensor(cu_tokens).diff()
        if int(counts.min()) < 1:
            raise ValueError("AttentiveHead: a clip without tokens")
        self.tokens = tokens
        self.device = tokens.device
        self.clips = len(counts)
        self.longest = int(counts.max())
        self.counts = counts.to(self.device)
        self.starts = torch.tensor(cu_tokens[:-1], device=self.device)
        clip = torch.repeat_interleave(torch.arange(self.clips, device=self.device), self.counts)
        total = torch.zeros(self.clips, tokens.shape[1], device=self.device).index_add_(0, clip, tokens)
        self.means = total / self.counts[:, None]

    def bytes_per_clip(self) -> int:
        """Return the bytes that one run gathers for one clip of a batch."""
        return 4 * self.longest * self.tokens.shape[1]

    def constants(self, runs: Sequence[Run], fitted_on: Sequence[Array]) -> Tensors:
        """Return mean and scale (R, D)."""
        return _stacked([_scaler(self.means[torch.from_numpy(r).to(self.device)]) for r in fitted_on])

    def initial(self, runs: Sequence[Run], classes: int, generators: Sequence[torch.Generator]) -> Tensors:
        """Return weight (R, K, D), bias (R, K) and query (R, D)."""
        width = self.tokens.shape[1]
        query = torch.zeros(len(runs), width, device=self.device)
        return _linear(width, classes, generators, self.device) | {"query": query}

    def logits(
        self, parameters: Mapping[str, Tensor], constants: Mapping[str, Tensor], rows: Tensor
    ) -> Tensor:
        """Return (R, b, K)."""
        places = torch.arange(self.longest, device=self.device)
        inside = places < self.counts[rows][..., None]
        x = self.tokens[torch.where(inside, self.starts[rows][..., None] + places, 0)]
        query = parameters["query"] / constants["scale"] / math.sqrt(x.shape[-1])
        score = torch.einsum("rbtd,rd->rbt", x, query).masked_fill(~inside, -torch.inf)
        pooled = torch.einsum("rbt,rbtd->rbd", score.softmax(-1), x)
        return _classify((pooled - constants["mean"][:, None]) / constants["scale"][:, None], parameters)


# --- training ---


def train(
    head: Head,
    labels: Array,
    classes: int,
    runs: Sequence[Run],
    config: ProbeConfig,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> list[Fit]:
    """Train all runs together and return what came of each, in their order.

    labels: (C,) class indices, or (C, K) 0 or 1. Runs beyond what fits in `GROUP_BYTES` follow in a second batch;
    a run does not depend on the others. Raises DataError for a split that no classifier can be trained on.
    """
    batch = min(config.batch_size, max((len(run.train) for run in runs), default=1))
    group = max(1, GROUP_BYTES // (batch * head.bytes_per_clip()))
    fits: list[Fit] = []
    for start in range(0, len(runs), group):
        places = range(start, min(start + group, len(runs)))
        chosen = [runs[place] for place in places]
        fits += _Trainer(head, labels, classes, chosen, config, places).fit(on_epoch)
    return fits


@dataclass(eq=False)
class _State:
    """One run on the host. stream: of its initial weights and batches. best: metric of the best epoch, and the
    negative loss that decides between equal metrics (0 with evar_compat: the later epoch wins)."""

    run: Run
    train: Array
    valid: Array
    batch: int
    stream: torch.Generator
    steps: int = 0
    best: tuple[float, float] = (-math.inf, -math.inf)
    best_epoch: int = -1
    valid_loss: float = math.inf
    waited: int = 0
    epochs_run: int = 0
    parameters: Tensors = field(default_factory=dict)


class _Trainer:
    """The runs of one group. Everything with a leading R holds the runs that still train (`active`)."""

    def __init__(
        self,
        head: Head,
        labels: Array,
        classes: int,
        runs: Sequence[Run],
        config: ProbeConfig,
        places: Sequence[int],
    ) -> None:
        self.head, self.config, self.places = head, config, places
        self.multi = labels.ndim == 2
        self.host_labels = labels
        target = labels.astype(bool) if self.multi else labels.astype(np.int64)
        self.labels = torch.from_numpy(target).to(head.device)
        self.states = [_prepared(run, labels, config) for run in runs]
        fitted_on = [
            run.train if config.evar_compat else s.train for run, s in zip(runs, self.states, strict=True)
        ]
        self.constants = self.constants_of_all = head.constants(runs, fitted_on)
        self.parameters = head.initial(runs, classes, [state.stream for state in self.states])
        self.moments = {
            name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self.parameters.items()
        }
        self.best = {name: p.clone() for name, p in self.parameters.items()}
        self.active = list(range(len(runs)))

    def fit(self, on_epoch: Callable[[Epoch], None] | None) -> list[Fit]:
        for number in range(self.config.epochs):
            loss = self._train_epoch()
            metric, valid_loss = self._validate()
            if on_epoch is not None:
                runs = [self.places[index] for index in self.active]
                on_epoch(Epoch(number, runs, self.parameters, loss, metric))
            self._judge(number, metric.tolist(), valid_loss.tolist())
            if not self.active:
                break
        self._retire(range(len(self.active)))
        return self._test()

    def _train_epoch(self) -> Tensor:
        states = [self.states[index] for index in self.active]
        orders = [
            state.train[torch.randperm(len(state.train), generator=state.stream).numpy()] for state in states
        ]
        steps = max(math.ceil(len(s.train) / s.batch) for s in states)
        total = torch.zeros(len(states), dtype=torch.float64, device=self.head.device)
        for step in range(steps):
            batches = [o[step * s.batch : (step + 1) * s.batch] for o, s in zip(orders, states, strict=True)]
            rows, counted = _padded(batches, self.head.device)
            live = {name: p.detach().requires_grad_() for name, p in self.parameters.items()}
            losses = self._losses(self.head.logits(live, self.constants, rows), rows, counted)
            gradients = torch.autograd.grad(losses.sum(), list(live.values()))
            self._adam(states, dict(zip(live, gradients, strict=True)), [len(b) > 0 for b in batches])
            total += losses.detach()
        # a run's mean over its own batches: it had none in the steps beyond them, where its loss is 0
        return total / total.new_tensor([math.ceil(len(s.train) / s.batch) for s in states])

    def _losses(self, logits: Tensor, rows: Tensor, counted: Tensor) -> Tensor:
        """Return (R,) mean losses over clips and classes."""
        if self.multi:
            target = self.labels[rows].to(logits.dtype)
            each = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(
                -1
            )
        else:
            each = -logits.log_softmax(-1).gather(-1, self.labels[rows][..., None]).squeeze(-1)
        return (each * counted).sum(1) / (counted.sum(1).clamp(min=1) * logits.shape[-1])

    def _adam(self, states: Sequence[_State], gradients: Tensors, stepped: list[bool]) -> None:
        """Take Adam's step in the runs that had a batch."""
        for state, had in zip(states, stepped, strict=True):
            state.steps += had
        device = self.head.device
        first, second = BETAS
        # of a run without a step yet the sizes are of no use, but must be numbers
        counts = [max(1, state.steps) for state in states]
        size = torch.tensor(
            [s.run.lr / (1 - first**n) for s, n in zip(states, counts, strict=True)], device=device
        )
        root = torch.tensor([math.sqrt(1 - second**n) for n in counts], device=device)
        moved = None if all(stepped) else torch.tensor(stepped, device=device)
        for name, gradient in gradients.items():
            value, (m, v) = self.parameters[name], self.moments[name]
            shape = (-1,) + (1,) * (value.dim() - 1)
            gradient = gradient + self.config.weight_decay * value
            new_m = m.lerp(gradient, 1 - first)
            new_v = (second * v).addcmul(gradient, gradient, value=1 - second)
            new = value - size.view(shape) * new_m / (new_v.sqrt() / root.view(shape) + EPSILON)
            if moved is not None:
                still = ~moved.view(shape)
                new, new_m, new_v = (
                    torch.where(still, old, fresh) for old, fresh in ((value, new), (m, new_m), (v, new_v))
                )
            self.parameters[name], self.moments[name] = new, (new_m, new_v)

    @torch.no_grad()
    def _validate(self) -> tuple[Tensor, Tensor]:
        """Return (R,) metric and mean loss on the validation parts."""
        rows, counted = _padded([self.states[index].valid for index in self.active], self.head.device)
        pieces = [
            self.head.logits(self.parameters, self.constants, piece)
            for piece in rows.split(self.config.batch_size, dim=1)
        ]
        logits = torch.cat(pieces, 1)
        scores = self._scores(logits)
        if self.multi:
            precisions = batched_average_precision(scores, self.labels[rows], counted)
            # a class without positives says nothing; EVAR (scikit-learn's 0 for it) lets it count
            metric = precisions.nan_to_num(0.0).mean(1) if self.config.evar_compat else precisions.nanmean(1)
        else:
            metric = batched_accuracy(scores, self.labels[rows], counted)
        return metric, self._losses(logits, rows, counted)

    def _scores(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self.config.evar_compat else logits

    def _judge(self, number: int, metrics: list[float], losses: list[float]) -> None:
        """Keep the parameters of the runs that improved, and end those that waited long enough."""
        improved, ended = [], []
        for place, (index, metric, loss) in enumerate(zip(self.active, metrics, losses, strict=True)):
            state = self.states[index]
            state.epochs_run = number + 1
            value = (metric, 0.0 if self.config.evar_compat else -loss)
            if value > state.best or (self.config.evar_compat and value == state.best):
                state.best, state.best_epoch, state.valid_loss, state.waited = value, number, loss, 0
                improved.append(place)
            else:
                state.waited += 1
                if state.waited >= self.config.patience:
                    ended.append(place)
        if improved:
            places = torch.tensor(improved, device=self.head.device)
            for name, kept in self.best.items():
                kept[places] = self.parameters[name][places]
        if ended:
            self._retire(ended)

    def _retire(self, places: Sequence[int]) -> None:
        """Take runs out of the batch."""
        for place in places:
            self.states[self.active[place]].parameters = {
                n: kept[place].clone() for n, kept in self.best.items()
            }
        gone = set(places)
        stay = [place for place in range(len(self.active)) if place not in gone]
        self.active = [self.active[place] for place in stay]
        rows = torch.tensor(stay, dtype=torch.int64, device=self.head.device)
        self.constants = {name: value[rows] for name, value in self.constants.items()}
        self.parameters = {name: value[rows] for name, value in self.parameters.items()}
        self.best = {name: value[rows] for name, value in self.best.items()}
        self.moments = {name: (m[rows], v[rows]) for name, (m, v) in self.moments.items()}

    @torch.no_grad()
    def _test(self) -> list[Fit]:
        fits = []
        for index, state in enumerate(self.states):
            parameters = {name: value[None] for name, value in state.parameters.items()}
            constants = {name: value[index : index + 1] for name, value in self.constants_of_all.items()}
            rows = torch.from_numpy(state.run.test).to(self.head.device)[None]
            pieces = rows.split(self.config.batch_size, dim=1)
            logits = torch.cat([self.head.logits(parameters, constants, piece) for piece in pieces], 1)
            outputs = self._scores(logits)[0].cpu().numpy()
            truth = self.host_labels[state.run.test]
            fits.append(
                Fit(
                    run=state.run,
                    score=self._score(outputs, truth),
                    outputs=outputs,
                    best_epoch=state.best_epoch,
                    epochs_run=state.epochs_run,
                    valid=state.best[0],
                    valid_loss=state.valid_loss,
                    parameters=state.parameters,
                )
            )
        return fits

    def _score(self, outputs: Array, truth: Array) -> float:
        if not self.multi:
            return accuracy(outputs, truth)
        precisions = average_precisions(outputs, truth)
        return float(np.nan_to_num(precisions).mean() if self.config.evar_compat else np.nanmean(precisions))


def _padded(rows: Sequence[Array], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (R, longest) int64 rows, 0 behind the end of each, and (R, longest) bool, False there."""
    longest = max(len(r) for r in rows)
    out = np.zeros((len(rows), longest), dtype=np.int64)
    counted = np.zeros((len(rows), longest), dtype=bool)
    for place, r in enumerate(rows):
        out[place, : len(r)] = r
        counted[place, : len(r)] = True
    return torch.from_numpy(out).to(device), torch.from_numpy(counted).to(device)


def _prepared(run: Run, labels: Array, config: ProbeConfig) -> _State:
    """Split the validation part off where there is none, and open the run's random stream."""
    words = np.random.SeedSequence([run.seed, run.split]).generate_state(2)
    train, valid = run.train, run.valid
    for name, rows in (("training", train), ("test", run.test)):
        if len(rows) == 0:
            raise DataError(f"split {run.split}: has no {name} clips. Check the fold or split column.")
    if valid is None or len(valid) == 0:
        train, valid = inner_split(labels, train, config.valid_share, int(words[0]))
    elif _classes(labels[valid]).size == 0:
        raise DataError(f"split {run.split}: no clip of the validation part has a label.")
    stream = torch.Generator().manual_seed(int(words[1]))
    before = len(run.train) if config.evar_compat else len(train)
    return _State(run, train, valid, min(config.batch_size, before), stream)


def inner_split(labels: Array, rows: Array, share: float, seed: int) -> tuple[Array, Array]:
    """Return `rows` without, and the rows of, a random validation part: a `share` of them, drawn until it has every
    class that they have, of `SPLIT_ATTEMPTS` draws the one with the most classes.

    labels: (C,) class indices or (C, K) 0 or 1. Raises DataError where fewer than two rows or classes are there.
    """
    own = labels[rows]
    present = _classes(own)
    if len(rows) < 2 or present.size < 2:
        raise DataError(
            f"The training part has {len(rows)} clips of {present.size} classes; a classifier needs two classes, and "
            "at least two clips. Check the label column and the folds."
        )
    number = min(max(1, round(share * len(rows))), len(rows) - 1)
    rng = np.random.default_rng(seed)
    best: tuple[int, Array] = (-1, np.zeros(0, dtype=np.int64))
    for _ in range(SPLIT_ATTEMPTS):
        order = rng.permutation(len(rows))
        found = _classes(own[order[:number]]).size
        if found > best[0]:
            best = (found, order)
        if found == present.size:
            break
    order = best[1]
    return np.sort(rows[order[number:]]), np.sort(rows[order[:number]])


def _classes(labels: Array) -> Array:
    return np.flatnonzero(labels.any(0)) if labels.ndim == 2 else np.unique(labels)
