"""distaff.frontend."""
