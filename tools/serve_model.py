"""serve-model: an artifact (or a model, which is compiled first) behind an OpenAI-compatible HTTP server.

Flags are named as vLLM's server names them.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from distaff.runtime.errors import EngineConfigError
from distaff.runtime.vllm_arguments import NEUTRAL_ARGUMENTS, without_neutral

if TYPE_CHECKING:
    import socket

    from distaff.compiler.artifact import Manifest
    from distaff.runtime.engine import Engine
    from distaff.runtime.server import PrometheusStatLogger

# Exit codes; click itself exits with 2 for wrong usage.
OTHER, USAGE = 1, 2

_HELP = """Serves MODEL, an artifact folder made by compile-model, until SIGTERM or SIGINT.

A name that distaff knows, a Hugging Face folder or a GGUF file is compiled first; the artifact is kept and found again.

\b
Examples:
  serve-model ./smollm2
  serve-model smollm2-135m --port 8001 --served-model-name small
  serve-model ./smollm2 --max-num-seqs 32 --max-waiting 256 --api-key secret
  serve-model ./smollm2 --uds /run/distaff.sock --kv-cache-memory-bytes 2G

\b
Then:
  curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"prompt": "Hello", "max_tokens": 20}'

\b
Exit codes: 0 ended by a signal, 1 error, 2 wrong usage.
"""

_POSITIVE = click.IntRange(min=1)


class _Size(click.ParamType[int]):
    """A count like 4096, 4k (4000), 4K (4096), 1.5G."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgtKMGT]?)", value)
        if match is None:
            self.fail(f"{value!r} is no size; write it like 4096, 4k (4000), 4K (4096) or 1.5G", param, context)
        number, unit = float(match[1]), match[2]
        power = " kmgt".index(unit.lower()) if unit else 0
        size = int(number * (1024 if unit.isupper() else 1000) ** power)
        if size < 1:
            self.fail(f"{value!r} must be at least 1", param, context)
        return size


class _JsonList(click.ParamType[tuple[str, ...]]):
    """A JSON list of strings, like '["a", "b"]'."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        try:
            entries = json.loads(value)
        except ValueError:
            entries = None
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            self.fail(f"""{value!r} is no JSON list of strings, like '["*"]'""", param, context)
        return tuple(entries)


class _JsonObject(click.ParamType[Mapping[str, Any]]):
    """A JSON object, like '{"a": 1}'."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, context: click.Context | None) -> Mapping[str, Any]:
        try:
            parsed = json.loads(value) if isinstance(value, str) else value
        except ValueError:
            parsed = None
        if not isinstance(parsed, dict):
            self.fail(f"{value!r} is no JSON object", param, context)
        return parsed


def _neutral_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Adds flags of vLLM's that have nothing to set here (`NEUTRAL_ARGUMENTS`), out of sight of --help."""

    def check(context: click.Context, param: click.Parameter, value: Any) -> None:
        plain = int(value) if isinstance(value, str) and value.isdecimal() else value
        try:
            if value is not None:
                without_neutral({param.name or "": plain})
        except EngineConfigError as error:
            raise click.BadParameter(str(error), context, param) from None

    for name, neutral in NEUTRAL_ARGUMENTS.items():
        is_flag = neutral.values is None or any(value is False for value in neutral.values)
        flag = f"--{name.replace('_', '-')}"
        declaration = f"{flag}/--no-{flag[2:]}" if is_flag else flag
        command = click.option(declaration, default=None, hidden=True, expose_value=False, callback=check)(command)
    return command


def _show_kernels(context: click.Context, _option: click.Parameter, wanted: bool) -> None:
    """Answers --show-kernels in place of serving."""
    if not wanted:
        return
    import jax
    from rich.console import Console

    from distaff.tools.report import show_kernels

    show_kernels(Console(), jax.default_backend(), passed_over=True)
    context.exit()


def _with_dashes(token: str) -> str:
    return token.replace("_", "-")  # flags may be written with underscores, as vLLM's


_SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "token_normalize_func": _with_dashes}


@click.command(help=_HELP, context_settings=_SETTINGS)
@click.argument("model")
@click.option("--show-kernels", is_flag=True, is_eager=True, expose_value=False, callback=_show_kernels,
              help="Show which kernel serves which operation on this machine, and exit.")  # fmt: skip
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0 is every one.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--uds", type=click.Path(), help="Unix socket to listen on in place of host and port.")
@click.option("--api-key", multiple=True, envvar=["DISTAFF_API_KEY", "VLLM_API_KEY"],
              help="Key that /v1 asks for; may be repeated.")  # fmt: skip
