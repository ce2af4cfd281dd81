"""Compiles a model for distaff with the kernels of this interpreter: ``python compile_artifact.py JOB``; prints where.

The job is JSON: ``model``, ``options`` of `CompileOptions`, and the ``kv_cache_bytes`` that programs are compiled for.
"""

from __future__ import annotations

import json
import sys

from distaff.tools.compile_on_demand import artifact_for, build_executables


def main() -> None:
    """Entry point."""
    job = json.loads(sys.argv[1])
    artifact = artifact_for(job["model"], **job["options"])
    build_executables(artifact, kv_cache_bytes=job["kv_cache_bytes"])
    print(artifact)


if __name__ == "__main__":
    main()
