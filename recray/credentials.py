"""Refuse credentials in URIs and configuration values, which would end up in records, logs and error messages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from recray.errors import ConfigError

# user@, user:password@ and :password@ before the host. A password may hold a slash that is not encoded, but a port may
# not: http://host:8265/a@b is fine. gs://anonymous@bucket is how pyarrow asks for public data.
_USER = re.compile(r"(?:^|:)//(?!anonymous@)(?:[^/?#@\s]*@|[^/?#@\s:]*:(?!\d*(?:[/?#]|$))[^@\s]*@)", re.IGNORECASE)
_BUCKET_COLON = re.compile(r"\b(?:s3[an]?|gs)://[^/?#\s]*:", re.IGNORECASE)  # a bucket has no port
_SECRET = (
    "password|passwd|pwd|pass|secret|secrets|token|credential|credentials|signature|sig|sas|authorization|auth|bearer|jwt|"
    "(?:.*(?:secret|access|account|api|auth|private|encryption|session|shared|storage|master|aws|sas|signing).*key)|"
    "(?:key|keyid|.*accesskeyid|googleaccessid)|(?:.*(?:secret|password|token|credential|signature))"
)
_IN_QUERY = re.compile(rf"(?:{_SECRET})")
_QUERY = re.compile(r"[?&;#]([\w.%~+-]+)=([^&;#\s]*)")
# Names of configuration keys are the user's where they name columns or features, so fewer of them are taken for secrets.
_KEYS = re.compile(
    r"password|passwd|secret|secretkey|(?:aws)?secretaccesskey|(?:aws)?accesskey(?:id)?|accountkey|apikey|privatekey|"
    r"(?:auth|access|session|bearer)token|connectionstring|credentials"
)
_ADVICE = (
    "every value is written into records, logs and messages. Leave them out, and give them by the environment "
    "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, RAY_AUTH_TOKEN), by a profile "
    "(AWS_PROFILE, ~/.aws/credentials) or by the role of the machine"
)


def refuse(value: Any, where: str) -> None:
    """Raise ConfigError if `value`, a string or nested tables and lists of them, holds credentials.

    where: what the value is called, e.g. "data.path"; of a table the dotted key is appended. The message does not
    repeat the value.
    """
    for key, text in _strings(value, ""):
        name = ".".join(filter(None, (where, key)))
        if found_in(text):
            raise ConfigError(f"{name} holds credentials in a URI: {_ADVICE}, and write for example s3://bucket/folder")
        if _KEYS.fullmatch(_plain(key.rpartition(".")[2])) and text:
            raise ConfigError(f"{name} is a secret: {_ADVICE}")


def found_in(text: str) -> bool:
    """Whether a text holds a URI with a user, a password, or a query parameter that is named like a secret."""
    return any(_has(form) for form in {text, unquote(text), unquote(unquote(text))})


def _has(text: str) -> bool:
    if _USER.search(text) or _BUCKET_COLON.search(text):
        return True
    # In a path without a scheme a question mark is part of a pattern.
    query = _QUERY.findall(text) if "://" in text else []
    return any(_IN_QUERY.fullmatch(_plain(name)) or re.search(r":[^@\s]*@", value) for name, value in query)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _strings(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every string, keys included."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            if found_in(str(name)):
                yield key, str(name)
            yield from _strings(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple | set | frozenset):
        for inner in value:
            yield from _strings(inner, key)
