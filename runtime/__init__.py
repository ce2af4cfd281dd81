"""Serving compiled artifacts: `LLM` offline, `AsyncEngine` behind a server.

Names are imported when they are first used, so that importing this package costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distaff.runtime.async_engine import AsyncEngine
    from distaff.runtime.beam_search import BeamSearchOutput, BeamSearchParams, BeamSearchSequence
    from distaff.runtime.config import EngineConfig
    from distaff.runtime.engine import Engine
    from distaff.runtime.llm import LLM, TextPrompt, TokensPrompt
    from distaff.runtime.outputs import CompletionOutput, Logprob, RequestOutput
    from distaff.runtime.sampling_params import RequestOutputKind, SamplingParams, SamplingType

_MODULES = {
    "AsyncEngine": "async_engine",
    "BeamSearchOutput": "beam_search",
    "BeamSearchParams": "beam_search",
    "BeamSearchSequence": "beam_search",
    "CompletionOutput": "outputs",
    "Engine": "engine",
    "EngineConfig": "config",
    "LLM": "llm",
    "Logprob": "outputs",
    "RequestOutput": "outputs",
    "RequestOutputKind": "sampling_params",
    "SamplingParams": "sampling_params",
    "SamplingType": "sampling_params",
    "TextPrompt": "llm",
    "TokensPrompt": "llm",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CompletionOutput",
    "Engine",
    "EngineConfig",
    "Logprob",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "SamplingType",
    "TextPrompt",
    "TokensPrompt",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
