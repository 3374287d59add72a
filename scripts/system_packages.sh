#!/usr/bin/env bash
# Makes sure that this machine has the system packages named as needs, or says in one line how to get them.
#
#   scripts/system_packages.sh NEED...        NEED: python venv headers compiler opengl make cross qemu
#
# A need that is met costs nothing. One that is not is installed when apt-get exists and we are root or may use sudo
# without a password; otherwise the exact command is printed and the exit status is 1.
set -euo pipefail

python="${PYTHON:-python3}"

loads() { "$python" -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "$1"; }

met() {
  case "$1" in
    python) command -v "$python" ;;
    venv) "$python" -c 'import ensurepip, venv' ;;
    headers) "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ;;
    compiler) command -v "${CXX:-c++}" ;;
    make) command -v make ;;
    # Rendering without a display: EGL, with the driver of a graphics card or Mesa's software one behind it.
    opengl) loads libEGL.so.1 && loads libGL.so.1 && { loads libEGL_mesa.so.0 || loads libEGL_nvidia.so.0; } ;;
    cross) command -v aarch64-linux-gnu-g++ ;;
    qemu) command -v qemu-aarch64 ;;
    *) false ;;
  esac >/dev/null 2>&1
}

packages_for() {
  case "$1" in
    python) echo python3 ;;
    venv) echo python3-venv ;;
    headers) echo python3-dev ;;
    compiler) echo g++ ;;
    make) echo make ;;
    opengl) echo libegl1 libegl-mesa0 libgl1 libgl1-mesa-dri libopengl0 ;;
    cross) echo g++-aarch64-linux-gnu ;;
    qemu) echo qemu-user ;;
    *) echo "error: unknown need '$1'" >&2; return 2 ;;
  esac
}

missing=()
for need in "$@"; do
  if ! met "$need"; then
    packages="$(packages_for "$need")"
    read -ra names <<<"$packages"
    missing+=("${names[@]}")
  fi
done
[ "${#missing[@]}" -eq 0 ] && exit 0

become=""
[ "$(id -u)" -eq 0 ] || become="sudo"
command="${become:+$become }apt-get install -y --no-install-recommends ${missing[*]}"
if ! command -v apt-get >/dev/null; then
  echo "error: this machine lacks what Debian and Ubuntu call: ${missing[*]}. Install the equivalent, then run this again" >&2
  exit 1
fi
if [ -n "$become" ] && ! sudo -n true 2>/dev/null; then
  echo "error: system packages are missing. Run: $command" >&2
  exit 1
fi

echo "system: installing ${missing[*]}"
log="$(mktemp)"
trap 'rm -f "$log"' EXIT
${become:+$become -n} apt-get update -qq >"$log" 2>&1 || true
# A package that this release calls otherwise must not stop the others; the check below has the last word.
known=()
for package in "${missing[@]}"; do
  if apt-cache show "$package" >/dev/null 2>&1; then known+=("$package"); fi
done
if ! ${become:+$become -n} env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${known[@]}" >>"$log" 2>&1; then
  tail -n 5 "$log" >&2
  echo "error: installing system packages failed. Run: $command" >&2
  exit 1
fi
for need in "$@"; do
  met "$need" || { echo "error: '$need' is still missing after installing $(packages_for "$need")" >&2; exit 1; }
done
