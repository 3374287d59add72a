#!/usr/bin/env bash
# Builds and runs check_kernels: plain, with sanitizers, and for 64-bit Arm under emulation.
# A part whose tools are missing says NOT RUN; with --ci that is an error.
set -euo pipefail
cd "$(dirname "$0")/../.."

ci=false
[[ ${1:-} == --ci ]] && ci=true

not_run() {
  echo "NOT RUN: $1"
  if $ci; then exit 1; fi
}

build() { # folder, options
  local folder=build/$1
  shift
  cmake -S . -B "$folder" -DBITVLA_BUILD_PYTHON=OFF -DBITVLA_BUILD_TESTS=ON "$@" >"$folder.log" 2>&1 &&
    cmake --build "$folder" --parallel 2 >>"$folder.log" 2>&1 ||
    { cat "$folder.log"; exit 1; }
}

has_sanitizers() {
  echo 'int main() {}' | "${CXX:-c++}" -x c++ -fsanitize=address,undefined - -o build/sanitizer-probe 2>/dev/null
}

mkdir -p build

echo "kernels: every instruction set of this processor against the reference"
build native
build/native/check_kernels

if has_sanitizers; then
  echo "kernels: the same with address and undefined-behaviour sanitizers"
  build native-sanitize -DBITVLA_SANITIZE=ON -DCMAKE_BUILD_TYPE=RelWithDebInfo
  build/native-sanitize/check_kernels
else
  not_run "sanitizers: the compiler has none"
fi

if [[ $(uname -m) == aarch64 || $(uname -m) == arm64 ]]; then
  echo "kernels: this is 64-bit Arm, nothing to emulate"
elif command -v aarch64-linux-gnu-g++ >/dev/null && command -v qemu-aarch64 >/dev/null; then
  echo "kernels: 64-bit Arm, emulated"
  build native-aarch64 -DCMAKE_TOOLCHAIN_FILE=csrc/aarch64.cmake
  qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu max build/native-aarch64/check_kernels --require neon
else
  not_run "aarch64: needs aarch64-linux-gnu-g++ and qemu-aarch64"
fi
