"""Uploading the host arrays of a step to their image on a device: what changed, in one copy, on the current stream.

Knows bytes and streams, neither sequences nor what the arrays mean. Imports torch and the kernels.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from kvblocks.kernels import kernels

__all__ = ["CudaTransport", "Event", "Pack", "Transport", "Upload", "transport"]

# Given the addresses of the host arrays and of memory to fill: the bytes that were filled, where in them (in int32) the
# patches start, their number, and the words of the longest. See `StepArrays._pack`.
Pack: TypeAlias = Callable[[int, int], tuple[int, int, int, int]]


class Event(Protocol):
    """As `torch.cuda.Event`; `synchronize` returns at once where nothing was recorded."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...


class Upload:
    """One device's image of a step, and two host images that take turns: a copy may run while the next one is packed.

    Args:
        transport: enqueues the work.
        host: the arrays, uint8, whose address goes to every `Pack`; a multiple of 8 bytes.
        pack_bytes: what a `Pack` fills at most.

    Attributes:
        image: on the device, uint8, at one address for good; it starts as a copy of `host`.
    """

    def __init__(self, transport: "Transport", host: Tensor, pack_bytes: int) -> None:
        size = -(-pack_bytes // 8) * 8
        self._transport, self._address = transport, host.data_ptr()
        self.image, self._landing = transport.memory(host.nbytes), transport.memory(size)
        self._staging = [transport.pinned(size), transport.pinned(size)]
        self._words = self.image.view(torch.int32), self._landing.view(torch.int32)
        self._lists = [staging.view(torch.int64) for staging in self._staging]
        self._events = [transport.event(), transport.event()]
        self._turn = 0
        with transport.entered(self._events[0], [self.image, self._landing]):
            self.image.copy_(host)
            self._events[0].record()

    def send(self, pack: Pack) -> None:
        """Pack what changed and enqueue its way into the image; waits only for the upload before the last one."""
        last, self._turn = self._events[self._turn], 1 - self._turn
        event, staging = self._events[self._turn], self._staging[self._turn]
        with self._transport.entered(last, [self.image, self._landing]):
            event.synchronize()
            nbytes, patches_at, count, longest = pack(self._address, staging.data_ptr())
            try:
                self._transport.copy(self._landing[:nbytes], staging[:nbytes])
                self._transport.apply(*self._words, self._lists[self._turn], patches_at, count, longest)
            finally:
                event.record()  # a copy that was enqueued before the error still reads the staging


def transport(device: torch.device) -> "Transport | None":
    """What uploads arrays to a device; None for the CPU, where the host arrays are the image."""
    if device.type == "cpu":
        return None
    return CudaTransport(device) if device.type == "cuda" else Transport(device)


class Transport:
    """A device whose work is done when a call returns."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def memory(self, nbytes: int) -> Tensor:
        """Bytes on the device, uint8."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def pinned(self, nbytes: int) -> Tensor:
        """Bytes on the host that a copy to the device may read while the host goes on, uint8."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def event(self) -> Event:
        """An event of the device's current stream."""
        return _Nothing()

    def entered(self, last: Event, memory: list[Tensor]) -> contextlib.AbstractContextManager[None]:
        """A context in which work on `memory` is enqueued, behind `last`."""
        return contextlib.nullcontext()

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy bytes from `pinned` memory to the device."""
        target.copy_(source)

    def apply(self, image: Tensor, packed: Tensor, host: Tensor, patches_at: int, count: int, longest: int) -> None:
        """Write the patches into `image`.

        Args:
            image, packed: int32 on the device.
            host: what was copied to `packed`, int64 on the host.
            patches_at, count, longest: as a `Pack` says.
        """
        for target, source, words in host[patches_at // 2 :][: 3 * count].view(-1, 3).tolist():
            image[target : target + words] = packed[source : source + words]


class CudaTransport(Transport):
    """The device's current stream."""

    _stream: torch.cuda.Stream | None = None

    def pinned(self, nbytes: int) -> Tensor:
        with torch.cuda.device(self._device):  # pinning needs a context, and another device should not get one
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def event(self) -> Event:
        with torch.cuda.device(self._device):
            event: Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        return event

    @contextlib.contextmanager
    def entered(self, last: Event, memory: list[Tensor]) -> Iterator[None]:
        with torch.cuda.device(self._device):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "step buffers cannot be filled while a CUDA graph is captured, as the host is not part of it; "
                    "call prepare() before the capture, and before every replay"
                )
            stream = torch.cuda.current_stream()
            if stream != self._stream:
                if isinstance(last, torch.cuda.Event):
                    stream.wait_event(last)
                for tensor in memory:
                    tensor.record_stream(stream)
                self._stream = stream
            yield

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def apply(self, image: Tensor, packed: Tensor, host: Tensor, patches_at: int, count: int, longest: int) -> None:
        module = kernels("steps")
        if module is None:
            super().apply(image, packed, host, patches_at, count, longest)
        else:
            module.apply_patches(image, packed, patches_at, count, longest)


class _Nothing:
    """The event of a device whose work is done when a call returns."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...
