"""What can be wrong with the description of a model."""

from __future__ import annotations


class ConfigError(ValueError):
    """A model's config lacks a field, or has a value that is malformed or asks for something not implemented."""


class UnsupportedArchitectureError(ConfigError):
    """The model is of a family that is not implemented here."""

    def __init__(self, found: object, supported: list[str]) -> None:
        super().__init__(f"architecture {found!r} is not implemented; supported are {', '.join(supported)}")
