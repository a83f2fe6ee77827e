#!/usr/bin/env bash
# Cross-compiles kernels, plugins and engine for Jetson (aarch64) and runs the plugins there under qemu. No Jetson, no GPU.
#   csrc/jetson.sh            everything under build/jetson; downloads about 240 MB the first time (PyPI, Debian 11)
#   csrc/jetson.sh --offline  only with what an earlier run has downloaded
# Needed: nvcc of CUDA 13, cmake, ninja, Debian's g++-aarch64-linux-gnu and qemu-user, and TensorRT's headers: those in
# $TENSORRT_ROOT/include, else those of every /opt/tensorrt*/include. Other environment: PYTHON (for pip), CUDA_HOME.
# docs/jetson.md says what this shows and what it does not.
set -euo pipefail
top=$(cd "$(dirname "$0")/.." && pwd)
work=$top/build/jetson
cuda=${CUDA_HOME:-/usr/local/cuda}
PYTHON=${PYTHON:-python3}
offline=""; [ "${1:-}" != --offline ] || offline=1
LEAN=11.4.0.106  # the version of `trt-tests` in pyproject.toml
# Debian 11 has GLIBC 2.31 and GCC 10, as JetPack 5 (Ubuntu 20.04) has GLIBC 2.31 and the libstdc++ of GCC 10.
GLIBC=2.31 GLIBCXX=3.4.28
COMPILER="g++-10-aarch64-linux-gnu gcc-10-aarch64-linux-gnu cpp-10-aarch64-linux-gnu binutils-aarch64-linux-gnu
  libgcc-10-dev-arm64-cross libstdc++-10-dev-arm64-cross libstdc++6-arm64-cross libgcc-s1-arm64-cross libc6-arm64-cross
  libc6-dev-arm64-cross linux-libc-dev-arm64-cross libisl23 libmpc3 libmpfr6 libgmp10"

