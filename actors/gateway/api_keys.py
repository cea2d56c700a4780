"""API keys: a file of NAME:KEY[:MODEL,...] lines, for its reader's eyes alone. Read again when it changes."""

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
MIN_KEY_CHARACTERS = 16  # characters of a key


@dataclass(frozen=True, slots=True)
class ApiKey:
    """`digest` is the key's sha256. `models`: those that it may ask for; None: all."""

    name: str
    digest: bytes
    models: frozenset[str] | None


class ApiKeys:
    """The keys of a file as it is now. A change that cannot be read is logged, and the keys stay as they were."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._keys, self._seen = read_keys(file), file_version(file)

    def find(self, given: str) -> ApiKey | None:
        """The key that was given. It takes the same time whichever it is, and none."""
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
            log.warning("the API keys stay as they were: %s", error)


def file_version(file: Path) -> tuple[int, ...]:
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_mode


def read_keys(file: Path) -> tuple[ApiKey, ...]:
    """Raises InvalidRequest, which names the line and never a key."""
    try:
        found = file.stat()
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(
            f"the API keys in {file} cannot be read ({type(error).__name__}): give a file of text",
            "api_keys",
        ) from error
    if is_open(found.st_mode, found.st_uid, os.geteuid()):
        raise InvalidRequest(f"others than its owner can use {file}: chmod 600 {file}", "api_keys")
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
    """Whether others than this user can use a file of that mode and owner. Where root has laid it down for another user, as Kubernetes
    does with secrets, that one reads it as its group, and by nothing else: reading is the group's then, all else is nobody's."""
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
            f"line {number} of the API keys is not NAME:KEY[:MODEL,...] with a key of {MIN_KEY_CHARACTERS} characters or more",
            "api_keys",
        )
    allowed = (
        frozenset(model.strip() for model in models.split(",") if model.strip()) if colon else None
    )
    return ApiKey(name, hashlib.sha256(key.encode()).digest(), allowed)
