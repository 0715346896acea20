"""Define the base class and common types of request bodies."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MAX_ITEMS = 16384  # messages in a request, or parts of a message


def _sendable(value: dict[str, Any]) -> dict[str, Any]:
    """Reject numbers that a response cannot represent: infinite ones, such as 1e999, and integers beyond any float."""
    pending: list[Any] = [value]
    while pending:
        each = pending.pop()
        if isinstance(each, dict):
            pending += each.values()
        elif isinstance(each, list):
            pending += each
        elif isinstance(each, float) and not math.isfinite(each):
            raise ValueError("a number is not finite")
        elif isinstance(each, int) and each.bit_length() > 1024:
            raise ValueError("a number is too large")
    return value


JsonObject = Annotated[dict[str, Any], AfterValidator(_sendable)]
Text = Annotated[str, Field(max_length=1 << 23)]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Body(BaseModel):
    """A strict model: values are not converted, and unknown fields are errors."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(),
                              hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown_field(cls, value: Any) -> Any:
        """Drop all unknown fields but one, because pydantic creates an error for each."""
        if cls.model_config.get("extra") != "forbid":
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        if not isinstance(value, dict) or len(value) <= len(known):
            return value
        unknown = next(key for key in value if key not in known)
        return {key: value[key] for key in value if key in known or key == unknown}
