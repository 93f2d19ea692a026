"""What the recipes of pretraining and fine-tuning share: strict, flat dataclasses read from YAML."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Self, get_args, get_origin

import yaml


class YamlRecipe:
    """Base of frozen dataclasses whose fields are plain values. Every error is a `ValueError` that names the field."""

    def check(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        """Every field has its annotated type and lies in its range of `ranges` (both ends allowed) unless None."""
        for spec in dataclasses.fields(self):  # type: ignore[arg-type]
            _check_type(spec.name, spec.type, getattr(self, spec.name))
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"recipe: {name} is {value!r}, allowed are {low:g} to {high:g}")

    @classmethod
    def load(cls, path: str | Path, **overrides: Any) -> Self:
        """Read a YAML file; `overrides` win.

        Where a field holds a mapping in the file and in `overrides`, that of `overrides` changes the keys that it has;
        an empty one empties the field. Raises `ValueError` naming the file and the field.
        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: cannot be read as a recipe: {error}") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path}: a recipe is a mapping of fields, found {type(content).__name__}")
        known = {spec.name: spec.type for spec in dataclasses.fields(cls)}  # type: ignore[arg-type]
        values = content | {name: _merged(content.get(name), value) for name, value in overrides.items()}
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise ValueError(f"{path}: unknown field {', '.join(unknown)}; allowed are {', '.join(known)}")
        try:
            return cls(**{name: as_number(known[name], value) for name, value in values.items()})
        except TypeError as error:  # a field without a default is missing
            raise ValueError(f"{path}: {str(error).replace('__init__() ', '')}") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def parse_fields(items: Iterable[str]) -> dict[str, Any]:
    """`FIELD=VALUE` arguments of a command line, the values as YAML. ValueError for anything else."""
    fields = {}
    for item in items:
        name, separator, value = item.partition("=")
        if not separator or not name.isidentifier():
            raise ValueError(f"{item!r}: expected FIELD=VALUE")
        try:
            fields[name] = yaml.safe_load(value)
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            raise ValueError(f"{item!r}: the value is not YAML: {error}") from None
    return fields


def as_number(annotation: Any, value: Any) -> Any:
    """`value`, as a float where `annotation` has one: YAML 1.1 reads `1e-3`, without a point, as a string."""
    if isinstance(value, str) and float in (annotation, *get_args(annotation)):
        try:
            return float(value)
        except ValueError:
            pass  # the check of types says what is allowed
    return value


def _merged(content: Any, override: Any) -> Any:
    if override and isinstance(content, dict) and isinstance(override, dict):
        return content | override
    return override


def _check_type(name: str, annotation: Any, value: Any) -> None:
    if get_origin(annotation) is Literal:
        if value not in get_args(annotation):
            raise ValueError(f"recipe: {name} is {value!r}, allowed are {', '.join(map(str, get_args(annotation)))}")
        return
    members = get_args(annotation) if NoneType in get_args(annotation) else (annotation,)
    allowed = tuple(get_origin(member) or member for member in members)
    if float in allowed:
        allowed = (*allowed, int)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        names = " or ".join(a.__name__ for a in allowed)
        raise ValueError(f"recipe: {name} is {value!r}, allowed is {names}")
    for member in members:  # list[str], dict[str, Any]: their elements, or keys
        if get_args(member) and isinstance(value, get_origin(member)):
            for element in value:
                _check_type(f"an element of {name}", get_args(member)[0], element)
