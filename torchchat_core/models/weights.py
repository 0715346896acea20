"""From a checkpoint to a module: built without memory, weights assigned one by one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.models.config import ModelConfig
from torchchat_core.models.transformer import Transformer
from torchchat_core.specs import Checkpoint, is_layered

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def build_model(checkpoint: Checkpoint, dtype: torch.dtype, device: str = "cpu") -> Transformer:
    """The transformer with the checkpoint's weights.

    A tensor that already has `dtype` on the CPU stays mapped to its file; another is converted once, alone, so
    that the memory beyond the model's own never exceeds one tensor.
    Layers that the checkpoint holds as integers become quantised ones.
    Raises `TorchchatError` for a tensor that is missing, has the wrong shape, or that the model has no place for.
    """
    model = _without_memory(checkpoint.config)
    there = checkpoint.put_layers(model, dtype, device) if is_layered(checkpoint) else set()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters() if name not in there}
    refuse_unknown(checkpoint, shapes.keys() | there)
    for name, shape in shapes.items():
        _assign(model, name, fetch_weight(checkpoint, name, shape, dtype).to(device=device, dtype=dtype))
    plain = isinstance(model.lm_head, nn.Linear) and isinstance(model.model.embed_tokens, nn.Embedding)
    if checkpoint.config.tied_embeddings and plain:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary.to(device)
    return model.eval()


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights of such a model by canonical name; without lm_head.weight where it is tied."""
    return {name: tuple(parameter.shape) for name, parameter in _without_memory(config).named_parameters()}


def _without_memory(config: ModelConfig) -> Transformer:
    with torch.device("meta"), WithoutInitialValues():
        return Transformer(config).requires_grad_(False)


class WithoutInitialValues(TorchFunctionMode):
    """Makes the functions of torch.nn.init do nothing: on the meta device they would import all of the compiler."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return function(*args, **(kwargs or {}))


def fetch_weight(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
    """The checkpoint's tensor in `dtype`, or as it is.

    Raises `TorchchatError` where it is missing, of another shape, or no floating-point tensor.
    """
    try:
        tensor = checkpoint.tensor(name, dtype)
    except KeyError:
        raise TorchchatError(f"the checkpoint has no tensor {quoted(name)}, which a {checkpoint.config.architecture} "
                             "model "
                             f"with {checkpoint.config.num_layers} layers needs",
                             "the checkpoint is incomplete, or the configuration belongs to another model") from None
    check_shape(name, tuple(tensor.shape), shape)
    if not tensor.is_floating_point():
        raise TorchchatError(f"tensor {quoted(name)} is of {str(tensor.dtype).removeprefix('torch.')}; floating point "
                             "is "
                             "needed", "a quantised checkpoint needs the quantizer that wrote it")
    return tensor


def check_shape(name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raises `TorchchatError` where a tensor is not of the shape that the model has for it."""
    if found != wanted:
        raise TorchchatError(f"tensor {quoted(name)} has the shape {list(found)}; the config asks for {list(wanted)}",
                             "the configuration belongs to another model, or the checkpoint is damaged")


def refuse_unknown(checkpoint: Checkpoint, wanted: Iterable[str]) -> None:
    """Raises `TorchchatError` for a tensor without a place: the model would not be the one in the file."""
    tied = {"lm_head.weight"} if checkpoint.config.tied_embeddings else set()
    unknown = sorted(set(checkpoint.names()) - set(wanted) - tied)
    if unknown:
        raise TorchchatError(
            f"the checkpoint has {len(unknown)} tensors that a {checkpoint.config.architecture} model with "
            f"{checkpoint.config.num_layers} layers has no place for, such as {quoted(unknown[0])}",
            "the configuration belongs to another model, or the model is of a kind that torchchat does not know")


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, nn.Parameter(tensor, requires_grad=False))
