"""Refused models: each error names the primitive, the user's line, the reason and what to change."""

import jax
import jax.numpy as jnp
import model_zoo as zoo
import pytest

from distaff.compiler.errors import (
    LengthLeakError,
    MixesTokensError,
    ModelRefusedError,
    ModelSignatureError,
    NotCausalError,
    UnsupportedOperationError,
)
from distaff.compiler.pipeline import derive


def refusal(model, params, max_model_len=64, error=ModelRefusedError):
    with pytest.raises(error) as caught:
        derive(model, params, max_model_len=max_model_len)
    return caught.value


def mean_over_tokens(params, tokens):
    x = params["embed"][tokens]
    return (x + x.mean(1, keepdims=True)) @ params["head"]


def padding_with_a_finite_mask(params, tokens):
    x = params["embed"][tokens]
    i, j = zoo.grid(tokens.shape[1])
    visible = (tokens != 3)[:, None, :] & (j <= i)
    return jax.nn.softmax(jnp.where(visible, x @ x.transpose(0, 2, 1), -1e30)) @ x @ params["head"]


def token_shift(params, tokens):
    x = params["embed"][tokens]
    return (x + jnp.concatenate([jnp.zeros_like(x[:, :1]), x[:, :-1]], 1)) @ params["head"]


def documents_by_cumsum(params, tokens):
    x = params["embed"][tokens]
    i, j = zoo.grid(tokens.shape[1])
    document = (tokens == 0).cumsum(1)
    visible = (document[:, :, None] == document[:, None, :]) & (j <= i)
    return jax.nn.softmax(jnp.where(visible, x @ x.transpose(0, 2, 1), -1e30)) @ x @ params["head"]


def sorted_experts(params, tokens):
    x = params["embed"][tokens][0]
    order = jnp.argsort(jnp.argmax(x[:, :4], -1))
    return jnp.zeros_like(x).at[order].set(x[order])[None] @ params["head"]


def sink_column(params, tokens):
    x = params["embed"][tokens]
    i, j = zoo.grid(tokens.shape[1])
    scores = jnp.where(j <= i, x @ x.transpose(0, 2, 1), -1e30)
    sink = jnp.broadcast_to(params["learned"][0, 0], (*scores.shape[:2], 1))
    return jax.nn.softmax(jnp.concatenate([scores, sink], -1))[..., :-1] @ x @ params["head"]


def recurrence(params, tokens):
    x = params["embed"][tokens]
    _, y = jax.lax.scan(lambda c, t: (c * 0.9 + t, c), x[:, 0], x.transpose(1, 0, 2))
    return y.transpose(1, 0, 2) @ params["head"]


def scaled_by_length(params, tokens):
    return params["embed"][tokens] * tokens.shape[1] ** -0.5 @ params["head"]


def branches_on_length(params, tokens):
    x = params["embed"][tokens]
    return (jnp.tanh(x) if tokens.shape[1] > 40 else x) @ params["head"]


def dropout(params, tokens):
    x = params["embed"][tokens]
    keep = jax.random.bernoulli(jax.random.key(0), 0.9, x.shape)
    return jnp.where(keep, x, 0) @ params["head"]


def last_token_added_to_all(params, tokens):
    x = params["embed"][tokens]
    return (x + x[:, -1:]) @ params["head"]


def data_dependent_loop(params, tokens):
    x = params["embed"][tokens]
    return jax.lax.while_loop(lambda c: jnp.sum(c) > 1e9, lambda c: c * 0.5, x) @ params["head"]


REFUSED = {
    "no mask": (zoo.decoder(zoo.unmasked), NotCausalError, "reduce_max", "model_zoo.py"),
    "prefix-LM": (zoo.decoder(zoo.prefix), NotCausalError, "reduce_max", "model_zoo.py"),
    "mean over tokens": (mean_over_tokens, MixesTokensError, "reduce_sum", "test_refusals.py"),
    "linear attention": (zoo.decoder(zoo.linear_unmasked), MixesTokensError, "dot_general", "model_zoo.py"),
    "finite-masked padding": (padding_with_a_finite_mask, NotCausalError, "", "test_refusals.py"),
    "token shift": (token_shift, MixesTokensError, "slice", "test_refusals.py"),
    "documents by cumsum": (documents_by_cumsum, MixesTokensError, "cumsum", "test_refusals.py"),
    "sorted experts": (sorted_experts, MixesTokensError, "sort", "test_refusals.py"),
    "sink column": (sink_column, MixesTokensError, "concatenate", "test_refusals.py"),
    "softmax over queries": (zoo.decoder(zoo.over_queries), ModelRefusedError, "", "model_zoo.py"),
    "recurrence": (recurrence, UnsupportedOperationError, "scan", "test_refusals.py"),
    "scaled by length": (scaled_by_length, LengthLeakError, "mul", "test_refusals.py"),
    "branches on length": (branches_on_length, LengthLeakError, "", "test_refusals.py"),
    "dropout": (dropout, UnsupportedOperationError, "random", "test_refusals.py"),
    "last token to all": (last_token_added_to_all, MixesTokensError, "", "test_refusals.py"),
    "data-dependent loop": (data_dependent_loop, UnsupportedOperationError, "while", "test_refusals.py"),
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_operation_line_reason_and_fix(name):
    model, error, operation, file = REFUSED[name]
    refused = refusal(model, zoo.parameters(), error=error)
    assert operation in refused.operation
    assert file in str(refused.location), refused
    text = str(refused)
    assert "why: " in text and "fix: " in text and refused.fix and refused.reason
    assert "capture.py" not in text


def test_expert_capacity_is_refused_at_the_cumsum():
    model = zoo.decoder(zoo.causal_where, feed_forward=zoo.experts_with_capacity)
    refused = refusal(model, zoo.parameters(experts=True), error=MixesTokensError)
    assert refused.operation == "cumsum"


def test_a_prefix_longer_than_any_probe_is_found():
    """A probe at a few dozen tokens cannot see this mask's hole; the proof runs to the longest length."""

    def far(q, k, v):
        k, v = zoo.repeated(k, v)
        i, j = zoo.grid(q.shape[1])
        hole = (i == 1500) & (j == 1900)
        return zoo.weigh(jax.nn.softmax(jnp.where((j <= i) | hole, zoo.scores_of(q, k), -1e30)), v)

    model = zoo.decoder(far)
    derive(model, zoo.parameters(), max_model_len=1024)
    refused = refusal(model, zoo.parameters(), max_model_len=2048, error=NotCausalError)
    assert "1500" in refused.reason and "1900" in refused.reason


@pytest.mark.parametrize(
    "model",
    [
        lambda p, t: (p["embed"][t] @ p["head"], t),
        lambda p, t: p["embed"][t][..., None] * p["head"],
        lambda p, t: (p["embed"][t] @ p["head"]).transpose(0, 2, 1),
    ],
)
def test_wrong_outputs_are_named(model):
    with pytest.raises(ModelSignatureError, match="logits"):
        derive(model, zoo.parameters(), max_model_len=64)


def test_tables_must_reach_the_longest_position():
    model = zoo.decoder(zoo.causal_where, learned=True, rope=False)
    derive(model, zoo.parameters(), max_model_len=256)
    with pytest.raises(ModelSignatureError, match="max_model_len"):
        derive(model, zoo.parameters(), max_model_len=300)
    mask = zoo.decoder(zoo.numpy_mask)
    refused = refusal(mask, zoo.parameters(), max_model_len=5000, error=UnsupportedOperationError)
    assert "4096" in refused.reason and "model_zoo.py" in str(refused.location)
