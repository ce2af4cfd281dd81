"""distaff.frontend.models."""
