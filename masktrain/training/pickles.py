# SPDX-License-Identifier: Apache-2.0
"""Pickles read as data: nothing that a pickle names is imported, called or built.

Published checkpoints are pickles, and reading one in the usual way runs what it says. Here the few dozen
instructions of the format are followed on plain values only: a name stays a `Name`, and whatever would have been
called becomes a `Call`, a record of what, with which arguments. Who reads the result decides what a `Call` means
(masktrain/training/foreign.py knows those that make tensors); all others stay records for ever, also argparse
namespaces, numpy scalars and configs of other programs.
"""

from __future__ import annotations

import io
import pickletools
import struct
from dataclasses import dataclass, field
from typing import Any

MAX_BYTES = 16 << 20
"""Most bytes of a pickle: that of a checkpoint names its tensors and is far below a megabyte."""
MAX_OPERATIONS = 2_000_000


class PickleError(ValueError):
    """Bytes that are no pickle, or one that no checkpoint would hold."""


@dataclass(frozen=True)
class Name:
    """A name that the pickle would have imported: "module.attribute"."""

    text: str


@dataclass(frozen=True)
class Persistent:
    """A reference to something beside the pickle, such as a tensor's memory."""

    key: Any


@dataclass(eq=False)
class Call:
    """What the pickle would have called or constructed. name: "module.attribute". state: what it would have been
    given afterwards. items, elements: what would have been put in, as into a dict or a list."""

    name: str
    args: tuple[Any, ...]
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)


_CONSTANTS = {
    "NONE": None,
    "NEWTRUE": True,
    "NEWFALSE": False,
    "EMPTY_TUPLE": (),
}
_ARGUMENT = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8".split()
)
_KEYS = (str, int, float, bytes, type(None))


def read_pickle(content: bytes) -> Any:
    """Return what a pickle describes: None, bool, int, float, str, bytes, tuple, list, dict, Name, Call and
    Persistent. Sets are Calls. Entries of dicts whose key is no plain value are left out.

    Raises PickleError. The time is at most linear in the length, of which MAX_BYTES are allowed.
    """
    if len(content) > MAX_BYTES:
        raise PickleError(f"its pickle has {len(content)} bytes, more than the {MAX_BYTES} of any checkpoint")
    machine = _Machine()
    try:
        for number, (code, argument, _) in enumerate(pickletools.genops(io.BytesIO(content))):
            if number >= MAX_OPERATIONS:
                raise PickleError(f"its pickle has over {MAX_OPERATIONS} operations")
            machine.do(code.name, argument)
        if machine.marks or len(machine.stack) != 1:
            raise PickleError("its pickle ends unfinished")
        return machine.stack[0]
    except PickleError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError, struct.error) as error:
        raise PickleError(f"its pickle is damaged ({str(error)[:80]})") from error


class _Machine:
    """The stack and the memo of a pickle. Wrong types and an empty stack raise TypeError and IndexError."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []  # the stacks below the marks
        self.memo: dict[int, Any] = {}

    def do(self, code: str, argument: Any) -> None:
        """Follow one instruction."""
        stack = self.stack
        if code in ("PROTO", "FRAME", "STOP"):
            return
        if code in _ARGUMENT:
            stack.append(bytes(argument) if isinstance(argument, bytearray) else argument)
        elif code in _CONSTANTS:
            stack.append(_CONSTANTS[code])
        elif code == "MARK":
            self.marks.append(stack)
            self.stack = []
        elif code in ("POP_MARK", "POP"):
            if code == "POP_MARK" or not stack:
                self._to_mark()
            else:
                stack.pop()
        elif code == "DUP":
            stack.append(stack[-1])
        elif code in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif code == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif code in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif code in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(code[-1])
            if len(stack) < count:
                raise IndexError("nothing is left on the stack")
            stack[-count:] = [tuple(stack[-count:])]
        elif code in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"):
            stack.append(
                Call("builtins.set", ()) if code == "EMPTY_SET" else [] if code == "EMPTY_LIST" else {}
            )
        elif code in ("TUPLE", "LIST", "DICT", "FROZENSET"):
            self._collect(code, self._to_mark())
        elif code in ("APPEND", "APPENDS", "ADDITEMS"):
            values = [stack.pop()] if code == "APPEND" else self._to_mark()
            _extend(self.stack[-1], values)
        elif code in ("SETITEM", "SETITEMS"):
            pairs = [stack.pop(-2), stack.pop()] if code == "SETITEM" else self._to_mark()
            _update(self.stack[-1], pairs)
        elif code in ("BINPERSID", "PERSID"):
            stack.append(Persistent(stack.pop() if code == "BINPERSID" else argument))
        else:
            self._name_or_call(code, argument)

    def _to_mark(self) -> list[Any]:
        values = self.stack
        self.stack = self.marks.pop()
        return values

    def _collect(self, code: str, values: list[Any]) -> None:
        if code == "FROZENSET":
            self.stack.append(Call("builtins.frozenset", (values,)))
        elif code == "DICT":
            made: dict[Any, Any] = {}
            _update(made, values)
            self.stack.append(made)
        else:
            self.stack.append(tuple(values) if code == "TUPLE" else values)

    def _name_or_call(self, code: str, argument: Any) -> None:
        stack = self.stack
        if code == "GLOBAL":
            stack.append(Name(argument.replace(" ", ".", 1)))
        elif code == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            if not isinstance(attribute, str) or not isinstance(module, str):
                raise TypeError("a name is no text")
            stack.append(Name(f"{module}.{attribute}"))
        elif code in ("REDUCE", "NEWOBJ"):
            args, made = stack.pop(), stack.pop()
            stack.append(_call(made, args))
        elif code == "NEWOBJ_EX":
            options, args, made = stack.pop(), stack.pop(), stack.pop()
            stack.append(_call(made, (args, options)))
        elif code == "INST":
            values = self._to_mark()
            self.stack.append(_call(Name(argument.replace(" ", ".", 1)), tuple(values)))
        elif code == "OBJ":
            made, *values = self._to_mark()
            self.stack.append(_call(made, tuple(values)))
        elif code == "BUILD":
            state, built = stack.pop(), stack[-1]
            if not isinstance(built, Call):
                raise TypeError("a plain value is given a state")
            built.state = state
        else:
            raise PickleError(f"its pickle holds {code}, which no checkpoint needs")


def _call(made: Any, args: Any) -> Call:
    name = made.text if isinstance(made, Name) else "(something computed)"
    return Call(name, args if isinstance(args, tuple) else (args,))


def _extend(target: Any, values: list[Any]) -> None:
    if isinstance(target, Call):
        target = target.elements
    if not isinstance(target, list):
        raise TypeError("values are added to what is no list")
    target.extend(values)


def _update(target: Any, pairs: list[Any]) -> None:
    if isinstance(target, Call):
        target = target.items
    if not isinstance(target, dict) or len(pairs) % 2:
        raise TypeError("keys and values are set in what is no dictionary")
    # another key, a tuple of tuples say, may take for ever to hash
    target.update((k, v) for k, v in zip(pairs[::2], pairs[1::2], strict=True) if isinstance(k, _KEYS))
