"""Model families, each written once as ``logits = model(tokens)``: int32 ``[B, S]`` in, float32 ``[B, S, vocab]`` out.

There is no cache, no position argument and no decode flag in here. What serving needs is derived by the compiler from
these forward passes, which are the ones that training runs.
"""

from distaff.frontend import linen as nn
from distaff.frontend.models.config import ModelConfig
from distaff.frontend.models.errors import ConfigError, UnsupportedArchitectureError
from distaff.frontend.models.gemma2 import Gemma2
from distaff.frontend.models.llama import Llama

__all__ = ["ConfigError", "Gemma2", "Llama", "ModelConfig", "UnsupportedArchitectureError", "build_model"]


def build_model(config: ModelConfig) -> nn.Module:
    """The module of ``config``'s family; ``module.apply({"params": params}, tokens)`` gives the logits."""
    return Gemma2(config) if config.architecture == "gemma2" else Llama(config)
