"""JAX's transforms for functions of objects."""
