"""distaff.frontend.loading."""
