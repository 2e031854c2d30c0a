"""The door to the codec: values, the arguments of calls, and errors, each as a body and buffers.

How values travel stands in `wire.values`, tensors in `wire.tensors`, exceptions in `wire.remote`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from runtime.errors import MisuseError, WireError
from runtime.wire.frames import Buffer
from runtime.wire.remote import decode_error, encode_error
from runtime.wire.values import Encoded, decode, encode, encode_leaves

__all__ = [
    "Encoded",
    "decode",
    "decode_arguments",
    "decode_error",
    "encode",
    "encode_arguments",
    "encode_error",
]


def encode_arguments(
    args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, *, pickle: bool = True
) -> Encoded:
    """The arguments of one call. Raises `MisuseError` that names the argument that cannot be sent."""
    quick = encode_leaves(args) if not kwargs else None
    if quick is not None:
        return quick
    arguments = [list(args), dict(kwargs) if kwargs else None]
    try:
        return encode(arguments, pickle=pickle, what="")
    except MisuseError as error:
        raise MisuseError(_named(str(error))) from error.__cause__


def _named(text: str) -> str:
    """Say "argument 2" and "argument 'lr'" where `encode` says "[0][2]" and "[1]['lr']"."""
    for prefix in ("[0][", "[1]["):
        if text.startswith(prefix):
            name, _, rest = text[len(prefix) :].partition("]")
            return f"argument {name}{rest}"
    return f"the arguments{text}" if text.startswith(" ") else text


def decode_arguments(
    body: Buffer, buffers: Sequence[Buffer] = (), *, pickle: bool = True
) -> tuple[list[Any], dict[str, Any]]:
    """Positional and named arguments. Raises `WireError`, and nothing else."""
    value = decode(body, buffers, pickle=pickle)
    if type(value) is not list or len(value) != 2 or type(value[0]) is not list:
        raise WireError("malformed arguments")
    args, kwargs = value
    if kwargs is None:
        return args, {}
    if type(kwargs) is not dict or not {str}.issuperset(map(type, kwargs)):
        raise WireError("malformed arguments")
    return args, kwargs
