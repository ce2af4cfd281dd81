"""The phrases of Flax's messages that tests and handlers of other code look for begin ours too."""

import pytest

from distaff.frontend import errors

PHRASES = [
    ("ApplyModuleInvalidMethodError", ("method",), "Cannot call apply(): method is not a valid function for apply()"),
    ("ApplyScopeInvalidVariablesStructureError", ({},), "but got a dict with an extra params layer"),
    ("ApplyScopeInvalidVariablesTypeError", (), "first argument passed to an apply function should be a dictionary"),
    ("AssignSubModuleError", ("Dense",), "Dense must be defined in `setup()` or in a method wrapped in `@compact`"),
    ("CallCompactUnboundModuleError", (), "Can't call compact methods on unbound modules"),
    ("CallSetupUnboundModuleError", (), "Can't call compact methods on unbound modules"),
    ("CallShareScopeOnUnboundModuleError", (), "Can't call `share_scope` on unbound modules"),
    ("CallUnbindOnUnboundModuleError", (), "Can't call `unbind()` on unbound modules"),
    ("CursorFindError", (), "No object found given the conditions of the cond_fn"),
    ("DescriptorAttributeError", (), "Trying to access a property that is accessing a non-existent attribute"),
    ("IncorrectPostInitOverrideError", (), "Overrode `.__post_init__()` without calling `super().__post_init__()`"),
    ("InvalidCheckpointError", ("a", 3), 'Trying to save an outdated checkpoint at step: "3" and path: "a".'),
    ("InvalidFilterError", (3,), 'Invalid Filter: "3"'),
    ("InvalidInstanceModuleError", (), "Can only call init, init_with_output or apply methods on an instance of the"),
    ("InvalidScopeError", ("a",), 'The scope "a" is no longer valid'),
    ("JaxTransformError", (), "cannot be mixed"),
    ("LazyInitError", ("x",), "Lazy init encountered a value"),
    ("ModifyScopeVariableError", ("stats", "x", "/"), 'Cannot update variable "x" in "/" because collection "stats"'),
    ("MultipleMethodsCompactError", (), "Only one method per class can be @compact"),
    ("NameInUseError", ("param", "bias", "Dense"), 'Could not create param "bias" in Module Dense: Name in use.'),
    ("PartitioningUnspecifiedError", ("x",), '"partition_name" is not specified in metadata_params: x'),
    ("ReservedModuleAttributeError", ("x",), "properties `parent` and `name` are reserved: x"),
    ("ScopeCollectionNotFound", ("stats", "x", "/"), 'Tried to access "x" from collection "stats" in "/" but the coll'),
    ("ScopeParamNotFoundError", ("x", "/"), 'Could not find parameter named "x" in scope "/"'),
    ("ScopeParamShapeError", ("x", "/", (1,), (2,)), "expected to generate shape (2,), but the existing parameter it"),
    ("ScopeVariableNotFoundError", ("x", "stats", "/"), 'No Variable named "x" for collection "stats" exists in "/"'),
    ("SetAttributeFrozenModuleError", ("Foo", "i", 2), "Can't set i=2 for Module of type Foo: Module instance is froz"),
    ("TraverseTreeError", (None, None), "Both update_fn and cond_fn are None. Exactly one of them must be None."),
]


@pytest.mark.parametrize(("name", "args", "phrase"), PHRASES, ids=lambda x: x if isinstance(x, str) else None)
def test_phrase_is_in_both_messages(name, args, phrase):
    flax_errors = pytest.importorskip("flax.errors")
    assert phrase in str(getattr(flax_errors, name)(*args))
    assert phrase in str(getattr(errors, name)(*args))


def test_a_missing_collection_is_told_with_those_that_were_given():
    text = str(errors.ScopeCollectionNotFound("params", "kernel", "/dense", {"batch_stats": {}, "cache": {}}))
    assert 'apply was given the collections "batch_stats", "cache"' in text
    assert "apply was given no collections" in str(errors.ScopeCollectionNotFound("params", "kernel", "/dense"))
