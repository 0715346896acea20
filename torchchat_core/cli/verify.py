"""`torchchat verify`: whether two ways to run a model agree."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from torchchat_core.cli.flags import model_flags, model_request
from torchchat_core.cli.progress_bars import shown_progress
from torchchat_core.cli.texts import text_flags, text_of
from torchchat_core.errors import TorchchatError
from torchchat_core.plugins import Registry
from torchchat_core.small_files import expanded

if TYPE_CHECKING:
    from torchchat_core.pipeline import ModelRequest

CHARACTERS = 4000
LIMITS = {"max_difference": "largest_difference", "max_mean_kl": "mean_kl", "max_p99_kl": "p99_kl",
          "min_top_1": "top_1"}  # flag -> field of `Limits`
CHANGES = ("model", "executor", "quantize", "dtype", "device")  # what a word KEY=VALUE of the other side may change


@click.command()
@model_flags
@click.argument("other", nargs=-1, metavar="[OTHER]...")
@click.option("--all", "everything", is_flag=True, help="Every way to run MODEL that is installed, each beside the "
                                                        "reference; exported files are written and run too.")
@text_flags(CHARACTERS)
@click.option("--greedy-tokens", type=click.IntRange(min=1), default=32, show_default=True, metavar="N",
              help="Length of the greedy continuations of the text's first windows.")
@click.option("--max-difference", type=float, metavar="N", help="Largest difference of two logits.")
@click.option("--max-mean-kl", type=float, metavar="N", help="Largest mean KL divergence, nats.")
@click.option("--max-p99-kl", type=float, metavar="N", help="Largest KL divergence at the 99th percentile, nats.")
@click.option("--min-top-1", type=click.FloatRange(0, 100), metavar="PERCENT", help="Positions at which both have to "
                                                                                    "find the same token likeliest.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def verify(registry: Registry, /, **flags: Any) -> int:
    """Run the same tokens through MODEL and OTHER; status 1 where they disagree.

    OTHER is one or more words: a model, an exported file, an executor, a recipe or a dtype, such as "model.pte",
    "compile" or "compile linear:int8 bf16". What could be several things is written executor=NAME, quantize=RECIPE,
    dtype=NAME, device=NAME or model=MODEL. All else is as the flags say, which are those of MODEL. The limits depend on
    the pair (docs/measuring.md); --max-... and --min-... replace them.
    """
    if flags["everything"] == bool(flags["other"]):
        raise click.UsageError("say what to compare it with: torchchat verify MODEL OTHER, or MODEL --all")
    limits = {name: flags[flag] for flag, name in LIMITS.items()}
    if limits["top_1"] is not None:
        limits["top_1"] /= 100
    settings = {"window": flags["window"], "greedy_tokens": flags["greedy_tokens"], "limits": limits}
    request = model_request(flags)
    return _grid(request, registry, flags, settings) if flags["everything"] else \
        _pair(request, other_request(request, flags["other"], registry), registry, flags, settings)


def _pair(first: ModelRequest, second: ModelRequest, registry: Registry, flags: Mapping[str, Any],
          settings: Mapping[str, Any]) -> int:
    from torchchat_core.measure.verdict import as_json, verification_lines
    from torchchat_core.measure.verifying import verify as verify_both

    text = text_of(flags, CHARACTERS)
    with shown_progress():
        found = verify_both(first, second, registry, text, **settings)
    for line in [json.dumps(as_json(found))] if flags["as_json"] else verification_lines(found):
        click.echo(line)
    return int(not found.agrees)


# ---- what the other side is ---------------------------------------------------------------------------------------


def other_request(request: ModelRequest, words: Sequence[str], registry: Registry) -> ModelRequest:
    """The request with what the words change. Another model brings its own files, and loses executor and recipe.

    Raises `click.UsageError` for words that contradict each other.
    """
    from torchchat_core.measure.verifying import another

    changes: dict[str, Any] = {}
    for word in words:
        key, value = _change(word, registry)
        if key in changes:
            raise click.UsageError(f"{changes[key]!r} and {value!r} are both a {key}")
        changes[key] = value
    model = changes.pop("model", None)
    return dataclasses.replace(request if model is None else another(request, model), **changes)


def _change(word: str, registry: Registry) -> tuple[str, str]:
    """What a word is about, and what it says."""
    from torchchat_core.pipeline import DTYPE_NAMES
    from torchchat_core.quantization.recipe import recipe_names
    from torchchat_core.specs import ExecutorInfo, QuantizerInfo

    key, equals, value = word.partition("=")
    if equals and key in CHANGES:
        return key, value
    executors = {name for qualified, info in registry.settled(ExecutorInfo) for name in (qualified, info.name)}
    recipes = {*recipe_names(), *(info.scheme for info in registry.infos(QuantizerInfo))}
    for kind, known in (("executor", executors), ("quantize", recipes), ("dtype", DTYPE_NAMES)):
        if word in known:
            return kind, word
    return ("quantize" if word.lstrip().startswith("{") else "model"), word


# ---- the grid -----------------------------------------------------------------------------------------------------


def _grid(request: ModelRequest, registry: Registry, flags: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
    from torchchat_core.measure.grid import pairs
    from torchchat_core.measure.tables import aligned
    from torchchat_core.progress import task

    if request.quantize is not None:
        raise click.UsageError("--all goes through every scheme; leave --quantize out")
    text_of(flags, CHARACTERS)  # one that cannot be read is told before anything is run
    wanted = list(pairs(request, registry))
    if not wanted:
        raise TorchchatError("there is nothing to compare: one executor, one device, one dtype",
                             "install another one: torchchat plugins")
    found = []
    with shown_progress(), task("verifying", total=len(wanted)) as done:
        for pair in wanted:
            found.append(_verified(pair, registry, flags, settings))
            done.advance(1)
    if flags["as_json"]:
        click.echo(json.dumps({"pairs": found}))
    else:
        for line in aligned([COLUMNS, *map(_cells, found)]):
            click.echo(line)
        for line in _reasons(found):
            click.echo(line)
    return int(not all(each.get("agree") for each in found))


def _verified(pair: Any, registry: Registry, flags: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    from torchchat_core.measure.grid import TASK
    from torchchat_core.measure.processes import in_own_process, request_arguments

    file = str(expanded(flags["file"]).absolute()) if flags["file"] is not None else None
    arguments = {"first": request_arguments(pair.first), "second": request_arguments(pair.second), "file": file,
                 "exporter": pair.exporter, "characters": flags["characters"] or CHARACTERS, **settings}
    named = {"combination": pair.name, "against": pair.against}
    try:
        return {**named, **in_own_process(TASK, arguments, registry)}
    except TorchchatError as error:
        return {**named, "agree": None, "error": error.message, "try": error.fix}


COLUMNS = ("combination", "difference", "mean KL", "p99 KL", "same top-1", "greedy", "verdict")


def _cells(row: Mapping[str, Any]) -> list[str]:
    if row["agree"] is None:
        return [row["combination"], "", "", "", "", "", "did not run"]

    def figure(name: str) -> str:
        return "infinite" if row[name] is None else f"{row[name]:.2g}"

    return [row["combination"], figure("largest_difference"), figure("mean_kl"), figure("p99_kl"),
            f"{100 * row['top_1']:.2f} %", f"{row['greedy_agreed']}/{row['greedy_tokens']}",
            "agrees" if row["agree"] else "DISAGREES"]


def _reasons(found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Below the table: why rows did not run, and what is wrong with those that disagree."""
    for row in found:
        if row["agree"] is None:
            yield f"did not run: {row['combination']}: {row['error']}" + (f" (try: {row['try']})" if row["try"] else "")
        elif not row["agree"]:
            yield f"{row['combination']}, against {row['against']}: {'; '.join(row['objections'])}"
