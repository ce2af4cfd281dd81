"""compile-model: a checkpoint in, an artifact out that serve-model serves."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    from rich.console import Console

    from distaff.compiler.artifact import Manifest
    from distaff.frontend.loading import LoadedModel
    from distaff.runtime.executables import ExecutableRecord
    from distaff.tools.compile_on_demand import CompileOptions

# Exit codes; click itself exits with 2 for wrong usage.
OTHER, USAGE, REFUSED, CHECKPOINT = 1, 2, 3, 4

_HELP = """Compiles MODEL (a name that distaff knows, a Hugging Face folder or a GGUF file) into an artifact.

The serving step is derived from the model's plain forward pass, proved and validated against it, and written to OUTPUT
with the weights and the tokenizer. A model that cannot be served token by token is refused with the line of its code.

\b
Examples:
  compile-model smollm2-135m -o smollm2
  compile-model ./my-checkpoint -o served --max-model-len 4096 --max-batch 32
  compile-model ./my-checkpoint -o small --quantize int4
  compile-model ./my-checkpoint --check            can this be served, and how?
  compile-model ./my-checkpoint -o served --buckets "decode=1,8,64 mixed=128x8,512x64"

\b
Exit codes: 0 done, 1 other error, 2 wrong usage, 3 the model cannot be served, 4 the checkpoint cannot be read.
"""

_POSITIVE = click.IntRange(min=1)


@click.command(help=_HELP, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder of the artifact; needed unless --check.")
@click.option("--name", help="The model's name in the server's answers.  [default: that of MODEL]")
@click.option(
    "--dtype", default="auto", show_default=True, help="float32, bfloat16 or float16 weights; auto: by device."
)
@click.option(
    "--quantize", default="auto", show_default=True,
    help="Matrices as int8, int4, q4_1 …; gguf: as the file has them; none; auto: gguf where possible, else none.",
)  # fmt: skip
@click.option("--quantize-tables", help="Embedding and logits likewise.  [default: int8 for int4, else as --quantize]")
@click.option(
    "--kv-cache-dtype", type=click.Choice(["auto", "float32", "bfloat16", "int8"]), default="auto", show_default=True
)
@click.option("--max-model-len", type=_POSITIVE, help="Longest request, prompt and output.  [default: up to 8192]")
@click.option("--max-batch", type=_POSITIVE, default=64, show_default=True, help="Most requests in one step.")
@click.option("--max-step-tokens", type=_POSITIVE, default=512, show_default=True, help="Most tokens in one step.")
@click.option("--page-size", type=_POSITIVE, default=16, show_default=True, help="Tokens in one page of the KV pool.")
@click.option("--num-pages", type=click.IntRange(min=2), help="Pages of the KV pool.  [default: by memory and limits]")
@click.option("--buckets", help="Exactly these batch shapes, like 'decode=1,8 mixed=128x8 scoring=128x8'.")
@click.option("--latent-cache", is_flag=True, help="Cache what keys and values are made from where it is smaller.")
@click.option("--dump-ir", type=click.Path(path_type=Path), help="Folder for the program after each pass.")
@click.option(
    "--explain",
    is_flag=True,
    help="Also show all that was found in the model, what each pass did, and why kernels were passed over.",
)
@click.option("--check", is_flag=True, help="Only answer whether the model can be served; writes nothing.")
@click.option("--force", is_flag=True, help="Replace OUTPUT if it is an artifact.")
def main(
    model: str,
    output: Path | None,
    name: str | None,
    dump_ir: Path | None,
    explain: bool,
    check: bool,
    force: bool,
    **options: Any,
) -> None:
    """Entry point of the command line."""
    if output is None and not check:
        raise click.UsageError("give the artifact's folder with -o, or --check to write nothing")
    # Imported late, so that --help and wrong usage answer at once.
    from rich.console import Console

    from distaff.compiler.lowering.build import check_output
    from distaff.tools.compile_on_demand import CompileOptions, load

    console = Console()
    wanted = CompileOptions(**options)
    with _exit_codes():
        wanted.batch_shapes()
        if output is not None:
            check_output(output, force=force)
        loaded = load(model, wanted)
        if output is None or check:
            _check(console, loaded, wanted, dump_ir)
        else:
            _compile(console, loaded, output, wanted, name=name, dump_ir=dump_ir, explain=explain, force=force)


def _check(console: Console, loaded: LoadedModel, options: CompileOptions, dump_ir: Path | None) -> None:
    from distaff.compiler.pipeline import derive_serve_step
    from distaff.tools.report import show_report

    step = derive_serve_step(
        loaded.apply,
        loaded.params,
        max_model_len=options.model_len(loaded),
        page_size=options.page_size,
        latent_cache=options.latent_cache,
        weight_formats=options.weight_formats(),
        stored=options.stored(loaded),
        kv_dtype=options.kv_dtype(),
        dump=dump_ir,
    )
    show_report(console, step.report)
    console.print(f"[green]{loaded.name} can be served[/]")


def _compile(
    console: Console,
    loaded: LoadedModel,
    output: Path,
    options: CompileOptions,
    *,
    name: str | None,
    dump_ir: Path | None,
    explain: bool,
    force: bool,
) -> None:
    from distaff.tools import report as tables
    from distaff.tools.compile_on_demand import build_executables, compile_loaded

    began = time.perf_counter()
    with tables.live_status(console) as progress:
        manifest = compile_loaded(loaded, output, options, name=name, dump=dump_ir, force=force, progress=progress)
    programs = _program_rows(manifest, build_executables(output))
    report = {key: value for key, value in manifest.report.items() if key != "lowering"}
    tables.show_kernels(console, manifest.platform, passed_over=explain)
    (tables.show_report if explain else tables.show_summary)(console, report)
    tables.show_rows(console, "programs", programs)
    tables.show_facts(console, "artifact", tables.artifact_facts(manifest))
    console.print(f"[green]compiled[/] to {output} in {time.perf_counter() - began:.1f} s\nnext: serve-model {output}")


def _program_rows(manifest: Manifest, records: Sequence[ExecutableRecord]) -> list[dict[str, Any]]:
    """The model's programs (not the sampler's) with what exporting and compiling them took."""
    compiled = {record.name: record for record in records if record.compiled}
    return [
        {
            **row,
            "compile_seconds": compiled[row["name"]].seconds,
            "executable_bytes": compiled[row["name"]].bytes,
            "scratch_bytes": compiled[row["name"]].scratch_bytes,
        }
        for row in manifest.report["lowering"]["programs"]
    ]


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turns the errors that a user can do something about into a message on stderr and an exit code."""
    from distaff.compiler.artifact import ArtifactError
    from distaff.compiler.buckets import BucketError
    from distaff.compiler.errors import CompileError, ModelRefusedError
    from distaff.compiler.lowering.build import OutputExistsError
    from distaff.frontend.loading import CheckpointError
    from distaff.frontend.models import ConfigError
    from distaff.kernels.matmul import WeightFormatError
    from distaff.runtime.platforms import MemoryTooSmallError
    from distaff.tools.compile_on_demand import NothingStoredError

    try:
        yield
    except (BucketError, NothingStoredError, OutputExistsError, WeightFormatError) as error:
        _fail(error, USAGE)
    except ModelRefusedError as error:
        _fail(error, REFUSED)
    except (CheckpointError, ConfigError) as error:
        _fail(error, CHECKPOINT)
    except (CompileError, ArtifactError, MemoryTooSmallError, OSError) as error:
        _fail(error, OTHER)


def _fail(error: Exception, code: int) -> NoReturn:
    click.echo(f"error: {error}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
