"""`torchchat eval`: tasks of lm-eval."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

import click

from torchchat_core.cli.flags import model_flags
from torchchat_core.cli.help_sections import SectionedCommand
from torchchat_core.cli.opening import opened_model
from torchchat_core.cli.progress_bars import shown_progress
from torchchat_core.cli.values import Number
from torchchat_core.errors import TorchchatError
from torchchat_core.plugins import Registry
from torchchat_core.small_files import existing_file, expanded, output_file, write_whole


@click.command("eval", cls=SectionedCommand)
@model_flags
@click.option("--tasks", multiple=True, metavar="NAME", help="A task of lm-eval, or several with commas "
                                                             "between; may be repeated [default: wikitext].")
@click.option("--limit", type=Number(float, above=0), metavar="N",
              help="Documents of each task; below 1, that share of them [default: all].")
@click.option("--num-fewshot", type=Number(minimum=0), metavar="N", help="Examples before each question [default: "
                                                                             "what the task says].")
@click.option("--data", metavar="FILE",
              help="Documents to use instead of the task's data set, without a download: plain text such as "
                   "WikiText's wiki.test.raw, or JSON lines.")
@click.option("--include-path", metavar="DIR", help="A folder of tasks of your own, as lm-eval's YAML files.")
@click.option("--seed", type=Number(minimum=0, maximum=2**32 - 1), metavar="N",
              help="Seed for the examples and for sampled answers [default: lm-eval's own seeds].")
@click.option("--output", metavar="FILE", help="Write lm-eval's results as JSON, with model, recipe and versions.")
@click.option("--json", "as_json", is_flag=True, help="Print the same JSON.")
@click.pass_obj
def evaluate(registry: Registry, /, **flags: Any) -> None:
    """Score MODEL on tasks of lm-eval: perplexity, multiple choice, questions with an answer.

    It needs pip install 'torchchat-core[eval]'. The data of a task is downloaded once. Without a network, use a local
    file: torchchat eval MODEL --data wiki.test.raw
    """
    if find_spec("lm_eval") is None:
        raise TorchchatError("the tasks are those of lm-eval, which is not installed",
                             "pip install 'torchchat-core[eval]'; torchchat perplexity needs nothing")
    output = output_file("--output", flags["output"]) if flags["output"] is not None else None
    from torchchat_core.measure.evaluation import Wish
    from torchchat_core.measure.evaluation import evaluate as run

    names = tuple(name for text in flags["tasks"] or ("wikitext",) for name in text.split(",") if name)
    if not names:
        raise click.UsageError("--tasks names no task")
    if flags["data"] is not None and len(names) > 1:
        raise click.UsageError("--data works with one task only")
    data = existing_file("--data", flags["data"]) if flags["data"] is not None else None
    include = expanded(flags["include_path"]) if flags["include_path"] is not None else None
    wish = Wish(tasks=names, limit=flags["limit"], shots=flags["num_fewshot"], include=include,
                seed=flags["seed"], data=data)
    manager = wish.manager()
    with opened_model(flags, registry) as opened, shown_progress():
        found = run(opened, wish, manager, flags["quantize"])
    content = json.dumps(found, default=str, indent=1)
    if output is not None:
        write_whole(output, content + "\n")
    for line in [content] if flags["as_json"] else result_lines(found):
        click.echo(line)


def result_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """A table: task, metric, value and standard error."""
    from torchchat_core.measure.tables import aligned

    ours = found["torchchat"]
    yield ", ".join([ours["model"], ours["executor"], ours["device"], ours["dtype"], *ours["schemes"]])
    left_out = ("alias", "sample_len")
    rows = [("task", "documents", "metric", "value", "standard error")]
    for task, metrics in found["results"].items():
        counts = found.get("n-samples", {}).get(task, {})
        for name, value in metrics.items():
            metric, _, group = name.partition(",")
            if isinstance(value, float | int) and not metric.endswith("_stderr") and metric not in left_out:
                error = metrics.get(f"{metric}_stderr,{group}")
                rows.append((task, str(counts.get("effective", "")), metric if group in ("", "none") else name,
                             f"{value:.6g}", f"{error:.2g}" if isinstance(error, float) else ""))
    yield from aligned(rows)
