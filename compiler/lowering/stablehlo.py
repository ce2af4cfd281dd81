"""What lowering checks and reports about a program's StableHLO text: donation, operations, source lines."""

from __future__ import annotations

import re
from collections import Counter

_MAIN = re.compile(r"func\.func public @main\((.*?)\) -> ", re.DOTALL)
_ARGUMENT = re.compile(r"%arg(\d+): ([^%]*)", re.DOTALL)
_OPERATION = re.compile(r"(?<!#)\b(?:stablehlo|chlo|func)\.([a-z_]+)")
_CUSTOM_CALL = re.compile(r"custom_call @([\w.$]+)")
_FILE = re.compile(r'loc\("([^"]+\.py)":\d+')
# Regions and functions are structure, not work.
_STRUCTURE = frozenset({"return", "func", "call"})


def donated_arguments(text: str) -> set[int]:
    """Positions of the arguments of ``@main`` whose buffers an output may take over."""
    main = _MAIN.search(text)
    if main is None:
        raise ValueError("the module has no public function @main")
    return {
        int(position)
        for position, attributes in _ARGUMENT.findall(main[1])
        if "tf.aliasing_output" in attributes or "jax.buffer_donor" in attributes
    }


def operation_counts(text: str) -> dict[str, int]:
    """How often each operation stands in the text, most frequent first; bodies of loops count once."""
    counts = Counter(name for name in _OPERATION.findall(text) if name not in _STRUCTURE)
    return dict(counts.most_common())


def custom_calls(text: str) -> set[str]:
    """Targets of custom calls: code that XLA does not make itself and the runtime must have registered."""
    return set(_CUSTOM_CALL.findall(text))


def source_files(text: str) -> set[str]:
    """Python files that operations say they come from (needs a text with debug information)."""
    return set(_FILE.findall(text))
