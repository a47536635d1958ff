#!/usr/bin/env bash
# Sets up everything that this service needs: a Python environment, ComfyUI's runtime in comfyui/, and the tiny VAE.
# Run it again whenever you like: what is there is left alone. ./setup_comfyui.sh --help
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
locks=$project/setup/lock
read -r -d '' -a torch_packages < <(grep -oE '^torch(vision)?==[^ ]+' "$locks/torch.txt") || true

usage() {
    cat <<'HELP'
Usage: ./setup_comfyui.sh [OPTIONS]

Makes .venv (or uses the active environment, or the one that VENV names), installs what is needed there, fills comfyui/
with ComfyUI's runtime, and puts the tiny VAE where it is found.

Options:
  --from DIR      fill comfyui/ from your own ComfyUI checkout instead of the pinned release
                  (COMFYUI_PATH=DIR does the same)
  --link          with --from: symlinks instead of copies
  --pinned        go back to the pinned release after --from
  --full          install all of ComfyUI's requirements, not only those that encoding needs
  --dev           install the test tools too
  --download-vae  download the real qwen_image_vae.safetensors (254 MB) into comfyui/models/vae/
  -h, --help      this text

Environment:
  VENV             the virtual environment to use, made where it is missing
  PYTHON           the Python (3.11 or newer) that makes it; python3 by default
  TORCH_INDEX_URL  the wheel index for torch and torchvision, for a CPU-only, ROCm or other CUDA build,
                   e.g. https://download.pytorch.org/whl/cpu
HELP
}

say() { printf '%s\n' "$*"; }
fail() { printf 'Error: %s\n' "$*" >&2; exit 1; }
wrong_usage() { printf 'Error: %s. Try --help.\n' "$*" >&2; exit 2; }

parse_arguments() {
    checkout=${COMFYUI_PATH:-} link='' pinned='' full='' dev='' download=''
    while (($#)); do
        case $1 in
            --from) [[ -n ${2:-} ]] || wrong_usage '--from needs a folder'; checkout=$2; shift ;;
            --link) link=--link ;;
            --pinned) pinned=--pinned ;;
            --full) full=yes ;;
            --dev) dev=yes ;;
            --download-vae) download=yes ;;
            -h | --help) usage; exit 0 ;;
            *) wrong_usage "unknown option $1" ;;
        esac
        shift
    done
    [[ -z $link || -n $checkout ]] || wrong_usage '--link needs --from DIR'
    [[ -z $pinned || -z $checkout ]] || wrong_usage '--pinned and --from exclude each other'
}

choose_environment() {
    local venv=${VENV:-${VIRTUAL_ENV:-$project/.venv}}
    python=$venv/bin/python
    if [[ ! -x $python ]]; then
        local maker=${PYTHON:-python3}
        command -v "$maker" >/dev/null || fail "no $maker here; install Python 3.11 or newer, or name it with PYTHON=."
        "$maker" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
            fail "$("$maker" --version) is too old; Python 3.11 or newer is needed (name one with PYTHON=)."
        say "Python: making $venv"
        "$maker" -m venv "$venv" || fail "cannot make $venv (on Debian and Ubuntu: apt install python3-venv)."
    fi
    say "Python: $("$python" --version | cut -d' ' -f2) in $venv"
}

pip_install() { "$python" -m pip install --disable-pip-version-check "$@" || fail "pip could not install what is needed; see above."; }

# A torch that is there and works with its torchvision is the user's choice and stays.
torch_works() {
    "$python" -c 'from importlib.metadata import version as v; import sys
sys.exit([v(p).split("+")[0] for p in ("torch", "torchvision")] != sys.argv[1:])' "${torch_packages[@]#*==}" 2>/dev/null ||
        "$python" -c 'import torch, torchvision; torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)' 2>/dev/null
}

# Exactly what locks name: every file must have one of their SHA-256 sums, and nothing is installed that they lack.
install_locked() { pip_install --require-hashes "$@"; }

install_packages() {
    local wanted=("$locks/runtime.txt") lists=("$project/requirements.txt" "$project/setup/comfyui-requirements.txt") status=0
    [[ -z $dev ]] || { wanted+=("$locks/dev.txt"); lists+=("$project/setup/dev-requirements.txt"); }
    "$python" "$project/setup/satisfied.py" "${wanted[@]/#/--lock=}" "${lists[@]}" || status=$?
    ((status < 2)) || exit 1
    if ((status == 1)); then
        say 'Packages: all but torch and torchvision'
        install_locked --quiet --no-deps "${wanted[@]/#/-r}"  # torchsde asks for torch, which is not theirs
    fi
    torch_works || install_torch
}

# Wheels of another index than PyPI are other files, of which the lock has no sums.
install_torch() {
    say "Packages: torch and torchvision${TORCH_INDEX_URL:+ from $TORCH_INDEX_URL, without checked sums} (several GB with CUDA)"
    if [[ -n ${TORCH_INDEX_URL:-} ]]; then
        pip_install --index-url "$TORCH_INDEX_URL" "${torch_packages[@]}"
    else
        install_locked -r "$locks/torch.txt"
    fi
}

fill_comfyui() {
    "$python" "$project/setup/fill_comfyui.py" "$project/comfyui" ${checkout:+--from "$checkout"} $link $pinned
    [[ -z $full ]] || install_all_requirements
    # The tests also run on a release whose nodes have the older style.
    [[ -z $dev ]] || "$python" "$project/setup/fill_comfyui.py" "$project/tests/.comfyui-0.3.52" --release 0.3.52
}

# torch and torchvision are there already; torchaudio has no build for every torch, and encoding does not need it.
# The locks do not have all that is wanted here, so they set the versions of what they have, and no sums are checked.
install_all_requirements() {
    say 'Packages: all of ComfyUI'"'"'s requirements but torchaudio, without checked sums'
    grep -vE '^(torch|torchvision|torchaudio)\b' "$project/comfyui/requirements.txt" >"$project/comfyui/.requirements"
    sed -nE 's/^([^ #]+==[^\]*).*/\1/p' "$locks/runtime.txt" >"$project/comfyui/.constraints"
    pip_install --quiet -r "$project/comfyui/.requirements" -c "$project/comfyui/.constraints"
    rm "$project/comfyui/.requirements" "$project/comfyui/.constraints"
}

place_tiny_vae() {
    local source=$project/tiny_vae/tiny_qwen_vae.safetensors target=$project/comfyui/models/vae/tiny_qwen_vae.safetensors
    cmp -s "$source" "$target" || { cp "$source" "$target.part" && mv "$target.part" "$target"; }
}

parse_arguments "$@"
choose_environment
install_packages
fill_comfyui
place_tiny_vae
[[ -z $download ]] || "$python" "$project/setup/download_vae.py" "$project/comfyui/models/vae"
say "Ready. Activate the environment with: source ${python%/python}/activate"
