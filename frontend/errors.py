"""Errors of the module system: one class a mistake, named as in ``flax.errors``.

Each message says what was wrong and where (the module path), and what to do about it; where a mistake is about how code
is written, it shows the wrong and the right form. It ends with the line of the user's code that led there.
"""

from __future__ import annotations

import sys
import sysconfig
import textwrap
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

# Code that users call and did not write: ours, JAX's, Python's own.
_OWN = str(Path(__file__).parent) + "/"
_STDLIB = sysconfig.get_paths()["stdlib"] + "/"


def is_user_code(filename: str) -> bool:
    """Whether a file is neither ours nor JAX's nor Python's own."""
    if filename.startswith(_OWN) or "/jax/" in filename or filename == "<string>" or filename.startswith("<frozen"):
        return False
    return not filename.startswith(_STDLIB) or "-packages/" in filename


def _user_line() -> str:
    """Where the user's code called into ours, as ``model.py:12 (__call__)``; empty if there is no such frame."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not is_user_code(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})" if frame else ""


def _wrong_right(wrong: str, right: str) -> str:
    """Two short pieces of code, one above the other, indented."""
    indent = " " * 8
    return (
        f"\n    Wrong:\n{textwrap.indent(textwrap.dedent(wrong).strip(), indent)}"
        f"\n    Right:\n{textwrap.indent(textwrap.dedent(right).strip(), indent)}"
    )


def _listed(collections: Iterable[str]) -> str:
    """Collections for the reader: ``the collections "params", "cache"``."""
    names = ", ".join(f'"{name}"' for name in collections)
    return f"the collections {names}" if names else "no collections"


def _restore(cls: type[FlaxError], message: str) -> FlaxError:
    """Rebuild a pickled error: its constructor takes other arguments than the finished message."""
    error = cls.__new__(cls)
    error.args = (message,)
    return error


class FlaxError(Exception):
    """Base of all errors of the module system; the message ends with the user's line."""

    def __init__(self, message: str = "") -> None:
        where = _user_line()
        super().__init__(f"{message}\n    At {where}" if where else message)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), str(self))


# JAX transforms.


class JaxTransformError(FlaxError):
    """A variable was assigned a value that belongs to a JAX transform inside the module, and would leak out of it."""

    def __init__(self, variable: str = "", scope_path: str = "") -> None:
        which = f'the variable "{variable}" of "{scope_path}"' if variable else "a variable or module"
        super().__init__(
            f"JAX transforms and modules cannot be mixed: {which} was made outside of a JAX transform and assigned to "
            "inside of it, and the value cannot leave the transform. Use the lifted transform of the same name, which "
            "takes the module's variables through."
            + _wrong_right(
                "dense = nn.Dense(4)\ny = jax.vmap(dense)(x)",
                "dense = nn.vmap(nn.Dense, variable_axes={'params': None}, split_rngs={'params': False})(4)\n"
                "y = dense(x)",
            )
        )


class TransformTargetError(FlaxError):
    """A lifted transform was given something else than a module class or a function of a module."""

    def __init__(self, target: object) -> None:
        super().__init__(
            "Linen transformations must be applied to Modules classes or functions taking a Module instance as the "
            f"first argument; got {target!r}."
            + _wrong_right(
                "y = nn.vmap(nn.Dense(4))(x)",
                "y = nn.vmap(nn.Dense)(4)(x)  # or nn.vmap(lambda module, x: module(x))(nn.Dense(4), x)",
            )
        )


class TransformedMethodReturnValueError(FlaxError):
    """A function under a lifted transform returned a module or a variable."""

    def __init__(self, name: object) -> None:
        super().__init__(
            f"Transformed module method {name} cannot return Modules or Variables: they exist only inside the "
            "transform. Return arrays (variable.value), or create the module outside and pass it in."
        )


class TraceContextError(FlaxError):
    """An object with state was changed inside a JAX transform that was entered after it was made."""


