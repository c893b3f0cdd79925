"""Reading pickles of networks without making the objects in them: what is no data is written down, not built.

A pickle is a program; its instructions name functions ("globals") and call them. Here no name is ever looked
up. A name is one of three:

* a container or tensor (:data:`MADE`), which a function of this file makes;
* a class that network snapshots hold (:data:`RECORDED`): what it would have been called with, and the state
  it would have been given, become a :class:`Recorded`;
* anything else, which is refused by name.

Snapshots of EDM (and StyleGAN) hold the source code of their classes, too; it is a string like any other.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sde_diffusion.pretrained.state import PretrainedError


class Recorded:
    """An object that a file describes and that was not made.

    Attributes:
        name: the class or function, in full, such as ``torch.nn.modules.container.ModuleDict``.
        args, kwargs: what it would have been called with.
        state: what its attributes would have been set from; None if there is none.
    """

    def __init__(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.name = name
        self.args = args
        self.kwargs = kwargs
        self.state: Any = None

    def __repr__(self) -> str:
        return f"Recorded({self.name})"


def _dict(*content: Any) -> dict[Any, Any]:
    return dict(*content)


def _set(*content: Any) -> set[Any]:
    return set(*content)


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise ValueError(f"bytes written as text in {encoding!r}")
    return text.encode("latin1")


def _storage(data: bytes) -> torch.storage.TypedStorage:
    """The numbers of a tensor, a file of torch.save within the pickle; torch's restricted unpickler reads it."""
    try:
        storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise _Refused(found.group(1).rstrip(".") if found else "an object inside a tensor") from None
    if not isinstance(storage, torch.storage.TypedStorage):
        raise ValueError(f"a {type(storage).__name__} where the numbers of a tensor should be")
    return storage


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *options: Any) -> Tensor:
    """A view of the numbers; ``options`` (whether it needs gradients, hooks) have no bearing on its value."""
    if not isinstance(storage, torch.storage.TypedStorage):
        raise ValueError(f"a tensor made from a {type(storage).__name__}")
    numbers = [offset, *size, *stride]
    if any(not isinstance(n, int) or n < 0 for n in numbers) or len(size) != len(stride):
        raise ValueError(f"a tensor of size {size} and stride {stride} at {offset}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and last >= storage._size():
        raise ValueError(f"a tensor of {last + 1} numbers of which the file has {storage._size()}")
    empty = torch.empty(0, dtype=storage.dtype)
    return empty.set_(storage._untyped_storage, offset, tuple(size), tuple(stride))


def _parameter(data: Any, *options: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise ValueError(f"a parameter made from a {type(data).__name__}")
    return data


#: What is made, and by which function here.
MADE: Mapping[str, Callable[..., Any]] = {
    "collections.OrderedDict": _dict,
    "dnnlib.util.EasyDict": _dict,
    "builtins.set": _set,
    "_codecs.encode": _latin1,
    "torch.storage._load_from_bytes": _storage,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
}

#: The function that EDM's snapshots call for each of their objects; it would run the source code in them.
PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"

#: What is written down: the classes of snapshots, and the NumPy numbers among their attributes.
RECORDED = re.compile(
    "|".join(
        [
            re.escape(PERSISTENT),
            r"(torch\.nn\.modules|training|torch_utils|dnnlib)(\.\w+)+\.\w+",
            r"copyreg\._reconstructor|builtins\.object",
            r"numpy\.(dtype|ndarray)|numpy\._?core\.multiarray\.(scalar|_reconstruct)",
        ]
    )
)


class _Refused(Exception):
    """A global that is neither made nor recorded."""


class _Global:
    """A name in a pickle. Only :class:`_Reader` calls it, and it has no state that could be set."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def make(self, args: Any, kwargs: Mapping[str, Any]) -> Any:
        if self.name in MADE:
            return MADE[self.name](*args, **kwargs)
        return Recorded(self.name, tuple(args), dict(kwargs))


#: The instructions that are obeyed. Left out: names from a registry, buffers and objects outside the file.
_INSTRUCTIONS = [
    "MARK",
    "STOP",
    "POP",
    "POP_MARK",
    "DUP",
    "PROTO",
    "FRAME",
    "MEMOIZE",
    "PUT",
    "BINPUT",
    "LONG_BINPUT",
    "GET",
    "BINGET",
    "LONG_BINGET",
    "NONE",
    "NEWTRUE",
    "NEWFALSE",
    "INT",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG",
    "LONG1",
    "LONG4",
    "FLOAT",
    "BINFLOAT",
    "STRING",
    "BINSTRING",
    "SHORT_BINSTRING",
    "UNICODE",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINBYTES8",
    "TUPLE",
    "EMPTY_TUPLE",
    "TUPLE1",
    "TUPLE2",
    "TUPLE3",
    "LIST",
    "EMPTY_LIST",
    "APPEND",
    "APPENDS",
    "DICT",
    "EMPTY_DICT",
    "SETITEM",
    "SETITEMS",
    "EMPTY_SET",
    "ADDITEMS",
    "FROZENSET",
    "GLOBAL",
    "STACK_GLOBAL",
    "INST",
    "OBJ",
    "REDUCE",
    "NEWOBJ",
    "NEWOBJ_EX",
    "BUILD",
]

_Machine: Any = pickle._Unpickler  # the one in Python, whose steps can be replaced


class _Reader(_Machine):
    """The pickle machine with every step that looks up, calls or changes something replaced."""

    dispatch = {code: _Machine.dispatch[code] for code in (getattr(pickle, n)[0] for n in _INSTRUCTIONS)}  # noqa: RUF012

    def find_class(self, module: str, name: str) -> _Global:
        full = f"{module}.{name}"
        if full in MADE or RECORDED.fullmatch(full):
            return _Global(full)
        raise _Refused(full)

    def _called(self, function: Any, args: Any, kwargs: Any) -> Any:
        if not isinstance(function, _Global):
            raise _Refused(f"a call of a {type(function).__name__}")
        return function.make(args, kwargs)

    def _instantiate(self, function: Any, args: Any) -> None:  # INST and OBJ
        self.append(self._called(function, args, {}))

    def _reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._called(self.stack[-1], args, {})

    def _new(self) -> None:
        kwargs = self.stack.pop()
        args = self.stack.pop()
        self.stack[-1] = self._called(self.stack[-1], args, kwargs)

    def _build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, Recorded):
            raise _Refused(f"a change to the state of a {type(target).__name__}")
        target.state = state

    dispatch[pickle.REDUCE[0]] = _reduce
    dispatch[pickle.NEWOBJ[0]] = _reduce
    dispatch[pickle.NEWOBJ_EX[0]] = _new
    dispatch[pickle.BUILD[0]] = _build


def read_pickle(path: Path) -> Any:
    """The plain values, containers and tensors of a pickle, with :class:`Recorded` for all other objects.

    Nothing that the file names is imported or called.

    Raises:
        PretrainedError: the file asks for something that such a file has no use for (the message names it),
            or it is truncated or damaged.
    """
    with path.open("rb") as file:
        return _read(file, path)


def _read(file: BinaryIO, path: Path) -> Any:
    try:
        return _Reader(file).load()
    except _Refused as refused:
        raise PretrainedError(
            f"{path} asks for {refused}, which is no tensor, plain container or class of a network snapshot; "
            "it was refused, and nothing in the file was run"
        ) from None
    except EOFError as error:
        raise PretrainedError(f"{path} ({path.stat().st_size} bytes) is truncated") from error
    except (
        pickle.UnpicklingError,
        ArithmeticError,
        AttributeError,
        LookupError,
        MemoryError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise PretrainedError(
            f"{path} ({path.stat().st_size} bytes) is truncated or damaged ({reason})"
        ) from error
