"""distaff.tools."""
