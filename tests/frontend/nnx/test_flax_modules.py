"""The modules that ``flax.nnx`` has, by the same paths, and what ``nnx`` has of their names."""

from __future__ import annotations

import importlib
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff.frontend import nnx

MODULES = """
    compat extract filterlib graph graphlib helpers ids module object pytreelib rnglib spmd statelib tracers traversals
    variablelib visualization transforms.autodiff transforms.compilation transforms.general transforms.iteration
    transforms.transforms
""".split()

# Public names that are left out: steps of Flax's own code, which its documentation does not name.
ABSENT = {
    "extract": {
        "ExtractIndex", "GraphDefState", "Mask", "Opaque", "OrderedDict", "Updates", "apply_updates",
        "broadcast_prefix2", "broadcast_prefix_map", "check_consistent_aliasing", "check_consistent_aliasing2",
        "check_no_aliases", "check_prefix", "check_same_variables", "copy_var_structure", "default_split_fn", "extract",
        "filter_kwargs", "find", "from_tree2", "get_updates", "insert", "labeled", "mask_at", "replace_at", "slice_at",
        "snapshot", "to_masked", "to_tree2", "treemap_copy_args", "update_carry_variables", "variable_changed",
    },
    "filterlib": {"HasTag"},
    "graphlib": {
        "ArrayRefDef", "DataElem", "GenericPytree", "GraphContext", "GraphNodeImpl", "IndexesPytreeDef", "LeafAttr",
        "NodeAttr", "NodeImplBase", "PytreeNodeImpl", "PythonRefMap", "Repeated", "StaticCache", "StaticElem",
        "UpdateContextManager", "get_node_impl", "get_node_impl_for_type", "graph_pop", "is_node_leaf",
        "is_node_module", "is_node_type", "is_pytree_node", "jax_to_nnx_path", "register_graph_node_type",
        "register_pytree_node_type", "static_cache",
    },
    "helpers": {"ModuleDefApply", "has_keyword_arg"},
    "module": {"first_from", "tuple_init", "tuple_reduce"},
    "pytreelib": {"ArrayRepr", "AttributeStatus", "MutableArrayRepr", "ObjectContext", "PytreeState", "VariableRepr"},
    "statelib": {"NestedStateRepr"},
    "tracers": {"TraceState"},
    "transforms.transforms": {"LiftedModule", "ValueMetadata", "resolve_kwargs"},
    "transforms.autodiff": {"CustomVjp", "CustomVjpFnWrapper", "custom_vjp"},  # a module of its own here
    "transforms.compilation": {"shard_map"},  # likewise
    "transforms.iteration": {"Broadcasted"},
    "variablelib": {
        "AbstractVariable", "GetVariable", "HijaxVariableMeta", "NewVariable", "SetVariable", "VarDefaultsContext",
        "VariableContext", "VariableEffect", "VariableMeta", "VariableQDD", "VariableState",
    },
    "visualization": {"render_object_constructor"},
}  # fmt: skip
ABSENT["object"] = ABSENT["pytreelib"]
LAYERS_OF_FUNCTIONS = ("Fn", "Wrapped", "Partial", "Lowered", "Compiled", "Traced", "Stage")  # classes around functions


def own_names(module):
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
        and (inspect.isclass(value) or inspect.isfunction(value))
        and not name.endswith(LAYERS_OF_FUNCTIONS) and not name.startswith("Simple")
    }  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_names(flax_nnx, flax_is_followed, module):
    theirs = vars(flax_nnx).get(module) or importlib.import_module(f"flax.nnx.{module}")
    ours = importlib.import_module(f"distaff.frontend.nnx.{module}")
    missing = {name for name in own_names(theirs) if not hasattr(ours, name)}
    assert not flax_is_followed or missing == ABSENT.get(module, set())
    assert any(hasattr(ours, name) for name in vars(theirs) if not name.startswith("_"))


def test_names_of_the_package(flax_nnx, flax_is_followed):
    if not flax_is_followed:
        pytest.skip("another version of Flax may have other names")
    missing = {name for name in vars(flax_nnx) if not name.startswith("_") and not hasattr(nnx, name)}
    assert missing <= {"M", "deprecations", "helpers", "proxy_caller", "wrappers"}


def test_compat_is_graph_mode_always():
    shared = nnx.Param(jnp.ones(2))
    with nnx.set_graph_mode(False):
        with pytest.raises(ValueError, match="found at paths"):
            nnx.state([shared, shared])
        assert len(nnx.to_flat_state(nnx.compat.state([shared, shared]))) == 1

        @nnx.compat.jit
        def grow(model):
            model["new"] = nnx.Param(jnp.zeros(1))

        model = nnx.Dict(old=shared)
        grow(model)
        assert set(model) == {"old", "new"}


def test_inputs_of_transforms_by_hand():
    general = nnx.transforms.general
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    kernel = model.kernel

    @general.split_inputs
    @jax.jit
    @general.merge_inputs
    def negate(model, x):
        y = model(x)
        model.kernel[...] *= -1
        return y, model

    before = np.asarray(kernel[...])
    y, same = negate(model, jnp.ones((1, 2)))
    assert same is model and model.kernel is kernel
    np.testing.assert_allclose(kernel[...], -before)
    np.testing.assert_allclose(y, before.sum(0, keepdims=True), rtol=1e-6)


def test_text_of_objects(flax_nnx):
    for lib in (nnx, flax_nnx):
        param = lib.Param(1.5)
        assert lib.reprlib.get_repr(param) == repr(param) and "1.5" in repr(param)


def test_flat_mappings(flax_nnx):
    nested = {"a": {"b": 1, "c": {}}, "d": 2}
    for lib in (nnx, flax_nnx):
        for given in (nested, lib.State(nested)):
            assert lib.traversals.flatten_mapping(given) == {("a", "b"): 1, ("d",): 2}
            assert lib.traversals.flatten_to_sequence(given) == [(("a", "b"), 1), (("d",), 2)]
        flat = lib.traversals.flatten_mapping(nested, keep_empty_nodes=True, sep="/")
        assert flat.keys() == {"a/b", "a/c", "d"}
        assert lib.traversals.unflatten_mapping(flat, sep="/") == nested
