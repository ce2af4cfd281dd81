"""Messages that only a running program shows hold the phrases of Flax's that tests and handlers of other code match."""

import re

import jax
import jax.numpy as jnp
import pytest

from distaff.frontend import linen as nn

flax_linen = pytest.importorskip("flax.linen")

KEY = jax.random.key(0)


def _field_assigned_in_setup(nn):
    class Widened(nn.Module):
        features: int = 2

        def setup(self):
            self.features = 2 * self.features

        def __call__(self):
            return self.features

    Widened().init(KEY)


def _module_returned_from_transform(nn):
    class Maker(nn.Module):
        @nn.compact
        def __call__(self, x):
            return self.layer()(x)

        @nn.jit
        def layer(self):
            return nn.Dense(2)

    Maker().init(KEY, jnp.ones((1, 3)))


def _transform_of_an_instance(nn):
    class Caller(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.checkpoint(nn.Dense(2))(x)

    Caller().init(KEY, jnp.ones((1, 3)))


def _attribute_of_setup_read_unbound(nn):
    class Encoder(nn.Module):
        def setup(self):
            self.layer = nn.Dense(2)

    Encoder().layer  # noqa: B018


def _masks_of_two_ranks(nn):
    nn.combine_masks(jnp.ones((1, 2)), jnp.ones((1, 1, 2)))


def _heads_that_do_not_divide(nn):
    nn.MultiHeadDotProductAttention(num_heads=5).init(KEY, jnp.ones((1, 3, 12)))


def _integer_dtype_to_compute_in(nn):
    nn.dtypes.canonicalize_dtype(jnp.ones(2), dtype=jnp.int32)


PHRASES = [
    (_field_assigned_in_setup, "Module construction attributes are frozen"),
    (_module_returned_from_transform, "Transformed module method layer cannot return Modules or Variables"),
    (
        _transform_of_an_instance,
        "Linen transformations must be applied to Modules classes or functions taking a Module",
    ),
    (_attribute_of_setup_read_unbound, """object has no attribute "layer". If "layer" is defined in '.setup()', """),
    (_masks_of_two_ranks, "masks must have same rank"),
    (_heads_that_do_not_divide, "must be divisible by number of heads"),
    (_integer_dtype_to_compute_in, "Dtype must be inexact"),
]


@pytest.mark.parametrize(("program", "phrase"), PHRASES, ids=[program.__name__ for program, _ in PHRASES])
def test_the_phrase_is_in_both_messages(program, phrase):
    for library in (nn, flax_linen):
        with pytest.raises(Exception, match=re.escape(phrase)):
            program(library)
