"""distaff.frontend.core."""
