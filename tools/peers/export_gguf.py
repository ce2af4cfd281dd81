"""``python export_gguf.py FILE.gguf FOLDER``: a GGUF model as a Hugging Face folder with float32 weights."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    """Writes the folder; one with this name is complete."""
    source, target = Path(sys.argv[1]), Path(sys.argv[2])
    partial = target.with_name(f"{target.name}.partial")
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # What came from a GGUF file refuses to be saved, though its weights are plain by now; a model made anew does not.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(partial)
    partial.replace(target)


if __name__ == "__main__":
    main()
