# SPDX-License-Identifier: Apache-2.0
"""What is said, on a pipe and on a terminal (a pseudo-terminal of a given width)."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from masktrain.errors import RunError
from masktrain.training.console import Console, count, duration, line_fields, number, percent

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def row(step: int, **values: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 12.3456,
        "loss_mse": 0.84321,
        "loss_info_nce": 3.9,
        "loss_max": 99.0,
        "grad_norm": 1.25,
        "lr": 3e-4,
        "clips_per_s": 480.2,
        "visible_tokens_per_s": 31_000.0,
        "tokens_per_s": 124_000.0,
        "step_ms": 66.7,
        "mfu": None,
        "data_wait_share": 0.021,
        "peak_memory_gib": 1.234,
        "eta_s": 32.0,
        **values,
    }


def plain() -> tuple[Console, io.StringIO, Clock]:
    out, clock = io.StringIO(), Clock()
    return Console(file=out, clock=clock), out, clock


def test_a_line_names_every_number_with_its_unit() -> None:
    console, out, _ = plain()
    console.begin(300)
    console.update(row(120, mfu=0.412))
    console.finish()
    assert out.getvalue() == (
        "step 120/300  loss 12.35  (mse 0.8432, info_nce 3.900)  grad 1.250  lr 3.00e-04  480.2 clips/s  "
        "31k visible/s  124k tokens/s  66.70 ms/step  MFU 41 %  data wait 2.1 %  1.234 GiB  ETA 0:32\n"
    )


def test_unknown_numbers_are_left_out() -> None:
    fields = dict(line_fields(row(1, clips_per_s=None, data_wait_share=None, eta_s=None, step_ms=None)))
    assert not any("clips/s" in text or "None" in text or "ETA" in text for text in fields.values())
    assert "loss nan" in dict(line_fields(row(1, loss=float("nan")))).values()


@pytest.mark.parametrize("total", [7, 20, 60, 1000])
def test_lines_come_at_even_intervals_first_and_last_included(total: int) -> None:
    console, out, _ = plain()
    console.begin(total)
    for step in range(1, total + 1):
        console.update(row(step))
    console.finish()
    steps = [int(found) for found in re.findall(r"^step (\d+)/", out.getvalue(), re.MULTILINE)]
    assert steps[0] == 1 and steps[-1] == total
    assert len(steps) == len(set(steps)) <= 23
    every = max(1, total // 20)
    assert set(range(every, total + 1, every)) <= set(steps)


def test_a_slow_run_prints_a_line_a_minute() -> None:
    console, out, clock = plain()
    console.begin(400_000)
    for step in range(50, 1000, 50):
        clock.now += 20
        console.update(row(step))
    console.finish()
    steps = [int(found) for found in re.findall(r"^step (\d+)/", out.getvalue(), re.MULTILINE)]
    assert steps == list(range(50, 1000, 150))


def test_no_step_has_two_lines() -> None:
    console, out, _ = plain()
    console.begin(10)
    console.update(row(10))
    console.line(row(10))
    console.finish()
    assert out.getvalue().count("step 10/10") == 1


def test_other_ranks_are_quiet() -> None:
    out = io.StringIO()
    console = Console(enabled=False, file=out)
    console.start_block([("device", "CPU")])
    console.note("a note")
    console.warn("a warning")
    console.begin(3)
    console.update(row(3))
    with console.progress("reading") as advance:
        advance(1, 2)
    console.finish([("done", "3 steps")])
    assert out.getvalue() == ""


def test_the_start_block_is_aligned_and_repeats_no_label() -> None:
    console, out, _ = plain()
    console.start_block([("device", "CPU, 2 cores"), ("schedule", "warm-up 10"), ("schedule", "decay 90")])
    console.finish()
    assert out.getvalue() == "device    CPU, 2 cores\nschedule  warm-up 10\n          decay 90\n"


def test_names_that_would_steer_or_break_the_terminal_are_escaped() -> None:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    console.warn("bad clip [red]\x1b[31m/a\udcff/é 日.wav")
    console.start_block([("run", "\x1b[2Jx")])
    console.close()
    assert raw.getvalue() == (
        b"warning: bad clip [red]\\x1b[31m/a\\udcff/\\xe9 \\u65e5.wav\nrun  \\x1b[2Jx\n"
    )


def test_progress_elsewhere_is_a_line_now_and_then() -> None:
    console, out, clock = plain()
    with console.progress("reading headers") as advance:
        for done in range(1, 31):
            clock.now += 1
            advance(done, 30)
    console.close()
    assert out.getvalue() == "".join(f"reading headers: {n} of 30\n" for n in (10, 20, 30))


def test_a_full_disk_behind_standard_output_is_a_run_error() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    file = open("/dev/full", "w")  # noqa: SIM115
    console = Console(file=file)
    with pytest.raises(RunError, match="Standard output could not be written"):
        console.note("text")
    console.close()
    with pytest.raises(OSError, match="No space"):
        file.close()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.01234, "0.01234"),
        (12.345, "12.35"),
        (1234.5, "1234"),
        (2e7, "2.000e+07"),
        (1e-5, "1.000e-05"),
    ],
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text


def test_units() -> None:
    assert [count(n) for n in (950, 12_340, 999_990, 4.567e6)] == ["950", "12.34k", "1000k", "4.567M"]
    assert [percent(p) for p in (0.0, 0.021, 0.1, 0.999)] == ["0.0 %", "2.1 %", "10 %", "100 %"]
    assert [duration(s) for s in (9, 59.7, 754, 18_367, 273_900)] == [
        "0:09",
        "1:00",
        "12:34",
        "5:06:07",
        "3 d 04:05",
    ]


# --- on a terminal ---

SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from test_console import row
from masktrain.training.console import Console
console = Console()
with console.progress("reading headers") as advance:
    advance(1, 2)
    time.sleep(0.3)
console.start_block([("device", "CPU, 2 of 2 cores, AVX2"), ("data", "a long text " * 8)])
console.begin(40)
for step in range(1, 41):
    console.update(row(step))
    time.sleep(0.01)
print("printed by something else")
{end}
"""


