# SPDX-License-Identifier: Apache-2.0
"""The command line: one file per command, imported only when it is asked for.

Exit status: 0 done, 2 a mistake in what was asked or in the data (one message, no traceback), 1 a fault of ours.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from masktrain import __version__
from masktrain.errors import MasktrainError, nearest

# name -> (module, one line); each module has `main(arguments)`, which returns the exit status or None for 0
COMMANDS = {
    "run": ("run", "pretrain a recipe: masktrain run --recipe mae_ast_frame [--data clips.csv]"),
    "recipes": ("recipes", "list, show NAME, diff A B"),
    "data": ("data", "index, stats, demo"),
    "embed": ("embed", "embeddings of audio files: masktrain embed --checkpoint RUN a.wav -o out.npz"),
    "import": ("import_", "published weights into a checkpoint: masktrain import FILE --as RECIPE"),
    "export": ("export", "a checkpoint under the reference's names, or its encoder as timm's ViT"),
    "doctor": (
        "doctor",
        "which kernels, attention and data path serve here, and why; --verify proves the kernels",
    ),
    "evaluate": ("evaluate", "what an encoder knows: evaluate linear --checkpoint RUN --data M.csv"),
    "mask": ("mask", "what each strategy masks in a clip: masktrain mask show clip.wav -o masks.png"),
    "bench": ("bench", "kernels, attention, masking: how fast each op is here, what masking costs"),
}


def usage() -> str:
    """Return the overview that --help prints."""
    rows = "\n".join(f"  {name:<9} {line}" for name, (_, line) in COMMANDS.items())
    return (
        "masktrain: pretraining of masked and contrastive models on audio spectrograms\n\n"
        f"usage: masktrain COMMAND [OPTIONS]\n\n{rows}\n\n"
        "masktrain COMMAND --help shows the options of a command.\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status."""
    sys.exit(_main(list(sys.argv[1:] if arguments is None else arguments)))


def _main(arguments: list[str]) -> int:
    try:
        status = _run(arguments)
        sys.stdout.flush()  # here, where a reader that has gone can still be dealt with
    except MasktrainError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of our output has gone (`masktrain recipes list | head`): nothing is left to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # a report has done its work; a run has not, and ends with the status of SIGPIPE
        return 141 if arguments[0] == "run" else 0
    return status


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"masktrain {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        return _refuse(f"no command {name!r}.{nearest(name, COMMANDS)} Commands: {', '.join(COMMANDS)}.")
    try:
        status = import_module(f"masktrain.cli.{COMMANDS[name][0]}").main(rest)
    except SystemExit as done:
        if done.code == 1:  # rich's answer to a reader that has gone
            raise BrokenPipeError from done
        return int(done.code or 0)  # tyro has printed help
    return int(status or 0)


def _refuse(message: str) -> int:
    print(f"masktrain: {message}", file=sys.stderr)
    return 2
