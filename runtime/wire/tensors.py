"""Tensors and arrays as a short description and one raw buffer.

numpy and torch are looked at only where they are loaded already: a value cannot be a tensor in a process
that never imported torch. A process that *receives* one imports it then. What arrives is writable and,
where the buffer it came in is, shares its memory; a read-only buffer is copied once.

    torch    strided, plain `torch.Tensor` of every dtype, detached; from another device by way of the CPU.
             Parameters and other subclasses, sparse, quantized and meta tensors are pickled.
    numpy    `numpy.ndarray` of every dtype without objects, structured ones and datetimes included, in
             C or Fortran order (anything else arrives in C order); scalars. The rest is pickled.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from typing import Any

from runtime.errors import WireError
from runtime.wire.frames import Buffer

_RAW_KINDS = frozenset("biufcSUmM")
_SCALAR_KINDS = frozenset("biufcmM")
_MAX_DIMENSIONS = 64
_DTYPE = re.compile(r"[<>|][biufcSUmMV][0-9]{0,9}(\[[0-9]{0,9}[A-Za-zμ]{1,2}\])?")
"""How numpy writes dtypes that are not structured; it would read much else."""

_MISFITS = (
    TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, MemoryError,
    SyntaxError,
)  # fmt: skip
"""What numpy and torch raise for descriptions that make no sense."""

Description = list[Any]
"""Plain data: what `restore_*` needs beside the buffer."""


def describer(kind: type) -> Callable[[Any], tuple[int, Description, Buffer] | None] | None:
    """For a type that this module knows: what gives (which, description, raw bytes) of its values.

    The function returns None for a value that has to be pickled.
    """
    torch = sys.modules.get("torch")
    if torch is not None and kind is getattr(torch, "Tensor", None):
        return _describe_tensor
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        if kind is getattr(numpy, "ndarray", None):
            return _describe_array
        if kind.__module__ == "numpy" and issubclass(kind, numpy.generic):
            return _describe_scalar
    return None


TENSOR, ARRAY, SCALAR = 0, 1, 2


def restore(which: int, description: object, buffer: Buffer) -> Any:
    """The value that `describer` took apart. Raises `WireError` when the two do not fit together."""
    if type(description) is not list or not description:
        raise WireError("malformed tensor", "no description")
    try:
        if which == TENSOR:
            return _restore_tensor(*description, buffer=buffer)
        if which == ARRAY:
            return _restore_array(*description, buffer=buffer)
        return _restore_scalar(*description, buffer=buffer)
    except WireError:
        raise
    except _MISFITS as error:
        raise WireError("malformed tensor", f"{type(error).__name__}: {error}"[:200]) from None


def writable(buffer: Buffer) -> bytearray | memoryview:
    """The buffer itself if it may be written to, else a copy."""
    if isinstance(buffer, bytearray):
        return buffer
    view = memoryview(buffer)
    return bytearray(view) if view.readonly else view


# torch


def _describe_tensor(tensor: Any) -> tuple[int, Description, Buffer] | None:
    torch = sys.modules["torch"]
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        return None
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    raw = b"" if plain.numel() == 0 else plain.reshape(-1).view(torch.uint8).numpy().data
    return TENSOR, [str(plain.dtype).removeprefix("torch."), list(plain.shape)], raw


def rebuild_tensor(dtype: str, shape: list[int], buffer: Buffer) -> Any:
    """What pickles of tensors call on arrival (see `wire.values`)."""
    return restore(TENSOR, [dtype, shape], buffer)


def reduce_tensor(tensor: Any, wrap: Callable[[Buffer], Any]) -> tuple[Any, ...]:
    """For a pickler: how to rebuild `tensor` from `wrap`'s view of its bytes."""
    described = _describe_tensor(tensor)
    if described is None:
        reduced: tuple[Any, ...] = tensor.__reduce_ex__(5)
        return reduced
    _, (dtype, shape), raw = described
    return rebuild_tensor, (dtype, shape, wrap(raw))


