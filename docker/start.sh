#!/bin/sh
# The entry point of the images: go on as the owner of the working directory, where the container was started as root (as
# `docker run` does by default). Files that are written to a mounted folder then belong to the owner of that folder.
# A folder of root is worked in as root: in rootless engines that is the user who started the container.
set -eu
if [ "$(id -u)" = 0 ]; then
    user=$(stat -c %u .)
    if [ "$user" != 0 ]; then
        exec setpriv --reuid "$user" --regid "$(stat -c %g .)" --clear-groups --no-new-privs -- "$0" "$@"
    fi
fi
if [ ! -w "$HOME" ]; then  # of another user than that of the image
    HOME=/tmp/home-$(id -u)
    export HOME
    mkdir -p -m 700 "$HOME"
fi
exec "$@"
