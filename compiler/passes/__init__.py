"""distaff.compiler.passes."""
