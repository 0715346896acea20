"""`torchchat generate`: one prompt, one answer, or several samples of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from torchchat_core.cli.flags import generation_options, model_flags, sampling_flags
from torchchat_core.cli.help_sections import SectionedCommand
from torchchat_core.cli.opening import opened_model
from torchchat_core.cli.values import Number
from torchchat_core.errors import TorchchatError, UsageError, quoted
from torchchat_core.plugins import Registry
from torchchat_core.small_files import expanded, output_file, read_json, written_text

if TYPE_CHECKING:
    from torchchat_core.generation import Event, FinishedEvent, TokenSequence
    from torchchat_core.generation_options import Grammar
    from torchchat_core.pipeline import OpenedModel
    from torchchat_core.specs import Session

FIRST_WORDS = "Hello, my name is"  # where nobody gives a prompt


@click.command(cls=SectionedCommand)
@model_flags
@click.option("--prompt", metavar="TEXT", help="The prompt; without it, --prompt-file or standard input.")
@click.option("--prompt-file", metavar="FILE", help="A text file that holds the prompt.")
@click.option("--system", metavar="TEXT", help="A system message, for models with a chat template.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it stands, control tokens included, also "
                                        "where the model has a chat template.")
@click.option("--max-new-tokens", type=Number(minimum=1), default=200, show_default=True, metavar="N",
              help="Maximum number of tokens in the answer.")
@click.option("--num-samples", type=Number(minimum=1), default=1, show_default=True, metavar="N",
              help="How many answers to the one prompt.")
@click.option("--json-schema", metavar="FILE", help="Only texts that this JSON Schema describes; the answer is JSON.")
@sampling_flags
@click.option("--profile", metavar="FILE", help="Write a trace of torch.profiler to FILE (.json or .json.gz, for "
                                                "chrome://tracing and Perfetto), and show where a token's time goes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: text, token_ids, finish_reason, stats.")
@click.pass_obj
def generate(registry: Registry, /, **flags: Any) -> int:
    """Answer one prompt, or continue one text.

    A model with a chat template answers the prompt; another one, or any with --raw, continues it, and the prompt is
    printed before the continuation.
    """
    from torchchat_core.cli.answers import answer_json

    if flags["raw"] and flags["system"]:
        raise UsageError("--system and --raw exclude each other: a raw prompt has no system message",
                         "put the system message into --prompt")
    prompt, trace = _prompt(flags), _trace_path(flags["profile"])
    grammar = _grammar(flags["json_schema"])
    generation_options(flags, {})  # wrong values are told before a model is loaded
    with opened_model(flags, registry) as opened:
        plan = _plan(opened, prompt, flags, grammar)
        samples = _run(opened, plan, flags["num_samples"], trace, quiet=flags["as_json"])
    if flags["as_json"]:
        objects = [answer_json(sample) for sample in samples]
        click.echo(json.dumps(objects[0] if flags["num_samples"] == 1 else {"samples": objects}, ensure_ascii=False))
    return 130 if samples[-1].reason == "cancelled" else 0


def _trace_path(text: str | None) -> Path | None:
    """Where --profile writes to. Raises `TorchchatError` where it cannot, before anything is loaded."""
    if text is None:
        return None
    path = output_file("--profile", text)
    if not path.name.endswith((".json", ".json.gz")):
        raise UsageError(f"--profile is {quoted(text)}; expected a file that ends in .json or .json.gz")
    return path


def _prompt(flags: dict[str, Any]) -> str:
    file = flags["prompt_file"]
    if flags["prompt"] is not None and file is not None:
        raise click.UsageError("--prompt and --prompt-file exclude each other")
    if flags["prompt"] is not None:
        return str(flags["prompt"])
    if file is None and (sys.stdin is None or sys.stdin.isatty()):
        return FIRST_WORDS
    try:
        content = sys.stdin.buffer.read() if file is None else expanded(file).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else None
        raise TorchchatError(f"--prompt-file: cannot read {quoted(file)}: {reason or error}") from None
    return written_text(content, "the prompt").removesuffix("\n")


@dataclass(frozen=True)
class Plan:
    """How the prompt is answered."""

    limit: int  # tokens that the sequence may have
    echo: str  # printed before the answer
    answer: Callable[[TokenSequence, int, Callable[[], bool]], Iterator[Event]]  # of (sequence, stream, cancelled)


def _grammar(file: str | None) -> Grammar | None:
    """Of the texts that a JSON Schema describes."""
    if file is None:
        return None
    from torchchat_core.constraints import schema_grammar

    try:
        return schema_grammar(read_json(expanded(file), "correct the JSON Schema in the file"))
    except TorchchatError as error:
        raise TorchchatError(f"--json-schema: {error.message}", error.fix) from None


def _plan(opened: OpenedModel, prompt: str, flags: dict[str, Any], grammar: Grammar | None) -> Plan:
    """As a conversation of one turn where the model has a template, else as a text that is continued."""
    from torchchat_core.conversation import Conversation, encode_plain
    from torchchat_core.generation import check_prompt
    from torchchat_core.generation import generate as generate_tokens

    text_format = opened.text_format
    options = replace(generation_options(flags, text_format.defaults), grammar=grammar)
    if text_format.template is not None and not flags["raw"]:
        return Plan(opened.max_seq_length, "", lambda sequence, stream, cancelled: Conversation(
            sequence, text_format, flags["system"]).ask(prompt, options, stream=stream, cancelled=cancelled))
    if flags["system"]:
        raise TorchchatError("--system needs a model with a chat template, which this one does not have",
                             "put what the model should know into --prompt")
    ids = encode_plain(prompt, text_format.tokenizer, special=True)
    check_prompt(ids, opened.max_seq_length)
    limit = min(opened.max_seq_length, len(ids) + flags["max_new_tokens"])
    return Plan(limit, prompt, lambda sequence, stream, cancelled: generate_tokens(
        sequence, ids, text_format, options, at_start=not prompt, stream=stream, cancelled=cancelled))


def _run(opened: OpenedModel, plan: Plan, count: int, trace: Path | None, quiet: bool) -> list[FinishedEvent]:
    """All samples, over one session; with a trace of them where one is wanted."""
    session = opened.model.session(plan.limit)
    try:
        if trace is None:
            return _samples(session, plan, count, quiet)
        from torchchat_core.measure.profiling import profiled

        with profiled(session, trace) as profile:
            samples = _samples(cast("Session", profile.session), plan, count, quiet)
        for line in (*profile.lines(), f"written: {trace}"):
            click.echo(line, err=True)
        return samples
    finally:
        session.close()


def _samples(session: Session, plan: Plan, count: int, quiet: bool) -> list[FinishedEvent]:
    """The answers one after the other: the prompt is computed once. Prints them as they come, unless `quiet`."""
    from torchchat_core.cli.answers import statistics_line
    from torchchat_core.cli.interrupt import interruptible
    from torchchat_core.generation import FinishedEvent, NoticeEvent, TextEvent, TokenSequence

    samples: list[FinishedEvent] = []
    show = (lambda _text: None) if quiet else _write
    with interruptible() as cancelled:
        sequence = TokenSequence(session)
        for stream in range(count):
            show(plan.echo)
            for event in plan.answer(sequence, stream, cancelled):
                if isinstance(event, TextEvent):
                    show(event.text)
                elif isinstance(event, NoticeEvent):
                    click.echo(f"notice: {event.text}", err=True)
                elif isinstance(event, FinishedEvent):
                    samples.append(event)
            show("\n")
            if not quiet and sys.stderr.isatty():
                click.secho(statistics_line(samples[-1].statistics), err=True, dim=True)
            if samples[-1].reason == "cancelled":
                break
    return samples


def _write(text: str) -> None:
    from torchchat_core.cli.answers import printable

    click.echo(printable(text) if sys.stdout is not None and sys.stdout.isatty() else text, nl=False)
