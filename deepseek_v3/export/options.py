"""What a format can be asked for, checked by its annotations."""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args, get_origin

ALLOWED = {bool: "are True and False", int: "is a whole number", str: "is a text"}


@dataclass(frozen=True)
class FormatOptions:
    """Base of every format's `Options`: dataclasses of choices (`Literal`), texts, whole numbers and booleans.

    Every error is a ValueError that names the option, what was found and what is allowed.
    """

    def __post_init__(self) -> None:
        for field in fields(self):
            check_option(field.name, getattr(self, field.name), field.type)


def check_option(name: str, value: Any, annotation: Any) -> None:
    if get_origin(annotation) is Literal:
        choices = get_args(annotation)
        fits, allowed = isinstance(value, str) and value in choices, f"are {', '.join(choices)}"
    else:
        fits, allowed = type(value) is annotation, ALLOWED[annotation]  # True is an int, but no number
    if not fits:
        raise ValueError(f"{name}: found {value!r:.200}, allowed {allowed}")
