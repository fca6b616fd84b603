"""Bytes of a model's weights from its config alone: built on the meta device, nothing downloaded, nothing allocated."""

import re
from collections.abc import Mapping
from typing import Any

from kvblocks.errors import UnknownModel
from kvblocks.formats import Format
from kvblocks.models.fields import quiet_transformers, refuse_no_objects
from kvblocks.planner.checkpoint import SEES, predicts_ahead
from kvblocks.planner.quantized import OTHERWISE, read_quantization

__all__ = ["prediction_layers", "quantized_weight_bytes", "weight_bytes"]

_IN_LAYER = re.compile(r"(^|\.)(layers|blocks|h)\.\d+\.")
# What configs call the number of layers that predict several tokens ahead; transformers builds none of them.
_PREDICTION = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")


def prediction_layers(config: Mapping[str, Any]) -> int:
    """Layers for multi-token prediction that a checkpoint holds besides the model's own, as its config says."""
    halves = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    given = [half.get(name) for half in halves for name in _PREDICTION]
    return max((number for number in given if type(number) is int), default=0)


def weight_bytes(config: Mapping[str, Any], format: Format) -> int:
    """Bytes of all parameters with `format`, tied ones counted once, and of the buffers that a checkpoint holds.

    Scales of a format that has some are counted as if every parameter were packed.

    Raises:
        UnknownModel: transformers has no model for the config, or cannot build it.
        ModuleNotFoundError: transformers or torch is not installed.
    """
    model = _built(config)
    numbers: int = sum(parameter.numel() for parameter in model.parameters())
    return format.vector_bytes(numbers) + _buffer_bytes(model)


def quantized_weight_bytes(
    config: Mapping[str, Any], asked: Mapping[str, Any], layers: int, format: Format, *, text_only: bool
) -> tuple[int, str]:
    """Bytes of a quantized checkpoint by its `quantization_config`, and a sentence that says how they were counted.

    Args:
        config: of the model.
        asked: its `quantization_config`.
        layers: of the model; names of later ones are of layers for multi-token prediction, which are not built.
        format: of all that is not quantized.
        text_only: whether `asked` belongs to the text half, so that vision and audio towers are not quantized.

    Raises:
        UnknownModel: as `weight_bytes`, and where the config does not say how a matrix is stored.
        ModuleNotFoundError: transformers or torch is not installed.
    """
    quantization = read_quantization(asked, config.get("expert_dtype"))
    model = _built(config)
    import torch

    output, total = model.get_output_embeddings(), 0
    for name, parameter in model.named_parameters():
        path, _, own = name.rpartition(".")
        module = model.get_submodule(path)
        experts = parameter.dim() == 3 and "experts" in name
        turned = type(module).__name__ == "Conv1D"  # GPT-2's, a linear layer with the inputs first
        linear = own == "weight" and (turned or isinstance(module, torch.nn.Linear))
        scheme = None
        if (linear and (quantization.output or module is not output)) or experts:
            scheme = quantization.scheme(name if experts else path)
        if (text_only or quantization.text_only) and (any(part in name for part in SEES) or not _IN_LAYER.search(name)):
            scheme = None
        if scheme is None or (scheme.experts_only and not experts):
            total += -(-parameter.numel() * format.bits // 8)
        elif not experts:
            outputs, inputs = reversed(parameter.shape) if turned else parameter.shape
            total += scheme.stored_bytes(outputs, inputs)
        elif quantization.method == "bitsandbytes":
            raise UnknownModel(
                f"weights='auto': quantization_config.quant_method='bitsandbytes': whether it quantized the experts of "
                f"{config['model_type']} depends on the version that did; {OTHERWISE}"
            )
        else:
            matrices, outputs, inputs = parameter.shape
            both = 2 if "gate_up" in own and outputs % 2 == 0 else 1  # two matrices in the checkpoint
            total += scheme.stored_bytes(outputs // both, inputs, matrices * both)
    names = [*dict(model.named_modules()), *dict(model.named_parameters()), *dict(model.named_buffers())]
    strange = [name for name in quantization.strange(names) if not predicts_ahead(name, layers)]
    if strange and len(strange) == len(quantization.named):
        raise UnknownModel(
            f"weights='auto': quantization_config names what is not quantized, {strange[0]!r:.60}, by names that are "
            f"none of transformers' {type(model).__name__}; {OTHERWISE}"
        )
    note = f"weights are estimated from quantization_config ({quantization.method})"
    if strange:
        note += (
            f"; what it names as not quantized and is none of transformers' modules is counted as quantized: "
            f"{strange[0]:.80}" + (f" and {len(strange) - 1} more" if len(strange) > 1 else "")
        )
    return total + _buffer_bytes(model), note


def _buffer_bytes(model: Any) -> int:
    """Of the buffers that a checkpoint holds."""
    kept = set(model.state_dict())
    return sum(b.numel() * b.element_size() for name, b in model.named_buffers() if name in kept)


def _built(config: Mapping[str, Any]) -> Any:
    """The model on the meta device."""
    try:
        import torch
        import transformers
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
    speaks = [maker for maker in [getattr(transformers, "AutoModelForMultimodalLM", None)] if maker is not None]
    model_type = config["model_type"]
    if model_type not in kinds:
        # The code that comes with the weights may be that of a type which transformers has: Kimi K2 is a DeepSeek V3.
        classes = {kind: of for maker in makers for of, kind in maker._model_mapping._model_mapping.items()}
        named = config.get("architectures")
        found = [classes[str(one)] for one in named if str(one) in classes] if isinstance(named, list) else []
        if not found:
            raise UnknownModel(f"the installed transformers has no model_type={model_type!r}; {OTHERWISE}")
        model_type = found[0]
    try:
        with quiet_transformers():
            made = kinds[model_type].from_dict({**config, "model_type": model_type})
        if made.is_encoder_decoder:
            makers.reverse()
        maker = next((maker for maker in [*makers, *speaks] if type(made) in maker._model_mapping), None)
        if maker is None:
            raise UnknownModel(f"it registers no class that makes text for {type(made).__name__}")
        with quiet_transformers(), torch.device("meta"):
            model = maker.from_config(made)
            model.tie_weights()
    except Exception as error:  # whatever a model's constructor raises
        refuse_no_objects(config)
        reason = " ".join(str(error).split())
        raise UnknownModel(
            f"transformers cannot build {model_type} from its config: {reason:.300}; {OTHERWISE}"
        ) from error
    return model
