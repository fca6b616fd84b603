"""Checks of what callers give that need torch: devices, dtypes, index arrays, and whether a tensor has memory.

Each returns what it was given in the form that is used, or raises an error that names it. Imports torch and numpy.
Integers and sizes are checked in `kvblocks.sizes`, without them.
"""

from collections.abc import Callable, Hashable
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from kvblocks.config import LayerTensor, itemsize

__all__ = ["Indices", "checked_device", "checked_dtype", "checked_indices", "dense", "dtype_of", "has_memory", "once"]

_Made = TypeVar("_Made")

# An int64 or int32 tensor or numpy array, or a list of ints.
Indices: TypeAlias = Any


def dense(name: str, given: Tensor) -> Tensor:
    """`given`, which must be strided: sparse and nested tensors have no sizes or strides to ask for."""
    if given.is_nested or given.layout is not torch.strided:
        raise TypeError(f"{name} is {'nested' if given.is_nested else given.layout}; give a dense tensor")
    return given


def has_memory(name: str, given: Tensor) -> Tensor:
    """`given`, which must have memory for all its elements: addresses are read on CPU.

    Tensors of shape only have none (under FakeTensorMode, say), nor have wrappers of other tensors (DTensor), the zeros
    that autograd makes, and tensors whose storage was made smaller (as FSDP does).

    Raises:
        TypeError: it has not, or is not dense.
    """
    count = dense(name, given).numel()
    if count == 0 or not given.is_cpu:
        return given
    end = given.storage_offset() + count
    if not given.is_contiguous():
        end -= count - 1
        for size, stride in zip(given.shape, given.stride(), strict=True):
            end += (size - 1) * stride
    try:
        there = not isinstance(given, FakeTensor) and given.data_ptr() != 0
        there = there and given.untyped_storage().nbytes() >= end * given.itemsize
    except (NotImplementedError, RuntimeError):  # what wrappers say of an address
        there = False
    if not there:
        raise TypeError(f"{name} is a {type(given).__name__} without memory for its elements; give a plain tensor")
    return given


def once(step: Any, key: Hashable, make: Callable[[], _Made]) -> _Made:
    """What `make` checks or reads off the arrays of a step, made for the first layer of a pass and kept for the others.

    A step that can keep it has a dict `derived`, which is empty again once the step is filled anew. For any other step
    it is made each time.
    """
    kept: dict[Hashable, _Made] | None = getattr(step, "derived", None)
    if kept is None:
        return make()
    if key not in kept:
        kept[key] = make()
    return kept[key]


def checked_indices(name: str, given: Indices) -> Tensor:
    """`given` as a contiguous tensor on the device where it is, int64 on the CPU: compiled code reads no other."""
    if isinstance(given, Tensor):
        if given.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name} is {given.dtype}; give int64 or int32")
        has_memory(name, given)
        return (given.to(torch.int64) if given.is_cpu else given).contiguous()
    array = given if isinstance(given, np.ndarray) else _array(name, given)
    if array.dtype not in (np.int64, np.int32):
        raise TypeError(f"{name} is {array.dtype}; give int64 or int32")
    # A copy where numpy's array cannot be lent to torch: read-only, other byte order, negative strides.
    if not (array.flags.c_contiguous and array.flags.writeable and array.dtype == np.int64 and array.dtype.isnative):
        array = np.array(array, np.int64, order="C")
    return torch.from_numpy(array)


def _array(name: str, given: Indices) -> np.ndarray[Any, Any]:
    try:
        array = np.asarray(given)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is not a rectangular list of integers") from None
    if array.size == 0:
        return array.astype(np.int64)
    if array.dtype.kind in "uO" and all(isinstance(value, int) for value in array.flat):
        raise ValueError(f"{name} holds {max(map(abs, array.flat))}, past any index; int64 ends at {2**63 - 1}")
    if array.dtype.kind != "i":
        raise TypeError(f"{name} is a {type(given).__name__} of {array.dtype}; give integers")
    return array.astype(np.int64)


def checked_device(given: torch.device | str) -> torch.device:
    """The device that tensors allocated on `given` report: with an index where its kind has one."""
    if not isinstance(given, str | torch.device):
        raise TypeError(f"device is a {type(given).__name__}; give a torch.device or its name")
    try:
        device = torch.device(given)
    except RuntimeError as error:
        raise ValueError(f"device={given!r}: {error}") from None
    if device.type == "meta":
        raise ValueError(f"device={str(given)!r} holds no data, so it cannot hold a cache; use 'cpu' or 'cuda'")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(f"device={str(given)!r}: torch {torch.__version__} sees {count} CUDA devices; use 'cpu'")
    return torch.device("cpu") if device.type == "cpu" else torch.empty(0, device=device).device


def checked_dtype(given: torch.dtype | str) -> torch.dtype:
    """A dtype, given as itself or by its name, that can hold a cache; TypeError for another."""
    itemsize(given)
    found: torch.dtype = given if isinstance(given, torch.dtype) else getattr(torch, given.removeprefix("torch."))
    return found


def dtype_of(tensor: LayerTensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a layer's tensor lies, where that of the cache is `dtype`."""
    found: torch.dtype = dtype if tensor.dtype is None else getattr(torch, str(tensor.dtype))
    return found
