# odtk with everything built in: CUDA kernels, TensorRT plugins and engine, DALI. The NGC PyTorch image brings CUDA, nvcc,
# torch, TensorRT with its headers, and DALI.
#
#   docker build -t odtk .
#   docker run --rm --gpus all --ipc host -v "$PWD:/data" odtk info
#   docker run --rm --gpus all --ipc host -v "$PWD:/data" odtk train model.pth --annotations train.json --images train
ARG BASE=nvcr.io/nvidia/pytorch:25.10-py3
FROM ${BASE}

# Compute capabilities to build for, e.g. "80;90"; if empty, all that this nvcc knows.
ARG ODTK_CUDA_ARCH=""
# The build fails if the kernels cannot be built, instead of leaving them out.
ENV ODTK_CUDA=1

COPY . /opt/odtk
# torch, DALI and numpy stay those of the image, which pins them in PIP_CONSTRAINT.
RUN cd /opt/odtk && \
    python -m pip install --no-cache-dir "setuptools>=77" "pybind11>=3" "cmake>=3.25" ninja && \
    ODTK_CUDA_ARCH="${ODTK_CUDA_ARCH}" python -m pip install --no-cache-dir --no-build-isolation -v '.[report]' && \
    rm -rf build && \
    cd / && python -c "from odtk import _C; assert _C.WITH_TENSORRT, 'TensorRT was not found'; print(_C.ARCHITECTURES)"

WORKDIR /data
ENTRYPOINT ["odtk"]
CMD ["--help"]
