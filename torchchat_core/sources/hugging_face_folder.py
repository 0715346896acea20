"""Writing a model as a folder that Hugging Face's tools and torchchat itself load."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchchat_core.amounts import bytes_text
from torchchat_core.chat_template import find_chat_template
from torchchat_core.errors import TorchchatError, quoted, quoted_path
from torchchat_core.models.config import ModelConfig
from torchchat_core.models.hugging_face_config import config_to_hugging_face
from torchchat_core.models.rope_layout import half_split_rows
from torchchat_core.models.weights import TORCH_DTYPES, fetch_weight, refuse_unknown, weight_shapes
from torchchat_core.plugins import Registry
from torchchat_core.quantization.saved import refuse_quantised
from torchchat_core.small_files import read_file, read_json
from torchchat_core.sources.safetensors_writer import SHARD_BYTES, write_safetensors
from torchchat_core.specs import Checkpoint, ModelFiles, Tokenizer
from torchchat_core.tokenizers.loading import choose_tokenizer, read_tokenizer
from torchchat_core.unfinished import unfinished

# Beside a tokenizer's file, what belongs to it in folders of Hugging Face.
TOKENIZER_COMPANIONS = ("tokenizer.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
                        "vocab.json", "merges.txt")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_folder(checkpoint: Checkpoint, files: ModelFiles, registry: Registry, folder: Path, dtype: str,
                 shard_bytes: int = SHARD_BYTES) -> None:
    """Writes config.json, the weights in `dtype` (of `specs.DTYPES`) as safetensors, and the tokenizer's files.

    Queries and keys are written in Hugging Face's order of rotary pairs, tied embeddings once. The folder appears
    whole or not at all, and no more than one tensor is held in memory at a time. A model without tokenizer files is
    written without. Raises `TorchchatError` where `folder` exists and is not empty, where it cannot be written, and
    for a checkpoint that is incomplete or does not fit into the dtype.
    """
    refuse_quantised(checkpoint, "its weights are no longer there to be converted")
    refuse_unknown(checkpoint, weight_shapes(checkpoint.config).keys())
    config = dataclasses.replace(checkpoint.config, tied_embeddings=_tied(checkpoint))
    shapes = weight_shapes(config)
    check_room(folder, sum(map(math.prod, shapes.values())) * TORCH_DTYPES[dtype].itemsize)
    with new_folder(config, files, registry, folder, dtype) as beside:
        write_safetensors(beside, shapes, TORCH_DTYPES[dtype], _reader(checkpoint, shapes, dtype), shard_bytes)


@contextmanager
def new_folder(config: ModelConfig, files: ModelFiles, registry: Registry, folder: Path, dtype: str,
               more: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """A folder with all but the weights, which are to be written into the path that is given.

    It takes its name when the block ends well. `more` are fields of config.json beside those that `config` has.
    """
    raw = {**config_to_hugging_face(config), **(more or {})}
    tokenizer = read_tokenizer(files, registry) if files.tokenizer else None
    with _appearing(folder) as beside:
        texts = _text_files(files, registry, tokenizer) if tokenizer is not None else {}
        texts |= _configs(raw, files, tokenizer, dtype)
        for name, content in texts.items():
            (beside / name).parent.mkdir(exist_ok=True)
            (beside / name).write_bytes(content)
        yield beside


def check_free(folder: Path) -> None:
    """Raises `TorchchatError` where `folder` cannot become a new one: it is a file, is not empty, or has no parent."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise TorchchatError(f"{quoted_path(str(folder))} exists and is no folder",
                             "give another name with --output-dir")
    if folder.is_dir() and any(folder.iterdir()):
        raise TorchchatError(f"the folder {quoted_path(str(folder))} exists and is not empty",
                             "delete it, or give another one with --output-dir")
    if folder.is_dir() and folder.samefile(Path.cwd()):
        raise TorchchatError("the current folder cannot become the new one", "give another name with --output-dir")
    if not folder.absolute().parent.is_dir():
        raise TorchchatError(f"there is no folder {quoted_path(str(folder.parent))}", "make it first")


