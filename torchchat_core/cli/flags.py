"""Flags that several verbs share, made from the dataclasses that declare the options."""

from __future__ import annotations

import shlex
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
from torchchat_core.cli.help_sections import FILES, RUNNING, SAMPLING, SectionOption
from torchchat_core.cli.setting_values import note_used
from torchchat_core.cli.usage import refuse_words_as_model
from torchchat_core.cli.values import DEVICE, DTYPE, EXECUTOR, RECIPE, STOP, Number, OptionValue
from torchchat_core.errors import TorchchatError, UsageError, quoted, quoted_path
from torchchat_core.generation_options import GenerationOptions, SamplingOptions
from torchchat_core.options import OptionDetail, detail_of
from torchchat_core.settings import KEYS, load_settings
from torchchat_core.small_files import expanded

if TYPE_CHECKING:
    from torchchat_core.pipeline import ModelRequest

# The long forms of the original tool for a model in one file.
EXPORTED = {"--dso-path": "shared library (.so)", "--aoti-package-path": "AOTInductor package (.pt2)",
            "--pte-path": "ExecuTorch program (.pte)"}
PATHS = ("--checkpoint-path", "--gguf-path", *EXPORTED)
ENDINGS = {"--gguf-path": ".gguf", "--dso-path": ".so", "--aoti-package-path": ".pt2", "--pte-path": ".pte"}

Function = TypeVar("Function", bound=Callable[..., Any])

def model_flags(function: Function) -> Function:
    """Add MODEL and the flags for running it and locating its files."""
    for decorate in reversed([
        click.argument("model", required=False, shell_complete=complete_model),
        _option(RUNNING, "--quantize", metavar="RECIPE", type=RECIPE, shell_complete=complete_scheme,
                help="Quantize the weights: a recipe such as cpu, a scheme such as linear:int8, a JSON object, or a "
                     "file that holds one."),
        _option(RUNNING, "--executor", metavar="NAME", type=EXECUTOR, shell_complete=complete_executor,
                help="Runtime for the model; auto picks the first that works [default: auto]."),
        _option(RUNNING, "--device", metavar="NAME", type=DEVICE, shell_complete=complete_device,
                help="cpu, cuda, mps, or fast: the GPU if there is one, else the CPU [default: fast]."),
        _option(RUNNING, "-d", "--dtype", metavar="NAME", type=DTYPE, shell_complete=complete_dtype,
                help="fp32, bf16, fp16, or fast [default: the checkpoint's]."),
        _option(RUNNING, "--max-seq-length", type=Number(minimum=1), metavar="N",
                help="Maximum number of tokens in prompt and answer together [default: the model's]."),
        _option(RUNNING, "--keep-quantized", is_flag=True, default=None,
                help="Run the quantized weights of a GGUF file as stored, instead of unpacking them."),
        _option(RUNNING, "--adapter", metavar="DIR", help="A LoRA adapter (PEFT format) to merge into the model."),
        _option(FILES, "--hf-token", metavar="TOKEN",
                help="Access token for gated models [default: HF_TOKEN, or the stored login]."),
        _option(FILES, "--checkpoint-path", metavar="FILE",
                help="File or folder with the weights; MODEL is then only a label."),
        _option(FILES, "--gguf-path", metavar="FILE", help="A GGUF file; MODEL is then only a label."),
        *(_option(FILES, flag, metavar="FILE", help=f"An exported {what}; MODEL is then only a label.")
          for flag, what in EXPORTED.items()),
        _option(FILES, "--params-path", metavar="FILE", help="The model's config.json or params.json."),
        _option(FILES, "--tokenizer-path", metavar="FILE", help="The model's tokenizer.json or tokenizer.model."),
    ]):
        function = decorate(function)
    return function


def _option(section: str, *names: str, **attributes: Any) -> Callable[[Function], Function]:
    return click.option(*names, cls=SectionOption, section=section, **attributes)


def model_request(flags: Mapping[str, Any]) -> ModelRequest:
    """What the flags of `model_flags` ask for; what they leave open is taken from the user's settings."""
    from torchchat_core.pipeline import ModelRequest

    given = {field.name: flags[field.name] for field in fields(ModelRequest) if flags.get(field.name) is not None}
    paths = {flag: path for flag in PATHS if (path := flags.get(flag[2:].replace("-", "_"))) is not None}
    if len(paths) > 1:
        raise click.UsageError(f"{' and '.join(paths)} exclude each other")
    for flag, path in paths.items():
        _check_path(flag, path)
        given["checkpoint_path"] = path
    if "checkpoint_path" not in given:
        refuse_words_as_model(flags.get("model"))
    settings = load_settings()
    chosen = {key: value for key in KEYS if (value := settings.get(key)) is not None}
    if "checkpoint_path" in given:
        chosen.pop("model", None)
    note_used(settings, {**given, "model": None} if "checkpoint_path" in given else given)
    return ModelRequest(**{**chosen, **given}, defaults=frozenset(chosen.keys() - given.keys()))


def _check_path(flag: str, path: str) -> None:
    """Raise `TorchchatError` if the value of a flag for files does not exist here, or is a file of another kind."""
    if "://" in path:
        return
    found = expanded(path)
    try:
        exists = found.exists()
    except OSError:
        exists = False
    if not exists:
        raise TorchchatError(f"{flag}: there is no file or folder {quoted_path(path)}", "give the path of a file")
    ending = ENDINGS.get(flag)
    if ending is not None and found.suffix not in ([ending] if flag not in EXPORTED else map(ENDINGS.get, EXPORTED)):
        from torchchat_core.sources.reference import MODEL_SUFFIXES

        other = next((name for name, each in ENDINGS.items() if each == found.suffix),
                     "--checkpoint-path" if found.suffix in MODEL_SUFFIXES else None)
        raise UsageError(f"{flag} is {quoted_path(path)}; expected a file that ends in {ending}",
                         f"{other} {shlex.quote(path)}" if other else f"give the {ending} file")


def sampling_flags(function: Function) -> Function:
    """Add one flag for each field of `SamplingOptions`, --stop and --logit-bias."""
    declared = [field for field in fields(SamplingOptions) if field.name != "logit_bias"]
    decorators = [_option(SAMPLING, f"--{field.name.replace('_', '-')}", type=OptionValue(SamplingOptions, field.name),
                          metavar="N", default=None, help=_help(detail_of(field), field.default)) for field in declared]
    decorators += [
        _option(SAMPLING, "--stop", metavar="TEXT", type=STOP, multiple=True,
                help="Stop the answer before TEXT; may be repeated."),
        _option(SAMPLING, "--logit-bias", metavar="TOKEN=BIAS", multiple=True,
                help="Add BIAS to the logit of token id TOKEN; may be repeated."),
    ]
    for decorate in reversed(decorators):
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
        found = int(token), float(bias)
        SamplingOptions(logit_bias=dict([found]))
        return found
    except (ValueError, TorchchatError):
        raise UsageError(f"--logit-bias is {quoted(text)}; expected TOKEN=BIAS, a token id and a number from -10000 to "
                         "10000, such as 42=-5") from None
