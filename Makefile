# Two commands do everything on a fresh machine: `make demo` and `make test`.
VENV ?= .venv
PY := $(VENV)/bin/python
CACHE ?= .cache
# A worker a core; a file stays with one worker, as its fixtures are expensive.
PARALLEL ?= -n auto --dist loadfile

.PHONY: demo test lint typecheck pytest smoke sanitize aarch64 clean

demo: $(VENV)/.run
	$(PY) -m distaff.tools.demo --cache $(CACHE)

test: lint typecheck pytest

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# mypy does not read the wheel's folder mapping, so it checks through a folder of links.
typecheck: $(VENV)/.test build/links
	cd build/links && ../../$(VENV)/bin/mypy --config-file ../../pyproject.toml -p distaff

pytest: $(VENV)/.test
	$(VENV)/bin/pytest $(PARALLEL)

# The quick subset, which needs no torch, transformers or flax.
smoke: $(VENV)/.smoke
	$(VENV)/bin/pytest -m smoke $(PARALLEL)

# The native kernels' inner functions under each sanitizer; needs no jax but its headers.
sanitize: $(VENV)/.test
	for kind in address,undefined thread; do \
	  $(VENV)/bin/cmake -S . -B build/$$kind -DPython_EXECUTABLE=$(abspath $(PY)) -DDISTAFF_TESTS=ON -DDISTAFF_SANITIZE=$$kind \
	    && $(VENV)/bin/cmake --build build/$$kind --target native_tests -j $$(nproc) && $(VENV)/bin/ctest \
	    --test-dir build/$$kind -j $$(nproc) --output-on-failure || exit 1; \
	done

# The same for 64-bit ARM, on an emulator: Debian's g++-aarch64-linux-gnu and qemu-user.
aarch64: $(VENV)/.test
	$(VENV)/bin/cmake -S . -B build/$@ -DPython_EXECUTABLE=$(abspath $(PY)) -DDISTAFF_TESTS=ON \
	  -DPython_INCLUDE_DIR=$$($(PY) -c "import sysconfig; print(sysconfig.get_path('include'))") \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=$@ -DCMAKE_CXX_COMPILER=$@-linux-gnu-g++ \
	  -DCMAKE_EXE_LINKER_FLAGS=-static -DCMAKE_CROSSCOMPILING_EMULATOR=qemu-$@
	$(VENV)/bin/cmake --build build/$@ --target native_tests -j $$(nproc)
	$(VENV)/bin/ctest --test-dir build/$@ -j $$(nproc) --output-on-failure

build/links:
	mkdir -p $@/distaff
	for folder in compiler frontend kernels runtime tools; do ln -sfn ../../../$$folder $@/distaff/$$folder; done

$(PY):
	.ci/make-venv $(VENV)

INSTALL = $(PY) -m pip install -q --no-build-isolation -e

$(VENV)/.run: pyproject.toml CMakeLists.txt $(wildcard kernels/native/*.cc kernels/native/*.h) | $(PY)
	$(PY) -m pip install -q scikit-build-core cmake ninja "jaxlib>=0.10,<0.13"
	$(INSTALL) ".[serve,gguf,hub]"
	touch $@

$(VENV)/.smoke: $(VENV)/.run
	$(INSTALL) ".[serve,gguf,hub,train,test]"
	touch $@

$(VENV)/.test: $(VENV)/.run
	$(INSTALL) ".[serve,gguf,hub,train,examples,test,reference,bench]"
	touch $@

clean:
	rm -rf build dist .venv .venv-newer $(CACHE)
