#!/bin/sh
# Write cpu.lock and gpu.lock beside this file: what runs in the images, with hashes. Versions are those of requirements.lock
# where it has them, and what the locks had before otherwise. Needs uv and the package index.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/.."
for device in cpu gpu; do
    constraints=$(mktemp)
    grep -v '^faiss-' requirements.lock > "$constraints"
    uv pip compile pyproject.toml --extra cluster --extra aws --extra gcp --extra tune --extra report \
        --extra serve --extra tensorboard --extra mlflow --extra notebook --extra "$device" \
        --constraint "$constraints" \
        --python-version 3.11.14 --python-platform x86_64-manylinux_2_28 --generate-hashes --no-header --no-annotate \
        --quiet --output-file "$here/$device.lock" > /dev/null
    rm "$constraints"
done
