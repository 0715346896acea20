"""Answers to many prompts: several at once where the executor can, else one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torchchat_core import progress
from torchchat_core.batching import Batch, Failure, Job
from torchchat_core.generation import FinishedEvent
from torchchat_core.generation_options import GenerationOptions
from torchchat_core.pipeline import OpenedModel

TOGETHER = 8  # answers at once


@dataclass(frozen=True)
class Prompt:
    """What is to be answered."""

    tokens: tuple[int, ...]
    options: GenerationOptions


def answers(opened: OpenedModel, prompts: Sequence[Prompt], name: str) -> list[str]:
    """The text of each answer, without its stop string; `name` is for progress.

    An answer that is drawn depends on its seed and on its place among the prompts, not on what runs beside it. Raises
    `TorchchatError` for a prompt that is empty or leaves no room for an answer, and where an answer cannot be made.
    """
    width = TOGETHER if "batch" in opened.executor.abilities else 1
    batch = Batch(opened.model, opened.text_format, opened.executor, limit=opened.max_seq_length, width=width,
                  kept_tokens=opened.max_seq_length)
    jobs = [Job(prompt=prompt.tokens, options=prompt.options, stream=place, told="end")
            for place, prompt in enumerate(prompts)]
    found: dict[int, str] = {}
    try:
        for job in sorted(jobs, key=lambda job: prompts[job.stream].tokens):  # those that begin alike follow each other
            batch.add(job)
        with progress.task(name, total=len(jobs)) as task:
            while len(found) < len(jobs):
                for job, event in batch.step():
                    if isinstance(event, Failure):
                        raise event.error
                    if isinstance(event, FinishedEvent):
                        found[job.stream] = event.text
                        task.advance(1)
    finally:
        batch.close()
    return [found[place] for place in range(len(jobs))]
