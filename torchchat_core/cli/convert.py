"""`torchchat convert`: any model that torchchat opens, as a folder in Hugging Face's format."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchchat_core.cli.completion import complete_dtype, complete_model
from torchchat_core.cli.values import STORED_DTYPE
from torchchat_core.errors import TorchchatError, quoted, quoted_path
from torchchat_core.plugins import Registry
from torchchat_core.small_files import expanded

if TYPE_CHECKING:
    from torchchat_core.pipeline import ModelRequest
    from torchchat_core.specs import Checkpoint, ModelFiles

DEFAULT_FOLDER = "converted"  # within --checkpoint-dir
FORMATS = ("meta", "hf", "torchtune")


@click.command()
@click.argument("names", nargs=-1, metavar="[MODEL]", shell_complete=complete_model)
@click.option("-o", "--output-dir", metavar="DIR", help="The folder to write, which must not exist or be empty; with "
                                                        f"--checkpoint-dir, its folder '{DEFAULT_FOLDER}' without.")
@click.option("-d", "--dtype", metavar="NAME", type=STORED_DTYPE, shell_complete=complete_dtype,
              help="fp32, bf16 or fp16 [default: the checkpoint's].")
@click.option("--adapter", metavar="DIR", help="A LoRA adapter to merge, in PEFT's format.")
@click.option("--hf-token", metavar="TOKEN", help="For models that need their owner's permission; else HF_TOKEN or the "
                                                  "stored login.")
@click.option("--tokenizer-path", metavar="FILE", help="The model's tokenizer.json or tokenizer.model.")
@click.option("--params-path", metavar="FILE", help="The model's config.json or params.json.")
@click.option("--checkpoint-dir", metavar="DIR", help="Instead of MODEL: the folder of a checkpoint of torchtune.")
@click.option("--checkpoint-files", metavar="FILE...", multiple=True, help="The files of the checkpoint in that "
                                                                          "folder [default: those found].")
@click.option("--checkpoint-format", type=click.Choice(FORMATS), help="What the tensors in them are called "
                                                                      "[default: found out].")
@click.option("--model-name", metavar="NAME", help="torchtune's name of the model, such as qwen2_0_5b, if no "
                                                   "config.json or params.json gives its sizes.")
@click.pass_obj
def convert(registry: Registry, /, **flags: Any) -> None:
    """Write MODEL as a folder in Hugging Face's format.

    MODEL is anything that torchchat opens: a folder or file of Meta, torchtune or llama2.c, a GGUF file, a name. The
    folder's path is printed at the end.
    """
    from torchchat_core import products
    from torchchat_core.cli.progress_bars import shown_progress
    from torchchat_core.sources.hugging_face_folder import check_free, write_folder

    _check_usage(flags)
    folder = _output(flags)
    check_free(folder)
    with shown_progress():
        files, checkpoint = _opened(flags, registry)
        dtype = _dtype(flags["dtype"], checkpoint)
        write_folder(checkpoint, files, registry, folder, dtype)
    if not files.tokenizer:
        click.echo("notice: no tokenizer was found: the folder needs one before the model runs, or give "
                   "--tokenizer-path", err=True)
    products.record(products.reference_of(files.ref), "converted", folder, dtype)
    click.echo(str(folder))


def _check_usage(flags: dict[str, Any]) -> None:
    """Either one MODEL or --checkpoint-dir, with the flags that belong to each."""
    names, files = flags["names"], flags["checkpoint_files"]
    if flags["checkpoint_dir"] is not None:
        if names and not files:
            raise click.UsageError(f"MODEL {quoted(names[0])} and --checkpoint-dir exclude each other")
        if not expanded(flags["checkpoint_dir"]).is_dir():
            raise TorchchatError(f"there is no folder {quoted_path(flags['checkpoint_dir'])}",
                                 "give the one of the checkpoint")
        return
    for name in ("checkpoint_files", "checkpoint_format", "model_name"):
        if flags[name]:
            raise click.UsageError(f"--{name.replace('_', '-')} needs --checkpoint-dir")
    if len(names) != 1:
        raise click.UsageError(f"{quoted(' '.join(names))} is more than one MODEL" if names
                               else "give one MODEL, or --checkpoint-dir")


def _output(flags: dict[str, Any]) -> Path:
    if flags["output_dir"] is not None:
        return expanded(flags["output_dir"])
    if flags["checkpoint_dir"] is not None:
        return expanded(flags["checkpoint_dir"]) / DEFAULT_FOLDER
    raise click.UsageError("say where to write: --output-dir DIR")


def _dtype(name: str | None, checkpoint: Checkpoint) -> str:
    """The name in `specs.DTYPES`; without a wish, what the checkpoint has."""
    from torchchat_core.models.weights import TORCH_DTYPES
    from torchchat_core.run_options import DTYPE_NAMES, check_dtype

    if name is None:
        return next((known for known, dtype in TORCH_DTYPES.items() if dtype == checkpoint.dtype), "fp32")
    check_dtype(name, fast=False)
    return DTYPE_NAMES[name]


# ---- what is converted --------------------------------------------------------------------------------------------


def _opened(flags: dict[str, Any], registry: Registry) -> tuple[ModelFiles, Checkpoint]:
    from torchchat_core.pipeline import ModelRequest, fetch_files, open_checkpoint

    companions = {name: flags[name] for name in ("params_path", "tokenizer_path", "adapter", "hf_token")}
    if flags["checkpoint_dir"] is None:
        request = ModelRequest(**companions, model=flags["names"][0])
        files = fetch_files(request, registry)
        return files, open_checkpoint(request, files, registry)
    request = ModelRequest(**companions, checkpoint_path=str(_first_file(flags)))
    files = _chosen_files(fetch_files(request, registry), flags)
    return files, _as_said(files, request, flags)


def _checkpoint_files(flags: dict[str, Any]) -> tuple[str, ...]:
    """Names within --checkpoint-dir: several may follow one --checkpoint-files, and then look like MODELs."""
    return (*flags["checkpoint_files"], *flags["names"])


def _first_file(flags: dict[str, Any]) -> Path:
    folder = expanded(flags["checkpoint_dir"])
    names = _checkpoint_files(flags)
    return folder / names[0] if names else folder


def _chosen_files(files: ModelFiles, flags: dict[str, Any]) -> ModelFiles:
    from torchchat_core.sources.reference import missing_file

    names = _checkpoint_files(flags)
    if len(names) < 2:
        return files
    paths = tuple(expanded(flags["checkpoint_dir"]) / name for name in names)
    for path in paths:
        if not path.is_file():
            raise missing_file(path)
    return dataclasses.replace(files, weights=paths)


def _as_said(files: ModelFiles, request: ModelRequest, flags: dict[str, Any]) -> Checkpoint:
    """The checkpoint, where it is of the format and the model that the flags say."""
    from torchchat_core.sources import checkpoints
    from torchchat_core.sources.adapters import with_adapter
    from torchchat_core.sources.torchtune import named_config

    if files.format not in ("safetensors", "pytorch"):
        raise TorchchatError(f"{files.weights[0].name} is no checkpoint of torchtune",
                             "give it as MODEL, without --checkpoint-dir")
    named = named_config(flags["model_name"]) if flags["model_name"] is not None else None
    checkpoint = checkpoints.open_checkpoint(files, flags["checkpoint_format"], named)
    return checkpoint if request.adapter is None else with_adapter(checkpoint, expanded(request.adapter))
