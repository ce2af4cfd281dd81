"""Rendering conversations with the Jinja template that a model was trained with.

Behaves as Hugging Face's ``apply_chat_template``: a sandboxed, immutable environment with ``trim_blocks`` and
``lstrip_blocks``, loop controls, a ``{% generation %}`` block (rendered as its contents), ``raise_exception``,
``strftime_now`` and a ``tojson`` that does not escape HTML.
"""

from __future__ import annotations

import copy
import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from distaff.runtime.errors import ChatTemplateError

Message: TypeAlias = Mapping[str, Any]

_CONTINUE_HERE = "\N{SYMBOL FOR END OF TRANSMISSION}continue-here "


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}`` marks what the assistant wrote, for training; serving renders just the contents."""

    tags = {"generation"}  # noqa: RUF012 - the base class declares it so

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A compiled template. ``special_tokens`` ("bos_token", "eos_token", …) are variables that it can use.

    Raises `ChatTemplateError` if ``source`` is not valid Jinja.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the chat template is not valid Jinja: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The conversation as prompt text.

        ``continue_final_message`` leaves the last message open, so that the model goes on writing it. Raises
        `ChatTemplateError` if the template refuses the messages or both ways to end the prompt are asked for.
        """
        if continue_final_message:
            if add_generation_prompt:
                raise ChatTemplateError("set only one of add_generation_prompt and continue_final_message")
            messages = _mark_end(messages)
        try:
            text = self._template.render(
                messages=list(messages),
                tools=None if tools is None else list(tools),
                add_generation_prompt=add_generation_prompt,
                **{**self._special_tokens, **variables},
            )
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise ChatTemplateError(f"the chat template refused the messages: {error}") from error
        return _cut_at_mark(text) if continue_final_message else text


def _mark_end(messages: Sequence[Message]) -> Sequence[Message]:
    """The messages with a mark at the end of the last one's text."""
    if not messages:
        raise ChatTemplateError("continue_final_message needs at least one message")
    final = copy.deepcopy(dict(messages[-1]))
    content = final.get("content")
    if isinstance(content, str):
        final["content"] = content + _CONTINUE_HERE
    else:
        parts = [part for part in content or () if isinstance(part, dict) and "text" in part]
        if not parts:
            raise ChatTemplateError("continue_final_message needs text in the last message")
        parts[-1]["text"] += _CONTINUE_HERE
    return [*messages[:-1], final]


def _cut_at_mark(text: str) -> str:
    """The text before the mark; templates that trim messages lose the mark's last space and the message's own."""
    head, mark, rest = text.rpartition(_CONTINUE_HERE.rstrip())
    if not mark:
        raise ChatTemplateError("this chat template drops the last message, so it cannot be continued")
    return head if rest.startswith(" ") else head.rstrip()


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