class LazyInitError(FlaxError):
    """``lazy_init`` found a variable whose initial value depends on an input of which only the shape was given."""

    def __init__(self, partial_val: object) -> None:
        super().__init__(
            f"Lazy init encountered a value of type {partial_val}: a variable depends on the value of an input that "
            "was passed to lazy_init as jax.ShapeDtypeStruct. Pass an array for that input, or initialise the variable "
            "from its shape only."
            + _wrong_right(
                "self.param('mean', lambda key: x.mean(0))", "self.param('mean', nn.initializers.zeros, x.shape[1:])"
            )
        )


# Variables, collections and random keys.


class InvalidRngError(FlaxError):
    """A random key is missing, or what was given is not one."""


class InvalidFilterError(FlaxError):
    """A collection filter is not a bool, a name, a collection of names or a ``DenyList``."""

    def __init__(self, filter_like: object) -> None:
        super().__init__(
            f'Invalid Filter: "{filter_like}" is of type {type(filter_like).__name__}. Pass True '
            "(all), False (none), a collection name such as 'batch_stats', a list of names, or nn.DenyList(names)."
        )


class InvalidScopeError(FlaxError):
    """A scope was used after the ``init`` or ``apply`` that made it had returned."""

    def __init__(self, scope_name: str | None) -> None:
        super().__init__(
            f'The scope "{scope_name or "/"}" is no longer valid: it was used after the call of init or apply that '
            "created it had returned. Return arrays from that call, not modules or scopes; or use module.bind."
        )


class ApplyScopeInvalidVariablesTypeError(FlaxError):
    """The variables given to ``apply`` or ``bind`` are not a dict of collections."""

    def __init__(self) -> None:
        super().__init__(
            "The first argument passed to an apply function should be a dictionary of collections. Each collection "
            "should be a dictionary with string keys, as init returns it."
            + _wrong_right("model.apply(params, x)", "model.apply({'params': params}, x)")
        )


class ApplyScopeInvalidVariablesStructureError(FlaxError):
    """The variables have a doubled layer: ``{"params": {"params": ...}}``."""

    def __init__(self, variables: object) -> None:
        super().__init__(
            "apply() takes the collections that init returned, but got a dict with an extra params layer: "
            '{"params": {"params": ...}}.'
            + _wrong_right(
                "variables = model.init(key, x)\nmodel.apply({'params': variables}, x)",
                "variables = model.init(key, x)\nmodel.apply(variables, x)",
            )
        )


class ScopeCollectionNotFound(FlaxError):
    """A variable was read from a collection that was not given at all."""

    def __init__(self, col_name: str, var_name: str, scope_path: str, given: Iterable[str] = ()) -> None:
        super().__init__(
            f'Tried to access "{var_name}" from collection "{col_name}" in "{scope_path}" but the collection is empty. '
            f"apply was given {_listed(given)}. Pass the collection too, as in "
            f'model.apply({{"{col_name}": ...}}, x); init returns all of them.'
        )


class ScopeParamNotFoundError(FlaxError):
    """A parameter that a module declares is not among those given to ``apply``."""

    def __init__(self, param_name: str, scope_path: str) -> None:
        super().__init__(
            f'Could not find parameter named "{param_name}" in scope "{scope_path}". Either the params passed to apply '
            "belong to another model or configuration, or a module was renamed: compare their tree with "
            "jax.eval_shape(model.init, key, x)."
        )


class ScopeVariableNotFoundError(FlaxError):
    """A variable that a module declares is neither given nor can be created."""

    def __init__(self, name: str, col: str, scope_path: str) -> None:
        super().__init__(
            f'No Variable named "{name}" for collection "{col}" exists in "{scope_path}", and the collection is not '
            f'mutable in this call, so it cannot be created. Pass a value for it, or call apply with mutable=["{col}"].'
        )


class ScopeParamShapeError(FlaxError):
    """A given parameter has another shape than its initialiser would make."""

    def __init__(
        self, param_name: str, scope_path: str, value_shape: tuple[int, ...], init_shape: tuple[int, ...]
    ) -> None:
        super().__init__(
            f'For parameter "{param_name}" in "{scope_path}", the given initializer is expected to generate shape '
            f"{init_shape}, but the existing parameter it received has shape {value_shape}. Check that the model's "
            "configuration and the shape of its input are those that the parameters were made for."
        )


