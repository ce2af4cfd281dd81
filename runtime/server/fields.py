"""Declarative validation of request bodies.

A request is a dataclass whose fields are made by `required` or `optional` with a check: a function that takes a JSON
value and the path of the field, and returns the value or raises a 400 that names the field. JSON null means "not
given", as in OpenAI's API; fields that are not declared are ignored.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from distaff.runtime.server.errors import bad_request

logger = logging.getLogger(__name__)

Check: TypeAlias = Callable[[Any, str], Any]
T = TypeVar("T")

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


def required(check: Check) -> Any:
    """A field that must be given."""
    return dataclasses.field(metadata={"check": check})


def optional(check: Check, default: Any = None) -> Any:
    """A field with a default, which null stands for too."""
    return dataclasses.field(default=default, metadata={"check": check})


def parse(cls: type[T], body: object) -> T:
    """The request of dataclass ``cls`` in a JSON value; raises `ApiError` 400 that names the field at fault."""
    if not isinstance(body, dict):
        raise bad_request(None, f"The request body must be a JSON object, not {json_type(body)}.")
    values = {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        value = body.get(field.name)
        if value is not None:
            values[field.name] = field.metadata["check"](value, field.name)
        elif field.default is dataclasses.MISSING:
            raise bad_request(field.name, f"`{field.name}` is required.")
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("ignored fields: %s", sorted(body.keys() - {f.name for f in dataclasses.fields(cls)}))  # type: ignore[arg-type]
    return cls(**values)


def parse_json(body: bytes) -> Any:
    """Strict JSON: no NaN, no Infinity, no characters that are not Unicode; raises `ApiError` 400."""
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
        if b"\\ud" in body.lower():  # escapes may spell half a surrogate pair, which no text can hold
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise bad_request(None, "The request body is nested too deeply.") from None
    except ValueError as error:
        raise bad_request(None, f"The request body is not valid JSON: {error}", "invalid_json") from None
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def json_type(value: object) -> str:
    """What JSON calls the value's type."""
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "an array"
    return "an object"


def _mismatch(path: str, wanted: str, value: object) -> Exception:
    return bad_request(path, f"`{path}` must be {wanted}, not {json_type(value)}.")


def boolean(value: Any, path: str) -> bool:
    """true or false; as in vLLM also the words "true" and "false"."""
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not isinstance(value, bool):
        raise _mismatch(path, "a boolean", value)
    return value


def integer(low: int = INT64_MIN, high: int = INT64_MAX) -> Check:
    """A whole number within bounds; 3.0 is one too."""

    def check(value: Any, path: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _mismatch(path, "an integer", value)
        if isinstance(value, float) and not value.is_integer():
            raise bad_request(path, f"`{path}` must be an integer; {value} is not whole.")
        if not low <= value <= high:
            words, limit = ("greater than or equal", low) if value < low else ("less than or equal", high)
            code = words.replace(" or ", " ").replace(" ", "_")  # pydantic's name, which clients of vLLM look for
            raise bad_request(path, f"`{path}` must be {words} to {limit} ({code}).", code)
        return int(value)

    return check


def number(value: Any, path: str) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _mismatch(path, "a number", value)
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise bad_request(path, f"`{path}` is too large for a number.")
    return result


def string(min_length: int = 0, max_length: int | None = None) -> Check:
    """Text with a length in characters within bounds."""

    def check(value: Any, path: str) -> str:
        if not isinstance(value, str):
            raise _mismatch(path, "a string", value)
        if len(value) < min_length:
            raise bad_request(path, f"`{path}` must have at least {min_length} characters.")
        if max_length is not None and len(value) > max_length:
            raise bad_request(path, f"`{path}` must have at most {max_length} characters, and has {len(value)}.")
        return value

    return check


text = string()


def one_of(*allowed: str) -> Check:
    """One of a few words."""

    def check(value: Any, path: str) -> str:
        if value not in allowed:
            raise bad_request(path, f"`{path}` must be one of {', '.join(map(repr, allowed))}.")
        return str(value)

    return check


def array(item: Check, min_items: int = 0) -> Check:
    """A list whose items pass ``item``."""

    def check(value: Any, path: str) -> list[Any]:
        if not isinstance(value, list):
            raise _mismatch(path, "an array", value)
        if len(value) < min_items:
            raise bad_request(path, f"`{path}` must have at least {min_items} item{'s' * (min_items > 1)}.")
        return [item(entry, f"{path}[{i}]") for i, entry in enumerate(value)]

    return check


def mapping(value: Any, path: str) -> dict[str, Any]:
    """A JSON object with any contents."""
    if not isinstance(value, dict):
        raise _mismatch(path, "an object", value)
    return value


def nested(cls: type[T]) -> Check:
    """An object that is itself a declared dataclass; paths in its errors start with the field's name."""
    checks: Mapping[str, Check] = {f.name: f.metadata["check"] for f in dataclasses.fields(cls)}  # type: ignore[arg-type]

    def check(value: Any, path: str) -> T:
        given = mapping(value, path)
        return cls(**{k: c(given[k], f"{path}.{k}") for k, c in checks.items() if given.get(k) is not None})

    return check


def string_or_strings(value: Any, path: str) -> Sequence[str]:
    """One string or a list of them."""
    if isinstance(value, str):
        return [value]
    return array(text)(value, path)  # type: ignore[no-any-return]


def unsupported(advice: str, *harmless: Any) -> Check:
    """A field of OpenAI's or vLLM's API that is refused, unless its value asks for nothing (``harmless``)."""

    def check(value: Any, path: str) -> None:
        if not any(value == nothing and type(value) is type(nothing) for nothing in harmless):
            raise bad_request(path, f"`{path}` is not supported: {advice}", "unsupported_parameter")

    return check
