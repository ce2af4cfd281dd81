"""distaff.frontend.linen."""
