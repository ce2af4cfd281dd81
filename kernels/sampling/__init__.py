"""Sampling: from logits to the most likely token, to a drawn one, or to log-probabilities."""

from distaff.kernels.sampling.operation import draw_tokens, greedy_tokens, serving, token_logprobs
from distaff.kernels.sampling.rows import INVALID_TOKEN, SamplingRows, TokenLogprobs, is_healthy, sampling_shapes

__all__ = [
    "INVALID_TOKEN",
    "SamplingRows",
    "TokenLogprobs",
    "draw_tokens",
    "greedy_tokens",
    "is_healthy",
    "sampling_shapes",
    "serving",
    "token_logprobs",
]
