# Two images from one file: `--target cpu` and `--target gpu`. `make image` builds one with its bill of materials.
#
# The base is pinned by tag; replace the tag by a digest of your own mirror to have the same bytes for ever.
# torch for the CPU is not on PyPI: give the build an index that has it, either
#   --build-arg PIP_EXTRA_INDEX_URL=<url>          (no credentials: arguments stay in the image's history)
#   --secret id=pip,src=$HOME/.config/pip/pip.conf (with credentials)

FROM python:3.12.12-slim-bookworm AS base
ENV PYTHONSAFEPATH=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    PATH=/opt/strongroom/bin:$PATH \
    STRONGROOM_GUARD_RULES=/etc/strongroom/guard/rules

# What runs. The compiler is for the kernels that torch and triton build at start. No version is pinned: the Debian
# release that the base names keeps only the newest.
FROM base AS runtime
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 strongroom \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/strongroom --shell /usr/sbin/nologin strongroom \
    && install -d -o strongroom -g strongroom -m 0700 /var/lib/strongroom
COPY configs /etc/strongroom
WORKDIR /var/lib/strongroom
VOLUME /var/lib/strongroom
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=5m --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=2)"]
ENTRYPOINT ["strongroom"]
CMD ["serve", "--config", "/etc/strongroom/strongroom.yaml", "--host", "0.0.0.0", "--state", "/var/lib/strongroom"]

FROM base AS build-cpu
ARG PIP_EXTRA_INDEX_URL
COPY locks/serve-cpu.txt /src/locks/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/strongroom \
    && pip install --no-deps --require-hashes --only-binary :all: -r /src/locks/serve-cpu.txt
COPY . /src
RUN pip install --no-cache-dir --no-index --no-deps --no-build-isolation /src

FROM base AS build-gpu
COPY locks/serve-gpu.txt /src/locks/
RUN --mount=type=secret,id=pip,target=/etc/pip.conf --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/strongroom \
    && pip install --no-deps --require-hashes --only-binary :all: -r /src/locks/serve-gpu.txt
COPY . /src
RUN pip install --no-cache-dir --no-index --no-deps --no-build-isolation /src

FROM runtime AS cpu
COPY --from=build-cpu /opt/strongroom /opt/strongroom
COPY build/sbom-cpu.json /usr/share/doc/strongroom/sbom.json
USER 10001:10001

FROM runtime AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-gpu /opt/strongroom /opt/strongroom
COPY build/sbom-gpu.json /usr/share/doc/strongroom/sbom.json
USER 10001:10001
