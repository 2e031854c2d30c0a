"""Tensors and arrays as raw buffers, bit by bit."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import WireError
from runtime.wire import codec, tensors

DTYPES = [
    getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64",
        "complex128", "int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "bool",
    )
]  # fmt: skip


class Tagged:
    def __init__(self, **parts: Any) -> None:
        self.parts = parts


def _refusal(function: Callable[..., object], *args: Any, **options: Any) -> str | None:
    """The reason of the WireError that `function` raises; None when it raises nothing."""
    try:
        function(*args, **options)
    except WireError as error:
        return error.reason
    return None


def _through(value: Any, **options: Any) -> Any:
    body, buffers = codec.encode(value, **options)
    received = [memoryview(bytearray(buffer)) for buffer in buffers]
    return codec.decode(body, received, **options)


def _bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def _assert_same_tensor(got: torch.Tensor, sent: torch.Tensor) -> None:
    assert (got.dtype, got.shape, got.requires_grad) == (sent.dtype, sent.shape, False)
    assert _bits(got) == _bits(sent)
    if got.numel():
        got.reshape(-1)[0] = 0  # writable, or this warns


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (7, 3), (40, 33)], ids=str)
def test_tensors_arrive_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    sent = (torch.rand(shape) * 100).to(dtype)
    _assert_same_tensor(_through(sent, pickle=False), sent)
    _assert_same_tensor(_through(Tagged(t=sent)).parts["t"], sent)


def test_every_bit_pattern_of_bfloat16_survives() -> None:
    sent = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    _assert_same_tensor(_through(sent), sent)


def test_a_tensor_is_neither_copied_when_sent_nor_when_it_arrives() -> None:
    sent = torch.arange(100_000, dtype=torch.float32)
    body, (raw,) = codec.encode([sent, "x"])
    assert numpy.frombuffer(raw, numpy.uint8).ctypes.data == sent.data_ptr()
    received = bytearray(raw)
    got = codec.decode(body, [received])[0]
    got[0] = 5
    assert received[:4] == bytes(torch.tensor([5.0]).numpy())


def test_views_gradients_and_conjugates_arrive_as_their_values() -> None:
    base = torch.rand(50, 60, requires_grad=True)
    for sent in (base, base.t(), base[::2, 3:], base.expand(2, 50, 60)):
        _assert_same_tensor(_through(sent), sent)
    wave = torch.rand(40, dtype=torch.complex64).conj()
    got = _through(wave)
    assert torch.equal(got, wave)


def test_what_is_not_plain_is_pickled_whole() -> None:
    parameter = torch.nn.Parameter(torch.rand(50, 50))
    got = _through(parameter)
    assert type(got) is torch.nn.Parameter
    assert got.requires_grad
    assert torch.equal(got, parameter)
    sparse = torch.eye(3).to_sparse()
    assert torch.equal(_through(sparse).to_dense(), torch.eye(3))
    assert _through(torch.empty(3, device="meta")).device.type == "meta"


def test_tied_weights_stay_tied_and_travel_once_beside_the_body() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(100, 100), torch.nn.Linear(100, 100))
    model[1].weight = model[0].weight
    body, buffers = codec.encode(model)
    assert sum(map(len, buffers)) == 100 * 100 * 4
    assert len(body) < 8000
    got = _through(model)
    assert got[0].weight is got[1].weight
    assert torch.equal(got[0].weight, model[0].weight)


def test_a_misaligned_buffer_is_copied() -> None:
    sent = torch.arange(1000, dtype=torch.float64)
    body, (raw,) = codec.encode(sent)
    block = bytearray(b"x" + bytes(raw))
    got = codec.decode(body, [memoryview(block)[1:]])
    assert torch.equal(got, sent)
    assert got.data_ptr() % 8 == 0


ARRAYS = [
    numpy.arange(12).reshape(3, 4),
    numpy.arange(12000, dtype=">i4").reshape(30, 400),
    numpy.asfortranarray(numpy.random.default_rng(0).random((30, 40))),
    numpy.arange(900).reshape(30, 30)[::2, ::3],
    numpy.array(3.5),
    numpy.zeros((0, 3)),
    numpy.array(["a", "längér"]),
    numpy.array([b"a", b"bc"]),
    numpy.array(["2024-01-01", "NaT"], "M8[D]"),
    numpy.array([5], "m8[ns]"),
    numpy.zeros(500, [("a", "<i4"), ("b", "<f8", (2, 2)), ("c", [("d", "u1"), ("e", "S3")])]),
    numpy.zeros(3, numpy.dtype({"names": ["a", "b"], "formats": ["u1", "f8"], "offsets": [0, 8]})),
    numpy.ones(400, numpy.float16),
    numpy.ones(400, numpy.longdouble),
    numpy.array([1 + 2j]),
    numpy.array([True, False]),
]


@pytest.mark.parametrize("sent", ARRAYS, ids=lambda a: f"{a.dtype.str}{a.shape}")
def test_arrays_arrive_as_they_were(sent: numpy.ndarray) -> None:
    got = _through([sent], pickle=False)[0]
    assert (got.dtype, got.shape) == (sent.dtype, sent.shape)
    assert got.flags.f_contiguous == sent.flags.f_contiguous or not sent.flags.contiguous
    assert got.tobytes() == sent.tobytes()
    assert got.flags.writeable
    assert got.flags.aligned


def test_arrays_of_objects_and_subclasses_are_pickled() -> None:
    assert _through(numpy.array([None, {"a": 1}], object)).tolist() == [None, {"a": 1}]
    masked = numpy.ma.array([1, 2], mask=[0, 1])
    got = _through(masked)
    assert type(got) is type(masked)
    assert got.mask.tolist() == [False, True]


@pytest.mark.parametrize(
    "scalar",
    [numpy.float32(1.5), numpy.float64(2), numpy.int8(-3), numpy.bool_(True), numpy.complex64(1j),
     numpy.datetime64("2024-01-01"), numpy.timedelta64(5, "s"), numpy.str_("x"), numpy.bytes_(b"y")],
    ids=repr,
)  # fmt: skip
def test_numpy_scalars_keep_their_type(scalar: Any) -> None:
    got = _through({"s": scalar})["s"]
    assert type(got) is type(scalar)
    assert got == scalar
    assert got.dtype == scalar.dtype


@given(
    st.integers(0, 2),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8)
        | st.sampled_from(["float32", "<f4", "O", "<M8[ns]", "S3", "V4"]),
        lambda inner: st.lists(inner, max_size=4),
        max_leaves=8,
    ),
    st.binary(max_size=16),
)  # fmt: skip
def test_wrong_descriptions_are_wire_errors(which: int, description: Any, buffer: bytes) -> None:
    reason = _refusal(tensors.restore, which, description, buffer)
    assert reason in {None, "malformed tensor"}


@pytest.mark.parametrize(
    ("which", "description", "size"),
    [
        (tensors.TENSOR, ["float32", [3]], 11),
        (tensors.TENSOR, ["float32", [-3]], 12),
        (tensors.TENSOR, ["float32", [2**47, 2**47]], 12),
        (tensors.TENSOR, ["load", [3]], 12),
        (tensors.TENSOR, ["os.system", [3]], 12),
        (tensors.TENSOR, ["float32"], 4),
        (tensors.TENSOR, ["float32", [1] * 65], 4),
        (tensors.ARRAY, ["O", [1], False], 8),
        (tensors.ARRAY, [[["a", "O"]], [1], False], 8),
        (tensors.ARRAY, ["<f4", [3], False], 11),
        (tensors.SCALAR, ["<f4"], 5),
        (tensors.SCALAR, ["O"], 8),
    ],
)
def test_a_description_must_fit_its_buffer(which: int, description: list, size: int) -> None:
    with pytest.raises(WireError, match="malformed tensor"):
        tensors.restore(which, description, bytes(size))


def test_the_codec_imports_neither_torch_nor_numpy() -> None:
    code = (
        "import sys; from runtime.wire import codec; e = codec.encode([1, {2}, 'x', ValueError()]);"
        "codec.decode(*e); print('torch' in sys.modules, 'numpy' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_tensors_can_be_encoded_in_many_threads_at_once() -> None:
    failures: list[object] = []

    def work(seed: int) -> None:
        value = {"t": torch.full((1000,), seed), "x": [seed] * 50, "n": (seed,)}
        for _ in range(100):
            got = _through(value)
            if (
                got["x"] != value["x"]
                or got["n"] != (seed,)
                or not torch.equal(got["t"], value["t"])
            ):
                failures.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
