"""Which files of a repository are the model: its weights once, and what they cannot be used without."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from torchchat_core.amounts import bytes_text
from torchchat_core.errors import TorchchatError, did_you_mean, quoted, quoted_path
from torchchat_core.small_files import read_json
from torchchat_core.sources.hub_reference import HubReference
from torchchat_core.sources.local import (
    BESIDE_MODELS,
    MORE_TEMPLATES,
    MOST_TEMPLATES,
    SHARD,
    SINGLE_FILE_FORMATS,
    TOKENIZER_PATTERNS,
    WHOLE_MODEL_FORMATS,
)

COMPANIONS = ("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
              "added_tokens.json", "chat_template.jinja", "chat_template.json")
PARTS_OF_TOKENIZERS = ("vocab.json", "merges.txt", "vocab.txt")  # of use where there is no whole tokenizer
SINGLE_MODELS = (*WHOLE_MODEL_FORMATS, "pt", "pth")  # endings of files that are a model each
NO_WEIGHTS = ("json", "md", "txt", "jinja", "model", "py")


@dataclass(frozen=True)
class Selection:
    """The files of one model, as paths in the repository."""

    weights: tuple[str, ...]  # or an index alone, which names them
    companions: tuple[str, ...] = ()

    @property
    def index(self) -> str | None:
        """The file that names the weights, where they are split and have one."""
        return self.weights[0] if self.weights[0].endswith(".index.json") else None

    @property
    def is_whole(self) -> bool:
        """Whether the weights' file holds configuration and tokenizer too."""
        return self.weights[0].rpartition(".")[2].lower() in WHOLE_MODEL_FORMATS

    @property
    def folder(self) -> str:
        """Of the weights, "" for the repository's own."""
        return self.weights[0].rpartition("/")[0]


def select(sizes: Mapping[str, int], reference: HubReference) -> Selection:
    """The files that `reference` means, of a repository with files of these sizes.

    Raises `TorchchatError` where the file that it names is not there, or where there is no model or more than one.
    """
    if reference.file is not None:
        return _named(sizes, reference.file, reference)
    for find in _LAYOUTS:
        weights = find(sizes)
        if weights:
            return Selection(weights, _companions(sizes, weights))
    models = single_models(sizes)
    if len(models) == 1:
        return _with_companions(sizes, models[0])
    if not models:
        raise TorchchatError(f"{reference.repository} holds no checkpoint",
                             "torchchat reads safetensors, pytorch_model*.bin, consolidated.*.pth and .gguf files")
    raise TorchchatError(f"{reference.repository} holds {len(models)} models: {_listed(models, sizes)}",
                         f"name one of them: {HubReference(reference.repository, reference.revision).text}:FILE")


