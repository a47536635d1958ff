#!/usr/bin/env bash
# Set up everything that this service needs: a Python environment, ComfyUI's runtime in comfyui/, and the tiny VAE.
# It can be run again: parts that are in place stay as they are. See ./setup_comfyui.sh --help.
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
tree=$project/comfyui
installer=$project/latent_encoder/installer
locks=$project/requirements/lock
read -r -d '' -a torch_packages < <(grep -oE '^torch(vision)?==[^ ]+' "$locks/torch.txt") || true

usage() {
    cat <<'HELP'
Usage: ./setup_comfyui.sh [OPTIONS]

Makes .venv (or uses the active environment, or the one that VENV names), installs the packages of this service there,
fills comfyui/ with ComfyUI's runtime, copies the tiny VAE into it, installs further packages that this ComfyUI's four
nodes need, and encodes a test image with them.

Options:
  --from DIR      fill comfyui/ from your own ComfyUI checkout instead of the pinned release
                  (COMFYUI_PATH=DIR does the same)
  --link          with --from: symlinks instead of copies
  --release TAG   fill comfyui/ with another release, e.g. v0.33.0, from ComfyUI's git repository; TAG may be a commit
  --pinned        go back to the pinned release after --from or --release
  --full          install all of ComfyUI's requirements, also those that encoding does not need
  --object-storage
                  install the package for images and files behind s3://, gs:// and az:// too
  --dev           install the test tools too
  --download-vae  download the real qwen_image_vae.safetensors (254 MB) into comfyui/models/vae/
  --no-trial      neither install further packages for this ComfyUI nor try it; for building container images
  -h, --help      this text

Exit status: 0 if everything is set up, 1 if a step failed, 2 for wrong usage, 3 if this ComfyUI cannot encode.

Environment:
  COMFYUI_GIT      the git repository for --release and the pinned release, a URL or a folder; upstream's by default
  VENV             the virtual environment to use, made if it is missing
  PYTHON           the Python (3.11 or newer) that makes it; python3 by default
  TORCH_INDEX_URL  the wheel index for torch and torchvision, for a CPU-only, ROCm or other CUDA build,
                   e.g. https://download.pytorch.org/whl/cpu
HELP
}

say() { printf '%s\n' "$*"; }
fail() { printf 'Error: %s\n' "$*" >&2; exit 1; }
wrong_usage() { printf 'Error: %s. Try --help.\n' "$*" >&2; exit 2; }

parse_arguments() {
    checkout='' link='' release='' pinned='' full='' storage='' dev='' download='' untried=''
    while (($#)); do
        case $1 in
            --from) [[ -n ${2:-} ]] || wrong_usage '--from needs a folder'; checkout=$2; shift ;;
            --link) link=--link ;;
            --release) [[ -n ${2:-} ]] || wrong_usage '--release needs a tag or a commit'; release=$2; shift ;;
            --pinned) pinned=--pinned ;;
            --full) full=yes ;;
            --object-storage) storage=yes ;;
            --dev) dev=yes ;;
            --download-vae) download=yes ;;
            --no-trial) untried=yes ;;
            -h | --help) usage; exit 0 ;;
            *) wrong_usage "unknown option $1" ;;
        esac
        shift
    done
    choose_tree
}

