"""distaff.compiler."""
