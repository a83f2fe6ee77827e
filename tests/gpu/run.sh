#!/usr/bin/env bash
# Everything that needs a GPU, in one command, the most telling steps first: build, kernels, sanitizers, engines,
# training, benchmarks. Each step has its own time limit, and one that fails stops none of the others.
#   tests/gpu/run.sh [STEP…]     default: all of build kernels memcheck racecheck synccheck loader engine training benchmark dali video
# Writes report.txt and one log for each step to $OUT, default build/gpu/report. Exit status 1 if a step failed.
#
# It needs nvcc, cmake, a C++ compiler, and a Python ($PYTHON, default python3) with torch for this GPU, pybind11, pytest
# and what pyproject.toml lists; no network. What may be missing is brought along:
#   $ODTK_GPU_PARTS   default build/gpu/parts; may hold
#     *.whl                     Python packages that are missing, installed to build/gpu/site
#     tensorrt8.whl.00 .01 …    the wheel of TensorRT 8.6.0, `split -b 56M -d`: joined and unpacked here
#     tensorrt8-include/        TensorRT 8.6's headers and NvOnnxParser.h of onnx/onnx-tensorrt, tag release/8.6-GA
#   $ODTK_BCCD        default shared/data/bccd or ../shared/data/bccd: train/ and train.json, to train on
# With TENSORRT_ROOT set (its include/ and lib/), that TensorRT is used and nothing is unpacked.
set -uo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
python=${PYTHON:-python3}
parts=${ODTK_GPU_PARTS:-$root/build/gpu/parts}
work=$root/build/gpu
out=${OUT:-$work/report}
mkdir -p "$work" "$out"
report=$out/report.txt
failed=0
wanted=("${@:-all}")
export PYTHONUNBUFFERED=1 PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

say() { echo "$*" | tee -a "$report"; }

wants() { [[ " ${wanted[*]} " == *" all "* || " ${wanted[*]} " == *" $1 "* ]]; }

# step NAME SECONDS COMMAND…: runs it and reports it.
step() {
  local name=$1 limit=$2 start=$SECONDS status=0 result
  shift 2
  wants "$name" || return 0
  timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1 </dev/null || status=$?
  if [ "$status" = 0 ] && tail -n 1 "$out/$name.log" | grep -Eq '^[0-9]+ skipped'; then status=skipped; fi
  case $status in
    0) result=passed ;;
    skipped) result="FAILED: every test was skipped" ;;
    124 | 137) result="FAILED: over its limit of $limit s" ;;
    *) result="FAILED: exit status $status" ;;
  esac
  [ "$status" = 0 ] || failed=1
  say "$(printf '%-12s %5d s  %s' "$name" $((SECONDS - start)) "$result")"
  tail -n "$([ "$status" = 0 ] && echo 3 || echo 25)" "$out/$name.log" | cut -c1-300 | sed 's/^/    /' | tee -a "$report"
}

# leave_out NAME REASON
leave_out() { wants "$1" && say "$(printf '%-12s left out: %s' "$1" "$2")"; return 0; }

