"""distaff.compiler.analysis."""
