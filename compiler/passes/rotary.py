"""Folding rotary position embeddings into attention, where queries and keys are turned alike."""

from __future__ import annotations

import dataclasses

import numpy as np

from distaff.compiler.analysis.rotation import RotationReader
from distaff.compiler.analysis.tokens import TokenClasses
from distaff.compiler.ir import ATTENTION, Graph, Value
from distaff.compiler.passes.matmul import constant

_TOLERANCE = 1e-4


def fold_rotary(graph: Graph, classes: TokenClasses, max_model_len: int) -> Graph:
    """Makes attentions turn queries and keys themselves (``graph`` is changed); leaves alone what it cannot read.

    Such an attention takes two inputs more: tables of cosines and sines for ``max_model_len`` positions.
    """
    tables: dict[str, tuple[Value, Value]] = {}
    reader = RotationReader(graph, classes, max_model_len)
    for node in graph.nodes:
        if node.op != ATTENTION:
            continue
        pattern = node.params["pattern"]
        query, key, value = node.inputs
        of_query = reader.read(query, pattern.query)
        of_key = None if of_query is None else reader.read(key, pattern.key)
        if of_query is None or of_key is None or of_query.rotary != of_key.rotary:
            continue
        if not np.allclose(of_query.turns, of_key.turns, rtol=0, atol=_TOLERANCE):
            continue
        if of_key.key not in tables:
            cos, sin = of_key.tables(max_model_len)
            number = len(tables)
            tables[of_key.key] = constant(cos, f"rotary.{number}.cos"), constant(sin, f"rotary.{number}.sin")
        node.inputs = (of_query.source, of_key.source, value, *tables[of_key.key])
        node.params = {**node.params, "spec": dataclasses.replace(node.params["spec"], rotary=of_key.rotary)}
    return graph.reachable()
