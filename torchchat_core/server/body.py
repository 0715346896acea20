"""What all bodies of requests have in common."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

MOST_ITEMS = 16384  # messages, or items of one


def _sendable(value: dict[str, Any]) -> dict[str, Any]:
    """JSON can say 1e999, and no answer can: such a number is refused, as are integers beyond any float."""
    rest: list[Any] = [value]
    while rest:
        each = rest.pop()
        if isinstance(each, dict):
            rest += each.values()
        elif isinstance(each, list):
            rest += each
        elif isinstance(each, float) and not math.isfinite(each):
            raise ValueError("a number is not finite")
        elif isinstance(each, int) and each.bit_length() > 1024:
            raise ValueError("a number is too large")
    return value


JsonObject = Annotated[dict[str, Any], AfterValidator(_sendable)]
Text = Annotated[str, Field(max_length=1 << 23)]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Body(BaseModel):
    """Strict: nothing is converted, and no field is ignored."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=(),
                              hide_input_in_errors=True)

    @model_validator(mode="before")
    @classmethod
    def _one_unknown_field(cls, value: Any) -> Any:
        """One is refused as well as any number of them, each of which would cost an error of its own."""
        if cls.model_config.get("extra") != "forbid":
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        if not isinstance(value, dict) or len(value) <= len(known):
            return value
        unknown = next(key for key in value if key not in known)
        return {key: value[key] for key in value if key in known or key == unknown}