def _restore_tensor(dtype: str, shape: list[int], *, buffer: Buffer) -> Any:
    torch = importlib.import_module("torch")
    kind = vars(torch).get(dtype) if type(dtype) is str else None  # getattr would import modules
    if not isinstance(kind, torch.dtype):
        raise WireError("malformed tensor", f"no such dtype: {dtype!r}")
    size = _elements(shape) * kind.itemsize
    if size != len(buffer):
        raise WireError("malformed tensor", f"{len(buffer)} bytes, {dtype}{shape} has {size}")
    if size == 0:
        return torch.empty(shape, dtype=kind)
    flat = torch.frombuffer(writable(buffer), dtype=torch.uint8)
    if flat.data_ptr() % min(kind.itemsize, 8):
        flat = flat.clone()
    return flat.view(kind).reshape(shape)


def _elements(shape: object) -> int:
    if type(shape) is not list or len(shape) > _MAX_DIMENSIONS:
        raise WireError("malformed tensor", "no shape")
    count = 1
    for size in shape:
        if type(size) is not int or not 0 <= size < 2**48:
            raise WireError("malformed tensor", f"a shape cannot have {size!r}")
        count *= size
    return count


# numpy


def _describe_array(array: Any) -> tuple[int, Description, Buffer] | None:
    numpy = sys.modules["numpy"]
    descr = _describe_dtype(array.dtype)
    if descr is None:
        return None
    fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    if fortran:
        flat = array.T
    else:
        flat = array if array.flags.c_contiguous else numpy.ascontiguousarray(array)
    raw = b"" if array.nbytes == 0 else flat.reshape(-1).view(numpy.uint8).data
    return ARRAY, [descr, list(array.shape), fortran], raw


def _describe_dtype(dtype: Any) -> Any:
    """Plain data from which `_restore_dtype` makes the same dtype, or None if there is none."""
    if dtype.kind in _RAW_KINDS and dtype.metadata is None:
        return dtype.str if dtype.isbuiltin or dtype.kind in "SUmM" or not dtype.isnative else None
    if dtype.hasobject or dtype.names is None:
        return None
    numpy = sys.modules["numpy"]
    descr = _lists(numpy.lib.format.dtype_to_descr(dtype))
    return descr if _restore_dtype(descr) == dtype else None


def _lists(value: Any) -> Any:
    return [_lists(part) for part in value] if isinstance(value, list | tuple) else value


def _restore_dtype(descr: Any) -> Any:
    numpy = importlib.import_module("numpy")
    if type(descr) is str:
        return numpy.dtype(_dtype_text(descr))
    return numpy.lib.format.descr_to_dtype([_field(field) for field in descr])


def _dtype_text(text: Any) -> str:
    if type(text) is not str or not _DTYPE.fullmatch(text):
        raise WireError("malformed tensor", f"no such dtype: {text!r:.60}")
    return text


def _field(field: Any) -> tuple[Any, ...]:
    """(name or (title, name), dtype[, shape]), as numpy wants it: tuples where msgpack has lists."""
    name, kind, *shape = field
    name = tuple(name) if type(name) is list else name
    kind = [_field(part) for part in kind] if type(kind) is list else _dtype_text(kind)
    return (name, kind, *(tuple(part) for part in shape))


def _restore_array(descr: Any, shape: list[int], fortran: bool, *, buffer: Buffer) -> Any:
    numpy = importlib.import_module("numpy")
    dtype = _restore_dtype(descr)
    if dtype.hasobject:
        raise WireError("malformed tensor", "an array of objects cannot be raw")
    size = _elements(shape) * dtype.itemsize
    if size != len(buffer):
        raise WireError("malformed tensor", f"{len(buffer)} bytes, {dtype}{shape} has {size}")
    if size == 0:
        return numpy.empty(shape, dtype, order="F" if fortran else "C")
    array = numpy.frombuffer(writable(buffer), numpy.uint8).view(dtype)
    if not array.flags.aligned:
        array = array.copy()
    return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)


def _describe_scalar(scalar: Any) -> tuple[int, Description, Buffer] | None:
    dtype = scalar.dtype
    if dtype.kind not in _SCALAR_KINDS or type(scalar) is not dtype.type or not dtype.isnative:
        return None
    return SCALAR, [dtype.str], scalar.tobytes()


def _restore_scalar(descr: str, *, buffer: Buffer) -> Any:
    numpy = importlib.import_module("numpy")
    dtype = numpy.dtype(_dtype_text(descr))
    if dtype.kind not in _SCALAR_KINDS or dtype.itemsize != len(buffer):
        raise WireError("malformed tensor", f"{len(buffer)} bytes for a {descr}")
    return numpy.frombuffer(bytes(buffer), dtype)[0]
