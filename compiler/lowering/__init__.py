"""distaff.compiler.lowering."""
