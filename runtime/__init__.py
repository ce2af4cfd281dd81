"""distaff.runtime."""
