"""What the server permits. Standard library alone: `--help` is written from it."""

from __future__ import annotations

from dataclasses import dataclass

from torchchat_core.options import option, validate


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Raises `TorchchatError` for a value out of range."""

    parallel: int = option(0, "answers at once; 0: 64 where the executor takes them in one step, else 4",
                           minimum=0, maximum=1024)
    max_queue: int = option(256, "answers that may wait for a place; beyond it, requests get status 429", minimum=0)
    max_body_bytes: int = option(8 << 20, "size of a request's body", minimum=1024)
    max_prompt_tokens: int = option(0, "length of a prompt; 0: what the model takes", minimum=0)
    max_output_tokens: int = option(0, "length of an answer; 0: what the model takes", minimum=0)
    max_time: float = option(600.0, "seconds from a request to the end of its answer", above=0.0, maximum=86400.0)
    cache_tokens: int = option(16384, "tokens that caches of finished conversations may have memory for, each for 256 "
                                      "at least; they serve prompts that begin alike", minimum=0)
    memory_limit: int = option(0, "MiB that the weights of all loaded models may take together; 0: any", minimum=0)
    max_loaded: int = option(0, "models in memory at once, those that were not used for longest make room; 0: any",
                             minimum=0)
    grace: float = option(30.0, "seconds that answers in progress get when the server is told to stop", minimum=0.0,
                          maximum=3600.0)

    def __post_init__(self) -> None:
        validate(self)
