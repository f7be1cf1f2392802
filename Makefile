# make demo, make test, make test-vllm, make wheels: each sets up what it needs in .venv first. PYTHON names the
# interpreter to start from, 3.10 to 3.13; WORKERS says how many tests run at a time.

PYTHON ?= python3
WORKERS ?= 2
RUN := .venv/bin/python
READY := .venv/ready
VLLM := .venv/vllm/ready
VLLM_NOW := .venv/vllm/0.33.0/complete

# What make wheels compiles for; ONLY names some variants by words of their description.
ARCH ?= sm_120a,sm_121a
HOST ?= x86_64,aarch64
# Drivers for CUDA 12 load what 12's compiler makes only; some of its kernels have a stack, and 13's none.
CUDA ?= 13
ONLY ?=
KERNELS := build/kernels

.PHONY: demo test test-vllm lint wheels clean

demo: $(READY)
	$(RUN) -m flash_attn_sm120 doctor || true
	$(RUN) -m flash_attn_sm120 check
	$(RUN) -m flash_attn_sm120 compile --arch sm_120a,sm_121a

test: $(READY) $(VLLM_NOW) lint
	$(RUN) -m pytest -q -n $(WORKERS) --dist worksteal tests \
		--ignore tests/integration/test_resolver.py --ignore tests/integration/test_pack_vllm.py \
		--deselect "tests/integration/test_vllm_plugin.py::test_backend_inside_vllm[0.24.0]"
	$(RUN) -m pytest -q tests/integration/test_resolver.py -k pins

test-vllm: $(READY) $(VLLM)
	$(RUN) -m pytest -q tests/integration

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# A PyTorch that already drives a GPU is its owner's choice and stays; else torch comes first and by itself, so that
# nothing that is installed after it picks another build.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c "import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))" || \
		{ echo "flash_attn_sm120 needs Python 3.10 to 3.13; say which with make PYTHON=..."; exit 1; }
	@if $(PYTHON) -c "import sys, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null; then \
		$(PYTHON) -m venv --system-site-packages .venv && \
		grep -v '^torch==' constraints.txt > .venv/constraints.txt && \
		$(PYTHON) -c "import torch; print('torch==' + torch.__version__)" >> .venv/constraints.txt; \
	else \
		$(PYTHON) -m venv .venv && cp constraints.txt .venv/constraints.txt && \
		$(RUN) -m pip install -q torch==$$(sed -n 's/^torch==//p' constraints.txt); \
	fi
	$(RUN) -m pip install -q -c .venv/constraints.txt -e ".[cu13,test]"
	@touch $@

# The Python of the vLLM that the backend is made for, and of all that it is tested in: 0.4 and 0.7 GB from the package
# index.
$(VLLM_NOW): $(READY) tests/integration/vllm_python.py tests/integration/vllm_requirements.txt
	$(RUN) tests/integration/vllm_python.py .venv/vllm 0.33.0
	@touch $@

$(VLLM): $(VLLM_NOW)
	$(RUN) tests/integration/vllm_python.py .venv/vllm
	@touch $@

# The pure wheel, and one for each processor with compiled kernels inside; no GPU takes part. Kernels that were compiled
# from the same sources before stay.
wheels: $(READY)
	$(RUN) -m pip install -q build
	rm -rf dist build/lib
	$(RUN) -m build --wheel
	$(RUN) -m flash_attn_sm120 compile --arch $(ARCH) --host $(HOST) --cuda $(CUDA) --only "$(ONLY)" --out $(KERNELS)
	$(RUN) tools/wheels.py dist/*-none-any.whl $(KERNELS) dist

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
