"""CPU tensors whose address compiled code must not follow: there is none, or less behind it than they say."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode


class Wrapper(torch.Tensor):
    """A tensor that has its own idea of where its numbers are, as DTensor has."""

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], dtype: torch.dtype) -> "Wrapper":
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        raise NotImplementedError(func)


def shrunk(shape: tuple[int, ...], dtype: torch.dtype, nbytes: int) -> Tensor:
    """A view that does not begin at the start of its storage, which is then made smaller, as FSDP does."""
    tensor = torch.ones(shape[0] + 1, *shape[1:]).to(dtype)[1:]
    tensor.untyped_storage().resize_(nbytes)
    return tensor


def fake(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    with FakeTensorMode():
        return torch.ones(shape, dtype=dtype)


WITHOUT_MEMORY: dict[str, Callable[[tuple[int, ...], torch.dtype], Tensor]] = {
    "fake": fake,
    "wrapper": Wrapper,
    "zeros of autograd": lambda shape, dtype: torch._efficientzerotensor(shape, dtype=dtype),
    "functionalized": lambda shape, dtype: torch._to_functional_tensor(torch.ones(shape, dtype=dtype)),
    "storage of nothing": lambda shape, dtype: shrunk(shape, dtype, 0),
    "storage cut short": lambda shape, dtype: shrunk(shape, dtype, 8),
}
