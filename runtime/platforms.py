"""What the runtime knows about where it runs: the device, its memory, and so how many pages to make of what."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from distaff.compiler.artifact import Manifest
from distaff.kernels import native

# Of the memory that weights leave free, what the KV pool may take; the rest is for activations and the host.
POOL_SHARE = 0.7

_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


class MemoryTooSmallError(Exception):
    """The KV pool that is asked for, or the smallest useful one, does not fit."""


def memory_limit(device: jax.Device) -> int:
    """Bytes that this process may use on ``device``; on a CPU the smaller of the machine's memory and the cgroup's."""
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            raise MemoryTooSmallError(f"{device} does not tell its memory size; set num_pages or kv_cache_bytes")
        return int(stats["bytes_limit"])
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in _CGROUP_LIMITS:
        if file.is_file() and (text := file.read_text().strip()).isdecimal():
            limits.append(int(text))
    return min(limits)


def zeros(shape: Sequence[int], dtype: str, device: jax.Device) -> jax.Array:
    """Zeros on ``device``; with native kernels in huge pages of the system, if it has them, for reading at random."""
    if device.platform != "cpu" or not native.available():
        return jnp.zeros(shape, dtype, device=device)
    native.register()
    with jax.default_device(device):
        made: jax.Array = jax.ffi.ffi_call("distaff_zeros", jax.ShapeDtypeStruct(shape, dtype))()
    return made


def choose_num_pages(
    manifest: Manifest,
    memory: int,
    *,
    num_pages: int | None = None,
    kv_cache_bytes: int | None = None,
    memory_share: float | None = None,
) -> int:
    """The size of the KV pool in pages, null page included.

    An explicit ``num_pages`` or ``kv_cache_bytes`` is taken as it is; otherwise the manifest's number, bounded by a
    share of ``memory`` (bytes) after weights, or by ``memory_share`` (0..1] of it less the weights. That must hold one
    request of the longest allowed length. Raises `MemoryTooSmallError` if it does not, and ValueError if the arguments
    contradict each other or the programs.
    """
    if num_pages is not None and kv_cache_bytes is not None:
        raise ValueError("num_pages and kv_cache_bytes both set the size of the KV pool; give one")
    if kv_cache_bytes is not None:
        num_pages = kv_cache_bytes // manifest.bytes_per_page
    if manifest.fixed_num_pages and num_pages not in (None, manifest.num_pages):
        raise ValueError(
            f"the programs of this artifact hold for a pool of {manifest.num_pages} pages alone, not {num_pages}; "
            f"compile the model with --num-pages {num_pages}"
        )
    if num_pages is not None:
        if num_pages < 2:
            raise ValueError(
                f"a KV pool of {num_pages} pages cannot hold anything besides the null page; the least is 2 pages of "
                f"{manifest.bytes_per_page} bytes"
            )
        return num_pages
    if memory_share is None:
        spare = max(0, int((memory - manifest.weight_bytes) * POOL_SHARE))
    else:
        spare = max(0, int(memory * memory_share) - manifest.weight_bytes)
    bounded = min(manifest.num_pages, spare // manifest.bytes_per_page)
    least = manifest.num_pages if manifest.fixed_num_pages else manifest.pages_per_request + 1
    if bounded < least:
        raise MemoryTooSmallError(
            f"{memory / 2**30:.1f} GiB of memory leave room for {bounded} pages besides the weights, and {least} "
            f"({least * manifest.bytes_per_page / 2**20:.0f} MiB) are needed, which for one request of "
            f"{manifest.max_model_len} tokens is the least; compile the model with a smaller --max-model-len, or set "
            "the size of the KV pool"
        )
    return bounded
