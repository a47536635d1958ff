#!/usr/bin/env bash
# Build the image and check its documented properties on machines without a container engine: buildah builds it, crun runs it.
# With Docker, the `docker run` of docs/operating.md checks nearly the same.
#
#   sudo scripts/check_image.sh [OPTIONS OF buildah build, as --build-arg VARIANT=cpu]
#
# Needs root, buildah, crun and jq, and debootstrap if the base image cannot be pulled. The folder BASE_IMAGES keeps images and
# layers for the next run. pip in the build trusts CA_BUNDLE, and uses PIP_INDEX_URL if it is set; neither gets into the image.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

image=localhost/latent-encoder:check
base=docker.io/library/python:3.11-slim-bookworm
user=10001
store=${BASE_IMAGES:-/var/tmp/latent-encoder-images}
ca_bundle=${CA_BUNDLE:-/etc/ssl/certs/ca-certificates.crt}
work=$(mktemp -d)

say() { printf '\n== %s\n' "$*"; }
fail() { printf 'Error: %s\n' "$*" >&2; exit 1; }
must_be() { [[ $2 == "$3" ]] || fail "$1: expected $3, got $2."; printf 'ok: %s: %s\n' "$1" "${2:-none}"; }

buildah() { command buildah --root "$store/images" --runroot "$work/run" --storage-driver "${STORAGE_DRIVER:-overlay}" "$@"; }

# crun refuses to start if both versions of control groups are mounted, even if it needs none, so both are hidden from it.
crun() {
    # shellcheck disable=SC2016  # for the inner shell
    unshare --mount sh -c 'mount -t tmpfs none /sys/fs/cgroup && exec "$0" "$@"' \
        "$(type -P crun)" --cgroup-manager=disabled --root "$work/containers" "$@"
}

clean_up() {
    crun delete --force worker 2>/dev/null || true
    [[ -z ${container:-} ]] || buildah rm "$container" >/dev/null
    rm -rf "$work"
}
trap clean_up EXIT