# The service runs the tree that COMFYUI_PATH names. A release that is fetched into comfyui/ would not be used.
choose_tree() {
    # The service expands `~`, which shells leave as it is in quotes.
    # shellcheck disable=SC2088
    [[ ${COMFYUI_PATH:-} != '~/'* ]] || COMFYUI_PATH=$HOME/${COMFYUI_PATH#'~/'}
    local chosen=${release:+--release}${pinned:+--pinned}
    [[ -z $release || -z $pinned ]] || wrong_usage '--release and --pinned exclude each other'
    [[ -z $chosen || -z $checkout ]] || wrong_usage "$chosen and --from exclude each other"
    [[ -z $chosen || -z $link ]] || wrong_usage "$chosen and --link exclude each other"
    [[ -z $chosen || -z ${COMFYUI_PATH:-} || $COMFYUI_PATH -ef $tree ]] ||
        wrong_usage "$chosen fills comfyui/, but the service runs COMFYUI_PATH=$COMFYUI_PATH; unset that first"
    [[ -z $chosen ]] || return 0
    checkout=${checkout:-${COMFYUI_PATH:-}}
    [[ -z $link || -n $checkout ]] || wrong_usage '--link needs --from DIR'
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

pip_install() { "$python" -m pip install --disable-pip-version-check "$@" || fail "pip could not install the packages; see above."; }

# Keep an installed torch that works with its torchvision: it is the user's choice.
torch_works() {
    "$python" -c 'from importlib.metadata import version as v; import sys
sys.exit([v(p).split("+")[0] for p in ("torch", "torchvision")] != sys.argv[1:])' "${torch_packages[@]#*==}" 2>/dev/null ||
        "$python" -c 'import torch, torchvision; torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)' 2>/dev/null
}

# Install exactly the files of the locks: every file must have one of their SHA-256 checksums.
install_locked() { pip_install --require-hashes "$@"; }

install_packages() {
    local wanted=("$locks/runtime.txt") lists=("$project/requirements.txt" "$project/requirements/comfyui.txt") status=0
    [[ -z $storage ]] || { wanted+=("$locks/object-storage.txt"); lists+=("$project/requirements/object-storage.txt"); }
    [[ -z $dev ]] || { wanted+=("$locks/dev.txt"); lists+=("$project/requirements/dev.txt"); }
    "$python" "$installer/satisfied.py" "${wanted[@]/#/--lock=}" "${lists[@]}" || status=$?
    ((status < 2)) || exit 1
    if ((status == 1)); then
        say 'Packages: all except torch and torchvision'
        install_locked --quiet --no-deps "${wanted[@]/#/-r}"  # torchsde asks for torch, which these locks lack
    fi
    torch_works || install_torch
}

# Wheels of another index than PyPI are other files, of which the lock has no checksums.
install_torch() {
    say "Packages: torch and torchvision${TORCH_INDEX_URL:+ from $TORCH_INDEX_URL, without verified checksums} (several GB with CUDA)"
    if [[ -n ${TORCH_INDEX_URL:-} ]]; then
        pip_install --index-url "$TORCH_INDEX_URL" "${torch_packages[@]}"
    else
        install_locked -r "$locks/torch.txt"
    fi
}

fill_comfyui() {
    "$python" "$installer/fill_comfyui.py" "$tree" ${checkout:+"--from=$checkout"} ${release:+"--release=$release"} \
        $link $pinned
    # The tests also run on a release whose nodes have the older style.
    [[ -z $dev ]] || "$python" "$installer/fill_comfyui.py" "$project/tests/.comfyui-0.3.52" --release 0.3.52 --keep
}

# A ComfyUI may ask for packages that the locks lack: no checksums are verified. Packages of the locks stay as installed.
install_unlocked() {
    "$python" "$installer/constraints.py" "$1" "$locks/runtime.txt" >"$scratch/constraints" || exit
    pip_install --quiet -r "$1" -c "$scratch/constraints" ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"}
}

install_tree_packages() {
    find_lacking
    [[ -s $scratch/lacking ]] || return 0
    say "Packages: $(one_line "$scratch/lacking") for this ComfyUI, without verified checksums"
    install_unlocked "$scratch/lacking"
    find_lacking
    [[ ! -s $scratch/lacking ]] || fail "pip succeeded, but this ComfyUI still lacks $(one_line "$scratch/lacking")."
}

find_lacking() { "$python" "$installer/comfy_packages.py" "$tree" >"$scratch/lacking" || exit; }
one_line() { sed -e ':all' -e 'N;$!b all' -e 's/\n/, /g' "$1"; }

install_all_requirements() {
    [[ -f $tree/requirements.txt ]] || fail "$tree has no requirements.txt, which --full needs."
    say 'Packages: all of this ComfyUI'"'"'s requirements, without verified checksums'
    grep -viE '^(torch|torchvision)([^[:alnum:]_.-]|$)' "$tree/requirements.txt" >"$scratch/requirements" || true
    install_unlocked "$scratch/requirements"
}

try_tree() { "$python" "$installer/try_comfyui.py" "$tree"; }

place_tiny_vae() {
    local source=$project/tiny_vae/tiny_qwen_vae.safetensors target=$tree/models/vae/tiny_qwen_vae.safetensors
    cmp -s "$source" "$target" || { cp "$source" "$target.part" && mv "$target.part" "$target"; }
}

parse_arguments "$@"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
choose_environment
install_packages
fill_comfyui
place_tiny_vae
[[ -n $untried ]] || install_tree_packages
[[ -z $full ]] || install_all_requirements
[[ -n $untried ]] || try_tree
[[ -z $download ]] || "$python" "$installer/download_vae.py" "$tree/models/vae"
say "Ready. Activate the environment with: source ${python%/python}/activate"
