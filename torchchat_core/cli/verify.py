"""`torchchat verify`: whether two ways to run a model agree."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchchat_core.cli.flags import model_flags, model_request
from torchchat_core.cli.help_sections import SectionedCommand
from torchchat_core.cli.progress_bars import shown_progress
from torchchat_core.cli.texts import text_flags, text_of
from torchchat_core.cli.values import Number
from torchchat_core.errors import TorchchatError, quoted
from torchchat_core.plugins import Registry
from torchchat_core.small_files import expanded

if TYPE_CHECKING:
    from torchchat_core.measure.grid import Grid, Pair
    from torchchat_core.pipeline import ModelRequest

CHARACTERS = 4000
LIMITS = {"max_difference": "largest_difference", "max_mean_kl": "mean_kl", "max_p99_kl": "p99_kl",
          "min_top_1": "top_1"}  # flag -> field of `Limits`
CHANGES = ("model", "executor", "quantize", "dtype", "device")  # what a word KEY=VALUE of the other side may change


@click.command(cls=SectionedCommand)
@model_flags
@click.argument("other", nargs=-1, metavar="[OTHER]...")
@click.option("--all", "everything", is_flag=True, help="Every way to run MODEL that is installed, each beside the "
                                                        "reference; exported files are written and run too.")
@text_flags(CHARACTERS)
@click.option("--greedy-tokens", type=Number(minimum=1), default=32, show_default=True, metavar="N",
              help="Length of the greedy continuations of the text's first windows.")
@click.option("--max-difference", type=Number(float, minimum=0), metavar="N",
              help="Largest difference between two logits.")
@click.option("--max-mean-kl", type=Number(float, minimum=0), metavar="N", help="Largest mean KL divergence, nats.")
@click.option("--max-p99-kl", type=Number(float, minimum=0), metavar="N",
              help="Largest KL divergence at the 99th percentile, nats.")
@click.option("--min-top-1", type=Number(float, minimum=0, maximum=100), metavar="PERCENT",
              help="Share of positions at which both models have to pick the same most likely token.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_obj
def verify(registry: Registry, /, **flags: Any) -> int:
    """Run the same tokens through MODEL and OTHER; status 1 where they disagree.

    OTHER is one or more words: a model, an exported file, an executor, a recipe or a dtype, such as "model.pte",
    "compile" or "compile linear:int8 bf16". What could be several things is written executor=NAME, quantize=RECIPE,
    dtype=NAME, device=NAME or model=MODEL. All else is as the flags say, which are those of MODEL. The limits depend on
    the pair (docs/measuring.md); --max-... and --min-... replace them.
    """
    if flags["everything"] and flags["other"]:
        raise click.UsageError(f"--all and OTHER ({quoted(' '.join(flags['other']))}) exclude each other")
    if not flags["everything"] and not flags["other"]:
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
            raise click.UsageError(f"{quoted(changes[key])} and {quoted(value)} are both a {key}")
        changes[key] = value
    model = changes.pop("model", None)
    return dataclasses.replace(request if model is None else another(request, model), **changes)


def _change(word: str, registry: Registry) -> tuple[str, str]:
    """What a word is about, and what it says."""
    from torchchat_core.quantization.recipe import recipe_names
    from torchchat_core.run_options import DTYPE_NAMES
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
    from torchchat_core.measure.grid import Grid, pairs
    from torchchat_core.progress import task
    from torchchat_core.specs import ExecutorInfo

    if request.quantize is not None:
        raise click.UsageError("--all goes through every scheme; leave --quantize out")
    text = text_of(flags, CHARACTERS)  # one that cannot be read is told before anything is run
    wanted = pairs(request, registry)
    if not wanted:
        raise TorchchatError("there is nothing to compare: one executor, one device, one dtype",
                             "install another one: torchchat plugins")
    file = str(expanded(flags["file"]).absolute()) if flags["file"] is not None else None
    arguments = {"file": file, "characters": flags["characters"] or CHARACTERS, **settings}
    table = None if flags["as_json"] else _Table(wanted)
    found = []
    if table is not None:
        beside = registry.find(ExecutorInfo, wanted[0].against.executor).name
        table.begin(f"{request.model or request.checkpoint_path or 'the default model'}: {len(wanted)} ways to run it, "
                    f"each beside {beside}\n{text.description}")
    with tempfile.TemporaryDirectory() as folder:
        grid = Grid(Path(folder), registry)
        for index, pair in enumerate(wanted, 1):
            with shown_progress(), task(f"{index} of {len(wanted)}: {pair}"):
                found.append(_verified(pair, grid, arguments))
            if table is not None:
                table.add(pair, found[-1])
    if table is None:
        click.echo(json.dumps({"pairs": found}))
    else:
        table.end()
    return int(not all(each.get("agree") for each in found))


def _verified(pair: Pair, grid: Grid, arguments: Mapping[str, Any]) -> dict[str, Any]:
    named = {"combination": str(pair), "against": str(pair.against)}
    try:
        return {**named, **grid.verified(pair, arguments)}
    except TorchchatError as error:
        return {**named, "agree": None, "error": error.message, "try": error.fix}


class _Table:
    """Prints rows as they come: what runs takes seconds, and what has to be exported minutes."""

    HEADS = ("executor", "runs on", "scheme", "max diff", "mean KL", "top-1", "verdict")
    FIGURES = (8, 7, 7, 9)  # widths of the last columns

    def __init__(self, pairs: Sequence[Pair]) -> None:
        names = [self.HEADS[:3], *map(self._names, pairs)]
        self._widths = (*(max(map(len, column)) for column in zip(*names, strict=True)), *self.FIGURES)
        self._counts = {"agrees": 0, "DISAGREES": 0, "failed": 0}

    @staticmethod
    def _names(pair: Pair) -> tuple[str, ...]:
        return pair.runtime, f"{pair.way.device} {pair.way.dtype}", pair.way.scheme or "-"

    def begin(self, title: str) -> None:
        click.echo(f"{title}\n")
        self._print(self.HEADS)

    def add(self, pair: Pair, row: Mapping[str, Any]) -> None:
        """The row and, where it did not go well, why."""
        verdict = {True: "agrees", False: "DISAGREES", None: "failed"}[row["agree"]]
        self._counts[verdict] += 1
        figures = ("", "", "")
        if row["agree"] is not None:
            top = f"{100 * row['top_1']:.2f}".removesuffix(".00")
            figures = (_figure(row["largest_difference"]), _figure(row["mean_kl"]), f"{top} %")
        self._print((*self._names(pair), *figures, verdict))
        for line in _reasons(row):
            click.echo(f"  {line}")

    def _print(self, cells: Sequence[str]) -> None:
        aligned = [text.ljust(width) if place < 3 else text.rjust(width)
                   for place, (text, width) in enumerate(zip(cells, self._widths, strict=True))]
        click.echo("  ".join(aligned).rstrip())

    def end(self) -> None:
        agree, disagree, failed = self._counts.values()
        click.echo(f"\n{agree} of {agree + disagree + failed} agree, {disagree} disagree, {failed} did not run")


def _figure(value: float | None) -> str:
    return "inf" if value is None else f"{value:.2g}"


def _reasons(row: Mapping[str, Any]) -> Iterator[str]:
    if row["agree"] is None:
        yield row["error"]
        if row["try"]:
            yield f"try: {row['try']}"
    elif not row["agree"]:
        yield from row["objections"]
