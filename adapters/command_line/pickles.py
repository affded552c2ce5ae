"""Read what a pickle describes without running it.

A pickle is a program for a small stack machine. This interpreter knows its containers and
numbers. Everything that `pickle` would import and call stays a description: a `Reference` names
it, and a function of the reader decides what a call of it stands for. No name is ever imported.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

__all__ = ["Pairs", "PickleError", "Reference", "UnknownReferenceError", "read_pickle"]

_MOST_STEPS = 10_000_000  # that many describe about 250,000 tensors
_MARK = object()


class PickleError(ValueError):
    """A pickle is damaged, too long, or uses what state dictionaries do not need."""


class UnknownReferenceError(PickleError):
    """A pickle names a class or function that a state dictionary does not need."""


class Buffer(Protocol):
    """Bytes, a memoryview or a memory map."""

    def __getitem__(self, index: Any, /) -> Any: ...

    def __len__(self) -> int: ...


class Reference(NamedTuple):
    """The name of a class or function, which is not imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Pairs(list[tuple[Any, Any]]):
    """The items of a mapping. Keys are not hashed: a file could choose keys that collide."""


def read_pickle(
    data: Buffer,
    start: int,
    construct: Callable[[Any, Any], Any],
    persistent: Callable[[Any], Any],
    allowed: Callable[[Reference], bool],
) -> tuple[Any, int]:
    """Return the object that a pickle describes, and the place behind the pickle.

    Parameters
    ----------
    data : buffer
    start : int
        Where the pickle begins.
    construct : callable
        ``construct(function, arguments)`` returns what a call stands for; ``function`` is a
        `Reference`, and ``arguments`` is whatever the file gives.
    persistent : callable
        Return what a persistent id, of any kind, stands for.
    allowed : callable
        Whether the file may name a reference.

    Raises
    ------
    UnknownReferenceError
        If the pickle names what is not allowed.
    PickleError
        If it is damaged or has more than ten million steps.

    Examples
    --------
    >>> import pickle
    >>> data = pickle.dumps({"a": [1, (2.5, None)]}, 2)
    >>> read_pickle(data, 0, lambda f, x: None, lambda x: None, lambda x: False)
    ([('a', [1, (2.5, None)])], 35)
    """
    machine = _Machine(data, start, construct, persistent, allowed)
    try:
        return machine.run(), machine.at
    except PickleError:
        raise
    except (IndexError, KeyError, TypeError, ValueError, struct.error, OverflowError) as error:
        raise PickleError(f"a damaged pickle, at byte {machine.at}") from error


