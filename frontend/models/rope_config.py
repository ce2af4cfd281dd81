"""Reading the rotary embedding from a config, in the old style and in the new.

Transformers 4 writes ``rope_theta`` and ``rope_scaling`` side by side; transformers 5 one ``rope_parameters``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from distaff.frontend.models.config_fields import Fields
from distaff.frontend.models.errors import ConfigError
from distaff.frontend.models.rope import LinearScaling, Llama3Scaling, Rope, RopeScaling, YarnScaling


def read_rope(config: Fields, head_dim: int, max_positions: int) -> Rope:
    """The rotary embedding of heads of ``head_dim``; raises `ConfigError` for types that cannot be served."""
    found = config.data.get("rope_parameters") or config.data.get("rope_scaling") or {}
    rope = Fields(found, "config: rope_parameters")
    if any(isinstance(value, Mapping) for value in rope.data.values()):
        raise ConfigError("config: rope_parameters differ between layers, which is not implemented")
    theta = rope.positive("rope_theta", config.positive("rope_theta", 10_000.0))
    if theta <= 1.0:
        raise rope.error("rope_theta", f"is {theta}; the base must be above 1")
    if rope.positive("partial_rotary_factor", config.positive("partial_rotary_factor", 1.0)) != 1.0:
        raise rope.error("partial_rotary_factor", "is not 1; rotating a part of each head is not implemented")
    kind = rope.data.get("rope_type", rope.data.get("type", "default"))
    return Rope(head_dim, theta, None if kind == "default" else _scaling(kind, rope, max_positions))


def _scaling(kind: object, rope: Fields, max_positions: int) -> RopeScaling:
    if kind == "dynamic":
        raise ConfigError(
            "rope type 'dynamic' turns all keys anew whenever the sequence grows, so keys cannot be cached; "
            "use 'yarn', or remove the scaling and stay within max_position_embeddings"
        )
    reader = _SCALINGS.get(kind) if isinstance(kind, str) else None
    if reader is None:
        raise rope.error("rope_type", f"is {kind!r}; implemented are default, {', '.join(_SCALINGS)}")
    return reader(rope, max_positions)


def _linear(rope: Fields, max_positions: int) -> RopeScaling:
    return LinearScaling(rope.positive("factor"))


def _llama3(rope: Fields, max_positions: int) -> RopeScaling:
    low, high = rope.positive("low_freq_factor"), rope.positive("high_freq_factor")
    if low >= high:
        raise rope.error("high_freq_factor", f"is {high}; it must be above low_freq_factor ({low})")
    original = rope.size("original_max_position_embeddings", max_positions)
    return Llama3Scaling(rope.positive("factor"), low, high, original)


def _yarn(rope: Fields, max_positions: int) -> RopeScaling:
    original = rope.size("original_max_position_embeddings", max_positions)
    factor = rope.positive("factor", max_positions / original)
    return YarnScaling(
        factor=factor,
        original_max_positions=original,
        attention_factor=rope.positive("attention_factor", _yarn_attention_factor(rope, factor)),
        beta_fast=rope.positive("beta_fast", 32.0),
        beta_slow=rope.positive("beta_slow", 1.0),
        truncate=rope.flag("truncate", True),
    )


def _yarn_attention_factor(rope: Fields, factor: float) -> float:
    """The paper's ``0.1 ln(factor) + 1``; DeepSeek's configs give weights of the logarithm."""

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.data.get("mscale") and rope.data.get("mscale_all_dim"):
        return mscale(rope.positive("mscale")) / mscale(rope.positive("mscale_all_dim"))
    return mscale(1.0)


_SCALINGS: dict[str, Callable[[Fields, int], RopeScaling]] = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}
