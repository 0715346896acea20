"""Models in folders and files of this machine, and the one that comes with torchchat."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path

from torchchat_core.artifacts import ARTIFACT, has_manifest
from torchchat_core.errors import TorchchatError, quoted, quoted_path
from torchchat_core.small_files import expanded
from torchchat_core.sources.reference import missing_file
from torchchat_core.specs import Checkpoint, ModelFiles, ModelRef

EMBEDDED = Path(__file__).parent.parent / "data" / "embedded"
TOKENIZER_PATTERNS = ("tokenizer.json", "tokenizer.model*", "tok*.model", "*.tiktoken")
SINGLE_FILE_FORMATS = {".safetensors": "safetensors", ".bin": "pytorch", ".pt": "pytorch", ".pth": "pytorch"}
WHOLE_MODEL_FORMATS = ("gguf",)  # of files that hold configuration and tokenizer too
BESIDE_MODELS = ("adapter_", "recipe_state")  # how files begin that are no models, though they look like them
MORE_TEMPLATES, MOST_TEMPLATES = "additional_chat_templates", 64
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")


class LocalSource:
    """Finds and opens Hugging Face folders, Meta and torchtune folders, and single checkpoint files."""

    def fetch(self, ref: ModelRef) -> ModelFiles:
        if ref.scheme != "file":
            raise TorchchatError(f"{quoted_path(ref.text)} is no file or folder of this machine")
        path = expanded(ref.location)
        if path.is_dir():
            return files_of_folder(ref, path)
        if path.is_file():
            return files_of_single_file(ref, path)
        raise missing_file(path)

    def open(self, files: ModelFiles) -> Checkpoint:
        from torchchat_core.sources.checkpoints import open_checkpoint

        return open_checkpoint(files)


class EmbeddedSource:
    """The small model that comes with torchchat."""

    def fetch(self, ref: ModelRef) -> ModelFiles:
        if ref.scheme != "embedded" or ref.location != "guide":
            raise TorchchatError(f"there is no embedded model {quoted_path(ref.location)}",
                                 "the only one is embedded:guide")
        return files_of_folder(ref, EMBEDDED)


def files_of_folder(ref: ModelRef, folder: Path) -> ModelFiles:
    """The model in a folder. Raises `TorchchatError` where it holds none, or checkpoints of several kinds."""
    found = {kind: weights for kind, find in _LAYOUTS.items() if (weights := find(folder))}
    if not found and (single := _single(folder)):
        found = {"single .pt file": single}
    whole = [] if found else _whole_models(folder)
    if len(whole) > 1:
        names = ", ".join(path.name for path in whole)
        raise TorchchatError(f"the folder {quoted_path(str(folder))} holds several models: {names}",
                             "name one of the files")
    if whole:
        return files_of_single_file(ref, whole[0])
    if not found and (folder / "adapter_config.json").is_file():
        raise TorchchatError(f"the folder {quoted_path(str(folder))} holds an adapter, and no model",
                             "name the model that it belongs to, and give the folder with --adapter")
    if not found:
        raise TorchchatError(f"the folder {quoted_path(str(folder))} holds no checkpoint",
                             "it should have *.safetensors, pytorch_model*.bin, consolidated.*.pth, a torchtune "
                             "checkpoint, a single .pt file or a .gguf file")
    if "Hugging Face .bin" in found and "safetensors" in found:
        del found["Hugging Face .bin"]  # hubs keep the same weights twice
    if len(found) > 1:
        listed = " and ".join(f"{weights[0].name} ({kind})" for kind, weights in found.items())
        raise TorchchatError(f"the folder {quoted_path(str(folder))} holds several checkpoints: {listed}",
                             "name one of the files")
    kind, weights = found.popitem()
    return files_with_companions(ref, folder, "safetensors" if kind == "safetensors" else "pytorch", weights)


def files_of_single_file(ref: ModelRef, path: Path) -> ModelFiles:
    """The model in one file, or in the shards of which it is one (NAME-00001-of-00003.SUFFIX).

    Beside weights alone, configuration and tokenizer are looked for in the same folder. A file of another kind has
    its ending as format, and is left to whatever source opens that; tokenizers are looked for in it, and beside it.
    Raises `TorchchatError` for a file without an ending, or where a shard is missing.
    """
    kind = SINGLE_FILE_FORMATS.get(path.suffix, path.suffix.removeprefix(".").lower())
    if kind != "gguf" and _is_gguf(path):
        named = shlex.join([str(path.absolute()), f"{path.stem[:40]}.gguf"])
        raise TorchchatError(f"{quoted(path.name)} is a GGUF file, but its name does not end in .gguf",
                             f"ln -s {named}")
    if not kind and has_manifest(path):
        kind = ARTIFACT
    if not kind:
        raise TorchchatError(f"{quoted_path(path.name)} is no kind of checkpoint that is known here",
                             f"known endings are {', '.join((*SINGLE_FILE_FORMATS, *WHOLE_MODEL_FORMATS))}")
    weights = shards_of(path)
    if path.suffix in SINGLE_FILE_FORMATS:
        return files_with_companions(ref, path.parent, kind, weights)
    return ModelFiles(ref=ref, format=kind, root=path.parent, weights=weights,
                      tokenizer=(weights[0], *_tokenizers(path.parent)))


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False  # whoever opens the file says what is wrong


def shards_of(path: Path) -> tuple[Path, ...]:
    """All files of a model that is split into NAME-00001-of-00003.SUFFIX and so on; any other path alone.

    Raises `TorchchatError` where one of them is missing.
    """
    match = SHARD.fullmatch(path.name)
    if match is None:
        return (path,)
    count = int(match["count"])
    numbers = range(1, count + 1)
    names = [f"{match['stem']}-{number:05}-of-{match['count']}{match['suffix']}" for number in numbers]
    missing = next((name for name in names if not (path.parent / name).is_file()), None)
    if missing is not None or not names:
        raise TorchchatError(f"{quoted_path(path.name)} is one of {count} files, and {quoted(missing)} is not beside "
                             "it",
                             "put all of them into one folder")
    return tuple(path.parent / name for name in names)


def files_with_companions(ref: ModelRef, folder: Path, kind: str, weights: tuple[Path, ...]) -> ModelFiles:
    places = (folder, folder / "original")  # hubs keep Meta's own files in "original"
    return ModelFiles(
        ref=ref, format=kind, root=folder, weights=weights,
        config=_first(place / name for name in ("config.json", "params.json") for place in places),
        tokenizer=tuple(dict.fromkeys(path for place in places for path in _tokenizers(place))),
        tokenizer_config=_first([folder / "tokenizer_config.json"]),
        generation_config=_first([folder / "generation_config.json"]),
        chat_template=_first([folder / "chat_template.jinja"]),
        more_chat_templates=_more_templates(folder),
    )


def _tokenizers(folder: Path) -> list[Path]:
    return [path for pattern in TOKENIZER_PATTERNS for path in sorted(folder.glob(pattern))]


def _more_templates(folder: Path) -> tuple[Path, ...]:
    """Return the named chat templates, which `transformers` saves in a separate folder."""
    found = tuple(sorted(path for path in folder.glob(f"{MORE_TEMPLATES}/*.jinja") if path.is_file()))
    if len(found) > MOST_TEMPLATES:
        raise TorchchatError(f"{quoted_path(str(folder / MORE_TEMPLATES))} holds {len(found)} chat templates; "
                             f"{MOST_TEMPLATES} is "
                             "the most", "delete those that are not needed")
    return found


def _first(paths: Iterable[Path]) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


# ---- which files of a folder are the weights ----------------------------------------------------------------------


def _safetensors(folder: Path) -> tuple[Path, ...]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return (index,)
    if (folder / "model.safetensors").is_file():
        return (folder / "model.safetensors",)
    files = sorted(path for path in folder.glob("*.safetensors") if not path.name.startswith(BESIDE_MODELS))
    return tuple(path for path in files if not path.name.startswith("consolidated")) or tuple(files)


def _bin(folder: Path) -> tuple[Path, ...]:
    index = folder / "pytorch_model.bin.index.json"
    return (index,) if index.is_file() else tuple(sorted(folder.glob("pytorch_model*.bin")))


def _meta(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted(folder.glob("consolidated.*.pth")))


def _torchtune(folder: Path) -> tuple[Path, ...]:
    """torchtune writes meta_model_EPOCH.pt, hf_model_SHARD_EPOCH.pt or torchtune_model_EPOCH.pt: the last epoch's.

    Since its version 0.5 every epoch has a folder, with model-00001-of-00001.bin or .pt.
    """
    by_epoch: dict[int, list[Path]] = {}
    for path in sorted(folder.glob("*_model_*.pt")):
        match = re.fullmatch(r"(?:meta_model|torchtune_model|hf_model_\d+)_(\d+)\.pt", path.name)
        if match:
            by_epoch.setdefault(int(match[1]), []).append(path)
    if by_epoch or (folder / "pytorch_model.bin.index.json").is_file():
        return tuple(by_epoch[max(by_epoch)]) if by_epoch else ()
    return tuple(path for path in sorted(folder.glob("model-*-of-*.*")) if path.suffix in (".bin", ".pt"))


def _single(folder: Path) -> tuple[Path, ...]:
    files = [path for path in sorted([*folder.glob("*.pt"), *folder.glob("*.pth")])
             if not path.name.startswith(BESIDE_MODELS)]
    return tuple(files) if len(files) == 1 else ()


def _whole_models(folder: Path) -> list[Path]:
    """Files that each hold a whole model; of those that are split, the first."""
    files = sorted(path for kind in WHOLE_MODEL_FORMATS for path in folder.glob(f"*.{kind}"))
    return [path for path in files if (match := SHARD.fullmatch(path.name)) is None or int(match["number"]) == 1]


_LAYOUTS: dict[str, Callable[[Path], tuple[Path, ...]]] = {
    "safetensors": _safetensors,
    "Hugging Face .bin": _bin,
    "Meta": _meta,
    "torchtune": _torchtune,
}
