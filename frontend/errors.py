"""Errors of the module system: one class a mistake, named as in ``flax.errors``.

Each message says what was wrong and where (the module path), and what to do about it; where a mistake is about how code
is written, it shows the wrong and the right form.
"""

from __future__ import annotations

import textwrap
from typing import Any


def _wrong_right(wrong: str, right: str) -> str:
    """Two short pieces of code, one above the other, indented."""
    indent = " " * 8
    return (
        f"\n    Wrong:\n{textwrap.indent(textwrap.dedent(wrong).strip(), indent)}"
        f"\n    Right:\n{textwrap.indent(textwrap.dedent(right).strip(), indent)}"
    )


def _restore(cls: type[FlaxError], message: str) -> FlaxError:
    """Rebuild a pickled error: its constructor takes other arguments than the finished message."""
    error = cls.__new__(cls)
    error.args = (message,)
    return error


class FlaxError(Exception):
    """Base of all errors of the module system."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), str(self))


# Variables, collections and random keys.


class InvalidRngError(FlaxError):
    """A random key is missing, or what was given is not one."""


class InvalidFilterError(FlaxError):
    """A collection filter is not a bool, a name, a collection of names or a ``DenyList``."""

    def __init__(self, filter_like: object) -> None:
        super().__init__(
            f"Invalid collection filter {filter_like!r} of type {type(filter_like).__name__}. Pass True (all), False "
            "(none), a collection name such as 'batch_stats', a list of names, or nn.DenyList(names)."
        )


class InvalidScopeError(FlaxError):
    """A scope was used after the ``init`` or ``apply`` that made it had returned."""

    def __init__(self, scope_name: str | None) -> None:
        super().__init__(
            f"The scope {scope_name or '/'!r} is no longer valid: it was used after the call of init or apply that "
            "created it had returned. Return arrays from that call, not modules or scopes; or use module.bind."
        )


class ApplyScopeInvalidVariablesTypeError(FlaxError):
    """The variables given to ``apply`` or ``bind`` are not a dict of collections."""

    def __init__(self) -> None:
        super().__init__(
            "The first argument of apply must be a dictionary of collections, each a dictionary with string keys, as "
            "init returns it." + _wrong_right("model.apply(params, x)", "model.apply({'params': params}, x)")
        )


class ApplyScopeInvalidVariablesStructureError(FlaxError):
    """The variables have a doubled layer: ``{"params": {"params": ...}}``."""

    def __init__(self, variables: object) -> None:
        super().__init__(
            'The variables given to apply have the structure {"params": {"params": ...}}; expected {"params": ...}.'
            + _wrong_right(
                "variables = model.init(key, x)\nmodel.apply({'params': variables}, x)",
                "variables = model.init(key, x)\nmodel.apply(variables, x)",
            )
        )


class ScopeCollectionNotFound(FlaxError):
    """A variable was read from a collection that was not given at all."""

    def __init__(self, col_name: str, var_name: str, scope_path: str) -> None:
        super().__init__(
            f'Module "{scope_path}" reads "{var_name}" from the collection "{col_name}", which is empty or was not '
            f'passed to apply. Pass it, as in model.apply({{"{col_name}": ...}}, x); init returns all collections.'
        )


class ScopeParamNotFoundError(FlaxError):
    """A parameter that a module declares is not among those given to ``apply``."""

    def __init__(self, param_name: str, scope_path: str) -> None:
        super().__init__(
            f'No parameter "{param_name}" at "{scope_path}" among the params passed to apply. Either the parameters '
            "belong to another model or configuration, or a module was renamed: compare their tree with "
            "jax.eval_shape(model.init, key, x)."
        )


class ScopeVariableNotFoundError(FlaxError):
    """A variable that a module declares is neither given nor can be created."""

    def __init__(self, name: str, col: str, scope_path: str) -> None:
        super().__init__(
            f'No variable "{name}" in collection "{col}" at "{scope_path}", and the collection is not mutable, so it '
            f'cannot be created. Pass a value for it, or call apply with mutable=["{col}"].'
        )


class ScopeParamShapeError(FlaxError):
    """A given parameter has another shape than its initialiser would make."""

    def __init__(
        self, param_name: str, scope_path: str, value_shape: tuple[int, ...], init_shape: tuple[int, ...]
    ) -> None:
        super().__init__(
            f'Parameter "{param_name}" at "{scope_path}" was passed with shape {value_shape}, but the module declares '
            f"shape {init_shape}. Check that the model's configuration and the shape of its input are those that the "
            "parameters were made for."
        )


class ModifyScopeVariableError(FlaxError):
    """A variable of an immutable collection was assigned to."""

    def __init__(self, col: str, variable_name: str, scope_path: str) -> None:
        super().__init__(
            f'Cannot update "{variable_name}" at "{scope_path}": the collection "{col}" is immutable in this call.'
            + _wrong_right(
                "y = model.apply(variables, x)", f"y, updates = model.apply(variables, x, mutable=['{col}'])"
            )
        )


class PartitioningUnspecifiedError(FlaxError):
    """A transform adds an axis to a ``Partitioned`` variable and was not told the axis's name."""

    def __init__(self, target: object) -> None:
        super().__init__(
            f"A transform adds or removes an axis of the partitioned variable {target}, but does not name it. Pass "
            "metadata_params={nn.PARTITION_NAME: 'layers'} (or None for a replicated axis) to the transform."
        )


# Checkpoints.


class InvalidCheckpointError(FlaxError):
    """A checkpoint was to be saved where there is one of the same or a later step."""

    def __init__(self, path: str, step: object) -> None:
        super().__init__(
            f"Cannot save a checkpoint of step {step} at {path}: there is one of this step or a later one. Restore "
            "that and go on from there, save in another folder, or pass overwrite=True to replace it and all after it."
        )


