# SPDX-License-Identifier: Apache-2.0
"""`masktrain evaluate`: what the frozen encoder of a checkpoint knows of labelled clips."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from masktrain.cli.options import parse, write_json
from masktrain.errors import ConfigError, nearest

if TYPE_CHECKING:
    from masktrain.training.console import Console

USAGE = """usage: masktrain evaluate linear --checkpoint RUN --data M.csv [OPTIONS]   a linear classifier on frozen features
       masktrain evaluate knn    --checkpoint RUN --data M.csv [OPTIONS]   their nearest neighbours
       masktrain evaluate rank   --checkpoint RUN --data CLIPS [OPTIONS]   effective rank under masks at inference

masktrain evaluate ACTION --help shows the options of an action.
"""


@dataclass(frozen=True)
class LabelledOptions:
    """What is evaluated on which labelled clips."""

    checkpoint: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction]
    """A run folder or a checkpoint; may be repeated."""
    data: Path
    """Labelled clips: a manifest with a label column and a fold or split column, or the folder of a task."""
    label: str | None = None
    """Column of the labels; default: the one that looks like it."""
    fold: str | None = None
    """Column of the folds: each is tested once."""
    split: str | None = None
    """Column that says train, valid or test."""
    task: str | None = None
    """A known task (ESC-50, US8K, ...): its labels, folds, unit length and metric."""


@dataclass(frozen=True)
class KnnOptions(LabelledOptions):
    """Classify the test clips of every fold by their nearest training clips in cosine similarity: nothing is learned.

    Each of the k neighbours votes with weight exp(similarity / temperature) (DINO), and in a plain vote with 1.
    """

    k: Annotated[tuple[int, ...], tyro.conf.UseAppendAction] = ()
    """Neighbours; may be repeated; default 1, 10 and 20."""
    temperature: float = 0.07
    """Of the weighted votes."""
    layers: Literal["last", "all"] = "last"
    """The last encoder layer, or each for itself."""
    against: Annotated[tuple[Literal["untrained", "logmel"], ...], tyro.conf.UseAppendAction] = ()
    """Also the same encoder untrained, or mean and deviation of the log-mel; may be repeated."""
    json: Path | None = None
    """Also write the report there."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    cache: Path | None = None
    """Folder of cached features; default the user's cache."""
    encode_batch: int = 32
    """Clips encoded at once."""


