"""Identities that are never given out twice: the names of ``flax.nnx.ids``."""

from distaff.frontend.ids import FlaxId as UUID
from distaff.frontend.ids import UUIDManager as UUIDManager
from distaff.frontend.ids import uuid as uuid

__all__ = ["UUID", "UUIDManager", "uuid"]
