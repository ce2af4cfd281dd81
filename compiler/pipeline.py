"""The pipeline: the passes in order, each verified and, on request, dumped.

capture -> fold -> merge -> attention -> serve -> emit -> validate.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from distaff.compiler.analysis.tokens import Kind, TokenClasses, classify_tokens
from distaff.compiler.capture import capture
from distaff.compiler.ir import Graph, StoredBlocks
from distaff.compiler.ir.printer import print_graph
from distaff.compiler.ir.verifier import verify
from distaff.compiler.lowering.emit import collect_weights, emit
from distaff.compiler.passes.attention import AttentionFinding, raise_attention
from distaff.compiler.passes.cleanup import fold_constants, merge_equal
from distaff.compiler.passes.matmul import raise_matmuls
from distaff.compiler.passes.pack import PackedMatrix, WeightFormats, pack_weights
from distaff.compiler.passes.roll import LayerLoop, find_layer_loop
from distaff.compiler.passes.rotary import fold_rotary
from distaff.compiler.passes.serve import ServePlan, bytes_per_token, plan_serving
from distaff.compiler.quality import compare_on_text
from distaff.compiler.serve_step import ServeStep
from distaff.compiler.validate import TOLERANCE, float32_products, validate

_NONE: Mapping[str, StoredBlocks] = MappingProxyType({})


@dataclasses.dataclass
class Derivation:
    """A derived program with what the passes found on the way."""

    plan: ServePlan
    findings: list[AttentionFinding]
    passes: list[dict[str, Any]]


def derive(
    fn: Callable[[Any, Any], Any],
    params: Any,
    *,
    max_model_len: int,
    latent_cache: bool = False,
    raise_products: bool = False,
    stored: Mapping[str, StoredBlocks] = _NONE,
    kv_dtype: str | None = None,
    dump: str | os.PathLike[str] | None = None,
) -> Derivation:
    """Captures ``fn(params, tokens[1, S])`` and derives its serving plan, or refuses with the user's line.

    Raises the errors of `distaff.compiler.errors`. With ``raise_products`` products with weights become operations
    that can be packed; ``stored`` as in `derive_serve_step`. ``dump`` is a folder for the IR after each pass.
    """
    log = _PassLog(dump)
    captured = capture(fn, params, max_model_len)
    graph = log.run("capture", lambda: captured.graph)
    graph = log.run("fold_constants", lambda: fold_constants(graph))
    graph = log.run("merge_equal", lambda: merge_equal(graph))
    classes = classify_tokens(graph)
    if captured.leaks:
        raise captured.leaks[0]
    findings: list[AttentionFinding] = []

    def attention() -> Graph:
        raised, found = raise_attention(graph, classes, max_model_len, latent=latent_cache)
        findings.extend(found)
        return raised

    raised = log.run("attention", attention, classes)
    if raise_products:
        products = raised
        raised = log.run("matmul", lambda: raise_matmuls(products, classes, stored), classes)
        turned = raised
        raised = log.run("rotary", lambda: fold_rotary(turned, classes, max_model_len), classes)
    return Derivation(plan_serving(raised, classes, kv_dtype=kv_dtype), findings, log.entries)


def derive_serve_step(
    fn: Callable[[Any, Any], Any],
    params: Any,
    *,
    max_model_len: int,
    page_size: int = 16,
    latent_cache: bool = False,
    weight_formats: WeightFormats | None = None,
    stored: Mapping[str, StoredBlocks] = _NONE,
    kv_dtype: str | None = None,
    passages: Sequence[Sequence[int]] = (),
    roll_layers: bool | None = None,
    dump: str | os.PathLike[str] | None = None,
) -> ServeStep:
    """Derives and validates the serving step of ``fn``; the report tells what was found and measured.

    ``latent_cache`` caches what keys and values are expanded from where that is smaller. ``weight_formats`` packs the
    weights for the kernels that read such formats; the derivation is validated before that, with the plain weights,
    and again afterwards within what the formats lose, which is measured on ``passages`` (texts of token ids, see
    `compare_on_text`). Weights that a checkpoint holds quantised can be packed as they are: ``stored`` gives them by
    the path of their leaf in ``params``, keys joined by dots. ``kv_dtype`` is the type of the caches; int8 is measured
    on the ``passages`` too. ``roll_layers`` runs repeated layers in a loop (default: on every platform but CPUs, where
    it is slower).
    """
    derivation = derive(
        fn, params, max_model_len=max_model_len, latent_cache=latent_cache,
        raise_products=weight_formats is not None, stored=stored, kv_dtype=kv_dtype, dump=dump,
    )  # fmt: skip
    plan = derivation.plan
    rolling = jax.default_backend() != "cpu" if roll_layers is None else roll_layers
    report: dict[str, Any] = {
        "attentions": [_finding(f) for f in derivation.findings],
        "kv_bytes_per_token": bytes_per_token(plan.caches),
    }
    last_only = plan.classes[plan.graph.outputs[0]] is Kind.REQUEST
    check = functools.partial(_validated, fn, params, max_model_len, page_size, last_only)
    dtypes = {str(v.type.dtype) for n in plan.graph.nodes for v in n.outputs}
    dtypes.add("int8_cache" if kv_dtype == "int8" else str(kv_dtype))
    lowest = next((d for d in ("int8_cache", "bfloat16", "float16") if d in dtypes), float32_products())
    step, loop = _emitted(plan, rolling)
    report["validation"] = check(step, lowest)
    if weight_formats is not None:
        packed = pack_weights(plan.graph, weight_formats, plan.vocab_size, stored)
        report["weights"] = _packed(packed)
        step, loop = _emitted(plan, rolling)
        step = dataclasses.replace(step, weight_format=_main_format(packed))
        # Of weights that are as they were, only the activations are rounded: to int8.
        kinds = {"int8" if p.as_stored else p.format.kind for p in packed} | {lowest}
        report["validation_of_packed_weights"] = check(step, min(kinds, key=list(TOLERANCE).index))
    if passages and (weight_formats is not None or kv_dtype == "int8"):
        quality = compare_on_text(step, fn, params, passages, max_model_len=max_model_len, page_size=page_size)
        report["quality_on_text"] = dataclasses.asdict(quality)
    report |= {"passes": derivation.passes, "rolled_layers": loop.count if loop is not None else 0}
    return dataclasses.replace(step, report=report)


def _emitted(plan: ServePlan, rolling: bool) -> tuple[ServeStep, LayerLoop | None]:
    loop = find_layer_loop(plan) if rolling else None
    weights = collect_weights(plan, loop)
    function = emit(plan, weights, loop)
    step = ServeStep(weights.arrays, plan.caches, plan.vocab_size, function, of_products=weights.of_products)
    return step, loop


def _validated(
    fn: Callable[[Any, Any], Any],
    params: Any,
    max_model_len: int,
    page_size: int,
    last_only: bool,
    step: ServeStep,
    precision: str,
) -> dict[str, Any]:
    """Validates a step and returns what the report says of it."""
    started = time.perf_counter()
    result = validate(
        step, fn, params, max_model_len=max_model_len, page_size=page_size, precision=precision, last_only=last_only
    )
    return {
        "max_error": result.max_error,
        "largest_logit": result.scale,
        "relative_error": result.relative,
        "rows": result.rows,
        "seconds": time.perf_counter() - started,
    }


def _main_format(packed: list[PackedMatrix]) -> str | None:
    """The kind of number that most weights are; None if none is packed."""
    sizes: Counter[str] = Counter()
    for matrix in packed:
        sizes[matrix.format.kind] += matrix.parameters
    return sizes.most_common(1)[0][0] if sizes else None


def _packed(packed: list[PackedMatrix]) -> list[dict[str, Any]]:
    """Matrices by format: how many, how many of them as the checkpoint has them, their parameters and bytes."""
    rows: dict[str, dict[str, Any]] = {}
    for matrix in packed:
        name = matrix.format.name
        row = rows.setdefault(name, {"format": name, "matrices": 0, "as_stored": 0, "parameters": 0, "bytes": 0})
        row["matrices"] += 1
        row["as_stored"] += matrix.as_stored
        row["parameters"] += matrix.parameters
        row["bytes"] += matrix.bytes
    return list(rows.values())


def _finding(finding: AttentionFinding) -> dict[str, Any]:
    spec = finding.spec
    attributes: dict[str, Any] = {"mask": finding.visibility.kind, "window": finding.visibility.window}
    if spec is not None:
        attributes |= {"scale": spec.scale, "softcap": spec.softcap, "alibi": spec.slopes is not None}
    return {
        "location": str(finding.location),
        "served_by": finding.served_by,
        "reason": finding.reason,
        **{k: v for k, v in attributes.items() if v not in (None, False)},
    }


class _PassLog:
    """Runs passes, verifies and dumps what they return, and keeps node counts and times for the report."""

    def __init__(self, dump: str | os.PathLike[str] | None) -> None:
        self.folder = Path(dump) if dump is not None else None
        self.entries: list[dict[str, Any]] = []
        self.nodes = 0

    def run(self, name: str, make: Callable[[], Graph], classes: TokenClasses | None = None) -> Graph:
        started = time.perf_counter()
        graph = make()
        verify(graph, name)
        self.entries.append(
            {
                "name": name,
                "nodes_before": self.nodes,
                "nodes": len(graph.nodes),
                "seconds": time.perf_counter() - started,
            }
        )
        self.nodes = len(graph.nodes)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            notes = {} if classes is None else {i: f"<{k.name.lower()}>" for i, k in classes.kinds.items()}
            (self.folder / f"{len(self.entries)}-{name}.txt").write_text(print_graph(graph, annotations=notes))
        return graph
