"""What is public in Flax's functional half is there in ours, by the same path and with the same arguments."""

import collections.abc
import enum
import importlib
import inspect
import pkgutil
import types
import typing

import jax
import numpy as np
import pytest

MODULES = """
    configurations core core.axes_scan core.frozen_dict core.lift core.meta core.nn core.scope core.spmd core.tracers
    cursor errors ids io jax_utils linen linen.activation linen.attention linen.batch_apply
    linen.combinators linen.dtypes linen.fp8_ops linen.initializers linen.linear linen.module linen.normalization
    linen.partitioning linen.pooling linen.recurrent linen.spmd linen.stochastic linen.summary linen.transforms
    serialization struct training.checkpoints training.common_utils training.dynamic_scale training.early_stopping
    training.lr_schedule training.orbax_utils training.prefetch_iterator training.train_state traverse_util
    typing version
""".split()

# Modules of Flax that are left out, and why.
ABSENT_MODULES = {
    "core.variables": "names of core.scope",
    "core.partial_eval": "private JAX; lazy_init is in core",
    "experimental": "empty",
    "linen.kw_only_dataclasses": "for Pythons before 3.10, whose dataclasses have kw_only",
    "metrics": "TensorBoard, through TensorFlow: clu or tensorboardX write summaries",
    "testing": "Flax's own benchmarks",
    "traceback_util": "changes a private list of JAX; errors here name the user's line instead",
}
NNX = "reads or makes NNX modules: see distaff.frontend.nnx"
INTERNAL = "a step of Flax's own code that its documentation does not name"
REPLACED = "of Flax before Linen; linen.MultiHeadDotProductAttention serves"
ABSENT = {
    "configurations": {
        "static_bool_env": "bool_flag reads the environment", "static_int_env": "int_flag reads the environment",
        "flax_filter_frames": "tracebacks are not filtered", "flax_use_flaxlib": NNX, "flax_array_ref": NNX,
        "flax_pytree_module": NNX, "flax_max_repr_depth": NNX,
    },
    "core.axes_scan": {"build_shaped_array": INTERNAL},
    "core.lift": dict.fromkeys(["CountsHolder", "TransformContext", "set_from_dict", "tree_map_rngs"], INTERNAL),
    "core.nn": dict.fromkeys(["dot_product_attention", "multi_head_dot_product_attention"], REPLACED),
    "core.scope": dict.fromkeys(["child_rng_token", "filter_to_set", "no_flag"], INTERNAL),
    "cursor": {"Indexable": INTERNAL},
    "linen.batch_apply": dict.fromkeys(
        ["arbitrary_mergeable_leaf", "merge_leading_dims", "ndim_at_least", "split_leading_dim"], INTERNAL
    ),
    "linen.fp8_ops": dict.fromkeys("""
        Fp8MetaTyRules dot_general_transpose_lhs dot_general_transpose_rhs dot_general_with_precision_jvp fp8_meta_dtype
        fp8_meta_dtype_wrapper in_q_bwd in_q_fwd in_qdq_bwd in_qdq_fwd out_dq_bwd out_dq_fwd out_qdq_bwd out_qdq_fwd
        quantized_dot_bwd quantized_dot_fwd
    """.split(), INTERNAL),
    "linen.linear": {"PromoteDtypeFn": "a type of Flax's annotations"},
    "linen.module": dict.fromkeys("""
        CompactNameScope Descriptor DescriptorWrapper ParentDescriptor TestScope ThreadLocalStack
        capture_call_intermediates create_descriptor_wrapper module_field run_interceptors tuple_init tuple_reduce
        wrap_descriptor_once wrap_method_once
    """.split(), INTERNAL),
    "linen.recurrent": dict.fromkeys(["DenseParams", "RNNBase"], INTERNAL),
    "linen.transforms": dict.fromkeys("""
        InstancePlaceholder VariablePlaceholder clean_clone decorator_lift_transform decorator_lift_transform_cached
        fork_rngs get_module_scopes lift_direct_transform lift_transform_cached module_class_lift_transform
        module_class_lift_transform_cached set_module_scopes
    """.split(), INTERNAL),
    "typing": dict.fromkeys(["BaseConfigContext", "HashableMapping", "MISSING", "Missing", "PytreeDeque"], INTERNAL),
}  # fmt: skip


def own_names(module):
    """The public names that a module of Flax defines; of a package, what its files define."""
    is_package = hasattr(module, "__path__")
    return {
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not isinstance(value, types.ModuleType | typing.TypeVar)
        and (origin := getattr(value, "__module__", None))
        and (origin.startswith(module.__name__ + ".") if is_package else origin == module.__name__)
    }


