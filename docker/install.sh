#!/bin/sh
# Install what cpu.lock or gpu.lock pins into the environment on PATH, and nothing else.
#   docker/install.sh cpu|gpu [TORCH_VERSION]
# TORCH_INDEX names the package index that has the wanted build of torch. pip checks the hash of every other package; torch's
# is checked where the build is that of the lock.
set -eu
device=$1
here=$(cd "$(dirname "$0")" && pwd)
lock="$here/$device.lock"
locked=$(sed -n 's/^torch==\([^ ]*\).*/\1/p' "$lock")
torch=${2:-$locked}
pip() { python -m pip --no-cache-dir --disable-pip-version-check "$@"; }

if [ "$device" = gpu ] && [ "$torch" = "$locked" ] && [ -z "${TORCH_INDEX:-}" ]; then
    pip install --no-deps --require-hashes --requirement "$lock"
    exit
fi
# Another build of torch has other CUDA libraries, or none; another version also its own version of sympy.
build='torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z]+'
alone=--no-deps
if [ "$torch" != "$locked" ] || [ "$device" = gpu ]; then
    build="$build|sympy"
    alone=
fi
rest=$(mktemp)
awk -v build="^($build)==" '/^[A-Za-z0-9]/ { skip = $0 ~ build && !/-cu12==/ } !skip' "$lock" > "$rest"
pip install $alone ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch==$torch"
pip install --no-deps --require-hashes --requirement "$rest"
rm "$rest"
