"""Misuse: the same error class as under Flax, and a message that says where and what to do."""

import inspect
import pickle

import jax
import jax.numpy as jnp
import pytest

from distaff.frontend import core, errors
from distaff.frontend import linen as nn

KEY = jax.random.key(0)
X = jnp.ones((2, 4))


def outer(nn, inner):
    """A module at /block that calls ``inner``, so that messages have a path to show."""

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return inner(name="block")(x)

    return Outer()


def reads(nn, collection):
    class Reads(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x + self.variable(collection, "mean").value

    return outer(nn, Reads)


def submodule_in_plain_method(nn):
    class Model(nn.Module):
        def __call__(self, x):
            return nn.Dense(2)(x)

    Model().init(KEY, X)


def same_name_twice(nn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="layer")(nn.Dense(4, name="layer")(x))

    Model().init(KEY, X)


def param_named_as_submodule(nn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            nn.Dense(4, name="layer")(x)
            return self.param("layer", nn.initializers.ones, (1,))

    Model().init(KEY, X)


def variable_named_twice(nn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.variable("state", "v", lambda: 1)
            self.variable("state", "v", lambda: 1)

    Model().init(KEY, X)


def attribute_outside_setup(nn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.calls = 1
            return x

    Model().init(KEY, X)


def field_in_setup(nn):
    class Model(nn.Module):
        features: int = 3

        def setup(self):
            self.features = 4

        def __call__(self, x):
            return x

    Model().init(KEY, X)


def attribute_of_unbound(nn):
    model = nn.Dense(3).bind({})
    model.features = 4


def immutable_update(nn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.put_variable("state", "v", x)

    outer(nn, Model).apply({"state": {}}, X)


def immutable_variable(nn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.variable("state", "v", lambda: 1).value = 2

    outer(nn, Model).apply({"state": {"block": {"v": 1}}}, X)


def super_post_init_forgotten(nn):
    class Model(nn.Module):
        def __post_init__(self):
            pass

        def __call__(self, x):
            return x

    Model().init(KEY, X)


def reserved_field(nn):
    class Model(nn.Module):
        name: int

    Model(1)


def reserved_parent(nn):
    class Model(nn.Module):
        parent: int

    Model(1)


def failing_property(nn):
    class Model(nn.Module):
        @property
        def broken(self):
            return self.missing

        def __call__(self, x):
            return self.broken

    Model().init(KEY, X)


def setup_by_hand(nn):
    class Model(nn.Module):
        def setup(self):
            self.layer = nn.Dense(2)

    Model().setup()


def share_scope_of_unbound(nn):
    nn.share_scope(nn.Dense(2), nn.Dense(2))


def dense(nn):
    return outer(nn, lambda name: nn.Dense(3, name=name))


PARAMS = {"block": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}

# (misuse of a library's nn, error class, what the message must name)
MISUSES = [
    (submodule_in_plain_method, "AssignSubModuleError", ["Dense", "@nn.compact"]),
    (same_name_twice, "NameInUseError", ["submodule", '"layer"', "Model"]),
    (param_named_as_submodule, "NameInUseError", ["param", '"layer"', "Model"]),
    (variable_named_twice, "NameInUseError", ["variable", '"v"', "Model"]),
    (attribute_outside_setup, "SetAttributeFrozenModuleError", ["calls", "Model", "setup()"]),
    (attribute_of_unbound, "SetAttributeFrozenModuleError", ["features", "clone"]),
    (field_in_setup, "SetAttributeInModuleSetupError", ["setup()"]),
    (immutable_update, "ModifyScopeVariableError", ["/block", '"v"', '"state"', "mutable=['state']"]),
    (immutable_variable, "ModifyScopeVariableError", ["/block", '"v"']),
    (super_post_init_forgotten, "IncorrectPostInitOverrideError", ["super().__post_init__()"]),
    (reserved_field, "ReservedModuleAttributeError", ["name"]),
    (reserved_parent, "ReservedModuleAttributeError", ["parent"]),
    (failing_property, "DescriptorAttributeError", ["broken", "Model"]),
    (setup_by_hand, "CallSetupUnboundModuleError", ["bind"]),
    (share_scope_of_unbound, "CallShareScopeOnUnboundModuleError", ["setup()"]),
    (lambda nn: nn.Dense(2)(X), "CallCompactUnboundModuleError", ["model.apply(variables, x)"]),
    (lambda nn: nn.Dense(2).unbind(), "CallUnbindOnUnboundModuleError", ["bind(variables)"]),
    (lambda nn: nn.Dense.apply({}, X), "InvalidInstanceModuleError", ["instance"]),
    (lambda nn: nn.Dense.init(KEY, X), "InvalidInstanceModuleError", ["instance"]),
    (lambda nn: dense(nn).apply({"params": PARAMS}, jnp.ones((2, 5))), "ScopeParamShapeError", ["/block", "(5, 3)"]),
    (lambda nn: dense(nn).apply({"params": {"other": 1}}, X), "ScopeParamNotFoundError", ["/block", "kernel"]),
    (lambda nn: dense(nn).apply({}, X), "ScopeCollectionNotFound", ["/block", "kernel", "params"]),
    (lambda nn: reads(nn, "stats").apply({}, X), "ScopeCollectionNotFound", ["/block", "mean", "stats"]),
    (lambda nn: reads(nn, "stats").apply({"stats": {"x": 1}}, X), "ScopeVariableNotFoundError", ["/block", "mean"]),
    (
        lambda nn: outer(nn, lambda name: nn.Dropout(0.5, deterministic=False, name=name)).apply({}, X),
        "InvalidRngError",
        ["/block", '"dropout"', "rngs="],
    ),
    (lambda nn: dense(nn).init(0, X), "InvalidRngError", ["jax.random.key"]),
    (lambda nn: dense(nn).init(jax.random.split(KEY), X), "InvalidRngError", ["jax.random.key"]),
    (lambda nn: dense(nn).apply({"params": PARAMS}, X, rngs="seed"), "InvalidRngError", ["jax.random.key"]),
    (lambda nn: dense(nn).apply({"params": PARAMS}, X, rngs={"dropout": 3}), "ValueError", ["dropout"]),
    (
        lambda nn: dense(nn).apply({"params": {"params": PARAMS}}, X),
        "ApplyScopeInvalidVariablesStructureError",
        ["params"],
    ),
    (lambda nn: dense(nn).apply({"params": X}, X), "ApplyScopeInvalidVariablesTypeError", ["collections"]),
    (lambda nn: dense(nn).apply({1: {}}, X), "ApplyScopeInvalidVariablesTypeError", ["collections"]),
    (lambda nn: dense(nn).apply({"params": PARAMS}, X, method=3), "ApplyModuleInvalidMethodError", ["3"]),
    (lambda nn: dense(nn).apply({"params": PARAMS}, X, method=lambda: 1), "ApplyModuleInvalidMethodError", ["method"]),
    (lambda nn: dense(nn).apply({"params": PARAMS}, X, mutable=3), "InvalidFilterError", ["3"]),
    (lambda nn: dense(nn).apply({"params": PARAMS}, X, method="nothing"), "AttributeError", ["nothing"]),
    (lambda nn: dense(nn).apply({"params": PARAMS}, X, method="name"), "TypeError", ["name"]),
    (lambda nn: nn.Dense(2).make_rng("a"), "ValueError", ["Dense"]),
    (lambda nn: nn.Dense(2).variables, "ValueError", ["bind"]),
    (lambda nn: nn.Dense(2, parent=3), "ValueError", ["parent"]),
]


# Flax raises AssertionError.
OURS_ALONE = [
    (lambda nn: nn.Module.param(nn.Dense(2), "p", nn.initializers.ones, ()), "ValueError", ["unbound"]),
]


@pytest.mark.parametrize(("misuse", "name", "mentioned"), MISUSES + OURS_ALONE)
def test_misuse_is_explained(misuse, name, mentioned):
    with pytest.raises(Exception) as caught:
        misuse(nn)
    assert type(caught.value).__name__ == name
    assert isinstance(caught.value, errors.FlaxError) == hasattr(errors, name)
    for text in mentioned:
        assert text in str(caught.value)


@pytest.mark.parametrize(("misuse", "name", "mentioned"), MISUSES)
def test_misuse_has_the_error_class_of_flax(flax_nn, misuse, name, mentioned):
    with pytest.raises(Exception) as caught:
        misuse(flax_nn)
    assert type(caught.value).__name__ == name


def test_every_class_is_one_of_flax():
    flax_errors = pytest.importorskip("flax.errors")
    for name, cls in vars(errors).items():
        if inspect.isclass(cls) and issubclass(cls, Exception):
            assert hasattr(flax_errors, name)


@pytest.mark.smoke
def test_a_scope_does_not_outlive_its_call():
    kept = []
    core.apply(lambda scope: kept.append(scope))({})
    for use in (lambda s: s.push("a"), lambda s: s.put_variable("a", "b", 1), lambda s: s.rewound()):
        with pytest.raises(errors.InvalidScopeError, match="no longer valid"):
            use(kept[0])


def test_errors_pickle():
    error = errors.ScopeParamShapeError("kernel", "/block", (4, 3), (5, 3))
    restored = pickle.loads(pickle.dumps(error))
    assert type(restored) is type(error) and str(restored) == str(error)


def test_a_failing_call_names_what_unbound_modules_lack():
    class Model(nn.Module):
        def setup(self):
            self.layer = nn.Dense(2)

    with pytest.raises(AttributeError, match=r"is defined in '\.setup\(\)'"):
        _ = Model().layer