@click.option("--served-model-name", multiple=True, help="Name in the API; may be repeated.  [default: the model's]")
@click.option("--tokenizer", type=click.Path(path_type=Path), help="Folder of a tokenizer in place of the model's.")
@click.option("--chat-template", help="File with a Jinja template, or the template, in place of the model's.")
@click.option("--trust-request-chat-template", is_flag=True, help="Take chat_template from requests.")
@click.option("--default-chat-template-kwargs", type=_JsonObject(), default="{}",
              help="Variables for the template that requests may override, as JSON.")  # fmt: skip
@click.option("--response-role", default="assistant", show_default=True, help="Role of answers.")
@click.option("--generation-config", type=click.Choice(["auto", "vllm"]), default="auto", show_default=True,
              help="Sampling defaults: the model's generation_config.json, or neutral ones.")  # fmt: skip
@click.option("--override-generation-config", type=_JsonObject(), default="{}",
              help="""Further defaults as JSON; {"max_new_tokens": N} also limits requests.""")  # fmt: skip
@click.option("--dtype", default="auto", show_default=True, help="Weights, for a model that is compiled.")
@click.option("-q", "--quantization", help="As compile-model's --quantize, for a model that is compiled.")
@click.option("--block-size", type=_POSITIVE, help="Tokens in a KV page, for a model that is compiled.")
@click.option("--max-model-len", type=_Size(), help="Most tokens of prompt and output.")
@click.option("--max-num-seqs", type=_POSITIVE, help="Most requests in one step.")
@click.option("--max-num-batched-tokens", type=_POSITIVE, help="Most tokens in one step.")
@click.option("--max-waiting", type=_POSITIVE, help="Most requests in the queue; others get a 429.")
@click.option("--num-gpu-blocks-override", type=click.IntRange(min=2), help="Pages of the KV cache.")
@click.option("--kv-cache-memory-bytes", type=_Size(), help="Size of the KV cache.  [default: by free memory]")
@click.option("--gpu-memory-utilization", type=click.FloatRange(0, 1, min_open=True),
              help="Share of the device's memory for weights and KV cache, in place of a size.")  # fmt: skip
@click.option("--enable-prefix-caching/--no-enable-prefix-caching", default=True, show_default=True)
@click.option("--enable-chunked-prefill/--no-enable-chunked-prefill", default=True, show_default=True)
@click.option("--long-prefill-token-threshold", type=click.IntRange(min=0), default=0, show_default=True,
              help="Most tokens of one prompt a step while others wait; 0: no limit.")  # fmt: skip
@click.option("--scheduling-policy", type=click.Choice(["fcfs", "priority"]), default="fcfs", show_default=True)
@click.option("--max-logprobs", type=click.IntRange(min=-1), default=20, show_default=True, help="-1: all tokens.")
@click.option("--return-tokens-as-token-ids", is_flag=True, help="Write tokens in logprobs as token_id:<id>.")
@click.option("--enable-prompt-tokens-details", is_flag=True, help="Tell in usage how many prompt tokens were cached.")
@click.option("--enable-force-include-usage", is_flag=True, help="Usage in every chunk of every stream.")
@click.option("--enable-request-id-headers", is_flag=True, help="X-Request-Id in every response.")
@click.option("--enable-tokenizer-info-endpoint", is_flag=True, help="/tokenizer_info, which tells the chat template.")
@click.option("--seed", type=int, default=0, show_default=True, help="For requests without a seed of their own.")
@click.option("--forbid-compiles", is_flag=True, help="Fail rather than compile a program that the artifact lacks.")
@click.option("--warm-up/--no-warm-up", default=True, show_default=True, help="Prepare all programs before listening.")
@click.option("--allowed-origins", type=_JsonList(), default='["*"]', show_default=True, help="CORS origins.")
@click.option("--allowed-methods", type=_JsonList(), default='["*"]', show_default=True, help="CORS methods.")
@click.option("--allowed-headers", type=_JsonList(), default='["*"]', show_default=True, help="CORS headers.")
@click.option("--allow-credentials", is_flag=True, help="CORS with credentials.")
@click.option("--ssl-keyfile", type=click.Path(exists=True, dir_okay=False), help="Key for HTTPS.")
@click.option("--ssl-certfile", type=click.Path(exists=True, dir_okay=False), help="Certificate for HTTPS.")
@click.option("--ssl-ca-certs", type=click.Path(exists=True, dir_okay=False), help="For client certificates.")
@click.option("--ssl-cert-reqs", type=click.IntRange(0, 2), default=0, show_default=True,
              help="Client certificates: 0 none, 1 optional, 2 required.")  # fmt: skip
