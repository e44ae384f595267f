# SPDX-License-Identifier: Apache-2.0
"""How every picture is drawn: colours, fonts, figures, and how they are saved.

matplotlib is imported at the first call, without its pyplot: no window, no global figure, no settings of the user's.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from masktrain.training.storage import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Axes
    from matplotlib.figure import Figure

DPI = 150
MASKED = "#c9ced6"
INK = "#222222"
# one colour a meaning in all pictures (Okabe-Ito, told apart by colour-blind readers)
LOSS, VALIDATION, BASELINE, RATE, WAIT = "#0072b2", "#d55e00", "#555555", "#999999", "#cc79a7"
INTERPOLATION = "#009e73"
STYLE: Any = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.0,
    "axes.edgecolor": "#666666",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def save(figure: Figure, path: Path) -> bytes:
    """Write a figure as PNG, whole or not at all, and return its bytes. Raises RunError where it cannot be
    written."""
    png = io.BytesIO()
    with style(), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing from font"
        )  # a clip's name in another script
        figure.savefig(png, format="png", dpi=DPI)
    write_atomic(path, png.getvalue())
    return png.getvalue()


@contextmanager
def style() -> Iterator[None]:
    """Draw with our settings, whatever the user's matplotlibrc says."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it reports its font cache as a warning
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def new_figure(width: float, height: float, title: str) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(shortened(title), x=0.008, ha="left", fontsize=11, fontweight="bold", parse_math=False)
    return figure


def swatch(colour: str, label: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, label=label)


def colour_map(name: str, bad: str) -> Any:
    import matplotlib

    return matplotlib.colormaps[name].with_extremes(bad=bad)


def shortened(name: str, length: int = 60) -> str:
    """Return a name in printable characters, its middle left out where it is long."""
    clean = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
    half = (length - 3) // 2
    return clean if len(clean) <= length else f"{clean[:half]}...{clean[-half:]}"
