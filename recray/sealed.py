"""JSON files that recray reads back. Each holds the SHA-256 of its other content, so that a damaged one is refused."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from recray import leases, storage, strict_json
from recray.errors import LineageError

_SEAL = "sha256"


def write(uri: str, body: dict[str, Any]) -> None:
    """Write an object, with its hash. Raises StorageError if another process has taken over what this one writes."""
    leases.check()
    storage.write_bytes(uri, dump(body))


def dump(body: dict[str, Any]) -> bytes:
    """The bytes of such a file."""
    plain: dict[str, Any] = json.loads(strict_json.dumps(body))
    return (strict_json.dumps(plain | {_SEAL: hash_of(plain)}, indent=2) + "\n").encode()


def read(uri: str, remedy: str) -> dict[str, Any]:
    """The object in a file that `write` wrote, without its hash.

    remedy: what to do about a file that is damaged. Raises LineageError that names the file, StorageError if it cannot be
    read.
    """
    data = storage.read_bytes(uri)
    try:
        body = strict_json.loads(data)
    except ValueError as error:
        raise LineageError(f"{uri} is damaged (no JSON: {error}): {remedy}") from None
    if not isinstance(body, dict):
        raise LineageError(f"{uri} is damaged (no JSON object): {remedy}")
    seal = body.pop(_SEAL, None)
    if seal is None:
        version = body.get("recray_version", "another version")
        raise LineageError(f"{uri} was written by recray {version} without a hash of its content: {remedy}")
    if seal != hash_of(body):
        raise LineageError(f"{uri} is damaged (its content does not have the hash that it names): {remedy}")
    return body


def hash_of(body: dict[str, Any]) -> str:
    """SHA-256 of an object, whatever the order of its keys and its white space."""
    return hashlib.sha256(strict_json.dumps(body, sort_keys=True).encode()).hexdigest()
