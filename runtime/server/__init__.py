"""distaff.runtime.server."""
