"""Every layer and function of ``flax.linen`` that is one here too has Flax's fields and arguments, in their order."""

import dataclasses
import inspect

import pytest

from distaff.frontend import linen as nn

LAYERS = """
    BatchNorm Bidirectional Conv ConvLSTMCell ConvLocal ConvTranspose Dense DenseGeneral Dropout Einsum Embed
    Fp8DirectDotGeneralOp Fp8DotGeneral Fp8DotGeneralOp Fp8Einsum GRUCell GroupNorm InstanceNorm LSTMCell LayerNorm
    MGUCell MultiHeadAttention MultiHeadDotProductAttention NANOOFp8DotGeneralOp OptimizedLSTMCell PReLU RMSNorm RNN
    RNNCellBase SelfAttention Sequential SimpleCell SpectralNorm WeightNorm
""".split()
FUNCTIONS = """
    avg_pool combine_masks dot_product_attention dot_product_attention_weights make_attention_mask make_causal_mask
    max_pool merge_param pool
""".split()
MODULES = """
    activation attention combinators dtypes fp8_ops initializers linear normalization pooling recurrent stochastic
""".split()

INTERNAL = """
    DenseParams Fp8MetaTyRules PromoteDtypeFn RNNBase dot_general_transpose_lhs
    dot_general_transpose_rhs dot_general_with_precision_jvp fp8_meta_dtype fp8_meta_dtype_wrapper in_q_bwd in_q_fwd
    in_qdq_bwd in_qdq_fwd out_dq_bwd out_dq_fwd out_qdq_bwd out_qdq_fwd quantized_dot_bwd quantized_dot_fwd
""".split()


def arguments(fn):
    return [
        (p.name, p.kind, None if callable(p.default) else p.default) for p in inspect.signature(fn).parameters.values()
    ]


@pytest.mark.parametrize("name", LAYERS)
def test_layer(flax_nn, name):
    ours, theirs = getattr(nn, name), getattr(flax_nn, name)
    assert ours.__name__ == theirs.__name__  # of which default names of submodules are made
    fields = [[f for f in dataclasses.fields(cls) if f.name not in ("parent", "name")] for cls in (ours, theirs)]
    for mine, other in zip(*fields, strict=True):
        assert (mine.name, mine.kw_only) == (other.name, other.kw_only)
        if not callable(other.default):
            assert mine.default == other.default, mine.name
    for method in ("__call__", "attend", "initialize_carry"):
        if hasattr(theirs, method) and theirs is not flax_nn.RNNCellBase and "DotGeneral" not in name:
            assert arguments(getattr(ours, method)) == arguments(getattr(theirs, method)), method


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function(flax_nn, name):
    assert arguments(getattr(nn, name)) == arguments(getattr(flax_nn, name))


@pytest.mark.parametrize("module", MODULES)
def test_public_names_of_submodules(flax_nn, module):
    """What Flax's submodules define themselves can be imported from ours by the same path."""
    theirs = getattr(flax_nn, module)
    defined = {name for name, value in vars(theirs).items() if getattr(value, "__module__", None) == theirs.__name__}
    public = {name for name in defined if len(name) > 1 and not name.startswith("_") and name not in INTERNAL}
    assert public
    assert not {name for name in public if not hasattr(getattr(nn, module), name)}
