"""Generation with transformers' models: `scheduler` is the engine, `streams` what users call, `verify` the proof."""

from kvblocks.generation.streams import generate

__all__ = ["generate"]
