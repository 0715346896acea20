"""`torchchat generate`: one prompt, one answer, or several samples of it."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from torchchat_core.cli.flags import generation_options, model_flags, sampling_flags
from torchchat_core.errors import TorchchatError
from torchchat_core.plugins import Registry

if TYPE_CHECKING:
    from torchchat_core.generation import Event, FinishedEvent, TokenSequence
    from torchchat_core.generation_options import GenerationOptions
    from torchchat_core.pipeline import OpenedModel

FIRST_WORDS = "Hello, my name is"  # where nobody gives a prompt


@click.command()
@model_flags
@click.option("--prompt", metavar="TEXT", help="The prompt; without it, --prompt-file or standard input.")
@click.option("--prompt-file", metavar="FILE", help="A text file that holds the prompt.")
@click.option("--system", metavar="TEXT", help="A system message, for models with a chat template.")
@click.option("--raw", is_flag=True, help="Continue the prompt as plain text, also where the model has a chat template.")
@click.option("--max-new-tokens", type=int, default=200, show_default=True, metavar="N", help="Length of the answer.")
@click.option("--num-samples", type=click.IntRange(1), default=1, show_default=True, metavar="N",
              help="How many answers to the one prompt.")
@sampling_flags
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: text, token_ids, finish_reason, stats.")
@click.pass_obj
def generate(registry: Registry, **flags: Any) -> int:
    """Answer one prompt, or continue one text.

    A model with a chat template answers the prompt; another one, or any with --raw, continues it, and the prompt is
    printed before the continuation.
    """
    from torchchat_core.generation import FinishedEvent, TextEvent
    from torchchat_core.pipeline import ModelRequest, open_model

    prompt = _prompt(flags)
    generation_options(flags, {})  # wrong values are told before a model is loaded
    names = {field.name for field in dataclasses.fields(ModelRequest)}
    request = ModelRequest(**{name: value for name, value in flags.items() if name in names})
    samples: list[FinishedEvent] = []
    with open_model(request, registry) as opened:
        answers, shown_before = _answers(opened, prompt, flags)
        for events in answers:
            if not flags["as_json"]:
                click.echo(shown_before, nl=False)
            for event in events:
                if isinstance(event, TextEvent) and not flags["as_json"]:
                    sys.stdout.write(event.text)
                    sys.stdout.flush()
                elif isinstance(event, FinishedEvent):
                    samples.append(event)
            if not flags["as_json"]:
                click.echo()
                _show_statistics(samples[-1])
            if samples[-1].reason == "cancelled":
                break
    if flags["as_json"]:
        objects = [_as_json(sample) for sample in samples]
        click.echo(json.dumps(objects[0] if flags["num_samples"] == 1 else {"samples": objects}, ensure_ascii=False))
    return 130 if samples[-1].reason == "cancelled" else 0


def _prompt(flags: dict[str, Any]) -> str:
    if flags["prompt"] is not None and flags["prompt_file"] is not None:
        raise click.UsageError("--prompt and --prompt-file exclude each other")
    if flags["prompt"] is not None:
        return str(flags["prompt"])
    try:
        if flags["prompt_file"] is not None:
            return Path(flags["prompt_file"]).expanduser().read_text(encoding="utf-8").removesuffix("\n")
        if sys.stdin is None or sys.stdin.isatty():
            return FIRST_WORDS
        return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n")
    except OSError as error:
        raise TorchchatError(f"cannot read the prompt from {flags['prompt_file']!r}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise TorchchatError(f"the prompt is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _answers(opened: OpenedModel, prompt: str, flags: dict[str, Any]) -> tuple[Iterator[Iterator[Event]], str]:
    """An iterator of events for each sample, and what is printed before the answer's text."""
    from torchchat_core.conversation import encode_plain
    from torchchat_core.generation import TokenSequence, check_prompt
    from torchchat_core.generation import generate as generate_tokens

    options = generation_options(flags, opened.text_format.defaults)
    as_chat = opened.text_format.template is not None and not flags["raw"]
    if flags["system"] and not as_chat:
        raise TorchchatError("--system needs a model with a chat template, and no --raw",
                             "put what the model should know into --prompt")
    if as_chat:
        def answer(sequence: TokenSequence, stream: int, cancelled: Callable[[], bool]) -> Iterator[Event]:
            return _chat_answer(opened, sequence, prompt, flags["system"], options, stream, cancelled)

        limit = opened.max_seq_length
    else:
        ids = encode_plain(prompt, opened.text_format.tokenizer)
        check_prompt(ids, opened.max_seq_length)
        limit = min(opened.max_seq_length, len(ids) + (options.max_new_tokens or opened.max_seq_length))

        def answer(sequence: TokenSequence, stream: int, cancelled: Callable[[], bool]) -> Iterator[Event]:
            return generate_tokens(sequence, ids, opened.text_format, options, at_start=not prompt, stream=stream,
                                   cancelled=cancelled)

    return _each_sample(opened, limit, flags["num_samples"], answer), "" if as_chat else prompt


def _each_sample(opened: OpenedModel, limit: int, count: int,
                 answer: Callable[[TokenSequence, int, Callable[[], bool]], Iterator[Event]]) -> Iterator[Iterator[Event]]:
    """The samples share one session: the prompt is computed once."""
    from torchchat_core.cli.interrupt import interruptible
    from torchchat_core.generation import TokenSequence

    session = opened.model.session(limit)
    try:
        sequence = TokenSequence(session)
        with interruptible() as cancelled:
            for stream in range(count):
                yield answer(sequence, stream, cancelled)
    finally:
        session.close()


def _chat_answer(opened: OpenedModel, sequence: TokenSequence, prompt: str, system: str | None,
                 options: GenerationOptions, stream: int, cancelled: Callable[[], bool]) -> Iterator[Event]:
    from torchchat_core.conversation import Conversation

    return Conversation(sequence, opened.text_format, system).ask(prompt, options, stream=stream, cancelled=cancelled)


def _show_statistics(finished: FinishedEvent) -> None:
    if sys.stderr.isatty():
        from torchchat_core.cli.statistics import statistics_line

        click.secho(statistics_line(finished.statistics), err=True, dim=True)


def _as_json(finished: FinishedEvent) -> dict[str, Any]:
    return {"text": finished.text, "token_ids": list(finished.token_ids), "finish_reason": finished.reason,
            "stats": dataclasses.asdict(finished.statistics)}