class _Machine:
    def __init__(
        self,
        data: Buffer,
        at: int,
        construct: Callable[[Any, Any], Any],
        persistent: Callable[[Any], Any],
        allowed: Callable[[Reference], bool],
    ) -> None:
        self.data, self.at = data, at
        self.construct, self.persistent, self.allowed = construct, persistent, allowed
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        start = self.at
        for _ in range(_MOST_STEPS):
            code = self.data[self.at]
            self.at += 1
            if code == 0x2E:  # STOP
                return self.stack.pop()
            step = _STEPS.get(code)
            if step is None:
                if self.at == start + 1:
                    first = bytes(self.data[start : start + 8])
                    raise PickleError(f"a file of another kind, which begins with {first!r}")
                raise PickleError(f"the pickle operation {bytes([code])!r}")
            step(self)
        raise PickleError(f"a pickle of more than {_MOST_STEPS:,} steps")

    def take(self, n: int) -> bytes:
        found = bytes(self.data[self.at : self.at + n])
        if len(found) < n:
            raise PickleError("a pickle that is cut off")
        self.at += n
        return found

    def number(self, form: struct.Struct) -> Any:
        (found,) = form.unpack_from(self.data, self.at)  # type: ignore[arg-type]
        self.at += form.size
        return found

    def line(self) -> bytes:
        limit = self.at + 1000
        found = bytes(self.data[self.at : limit])
        text, end, _ = found.partition(b"\n")
        if not end:
            raise PickleError("a pickle with a line that does not end")
        self.at += len(text) + 1
        return text

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def marked(self) -> list[Any]:
        """Remove and return what lies above the last mark."""
        i = len(self.stack) - 1
        while self.stack[i] is not _MARK:
            i -= 1
            if i < 0:
                raise PickleError("a damaged pickle, without a mark")
        found = self.stack[i + 1 :]
        del self.stack[i:]
        return found

    def tuple_of(self, n: int) -> None:
        if len(self.stack) < n:
            raise PickleError("a damaged pickle, with too short a stack")
        found = tuple(self.stack[len(self.stack) - n :])
        del self.stack[len(self.stack) - n :]
        self.push(found)

    def extend(self, values: Iterable[Any]) -> None:
        into = self.stack[-1]
        if type(into) is not list:
            raise PickleError("a pickle that appends to something else than a list")
        into.extend(values)

    def update(self, flat: list[Any]) -> None:
        into = self.stack[-1]
        if type(into) is not Pairs:
            raise PickleError("a pickle that sets items of something else than a mapping")
        into.extend(zip(flat[::2], flat[1::2], strict=True))

    def refer(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleError("a damaged pickle, with a name that is not text")
        found = Reference(module, name)
        if not self.allowed(found):
            raise UnknownReferenceError(str(found))
        self.push(found)

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.push(self.construct(function, arguments))

    def put(self, i: int) -> None:
        self.memo[i] = self.stack[-1]

    def pop_pair(self) -> list[Any]:
        value, key = self.stack.pop(), self.stack.pop()
        return [key, value]


def _text_number(m: _Machine) -> int | bool:
    line = m.line()
    return {b"00": False, b"01": True}.get(line, int(line))


def _sized(form: str, *, text: bool) -> Callable[[_Machine], None]:
    size = struct.Struct(form)

    def step(m: _Machine) -> None:
        found = m.take(m.number(size))
        m.push(found.decode("utf-8", "surrogatepass") if text else found)

    return step


def _numbered(form: str, use: Callable[[_Machine, Any], None]) -> Callable[[_Machine], None]:
    number = struct.Struct(form)
    return lambda m: use(m, m.number(number))


def _integer(form: str) -> Callable[[_Machine], None]:
    size = struct.Struct(form)
    return lambda m: m.push(int.from_bytes(m.take(m.number(size)), "little", signed=True))


def _get(m: _Machine, i: int) -> None:
    m.push(m.memo[i])


_STEPS: dict[int, Callable[[_Machine], None]] = {
    ord(code): step
    for code, step in {
        "\x80": lambda m: m.take(1),  # PROTO
        "\x95": lambda m: m.take(8),  # FRAME
        "(": lambda m: m.push(_MARK),
        "0": lambda m: m.stack.pop(),
        "1": lambda m: m.marked(),
        "2": lambda m: m.push(m.stack[-1]),
        "N": lambda m: m.push(None),
        "\x88": lambda m: m.push(True),
        "\x89": lambda m: m.push(False),
        "I": lambda m: m.push(_text_number(m)),
        "J": _numbered("<i", _Machine.push),
        "K": _numbered("<B", _Machine.push),
        "M": _numbered("<H", _Machine.push),
        "G": _numbered(">d", _Machine.push),
        "\x8a": _integer("<B"),
        "\x8b": _integer("<I"),
        "U": _sized("<B", text=True),
        "T": _sized("<I", text=True),
        "X": _sized("<I", text=True),
        "\x8c": _sized("<B", text=True),
        "\x8d": _sized("<Q", text=True),
        "C": _sized("<B", text=False),
        "B": _sized("<I", text=False),
        "\x8e": _sized("<Q", text=False),
        "]": lambda m: m.push([]),
        "a": lambda m: m.extend([m.stack.pop()]),
        "e": lambda m: m.extend(m.marked()),
        "l": lambda m: m.push(m.marked()),
        ")": lambda m: m.push(()),
        "t": lambda m: m.push(tuple(m.marked())),
        "\x85": lambda m: m.tuple_of(1),
        "\x86": lambda m: m.tuple_of(2),
        "\x87": lambda m: m.tuple_of(3),
        "}": lambda m: m.push(Pairs()),
        "d": lambda m: (lambda flat: (m.push(Pairs()), m.update(flat)))(m.marked()),
        "s": lambda m: m.update(m.pop_pair()),
        "u": lambda m: m.update(m.marked()),
        "\x8f": lambda m: m.push([]),  # EMPTY_SET
        "\x90": lambda m: m.extend(m.marked()),  # ADDITEMS
        "\x91": lambda m: m.push(m.marked()),  # FROZENSET
        "c": lambda m: m.refer(m.line().decode(), m.line().decode()),
        "\x93": lambda m: m.refer(*m.pop_pair()),
        "R": _Machine.call,
        "\x81": _Machine.call,  # NEWOBJ
        "b": lambda m: m.stack.pop(),  # BUILD: attributes, which are not needed
        "p": lambda m: m.put(int(m.line())),
        "q": _numbered("<B", _Machine.put),
        "r": _numbered("<I", _Machine.put),
        "\x94": lambda m: m.put(len(m.memo)),
        "g": lambda m: _get(m, int(m.line())),
        "h": _numbered("<B", _get),
        "j": _numbered("<I", _get),
        "Q": lambda m: m.push(m.persistent(m.stack.pop())),
    }.items()
}
