"""adapter_config.json of the PEFT library: which kind of adapter it is, and how large its change is."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchchat_core.errors import TorchchatError, quoted, quoted_path
from torchchat_core.small_files import read_json
from torchchat_core.sources.reference import missing_file

MERGE = "merge it with PEFT's merge_and_unload, and give the merged model"
MAXIMUM_RANK = 1 << 16
LARGEST_ALPHA = 1e6  # some hundred times what anyone trains with
MAXIMUM_PATTERN = 200  # characters
MAXIMUM_REPEATS = 3  # in a pattern: more could take for ever to match

# Fields that, when they are set, mean another computation than B @ A times a scale.
_OTHER_COMPUTATIONS = ("use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication",
                       "trainable_token_indices", "target_parameters", "arrow_config", "kasa_config",
                       "monteclora_config")
# Ways to begin that leave the model's own weights as they are; the others (PiSSA, OLoRA, LoftQ, ...) change them.
_HARMLESS_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, kw_only=True)
class AdapterSettings:
    """How large the change is, layer by layer. Layers are named as in the model: "model.layers.0.self_attn.q_proj"."""

    default_rank: int
    default_alpha: float
    rank_pattern: Mapping[re.Pattern[str], int]
    alpha_pattern: Mapping[re.Pattern[str], float]
    rank_stabilised: bool  # rsLoRA
    dora: bool
    ensures_tying: bool  # a change of the input embedding is one of the output embedding too, where they are one

    def rank(self, layer: str) -> int:
        return next((rank for pattern, rank in self.rank_pattern.items() if pattern.fullmatch(layer)),
                    self.default_rank)

    def scale(self, layer: str) -> float:
        alpha = next((alpha for pattern, alpha in self.alpha_pattern.items() if pattern.fullmatch(layer)),
                     self.default_alpha)
        return alpha / (math.sqrt(self.rank(layer)) if self.rank_stabilised else self.rank(layer))


def read_settings(folder: Path) -> AdapterSettings:
    """The settings of the adapter in `folder`.

    Raises `TorchchatError` where there is none, for an adapter that is no LoRA, and for a variation of LoRA that is
    not a product of two matrices times a scale. `fan_in_fan_out` has no say: the models' layers are linear ones,
    for which PEFT leaves it out of account as well.
    """
    if not folder.is_dir():
        raise missing_file(folder) if not folder.exists() else TorchchatError(
            f"the adapter {quoted_path(str(folder))} is a file", "give the folder that holds adapter_config.json")
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise TorchchatError(f"the folder {quoted_path(str(folder))} holds no adapter_config.json",
                             "give the folder that PEFT or torchtune wrote")
    raw = read_json(path)
    _refuse_other_kinds(raw)
    rank = _rank("r", raw.get("r", 8))
    alpha = _alpha("lora_alpha", raw.get("lora_alpha", 8))
    return AdapterSettings(
        default_rank=rank, default_alpha=alpha,
        rank_pattern={pattern: _rank("rank_pattern", value) for pattern, value in _patterns(raw, "rank_pattern")},
        alpha_pattern={pattern: _alpha("alpha_pattern", value) for pattern, value in _patterns(raw, "alpha_pattern")},
        rank_stabilised=_boolean(raw, "use_rslora"), dora=_boolean(raw, "use_dora"),
        ensures_tying=_boolean(raw, "ensure_weight_tying"),
    )


def _refuse_other_kinds(raw: Mapping[str, Any]) -> None:
    kind = raw.get("peft_type", "LORA")
    if kind != "LORA":
        raise TorchchatError(f"the adapter is of the kind {quoted(kind)}; torchchat merges LoRA alone", MERGE)
    for name in _OTHER_COMPUTATIONS:
        if raw.get(name):
            raise TorchchatError(f"the adapter has {name} set, a variation of LoRA that is not merged here", MERGE)
    beginning = raw.get("init_lora_weights")
    if beginning not in _HARMLESS_BEGINNINGS:
        raise TorchchatError(f"the adapter began as {quoted(beginning)}, which changes the model's own weights: they "
                             "are "
                             "not those of the model that it is merged into",
                             "save it again with PEFT's path_initial_model_for_weight_conversion")


def _rank(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAXIMUM_RANK:
        raise TorchchatError(f"{name} is {quoted(value)} in adapter_config.json; a rank is a whole number from 1 to "
                             f"{MAXIMUM_RANK}")
    return value


def _alpha(name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= LARGEST_ALPHA:
        raise TorchchatError(f"{name} is {repr(value)[:40]} in adapter_config.json; it has to be a number from "
                             f"-{LARGEST_ALPHA:g} to {LARGEST_ALPHA:g}")
    return float(value)


def _boolean(raw: Mapping[str, Any], name: str) -> bool:
    value = raw.get(name) or False
    if not isinstance(value, bool):
        raise TorchchatError(f"{name} is {quoted(value)} in adapter_config.json; it has to be true or false")
    return value


def _patterns(raw: Mapping[str, Any], name: str) -> list[tuple[re.Pattern[str], Any]]:
    """Regular expressions that the end of a layer's name has to match, in the order of the file, with their values."""
    patterns = raw.get(name) or {}
    if not isinstance(patterns, dict):
        raise TorchchatError(f"{name} is {quoted(patterns)} in adapter_config.json; it has to be an object")
    return [(_pattern(name, text), value) for text, value in patterns.items()]


def _pattern(name: str, text: str) -> re.Pattern[str]:
    repeats = len(re.findall(r"[*+?{]", text))
    if len(text) > MAXIMUM_PATTERN or repeats > MAXIMUM_REPEATS or re.search(r"\)[*+?{]", text):
        raise TorchchatError(f"{name} has the pattern {quoted(text)} in adapter_config.json, which is too complex",
                             "name the layers instead")
    try:
        return re.compile(rf"(?:.*\.)?(?:{text})")
    except re.error as error:
        raise TorchchatError(f"{name} has the pattern {quoted(text)} in adapter_config.json: {error}") from None