say() { echo "jetson: $*"; }
fail() { echo "jetson: $*" >&2; exit 1; }
# Runs a command and shows its output only if it fails.
quietly() { "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; fail "failed: $*"; }; }

tools() {
  local missing=""
  for tool in aarch64-linux-gnu-g++:g++-aarch64-linux-gnu qemu-aarch64:qemu-user cmake:cmake ninja:ninja-build \
    g++:g++ readelf:binutils; do
    command -v "${tool%%:*}" >/dev/null || missing+=" ${tool#*:}"
  done
  [ -z "$missing" ] || fail "not found:$missing. Install with: apt-get install --no-install-recommends$missing"
  release=$("$cuda/bin/nvcc" --version 2>/dev/null | sed -n 's/.*release \([0-9.]*\),.*/\1/p') || true
  [[ ${release:-none} == 13.* ]] || fail "nvcc of CUDA 13 is needed in $cuda/bin (set CUDA_HOME), found: ${release:-none}."
}

# CUDA's headers and static runtime, and TensorRT's lean runtime, for aarch64.
wheels() {
  local pip=("$PYTHON" -m pip download -q --disable-pip-version-check --no-deps --only-binary=:all: -d "$work/wheels")
  if [ ! -d "$work/nvidia-$release" ] || [ ! -d "$work/lean-$LEAN" ]; then
    [ -z "$offline" ] || fail "the aarch64 files of CUDA $release and TensorRT are not in build/jetson; run make jetson once."
    say "downloading CUDA $release and TensorRT lean $LEAN for aarch64 from PyPI (73 MB)"
    mkdir -p "$work/wheels"
    quietly "${pip[@]}" --platform manylinux2014_aarch64 "nvidia-cuda-runtime==$release.*" "nvidia-cuda-crt==$release.*" \
      "nvidia-cuda-cccl==$release.*"
    quietly "${pip[@]}" --platform manylinux_2_35_aarch64 "tensorrt-lean-cu13-libs==$LEAN"
    rm -rf "$work/part"
    for wheel in "$work"/wheels/nvidia_*.whl; do "$PYTHON" -m zipfile -e "$wheel" "$work/part/nvidia"; done
    "$PYTHON" -m zipfile -e "$work"/wheels/tensorrt_lean_*.whl "$work/part/lean"
    rm -rf "$work/nvidia-$release" "$work/lean-$LEAN"
    mv "$work/part/nvidia" "$work/nvidia-$release"
    mv "$work/part/lean" "$work/lean-$LEAN"
    rm -r "$work/wheels"
  fi
  lean=$work/lean-$LEAN/tensorrt_lean_libs/libnvinfer_lean.so.${LEAN%%.*}
}

# Debian 11's cross compiler, unpacked (nothing is installed); where it cannot be had, the machine's own.
compiler() {
  local apt=$work/apt debian=$work/debian11
  if [ ! -d "$debian" ] && [ -z "$offline" ] && command -v apt-get >/dev/null; then
    say "downloading Debian 11's cross compiler (163 MB)"
    mkdir -p "$apt/lists" "$apt/cache" "$apt/debs"
    : >"$apt/status"
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bullseye main" \
      >"$apt/sources.list"
    local options=(-q -o "Dir::Etc::SourceList=$apt/sources.list" -o Dir::Etc::SourceParts=- -o "Dir::State::Lists=$apt/lists"
      -o "Dir::Cache=$apt/cache" -o "Dir::State::Status=$apt/status")
    # shellcheck disable=SC2086
    if (cd "$apt/debs" && apt-get "${options[@]}" update && apt-get "${options[@]}" download $COMPILER) >"$work/log" 2>&1; then
      for package in "$apt"/debs/*.deb; do dpkg -x "$package" "$apt/root"; done
      rm -f "$apt"/root/usr/lib/gcc-cross/aarch64-linux-gnu/10/lto1 "$apt"/root/usr/bin/*lto-dump*
      mv "$apt/root" "$debian"
    else
      say "Debian 11's compiler cannot be had: $(tail -1 "$work/log")"
    fi
    rm -rf "$apt"
  fi
  sysroot=/usr/aarch64-linux-gnu  # to run what was built: the lean runtime wants GLIBC 2.35
  if [ -d "$debian" ]; then
    old=$debian/usr/aarch64-linux-gnu
    printf '#!/bin/sh\nexport LD_LIBRARY_PATH="%s"\nexec "%s" --sysroot="%s" "$@"\n' "$debian/usr/lib/x86_64-linux-gnu" \
      "$debian/usr/bin/aarch64-linux-gnu-g++-10" "$debian" >"$work/g++"
  else
    old=""
    printf '#!/bin/sh\nexec aarch64-linux-gnu-g++ "$@"\n' >"$work/g++"
  fi
  chmod +x "$work/g++"
  cxx=$work/g++
  say "$("$cxx" --version | head -1), nvcc $release"
}

# A toolkit whose programs are this machine's and whose headers and libraries are aarch64's. nvcc finds them beside itself.
toolkit() {
  kit=$work/cuda-$release
  rm -rf "$kit"
  mkdir -p "$kit/bin"
  ln -s "$cuda"/bin/* "$kit/bin/"
  rm "$kit/bin/nvcc"
  cp "$cuda/bin/nvcc" "$kit/bin/nvcc"
  ln -s "$cuda/nvvm" "$kit/nvvm"
  mkdir "$kit/include"
  ln -s "$cuda/include/fatbinary_section.h" "$work/nvidia-$release"/nvidia/cu13/include/* "$kit/include/"  # nvcc's own; aarch64's
  ln -s "$work/nvidia-$release/nvidia/cu13/lib" "$kit/lib"
  ln -s lib "$kit/lib64"
}

# The architectures of Xavier, Orin and Thor (101 is Thor's name before CUDA 13), as far as this nvcc knows them.
architectures() {
  local known
  known=$("$kit/bin/nvcc" --list-gpu-code)
  arch=""
  for jetson in 72:Xavier 87:Orin 101:Thor 110:Thor; do
    local number=${jetson%:*}
    if grep -qx "sm_$number" <<<"$known"; then
      arch+=${arch:+;}$number
      say "sm_$number (${jetson#*:}): compiled"
    elif [ "$number" != 101 ]; then
      say "sm_$number (${jetson#*:}): left out, nvcc $release does not know it"
    fi
  done
}

# The highest version that a library needs: GLIBC or GLIBCXX.
needs() { readelf -VW "$1" | grep -oE "\b$2_[0-9.]+" | sed "s/$2_//" | sort -V | tail -1; }
at_most() { [ "$(printf '%s\n' "$1" "$2" | sort -V | tail -1)" = "$2" ]; }

# The library as a program on the old GLIBC opens it: all symbols are there, and it hands over its creators.
opens() {
  # shellcheck disable=SC2016
  echo '#include <dlfcn.h>
#include <cstdio>
int main(int, char** argv) {
  void* library = dlopen(argv[1], RTLD_NOW);
  if (!library) return std::fprintf(stderr, "%s\n", dlerror()), 1;
  void* creators = dlsym(library, "getCreators");
  if (!creators) creators = dlsym(library, "getPluginCreators");
  int count = 0;
  if (creators) reinterpret_cast<void* (*)(int&)>(creators)(count);
  return count == 2 ? 0 : 2;
}' | "$cxx" -std=c++17 -x c++ - -o "$work/open" -ldl
  quietly qemu-aarch64 -L "$old" "$work/open" "$1"
}

# Kernels, plugins and engine by csrc/CMakeLists.txt, once per TensorRT whose headers are found.
build() {
  built=""
  local places=(/opt/tensorrt*/include)
  [ -z "${TENSORRT_ROOT:-}" ] || places=("$TENSORRT_ROOT/include")
  for include in "${places[@]}"; do
    [ -f "$include/NvInferRuntime.h" ] || continue
    local version folder library
    version=$(printf '#include <NvInferVersion.h>\nNV_TENSORRT_MAJOR NV_TENSORRT_MINOR NV_TENSORRT_PATCH' |
      g++ -E -P -x c++ -isystem "$include" - | tail -1 | tr ' ' .)
    folder=$work/tensorrt-$version
    quietly cmake --fresh -S "$top/csrc" -B "$folder" -G Ninja -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
      -DCMAKE_CXX_COMPILER="$cxx" -DCMAKE_CUDA_COMPILER="$kit/bin/nvcc" -DCMAKE_CUDA_HOST_COMPILER="$cxx" \
      -DCMAKE_CXX_FLAGS=-Werror -DODTK_CUDA_ARCH="$arch" -DODTK_PYTHON=OFF -DTENSORRT_ROOT="${include%/include}"
    quietly nice cmake --build "$folder"
    library=$folder/libodtk_plugins.so
    # The engine has no library of its own without Python: link it whole, so that a missing symbol is found.
    quietly "$cxx" -shared -Wl,--no-undefined -Wl,--whole-archive "$folder/libodtk_engine.a" -Wl,--no-whole-archive \
      "$folder/libodtk_kernels.a" "$kit/lib/libcudart_static.a" -o "$work/engine.so" -ldl -lpthread -lrt
    local glibc glibcxx
    glibc=$(needs "$library" GLIBC) glibcxx=$(needs "$library" GLIBCXX)
    if [ -n "$old" ]; then
      at_most "$glibc" "$GLIBC" || fail "$library needs GLIBC $glibc, but JetPack 5 has $GLIBC."
      at_most "$glibcxx" "$GLIBCXX" || fail "$library needs GLIBCXX $glibcxx, but JetPack 5 has $GLIBCXX."
      opens "$library"
      say "TensorRT $version: plugins and engine compile without warnings and link; libodtk_plugins.so needs GLIBC $glibc" \
        "and GLIBCXX $glibcxx, and opens on GLIBC $GLIBC (JetPack 5)"
    else
      say "TensorRT $version: plugins and engine compile without warnings and link; libodtk_plugins.so needs GLIBC $glibc" \
        "and GLIBCXX $glibcxx, so it is for JetPack 6 and later (JetPack 5 has $GLIBC; Debian 11's compiler was not there)"
    fi
    [ "${version%%.*}" != "${LEAN%%.*}" ] || built=$include
  done
  [ -n "$built" ] || fail "no headers of TensorRT ${LEAN%%.*} in /opt/tensorrt*/include (set TENSORRT_ROOT)."
}

