"""What is public in Flax's modules is there in ours of the same name."""

import importlib
import typing

import pytest

MODULES = [
    "core.spmd", "jax_utils", "linen.partitioning", "linen.spmd", "serialization", "struct", "training.checkpoints",
    "training.common_utils", "training.dynamic_scale", "training.early_stopping", "training.lr_schedule",
    "training.orbax_utils", "training.prefetch_iterator", "training.train_state", "traverse_util",
]  # fmt: skip


@pytest.mark.parametrize("module", MODULES)
def test_public_names_of_flax(module):
    pytest.importorskip("flax")
    theirs, ours = (importlib.import_module(f"{root}.{module}") for root in ("flax", "distaff.frontend"))
    public = {
        name
        for name, value in vars(theirs).items()
        if not name.startswith("_")
        and getattr(value, "__module__", None) == theirs.__name__
        and not isinstance(value, typing.TypeVar)
    }
    assert public and {name for name in public if not hasattr(ours, name)} == set()
