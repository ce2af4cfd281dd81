"""Scripts that drive one engine each for `distaff.tools.bench_peers`; other interpreters run them, without distaff."""
