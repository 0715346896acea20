"""Opening a model for a verb: what has to be fetched or built first is shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from torchchat_core.cli.flags import model_request
from torchchat_core.cli.progress_bars import shown_progress
from torchchat_core.plugins import Registry

if TYPE_CHECKING:
    from torchchat_core.pipeline import OpenedModel


@contextmanager
def opened_model(flags: Mapping[str, Any], registry: Registry) -> Iterator[OpenedModel]:
    """The model that the flags of `model_flags` ask for. Progress is shown until it is open, and not afterwards."""
    from torchchat_core.pipeline import open_model

    with ExitStack() as stack:
        with shown_progress():
            opened = stack.enter_context(open_model(model_request(flags), registry))
        yield opened
