# SPDX-License-Identifier: Apache-2.0
"""Options of every command: checked here for one short message with the nearest name, then built by tyro.

An option is a field of a config: `mask_ratio` of `masking` is --masking.mask-ratio (or mask_ratio). Given twice, the
last one counts, and a note says so.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import types
import typing
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from masktrain.errors import ConfigError, nearest

T = TypeVar("T")
HELP = ("-h", "--help")


@dataclass(frozen=True)
class Option:
    """One option. flag: its long name. hint: what it takes. off: its other name where it is a switch."""

    flag: str
    hint: Any
    appends: bool = False
    required: bool = False

    @property
    def members(self) -> list[Any]:
        """What a value may be."""
        union = typing.get_origin(self.hint) in (typing.Union, types.UnionType)
        return list(typing.get_args(self.hint)) if union else [self.hint]

    @property
    def off(self) -> str:
        """The name that turns a switch off."""
        group, dot, name = self.flag.removeprefix("--").rpartition(".")
        return f"--{group}{dot}no-{name}"

    @property
    def elements(self) -> list[Any]:
        """The hints of the values that it takes: none for a switch."""
        if self.hint is bool:
            return []
        if typing.get_origin(self.hint) is tuple:
            hints = [hint for hint in typing.get_args(self.hint) if hint is not Ellipsis]
            return hints[:1] if self.appends else hints
        return [self.hint]


def parse(cls: type[T], command: str, arguments: Sequence[str]) -> T:
    """Return the options of `masktrain COMMAND`. Prints help and exits where it is asked for.

    Raises ConfigError, naming the nearest option or value.
    """
    options, rest = parse_known(cls, command, arguments)
    if rest:
        raise _unknown(rest[0], _flags(_options(cls)), f"`masktrain {command} --help` lists the options.")
    return options


def parse_known(cls: type[T], command: str, arguments: Sequence[str]) -> tuple[T, list[str]]:
    """Like `parse`, and return what is no option of `cls`."""
    if any(a in HELP for a in arguments):
        tyro.cli(cls, args=["--help"], prog=f"masktrain {command}", description=cls.__doc__)
    table = _options(cls)
    known, rest = _split(arguments, table, positional=_has_positional(cls))
    given = {argument.partition("=")[0] for argument in known}
    for option in dict.fromkeys(table.values()):
        if option.required and given.isdisjoint(name for name in table if table[name] == option):
            raise ConfigError(
                f"{command}: {option.flag} is missing. `masktrain {command} --help` says what it is."
            )
    options = _build(
        lambda: tyro.cli(cls, args=known, prog=f"masktrain {command}", console_outputs=False), command
    )
    if getattr(options, "json", None) is not None:
        check_writable(options.json)  # type: ignore[attr-defined]
    return options, rest


def override(config: T, command: str, arguments: Sequence[str], others: type) -> T:
    """Return the config with dotted overrides (`--masking.mask-ratio 0.8`) applied.

    others: the options of the command itself, for naming the nearest. Raises ConfigError.
    """
    if not arguments:
        return config
    table = _options(config)
    known, rest = _split(arguments, table, positional=False)
    if rest:
        raise _unknown(
            rest[0],
            [*_flags(_options(others)), *_flags(table)],
            f"`masktrain {command} --help` and `masktrain recipes show NAME` list the options.",
        )
    return _build(
        lambda: tyro.cli(
            type(config),
            args=known,
            default=config,
            prog=f"masktrain {command}",
            config=(tyro.conf.AvoidSubcommands,),
            console_outputs=False,
        ),
        command,
    )


def _build(parsed: Callable[[], T], command: str) -> T:
    """Return what tyro makes of checked arguments; what it refuses of them is one message all the same."""
    try:
        return parsed()
    except SystemExit as error:
        raise ConfigError(
            f"{command}: these options cannot be understood. `masktrain {command} --help` shows how each is written."
        ) from error


def _options(config: Any, prefix: str = "--") -> dict[str, Option]:
    """Return {name: option} of a config class, or of an instance with the configs inside it; short names too."""
    cls = config if isinstance(config, type) else type(config)
    hints = typing.get_type_hints(cls, include_extras=True)
    out: dict[str, Option] = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        annotated = typing.get_origin(hint) is Annotated
        extras = hint.__metadata__ if annotated else ()
        if tyro.conf.Suppress in extras or tyro.conf.Positional in extras:
            continue
        value = None if isinstance(config, type) else getattr(config, field.name)
        flag = prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            out |= _options(value, f"{flag}.")
            continue
        option = Option(
            flag,
            typing.get_args(hint)[0] if annotated else hint,
            appends=tyro.conf.UseAppendAction in extras,
            required=isinstance(config, type) and field.default is dataclasses.MISSING,
        )
        short = [alias for extra in extras for alias in getattr(extra, "aliases", None) or ()]
        out |= dict.fromkeys([flag, *short, *([option.off] if option.hint is bool else [])], option)
    return out


def _flags(table: dict[str, Option]) -> list[str]:
    return [name for name in table if name.startswith("--")]


def _has_positional(cls: type) -> bool:
    hints = typing.get_type_hints(cls, include_extras=True).values()
    return any(tyro.conf.Positional in getattr(hint, "__metadata__", ()) for hint in hints)


def _split(
    arguments: Sequence[str], table: dict[str, Option], *, positional: bool
) -> tuple[list[str], list[str]]:
    """Return the arguments that are options of `table`, their values checked, and the others."""
    known: list[str] = []
    rest: list[str] = []
    given: Counter[str] = Counter()
    place = 0
    while place < len(arguments):
        argument = arguments[place]
        place += 1
        name, equals, value = argument.partition("=")
        name = name.replace("_", "-") if name.startswith("--") else name
        if name not in table:
            # what stands before the first option belongs to the command; behind an unknown one it is its value
            own = positional and not argument.startswith("-") and not rest
            if own and not argument:
                raise ConfigError("An empty path was given. Name a file or a folder.")
            (known if own else rest).append(argument)
            continue
        option = table[name]
        values = [value] if equals else []
        while not equals and place < len(arguments) and len(values) < len(option.elements):
            if arguments[place].startswith("--") or arguments[place] in table:
                break
            values.append(arguments[place])
            place += 1
        given[option.flag] += not option.appends
        known += _checked(
            option, name, values, arguments[place] if place < len(arguments) and not equals else None
        )
    for flag, times in given.items():
        if times > 1:
            print(f"note: {flag} was given {times} times; the last one counts.", file=sys.stderr)
    return known, rest


def _checked(option: Option, name: str, values: list[str], following: str | None) -> list[str]:
    """Return the arguments for tyro. following: what stands behind the values, for messages."""
    wanted = option.elements
    surplus = following is not None and (not following.startswith("-") or _is(float, following))
    if option.hint is bool and (values or surplus):
        raise ConfigError(
            f"{name}: takes no value; received {values[0] if values else following!r}. Write {option.flag} or {option.off}."
        )
    if len(values) < len(wanted) or (len(wanted) > 1 and surplus):
        number = "one value" if len(wanted) == 1 else f"{len(wanted)} values with blanks between"
        received = " ".join([*values, str(following)] if len(values) == len(wanted) else values)
        raise ConfigError(f"{name}: expected {number}; received {received or 'none'}.")
    texts = [_text(option, name, hint, text) for hint, text in zip(wanted, values, strict=True)]
    # joined, a value may begin with a dash
    return [f"{name}={texts[0]}"] if len(texts) == 1 else [name, *texts]


def _text(option: Option, name: str, hint: Any, text: str) -> str:
    """Return a value as tyro takes it. Raises ConfigError where it is none."""
    members = option.members if hint is option.hint else [hint]
    if type(None) in members and text.lower() == "none":
        return "None"
    choices: list[str] = [
        str(choice) for m in members if typing.get_origin(m) is Literal for choice in typing.get_args(m)
    ]
    if text in choices or any(_is(m, text) for m in members if typing.get_origin(m) is not Literal):
        return text
    if choices:
        raise ConfigError(
            f"{name}: no choice {text!r}.{nearest(text, choices)} Allowed: {', '.join(choices)}."
        )
    if Path in members:
        raise ConfigError(f"{name}: an empty path was given. Name a file or a folder.")
    allowed = "a whole number" if int in members else "a number"
    raise ConfigError(
        f"{name}: expected {allowed}{' or none' if type(None) in members else ''}; received {text!r}."
    )


def _is(kind: Any, text: str) -> bool:
    if kind is str:
        return True
    if kind is Path:
        return text != ""
    if kind not in (int, float):
        return False
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _unknown(argument: str, flags: Sequence[str], where: str) -> ConfigError:
    name = argument.partition("=")[0]
    if not name.startswith("-"):
        return ConfigError(f"{argument!r} is no option, and no option before it takes it. {where}")
    # --mask-ratio for --masking.mask-ratio, --train.steps for --steps: the last part of a dotted name counts first
    same = [flag for flag in flags if _last(flag) == _last(name.replace("_", "-"))]
    hint = f" Did you mean '{same[0]}'?" if same else nearest(name.replace("_", "-"), flags)
    return ConfigError(f"no option {name!r}.{hint} {where}")


def _last(flag: str) -> str:
    return flag.lstrip("-").rpartition(".")[2]


# --- reports ---


def check_writable(path: Path, flag: str = "--json") -> None:
    """Raise ConfigError where the file of an option could not be written: before the work, not after it."""
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "is a folder")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise _unwritable(path, error, flag) from error


def write_json(path: Path | None, report: Any) -> None:
    """Write what a command reports, whole or not at all; nothing where no path was given."""
    if path is None:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            os.replace(temporary, path)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError, flag: str = "--json") -> ConfigError:
    return ConfigError(
        f"{flag} {path}: cannot be written ({error.strerror or error}). Name a file in a folder that can be."
    )
