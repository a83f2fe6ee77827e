# odtk with everything built in: CUDA kernels, TensorRT plugins and engine, DALI. The NGC PyTorch image brings CUDA, nvcc,
# torch, TensorRT with its headers (25.10: 10.13.3), and DALI.
#
#   docker build -t odtk .
#   docker run --rm --gpus all odtk info
#   docker run --rm --gpus all --ipc host --user "$(id -u):$(id -g)" -v "$PWD:/data" odtk \
#     train model.pth --annotations train.json --images train
#
# --ipc host: the processes of a run, one per GPU, exchange gradients through NCCL, and images with their workers, in shared
# memory, of which Docker gives a container 64 MB. Where the host's may not be shared, `--shm-size 8g` does as well.
# --user: without it odtk runs as the user odtk (uid 10001), who cannot write into a folder of yours.
ARG BASE=nvcr.io/nvidia/pytorch:25.10-py3

# ---- the wheel: what it takes to compile stays in this stage ----
FROM ${BASE} AS build
# Compute capabilities to build for, e.g. "80;90"; if empty, all that this nvcc knows.
ARG ODTK_CUDA_ARCH=""
RUN python -m pip install --no-cache-dir "setuptools>=77" "pybind11>=3" "cmake>=3.25" ninja
WORKDIR /src
COPY setup.py pyproject.toml MANIFEST.in README.md LICENSE CHANGELOG.md ./
COPY csrc csrc
COPY odtk odtk
# ODTK_CUDA=1: the build fails if the kernels cannot be built, instead of leaving them out.
RUN ODTK_CUDA=1 ODTK_CUDA_ARCH="${ODTK_CUDA_ARCH}" \
    python -m pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels -v .

# ---- the image ----
FROM ${BASE}
# torch, DALI and numpy stay those of the image, which pins them in PIP_CONSTRAINT.
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    wheel="$(ls /wheels/odtk-*.whl)" && \
    python -m pip install --no-cache-dir "odtk[report,video] @ file://${wheel}" && \
    cd / && python -c "from odtk import _C; assert _C.WITH_TENSORRT, 'TensorRT was not found'; print(_C.ARCHITECTURES)"
# Not root. Any other --user may write into this home too, where odtk and torch keep their caches, and has a name.
RUN useradd --uid 10001 --create-home odtk && \
    mkdir -p /data && \
    chown odtk:odtk /data && \
    chmod 1777 /home/odtk
ENV HOME=/home/odtk USER=odtk
USER odtk
WORKDIR /data
ENTRYPOINT ["odtk"]
CMD ["--help"]
