#!/usr/bin/env bash
# Every check there is: format, lint, types, tests. CI runs this same script.
# Arguments go to pytest: scripts/check.sh -k images
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=${VENV:-${VIRTUAL_ENV:-$PWD/.venv}}/bin

"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/mypy"
"$bin/shellcheck" setup_comfyui.sh scripts/*.sh .ci/run
"$bin/hadolint" Dockerfile
# Three processes, since the tests with a broker wait a good deal; each loads ComfyUI and keeps VAEs in memory, some GB. They share
# the CPUs: where OpenMP's threads are more than those, they spin while they wait for each other, and a small encode takes thirty
# times as long. The order of the files stays, so that long tests do not come last.
OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + 1) / 2))} "$bin/python" -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
