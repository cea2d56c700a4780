"""API keys: a private file of NAME:KEY[:MODEL,...] lines, read again when it changes."""

import hashlib
import hmac
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from runtime.core.errors import InvalidRequest

log = logging.getLogger(__name__)

NAME_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,64}")
MIN_KEY_CHARACTERS = 16


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key. `digest` is its sha256. `models` are those it may use; None means all."""

    name: str
    digest: bytes
    models: frozenset[str] | None


class ApiKeys:
    """The keys of a file. An invalid change is logged, and the previous keys stay valid."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._keys, self._seen = read_keys(file), file_version(file)

    def find(self, given: str) -> ApiKey | None:
        """Returns the key, or None if it is unknown. It takes the same time in all cases."""
        self._reload()
        digest = hashlib.sha256(given.encode(errors="replace")).digest()
        found: ApiKey | None = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found

    def _reload(self) -> None:
        now = file_version(self.file)
        if now == self._seen:
            return
        self._seen = now
        try:
            self._keys = read_keys(self.file)
        except InvalidRequest as error:
            log.warning("the new API keys cannot be used, the old ones stay: %s", error)


def file_version(file: Path) -> tuple[int, ...]:
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode


def read_keys(file: Path) -> tuple[ApiKey, ...]:
    """Reads the file. Raises InvalidRequest, which names the line but never a key."""
    try:
        found = file.stat()
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"the API keys in {file} cannot be read ({type(error).__name__}): give a file of text",
            "api_keys",
        ) from error
    if is_open(found.st_mode, found.st_uid, os.geteuid()):
        raise InvalidRequest(
            f"users other than its owner can access {file}: chmod 600 {file}", "api_keys"
        )
    keys = [
        parse_line(number, line)
        for number, line in enumerate(lines, 1)
        if line.strip() and not line.startswith("#")
    ]
    if not keys:
        raise InvalidRequest(f"{file} holds no API key: write lines of NAME:KEY", "api_keys")
    for what in ("name", "digest"):
        if len({getattr(key, what) for key in keys}) < len(keys):
            raise InvalidRequest(
                f"a {'name' if what == 'name' else 'key'} stands twice in {file}: give each once",
                "api_keys",
            )
    return tuple(keys)


def is_open(mode: int, owner: int, reader: int) -> bool:
    """Tells whether users other than the reader can access a file of this mode and owner.

    If root owns it and the reader is another user, as with Kubernetes secrets, the reader gets
    access through the group: then the group may read, and others may do nothing.
    """
    return bool(mode & (0o037 if owner == 0 != reader else 0o077))


def parse_line(number: int, line: str) -> ApiKey:
    name, _, rest = line.strip().partition(":")
    key, colon, models = rest.partition(":")
    if (
        not NAME_PATTERN.fullmatch(name)
        or len(key) < MIN_KEY_CHARACTERS
        or not key.isascii()
        or not key.isprintable()
        or " " in key
    ):
        raise InvalidRequest(
            f"line {number} of the API keys is not NAME:KEY[:MODEL,...] with a key of"
            f" {MIN_KEY_CHARACTERS} characters or more",
            "api_keys",
        )
    allowed = (
        frozenset(model.strip() for model in models.split(",") if model.strip()) if colon else None
    )
    return ApiKey(name, hashlib.sha256(key.encode()).digest(), allowed)