def check_room(folder: Path, needed: int) -> None:
    """Raises `TorchchatError` where the disk of `folder`, which need not exist, has less than `needed` bytes free."""
    parent = folder.absolute().parent
    if not parent.is_dir():
        return  # which is told by whatever makes the folder
    free = shutil.disk_usage(folder.absolute().parent).free
    if free < needed:
        raise TorchchatError(f"the weights need {bytes_text(needed)}, and "
                             f"{quoted_path(str(folder.absolute().parent))} has "
                             f"{bytes_text(free)} free", "make room, or write to another disk with --output-dir")


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder beside it that takes its name when the block ends well, and vanishes when it does not."""
    check_free(folder)
    folder = folder.absolute()
    try:
        with unfinished(folder) as work:
            partial = work / folder.name
            partial.mkdir()
            yield partial
            if folder.is_dir():
                folder.rmdir()
            partial.rename(folder)
    except OSError as error:
        raise TorchchatError(f"cannot write {quoted_path(str(folder))}: {error.strerror or error}") from None


# ---- weights ------------------------------------------------------------------------------------------------------


def _tied(checkpoint: Checkpoint) -> bool:
    """Whether input and output embedding are one; files that cannot say so hold the same matrix twice."""
    if checkpoint.config.tied_embeddings:
        return True
    shapes = weight_shapes(checkpoint.config)
    first, second = (fetch_weight(checkpoint, name, shapes[name], None) for name in (EMBEDDING, HEAD))
    return torch.equal(first, second)


def _reader(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], dtype: str) -> Any:
    def read(name: str) -> Tensor:
        tensor = fetch_weight(checkpoint, name, shapes[name], TORCH_DTYPES[dtype])
        if dtype == "fp16" and tensor.isinf().any():
            raise TorchchatError(f"tensor {quoted(name)} has values beyond 65504, the largest of fp16",
                                 "use --dtype bf16")
        return _half_split(name, tensor, checkpoint.config)

    return read


def _half_split(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """The weights of queries and keys in Hugging Face's order."""
    layer = name.rpartition(".")[0].rpartition(".")[2]
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads, "q_norm": 1, "k_norm": 1}.get(layer)
    return half_split_rows(tensor, heads) if heads is not None and config.rope_interleaved else tensor


# ---- texts --------------------------------------------------------------------------------------------------------


def _text_files(files: ModelFiles, registry: Registry, tokenizer: Tokenizer) -> dict[str, bytes]:
    """The tokenizer's files and the chat template, by the names that Hugging Face has for them."""
    _, reader, path = choose_tokenizer(files, registry)
    if hasattr(reader, "extract"):
        texts = dict(reader.extract(path))
    else:
        beside = {name: path.parent / name for name in TOKENIZER_COMPANIONS if (path.parent / name).is_file()}
        name = "tokenizer.model" if fnmatch(path.name, "tok*.model") else path.name
        texts = {name: read_file(source) for name, source in {**beside, name: path}.items()}
    for source in (files.tokenizer_config, files.chat_template):
        if source is not None:
            texts[source.name] = read_file(source)
    texts |= {f"{source.parent.name}/{source.name}": read_file(source) for source in files.more_chat_templates}
    settings = json.loads(texts["tokenizer_config.json"]) if "tokenizer_config.json" in texts else {}
    template = find_chat_template(files, settings, tokenizer)
    if template is not None and files.chat_template is None and not settings.get("chat_template"):
        texts["chat_template.jinja"] = template.source.encode()  # a built-in one was found by the model's old name
    return texts


def _configs(raw: Mapping[str, Any], files: ModelFiles, tokenizer: Tokenizer | None, dtype: str) -> dict[str, bytes]:
    """config.json and, where something is known for it, generation_config.json."""
    tokens = _token_ids(files, tokenizer, raw["vocab_size"])
    names = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    texts = {"config.json": _json({**raw, **tokens, "torch_dtype": names[dtype]})}
    if files.generation_config is not None:
        texts["generation_config.json"] = read_file(files.generation_config)
    elif tokens:
        texts["generation_config.json"] = _json(tokens)
    return texts


def _token_ids(files: ModelFiles, tokenizer: Tokenizer | None, vocab_size: int) -> dict[str, Any]:
    """What begins and ends a text: as the model's own config.json says, else as the tokenizer does."""
    own = files.config is not None and files.config.suffix == ".json" and read_json(files.config)
    if own and "model_type" in own:
        return {name: own[name] for name in TOKEN_FIELDS if own.get(name) is not None}
    if tokenizer is None:
        return {}
    ends = sorted({token for token in (tokenizer.eos_id, *tokenizer.end_ids) if token is not None})
    known = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}
    inside = {name: value for name, value in known.items() if value is not None}
    return {name: value for name, value in inside.items()
            if max(value if isinstance(value, list) else [value]) < vocab_size}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