class ModifyScopeVariableError(FlaxError):
    """A variable of an immutable collection was assigned to."""

    def __init__(self, col: str, variable_name: str, scope_path: str) -> None:
        super().__init__(
            f'Cannot update variable "{variable_name}" in "{scope_path}" because collection "{col}" is immutable in '
            "this call; make it mutable."
            + _wrong_right(
                "y = model.apply(variables, x)", f"y, updates = model.apply(variables, x, mutable=['{col}'])"
            )
        )


class ImmutableVariableError(FlaxError):
    """A variable that may not change was assigned to."""

    def __init__(self, message: str) -> None:
        super().__init__(message)


class PartitioningUnspecifiedError(FlaxError):
    """A transform adds an axis to a ``Partitioned`` variable and was not told the axis's name."""

    def __init__(self, target: object) -> None:
        super().__init__(
            'Trying to transform a Partitioned variable but "partition_name" is not specified in metadata_params: '
            f"{target}. Name the axis that the transform adds or removes: "
            "metadata_params={nn.PARTITION_NAME: 'layers'} (or None for a replicated axis) to the transform."
        )


# Writing and calling modules.


class NameInUseError(FlaxError):
    """Two submodules, or a submodule and a variable, have the same name."""

    def __init__(self, key_type: str, value: str, module_name: str) -> None:
        super().__init__(
            f'Could not create {key_type} "{value}" in Module {module_name}: Name in use. Names of '
            "submodules, parameters and variables of one module must differ; to use a submodule twice, create it "
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
            f"Submodule {cls} must be defined in `setup()` or in a method wrapped in `@compact`, where its parent can "
            "give it a name."
            + _wrong_right(
                f"def __call__(self, x):\n    return {cls}(...)(x)",
                f"@nn.compact\ndef __call__(self, x):\n    return {cls}(...)(x)",
            )
        )


class MultipleMethodsCompactError(FlaxError):
    """More than one method of a class is marked ``@compact``, where only one may be."""

    def __init__(self) -> None:
        super().__init__("Only one method per class can be @compact; create what the others use in setup().")


class SetAttributeInModuleSetupError(FlaxError):
    """A dataclass field was assigned to inside ``setup``."""

    def __init__(self) -> None:
        super().__init__(
            "Module construction attributes are frozen: setup() cannot reassign a field. Derive a new attribute."
            + _wrong_right(
                "def setup(self):\n    self.features = 4 * self.features",
                "def setup(self):\n    self.hidden = 4 * self.features",
            )
        )


class SetAttributeFrozenModuleError(FlaxError):
    """An attribute was assigned to outside ``setup``."""

    def __init__(self, module_cls: str, attr_name: str, attr_val: object) -> None:
        super().__init__(
            f"Can't set {attr_name}={attr_val} for Module of type {module_cls}: Module instance is frozen outside of "
            "setup method. Assign to attributes in setup(), keep state in self.variable(...), and make changed copies "
            f"with module.clone({attr_name}=...)."
        )


class ReservedModuleAttributeError(FlaxError):
    """A module class declares ``parent`` or ``name`` with another type."""

    def __init__(self, annotations: object) -> None:
        super().__init__(f"properties `parent` and `name` are reserved: {annotations}. Rename yours.")


class ApplyModuleInvalidMethodError(FlaxError):
    """What was passed as ``method`` cannot be called with the module as first argument."""

    def __init__(self, method: object) -> None:
        super().__init__(
            f"Cannot call apply(): {method} is not a valid function for apply(): its first argument must "
            "be the module. Pass method='encode', method=Model.encode or method=lambda module, x: module.encode(x)."
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
            "Can't call compact methods on unbound modules, nor setup(): init, apply and bind call it. To reach "
            "what it defines, use module.bind(variables)."
            + _wrong_right(
                "model.setup()\nencoder = model.encoder",
                "encoder = model.bind(variables).encoder",
            )
        )


class CallUnbindOnUnboundModuleError(FlaxError):
    """``unbind`` was called on a module that is not bound."""

    def __init__(self) -> None:
        super().__init__(
            "Can't call `unbind()` on unbound modules."
            + _wrong_right(
                "module, variables = model.unbind()", "module, variables = model.bind(variables).encoder.unbind()"
            )
        )


