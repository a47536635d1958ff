#!/usr/bin/env bash
# All checks: format, lint, types, tests. CI runs this script, too.
# Arguments go to pytest: scripts/check.sh -k images
# --quick: only the tests that take less than a minute together, and no linters
# --comfyui-tree DIR (several times, if wanted): instead, the core of the tests on that ComfyUI tree: scripts/check.sh --comfyui-tree DIR
set -euo pipefail

wrong_usage() { printf 'Error: %s.\n' "$*" >&2; exit 2; }

# The tests without a broker, a setup, other VAEs than the tiny one, and the commands of the pages.
QUICK=(
    tests/{test_requests,test_errors,test_config,test_geometry,test_service}.py tests/images
    tests/kafka/test_{lanes,decisions,timers,properties}.py tests/standalone/test_inputs.py tests/vae/test_winograd.py
    tests/project/test_{imports,words,schemas,deploy,dashboard,docs}.py
)

trees=() arguments=() quick=''
while (($#)); do
    case $1 in
        --comfyui-tree) trees+=("${2:-}"); shift ;;
        --quick) quick=yes ;;
        --comfyui-tree=*) trees+=("${1#*=}") ;;
        *) arguments+=("$1") ;;
    esac
    shift || wrong_usage '--comfyui-tree needs a folder'
done
for i in "${!trees[@]}"; do
    [[ -f ${trees[i]}/nodes.py ]] || wrong_usage "--comfyui-tree: no ComfyUI in '${trees[i]}'"
    trees[i]=$(realpath -s "${trees[i]}")
done

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bin=${VENV:-${VIRTUAL_ENV:-$PWD/.venv}}/bin

# Three processes, because the tests with a broker wait much; each loads ComfyUI and keeps VAEs in memory, some GB. They share the
# CPUs: if there are more OpenMP threads than CPUs, they spin while they wait for each other, and a small encode takes thirty
# times as long. The order of the files stays, so that long tests do not come last.
run_tests() {
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + 1) / 2))} \
        "$bin/python" -m pytest -n 3 --dist loadfile --no-loadscope-reorder "${arguments[@]}"
}

# A tree that fails does not stop the run on the others.
run_on_trees() {
    local tree failed=()
    for tree in "${trees[@]}"; do
        TEST_COMFYUI_TREE=$tree run_tests || failed+=("$tree")
    done
    ((${#failed[@]} == 0)) || { printf 'Failed on: %s\n' "${failed[*]}" >&2; exit 1; }
}

if ((${#trees[@]})); then
    run_on_trees
    exit
fi
if [[ -n $quick ]]; then
    exec "$bin/python" -m pytest -q "${QUICK[@]}" -k 'not commands_of and not first_command' "${arguments[@]}"
fi

"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/mypy"
"$bin/shellcheck" setup_comfyui.sh scripts/*.sh .ci/run
"$bin/hadolint" Dockerfile
run_tests
