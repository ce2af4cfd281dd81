"""A cache of compiled executables, so that a start loads machine code in place of running XLA.

An executable is tied to its program, the shapes of its arguments, jax and jaxlib, the device, the CPU's features and
XLA's flags: all of these make its key, and a file whose key or checksum differs is compiled anew, never used. Files are
pickles of machine code, as safe as any program: serve only artifacts whose origin you trust, or delete their
``executables/`` first, which costs nothing but the compilation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
import os
import pickle
import platform
import threading
import time
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.experimental import serialize_executable

logger = logging.getLogger(__name__)

_FORMAT = 1


class CompileForbiddenError(Exception):
    """A program would have to be compiled while serving, and the engine was told never to do that."""


class Lowerable(Protocol):
    """What `jax.jit` returns, as far as it is needed here."""

    def lower(self, *arguments: Any) -> jax.stages.Lowered:
        """Traces and lowers for the arguments' shapes."""


@dataclasses.dataclass(frozen=True)
class ExecutableRecord:
    """How one executable was come by: compiled or loaded, how long that took and how large it is.

    ``scratch_bytes`` is what a run allocates besides arguments and results; as much as the KV pool would mean that the
    pool is copied in place of updated.
    """

    name: str
    compiled: bool
    seconds: float
    bytes: int
    scratch_bytes: int


class ExecutableCache:
    """Executables by name in ``folder``; safe to use from several threads."""

    def __init__(self, folder: Path, device: jax.Device | None = None):
        self._folder = folder
        self._device = device or jax.devices()[0]
        self._environment = _environment(self._device)
        self._lock = threading.Lock()
        self.records: list[ExecutableRecord] = []
        self.forbid_compiles = False

    def get(self, name: str, jitted: Lowerable, *arguments: Any, program: str | None = None) -> jax.stages.Compiled:
        """The executable of ``jitted`` for ``arguments`` (arrays or `jax.ShapeDtypeStruct`), loaded or compiled.

        ``program`` identifies what ``jitted`` computes (a hash); without it ``jitted`` is lowered to find out, which
        costs a trace. Raises `CompileForbiddenError` if it is not stored and `forbid_compiles` is set.
        """
        began = time.perf_counter()
        lowered = None
        if program is None:
            lowered = jitted.lower(*arguments)
            program = hashlib.sha256(lowered.as_text().encode()).hexdigest()
        key = self._key(name, arguments, program)
        path = self._path(name, key)
        loaded = self._load(path, key)
        if loaded is not None:
            executable, size = loaded
        elif self.forbid_compiles:
            raise CompileForbiddenError(
                f"{name} is not compiled for this machine and pool size, and compiling while serving is forbidden; "
                "start without --forbid-compiles once, or warm up with the same settings"
            )
        else:
            executable = (lowered or jitted.lower(*arguments)).compile()
            size = self._store(path, key, executable)
        scratch = getattr(executable.memory_analysis(), "temp_size_in_bytes", 0)
        record = ExecutableRecord(name, loaded is None, time.perf_counter() - began, size, scratch)
        with self._lock:
            self.records.append(record)
        return executable

    def has(self, name: str, *arguments: Any, program: str) -> bool:
        """Whether an executable is stored under exactly this key; it is not read."""
        key = self._key(name, arguments, program)
        return self._path(name, key).is_file()

    def _key(self, name: str, arguments: tuple[Any, ...], program: str) -> str:
        leaves, tree = jax.tree.flatten(arguments)
        shapes = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves]
        parts = [_FORMAT, self._environment, name, program, str(tree), shapes]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def _path(self, name: str, key: str) -> Path:
        return self._folder / f"{name}-{key[:16]}.bin"

    def _load(self, path: Path, key: str) -> tuple[jax.stages.Compiled, int] | None:
        """None if the file is missing, damaged or of another key; then the program is compiled."""
        try:
            head, _, payload = path.read_bytes().partition(b"\n")
        except OSError:
            return None  # missing as a rule; if the folder is at fault, storing will say so
        if head != _head(key, payload):
            logger.warning("%s is damaged; compiling again", path)
            return None
        try:
            code, in_tree, out_tree = pickle.loads(payload)
            executable = serialize_executable.deserialize_and_load(
                code, in_tree, out_tree, backend=self._device.client, execution_devices=[self._device]
            )
        except Exception as error:
            # Unpickling and XLA raise what they like; whatever it is, the program can be compiled again.
            logger.warning("%s cannot be loaded (%s: %s); compiling again", path, type(error).__name__, error)
            return None
        return executable, len(payload)

    def _store(self, path: Path, key: str, executable: jax.stages.Compiled) -> int:
        payload = pickle.dumps(serialize_executable.serialize(executable))
        partial = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.partial")
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(_head(key, payload) + b"\n" + payload)
            partial.replace(path)
        except OSError as error:
            logger.warning("cannot store %s (%s); the next start will compile it again", path, error)
        return len(payload)


class _CompileCounter:
    """Counts events of XLA's compiler; jax knows no way to take a listener off again, so there is one."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.count += 1


_compilations = _CompileCounter()


def compilations() -> int:
    """How many programs XLA has compiled in this process so far; loaded executables do not count."""
    return _compilations.count


def _head(key: str, payload: bytes) -> bytes:
    return f"{key} {hashlib.sha256(payload).hexdigest()}".encode()


def _environment(device: jax.Device) -> dict[str, Any]:
    """What else than its program an executable depends on."""
    return {
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "platform": device.platform,
        "platform_version": device.client.platform_version,
        "device": device.device_kind,
        "machine": platform.machine(),
        "cpu": _cpu_features(),
        # XLA on a CPU splits loops over the cores that it finds.
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _cpu_features() -> str:
    """Model and instruction sets of the host's CPU, for which XLA generates code."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor()
    fields = dict(line.split(":", 1) for line in info.read_text().split("\n\n", 1)[0].splitlines() if ":" in line)
    wanted = {"model name", "flags", "Features", "CPU implementer", "CPU part"}
    return " ".join(value.strip() for name, value in fields.items() if name.strip() in wanted)