# tests/csrc/plugins_probe.cpp and the plugins with emulated kernels, for the compiler and the folder given.
probe() {
  local compiler=$1 folder=$2 flags=(-std=c++17 -O1 -fPIC -fvisibility=hidden -ffp-contract=off)
  # Before GCC 13 C++ has this name of half precision on x86 only.
  echo '_Float16 value;' | "$compiler" -x c++ -fsyntax-only - 2>/dev/null || flags+=(-D_Float16=__fp16)
  rm -rf "$folder"
  mkdir -p "$folder"
  flags+=(-isystem "$built" "-I$top/tests/emulation" "-I$top/csrc")
  for source in "$top"/csrc/plugins/*.cpp "$top/csrc/cuda/decode.cu" "$top/csrc/cuda/nms.cu"; do
    quietly "$compiler" "${flags[@]}" -x c++ -c "$source" -o "$folder/$(basename "$source").o"
  done
  quietly "$compiler" -shared -Wl,--no-undefined "$folder"/*.o -o "$folder/libodtk_plugins.so" -ldl -lpthread
  quietly "$compiler" "${flags[@]}" "$top/tests/csrc/plugins_probe.cpp" -o "$folder/probe" -ldl
}

# The same questions to the plugins here and under qemu, each beside the real TensorRT lean runtime of its processor.
run() {
  local native
  native=$("$PYTHON" -c 'import importlib.util as u; s = u.find_spec("tensorrt_lean_libs"); print(s.submodule_search_locations[0])' \
    2>/dev/null) || fail "the lean runtime of this machine is missing: $PYTHON -m pip install tensorrt-lean-cu13-libs==$LEAN"
  probe g++ "$work/native"
  probe "$cxx" "$work/aarch64"
  local arm=(qemu-aarch64 -L "$sysroot" "$work/aarch64/probe" "$lean")
  for how in dlopen loadLibrary; do
    "$work/native/probe" "$native/$(basename "$lean")" "$work/native/libodtk_plugins.so" "$how" >"$work/native/$how" 2>&1 ||
      fail "the probe fails on this machine: $(tail -1 "$work/native/$how")"
    "${arm[@]}" "$work/aarch64/libodtk_plugins.so" "$how" >"$work/aarch64/$how" 2>&1 ||
      fail "the probe fails under qemu: $(tail -1 "$work/aarch64/$how")"
    # And the library with the real kernels, which the probe does not launch.
    "${arm[@]}" "$work"/tensorrt-"${LEAN%%.*}".*/libodtk_plugins.so "$how" >"$work/aarch64/$how-cuda" 2>&1 ||
      fail "the probe fails under qemu with the CUDA kernels: $(tail -1 "$work/aarch64/$how-cuda")"
    for answers in "$how" "$how-cuda"; do
      diff "$work/native/$how" "$work/aarch64/$answers" >&2 ||
        fail "the plugins answer otherwise under qemu (left: here; right: aarch64)."
    done
    say "TensorRT lean $LEAN under qemu, $how: creators registered; $(grep -c '=' "$work/aarch64/$how") lines of the probe," \
      "all as here, with emulated kernels and with those of CUDA"
  done
}

mkdir -p "$work"
tools
wheels
compiler
toolkit
architectures
build
run
