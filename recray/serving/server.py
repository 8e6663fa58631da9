"""The life of a server: where it listens, who may ask, and when it ends."""

from __future__ import annotations

import ipaddress
import os

from recray import log
from recray.errors import ConfigError, DependencyError

TOKEN = "RECRAY_SERVE_TOKEN"


def check(host: str) -> str | None:
    """The token that requests must bring, from the environment. Raises ConfigError if others could ask without one."""
    token = os.environ.get(TOKEN) or None
    if token is None and not _is_loopback(host):
        raise ConfigError(
            f"--host {host} is reachable from other machines: set {TOKEN}, which requests then bring as "
            f"`Authorization: Bearer ...`, or listen on 127.0.0.1"
        )
    return token


def serve(uri: str, host: str, port: int, wait: float, timeout: float, poll: float) -> None:
    """Serve the run or bundle at `uri` until SIGTERM or Ctrl-C; requests that were begun are answered first.

    Raises DependencyError without the extra `serve`, ConfigError for an address without a token, LineageError or StorageError
    if there is nothing to serve.
    """
    token = check(host)
    # Batches are small: threads of OpenMP would wait for each other, in a loop that takes the other threads' time.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        import uvicorn

        from recray.serving.app import create_app
    except ImportError as error:
        raise DependencyError(f"{error.name} is not installed: pip install 'recray[serve]'") from error
    from recray.serving.service import Service

    service = Service(uri, wait, timeout)
    log.info("serve", f"serving {service.loaded.model.identity} of {uri}: http://{host}:{port}/docs", event="serving")
    app = create_app(service, token, poll)
    uvicorn.run(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        proxy_headers=False,
        timeout_keep_alive=75,  # longer than balancers keep idle connections, which would else send into closed ones
        timeout_graceful_shutdown=10,
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
