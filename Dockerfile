# The service with ComfyUI's runtime and the tiny VAE in it; real VAEs are mounted. docs/operating.md has the commands.
#
#   docker build -t latent-encoder .
#   docker build -t latent-encoder --build-arg VARIANT=cpu .
#
# Every stage has the same base, because the venv refers to its Python.
ARG BASE=python:3.11-slim-bookworm

# hadolint ignore=DL3006  # it has its tag above
FROM ${BASE} AS dependencies

# setup_comfyui.sh fetches ComfyUI from upstream's git repository, and from PyPI only if that cannot be reached.
# The packages are not pinned: Debian removes superseded versions from its mirrors, and the build would break with every fix.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app

# cuda is the build of torch on PyPI, which runs on GPUs and CPUs; cpu has no NVIDIA package in it. TORCH_INDEX_URL names
# another wheel index, for example for ROCm.
ARG VARIANT=cuda
ARG TORCH_INDEX_URL=""
COPY setup_comfyui.sh requirements.txt ./
COPY requirements/ requirements/
COPY latent_encoder/__init__.py latent_encoder/releases.py latent_encoder/
COPY latent_encoder/installer/ latent_encoder/installer/
COPY tiny_vae/ tiny_vae/
# obstore, 16 MB, is in every image: without it, a URL of object storage in a request would be an error.
# The secrets are for networks with their own package index. They exist in this step and in no layer.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=secret,id=ca.crt \
    case "$VARIANT" in \
        cpu) index=https://download.pytorch.org/whl/cpu ;; \
        cuda) index="" ;; \
        *) echo "VARIANT is cpu or cuda, not $VARIANT." >&2; exit 1 ;; \
    esac \
    && TORCH_INDEX_URL="${TORCH_INDEX_URL:-$index}" PIP_NO_CACHE_DIR=1 ./setup_comfyui.sh --no-trial --object-storage \
    && .venv/bin/python -m compileall -q -j 0 comfyui


# hadolint ignore=DL3006
FROM ${BASE} AS service

# tini is process 1: it passes signals on to Python, and collects the ended children of Python's own children.
# The official image lacks the bytecode of the standard library, which cannot be written later on a read-only root.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --user-group --no-create-home --home-dir /tmp --shell /usr/sbin/nologin encoder \
    && install --directory --owner=encoder --group=encoder /output \
    && install --directory /models /data \
    && python3 -m compileall -q -j 0 -x '/(site|dist)-packages/|/tests?/' \
        "$(python3 -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"

WORKDIR /app

# Large, seldom changed layers come first, so that a change of the code rebuilds, pushes and pulls only the code.
COPY --from=dependencies /app/.venv .venv
COPY --from=dependencies /app/comfyui comfyui
COPY tests/fixtures/test_images/astronaut.png /data/sample.png
COPY requirements/ requirements/
COPY LICENSE *.py ./
COPY latent_encoder/ latent_encoder/
# The build fails if this ComfyUI cannot encode.
RUN .venv/bin/python -m compileall -q ./*.py latent_encoder \
    && .venv/bin/python latent_encoder/installer/try_comfyui.py comfyui

# With the tiny VAE and the sample, the image tests itself: docker run IMAGE --image_path /data/sample.png. In production,
# VAE_MODEL_NAME names a real VAE.
ENV MODEL_DIR=/models \
    VAE_MODEL_NAME=tiny_qwen_vae.safetensors \
    OUTPUT_DIR=/output \
    ALLOWED_INPUT_DIRS=/data \
    ALLOWED_OUTPUT_DIRS=/output \
    HTTP_PORT=8080
VOLUME ["/models", "/output"]
EXPOSE 8080

# The service writes only the files of its responses: everything else belongs to root, and may be read-only.
USER 10001:10001
STOPSIGNAL SIGTERM
# There is no shell in between: on the first signal, Python finishes the request in progress.
ENTRYPOINT ["/usr/bin/tini", "--", "/app/.venv/bin/python", "/app/main.py"]
# A worker that loads a large VAE from a slow volume responds only after that.
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --retries=3 \
    CMD ["/app/.venv/bin/python", "/app/main.py", "--mode", "health"]

ARG VERSION=0.11.0
ARG REVISION=""
ARG CREATED=""
ARG SOURCE=""
LABEL org.opencontainers.image.title="Latent Encoder" \
      org.opencontainers.image.description="Encodes images to diffusion latents with ComfyUI's own nodes" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.documentation="${SOURCE}" \
      org.opencontainers.image.licenses="MIT AND GPL-3.0-only"
