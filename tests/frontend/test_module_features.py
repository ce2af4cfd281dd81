"""Summaries, lazy initialisation, module paths, name scopes, interceptors: what modules offer beside init and apply."""

import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distaff.frontend import core
from distaff.frontend import linen as nn

from .conftest import assert_same_tree

KEY = jax.random.key(0)
KEYS = {"params": KEY, "dropout": jax.random.key(1)}
X = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)), jnp.float32)


def network(nn):
    class Block(nn.Module):
        features: int

        @nn.compact
        def __call__(self, x, train, scales=None):
            x = nn.Dense(self.features)(x)
            x = nn.BatchNorm(use_running_average=not train)(x)
            return {"y": nn.Dropout(0.5, deterministic=not train)(x), "scales": (scales, x.sum())}

    class Network(nn.Module):
        def setup(self):
            self.blocks = [Block(5), Block(4)]
            boxed = nn.with_partitioning(nn.initializers.ones, ("rows", None))
            self.table = self.param("table", boxed, (7, 4), unbox=False)
            self.head = nn.Dense(2)

        def __call__(self, x, train=True):
            first = self.blocks[0](x, train, scales=[x, 2.0])
            x = self.blocks[1](first["y"], train)["y"]
            return self.twice(x + self.table.unbox()[0])

        def twice(self, x):
            return self.head(x) + self.head(2 * x)

    return Network()


def tables(library, **options):
    return network(library).tabulate(KEYS, X, console_kwargs={"width": 240, "force_terminal": False}, **options)


def columns_sorted(table):
    """The text without the order of variable collections, which is that of a set in Flax."""
    lines = [[cell.strip() for cell in re.split("[│┃]", line)] for line in table.splitlines()]
    return sorted(" ".join(sorted(cell for cell in line if not set(cell) <= set("─━┼╇┴┬┳┏┓└┘├┤┡┩"))) for line in lines)


@pytest.mark.parametrize(
    "options", [{}, {"depth": 1}, {"show_repeated": True}, {"mutable": ["params", "batch_stats"]}], ids=str
)
def test_tables_are_those_of_flax(flax_nn, options):
    ours, theirs = (tables(library, **options) for library in (nn, flax_nn))
    assert "Network Summary" in ours and "Total Parameters" in ours
    assert columns_sorted(ours) == columns_sorted(theirs)


def test_flops_are_those_of_flax(flax_nn):
    def table(library):
        class Model(library.Module):
            @library.compact
            def __call__(self, x):
                return library.Dense(2)(library.relu(library.Dense(4)(x)))

        return library.tabulate(Model(), KEY, compute_flops=True, compute_vjp_flops=True)(jnp.ones((16, 9)))

    ours, theirs = table(nn), table(flax_nn)
    flops = [[int(n) for n in re.findall(r"│\s*(\d+)\s*(?=│)", re.sub(r"\x1b\[\d+m", "", t))] for t in (ours, theirs)]
    assert flops[0] == flops[1] and len(flops[0]) == 6


def test_flops_of_integer_inputs_and_random_layers():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens, train: bool):
            x = nn.Embed(11, 4)(tokens)
            return nn.Dropout(0.5, deterministic=not train)(
                nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})(3)(x)
            ), tokens

    text = Model().tabulate(
        KEYS,
        jnp.zeros((2, 3), int),
        train=True,
        console_kwargs={"width": 200},
        compute_flops=True,
        compute_vjp_flops=True,
    )
    assert "VmapDense_0" in text and "int32" in text


def test_module_paths(flax_nn):
    ours, theirs = (network(library).module_paths(KEYS, X) for library in (nn, flax_nn))
    assert {path: type(module).__name__ for path, module in ours.items()} == {
        path: type(module).__name__ for path, module in theirs.items()
    }
    assert all(module.scope is None for module in ours.values())
    assert ours["blocks_0"].features == 5


def test_lazy_init_makes_the_variables_of_init():
    shape = jax.ShapeDtypeStruct(X.shape, X.dtype)
    model = nn.Sequential([nn.Dense(5), nn.LayerNorm(), nn.Dropout(0.5, deterministic=False)])
    assert_same_tree(model.lazy_init(KEYS, shape), model.init(KEYS, X))
    named = network(nn)
    assert_same_tree(named.lazy_init(KEYS, shape, train=False), named.init(KEYS, X, train=False))
    assert_same_tree(named.lazy_init(KEYS, x=shape, train=True), named.init(KEYS, X))


def test_lazy_init_computes_nothing_of_the_forward_pass():
    ran = []

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            jax.debug.callback(lambda x: ran.append(x), x)
            return nn.Dense(2)(x)

    Model().lazy_init(KEY, jax.ShapeDtypeStruct((1, 4), jnp.float32))
    jax.effects_barrier()
    assert not ran


def test_lazy_init_of_scope_functions():
    def f(scope, x, features):
        return x @ scope.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], features))

    shape = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    assert_same_tree(core.lazy_init(f)(KEY, shape, 3), core.init(f)(KEY, X, 3)[1])