@pytest.mark.parametrize("module", MODULES)
def test_public_names_of_flax(module):
    pytest.importorskip("flax")
    theirs, ours = (importlib.import_module(f"{root}.{module}") for root in ("flax", "distaff.frontend"))
    public = own_names(theirs)
    assert public or module == "version"
    missing = {name for name in public if not hasattr(ours, name)}
    assert missing == set(ABSENT.get(module, {}))


# Signatures that differ, and why.
OTHER_ARGUMENTS = {
    "DescriptorAttributeError": "ours names the property", "FrozenDict": "Flax's takes a private argument",
    "InvalidRngError": "made by the library only", "JaxTransformError": "ours names the variable",
    "PyTreeNode": "a base class; its subclasses have the arguments of their fields",
    "Scope.make_rng": "ours takes a private argument", "ScopeCollectionNotFound": "ours lists the collections given",
    "lift_transform": INTERNAL, "save_checkpoint": "ours can be told the format",
}  # fmt: skip
OTHER_MEMBERS = {
    "Config": "properties in Flax, read by name here", "Conv": "shared_weights is the class here",
    "ConvLocal": "shared_weights is the class here", "LogicallyPartitioned": NNX, "Partitioned": NNX,
}  # fmt: skip


def arguments(fn):
    """Names, kinds and order; the keyword arguments ``parent`` and ``name`` of all modules aside."""
    parameters = inspect.signature(fn).parameters.values()
    return [(p.name, p.kind) for p in parameters if not (inspect.isclass(fn) and p.name in ("parent", "name"))]


def methods(cls):
    """The public methods that a class defines."""
    return {name: value for name, value in vars(cls).items() if name[0] != "_" and inspect.isfunction(value)}


@pytest.mark.parametrize("module", MODULES)
def test_arguments_and_methods(module):
    pytest.importorskip("flax")
    theirs, ours = (importlib.import_module(f"{root}.{module}") for root in ("flax", "distaff.frontend"))
    for name in own_names(theirs) - set(ABSENT.get(module, {})):
        a, b = getattr(theirs, name), getattr(ours, name)
        if not callable(a) or (inspect.isclass(a) and issubclass(a, enum.Enum)):
            continue
        if name not in OTHER_ARGUMENTS:
            assert arguments(b) == arguments(a), name
        if not inspect.isclass(a):
            continue
        for method, of_flax in methods(a).items():
            if hasattr(b, method):
                if f"{name}.{method}" not in OTHER_ARGUMENTS:
                    own = [argument for argument, _ in arguments(getattr(b, method))]
                    assert own == [argument for argument, _ in arguments(of_flax)], f"{name}.{method}"
            else:
                assert name in OTHER_MEMBERS, f"{name}.{method}"


def test_types_and_version():
    flax_typing = pytest.importorskip("flax.typing")
    ours = importlib.import_module("distaff.frontend.typing")
    standard = {*vars(typing), *vars(collections.abc), *vars(importlib.import_module("builtins"))}
    aliases = {
        name
        for name, value in vars(flax_typing).items()
        if name[0].isupper() and name not in standard and not isinstance(value, typing.TypeVar)
    } - set(ABSENT["typing"])
    assert {name for name in aliases if not hasattr(ours, name)} == set()
    shapes = {"a": np.ones((3, 4), np.int8), "b": [jax.ShapeDtypeStruct((2,), "bfloat16")]}
    mine, other = ours.SizeBytes.from_any(shapes), flax_typing.SizeBytes.from_any(shapes)
    assert repr(mine + mine) == repr(other + other) and (mine.size, mine.bytes) == (other.size, other.bytes) == (14, 16)
    assert [ours.bytes_text(n) for n in (999, 1001, 23_160, 5_000_000, 2_000_000_000)] == [
        "999 B", "1.0 KB", "23.2 KB", "5.0 MB", "2.0 GB",
    ]  # fmt: skip
    assert importlib.import_module("distaff.frontend").__version__ == importlib.import_module("flax").__version__


def test_files_have_one_backend():
    io = importlib.import_module("distaff.frontend.io")
    with io.override_mode(io.BackendMode.DEFAULT):
        assert io.io_mode is io.BackendMode.DEFAULT
    with pytest.raises(NotImplementedError, match="Orbax"):
        io.set_mode(io.BackendMode.TF)


def test_reached_as_attributes_of_the_package():
    import distaff.frontend as flax

    assert flax.core.freeze({}) == {} and flax.linen.Dense and flax.training.train_state
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        flax.nothing  # noqa: B018


def test_every_module_of_flax_is_compared_or_left_out_on_purpose():
    flax = pytest.importorskip("flax")
    found = {info.name.removeprefix("flax.") for info in pkgutil.walk_packages(flax.__path__, "flax.", onerror=str)}
    covered = {*MODULES, *ABSENT_MODULES, "nnx", "training"}
    assert {m for m in found if not any(m == c or m.startswith(c + ".") for c in covered)} == set()
