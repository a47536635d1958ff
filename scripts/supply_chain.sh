#!/usr/bin/env bash
# Locks, audit and bill of materials of the packages that the service depends on. scripts/supply_chain.sh --help
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tools=$PWD/.tools

usage() {
    cat <<'HELP'
Usage: scripts/supply_chain.sh COMMAND

  lock [UV OPTIONS]   write requirements/lock/*.txt, the exact versions and SHA-256 checksums, from the lists of requirements;
                      a locked version stays unless --upgrade (all) or --upgrade-package NAME is given
  audit [OPTIONS]     ask PyPI for known vulnerabilities of the locked packages; fails if there is one, or no response;
                      options are pip-audit's, for example --vulnerability-service osv
  sbom [ENVIRONMENT]  write a CycloneDX 1.6 bill of materials, in JSON, to standard output: the packages in that virtual
                      environment (.venv), ComfyUI's runtime and the tiny VAE

The tools for these commands are installed into .tools, from their own lock.
HELP
}

install_tools() {
    [[ -x $tools/bin/python ]] || "${PYTHON:-python3}" -m venv "$tools"
    "$tools/bin/python" latent_encoder/installer/satisfied.py --lock requirements/lock/tools.txt requirements/tools.txt ||
        "$tools/bin/python" -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements/lock/tools.txt
}

# Locks have the checksums of all files that PyPI has for a version, and versions for every system and Python from 3.11 on.
compile() {
    local output=$1
    shift
    "$tools/bin/uv" pip compile --quiet --no-config --universal --python-version 3.11 --generate-hashes --default-index https://pypi.org/simple \
        --custom-compile-command 'scripts/supply_chain.sh lock' --output-file "$output" "$@" >/dev/null
}

# All packages except the tools share one environment, so their versions are chosen together and then written to one lock each.
lock() {
    local work
    work=$(mktemp -d)
    # shellcheck disable=SC2064  # the folder of this call
    trap "rm -r '$work'" EXIT
    grep --no-filename == requirements/lock/{torch,runtime,dev,benchmark,object-storage}.txt | sort --unique >"$work/all.txt"
    sed --in-place 's/ \\$//' "$work/all.txt"
    compile "$work/all.txt" requirements.txt requirements/{torch,comfyui,dev,benchmark,object-storage}.txt "$@"

    local chosen=(--constraints "$work/all.txt" --no-annotate --upgrade)
    compile requirements/lock/torch.txt requirements/torch.txt "${chosen[@]}"
    # Neither torch nor packages that only torch needs: another build of torch needs others.
    chosen+=(--excludes requirements/torch.txt)
    compile requirements/lock/runtime.txt requirements.txt requirements/comfyui.txt "${chosen[@]}"
    compile requirements/lock/dev.txt requirements/dev.txt "${chosen[@]}"
    compile requirements/lock/benchmark.txt requirements/benchmark.txt "${chosen[@]}"
    compile requirements/lock/object-storage.txt requirements/object-storage.txt "${chosen[@]}"
    compile requirements/lock/tools.txt requirements/tools.txt --no-annotate "$@"
}

# PyPI's response has the vulnerabilities of its advisory database. With --strict, a missing response is a failure, too.
audit() {
    local file status=0
    for file in requirements/lock/*.txt; do
        printf '%s\n' "$file" >&2
        "$tools/bin/pip-audit" --strict --require-hashes --disable-pip --requirement "$file" "$@" || status=1
    done
    return "$status"
}

sbom() { "$tools/bin/python" scripts/sbom.py "${1:-.venv}"; }

command=${1:---help}
shift || true
case $command in
    lock | audit | sbom) install_tools && "$command" "$@" ;;
    -h | --help) usage ;;
    *) printf 'Error: unknown command %s. Try --help.\n' "$command" >&2; exit 2 ;;
esac
