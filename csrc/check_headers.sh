#!/usr/bin/env bash
# Compiles plugins and engine against each set of TensorRT headers found; warnings are errors. Links nothing, needs no GPU.
#   csrc/check_headers.sh [INCLUDE_DIR…]    default: $TENSORRT_ROOT, /usr/include, /usr/local/tensorrt, /opt/tensorrt*
# TensorRT's headers are included as system headers, because they use what they deprecate.
set -euo pipefail
cd "$(dirname "$0")"
cuda=${CUDA_HOME:-/usr/local/cuda}/include
if [ $# -eq 0 ]; then
  set -- ${TENSORRT_ROOT:+"$TENSORRT_ROOT/include"} /usr/include /usr/include/*-linux-gnu /usr/local/tensorrt/include /opt/tensorrt*/include
fi
if [ ! -f "$cuda/cuda_runtime_api.h" ]; then
  echo "check_headers: no CUDA headers in $cuda, nothing checked"; exit 0
fi
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
found=0
for include in "$@"; do
  [ -f "$include/NvInferRuntime.h" ] || continue
  found=1
  version=$(echo '#include <NvInferVersion.h>
NV_TENSORRT_MAJOR NV_TENSORRT_MINOR NV_TENSORRT_PATCH' | g++ -E -P -x c++ -isystem "$include" - | tail -1 | tr ' ' .)
  # shellcheck disable=SC2016
  printf '%s\n' plugins/*.cpp engine/engine.cpp | xargs -P 2 -I{} sh -c 'nice g++ -std=c++17 -Wall -Wextra -Werror -fPIC \
    -isystem "$0" -isystem "$1" ${ODTK_ONNX_PARSER:+-isystem "$ODTK_ONNX_PARSER"} -c {} -o "$2/$(basename {}).o"' \
    "$include" "$cuda" "$work"
  parser=""; [ -f "$include/NvOnnxParser.h" ] || parser=", without NvOnnxParser.h (engine can run, not build)"
  [ -z "$parser" ] || [ -z "${ODTK_ONNX_PARSER:-}" ] || parser=", NvOnnxParser.h of $ODTK_ONNX_PARSER"
  echo "check_headers: TensorRT $version in $include: plugins and engine compile without warnings$parser"
done
[ "$found" = 1 ] || echo "check_headers: no TensorRT headers in: $*; nothing checked"
