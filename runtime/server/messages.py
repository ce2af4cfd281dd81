"""Messages of a chat: checked, and brought into the plain form that chat templates are written for.

Text parts are joined by line breaks, and the arguments of earlier tool calls, which clients send as JSON text, become
objects; both as in vLLM.
"""

from __future__ import annotations

import json
from typing import Any

from distaff.runtime.server.errors import bad_request
from distaff.runtime.server.fields import array, json_type, mapping, string, text

_TEXT_FIELD = {"text": "text", "refusal": "refusal", "thinking": "thinking"}
_TEMPLATE_NAMES = frozenset(
    ("self", "messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template")
)


def message(value: Any, path: str) -> dict[str, Any]:
    """One message: a role and text, or for the assistant earlier tool calls; other fields pass through."""
    given = mapping(value, path)
    role = string(1)(given.get("role"), f"{path}.role")
    content = given.get("content")
    if content is None and role != "assistant":
        raise bad_request(f"{path}.content", f"`{path}.content` is required for the role {role!r}.")
    plain = {**given, "role": role, "content": _content(content, f"{path}.content")}
    if given.get("tool_calls") is not None:
        plain["tool_calls"] = array(_tool_call)(given["tool_calls"], f"{path}.tool_calls")
    return plain


def _content(value: Any, path: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise bad_request(path, f"`{path}` must be a string or an array of parts, not {json_type(value)}.")
    return "\n".join(array(_part)(value, path))


def _part(value: Any, path: str) -> str:
    if isinstance(value, str):
        return value
    part = mapping(value, path)
    kind = text(part.get("type", "text"), f"{path}.type")
    if kind not in _TEXT_FIELD:
        raise bad_request(
            f"{path}.type", f"`{path}` has the type {kind!r}, and this model takes text only.", "unsupported_content"
        )
    return string()(part.get(_TEXT_FIELD[kind]), f"{path}.{_TEXT_FIELD[kind]}")  # type: ignore[no-any-return]


def _tool_call(value: Any, path: str) -> dict[str, Any]:
    call = mapping(value, path)
    function = mapping(call.get("function"), f"{path}.function")
    string(1)(function.get("name"), f"{path}.function.name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            where = f"{path}.function.arguments"
            raise bad_request(where, f"`{where}` is not valid JSON.") from None
    arguments = mapping({} if arguments is None else arguments, f"{path}.function.arguments")
    return {**call, "function": {**function, "arguments": arguments}}


def tool(value: Any, path: str) -> dict[str, Any]:
    """One tool's description: a function with a name; the rest is for the template."""
    given = mapping(value, path)
    if given.get("type", "function") != "function":
        raise bad_request(f"{path}.type", f"`{path}.type` must be 'function'.")
    string(1)(mapping(given.get("function"), f"{path}.function").get("name"), f"{path}.function.name")
    return given


def template_variables(value: Any, path: str) -> dict[str, Any]:
    """Variables for the chat template; those that have a field of their own are refused."""
    given = mapping(value, path)
    if taken := sorted(_TEMPLATE_NAMES & given.keys()):
        raise bad_request(f"{path}.{taken[0]}", f"`{path}` may not hold {taken[0]!r}: it has a field of its own.")
    return given
