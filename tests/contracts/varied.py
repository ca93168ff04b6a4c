"""One model, changed in each of its fields in turn: for tests that a new field can't slip past."""

from collections.abc import Iterator
from typing import Any, TypeVar

from pydantic import BaseModel

M = TypeVar("M", bound=BaseModel)


def varied(model: M) -> Iterator[tuple[str, M]]:
    """Yield each field's name, and `model` with another value in it that is valid too."""
    kind = type(model)
    properties = kind.model_json_schema()["properties"]
    for name in kind.model_fields:
        value = getattr(model, name)
        yield (
            name,
            kind.model_validate(
                {**dict(model), name: _other(properties[name], value)}, strict=False
            ),
        )


def _other(schema: dict[str, Any], value: Any) -> Any:
    if "enum" in schema:
        return next(choice for choice in schema["enum"] if choice != value)
    match schema.get("type"):
        case "boolean":
            return not value
        case "integer":
            most = schema.get("maximum", value + 1)
            return value + 1 if value < most else value - 1
        case "string":
            return "other" if value != "other" else "another"
    raise NotImplementedError(f"say here what another value of {schema} is")


class Recording:
    """Stands for a model (or a dict, by its keys), and notes what is read of it."""

    def __init__(self, model: BaseModel) -> None:
        self._model = model
        self.read: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        return getattr(self._model, name)

    def __getitem__(self, name: str) -> Any:
        self.read.add(name)
        return getattr(self._model, name)
