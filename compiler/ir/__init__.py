"""distaff.compiler.ir."""