# The base image or, without a registry, a Debian of the same release with the same Python under its name.
provide_base() {
    buildah inspect --type image "$base" >/dev/null 2>&1 || buildah pull --quiet "$base" 2>/dev/null && return
    say "Base image: cannot be pulled, made with debootstrap"
    debootstrap --variant=minbase --include=python3-venv bookworm "$work/debian" >"$work/debootstrap.log" ||
        fail "debootstrap failed: $(tail -n 3 "$work/debootstrap.log")"
    rm -rf "$work"/debian/var/cache/apt/archives/*.deb "$work"/debian/var/lib/apt/lists/*
    # Debian's own images do the same: apt keeps no cache, which would be 80 MB in each layer that installs something.
    printf 'Dir::Cache::%s "";\n' pkgcache srcpkgcache >"$work/debian/etc/apt/apt.conf.d/docker-clean"
    local made
    made=$(buildah from scratch)
    buildah add --quiet "$made" "$work/debian" / >/dev/null
    buildah config --env PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin --cmd python3 "$made"
    buildah commit --quiet --rm "$made" "$base" >/dev/null
    rm -rf "$work/debian"
}

# Build in Docker's format, because OCI's has no HEALTHCHECK.
build() {
    printf '[global]\ncert = /run/secrets/ca.crt\n%s\n' "${PIP_INDEX_URL:+index-url = $PIP_INDEX_URL}" >"$work/pip.conf"
    buildah build --isolation chroot --format docker --layers --pull-never --tag "$image" \
        --secret "id=pip.conf,src=$work/pip.conf" --secret "id=ca.crt,src=$ca_bundle" \
        --build-arg "REVISION=$(git rev-parse HEAD 2>/dev/null)" --build-arg "CREATED=$(date --utc +%FT%TZ)" "$@" .
}

# The equivalent of: docker run --read-only --cap-drop ALL --security-opt no-new-privileges --network host -v …:/output
# with the image's user, environment and working folder. `adapt` is a jq program that changes the container further.
bundle() {
    local adapt=$1
    shift
    rm -rf "$work/bundle" && mkdir "$work/bundle"
    crun spec --bundle "$work/bundle"
    jq --argjson image "$config" --arg root "$root" --arg output "$output" '
        .root = {path: $root, readonly: true}
        | .process.terminal = false
        | .process.args = $image.Entrypoint + $ARGS.positional
        | .process.env = $image.Env
        | .process.cwd = $image.WorkingDir
        | .process.user = ($image.User | split(":") | {uid: .[0] | tonumber, gid: .[1] | tonumber})
        | .process.capabilities = {}
        | .mounts |= map(select(.type != "cgroup"))
            + [{destination: "/output", type: "bind", source: $output, options: ["rbind", "rw"]}]
        | .linux.namespaces |= map(select(.type | IN("pid", "ipc", "uts", "mount")))
        | del(.linux.resources)
        | '"$adapt" "$work/bundle/config.json" --args -- "$@" >"$work/config.json"
    mv "$work/config.json" "$work/bundle/config.json"
}
run() { bundle "$@" && crun run --bundle "$work/bundle" worker; }
inside() { local adapt=$1; shift; run "$adapt | .process.args = \$ARGS.positional" "$@"; }
new_output() { rm -rf "$output" && install --directory --owner="${1:-$user}" "$output"; }

check_sample() {
    new_output "$1"
    run ".process.user = {uid: $1, gid: $1}" --image_path /data/sample.png >"$work/response.json" 2>"$work/log" ||
        fail "the sample was not encoded: $(cat "$work/response.json" "$work/log")"
    must_be 'status' "$(jq -r .status "$work/response.json")" success
    must_be 'files' "$(find "$output" -type f | wc -l)" 3
    must_be 'their owner' "$(find "$output" -type f -printf '%U\n' | sort -u)" "$1"
    must_be 'the latent, loaded' "$(inside . /app/.venv/bin/python -c '
import sys, torch
print(list(torch.load(sys.argv[1], weights_only=True).shape))' "$(jq -r .latent_file_path "$work/response.json")")" '[1, 16, 128, 128]'
}

check_nothing_else_is_written() {
    new_output
    must_be 'writable for the user' "$(inside . find / ! -readable -prune -o -path /proc -prune -o -path /dev -prune -o \
        -writable ! -type l -print)" /output
    must_be 'not owned by root' "$(find "$root" -xdev ! -user root ! -path "$root/var/*" -printf '/%P %U\n')" "/output $user"
    new_output 0
    touch "$work/start"
    run '.root.readonly = false | .process.user = {uid: 0, gid: 0}' --image_path /data/sample.png >/dev/null 2>&1
    must_be 'files that root would have written' "$(find "$root" -xdev -newer "$work/start" -type f -printf '/%P\n')" ''
}

check_worker() {
    new_output
    bundle '.process.env += ["MODE=kafka", "KAFKA_BOOTSTRAP_SERVERS=127.0.0.1:9"]'
    crun run --bundle "$work/bundle" worker >"$work/log" 2>&1 &
    local started=$! waited=0 status=0
    until grep -q '"event"' "$work/log"; do
        { ((waited++ < 60)) && kill -0 "$started"; } || fail "Kafka mode did not start: $(cat "$work/log")"
        sleep 1
    done
    must_be 'process 1' "$(crun exec worker cat /proc/1/comm)" tini
    local command
    mapfile -t command < <(jq -r '.Healthcheck.Test[1:][]' <<<"$config")
    crun exec worker "${command[@]}" || status=$?
    must_be 'status of the health command' "$status" 0
    crun kill worker TERM
    status=0
    wait "$started" || status=$?
    must_be 'status after SIGTERM' "$status" 0
    grep -c '"event"' "$work/log" | sed 's/$/ log lines, the last:/'
    tail -n 1 "$work/log"
}

print_sizes() {
    local digest
    jq -r '.[] | select(.["diff-size"]) | .["diff-digest"] + " " + (.["diff-size"] / 1e6 | floor | tostring)' \
        "$store"/images/*-layers/layers.json >"$work/layers"
    say "Layers, in MB, uncompressed"
    jq -r '.rootfs.diff_ids[]' <<<"$(buildah inspect --type image "$image" | jq .OCIv1)" |
        while read -r digest; do awk -v d="$digest" '$1 == d { print $2; exit }' "$work/layers"; done
    say "Parts, in MB"
    du --summarize --block-size=MB "$root" "$root"/app/* "$root"/app/.venv | sed "s#$root#/#; s#//#/#" | sort -rn | head -n 5
    say "Packages, in MB"
    du --summarize --block-size=MB "$root"/app/.venv/lib/python3*/site-packages/* | sed 's#/.*/##' | sort -rn | head -n 12
}

[[ $EUID == 0 ]] || fail "this needs root."
output=$work/output
mkdir -p "$store"
provide_base
say "Build"
build "$@"
config=$(buildah inspect --type image "$image" | jq .Docker.config)
container=$(buildah from --pull-never "$image")
root=$(buildah mount "$container")

say "The sample, on a read-only root, as the image's user"
check_sample "$user"
say "The sample, as a user that the image does not know"
check_sample 1000
say "No arguments: the mode of MODE"
new_output
status=0
run . 2>"$work/log" || status=$?
must_be 'standalone without an image: status' "$status" 2
grep 'image_path' "$work/log"
say "Nothing but the output is written"
check_nothing_else_is_written
say "A worker: signals and health"
check_worker
say "NVIDIA's packages"
nvidia=$(find "$root"/app/.venv/lib/python3*/site-packages -maxdepth 1 -iname 'nvidia*' -name '*.dist-info' -printf '%f\n' | wc -l)
printf '%s\n' "$nvidia"
[[ "$*" != *VARIANT=cpu* || $nvidia == 0 ]] || fail "the cpu variant has $nvidia of NVIDIA's packages."
print_sizes
say "All checks passed"