def test_name_scopes_are_methods_of_their_own():
    class Codec(nn.Module):
        @nn.compact_name_scope
        def encode(self, x):
            return nn.Dense(2)(x)

        @nn.compact_name_scope
        def decode(self, x):
            return nn.Dense(x.shape[-1] * 2)(x)

        def __call__(self, x):
            return self.decode(self.encode(x))

    class Deeper(Codec):
        @nn.compact_name_scope
        def encode(self, x):
            return nn.Dense(2)(nn.Dense(3)(x))

    variables = Codec().init(KEY, X)
    assert jax.tree.map(jnp.shape, variables["params"]["encode"]["Dense_0"]["kernel"]) == (4, 2)
    code = Codec().apply(variables, X, method="encode")
    np.testing.assert_allclose(Codec().apply(variables, code, method=Codec.decode), Codec().apply(variables, X))
    assert set(Deeper().init(KEY, X)["params"]["encode"]) == {"Dense_0", "Dense_1"}
    np.testing.assert_allclose(Codec().bind(variables).encode(X), code)


def test_interceptors_run_in_the_order_of_flax(flax_nn):
    logs = []
    for library in (nn, flax_nn):
        log = []

        def interceptor(tag, log=log):
            def call(next_method, args, kwargs, context):
                log.append((tag, context.method_name, type(context.module).__name__))
                if tag == "b" and context.method_name == "helper":
                    return context.orig_method(*args, **kwargs)
                return next_method(*args, **kwargs)

            return call

        class Model(library.Module):
            def setup(self, library=library):
                self.dense = library.Dense(3)

            def helper(self, x):
                return self.dense(x)

            def __call__(self, x):
                return self.helper(x)

        a, b, c = (library.intercept_methods(interceptor(tag)) for tag in "abc")
        with a, b, c:
            Model().init(KEY, X)
        logs.append(log)
    assert logs[0] == logs[1]


def lora_around(nn):
    class LoRA(nn.Module):
        base: Any

        def setup(self):
            nn.share_scope(self, self.base)

        @nn.compact
        def __call__(self, x):
            a = self.param("a", nn.initializers.normal(), (x.shape[-1], 2))
            return self.base(x) + x @ a @ self.param("b", nn.initializers.zeros_init(), (2, 3))

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return LoRA(nn.Dense(3))(x)

    return Model()


def lora_inside(nn):
    class LoRA(nn.Module):
        def setup(self):
            self.child = nn.Sequential([nn.Dense(3), nn.relu, nn.Dense(3)])
            nn.share_scope(self, self.child)

        @nn.compact
        def __call__(self, x):
            return self.child(x) + x @ self.param("a", nn.initializers.normal(), (x.shape[-1], 3))

    return nn.Sequential([LoRA(), nn.Dense(2)])


@pytest.mark.parametrize("program", [lora_around, lora_inside])
def test_shared_scopes_are_those_of_flax(same_as_flax, program):
    same_as_flax(program, X)


# Names and signatures.

PARTS = {
    "linen": "add_metadata_axis apply broadcast checkpoint compact compact_name_scope cond custom_vjp "
    "disable_named_call enable_named_call fold_rngs grad init init_with_output intercept_methods jit jvp "
    "map_variables merge_param Module named_call nowrap override_named_call remat remat_scan scan share_scope switch "
    "tabulate value_and_grad Variable vjp vmap while_loop",
    "core": "Array AxisMetadata DenyList FrozenDict Scope apply bind broadcast check_trace_level copy current_trace "
    "custom_vjp freeze init jit jvp lazy_init lift map_axis_meta meta pop pretty_repr remat remat_scan scan tracers "
    "unbox unfreeze vjp vmap while_loop",
    "core.lift": "checkpoint cond custom_vjp fold_rngs id_fn In jit jvp map_variables Out pack remat remat_scan scan "
    "swap_collection switch value_and_grad vjp vmap while_loop",
}


def parameters(fn):
    try:
        return [name for name in inspect.signature(fn).parameters if not name.startswith("__")]
    except (TypeError, ValueError):
        return None


@pytest.mark.parametrize("part", PARTS)
def test_names_and_signatures_are_those_of_flax(part):
    theirs = pytest.importorskip(f"flax.{part}")
    ours = core.lift if part == "core.lift" else core if part == "core" else nn
    for name in PARTS[part].split():
        mine, other = getattr(ours, name), getattr(theirs, name)
        if inspect.isfunction(other):
            assert parameters(mine) == parameters(other), name


def test_methods_of_modules_are_those_of_flax(flax_nn):
    for name, theirs in vars(flax_nn.Module).items():
        if not name.startswith("_") and callable(theirs):
            assert parameters(getattr(nn.Module, name)) == parameters(theirs), name
        elif not name.startswith("_"):
            assert hasattr(nn.Module, name)
