"""The version of Flax that this frontend is compatible with, where programs ask for it."""

__version__ = "0.12.8"