def single_models(names: Iterable[str]) -> list[tuple[str, ...]]:
    """The files that are a model each; of models that are split into several files, all of them together."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        if name.rpartition(".")[2].lower() in SINGLE_MODELS and not _is_meta(name):
            match = SHARD.fullmatch(name)
            groups.setdefault(f"{match['stem']}-of-{match['count']}" if match else name, []).append(name)
    return [tuple(group) for group in groups.values()]


def shards_beside(name: str) -> tuple[str, ...]:
    """All files of a model that is split into NAME-00001-of-00003.SUFFIX and so on; any other name alone."""
    match = SHARD.fullmatch(name)
    if match is None:
        return (name,)
    return tuple(f"{match['stem']}-{number:05}-of-{match['count']}{match['suffix']}"
                 for number in range(1, int(match["count"]) + 1))


def shards_of_index(index: Path, folder: str) -> tuple[str, ...]:
    """Paths in the repository of the files that an index in `folder` names.

    Raises `TorchchatError` where it names none, or some outside its folder, or some that hold no weights.
    """
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise TorchchatError(f"{index.name} has no weight_map", "the repository is damaged; choose another")
    names = sorted({str(name) for name in places.values()})
    for name in names:
        if Path(name).name != name or len(name) > 255:
            raise TorchchatError(f"{index.name} points to {quoted(name)}, outside its own folder")
        if not name.endswith((".safetensors", ".bin")):
            raise TorchchatError(f"{index.name} names {quoted(name)}, which is no file of weights",
                                 "the repository is damaged; choose another")
    return tuple(f"{folder}/{name}" if folder else name for name in names)


def _named(sizes: Mapping[str, int], file: str, reference: HubReference) -> Selection:
    if file not in sizes:
        raise TorchchatError(f"there is no file {quoted_path(file)} in {reference.repository}",
                             did_you_mean(file, _weight_files(sizes)) or did_you_mean(file, sizes)
                             or f"it holds {_listed([(name,) for name in _weight_files(sizes)], sizes)}")
    if file.rpartition(".")[2].lower() in (*NO_WEIGHTS, file.lower()):
        raise TorchchatError(f"{quoted_path(file)} in {reference.repository} is no checkpoint",
                             did_you_mean(file, _weight_files(sizes)) or "name a file of weights")
    shards = shards_beside(file)
    missing = next((shard for shard in shards if shard not in sizes), None)
    if missing is not None or not shards:
        raise TorchchatError(f"{quoted_path(file)} is one of {len(shards)} files, and {reference.repository} does not "
                             "hold "
                             f"{quoted(missing)}", "its owner has not uploaded all of the model; choose another file")
    return _with_companions(sizes, shards)


def _weight_files(sizes: Mapping[str, int]) -> list[str]:
    endings = (*SINGLE_FILE_FORMATS, *(f".{kind}" for kind in WHOLE_MODEL_FORMATS))
    return [name for name in sizes if name.endswith(endings)]


def _with_companions(sizes: Mapping[str, int], weights: tuple[str, ...]) -> Selection:
    alone = Selection(weights)
    return alone if alone.is_whole else Selection(weights, _companions(sizes, weights))


def _listed(models: Sequence[tuple[str, ...]], sizes: Mapping[str, int], limit: int = 30) -> str:
    texts = [f"{group[0]} ({bytes_text(sum(sizes[name] for name in group))})" for group in models[:limit]]
    return ", ".join(texts) + (f" and {len(models) - limit} more" if len(models) > limit else "")


# ---- what goes with the weights -----------------------------------------------------------------------------------


def _companions(sizes: Mapping[str, int], weights: tuple[str, ...]) -> tuple[str, ...]:
    """Configuration and tokenizer beside the weights; Meta's tokenizer where there is no other one."""
    folder = weights[0].rpartition("/")[0]
    beside = _names_in(sizes, folder)
    wanted = [*COMPANIONS]
    if any(_is_meta(name) for name in weights):
        wanted.append("params.json")
    tokenizers = [name for name in beside if any(fnmatchcase(name, pattern) for pattern in TOKENIZER_PATTERNS)]
    found = [*(name for name in wanted if name in beside), *tokenizers]
    paths = [f"{folder}/{name}" if folder else name for name in found]
    inner = f"{folder}/original" if folder else "original"
    if not tokenizers and f"{inner}/tokenizer.model" in sizes:
        paths.append(f"{inner}/tokenizer.model")
    elif not tokenizers:
        paths += [f"{folder}/{name}" if folder else name for name in PARTS_OF_TOKENIZERS if name in beside]
    templates = f"{folder}/{MORE_TEMPLATES}" if folder else MORE_TEMPLATES
    named = [name for name in _names_in(sizes, templates) if name.endswith(".jinja")]
    paths += [f"{templates}/{name}" for name in named[:MOST_TEMPLATES]]
    return tuple(path for path in paths if path not in weights)


def _names_in(sizes: Iterable[str], folder: str) -> list[str]:
    prefix = f"{folder}/" if folder else ""
    return sorted(path[len(prefix):] for path in sizes if path.startswith(prefix) and "/" not in path[len(prefix):])


def _is_meta(path: str) -> bool:
    return path.rpartition("/")[2].startswith("consolidated")


# ---- the layouts, best first --------------------------------------------------------------------------------------


def _hugging_face(stem: str, ending: str) -> Callable[[Iterable[str]], tuple[str, ...]]:
    def find(paths: Iterable[str]) -> tuple[str, ...]:
        top = _names_in(paths, "")
        for whole in (f"{stem}.{ending}.index.json", f"{stem}.{ending}"):
            if whole in top:
                return (whole,)
        return tuple(name for name in top if fnmatchcase(name, f"{stem}*.{ending}"))

    return find


def _other_safetensors(paths: Iterable[str]) -> tuple[str, ...]:
    """Of folders that are not named as usual; Mistral's own layout only where it is the only one."""
    files = [name for name in _names_in(paths, "") if name.endswith(".safetensors")]
    files = [name for name in files if not name.startswith(BESIDE_MODELS)]
    return tuple(name for name in files if not _is_meta(name)) or tuple(files)


def _meta(folder: str) -> Callable[[Iterable[str]], tuple[str, ...]]:
    def find(paths: Iterable[str]) -> tuple[str, ...]:
        return tuple(f"{folder}/{name}".removeprefix("/") for name in _names_in(paths, folder)
                     if fnmatchcase(name, "consolidated.*.pth"))

    return find


_LAYOUTS = (_hugging_face("model", "safetensors"), _other_safetensors, _hugging_face("pytorch_model", "bin"),
            _meta(""), _meta("original"))
