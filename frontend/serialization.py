"""Trees of arrays as bytes, in the msgpack format of ``flax.serialization``: files of either load in the other.

An array is an extension of type 1 that holds msgpack of (shape, dtype name, row-major bytes); a complex number is
type 2; a numpy scalar is type 3, stored as an array. An array above ``MAX_CHUNK_SIZE`` bytes, near msgpack's limit,
becomes a dict of flat pieces. A typed PRNG key, for which Flax has no form, becomes a dict of its implementation's
name and its uint32 data, which Flax reads as that.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

try:
    import msgpack
except ImportError as error:
    raise ImportError(
        "distaff.frontend.serialization needs the package msgpack; install it with: pip install 'distaff[train]'"
    ) from error

from distaff.frontend.state_dict import current_path as current_path
from distaff.frontend.state_dict import from_state_dict as from_state_dict
from distaff.frontend.state_dict import is_serializable as is_serializable
from distaff.frontend.state_dict import register_serialization_state as register_serialization_state
from distaff.frontend.state_dict import to_state_dict as to_state_dict

# msgpack's limit is 2**32 - 1 bytes an object, 2**31 - 1 in old versions; this leaves a margin.
MAX_CHUNK_SIZE = 2**30
_CHUNKED = "__msgpack_chunked_array__"
_PRNG_KEY = "__prng_key__"


class _Extension(enum.IntEnum):
    ARRAY = 1
    COMPLEX = 2
    SCALAR = 3


def to_bytes(target: Any) -> bytes:
    """The state dict of an object (a tree of variables, an optimizer state, a ``TrainState``) as bytes."""
    return msgpack_serialize(to_state_dict(target), in_place=True)


def from_bytes(target: Any, encoded_bytes: bytes) -> Any:
    """A copy of ``target`` with the leaves in ``encoded_bytes``, as numpy arrays; the inverse of ``to_bytes``.

    Raises:
        ValueError: the bytes are damaged, or belong to an object of another structure.
    """
    return from_state_dict(target, msgpack_restore(encoded_bytes))


def msgpack_serialize(pytree: Any, in_place: bool = False) -> bytes:
    """Dicts and lists of Python primitives and arrays, nested, as msgpack.

    Args:
        pytree: the tree; other objects must go through ``to_bytes``.
        in_place: keep the order of keys in dicts, instead of sorting them; nothing is changed either way.

    Raises:
        TypeError: the tree holds something else.
        ValueError: an array is of objects, of text or structured.
    """
    tree = _encodable(pytree if in_place else jax.tree.map(lambda x: x, pytree))
    encoded: bytes = msgpack.packb(tree, default=_pack_extension, strict_types=True)
    return encoded


def msgpack_restore(encoded_pytree: bytes) -> Any:
    """The tree in ``encoded_pytree``, with arrays as read-only numpy arrays; the inverse of ``msgpack_serialize``.

    Raises:
        ValueError: the bytes are not whole.
    """
    unpacked = msgpack.unpackb(encoded_pytree, ext_hook=_unpack_extension, raw=False, strict_map_key=False)
    return _decoded(unpacked)


def _encodable(tree: Any) -> Any:
    """The tree with dicts for large arrays and PRNG keys."""
    if isinstance(tree, dict):
        return {key: _encodable(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_encodable(value) for value in tree]
    if isinstance(tree, jax.Array) and jnp.issubdtype(tree.dtype, jax.dtypes.prng_key):
        return {_PRNG_KEY: str(jax.random.key_impl(tree)), "data": np.asarray(jax.random.key_data(tree))}
    if isinstance(tree, np.ndarray | jax.Array) and tree.size * tree.dtype.itemsize > MAX_CHUNK_SIZE:
        return _chunked(np.asarray(tree))
    return tree


def _chunked(array: np.ndarray) -> dict[str, Any]:
    step = max(1, MAX_CHUNK_SIZE // array.dtype.itemsize)
    flat = array.reshape(-1)
    pieces = [flat[start : start + step] for start in range(0, flat.size, step)]
    return {_CHUNKED: True, "shape": _numbered(array.shape), "chunks": _numbered(pieces)}


def _numbered(items: Any) -> dict[str, Any]:
    return {str(i): item for i, item in enumerate(items)}


def _in_order(numbered: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(numbered[str(i)] for i in range(len(numbered)))


def _decoded(tree: Any) -> Any:
    """The inverse of ``_encodable``."""
    if isinstance(tree, list):
        return [_decoded(value) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if _CHUNKED in tree:
        return np.concatenate(_in_order(tree["chunks"])).reshape(_in_order(tree["shape"]))
    if _PRNG_KEY in tree:
        return jax.random.wrap_key_data(jnp.asarray(tree["data"]), impl=tree[_PRNG_KEY])
    return {key: _decoded(value) for key, value in tree.items()}


def _pack_extension(x: Any) -> Any:
    if isinstance(x, np.ndarray | jax.Array):
        return msgpack.ExtType(_Extension.ARRAY, _array_to_bytes(np.asarray(x)))
    if isinstance(x, np.generic):
        return msgpack.ExtType(_Extension.SCALAR, _array_to_bytes(np.asarray(x)))
    if isinstance(x, complex):
        return msgpack.ExtType(_Extension.COMPLEX, msgpack.packb((x.real, x.imag)))
    return x


def _unpack_extension(code: int, data: bytes) -> Any:
    if code == _Extension.ARRAY:
        return _array_from_bytes(data)
    if code == _Extension.SCALAR:
        return _array_from_bytes(data)[()]
    if code == _Extension.COMPLEX:
        return complex(*msgpack.unpackb(data))
    return msgpack.ExtType(code, data)


def _array_to_bytes(array: np.ndarray) -> bytes:
    dtype = array.dtype.newbyteorder("=")
    if array.dtype.kind in "OSU" or dtype.names is not None:
        raise ValueError(f"Only arrays of numbers can be serialized; got one of dtype {array.dtype}.")
    content = array.astype(dtype, copy=False).tobytes()
    encoded: bytes = msgpack.packb((array.shape, dtype.name, content), use_bin_type=True)
    return encoded


def _array_from_bytes(data: bytes) -> np.ndarray:
    shape, dtype, buffer = msgpack.unpackb(data, raw=True)
    return np.frombuffer(buffer, jnp.dtype(dtype.decode())).reshape(shape)