class CallShareScopeOnUnboundModuleError(FlaxError):
    """``share_scope`` was called with an unbound module."""

    def __init__(self) -> None:
        super().__init__(
            "Can't call `share_scope` on unbound modules. Call it in setup(), where both modules are bound."
        )


class InvalidInstanceModuleError(FlaxError):
    """``init``, ``apply`` or another method was called on a class instead of an instance."""

    def __init__(self) -> None:
        super().__init__(
            "Can only call init, init_with_output or apply methods on an instance of the Module class, and bind too. "
            "This is a class." + _wrong_right("nn.Dense.init(key, x)", "nn.Dense(features=4).init(key, x)")
        )


class IncorrectPostInitOverrideError(FlaxError):
    """A module class overrides ``__post_init__`` and does not call the original."""

    def __init__(self) -> None:
        super().__init__(
            "Overrode `.__post_init__()` without calling `super().__post_init__()`."
            + _wrong_right(
                "def __post_init__(self):\n    self.hidden = 4 * self.features",
                "def __post_init__(self):\n    self.hidden = 4 * self.features\n    super().__post_init__()",
            )
        )


class DescriptorAttributeError(FlaxError):
    """A property of a module read an attribute that does not exist."""

    def __init__(self, name: str = "", module_cls: str = "") -> None:
        super().__init__(
            f"Trying to access a property that is accessing a non-existent attribute: {name!r} of {module_cls}; the "
            "error above names the attribute."
        )


# Files and trees.


class AlreadyExistsError(FlaxError):
    """A file exists and must not be overwritten."""

    def __init__(self, path: object) -> None:
        super().__init__(
            f'Trying overwrite an existing file: "{path}". Pass overwrite=True to replace it, or write to another path.'
        )


class InvalidCheckpointError(FlaxError, ValueError):
    """A checkpoint was to be saved where there is one of the same or a later step."""

    def __init__(self, path: str, step: object) -> None:
        super().__init__(
            f'Trying to save an outdated checkpoint at step: "{step}" and path: "{path}". There is one of this step or '
            "a later one: restore that and go on from there, save in another folder, or pass overwrite=True to replace "
            "it and all after it."
        )


class MPACheckpointingRequiredError(FlaxError):
    """A checkpoint in Flax's older format keeps arrays of several processes elsewhere."""

    def __init__(self, path: str, step: object) -> None:
        super().__init__(
            f"The checkpoint {path} (step {step}) refers to arrays of several processes in {path}_gda, a format from "
            "before Orbax that cannot be read here. Restore it with Flax, and save it again with Orbax."
        )


class MPARestoreTargetRequiredError(FlaxError):
    """An array that lies on several processes was to be restored without a target that says how it lies."""

    def __init__(self, path: object, step: object, key: object = None) -> None:
        where = f", array {key}" if key else ""
        super().__init__(
            f'The checkpoint "{path}" of step {step}{where} was saved from several processes: pass a target with an '
            "array of the wanted sharding at that place, or allow_partial_mpa_restoration=True to leave it out."
        )


class MPARestoreDataCorruptedError(FlaxError):
    """A saved array that lies on several processes is incomplete."""

    def __init__(self, step: object, path: object) -> None:
        super().__init__(
            f'The array "{path}" of step {step} has no "commit_success.txt": its save did not finish. Restore an '
            "earlier step."
        )


class CursorFindError(FlaxError):
    """A search of a tree that must find exactly one object found none, or several."""

    def __init__(self, cursor: Any = None, cursor2: Any = None) -> None:
        if cursor is not None and cursor2 is not None:
            super().__init__(
                "More than one object found given the conditions of the cond_fn. The first two objects found have the "
                f"following paths: {cursor._path} and {cursor2._path} . Narrow the condition, or use find_all."
            )
        else:
            super().__init__("No object found given the conditions of the cond_fn. Paths are like 'params/dense/bias'.")


class TraverseTreeError(FlaxError):
    """A tree was to be traversed with both or neither of an update and a condition."""

    def __init__(self, update_fn: object, cond_fn: object) -> None:
        given = "None" if update_fn is None and cond_fn is None else "not None"
        super().__init__(f"Both update_fn and cond_fn are {given}. Exactly one of them must be {given}.")
