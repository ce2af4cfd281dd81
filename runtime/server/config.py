"""Settings of the HTTP server, and what it needs of an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol

from distaff.compiler.artifact import Manifest
from distaff.runtime.outputs import RequestOutput
from distaff.runtime.sampling_params import SamplingParams
from distaff.runtime.stats import StepStats
from distaff.runtime.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Settings of the server; named as vLLM's flags where it has them.

    ``served_model_names``: names that requests may use; the first one stands in responses and metrics.
    ``api_keys``: if not empty, paths under ``/v1`` need one as ``Authorization: Bearer``.
    ``chat_template``: Jinja source that replaces the model's own; ``default_chat_template_kwargs`` are variables for it
    that requests may override.
    ``response_role``: the role of answers that a request does not continue.
    ``use_generation_config``: take sampling defaults from the model's ``generation_config.json``;
    ``override_generation_config`` goes before it, and its ``max_new_tokens`` is also the most that requests may have.
    ``enable_prompt_tokens_details``: tell how many prompt tokens were cached.
    ``enable_force_include_usage``: tell usage in every chunk of every stream.
    ``max_body_bytes``: larger request bodies are refused with 413.
    ``shutdown_grace_seconds``: how long running requests may go on after SIGTERM.
    """

    served_model_names: Sequence[str]
    api_keys: Sequence[str] = ()
    chat_template: str | None = None
    trust_request_chat_template: bool = False
    default_chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    response_role: str = "assistant"
    use_generation_config: bool = True
    override_generation_config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    priority_scheduling: bool = False
    return_tokens_as_token_ids: bool = False
    enable_prompt_tokens_details: bool = False
    enable_force_include_usage: bool = False
    enable_request_id_headers: bool = False
    enable_tokenizer_info_endpoint: bool = False
    enable_log_requests: bool = False
    allowed_origins: Sequence[str] = ("*",)
    allowed_methods: Sequence[str] = ("*",)
    allowed_headers: Sequence[str] = ("*",)
    allow_credentials: bool = False
    root_path: str = ""
    max_body_bytes: int = 16 * 2**20
    shutdown_grace_seconds: float = 15.0

    def __post_init__(self) -> None:
        if not self.served_model_names:
            raise ValueError("served_model_names is empty; give at least one name")


class EngineClient(Protocol):
    """The part of ``AsyncEngine`` that the server uses."""

    @property
    def errored(self) -> bool:
        """Whether the engine's loop has died."""

    @property
    def manifest(self) -> Manifest:
        """The artifact's manifest."""

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer; raises `TokenizerError` if it has none."""

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and output together."""

    def stats(self) -> StepStats:
        """Counts of the latest step, queues and pages as they are now."""

    async def start(self) -> None:
        """Starts the loop."""

    async def shutdown(self, timeout: float = 0.0) -> None:
        """Takes no more requests, lets those that run go on for up to ``timeout`` seconds, then stops."""

    def generate(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        request_id: str,
        *,
        priority: int = 0,
        cache_salt: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Outputs of one request; closing the iterator aborts it."""
