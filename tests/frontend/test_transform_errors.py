"""Misuse of lifted transforms and of JAX transforms in modules: the class as under Flax, and what the message says."""

import inspect
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from distaff.frontend import core, errors
from distaff.frontend import linen as nn

KEYS = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
X = jnp.ones((2, 4))
SHARED = dict(variable_axes={"params": None}, split_rngs={"params": False})


def model_of(nn, call, **fields):
    """A compact module that runs ``call(module, x)``."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return call(self, x)

    return Model()


def init(nn, call):
    return model_of(nn, call).init(KEYS, X)


class Plain:
    """Not a module."""


def rows(nn, **options):
    return nn.vmap(nn.Dense, **{**SHARED, **options})(3)


def returns_a_module(nn):
    init(nn, lambda self, x: nn.remat(lambda module, x: nn.Dense(3))(self, x))


def returns_a_variable(nn):
    init(nn, lambda self, x: nn.jit(lambda module, x: module.variable("state", "n", jnp.zeros, ()))(self, x))


def carries_a_broadcast(nn):
    class Body(nn.Module):
        @nn.compact
        def __call__(self, carry, x):
            return carry, self.variable("stats", "mean", lambda: x.mean()).value

    nn.scan(Body, variable_broadcast="stats", split_rngs={})().init(KEYS, X, X)


def broadcasts_an_output(nn):
    scan = nn.scan(lambda module, c, x: (c, x), out_axes=nn.broadcast, check_constancy_invariants=False)
    init(nn, lambda self, x: scan(self, x, x))


def changes_a_shared_collection(nn):
    def body(module, x):
        module.put_variable("state", "n", x)
        return x

    lifted = nn.vmap(body, variable_axes={"state": core.lift.In(None) if nn is globals()["nn"] else flax_in(None)})
    model_of(nn, lambda self, x: lifted(self, x)).apply({"state": {"n": 1}}, X, mutable=["state"])


def flax_in(axis):
    from flax.core.lift import In

    return In(axis)


def derivative_of_modules_in_two_places(nn):
    class Pair(nn.Module):
        other: Any

        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(self.other(x))

    init(nn, lambda self, x: nn.vjp(lambda module, x: module(x), Pair(nn.Dense(3)), x)[0])


def unset_name_scope(nn):
    class Model(nn.Module):
        @nn.compact_name_scope
        def up(self, x):
            return x

    Model().up(X)


def lazily_by_value(nn):
    def by_value(self, x):
        return self.param("mean", lambda key: x.mean(0))

    model_of(nn, by_value).lazy_init(KEYS, jax.ShapeDtypeStruct((2, 4), jnp.float32))


def derivative(name, **options):
    return lambda nn: init(
        nn, lambda self, x: getattr(nn, name)(lambda module, x: module(x), nn.Dense(3), x, **options)
    )


MISUSES = [
    (lambda nn: nn.vmap(nn.Dense(3)), "TransformTargetError", ["Dense", "nn.vmap(nn.Dense)(4)"]),
    (lambda nn: nn.jit(3), "TransformTargetError", ["3"]),
    (returns_a_module, "TransformedMethodReturnValueError", ["arrays"]),
    (returns_a_variable, "TransformedMethodReturnValueError", [".value"]),
    (lambda nn: init(nn, lambda self, x: nn.vjp(nn.Dense, self, x)), "ValueError", ["vjp", "Dense"]),
    (lambda nn: init(nn, lambda self, x: nn.cond(True, 3, 3, self, x)), "ValueError", []),
    (lambda nn: nn.vmap(nn.Dense, methods=3), "ValueError", ["methods"]),
    (lambda nn: rows(nn, in_axes=None).init(KEYS, X), "ValueError", ["axis_size", "specified manually"]),
    (
        lambda nn: init(nn, lambda self, x: nn.vmap(lambda module, a, b: a, **SHARED)(self, x, x.T)),
        "ValueError",
        ["sizes"],
    ),
    (lambda nn: nn.scan(nn.Dense, in_axes=nn.broadcast)(3).init(KEYS, X), "ValueError", ["length"]),
    (carries_a_broadcast, "ValueError", []),
    (broadcasts_an_output, "ValueError", ["check_constancy_invariants"]),
    (changes_a_shared_collection, "ModifyScopeVariableError", ["vmap()", '"n"']),
    (lambda nn: rows(nn, variable_axes={}).apply({"params": {}}, X), "ScopeCollectionNotFound", ["kernel"]),
    (
        lambda nn: nn.vmap(nn.Dropout, split_rngs={})(0.5, deterministic=False).apply({}, X, rngs=KEYS),
        "InvalidRngError",
        ['"dropout"'],
    ),
    (lambda nn: nn.remat(nn.Dense, concrete=True)(3).init(KEYS, X), "NotImplementedError", ["static_argnums"]),
    (derivative("vjp", reduce_axes=("a",)), "NotImplementedError", ["reduce_axes"]),
    (derivative("grad", reduce_axes=("a",)), "NotImplementedError", ["reduce_axes"]),
    (derivative("value_and_grad"), "ValueError", ["(2, 3)"]),
    (derivative_of_modules_in_two_places, "NotImplementedError", ["multi_scope"]),
    (unset_name_scope, "ValueError", ["up"]),
    (lazily_by_value, "LazyInitError", ["float32[4]", "ShapeDtypeStruct"]),
    (lambda nn: nn.init(lambda module, x: module(x), nn.Dense(3))(3, X), "ValueError", ["3"]),
]


def failure(misuse, library):
    with pytest.raises(Exception) as caught:
        misuse(library)
    return caught.value


@pytest.mark.parametrize(("misuse", "name", "mentioned"), MISUSES)
def test_misuse_is_explained(misuse, name, mentioned):
    error = failure(misuse, nn)
    assert type(error).__name__ == name
    assert isinstance(error, errors.FlaxError) == hasattr(errors, name)
    for text in mentioned:
        assert text in str(error)


@pytest.mark.parametrize(("misuse", "name", "mentioned"), MISUSES)
def test_misuse_has_the_error_class_of_flax(flax_nn, misuse, name, mentioned):
    assert type(failure(misuse, flax_nn)).__name__ == name


# What Flax leaves to a leaked tracer, or to nothing.


def jit_of_a_submodule(self, x):
    dense = nn.Dense(3, name="dense")
    return jax.jit(lambda x: dense(x))(x)


def jit_around_a_sow(self, x):
    @jax.jit
    def f(x):
        self.sow("intermediates", "x", x)
        return x

    return f(x)


def outer_module_in_a_lifted_function(self, x):
    count = self.variable("state", "count", jnp.zeros, (4,))

    def body(module, x):
        count.value += x
        return x

    return nn.vmap(body, variable_axes={"state": None})(self, x)


@pytest.mark.parametrize(
    ("call", "mentioned"),
    [
        (jit_of_a_submodule, ['"params/kernel" of "/dense"', "nn.vmap(nn.Dense"]),
        (jit_around_a_sow, ['"intermediates/x" of "/"', "lifted transform"]),
        (outer_module_in_a_lifted_function, ['"state/count" of "/"']),
    ],
)
def test_values_that_would_leak_from_a_jax_transform_are_refused(call, mentioned):
    model = model_of(nn, call)
    with pytest.raises(errors.JaxTransformError) as caught:
        model.init_with_output(KEYS, X, mutable=True)
    source, first = inspect.getsourcelines(call)
    here = [f"{Path(__file__).name}:{first + i} " for i in range(len(source))]
    assert any(line in str(caught.value) for line in here)
    for text in mentioned:
        assert text in str(caught.value)


def test_modules_in_jax_transforms_that_leak_nothing_work():
    @jax.jit
    def jitted(x):
        return model.apply(variables, x, mutable=["state"])

    def call(self, x):
        dense = nn.Dense(4)
        if self.is_initializing():
            return dense(x)
        self.sow("state", "x", x)
        outside = x + 1
        # An outer value, and a constant, may be stored inside of another transform.
        jax.vmap(lambda row: (self.sow("state", "outside", outside), self.sow("state", "one", 1), row)[2])(x)
        return jax.vmap(lambda row: jax.checkpoint(lambda row: dense(row))(row))(x)

    model = model_of(nn, call)
    variables = {"params": model.init(KEYS, X)["params"]}
    y, state = jitted(X)
    assert y.shape == (2, 4)
    assert set(state["state"]) == {"x", "outside", "one"}


def test_messages_end_with_the_line_of_the_user():
    call = lambda self, x: nn.Dense(3, name="dense")(x)  # noqa: E731
    line = inspect.getsourcelines(call)[1]
    with pytest.raises(errors.ScopeParamShapeError) as caught:
        model_of(nn, call).apply({"params": {"dense": {"kernel": jnp.ones((5, 3))}}}, X)
    message = str(caught.value)
    assert '"kernel" in "/dense"' in message
    assert message.endswith(f"At {__file__}:{line} (<lambda>)")


def test_all_errors_of_flax_exist():
    flax_errors = pytest.importorskip("flax.errors")
    for name, cls in vars(flax_errors).items():
        if inspect.isclass(cls) and issubclass(cls, flax_errors.FlaxError):
            ours = getattr(errors, name)
            theirs = list(inspect.signature(cls.__init__).parameters.values())
            mine = inspect.signature(ours.__init__).parameters
            required = [p.name for p in mine.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
            assert required == [p.name for p in theirs if p.default is p.empty][: len(required)], name


@pytest.mark.parametrize(
    ("error", "mentioned"),
    [
        (errors.AlreadyExistsError("a/b"), "a/b"),
        (errors.InvalidCheckpointError("a/b", 3), 'step: "3" and path: "a/b"'),
        (errors.MPACheckpointingRequiredError("a/b", 3), "Orbax"),
        (errors.MPARestoreTargetRequiredError("a/b", 3, "kernel"), "array kernel"),
        (errors.MPARestoreDataCorruptedError(3, "a/b"), "commit_success"),
        (errors.CursorFindError(), "No object"),
        (errors.TraverseTreeError(None, None), "are None"),
        (errors.MultipleMethodsCompactError(), "setup()"),
        (errors.ImmutableVariableError("frozen"), "frozen"),
        (errors.TraceContextError("elsewhere"), "elsewhere"),
    ],
)
def test_errors_of_other_parts_say_what_and_where(error, mentioned):
    assert mentioned in str(error)
