"""Variables are a dict of collections: ``{"params": {module: {...: array}}, "batch_stats": ...}``."""

from distaff.frontend.core.scope import Variable as Variable
