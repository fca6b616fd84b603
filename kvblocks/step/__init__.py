"""The arrays of one forward pass: `buffers` allocates them, `upload` brings them to a device."""

from kvblocks.step.buffers import StepBuffers

__all__ = ["StepBuffers"]
