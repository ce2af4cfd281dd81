"""The real checkpoint, a Q4_1 file, served with its own blocks: as large as the file, and of the same mind."""

import pytest

from distaff.compiler.pipeline import derive_serve_step
from distaff.frontend.loading.demo_model import find_demo_model
from distaff.kernels import native
from distaff.tools.compile_on_demand import CompileOptions, passages

gguf = pytest.importorskip("gguf")


@pytest.mark.skipif(not native.available(), reason="the native module was not built")
def test_blocks_are_served_as_they_are(smollm2):
    options = CompileOptions(max_model_len=256)
    step = derive_serve_step(
        smollm2.apply,
        smollm2.params,
        max_model_len=256,
        weight_formats=options.weight_formats(),
        stored=options.stored(smollm2),
        kv_dtype="float32",
        passages=passages(smollm2, options),
    )
    rows = {row["format"]: (row["matrices"], row["as_stored"]) for row in step.report["weights"]}
    assert rows == {"q4_1": (120, 120), "int8g32": (1, 1)}
    in_file = sum(int(tensor.n_bytes) for tensor in gguf.GGUFReader(find_demo_model()).tensors)
    assert sum(array.nbytes for array in step.weights.values()) == pytest.approx(in_file, rel=0.01)
    # Against the dequantised model in float32; what is left is that activations are rounded to int8.
    quality = step.report["quality_on_text"]
    assert quality["tokens"] > 500 and quality["top1_agreement"] > 0.95
    assert quality["perplexity"] == pytest.approx(quality["plain_perplexity"], rel=0.01)
