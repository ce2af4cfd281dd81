"""Errors of the module system: one class a mistake, named as in ``flax.errors``.

Each message says what was wrong and where (the module path), and what to do about it; where a mistake is about how code
is written, it shows the wrong and the right form. It ends with the line of the user's code that led there.
"""

from __future__ import annotations

import sys
import sysconfig
import textwrap
from pathlib import Path
from types import FrameType
from typing import Any

# Code that users call and did not write: ours, JAX's, Python's own.
_OWN = str(Path(__file__).parent) + "/"
_STDLIB = sysconfig.get_paths()["stdlib"] + "/"


def is_user_code(filename: str) -> bool:
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
            "Lifted transforms take a module class, or a function with a module as its first argument; got "
            f"{target!r}."
            + _wrong_right(
                "y = nn.vmap(nn.Dense(4))(x)",
                "y = nn.vmap(nn.Dense)(4)(x)  # or nn.vmap(lambda module, x: module(x))(nn.Dense(4), x)",
            )
        )


class TransformedMethodReturnValueError(FlaxError):
    """A function under a lifted transform returned a module or a variable."""

    def __init__(self, name: object) -> None:
        super().__init__(
            f"The transformed method {name} returned a module or a variable, which exist only inside the transform. "
            "Return arrays (variable.value), or create the module outside and pass it in."
        )


class TraceContextError(FlaxError):
    """An object with state was changed inside a JAX transform that was entered after it was made."""


class LazyInitError(FlaxError):
    """``lazy_init`` found a variable whose initial value depends on an input of which only the shape was given."""

    def __init__(self, partial_val: object) -> None:
        super().__init__(
            f"A variable of type {partial_val} depends on the value of an input that was passed to lazy_init as "
            "jax.ShapeDtypeStruct. Pass an array for that input, or initialise the variable from its shape only."
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


class ImmutableVariableError(FlaxError):
    """A variable that may not change was assigned to."""

    def __init__(self, message: str) -> None:
        super().__init__(message)


class PartitioningUnspecifiedError(FlaxError):
    """A transform adds an axis to a ``Partitioned`` variable and was not told the axis's name."""

    def __init__(self, target: object) -> None:
        super().__init__(
            f"A transform adds or removes an axis of the partitioned variable {target}, but does not name it. Pass "
            "metadata_params={nn.PARTITION_NAME: 'layers'} (or None for a replicated axis) to the transform."
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


class MultipleMethodsCompactError(FlaxError):
    """More than one method of a class is marked ``@compact``, where only one may be."""

    def __init__(self) -> None:
        super().__init__(
            "Only one method of this class may be marked @nn.compact; create what the others use in setup()."
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


# Files and trees.


class AlreadyExistsError(FlaxError):
    """A file exists and must not be overwritten."""

    def __init__(self, path: object) -> None:
        super().__init__(f'The file "{path}" exists. Pass overwrite=True to replace it, or write to another path.')


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
            found = f"more than one object, the first two at {cursor._path} and {cursor2._path}"
        else:
            found = "no object"
        super().__init__(f"The condition was to match exactly one object and matched {found}. Change the condition.")


class TraverseTreeError(FlaxError):
    """A tree was to be traversed with both or neither of an update and a condition."""

    def __init__(self, update_fn: object, cond_fn: object) -> None:
        given = "neither" if update_fn is None and cond_fn is None else "both"
        super().__init__(f"Pass exactly one of update_fn and cond_fn; {given} were given.")