@click.option("--ssl-ciphers", default="TLSv1", show_default=True, help="OpenSSL's cipher list for HTTPS.")
@click.option("--root-path", default="", help="Path under which a proxy shows the server.")
@click.option("--max-body-bytes", type=_Size(), default="16M", show_default=True, help="Larger requests get a 413.")
@click.option("--shutdown-timeout", type=click.FloatRange(min=0), default=15.0, show_default=True,
              help="Seconds that running requests may go on after a signal.")  # fmt: skip
@click.option("--enable-log-requests/--disable-log-requests", default=False, show_default=True)
@click.option("--disable-uvicorn-access-log", is_flag=True, help="No line for every HTTP request.")
@click.option("--uvicorn-log-level", default="info", show_default=True,
              type=click.Choice(["critical", "error", "warning", "info", "debug", "trace"]))  # fmt: skip
@_neutral_flags
def main(model: str, **flags: Any) -> None:
    """Entry point of the command line."""
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("distaff").setLevel(logging.INFO)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)  # until the server takes over
    with _exit_codes():
        from distaff.runtime.server import bind

        sock = bind(flags["host"], flags["port"], flags["uds"])
        template = _chat_template(flags["chat_template"])
        _check_defaults(flags["override_generation_config"])
        folder, manifest = _artifact(model, flags)
        names = flags["served_model_name"] or tuple(dict.fromkeys((manifest.model, model)))
        engine, metrics = _engine(folder, manifest, names[0], flags)
    _serve(engine, metrics, sock, names, template, flags)


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(0)


def _chat_template(given: str | None) -> str | None:
    """The source of the template, which must be valid Jinja; text that cannot be a path is the template itself."""
    if given is None:
        return None
    from distaff.runtime.chat_template import ChatTemplate

    source = given if "{" in given else Path(given).read_text()
    ChatTemplate(source, {})
    return source


