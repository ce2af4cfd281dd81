"""Reading typed fields from a JSON object, with errors that name the field and say what was expected."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from distaff.frontend.models.errors import ConfigError

_MISSING: Any = object()


class Fields:
    """The fields of a JSON object called ``where`` in messages. A field that is null counts as missing."""

    def __init__(self, data: Mapping[str, Any], where: str = "config") -> None:
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where} is a {type(data).__name__}; an object with fields was expected")
        self.data = data
        self.where = where

    def error(self, name: str, problem: str) -> ConfigError:
        """An error about the field ``name``."""
        return ConfigError(f"{self.where}: {name} {problem}")

    def size(self, name: str, default: int = _MISSING) -> int:
        """A whole number of at least 1."""
        value = self.whole(name, default)
        if value < 1:
            raise self._unexpected(name, value, "a whole number of at least 1")
        return value

    def whole(self, name: str, default: int = _MISSING) -> int:
        """A whole number of at least 0."""
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self._unexpected(name, value, "a whole number")
        return value

    def positive(self, name: str, default: float = _MISSING) -> float:
        """A finite number above 0."""
        value = self._get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self._unexpected(name, value, "a number above 0")
        return float(value)

    def flag(self, name: str, default: bool = _MISSING) -> bool:
        """True or false."""
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise self._unexpected(name, value, "true or false")
        return value

    def optional_size(self, name: str, default: int) -> int | None:
        """Like `size`, but null means None; ``default`` is for a field that is not there at all."""
        return None if self.data.get(name, default) is None else self.size(name, default)

    def optional_positive(self, name: str, default: float) -> float | None:
        """Like `positive`, but null means None; ``default`` is for a field that is not there at all."""
        return None if self.data.get(name, default) is None else self.positive(name, default)

    def _get(self, name: str, default: Any) -> Any:
        value = self.data.get(name)
        if value is not None:
            return value
        if default is _MISSING:
            raise self.error(name, "is missing")
        return default

    def _unexpected(self, name: str, value: object, expected: str) -> ConfigError:
        return self.error(name, f"is {value!r}; expected {expected}")
