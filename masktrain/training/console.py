# SPDX-License-Identifier: Apache-2.0
"""What a run says on standard output: a bar and lines on a terminal, plain lines elsewhere.

Errors are not printed here: the command line prints them to standard error.
"""

from __future__ import annotations

import atexit
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from masktrain.errors import RunError

Pairs = Sequence[tuple[str, str]]

LINES_PER_RUN = 20
LINE_SECONDS = 60.0
PROGRESS_LINE_SECONDS = 10.0
MIN_BAR = 8
MAX_BAR = 40


class Console:
    """Speaks for one rank; with enabled=False it says nothing.

    `update` is called with each row: it moves the bar, and prints a line for the first and the last row,
    about `LINES_PER_RUN` times in between, and when the last line is `LINE_SECONDS` old.
    """

    def __init__(
        self, enabled: bool = True, file: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """file: standard output if None."""
        self.enabled = enabled
        self._file = file if file is not None else sys.stdout
        self._clock = clock
        # rich's own test would take a pipe for a terminal where FORCE_COLOR is set
        self.terminal = enabled and self._file.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
        self._rich = RichConsole(
            file=self._file, force_terminal=self.terminal, highlight=False, markup=False, emoji=False
        )
        self._live: Live | None = None
        self._bar = _Bar(0, 0)
        self._total = 0
        self._line_every = 1
        self._line_step = -1
        self._line_time = -math.inf
        # the cursor comes back even where an error passes by `close`
        atexit.register(self.close)

    # --- text ---

    def note(self, text: str) -> None:
        """Print a sentence."""
        self._say(text)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self._say(f"warning: {text}", "yellow")

    def start_block(self, pairs: Pairs) -> None:
        """Print (label, text) lines below one another; a label that repeats is printed once."""
        width = max((len(label) for label, _ in pairs), default=0)
        previous = None
        rows = []
        for label, text in pairs:
            rows.append(("" if label == previous else label, text))
            previous = label
        if self.terminal:
            table = Table.grid(padding=(0, 2))
            table.add_column(style="cyan", no_wrap=self._rich.width >= 3 * width)
            table.add_column(overflow="fold")
            for label, text in rows:
                table.add_row(self._clean(label), self._clean(text))
            self._print(table)
        else:
            for label, text in rows:
                self._say(f"{label:<{width}}  {text}")

    def _say(self, text: str, style: str = "") -> None:
        if not self.enabled:
            return
        if self.terminal:
            self._print(Text(self._clean(text), style=style))
        else:
            self._guard(lambda: print(self._clean(text), file=self._file, flush=True))

    def _print(self, renderable: Table | Text) -> None:
        self._guard(lambda: self._rich.print(renderable, soft_wrap=isinstance(renderable, Text)))

    def _guard(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BrokenPipeError:
            raise  # the reader has gone: the command line ends quietly
        except OSError as error:
            raise RunError(
                f"Standard output could not be written ({error.strerror or error}). Make room where it goes, "
                "then go on with --resume."
            ) from error

    def _clean(self, text: str) -> str:
        """Return `text` without what the output cannot show or what would steer a terminal (file names hold
        both)."""
        shown = "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
        encoding = self._file.encoding or "utf-8"
        return shown.encode(encoding, "backslashreplace").decode(encoding)

    # --- the loop ---

    def begin(self, total: int, start: int = 0) -> None:
        """Start the bar of a run of `total` steps that has `start` behind it."""
        self._total = total
        self._line_every = max(1, (total - start) // LINES_PER_RUN)
        self._bar = _Bar(total, start)
        self._show(self._bar)

    def update(self, row: Mapping[str, Any]) -> None:
        """Show a row: on the bar, and as a line when one is due."""
        step = row["step"]
        self._bar.step, self._bar.fields = step, bar_fields(row)
        first = self._line_step < 0
        crossed = step // self._line_every > self._line_step // self._line_every
        late = self._clock() - self._line_time >= LINE_SECONDS
        if first or crossed or late or step == self._total:
            self.line(row)

    def line(self, row: Mapping[str, Any]) -> None:
        """Print a row as one line; a step that has its line is not printed again."""
        if row["step"] == self._line_step:
            return
        self._line_step, self._line_time = row["step"], self._clock()
        head = f"step {row['step']}/{self._total}" if self._total else f"step {row['step']}"
        fields = line_fields(row)
        if self.terminal:
            fields = _fit(fields, self._rich.width - len(head) - 2)
        self._say("  ".join([head, *(text for _, text in fields)]))

    def finish(self, pairs: Pairs = ()) -> None:
        """End the bar and print (label, text) lines."""
        self.close()
        if pairs:
            self.start_block(pairs)

    def close(self) -> None:
        """End the bar and give the terminal back. A second call does nothing."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()
        atexit.unregister(self.close)

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _show(self, bar: _Bar) -> None:
        """Put a bar on the terminal in place of the one there."""
        if not self.terminal:
            return
        if self._live is not None:
            self._live.stop()
        self._live = Live(bar, console=self._rich, refresh_per_second=4, transient=True)
        self._live.start()

    @contextmanager
    def progress(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Show how far some other work is: yields a function to call with (done, total).

        On a terminal a bar that disappears, elsewhere a line every `PROGRESS_LINE_SECONDS`. Not within the
        loop.
        """
        last = self._clock()
        bar = _Bar(0, 0, what)
        self._show(bar)

        def advance(done: int, total: int) -> None:
            nonlocal last
            bar.step, bar.total = done, total
            if not self.terminal and self._clock() - last >= PROGRESS_LINE_SECONDS:
                last = self._clock()
                self._say(f"{what}: {done} of {total}")

        try:
            yield advance
        finally:
            if self._live is not None:
                self._live.stop()
                self._live = None


class _Bar:
    """One line that never wraps: what is done, a bar in the room that is left, the fields that fit."""

    def __init__(self, total: int, step: int, what: str = "step") -> None:
        self.total = total
        self.step = step
        self.what = what
        self.fields: list[tuple[int, str]] = []

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        share = self.step / self.total if self.total else 0.0
        head = f"{self.what} {self.step}/{self.total}" if self.total else self.what
        percent = f"{100 * share:3.0f} %"
        room = width - len(head) - len(percent) - 2
        texts = [text for _, text in _fit(self.fields, room - 2)]
        tail = "  ".join([percent, *texts])
        bar = min(MAX_BAR, width - len(head) - len(tail) - 4)
        line = Text(head, no_wrap=True, overflow="ellipsis")
        if bar >= MIN_BAR:
            full = min(bar, round(share * bar))
            glyph = "-" if options.ascii_only else "━"
            line.append("  ").append(glyph * full, "cyan").append(glyph * (bar - full), "bright_black")
        yield line.append("  " + tail)


def _fit(fields: list[tuple[int, str]], width: int) -> list[tuple[int, str]]:
    """Leave out the fields of the highest number until the rest fits, two blanks between."""
    kept = list(fields)
    while kept and sum(len(text) for _, text in kept) + 2 * (len(kept) - 1) > width:
        kept.remove(max(kept, key=lambda field: field[0]))
    return kept


def bar_fields(row: Mapping[str, Any]) -> list[tuple[int, str]]:
    """Return (rank, text) for the bar, most important rank lowest: loss, last probe, clips/s, data wait, ETA."""
    fields = _present((0, "loss", row.get("loss"), number))
    fields += _probe(row)
    return fields + _present(
        (2, "clips/s", row.get("clips_per_s"), number),
        (3, "wait", row.get("data_wait_share"), percent),
        (1, "ETA", row.get("eta_s"), duration),
    )


def _probe(row: Mapping[str, Any]) -> list[tuple[int, str]]:
    """Return the field of the last reading of a probe, which comes as text."""
    return [(2, row["probe"])] if row.get("probe") else []


def line_fields(row: Mapping[str, Any]) -> list[tuple[int, str]]:
    """Return (rank, text) for a line: every number of the row that is known."""
    parts = {
        name.removeprefix("loss_"): value
        for name, value in row.items()
        if name.startswith("loss_") and name != "loss_max"
    }
    shown = ", ".join(f"{name} {number(value)}" for name, value in parts.items())
    fields = _present((0, "loss", row.get("loss"), number))
    if shown:
        fields.append((4, f"({shown})"))
    fields += _probe(row)
    fields += _present(
        (5, "grad", row.get("grad_norm"), number),
        (6, "lr", row.get("lr"), "{:.2e}".format),
        (2, "clips/s", row.get("clips_per_s"), number),
        (9, "visible/s", row.get("visible_tokens_per_s"), count),
        (8, "tokens/s", row.get("tokens_per_s"), count),
        (7, "ms/step", row.get("step_ms"), number),
        (10, "MFU", row.get("mfu"), percent),
        (3, "data wait", row.get("data_wait_share"), percent),
        (11, "GiB", row.get("peak_memory_gib"), number),
        (1, "ETA", row.get("eta_s"), duration),
    )
    return fields


# units that stand behind their number; other labels stand before it
_UNITS = ("clips/s", "visible/s", "tokens/s", "ms/step", "GiB")


def _present(*fields: tuple[int, str, Any, Callable[[float], str]]) -> list[tuple[int, str]]:
    return [
        (rank, f"{show(value)} {label}" if label in _UNITS else f"{label} {show(value)}")
        for rank, label, value, show in fields
        if value is not None
    ]


def number(value: float | None) -> str:
    """Return a number with four digits: 0.01234, 12.34, 1234, 1.234e+07; "?" for None."""
    if value is None:
        return "?"
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        decimals = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
        return f"{value:.{decimals}f}"
    return f"{value:.3e}"


def count(value: float) -> str:
    """Return a large count: 950, 12.34k, 4.567M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.4g}{unit}"
    return f"{value:.0f}"


def percent(share: float) -> str:
    """Return a share in percent: 0.031 -> 3.1 %."""
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"


def duration(seconds: float) -> str:
    """Return a time: 0:09, 12:34, 5:06:07, 3 d 04:05."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days} d {h:02}:{m:02}"
    return f"{h}:{m:02}:{s:02}" if h else f"{m}:{s:02}"
