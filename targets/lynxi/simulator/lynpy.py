"""The simulated runtime, with the names and arguments of the vendor's ``lynpy``.

As there: sizes are bytes and nothing else is checked, errors are assertions, and one output
buffer serves every call of a model. Device memory is a buffer apart from the host's, so that a
forgotten ``.apu()`` computes on what was there before. ``lynpy.version`` is a string.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import compiled, devices
from .graph import Port
from .options import SimulatorWarning, current

__all__ = ["Model", "Tensor", "version"]

version: str

Array = np.ndarray[Any, Any]

_TYPES = ("int8", "uint8", "int32", "uint32", "float32", "float16")


def __getattr__(name: str) -> Any:
    if name == "version":
        return current().version
    raise AttributeError(f"the simulated lynpy has no {name!r}")


def _require(condition: bool, text: str) -> None:
    # The vendor's errors are bare asserts; this one also holds under ``python -O``.
    if not condition:
        raise AssertionError(text)


def _there(memory: Array | None, text: str) -> Array:
    _require(memory is not None, text)
    assert memory is not None
    return memory


def _require_device(dev_id: int) -> None:
    problem = devices.problem(dev_id)
    _require(problem is None, problem or "")


class Tensor:
    """A buffer on a chip and, when filled or fetched, its copy on the host.

    Args:
        dev_id: Number of the chip.
        size: Bytes.
        allocate: Whether to take memory on the chip at once.

    Attributes:
        devptr: Address on the chip; None without memory there.
        data_size: Bytes.
        shape: Shape that ``numpy`` gives, or None for flat bytes.
        dtype: Name of the type that ``numpy`` gives.
        itemsize: Bytes of one element.
    """

    def __init__(self, dev_id: int = 0, size: int = 0, allocate: bool = True) -> None:
        _require_device(dev_id)
        _require(size >= 0, f"size is {size} bytes")
        self.dev_id = dev_id
        self.data_size = int(size)
        self.shape: tuple[int, ...] | None = None
        self.dtype = "uint8"
        self._device = np.zeros(self.data_size, np.uint8) if allocate else None
        self._host: Array | None = None
        self._ahead = False

    @property
    def devptr(self) -> int | None:
        """Address on the chip; None without memory there."""
        return None if self._device is None else int(self._device.ctypes.data)

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.data_size // self.itemsize

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return int(np.dtype(self.dtype).itemsize)

    def from_numpy(self, array: Array) -> Tensor:
        """Fill the host's copy; only the number of bytes is compared.

        Raises:
            AssertionError: The array has another number of bytes.
        """
        if self.data_size == 0:
            self.data_size = int(array.nbytes)
        _require(
            array.nbytes == self.data_size,
            f"the array has {array.nbytes} bytes ({array.dtype} {list(array.shape)}) and the "
            f"tensor {self.data_size}",
        )
        self._host = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8).copy()
        self.shape, self.dtype = tuple(array.shape), str(array.dtype)
        self._ahead = True
        return self

    def apu(self) -> Tensor:
        """Copy from the host to the chip.

        Raises:
            AssertionError: The host has no copy.
        """
        host = _there(self._host, "there is nothing to copy; call from_numpy first")
        if self._device is None:
            self._device = np.zeros(self.data_size, np.uint8)
        self._device[:] = host
        self._ahead = False
        return self

    def cpu(self) -> Tensor:
        """Copy from the chip to the host, over the copy that is there.

        Raises:
            AssertionError: There is no memory on the chip.
        """
        device = _there(self._device, "the tensor has no memory on the device")
        if self._host is None:
            self._host = np.empty(self.data_size, np.uint8)
        self._host[:] = device
        self._ahead = False
        return self

    def numpy(self) -> Array:
        """The host's copy itself, not a copy of it; flat bytes unless a view was chosen.

        Raises:
            AssertionError: The host has no copy.
        """
        host = _there(self._host, "the data is on the device; call cpu() first")
        array: Array = host.view(self.dtype)
        return array if self.shape is None else array.reshape(self.shape)

    def view_as(self, shape: Sequence[int], dtype: str = "float32") -> Tensor:
        """Choose what the bytes mean.

        Args:
            shape: The shape that ``numpy`` will give.
            dtype: One of int8, uint8, int32, uint32, float32, float16.

        Raises:
            AssertionError: An unknown type, or another number of bytes.
        """
        _require(dtype in _TYPES, f"dtype is {dtype!r}; allowed: {', '.join(_TYPES)}")
        nbytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        _require(
            nbytes == self.data_size,
            f"{dtype} {list(shape)} takes {nbytes} bytes and the tensor has {self.data_size}",
        )
        self.shape, self.dtype = tuple(int(s) for s in shape), dtype
        return self

    def split(self, byte_sizes: Sequence[int]) -> list[Tensor]:
        """Tensors over consecutive parts of the same memory.

        Args:
            byte_sizes: Bytes of each part.

        Raises:
            AssertionError: The parts are not the whole.
        """
        _require(
            sum(byte_sizes) == self.data_size,
            f"parts of {list(byte_sizes)} bytes are {sum(byte_sizes)} and the tensor has "
            f"{self.data_size}",
        )
        parts, at = [], 0
        for size in byte_sizes:
            part = Tensor(self.dev_id, size, allocate=False)
            part._device = None if self._device is None else self._device[at : at + size]
            part._host = None if self._host is None else self._host[at : at + size]
            part._ahead = self._ahead
            parts.append(part)
            at += size
        return parts

    def copy_to(self, other: Tensor) -> Tensor:
        """Copy the chip's memory into another tensor's.

        Returns:
            The other tensor.

        Raises:
            AssertionError: One has no memory on a chip, or the sizes differ.
        """
        source = _there(self._device, "the tensor has no memory on the device")
        target = _there(other._device, "the other tensor has no memory on the device")
        _require(
            self.data_size == other.data_size,
            f"{self.data_size} bytes cannot be copied into {other.data_size}",
        )
        target[:] = source
        return other


class Model:
    """A network on a chip.

    Args:
        dev_id: Number of the chip.
        path: What ``Builder.build`` returned, or its ``Net_0``; loaded at once if given.
        stream: Taken and unused: a call has finished when it returns.
        sync: As ``stream``.

    Attributes:
        batch_size: How many inputs one call takes.
        input_size: Bytes of one input, all tensors together.
        output_size: Bytes of one output, all tensors together.
    """

    def __init__(
        self,
        dev_id: int = 0,
        path: str | os.PathLike[str] | None = None,
        stream: Any = None,
        sync: bool = True,
    ) -> None:
        _require_device(dev_id)
        self.dev_id = dev_id
        self.batch_size = 0
        self.input_size = 0
        self.output_size = 0
        self._network: compiled.Compiled | None = None
        if path is not None:
            self.load(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Load a compiled network.

        Raises:
            AssertionError: Files are missing or damaged.
        """
        try:
            network = compiled.read(Path(path))
        except compiled.CorruptError as error:
            raise AssertionError(str(error)) from error
        self._network = network
        self._engine = network.engine()
        self._inputs, self._outputs = network.graph.inputs, network.graph.outputs
        self.batch_size = network.run_batch
        self.input_size = sum(p.nbytes for p in self._inputs)
        self.output_size = sum(p.nbytes for p in self._outputs)
        self._result = self.output_tensor()

    def unload(self) -> None:
        """Give the chip's memory back."""
        self._network = None

    def _require_loaded(self) -> None:
        _require(self._network is not None, "no model is loaded; call load(path) first")

    def input_tensor(self) -> Tensor:
        """A new tensor of the size that a call takes."""
        self._require_loaded()
        return Tensor(self.dev_id, self.input_size * self.batch_size)

    def output_tensor(self) -> Tensor:
        """A new tensor of the size that a call fills."""
        self._require_loaded()
        return Tensor(self.dev_id, self.output_size * self.batch_size)

    def input_list(self) -> list[Tensor]:
        """New tensors, one for each input, with shape and type."""
        self._require_loaded()
        return [self._typed(p) for p in self._inputs]

    def output_list(self) -> list[Tensor]:
        """New tensors, one for each output, with shape and type."""
        self._require_loaded()
        return [self._typed(p) for p in self._outputs]

    def _typed(self, port: Port) -> Tensor:
        tensor = Tensor(self.dev_id, port.nbytes * self.batch_size)
        lead = (port.shape[0] * self.batch_size,) if port.shape else ()
        tensor.shape, tensor.dtype = (*lead, *port.shape[1:]), port.dtype
        return tensor

    def synchronize(self) -> None:
        """Wait for the chip, which has always finished."""
        self._require_loaded()

    def __call__(self, input: Tensor, output: Tensor | None = None) -> Tensor:
        """Run, as :meth:`infer`."""
        return self.infer(input, output)

    def infer(self, input: Tensor, output: Tensor | None = None) -> Tensor:
        """Run the network on what the chip's memory holds.

        Args:
            input: All input tensors one after the other, ``batch_size`` times.
            output: Where to put the outputs; None is the model's own buffer, which every such
                call overwrites.

        Returns:
            The output tensor, its data on the chip.

        Raises:
            AssertionError: Wrong number of bytes, or no memory on the chip.
        """
        self._require_loaded()
        need = self.input_size * self.batch_size
        ports = ", ".join(f"{p.name} {p.dtype} {list(p.shape)}" for p in self._inputs)
        _require(
            input.data_size == need,
            f"the input has {input.data_size} bytes and the model takes {need}: "
            f"{self.batch_size} x ({ports})",
        )
        source = _there(input._device, "the input has no memory on the device")
        if input._ahead:
            warnings.warn(
                "the input was filled on the host and not copied to the device: the model reads "
                "what was there before; call .apu()",
                SimulatorWarning,
                stacklevel=2,
            )
        target = self._result if output is None else output
        given = self.output_size * self.batch_size
        _require(
            target.data_size == given,
            f"the output has {target.data_size} bytes and the model fills {given}",
        )
        if target._device is None:
            target._device = np.zeros(target.data_size, np.uint8)
        for i in range(self.batch_size):
            results = self._engine.run(self._unpack(source, i * self.input_size))
            at = i * self.output_size
            for port, result in zip(self._outputs, results, strict=True):
                data = np.frombuffer(result.numpy().tobytes(), np.uint8)
                target._device[at : at + port.nbytes] = data
                at += port.nbytes
        return target

    def _unpack(self, buffer: Array, at: int) -> list[torch.Tensor]:
        tensors = []
        for port in self._inputs:
            part = buffer[at : at + port.nbytes]
            # torch reads at the element's alignment, which a part behind an odd size lacks.
            data = np.frombuffer(part.tobytes(), port.dtype)
            tensors.append(torch.tensor(data).reshape(port.shape))
            at += port.nbytes
        return tensors
