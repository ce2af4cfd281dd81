"""vLLM's engine arguments that have nothing to set here: scripts may pass the values that ask for nothing special.

Any other value is refused, so that nobody waits for an effect that does not come.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from distaff.runtime.errors import EngineConfigError


class Neutral(NamedTuple):
    """Values that change nothing (None: all do), and why there is nothing to set."""

    values: tuple[Any, ...] | None
    why: str


NEUTRAL_ARGUMENTS = {
    "enforce_eager": Neutral(None, "programs are compiled ahead in either case"),
    "disable_log_stats": Neutral(None, "measurements go to the outputs and to /metrics"),
    "trust_remote_code": Neutral(None, "no code of a checkpoint is ever run"),
    "enable_server_load_tracking": Neutral(None, "/load always counts"),
    "skip_tokenizer_init": Neutral((False,), "an artifact has a tokenizer or not"),
    "tokenizer_mode": Neutral(("auto", "hf"), "tokenizers are Hugging Face's"),
    "load_format": Neutral(("auto", "safetensors", "gguf"), "the format is found by looking"),
    "tensor_parallel_size": Neutral((1,), "one device serves; distributed serving is not available yet"),
    "pipeline_parallel_size": Neutral((1,), "one device serves; distributed serving is not available yet"),
    "data_parallel_size": Neutral((1,), "one device serves; distributed serving is not available yet"),
    "disable_custom_all_reduce": Neutral(None, "one device serves"),
    "cpu_offload_gb": Neutral((0,), "weights stay where they are used"),
    "swap_space": Neutral((0, 4), "preempted requests are computed again, not swapped"),
    "revision": Neutral((None, "main"), "give the folder of the revision"),
    "tokenizer_revision": Neutral((None, "main"), "give the folder of the revision"),
    "hf_overrides": Neutral((None, {}), "change config.json"),
    "enable_lora": Neutral((False,), "adapters are not available yet"),
    "speculative_config": Neutral((None,), "speculative decoding is not available yet"),
    "kv_transfer_config": Neutral((None,), "disaggregated serving is not available yet"),
    "limit_mm_per_prompt": Neutral((None,), "images are not available yet"),
    "reasoning_parser": Neutral(("", None), "parsers for reasoning are not available yet"),
    "runner": Neutral(("auto", "generate"), "models only generate"),
    "task": Neutral(("auto", "generate"), "models only generate"),
}


def without_neutral(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that are not vLLM's alone; raises `EngineConfigError` for a value that would change something."""
    rest = {}
    for name, value in arguments.items():
        neutral = NEUTRAL_ARGUMENTS.get(name)
        if neutral is None:
            rest[name] = value
        elif neutral.values is not None and value not in neutral.values:
            raise EngineConfigError(f"{name} is {value!r}, which is not supported: {neutral.why}")
    return rest
