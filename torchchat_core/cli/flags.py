"""Flags that several verbs share, made from the dataclasses that declare the options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

import click

from torchchat_core.cli.completion import (
    complete_device,
    complete_dtype,
    complete_executor,
    complete_model,
    complete_scheme,
)
from torchchat_core.errors import TorchchatError
from torchchat_core.generation_options import GenerationOptions, SamplingOptions
from torchchat_core.options import OptionDetail, detail_of, value_type
from torchchat_core.settings import KEYS, load_settings

if TYPE_CHECKING:
    from torchchat_core.pipeline import ModelRequest

# The long forms of the original tool for a model in one file.
EXPORTED = {"--dso-path": "shared library (.so)", "--aoti-package-path": "AOTInductor package (.pt2)",
            "--pte-path": "ExecuTorch program (.pte)"}
PATHS = ("--checkpoint-path", "--gguf-path", *EXPORTED)

Function = TypeVar("Function", bound=Callable[..., Any])

CLICK_TYPES: Mapping[type, click.ParamType[Any]] = {int: click.INT, float: click.FLOAT, str: click.STRING}


def model_flags(function: Function) -> Function:
    """MODEL, where its files are, and how it runs."""
    for decorate in reversed([
        click.argument("model", required=False, shell_complete=complete_model),
        click.option("--checkpoint-path", metavar="FILE", help="The weights, a file or folder; MODEL then only names "
                                                               "them."),
        click.option("--gguf-path", metavar="FILE", help="The model's GGUF file; MODEL then only names it."),
        *(click.option(flag, metavar="FILE", help=f"An exported {what}; MODEL then only names it.")
          for flag, what in EXPORTED.items()),
        click.option("--params-path", metavar="FILE", help="The model's config.json or params.json."),
        click.option("--tokenizer-path", metavar="FILE", help="The model's tokenizer.json or tokenizer.model."),
        click.option("--adapter", metavar="DIR", help="A LoRA adapter (PEFT format) to merge into the model."),
        click.option("--hf-token", metavar="TOKEN", help="For models that need their owner's permission; else HF_TOKEN "
                                                         "or the stored login."),
        click.option("--quantize", metavar="RECIPE", help="A recipe such as cpu, a scheme such as linear:int8, a "
                                                          "JSON object, or a file that holds one.",
                     shell_complete=complete_scheme),
        click.option("--keep-quantized", is_flag=True, default=None, help="Run the weights that a GGUF file holds "
                     "quantised as they are, instead of unpacking them."),
        click.option("--executor", metavar="NAME", help="What runs the model; auto takes the first that fits "
                                                        "[default: auto].", shell_complete=complete_executor),
        click.option("--device", metavar="NAME", help="cpu, cuda, mps, or fast: a GPU where there is one "
                                                      "[default: fast].", shell_complete=complete_device),
        click.option("-d", "--dtype", metavar="NAME", help="fp32, bf16, fp16, or fast [default: the checkpoint's].",
                     shell_complete=complete_dtype),
        click.option("--max-seq-length", type=int, metavar="N", help="Tokens of prompt and answer together; without "
                                                                     "it, as many as the model takes."),
    ]):
        function = decorate(function)
    return function


def model_request(flags: Mapping[str, Any]) -> ModelRequest:
    """What the flags of `model_flags` ask for; what they leave open is taken from the user's settings."""
    from torchchat_core.pipeline import ModelRequest

    given = {field.name: flags[field.name] for field in fields(ModelRequest) if flags.get(field.name) is not None}
    paths = {flag: path for flag in PATHS if (path := flags.get(flag[2:].replace("-", "_"))) is not None}
    if len(paths) > 1:
        raise click.UsageError(f"{' and '.join(paths)} exclude each other")
    for path in paths.values():
        given["checkpoint_path"] = path
    settings = load_settings()
    chosen = {key: value for key in KEYS if (value := settings.get(key)) is not None}
    if "checkpoint_path" in given:
        chosen.pop("model", None)
    return ModelRequest(**{**chosen, **given}, defaults=frozenset(chosen.keys() - given.keys()))


def sampling_flags(function: Function) -> Function:
    """One flag for each field of `SamplingOptions`, and those that bound an answer."""
    declared = [field for field in fields(SamplingOptions) if field.name != "logit_bias"]
    for field in reversed(declared):
        detail = detail_of(field)
        function = click.option(
            f"--{field.name.replace('_', '-')}", type=CLICK_TYPES[value_type(SamplingOptions, field.name)],
            metavar="N", default=None, help=_help(detail, field.default),
        )(function)
    for decorate in reversed([
        click.option("--logit-bias", metavar="TOKEN=BIAS", multiple=True, help="Add BIAS to the logit of a token id; "
                                                                               "may be repeated."),
        click.option("--stop", metavar="TEXT", multiple=True, help="End the answer before TEXT; may be repeated."),
    ]):
        function = decorate(function)
    return function


def _help(detail: OptionDetail, default: object) -> str:
    sentence = detail.help[0].upper() + detail.help[1:]
    known = [detail.range] if detail.range else []
    known += [f"default {default:g}"] if isinstance(default, int | float) else []
    return f"{sentence} [{'; '.join(known)}]" if known else f"{sentence}."


def generation_options(flags: Mapping[str, Any], defaults: Mapping[str, Any]) -> GenerationOptions:
    """The options that the flags ask for; what they leave open is taken from the model's own `defaults`."""
    names = [field.name for field in fields(SamplingOptions) if field.name != "logit_bias"]
    chosen = {name: flags[name] for name in names if flags.get(name) is not None}
    bias = dict(_parsed_bias(text) for text in flags.get("logit_bias", ()))
    sampling = SamplingOptions(**{**defaults, **chosen}, logit_bias=bias)
    return GenerationOptions(sampling=sampling, max_new_tokens=flags.get("max_new_tokens"),
                             stop=tuple(flags.get("stop", ())))


def _parsed_bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise TorchchatError(f"--logit-bias is {text!r}; it has to be TOKEN=BIAS, such as 42=-5") from None