@dataclass(frozen=True)
class RankOptions:
    """Effective rank of the representations of clips without a mask, under random and under time-frequency masking
    (AudioMosaic, section 4): a sign of collapse where it is low. Labels are not needed."""

    checkpoint: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction]
    """A run folder or a checkpoint; may be repeated."""
    data: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction]
    """A folder, an audio file or a manifest; may be repeated."""
    clips: int = 512
    """Clips at most, drawn by the seed. The rank cannot exceed their number."""
    mask_t_prob: float = 0.6
    """Share of columns that time-frequency masking hides."""
    mask_f_prob: float = 0.4
    """Share of rows that time-frequency masking hides."""
    mask_ratio: float | None = None
    """Share of tokens that random masking hides; default: as many as the other two together."""
    layers: Literal["last", "all"] = "last"
    """The last encoder layer, or each for itself."""
    untrained: bool = False
    """Also the same encoders with fresh weights."""
    seed: int = 0
    """Of the clips and the masks."""
    out: Path | None = None
    """Folder for the picture rank.png and rank.json."""
    json: Path | None = None
    """Also write the report there."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    encode_batch: int = 32
    """Clips encoded at once."""


@dataclass(frozen=True)
class LinearOptions(LabelledOptions):
    """Train linear classifiers on the frozen features of a checkpoint (EVAR's protocol): all seeds and folds at once.

    Folds, splits and labels come from columns of the manifest, or from the known layout of a task.
    """

    head: Literal["last", "layers", "weighted", "attentive"] = "last"
    """One layer; each layer for itself; a learned sum of all layers; a learned query over the tokens of a layer."""
    layer: int | None = None
    """The layer of last and attentive, counted from 1; default the last."""
    pool: Literal["concat", "mean"] = "concat"
    """The patches of a frame side by side, as EVAR's M2D has them, or their mean, as SSAST, MAE-AST and AudioMAE have it."""
    seeds: int = 10
    """Classifiers for each fold, from seed 42 on."""
    lr: Annotated[tuple[float, ...], tyro.conf.UseAppendAction] = ()
    """Learning rate, default 3e-4; repeated, each classifier takes the one that is best on its validation part."""
    epochs: int = 200
    """Epochs at most."""
    patience: int = 20
    """Epochs without improvement on the validation part that end a classifier."""
    batch_size: int = 200
    """Clips of a step of each classifier, at most."""
    evar_compat: bool = False
    """EVAR's quirks: metrics from float32 sigmoids, scaler fitted before the validation split, later epoch of equal ones."""
    against: Annotated[tuple[Literal["untrained", "logmel"], ...], tyro.conf.UseAppendAction] = ()
    """Also probe the same encoder untrained, or mean and deviation of the log-mel, and report the difference; may be
    repeated."""
    out: Path | None = None
    """Folder for pictures (class balance, confusion matrix, table of classes, layers) and linear.json."""
    json: Path | None = None
    """Also write the report there."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    cache: Path | None = None
    """Folder of cached features; default the user's cache."""
    encode_batch: int = 32
    """Clips encoded at once."""


def main(arguments: list[str]) -> None:
    """Run `masktrain evaluate ACTION`."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return
    action, rest = arguments[0], arguments[1:]
    if action not in ACTIONS:
        raise ConfigError(
            f"evaluate: no action {action!r}.{nearest(action, ACTIONS)} Allowed: {', '.join(ACTIONS)}."
        )
    ACTIONS[action](rest)


def _linear(rest: list[str]) -> None:
    options = parse(LinearOptions, "evaluate linear", rest)

    from masktrain.evaluation.labels import read_labelled
    from masktrain.evaluation.linear import LinearConfig, evaluate_linear
    from masktrain.evaluation.probe import ProbeConfig
    from masktrain.training.console import Console
    from masktrain.training.corpus import log_lines
    from masktrain.training.distributed import pick_device

    probe = ProbeConfig(
        epochs=options.epochs,
        patience=options.patience,
        batch_size=options.batch_size,
        evar_compat=options.evar_compat,
    )
    config = LinearConfig(
        head=options.head,
        layer=options.layer,
        seeds=options.seeds,
        lrs=options.lr or LinearConfig.lrs,
        pool=options.pool,
        probe=probe,
        batch_size=options.encode_batch,
    )
    device = pick_device(options.device)
    if options.out is not None:
        _make_folder(options.out)
    labelled = read_labelled(
        options.data, label=options.label, fold=options.fold, split=options.split, task=options.task
    )
    with Console() as console, log_lines(console):
        with _stages(console) as progress:
            report = evaluate_linear(
                options.checkpoint,
                labelled,
                config,
                against=tuple(dict.fromkeys(options.against)),
                device=device,
                cache=options.cache or _cache_folder(),
                progress=progress,
            )
        console.finish(_linear_lines(report))
        for warning in _linear_warnings(report):
            console.warn(warning)
        if options.out is not None:
            for picture in _linear_pictures(options.out, report):
                console.note(f"picture: {picture}")
            write_json(options.out / "linear.json", report)
    write_json(options.json, report)


def _knn(rest: list[str]) -> None:
    options = parse(KnnOptions, "evaluate knn", rest)
    _check_batch(options.encode_batch)

    from masktrain.evaluation.knn import KnnConfig, evaluate_knn
    from masktrain.evaluation.labels import read_labelled
    from masktrain.training.console import Console
    from masktrain.training.corpus import log_lines
    from masktrain.training.distributed import pick_device

    config = KnnConfig(
        ks=tuple(dict.fromkeys(options.k)) or KnnConfig.ks,
        temperature=options.temperature,
        every_layer=options.layers == "all",
        batch_size=options.encode_batch,
    )
    device = pick_device(options.device)
    labelled = read_labelled(
        options.data, label=options.label, fold=options.fold, split=options.split, task=options.task
    )
    with Console() as console, log_lines(console):
        for note in labelled.notes:
            console.note(note)
        with _stages(console) as progress:
            report = evaluate_knn(
                options.checkpoint,
                labelled,
                config,
                against=tuple(dict.fromkeys(options.against)),
                device=device,
                cache=options.cache or _cache_folder(),
                progress=progress,
            )
        console.finish(_knn_lines(report))
    write_json(options.json, report)


def _knn_lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    splits = report["splits"]
    lines = [
        ("task", f"{report['task']}: {report['clips']} clips, {len(report['classes'])} classes"),
        ("splits", f"{len(splits)}; the first: train {splits[0]['train']}, test {splits[0]['test']}"),
    ]
    for row in report["encoders"]:
        lines.append(("encoder", f"{row['name']}: {row['checkpoint']}"))
        lines += _knn_rows(row["scores"], report["metric"])
        for kind, other in row["against"].items():
            lines.append((kind, other["name"]))
            lines += _knn_rows(other["scores"], report["metric"])
        lines.append(("pretraining", _pretraining_text(row["pretraining"], splits)))
    return lines


def _knn_rows(rows: list[dict[str, Any]], metric: str) -> list[tuple[str, str]]:
    lines = []
    for row in rows:
        text = f"{100 * row['mean']:.2f} %"
        if row["low"] is not None:
            text += f"; 95 % interval {100 * row['low']:.2f} to {100 * row['high']:.2f} over {row['n']} folds"
        lines.append((f"  {metric}, layer {row['layer']}, {row['vote']} vote of {row['k']}", text))
    return lines


def _rank(rest: list[str]) -> None:
    options = parse(RankOptions, "evaluate rank", rest)
    _check_batch(options.encode_batch)

    from masktrain.evaluation.rank import RankConfig, evaluate_rank, rank_figure
    from masktrain.training.console import Console
    from masktrain.training.corpus import log_lines, read_clips
    from masktrain.training.distributed import pick_device
    from masktrain.training.drawing import save

    config = RankConfig(
        mask_t_prob=options.mask_t_prob,
        mask_f_prob=options.mask_f_prob,
        mask_ratio=options.mask_ratio,
        clips=options.clips,
        every_layer=options.layers == "all",
        seed=options.seed,
        batch_size=options.encode_batch,
    )
    device = pick_device(options.device)
    if options.out is not None:
        _make_folder(options.out)
    with Console() as console, log_lines(console):
        clips, _ = read_clips(options.data, console)
        with _stages(console) as progress:
            report = evaluate_rank(
                options.checkpoint,
                clips,
                config,
                untrained=options.untrained,
                device=device,
                progress=progress,
            )
        console.finish(_rank_lines(report))
        if options.out is not None:
            picture = options.out / "rank.png"
            save(rank_figure(report), picture)
            console.note(f"picture: {picture}")
            write_json(options.out / "rank.json", report)
    write_json(options.json, report)


def _rank_lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [("clips", f"{report['clips']} of {report['of']}")]
    for encoder in report["encoders"]:
        most = min(report["clips"], len(encoder["ranks"][0]["singular_values"]))
        lines.append(("encoder", f"{encoder['name']}: {encoder['checkpoint']}; ranks of at most {most}"))
        lines += [
            (
                f"  layer {row['layer']}, mask {row['mask']}",
                f"effective rank {row['effective_rank']:.2f}, centred {row['effective_rank_centred']:.2f}; "
                f"{100 * row['visible_share']:.1f} % of the tokens visible",
            )
            for row in encoder["ranks"]
        ]
    return lines


def _check_batch(clips: int) -> None:
    if clips < 1:
        raise ConfigError(f"--encode-batch: must be at least 1; received {clips}.")


def _make_folder(path: Path) -> None:
    """Make the folder of --out before the work, not after it. Raises ConfigError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(
            f"--out {path}: cannot be made or written ({error.strerror or error}). Name another folder."
        ) from error


def _cache_folder() -> Path:
    """Return where features are kept: beside the demo corpus."""
    from masktrain.training.corpus import demo_folder

    demo = demo_folder()
    return demo.with_name(demo.name.replace("demo", "features"))


@contextmanager
def _stages(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Show one bar after the other: yields a function to call with (what, done, total)."""
    with ExitStack() as stack:
        shown: list[str] = []
        advance: list[Callable[[int, int], None]] = []

        def progress(what: str, done: int, total: int) -> None:
            if shown != [what]:
                stack.close()
                shown[:] = [what]
                advance[:] = [stack.enter_context(console.progress(what))]
            advance[0](done, total)

        yield progress


# --- what is shown ---


POOLS = {"concat": "side by side", "mean": "averaged"}


def _linear_lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    splits = report["splits"]
    sizes = ", ".join(
        f"{name} {splits[0][name]}" for name in ("train", "valid", "test") if splits[0][name] is not None
    )
    names = f"{len(splits)} folds, the first" if len(splits) > 1 else splits[0]["name"]
    compat = ", EVAR's quirks" if report["probe"]["evar_compat"] else ""
    rates = " or ".join(f"{lr:g}" for lr in report["lr"])
    lines = [
        ("task", f"{report['task']}: {report['clips']} clips, {len(report['classes'])} classes"),
        ("splits", f"{names}: {sizes}"),
        (
            "probe",
            f"head {report['head']}, patches of a frame {POOLS[report['pool']]}, {len(report['seeds'])} seeds, Adam at {rates}, at most "
            f"{report['probe']['epochs']} epochs{compat}",
        ),
    ]
    lines += [("note", note) for note in report["notes"]]
    for row in report["encoders"]:
        lines += [("encoder", f"{row['name']}: {row['checkpoint']}")]
        lines += [(report["metric"], _summary_text(row))]
        if "layers" in row:
            chosen = row["layer_chosen_on_validation"]
            lines += [(f"  layer {one['layer']}", _summary_text(one)) for one in row["layers"]]
            lines += [("  layer chosen on validation", _summary_text(chosen))]
        for kind, other in row["against"].items():
            lines += [(kind, f"{other['name']}: {_summary_text(other)}")]
            lines += [(f"above {kind}", _difference_text(other["difference"]))]
        lines += [("pretraining", _pretraining_text(row["pretraining"], splits))]
    if "together" in report:
        together = report["together"]
        lines += [(f"all {len(report['encoders'])} checkpoints", _summary_text(together))]
        lines += [(f"above {kind}", _difference_text(gap)) for kind, gap in together["against"].items()]
    return lines


def _linear_warnings(report: dict[str, Any]) -> list[str]:
    """Return what a reader must not miss."""
    warnings = [
        f"{row['name']} heard test clips in pretraining: its score is transductive."
        for row in report["encoders"]
        if row["pretraining"]["state"] == "transductive"
    ]
    scored = [one for row in report["encoders"] for one in (row, *row["against"].values())]
    share = max(one["unfinished"] for one in scored)
    if share > 0.5:
        warnings.append(
            f"Up to {share:.0%} of the classifiers were not done after {report['probe']['epochs']} epochs: such scores say "
            "how fast features are learned from, too. Give higher learning rates to choose from (--lr 3e-4 --lr 3e-3 --lr "
            "1e-2: each classifier takes what its validation part prefers), or more --epochs."
        )
    return warnings


def _summary_text(row: dict[str, Any]) -> str:
    text = f"{100 * row['mean']:.2f} %"
    seeds, splits = row["over_seeds"], row["over_splits"]
    if seeds["std"] is not None:
        text += f", spread {100 * seeds['std']:.2f}"
    ranges = [
        f"{100 * one['low']:.2f} to {100 * one['high']:.2f} over {one['n']} {what}"
        for one, what in ((seeds, "seeds"), (splits, "folds"))
        if one is not None and one["low"] is not None
    ]
    return text + (f"; 95 % interval {', '.join(ranges)}" if ranges else "")


def _difference_text(gap: dict[str, Any]) -> str:
    pairs, splits = gap["pairs"], gap["splits"]
    ranges = [
        f"{100 * one['low']:+.2f} to {100 * one['high']:+.2f} over {one['n']} {what}"
        for one, what in ((pairs, "pairs of seed and fold"), (splits, "folds"))
        if one is not None and one["low"] is not None
    ]
    text = f"{100 * pairs['mean']:+.2f} points"
    if not ranges:
        return text
    verdict = "excludes 0" if gap["excludes_zero"] else "does not exclude 0"
    return f"{text}; 95 % interval {', '.join(ranges)}: {verdict}"


def _pretraining_text(heard: dict[str, Any], splits: list[dict[str, Any]]) -> str:
    if heard["state"] == "unknown":
        return f"unknown whether it heard test clips: {heard['why']}"
    if heard["state"] == "inductive":
        return f"heard no test clip; {heard['why']}"
    tests = sum(split["test"] for split in splits)
    count = sum(heard["clips"].values())
    return f"TRANSDUCTIVE: heard {count} of {tests} test clips (without labels); {heard['why']}"


def _linear_pictures(out: Path, report: dict[str, Any]) -> list[Path]:
    """Write the pictures of a report and return their paths."""
    import numpy as np

    from masktrain.evaluation.report_pictures import (
        class_balance_figure,
        class_table_figure,
        confusion_figure,
        layer_figure,
    )
    from masktrain.training.drawing import save

    classes, task = report["classes"], report["task"]
    counts = {
        part: np.mean([split["clips_of_class"][part] for split in report["splits"]], 0)
        for part in ("train", "valid", "test")
        if report["splits"][0][part] is not None
    }
    figures = {"class_balance": class_balance_figure(classes, counts, f"{task}: class balance")}
    for number, row in enumerate(report["encoders"], 1):
        end = f"_{number}" if len(report["encoders"]) > 1 else ""
        title = f"{task}, {row['name']}: {report['metric']} {100 * row['mean']:.1f} %"
        if row["confusion"] is not None:
            matrix = np.array(row["confusion"])
            note = f"test clips, mean over {len(report['seeds'])} seeds"
            figures[f"confusion{end}"] = confusion_figure(classes, matrix, title, note)
        figures[f"classes{end}"] = class_table_figure(row["classes"], title)
    if "layers" in report["encoders"][0]:
        same = [
            row for row in report["encoders"] if len(row["layers"]) == len(report["encoders"][0]["layers"])
        ]
        curves, levels = {}, {}
        for row in same:
            curves[row["name"]] = _curve(row["layers"])
            for kind, other in row["against"].items():
                if "layers" in other:
                    curves[f"{row['recipe']}, {kind}"] = _curve(other["layers"])
                else:
                    levels[other["name"]] = other["mean"]
        layers = [one["layer"] for one in same[0]["layers"]]
        title = f"{task}: linear probe of every layer"
        figures["layers"] = layer_figure(layers, curves, levels, report["metric"], title)
    paths = []
    for name, figure in figures.items():
        paths.append(out / f"{name}.png")
        save(figure, paths[-1])
    return paths


def _curve(layers: list[dict[str, Any]]) -> list[tuple[float, float, float]]:
    return [
        (
            one["mean"],
            *(
                (one["over_seeds"][end] if one["over_seeds"]["low"] is not None else one["mean"])
                for end in ("low", "high")
            ),
        )
        for one in layers
    ]


ACTIONS = {"linear": _linear, "knn": _knn, "rank": _rank}
