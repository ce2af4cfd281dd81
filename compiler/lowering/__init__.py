"""Lowering: from the derived serving step to the files of an artifact."""
