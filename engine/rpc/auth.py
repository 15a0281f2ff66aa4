"""The cluster token authenticates coordinators and workers of one cluster to each other.

    file, one secret a line --ClusterToken--+-- caller: `authorization: Bearer FIRST LINE`
                                            '-- callee: check() before it parses a request; any line

The token gives access to prompts, outputs and the memory of workers (docs/security.md). All lines
are accepted and the first is sent, so that the token can be changed without downtime. The secret
appears in no command line, variable, log line or repr.

A coordinator without a file generates a token. Its local workers, and commands of its user
(local_token.py), read it from a memfd, which no other user can open and which ends with the
coordinator.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address

from engine.base.errors import ConfigError, PermissionDenied, Unauthenticated
from engine.base.option_groups import AuthOptions
from engine.telemetry.log import get_logger

_log = get_logger(__name__)

MIN_SECRET_BYTES = 16
_MAX_SECRET_BYTES = 1024  # sent in the headers of every call
_MAX_SECRETS = 8
_FLAG = "--cluster-token-file"
_KEY = "authorization"
SHARED_NAME = "diptych-cluster-token"  # of the memfd
OPERATOR_NAME = "diptych-operator-token"  # of the memfd if workers need no token
_REMEDY = f"set {_FLAG} to the file that the processes of this cluster share"

Metadata = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True, slots=True)
class ClusterToken:
    """The secrets of one cluster; the first is sent."""

    _secrets: tuple[str, ...] = field(repr=False)

    @classmethod
    def load(cls, path: str) -> ClusterToken:
        """Read a file. Raises ConfigError that names the flag, never the content."""
        try:
            with open(path, "rb") as file:
                raw = file.read(_MAX_SECRETS * (_MAX_SECRET_BYTES + 2) + 1)
                mode = os.fstat(file.fileno()).st_mode
        except OSError as error:
            raise ConfigError(f"{_FLAG} {path}: {error.strerror}") from None
        if mode & stat.S_IROTH:
            _log.warning("every user of this machine can read the cluster token", file=path)
        lines = [line.strip() for line in raw.splitlines() if line.strip()]
        if not lines or any(len(line) < MIN_SECRET_BYTES for line in lines):
            raise ConfigError(f"{_FLAG} {path}: expected at least {MIN_SECRET_BYTES} bytes a line")
        if len(lines) > _MAX_SECRETS or any(len(line) > _MAX_SECRET_BYTES for line in lines):
            raise ConfigError(
                f"{_FLAG} {path}: expected at most {_MAX_SECRETS} lines, each of at most"
                f" {_MAX_SECRET_BYTES} bytes"
            )
        if not all(byte in range(0x21, 0x7F) for line in lines for byte in line):
            raise ConfigError(
                f"{_FLAG} {path}: expected printable characters without spaces, such as"
                " `openssl rand -hex 32` gives"
            )
        return cls(tuple(line.decode() for line in lines))

    @classmethod
    def random(cls) -> ClusterToken:
        """A new random token."""
        return cls((secrets.token_hex(32),))

    def share(self, name: str = SHARED_NAME) -> str:
        """Path of a memfd that `load` can read while this process lives; only for this user."""
        descriptor = os.memfd_create(name)
        os.fchmod(descriptor, 0o600)
        os.write(descriptor, "\n".join(self._secrets).encode())
        return f"/proc/{os.getpid()}/fd/{descriptor}"

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """The metadata that authenticates a call."""
        return ((_KEY, f"Bearer {self._secrets[0]}"),)

    def check(self, metadata: Metadata | None) -> None:
        """Raise Unauthenticated for a call without a token, PermissionDenied for a wrong one."""
        self.check_values([str(value) for key, value in metadata or () if key == _KEY])

    def check_values(self, values: Sequence[str]) -> None:
        """Check the values of an `authorization` header; raises as `check`."""
        if not values:
            raise Unauthenticated(f"no cluster token; {_REMEDY}")
        # Constant time: digests have one length, and all of them are compared.
        found = False
        for value in values:
            scheme, _, secret_sent = value.partition(" ")
            digest = _digest(secret_sent if scheme.lower() == "bearer" else "")
            for secret in self._secrets:
                found |= hmac.compare_digest(digest, _digest(secret))
        if not found:
            raise PermissionDenied(f"not this cluster's token; {_REMEDY}")

    def pseudonym(self, text: str) -> str:
        """A short keyed hash of `text`, equal in all processes of the cluster."""
        key = self._secrets[0].encode()[: hashlib.blake2b.MAX_KEY_SIZE]
        digest = hashlib.blake2b(text.encode(errors="replace"), key=key, digest_size=6)
        return f"~{digest.hexdigest()}"


def token_for(options: AuthOptions, flag: str, address: str) -> ClusterToken | None:
    """The token of a process whose internal services listen on `address`, the value of `flag`.

    None without a file. Raises ConfigError if other machines can then reach `address`.
    """
    if options.cluster_token_file:
        return ClusterToken.load(options.cluster_token_file)
    if not stays_on_this_machine(address):
        raise ConfigError(
            f"{flag} {address}: other machines may reach this; set {_FLAG} to a file with the"
            " secret that all coordinators and workers share (docs/security.md)"
        )
    _log.warning("no cluster token: every user of this machine may call as a worker", flag=_FLAG)
    return None


def stays_on_this_machine(address: str) -> bool:
    """Whether HOST:PORT can be reached from this machine only."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # a name, which may resolve to any address
        return False


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