class MPACheckpointingRequiredError(FlaxError):
    """A checkpoint in Flax's older format keeps arrays of several processes elsewhere."""

    def __init__(self, path: str, step: object) -> None:
        super().__init__(
            f"The checkpoint {path} (step {step}) refers to arrays of several processes in {path}_gda, a format from "
            "before Orbax that cannot be read here. Restore it with Flax, and save it again with Orbax."
        )


# Writing and calling modules.


class NameInUseError(FlaxError):
    """Two submodules, or a submodule and a variable, have the same name."""

    def __init__(self, key_type: str, value: str, module_name: str) -> None:
        super().__init__(
            f'Could not create {key_type} "{value}" in module {module_name}: the name is already in use there. Names '
            "of submodules, parameters and variables of one module must differ; to use a submodule twice, create it "
            "once and call it twice."
            + _wrong_right(
                "x = nn.Dense(4, name='layer')(x)\nx = nn.Dense(4, name='layer')(x)",
                "x = nn.Dense(4, name='layer_0')(x)\nx = nn.Dense(4, name='layer_1')(x)",
            )
        )


class AssignSubModuleError(FlaxError):
    """A submodule was created outside ``setup`` and ``@compact`` methods."""

    def __init__(self, cls: str) -> None:
        super().__init__(
            f"Submodule {cls} must be created in setup() or in a method wrapped in @nn.compact."
            + _wrong_right(
                f"def __call__(self, x):\n    return {cls}(...)(x)",
                f"@nn.compact\ndef __call__(self, x):\n    return {cls}(...)(x)",
            )
        )


class SetAttributeInModuleSetupError(FlaxError):
    """A dataclass field was assigned to inside ``setup``."""

    def __init__(self) -> None:
        super().__init__(
            "A field given at construction cannot be reassigned in setup(): modules keep what they were configured "
            "with. Derive a new attribute."
            + _wrong_right(
                "def setup(self):\n    self.features = 4 * self.features",
                "def setup(self):\n    self.hidden = 4 * self.features",
            )
        )


class SetAttributeFrozenModuleError(FlaxError):
    """An attribute was assigned to outside ``setup``."""

    def __init__(self, module_cls: str, attr_name: str, attr_val: object) -> None:
        super().__init__(
            f"Can't set {attr_name}={attr_val} on a module of type {module_cls}: modules are frozen outside setup(). "
            "Assign to attributes in setup(), keep state in self.variable(...), and make changed copies with "
            f"module.clone({attr_name}=...)."
        )


class ReservedModuleAttributeError(FlaxError):
    """A module class declares ``parent`` or ``name`` with another type."""

    def __init__(self, annotations: object) -> None:
        super().__init__(f"The fields `parent` and `name` are reserved in modules; rename yours: {annotations}")


class ApplyModuleInvalidMethodError(FlaxError):
    """What was passed as ``method`` cannot be called with the module as first argument."""

    def __init__(self, method: object) -> None:
        super().__init__(
            f"{method!r} is not a function that takes a module as its first argument. Pass method='encode', "
            "method=Model.encode or method=lambda module, x: module.encode(x)."
        )


class CallCompactUnboundModuleError(FlaxError):
    """A compact method was called on a module that holds no variables."""

    def __init__(self) -> None:
        super().__init__(
            "Can't call compact methods on unbound modules: a module holds no parameters by itself."
            + _wrong_right(
                "model = nn.Dense(4)\ny = model(x)",
                "model = nn.Dense(4)\nvariables = model.init(key, x)\ny = model.apply(variables, x)",
            )
        )


class CallSetupUnboundModuleError(FlaxError):
    """``setup`` was called by hand on a module that holds no variables."""

    def __init__(self) -> None:
        super().__init__(
            "Can't call setup() on unbound modules; init, apply and bind call it. To reach what it defines, use "
            "module.bind(variables)."
            + _wrong_right(
                "model.setup()\nencoder = model.encoder",
                "encoder = model.bind(variables).encoder",
            )
        )


class CallUnbindOnUnboundModuleError(FlaxError):
    """``unbind`` was called on a module that is not bound."""

    def __init__(self) -> None:
        super().__init__(
            "Can't call unbind() on unbound modules."
            + _wrong_right(
                "module, variables = model.unbind()", "module, variables = model.bind(variables).encoder.unbind()"
            )
        )


class CallShareScopeOnUnboundModuleError(FlaxError):
    """``share_scope`` was called with an unbound module."""

    def __init__(self) -> None:
        super().__init__("Can't call share_scope on unbound modules. Call it in setup(), where both modules are bound.")


class InvalidInstanceModuleError(FlaxError):
    """``init``, ``apply`` or another method was called on a class instead of an instance."""

    def __init__(self) -> None:
        super().__init__(
            "init, init_with_output, apply and bind are called on an instance of a module, not on its class."
            + _wrong_right("nn.Dense.init(key, x)", "nn.Dense(features=4).init(key, x)")
        )


class IncorrectPostInitOverrideError(FlaxError):
    """A module class overrides ``__post_init__`` and does not call the original."""

    def __init__(self) -> None:
        super().__init__(
            "__post_init__ was overridden without calling super().__post_init__()."
            + _wrong_right(
                "def __post_init__(self):\n    self.hidden = 4 * self.features",
                "def __post_init__(self):\n    self.hidden = 4 * self.features\n    super().__post_init__()",
            )
        )


class DescriptorAttributeError(FlaxError):
    """A property of a module read an attribute that does not exist."""

    def __init__(self, name: str = "", module_cls: str = "") -> None:
        super().__init__(
            f"The property {name!r} of module {module_cls} reads an attribute that does not exist; the error above "
            "names it."
        )
