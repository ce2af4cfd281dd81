"""Rewrites a GGUF file with other weights: ``python requantize.py SOURCE TARGET TYPE``, by llama.cpp's own code.

TYPE is a name of llama.cpp's file types, as in ``LLAMA_FTYPE_MOSTLY_Q4_0``: "Q4_0", "BF16" and so on.
"""

from __future__ import annotations

import sys

import llama_cpp


def main() -> None:
    """Entry point; exit code 1 if llama.cpp refuses."""
    source, target, form = sys.argv[1:]
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{form}")
    params.allow_requantize = True
    status = llama_cpp.llama_model_quantize(source.encode(), target.encode(), params)
    if status:
        sys.exit(f"llama_model_quantize returned {status}")


if __name__ == "__main__":
    main()