bring_packages() {
  compgen -G "$parts/*.whl" >/dev/null || return 0
  "$python" -m pip install -q --no-index --no-deps --upgrade --target "$work/site" "$parts"/*.whl &&
    export PYTHONPATH="$PYTHONPATH:$work/site"
}

# TensorRT 8.6 out of its parts: $work/tensorrt with include/ and lib/, and stand-ins for cuBLAS and cuDNN.
bring_tensorrt() {
  [ -z "${TENSORRT_ROOT:-}" ] || return 0
  compgen -G "$parts/tensorrt8.whl.*" >/dev/null && [ -d "$parts/tensorrt8-include" ] || return 1
  local home=$work/tensorrt
  if [ ! -e "$home/lib/libnvinfer.so.8" ]; then
    mkdir -p "$home/unpacked" && cat "$parts"/tensorrt8.whl.* >"$home/tensorrt8.whl" &&
      "$python" -m zipfile -e "$home/tensorrt8.whl" "$home/unpacked" && rm "$home/tensorrt8.whl" &&
      ln -sfn "$home/unpacked/tensorrt" "$home/lib" && ln -sfn "$parts/tensorrt8-include" "$home/include" || return 1
  fi
  "$python" tests/gpu/stand_ins.py "$home/stand-ins" "$home/lib/libnvinfer_plugin.so.8" || return 1
  export TENSORRT_ROOT=$home LD_LIBRARY_PATH="$home/lib:$home/stand-ins${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
}

build() {
  local here
  here=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') &&
    cmake -S csrc -B "$work/csrc" -G Ninja -DODTK_CUDA_ARCH="$here" -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
      -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" &&
    cmake --build "$work/csrc" && cat "$work/csrc/built.txt" && rm -f odtk/_C.*.so &&
    cp "$work"/csrc/_C*.so odtk/ && { [ ! -e "$work/csrc/libodtk_plugins.so" ] || cp "$work/csrc/libodtk_plugins.so" odtk/; }
}

# Steps run in a shell of their own, under `timeout`.
export python work
export -f build

: >"$report"
say "odtk $(git rev-parse --short HEAD 2>/dev/null || echo), $(date -u '+%Y-%m-%d %H:%M') UTC"
say "$({ nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || echo "no nvidia-smi"; } 2>/dev/null | head -1)"
say "$("$python" -c 'import sys, torch; print("Python", sys.version.split()[0], "torch", torch.__version__)' 2>&1 | tail -1)"
bring_packages >>"$report" 2>&1 || say "packages in $parts could not be installed"
bring_tensorrt >>"$report" 2>&1 && tensorrt=1 || tensorrt=0

small=(tests/gpu/test_gpu_kernels.py -k "test_decode_is_the_reference or test_nms_is_the_reference or test_nothing_is")
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)

step build 300 bash -c build
step kernels 150 "$python" -m pytest -q -rs tests/gpu/test_gpu_kernels.py
for tool in memcheck racecheck synccheck; do
  if [ -n "$sanitizer" ]; then
    step $tool 240 "$sanitizer" --tool $tool --error-exitcode 9 "$python" -m pytest -q -x "${small[@]}"
  else
    leave_out $tool "no compute-sanitizer on the PATH or in /usr/local/cuda/bin"
  fi
done
step loader 60 "$python" -m pytest -q -rs tests/gpu/test_gpu_loader.py
if [ "$tensorrt" = 1 ]; then
  step engine 540 "$python" -m pytest -q -rs tests/gpu/test_gpu_engine.py tests/gpu/test_gpu_export.py
else
  leave_out engine "no TENSORRT_ROOT, and no tensorrt8.whl.* beside tensorrt8-include/ in $parts"
fi
bccd=${ODTK_BCCD:-}
for place in shared/data/bccd ../shared/data/bccd; do [ -n "$bccd" ] || [ ! -d $place ] || bccd=$place; done
if [ -n "$bccd" ]; then
  rm -f "$work"/bccd.pth*
  step training 300 "$python" -m odtk train "$work/bccd.pth" --annotations "$bccd/train.json" --images "$bccd/train" \
    --val-annotations "$bccd/val.json" --val-images "$bccd/val" --backbone ResNet18FPN --backbone-weights none \
    --loader torch --resize 240 --max-size 320 --batch 8 --iters 300 --devices 1
else
  leave_out training "no BCCD images in \$ODTK_BCCD, shared/data/bccd or ../shared/data/bccd"
fi
step benchmark 150 "$python" benchmarks/gpu.py --report "$out/benchmark.json"
if "$python" -c 'import nvidia.dali' 2>/dev/null; then
  step dali 120 "$python" -m pytest -q -rs tests/gpu/test_gpu_dali.py
else
  leave_out dali "DALI is not installed"
fi

if "$python" -c 'import av, PyNvVideoCodec' 2>/dev/null; then
  step video 90 "$python" -m pytest -q -rs tests/gpu/test_gpu_video.py
else
  leave_out video "PyAV or PyNvVideoCodec is not installed, or the driver has no video libraries"
fi

say "$([ $failed = 0 ] && echo 'no step failed' || echo 'SOME STEPS FAILED'); logs in $out"
exit $failed
