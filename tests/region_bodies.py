"""Bodies of attention regions traced directly from small functions, for tests of the analyses."""

import jax
import numpy as np

from distaff.compiler import jax_compat
from distaff.compiler.ir import Graph, Location, Node, Sym, TensorType, Value

SIZES = {"q": 19, "k": 23}
_SHAPES = ("shape", "new_sizes", "limit_indices", "slice_sizes")


def body_of(function, *leaves, tables=()):
    """The graph of ``function(*leaves)``; a leaf is a shape with 'q' and 'k' for token dimensions, or (shape, dtype).

    ``tables`` gives, for arrays that the function closes over, pairs of the array as traced and the longest one.
    """
    specs = [(s[0], s[1]) if s and isinstance(s[0], tuple) else (s, np.float32) for s in leaves]
    inputs = tuple(
        Value(TensorType(tuple(Sym(d) if isinstance(d, str) else d for d in shape), np.dtype(dtype)), name=f"leaf{i}")
        for i, (shape, dtype) in enumerate(specs)
    )
    avals = [jax.ShapeDtypeStruct(v.type.at(SIZES), v.type.dtype) for v in inputs]
    traced = jax_compat.trace(function, *avals)
    nodes: list[Node] = []
    outputs = _inline(traced.jaxpr, [_constant(c, tables) for c in traced.consts], inputs, nodes, Location())
    return Graph(inputs, nodes, tuple(outputs))


def _inline(jaxpr, consts, args, nodes, at):
    env = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, args, strict=True))

    def read(atom):
        if isinstance(atom, jax_compat.Literal):
            return _constant(np.asarray(atom.val, atom.aval.dtype))
        return env[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        location = jax_compat.location_of(equation, [at])
        inner = jax_compat.inner_jaxpr(equation.params)
        if inner is not None:
            results = _inline(inner[0], [_constant(c) for c in inner[1]], inputs, nodes, location)
        else:
            params = {k: _symbolic(v) if k in _SHAPES else v for k, v in equation.params.items()}
            types = [TensorType(_symbolic(v.aval.shape), np.dtype(v.aval.dtype)) for v in equation.outvars]
            node = Node.make(equation.primitive.name, inputs, params, types, location, equation.primitive)
            nodes.append(node)
            results = node.outputs
        env.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _symbolic(shape):
    axes = {n: Sym(axis) for axis, n in SIZES.items()}
    return tuple(axes.get(d, d) for d in shape)


def _constant(array, tables=()):
    kind = TensorType(_symbolic(np.shape(array)), np.asarray(array).dtype)
    for short, long in tables:
        if np.shape(short) == np.shape(array) and np.array_equal(short, array):
            return Value(kind, data=long)
    return Value(kind, data=np.asarray(array))