def _check_defaults(given: Mapping[str, Any]) -> None:
    """Refuses what --override-generation-config cannot set."""
    from distaff.runtime.sampling_params import SamplingParams, SamplingParamsError

    known = {name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")}
    known["max_new_tokens"] = "max_tokens"
    if unknown := sorted(given.keys() - known.keys()):
        raise EngineConfigError(f"--override-generation-config has {', '.join(unknown)}; it takes {', '.join(known)}")
    try:
        SamplingParams(**{known[name]: value for name, value in given.items()})
    except SamplingParamsError as error:
        raise EngineConfigError(f"--override-generation-config: {error}") from None


def _artifact(model: str, flags: dict[str, Any]) -> tuple[Path, Manifest]:
    from distaff.compiler.artifact import Manifest
    from distaff.tools.compile_on_demand import artifact_for

    options = {
        "dtype": None if flags["dtype"] == "auto" else flags["dtype"],
        "quantize": flags["quantization"],
        "page_size": flags["block_size"],
        "max_model_len": flags["max_model_len"],
        "max_batch": flags["max_num_seqs"],
        "max_step_tokens": flags["max_num_batched_tokens"],
    }
    folder = artifact_for(model, **{name: value for name, value in options.items() if value is not None})
    manifest = Manifest.load(folder)
    if folder == Path(model):
        _check_compiled_with(folder, manifest, options)
    return folder, manifest


def _check_compiled_with(folder: Path, manifest: Manifest, options: dict[str, Any]) -> None:
    """Refuses wishes that an artifact was not compiled with."""
    if options["quantize"] is not None:
        raise EngineConfigError(f"--quantization is for a model that is compiled; {folder} is an artifact already")
    for flag, name in (("--dtype", "dtype"), ("--block-size", "page_size")):
        compiled = getattr(manifest, name)
        if options[name] not in (None, compiled):
            raise EngineConfigError(f"{flag} is {options[name]}, but {folder} was compiled with {compiled}")


def _engine(folder: Path, manifest: Manifest, name: str, flags: dict[str, Any]) -> tuple[Engine, PrometheusStatLogger]:
    from distaff.runtime.config import EngineConfig
    from distaff.runtime.engine import Engine
    from distaff.runtime.server import PrometheusStatLogger
    from distaff.runtime.tokenizer import Tokenizer

    metrics = PrometheusStatLogger(name, flags["max_model_len"] or manifest.max_model_len)
    same = (
        "max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_waiting", "enable_prefix_caching",
        "enable_chunked_prefill", "long_prefill_token_threshold", "scheduling_policy", "max_logprobs", "seed",
        "forbid_compiles", "warm_up", "gpu_memory_utilization",
    )  # fmt: skip
    config = EngineConfig(
        num_pages=flags["num_gpu_blocks_override"],
        kv_cache_bytes=flags["kv_cache_memory_bytes"],
        progress=sys.stderr.isatty(),
        **{flag: flags[flag] for flag in same},
    )
    tokenizer = None if flags["tokenizer"] is None else Tokenizer.load(flags["tokenizer"])
    engine = Engine(folder, config, tokenizer=tokenizer, stat_loggers=[metrics])
    tokens = (engine.num_pages - 1) * manifest.page_size
    metrics.set_cache_config(
        block_size=manifest.page_size,
        num_gpu_blocks=engine.num_pages,
        enable_prefix_caching=config.enable_prefix_caching,
        kv_cache_size_tokens=tokens,
        kv_cache_max_concurrency=round(tokens / engine.max_model_len, 2),
    )
    return engine, metrics


def _serve(
    engine: Engine,
    metrics: PrometheusStatLogger,
    sock: socket.socket,
    names: tuple[str, ...],
    template: str | None,
    flags: dict[str, Any],
) -> None:
    from distaff.runtime.async_engine import AsyncEngine
    from distaff.runtime.server import ServerConfig, build_app, serve

    same = (
        "trust_request_chat_template", "return_tokens_as_token_ids", "enable_log_requests", "allowed_origins",
        "allowed_methods", "allowed_headers", "allow_credentials", "root_path", "max_body_bytes", "response_role",
        "default_chat_template_kwargs", "override_generation_config", "enable_prompt_tokens_details",
        "enable_force_include_usage", "enable_request_id_headers", "enable_tokenizer_info_endpoint",
    )  # fmt: skip
    config = ServerConfig(
        served_model_names=names,
        api_keys=flags["api_key"],
        chat_template=template,
        use_generation_config=flags["generation_config"] == "auto",
        priority_scheduling=flags["scheduling_policy"] == "priority",
        shutdown_grace_seconds=flags["shutdown_timeout"],
        **{flag: flags[flag] for flag in same},
    )
    asynchronous = AsyncEngine(engine)
    serve(
        build_app(asynchronous, config, metrics),
        asynchronous,
        config,
        [sock],
        log_level=flags["uvicorn_log_level"],
        access_log=not flags["disable_uvicorn_access_log"],
        **{flag: value for flag, value in flags.items() if flag.startswith("ssl_")},
    )


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turns the errors that a user can do something about into one message on stderr and an exit code."""
    try:
        yield
    except Exception as error:
        usage, other = _expected_errors()
        if not isinstance(error, (*usage, *other)):
            raise
        click.echo(f"error: {error}", err=True)
        sys.exit(USAGE if isinstance(error, usage) else OTHER)


def _expected_errors() -> tuple[tuple[type[Exception], ...], tuple[type[Exception], ...]]:
    """Those of flags and those of everything else; imported only when there is one."""
    from distaff.compiler.artifact import ArtifactError
    from distaff.compiler.buckets import BucketError
    from distaff.compiler.errors import CompileError
    from distaff.frontend.loading import CheckpointError
    from distaff.frontend.models import ConfigError
    from distaff.kernels.matmul import WeightFormatError
    from distaff.runtime.errors import ChatTemplateError, TokenizerError
    from distaff.runtime.executables import CompileForbiddenError
    from distaff.runtime.platforms import MemoryTooSmallError
    from distaff.tools.compile_on_demand import NothingStoredError

    model = (ArtifactError, CheckpointError, CompileError, CompileForbiddenError, ConfigError, MemoryTooSmallError)
    usage = (BucketError, EngineConfigError, NothingStoredError, WeightFormatError)
    return usage, (*model, ChatTemplateError, TokenizerError, OSError)


if __name__ == "__main__":
    main()
