# The service with ComfyUI's runtime and the tiny VAE in it; real VAEs are mounted. See docker-compose.yml for how it is run.
#
#   docker build -t latent-encoder .
#   docker build -t latent-encoder --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu .
FROM python:3.11-slim-bookworm

# setup_comfyui.sh takes ComfyUI from upstream's git repository, and from PyPI only where that cannot be reached.
# Not pinned: Debian removes superseded versions from its mirrors, and the build would break with every fix.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app

# What is large and seldom changes comes first, so that a change of the code does not install torch again.
ARG TORCH_INDEX_URL=""
COPY setup_comfyui.sh requirements.txt ./
COPY setup/ setup/
COPY tiny_vae/ tiny_vae/
RUN TORCH_INDEX_URL="$TORCH_INDEX_URL" PIP_NO_CACHE_DIR=1 ./setup_comfyui.sh

# The service writes nothing but the files of its answers: /app belongs to root, /output to the service.
RUN useradd --uid 10001 --user-group --create-home encoder \
    && install --directory --owner=encoder --group=encoder /output \
    && mkdir /models
ENV MODEL_DIR=/models \
    OUTPUT_DIR=/output

COPY LICENSE *.py ./

USER 10001:10001
STOPSIGNAL SIGTERM
# No shell in between: signals reach Python, which finishes the request in hand.
ENTRYPOINT ["/app/.venv/bin/python", "main.py"]
