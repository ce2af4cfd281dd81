"""Where an object was made: kept as code objects and resolved to lines only for an error's message."""

from __future__ import annotations

import sys
from types import CodeType, FrameType
from typing import TypeAlias

from distaff.frontend import errors

Origin: TypeAlias = "tuple[()] | tuple[CodeType, int]"

_is_ours: dict[CodeType, bool] = {}


def find_origin() -> Origin:
    """The innermost running line of the user's code, to be given to ``describe_origin``."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        ours = _is_ours.get(code)
        if ours is None:
            ours = _is_ours[code] = not errors.is_user_code(code.co_filename)
        if not ours:
            return code, frame.f_lineno
        frame = frame.f_back
    return ()


def describe_origin(origin: Origin) -> str:
    """The place as `` at model.py:12 (__init__)``; empty if it is not known."""
    return f" at {origin[0].co_filename}:{origin[1]} ({origin[0].co_name})" if origin else ""
