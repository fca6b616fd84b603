"""Bytes of a model's weights from its config alone: built on the meta device, nothing downloaded, nothing allocated."""

from collections.abc import Mapping
from typing import Any

from kvblocks.errors import UnknownModel
from kvblocks.formats import Format

__all__ = ["prediction_layers", "weight_bytes"]

# What configs call the number of layers that predict several tokens ahead; transformers builds none of them.
_PREDICTION = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")


def prediction_layers(config: Mapping[str, Any]) -> int:
    """Layers for multi-token prediction that a checkpoint holds besides the model's own, as its config says."""
    halves = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    given = [half.get(name) for half in halves for name in _PREDICTION]
    return max((number for number in given if type(number) is int), default=0)


def weight_bytes(config: Mapping[str, Any], format: Format) -> int:
    """Bytes of all parameters with `format`, tied ones counted once, and of the buffers that a checkpoint holds.

    Raises:
        UnknownModel: transformers has no model for the config, or cannot build it.
        ModuleNotFoundError: transformers or torch is not installed.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'weights="auto" builds the model without memory and needs {error.name}; give the bytes, '
            f'or run: pip install "kvblocks[plan]"',
            name=error.name,
        ) from None
    kinds: Any = CONFIG_MAPPING
    # Of types that are registered as both, the one that sees holds the whole checkpoint, the causal one its text half.
    makers: list[Any] = [AutoModelForImageTextToText, AutoModelForCausalLM, AutoModelForSeq2SeqLM]
    if config["model_type"] not in kinds:
        raise UnknownModel(
            f"the installed transformers has no model_type={config['model_type']!r}; give the bytes of its weights"
        )
    try:
        made = kinds[config["model_type"]].from_dict(dict(config))
        if made.is_encoder_decoder:
            makers.reverse()
        maker = next((maker for maker in makers if type(made) in maker._model_mapping), AutoModelForCausalLM)
        with torch.device("meta"):
            model = maker.from_config(made)
        model.tie_weights()
    except Exception as error:  # whatever a model's constructor raises
        reason = " ".join(str(error).split())
        raise UnknownModel(
            f"transformers cannot build {config['model_type']} from its config: {reason}; give the bytes of its weights"
        ) from error
    numbers: int = sum(parameter.numel() for parameter in model.parameters())
    kept = set(model.state_dict())
    buffers: int = sum(b.numel() * b.element_size() for name, b in model.named_buffers() if name in kept)
    return -(-numbers * format.bits // 8) + buffers
