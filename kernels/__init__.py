"""distaff.kernels."""
