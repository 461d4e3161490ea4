"""What the sections of a configuration are made of."""

from contextlib import suppress
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be an integer, not true or false")
    return value


Integer = Annotated[int, BeforeValidator(_refuse_bool)]
Positive = Annotated[Integer, Field(ge=1)]
NonNegative = Annotated[Integer, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


def _read_tokens(value: Any) -> Any:
    """YAML takes 10e9 for a word."""
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


Tokens = Annotated[Positive, BeforeValidator(_read_tokens)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
