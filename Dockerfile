# Two images, `cpu` (the default) and `cuda`; docs/containers.md explains the arguments.
#
# Layers go from what changes least to what changes most: torch, the other packages, Castalia. The
# C++ of Castalia is compiled in the stage `wheel`; no image has a compiler.

ARG PYTHON=3.11


FROM python:${PYTHON}-slim-bookworm AS base
ENV PATH=/opt/castalia/bin:$PATH PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source


# Castalia as a wheel, with its libraries for every level of instructions.
FROM base AS wheel
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml setup.py README.md LICENSE ./
COPY src src
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheel .
# Without a compiler the wheel would be pure, and every container would run slower.
RUN test -z "$(find /wheel -name '*-none-any.whl')"


FROM base AS environment
RUN python -m venv /opt/castalia
COPY constraints.txt ./


FROM environment AS packages-cpu
# The index of PyTorch's CPU builds: that of the package registry has CUDA builds of several GB.
ARG TORCH_INDEX
RUN test -n "$TORCH_INDEX" || { \
    echo "--build-arg TORCH_INDEX=ADDRESS: the CPU index of pytorch.org's install page"; exit 1; }
RUN pip install --no-cache-dir --index-url "$TORCH_INDEX" "$(grep '^torch==' constraints.txt)"
RUN python -c "import torch; assert torch.version.cuda is None, 'TORCH_INDEX has a CUDA build'"
ARG EXTRAS=hf,serve,tensorboard
COPY pyproject.toml tools/requirements.py ./
RUN python requirements.py "$EXTRAS" > requirements.txt \
    && pip install --no-cache-dir -c constraints.txt -r requirements.txt
COPY --from=wheel /wheel /wheel
RUN pip install --no-cache-dir --no-deps /wheel/*.whl


FROM environment AS packages-cuda
RUN pip install --no-cache-dir "$(grep '^torch==' constraints.txt)"
ARG EXTRAS=hf,serve,tensorboard
COPY pyproject.toml tools/requirements.py ./
RUN python requirements.py "$EXTRAS" > requirements.txt \
    && pip install --no-cache-dir -c constraints.txt -r requirements.txt
COPY --from=wheel /wheel /wheel
RUN pip install --no-cache-dir --no-deps /wheel/*.whl


# What both images are, but for the packages.
FROM base AS runtime
# train.compile needs a C compiler while it runs: SYSTEM_PACKAGES=g++.
ARG SYSTEM_PACKAGES=""
RUN test -z "$SYSTEM_PACKAGES" || { apt-get update \
    && apt-get install -y --no-install-recommends $SYSTEM_PACKAGES \
    && rm -rf /var/lib/apt/lists/*; }
RUN useradd --create-home --uid 1000 castalia \
    && mkdir -p /castalia \
    && chown castalia /castalia
ENV HOME=/home/castalia
WORKDIR /castalia
EXPOSE 8000
ENTRYPOINT ["castalia"]
CMD ["doctor"]


FROM runtime AS cuda
# The driver is the host's; torch's packages bring the rest of CUDA.
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=packages-cuda /opt/castalia /opt/castalia
USER castalia


FROM runtime AS cpu
COPY --from=packages-cpu /opt/castalia /opt/castalia
USER castalia
