# Two commands do everything on a fresh machine: `make demo` and `make test`.
VENV ?= .venv
PY := $(VENV)/bin/python
CACHE ?= .cache

.PHONY: demo test check lint typecheck pytest smoke clean

demo: $(VENV)/.run
	$(PY) -m distaff.tools.demo --cache $(CACHE)

test: check

check: lint typecheck pytest

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# mypy does not read the wheel's folder mapping, so it checks through a folder of links.
typecheck: $(VENV)/.test build/links
	cd build/links && ../../$(VENV)/bin/mypy --config-file ../../pyproject.toml -p distaff

pytest: $(VENV)/.test
	$(VENV)/bin/pytest

smoke: $(VENV)/.run
	$(PY) -m pip install -q ".[test]"
	$(VENV)/bin/pytest -m smoke

build/links:
	mkdir -p $@/distaff
	for folder in compiler frontend kernels runtime tools; do ln -sfn ../../../$$folder $@/distaff/$$folder; done

$(PY):
	.ci/make-venv $(VENV)

$(VENV)/.run: pyproject.toml | $(PY)
	$(PY) -m pip install -q scikit-build-core
	$(PY) -m pip install -q --no-build-isolation -e ".[serve,gguf,hub]"
	touch $@

$(VENV)/.test: pyproject.toml $(VENV)/.run
	$(PY) -m pip install -q ".[test,reference,bench]" --no-build-isolation -e ".[serve,gguf,hub,test,reference,bench]"
	touch $@

clean:
	rm -rf build dist $(VENV) $(CACHE)
