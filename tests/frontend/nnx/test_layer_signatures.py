"""What is public in ``flax.nnx.nn`` is there in ours, with Flax's arguments and defaults, in their order.

Of another version of Flax than the one that is followed, only the names and arguments that both have are compared.
"""

import importlib
import inspect
import typing

import pytest

from distaff.frontend import nnx

MODULES = "activations attention dtypes initializers linear lora normalization recurrent stochastic".split()
ALIASES = {"Array", "Axis", "Size", "DtypeLikeInexact"}  # annotations of Flax's own
INTERNAL = {"RNNBase"}  # a protocol for annotations


def public(module):
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name not in ALIASES | INTERNAL
        and not inspect.ismodule(value)
        and not isinstance(value, typing.TypeVar)
        and (getattr(value, "__module__", None) == module.__name__ or name.startswith("default_"))
    }


def arguments(fn):
    return [
        (p.name, p.kind, None if callable(p.default) else p.default) for p in inspect.signature(fn).parameters.values()
    ]


def assert_same_arguments(mine, theirs, strict, name):
    mine, theirs = arguments(mine), arguments(theirs)
    if not strict:
        both = {argument for argument, *_ in mine} & {argument for argument, *_ in theirs}
        mine, theirs = ([a for a in found if a[0] in both] for found in (mine, theirs))
    assert mine == theirs, name


@pytest.mark.parametrize("module", MODULES)
def test_public_names(flax_nnx, flax_is_followed, module):
    theirs = public(importlib.import_module(f"flax.nnx.nn.{module}"))
    ours = vars(importlib.import_module(f"distaff.frontend.nnx.nn.{module}"))
    assert theirs.keys() & ours.keys() and not (flax_is_followed and theirs.keys() - ours.keys())


@pytest.mark.parametrize("module", MODULES)
def test_arguments(flax_nnx, flax_is_followed, module):
    ours = vars(importlib.import_module(f"distaff.frontend.nnx.nn.{module}"))
    for name, theirs in public(importlib.import_module(f"flax.nnx.nn.{module}")).items():
        if name not in ours and not flax_is_followed:
            continue
        mine = ours[name]
        if not inspect.isclass(theirs):
            if inspect.isfunction(theirs):
                assert_same_arguments(mine, theirs, flax_is_followed, name)
            continue
        assert mine.__name__ == theirs.__name__
        fields = inspect.signature(theirs.__init__).parameters.keys()
        methods = {
            name for name, value in vars(theirs).items() if inspect.isfunction(value) and not name.startswith("_")
        } - fields
        for method in methods | ({"__init__", "__call__"} & vars(theirs).keys()):
            if flax_is_followed or hasattr(mine, method):
                pair = getattr(mine, method), getattr(theirs, method)
                assert_same_arguments(*pair, flax_is_followed, f"{name}.{method}")


def test_names_of_the_package(flax_nnx, flax_is_followed):
    """All that ``flax.nnx`` takes from its layers, and from Linen's pooling."""
    theirs = {
        name
        for name, value in vars(flax_nnx).items()
        if getattr(value, "__module__", "").startswith(("flax.nnx.nn.", "flax.linen.pooling", "jax._src.nn.functions"))
    }
    assert {"Linear", "avg_pool", "relu", "LoRA"} <= theirs
    assert not flax_is_followed or not {name for name in theirs if not hasattr(nnx, name)}
