#!/bin/sh
# Install what requirements.lock and the locks beside this file pin, with the pip that is on PATH.
#   docker/install.sh cpu|gpu [TORCH_VERSION]      PIP_INDEX_URL and friends choose the build of torch, as everywhere
set -eu
device=$1
here=$(cd "$(dirname "$0")" && pwd)
lock="$here/../requirements.lock"
locked=$(sed -n 's/^torch==//p' "$lock")
torch=${2:-$locked}

# torch first and alone: no later resolution may pick another build of it.
env ${TORCH_INDEX:+PIP_INDEX_URL="$TORCH_INDEX"} pip install --no-cache-dir "torch==$torch"

rest=$(mktemp)
grep -v '^torch==' "$lock" > "$rest"
if [ "$torch" != "$locked" ]; then  # torch pins its sympy
    sed -i '/^sympy==/d' "$rest"
fi
if [ "$device" = gpu ]; then  # faiss-cpu and faiss-gpu both install the package faiss
    sed -i '/^faiss-cpu==/d' "$rest"
    cat "$here/gpu.lock" >> "$rest"
fi
pip install --no-cache-dir -r "$rest" -r "$here/notebook.lock"
rm "$rest"
