"""The IR: capture, symbolic types, printed text, verification, clean-up and structural hashing."""

import jax
import jax.numpy as jnp
import model_zoo as zoo
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distaff.compiler.analysis.dims import TOUCHED, dim_map, register_dim_map
from distaff.compiler.capture import capture, probe_lengths
from distaff.compiler.errors import VerificationError
from distaff.compiler.ir import Graph, Node, Sym, TensorType, Value
from distaff.compiler.ir.evaluate import Evaluator
from distaff.compiler.ir.hashing import structural_key
from distaff.compiler.ir.printer import print_graph
from distaff.compiler.ir.verifier import verify
from distaff.compiler.passes.cleanup import fold_constants, merge_equal
from distaff.compiler.pipeline import derive

pytestmark = pytest.mark.smoke


def captured(model, params=None, length=64):
    return capture(model, zoo.parameters() if params is None else params, length).graph


def test_printed_text_of_a_small_model():
    graph = captured(lambda p, t: jnp.tanh(p["e"][t, :2] * 3.0), {"e": jnp.ones((5, 4))})
    text = print_graph(graph, locations=False)
    assert text.startswith("graph(%tokens: i32[1,S]) {\n")
    assert text.rstrip().endswith("}")
    assert "f32[1,S,2] = mul(" in text and "3.0:float32" in text and "@e" in text
    assert "test_ir.py:" in print_graph(graph)


def test_capture_evaluates_to_the_plain_model():
    params = zoo.parameters()
    model = zoo.decoder(zoo.softcap_window)
    graph = captured(model, params)
    tokens = np.random.default_rng(0).integers(0, zoo.VOCAB, (1, 13)).astype(np.int32)
    run = Evaluator({"S": 13}, {"S": jnp.arange(13)}, {id(graph.inputs[0]): tokens})
    run.run(graph.nodes)
    np.testing.assert_allclose(run[graph.outputs[0]], model(params, tokens), rtol=1e-5, atol=1e-5)


def test_folding_and_merging_keep_the_meaning_and_shrink_the_program():
    params = zoo.parameters()
    model = zoo.decoder(zoo.alibi)
    graph = captured(model, params)
    small = merge_equal(fold_constants(graph))
    verify(small, "clean-up")
    assert len(small.nodes) < len(captured(model, params).nodes)
    tokens = np.random.default_rng(1).integers(0, zoo.VOCAB, (1, 9)).astype(np.int32)
    run = Evaluator({"S": 9}, {"S": jnp.arange(9)}, {id(small.inputs[0]): tokens})
    run.run(small.nodes)
    np.testing.assert_allclose(run[small.outputs[0]], model(params, tokens), rtol=1e-5, atol=1e-5)


def test_a_large_shared_weight_is_not_copied_for_its_transpose():
    params = {"e": jnp.ones((700, 600))}
    tied = fold_constants(captured(lambda p, t: p["e"][t] @ p["e"].T, params))
    assert "transpose" in [n.op for n in tied.nodes]
    alone = fold_constants(captured(lambda p, t: jnp.ones((1, t.shape[1], 600)) * t[..., None] @ p["e"].T, params))
    assert "transpose" not in [n.op for n in alone.nodes]


def test_dump_writes_a_file_for_each_pass(tmp_path):
    derive(zoo.decoder(zoo.causal_where), zoo.parameters(), max_model_len=64, dump=tmp_path)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["1-capture.txt", "2-fold_constants.txt", "3-merge_equal.txt", "4-attention.txt"]
    raised = (tmp_path / "4-attention.txt").read_text()
    assert raised.count("= distaff.attention(") == zoo.LAYERS
    assert "exp(" not in raised.split("distaff.attention")[1].split("\n")[0]
    assert "<token>" in raised and "<index>" in raised


def test_equal_layers_hash_equal_and_changes_show():
    def block(scale):
        return captured(lambda p, t: jnp.tanh(p["e"][t] * scale), {"e": jnp.ones((5, 4))})

    assert structural_key(block(2.0)) == structural_key(block(2.0))
    assert structural_key(block(2.0)) != structural_key(block(2.5))


def test_the_verifier_names_the_pass_and_the_node():
    a = Value(TensorType((2,), np.dtype("float32")), name="a")
    lost = Value(TensorType((2,), np.dtype("float32")))
    node = Node.make("tanh", [lost], {}, [a.type], primitive=jax.lax.tanh_p)
    with pytest.raises(VerificationError, match=r"after pass demo: node 0 \(tanh"):
        verify(Graph((a,), [node], (node.output,)), "demo")


@given(st.integers(4, 100_000))
def test_probe_lengths_are_rising_and_served(longest):
    lengths = probe_lengths(longest)
    assert len(lengths) == 3 and list(lengths) == sorted(set(lengths)) and lengths[-1] <= longest


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_dimension_maps_agree_with_the_operations(data):
    """A kept dimension commutes with indexing: op(x)[.., i, ..] == op(x[.., i, ..]) up to the kept axis."""
    rank = data.draw(st.integers(2, 4))
    shape = tuple(data.draw(st.integers(2, 4)) for _ in range(rank))
    operations = {
        "transpose": lambda x: x.transpose(*np.random.default_rng(rank).permutation(rank)),
        "sum": lambda x: x.sum(rank - 1),
        "cumsum": lambda x: jnp.cumsum(x, 0),
        "reshape": lambda x: x.reshape(shape[0], -1),
        "broadcast": lambda x: jnp.broadcast_to(x, (3, *shape)),
        "sort": lambda x: jnp.sort(x, rank - 1),
        "expand": lambda x: x[:, None],
    }
    operation = operations[data.draw(st.sampled_from(sorted(operations)))]
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape))
    (equation,) = jax.make_jaxpr(operation)(x).eqns[-1:] if jax.make_jaxpr(operation)(x).eqns else [None]
    if equation is None or equation.primitive.name == "jit":
        return
    node = Node.make(
        equation.primitive.name,
        [Value(TensorType(v.aval.shape, v.aval.dtype)) for v in equation.invars],
        equation.params,
        [TensorType(v.aval.shape, v.aval.dtype) for v in equation.outvars],
        primitive=equation.primitive,
    )
    maps = dim_map(node)
    assert maps is not None
    changed = x.at[(0,) * rank].add(1.0)
    before, after = operation(x), operation(changed)
    differs = np.asarray(before != after)
    for dim, out in enumerate(maps[0]):
        if out is not None and out != TOUCHED:
            others = tuple(i for i in range(differs.ndim) if i != out)
            assert not differs.any(axis=others)[1:].any(), (equation, dim)


def test_the_table_cannot_be_overwritten():
    with pytest.raises(ValueError, match="already"):
        register_dim_map("dot_general", lambda params, shapes, out: [])


def test_symbolic_dimensions_print_and_resolve():
    kind = TensorType((1, Sym(), Sym("k", 2, -1), 8), np.dtype("float32"))
    assert str(kind) == "f32[1,S,2k-1,8]"
    assert kind.at({"S": 5, "k": 3}) == (1, 5, 5, 8)
    assert kind.token_dims == (1, 2) and kind.per_token() == (1, 8)
