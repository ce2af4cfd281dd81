"""Boxes with axis names, logical axis rules, and shardings made of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from distaff.frontend import core, errors
from distaff.frontend import linen as nn

KEY = jax.random.key(0)
X = jnp.ones((2, 4))
RULES = (("embed", None), ("mlp", "model"), ("batch", "data"))


@pytest.fixture
def mesh():
    return jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def partitioned(nn):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.initializers.lecun_normal()
            x = nn.Dense(4, kernel_init=nn.with_partitioning(init, (None, "model")))(x)
            x = nn.DenseGeneral((2, 2), kernel_init=nn.with_logical_partitioning(init, ("embed", "heads", "mlp")))(x)
            state = self.variable("state", "v", nn.with_partitioning(lambda: jnp.zeros(2), ("data",)))
            if self.is_mutable_collection("state"):
                state.value = state.value + 1
            return nn.with_logical_constraint(x + state.value, ("batch", None, "mlp"))

    return Model()


def described(tree):
    """Boxes as comparable values: (class name, names, value)."""
    is_box = lambda x: hasattr(x, "names")  # noqa: E731
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_box)
    return [
        (jax.tree_util.keystr(path), type(x).__name__, getattr(x, "names", None), np.asarray(getattr(x, "value", x)))
        for path, x in leaves
    ]


def test_boxed_variables_are_those_of_flax(flax_nn):
    trees = []
    for library in (nn, flax_nn):
        model = partitioned(library)
        variables = model.init(KEY, X)
        y, updates = model.apply(variables, X, mutable=["state"])
        unboxed = library.unbox(variables)
        np.testing.assert_array_equal(model.apply(unboxed, X), model.apply(variables, X))
        trees.append((described(variables), described(updates), described(unboxed), np.asarray(y)))
        assert library.get_partition_spec(variables)["params"]["Dense_0"] == {"kernel": P(None, "model"), "bias": P()}
        abstract = jax.eval_shape(model.init, KEY, X)
        assert library.get_partition_spec(abstract)["state"]["v"] == P("data")
    for mine, other in zip(*(tree[:3] for tree in trees), strict=True):
        assert [x[:3] for x in mine] == [x[:3] for x in other]
        for (*_, a), (*_, b) in zip(mine, other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.smoke
def test_boxes_carry_names_through_trees_and_values():
    box = nn.Partitioned(jnp.ones((2, 3)), ("data", None))
    assert jax.tree.leaves(box)[0].shape == (2, 3)
    tree = {"a": box, "b": jnp.zeros(2)}
    assert core.unbox(tree)["a"] is box.value
    changed = nn.meta.replace_boxed(tree, {"a": jnp.zeros(1), "b": jnp.ones(1)})
    assert changed["a"].names == ("data", None) and changed["a"].value.shape == (1,) and changed["b"][0] == 1
    nested = nn.Partitioned(nn.Partitioned(jnp.ones(2), ("x",)), ("y",))
    assert core.unbox(nested).shape == (2,)


@given(
    names=st.lists(st.sampled_from(["a", "b", None]), max_size=3).map(tuple),
    index=st.integers(0, 4),
    axis=st.sampled_from(["layers", None]),
)
def test_added_axes_are_removed_again(names, index, axis):
    box = nn.Partitioned(jnp.ones(()), names)
    params = {nn.PARTITION_NAME: axis}
    added = nn.meta.add_axis({"k": box, "plain": 1}, index, params)
    assert added["k"].names[index] == axis and len(added["k"].names) == max(len(names), index) + 1
    removed = nn.meta.remove_axis(added, index, params)["k"].names
    assert removed == names + (None,) * (len(removed) - len(names))


def test_axes_need_a_name():
    box = nn.Partitioned(jnp.ones(2), ("a",))
    with pytest.raises(errors.PartitioningUnspecifiedError, match="metadata_params"):
        box.add_axis(0, {})
    with pytest.raises(ValueError, match="is named 'a'"):
        box.remove_axis(0, {nn.PARTITION_NAME: "layers"})


logical = st.sampled_from(["batch", "embed", "mlp", "heads", None])
rule = st.tuples(
    st.sampled_from(["batch", "embed", "mlp", "heads"]), st.sampled_from([None, "data", "model", ("data", "model")])
)


@settings(max_examples=200)
@given(names=st.lists(logical, max_size=4), rules=st.lists(rule, max_size=5))
def test_rules_assign_as_those_of_flax(flax_nn, names, rules):
    outcomes = []
    for library in (nn, flax_nn):
        try:
            outcomes.append(library.logical_to_mesh_axes(names, rules))
        except ValueError:
            outcomes.append("refused")
    assert outcomes[0] == outcomes[1]


def test_rules_of_the_context():
    assert nn.get_logical_axis_rules() == ()
    with nn.logical_axis_rules(RULES):
        assert nn.logical_to_mesh_axes(("batch", "mlp", "other")) == P("data", "model", None)
        with nn.logical_axis_rules((("batch", "model"),)):
            assert nn.logical_to_mesh_axes(("batch",)) == P("model")
        assert nn.logical_to_mesh({"a": P("batch", "embed"), "b": P("mlp")}) == {"a": P("data", None), "b": P("model")}
    nn.set_logical_axis_rules(RULES)
    assert nn.get_logical_axis_rules() == RULES
    nn.set_logical_axis_rules(())
    assert nn.logical_to_mesh_axes(None) is None
    with pytest.raises(ValueError, match="occur more than once"):
        nn.logical_to_mesh_axes(("mlp", "mlp"), RULES)
    with pytest.raises(ValueError, match="pairs"):
        nn.logical_to_mesh_axes(("mlp",), {"mlp": "model"})


def test_shardings_on_a_mesh(mesh):
    tree = {"a": nn.Partitioned(jnp.ones((2, 2)), (None, "model")), "b": jnp.ones(2), "c": "text"}
    assert nn.get_sharding(tree, mesh) == {
        "a": NamedSharding(mesh, P(None, "model")),
        "b": NamedSharding(mesh, P()),
        "c": None,
    }
    assert nn.logical_to_mesh_sharding(P("batch"), mesh, RULES) == NamedSharding(mesh, P("data"))


def constraints(fn, *args):
    jaxpr = jax.make_jaxpr(fn)(*args)
    return [str(e.params["sharding"].spec) for e in jaxpr.eqns if e.primitive.name == "sharding_constraint"]


def test_constraints_apply_with_rules_and_a_mesh_only(mesh):
    def constrained(x, **options):
        return nn.with_logical_constraint(x, ("batch", "mlp"), **options)

    assert constraints(constrained, X) == []
    assert constraints(lambda x: constrained(x, rules=RULES), X) == []
    assert constraints(lambda x: constrained(x, mesh=mesh), X) == []
    expected = [str(P("data", "model"))]
    assert constraints(lambda x: constrained(x, rules=RULES, mesh=mesh), X) == expected
    with nn.logical_axis_rules(RULES), jax.set_mesh(mesh):
        assert constraints(constrained, X) == expected
        assert constraints(lambda x: nn.with_logical_constraint(x, None), X) == []
        assert constraints(lambda x: nn.with_logical_constraint({"a": x}, {"a": ("batch", None)}), X) == [
            str(P("data", None))
        ]


def test_what_happens_to_names_without_a_rule(mesh):
    def constrained(x, fallback):
        return nn.with_logical_constraint(x, ("batch", "unknown"), rules=RULES, mesh=mesh, fallback=fallback)

    fallback = nn.RulesFallback
    assert constraints(lambda x: constrained(x, fallback.AXIS_IS_UNSHARDED), X) == [str(P("data", None))]
    assert constraints(lambda x: constrained(x, fallback.NO_CONSTRAINT), X) == []
    with pytest.raises(ValueError, match="unknown"):
        constrained(X, fallback.RAISE_ERROR)


def test_boxed_parameters_are_constrained_on_a_mesh(mesh):
    model = partitioned(nn)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        variables = model.init(KEY, X)
        specs = constraints(model.apply, variables, X)
    for spec in (P(None, "model"), P(None, None, "model"), P("data"), P("data", None, "model")):
        assert str(spec) in specs
    own = nn.Partitioned(X, ("data", None), mesh)
    assert constraints(lambda x: own.replace_boxed(x).unbox(), X) == [str(P("data", None))]
    assert own.unbox(apply_constraint=False) is X