def on_terminal(width: int, end: str = "console.finish([('done', '40 steps')])", **env: str) -> str:
    """Return what the script writes to a terminal of this width."""
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 30, width, 0, 0))
    script = SCRIPT.format(tests=str(Path(__file__).parent), end=end)
    environment = {
        k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")
    }
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=other,
        stderr=other,
        stdin=subprocess.DEVNULL,
        env={**environment, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8", **env},
    )
    os.close(other)
    written = b""
    while True:
        try:
            piece = os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not piece:
            break
        written += piece
    process.wait()
    os.close(main)
    return written.decode()


@pytest.mark.parametrize("width", [200, 80, 40, 24])
def test_a_terminal_shows_a_bar_that_never_wraps_and_lines_once(width: int) -> None:
    written = on_terminal(width)
    shown = [line for line in re.split(r"[\r\n]+", ESCAPE.sub("", written)) if line]
    # every drawing of the bar fits its line
    assert all(len(line) <= width for line in shown), [line for line in shown if len(line) > width]
    bars = [line for line in shown if re.match(r"step \d+/40 .*\d %", line)]
    assert bars and ("loss 12.35" in bars[-1] or width < 30)
    if width >= 80:
        assert all(text in bars[-1] for text in ("━", "480.2 clips/s", "wait 2.1 %", "ETA 0:32"))
    lines = [
        line for line in shown if re.match(r"step \d+/40  loss", line) or re.fullmatch(r"step \d+/40", line)
    ]
    steps = [int(line.split("/")[0].removeprefix("step ")) for line in lines]
    assert steps == sorted(set(steps)) and steps[0] == 1 and steps[-1] == 40
    assert "printed by something else"[:width] in "".join(shown)
    # the cursor was hidden and is back at the end
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l") >= 0


@pytest.mark.parametrize("end", ["raise SystemExit(2)", "raise ValueError('broken')"])
def test_the_cursor_comes_back_after_an_error(end: str) -> None:
    written = on_terminal(80, end)
    assert written.rfind("\x1b[?25h") > written.rfind("\x1b[?25l") >= 0


def test_a_dumb_terminal_gets_plain_lines() -> None:
    written = on_terminal(80, TERM="dumb")
    assert "\x1b" not in written and "step 40/40  loss 12.35" in written


def test_a_pipe_gets_plain_lines_whatever_the_colour_variables_say() -> None:
    script = SCRIPT.format(tests=str(Path(__file__).parent), end="console.finish()")
    environment = {**os.environ, "FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "COLUMNS": "20"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stderr == ""
    assert "\x1b" not in done.stdout
    assert "data    " + ("a long text " * 8) in done.stdout
