"""The cluster token: how coordinators and workers of one cluster know each other.

    file, a secret a line --ClusterToken--+-- caller: `authorization: Bearer FIRST LINE`, every call
                                          '-- callee: check() before a request is parsed; any line

Whoever has the token is trusted with the cluster: with its prompts, its workers' memory and its
answers (docs/security.md). Several lines let it be changed without a pause: all are accepted, the
first is sent. The secret is in no command line, no variable, no log line and no repr.

A coordinator without a file makes a token of its own. Workers that it starts, and commands of its
user (local_token.py), find it in a file in memory, which no other user can open and which ends with
the coordinator.
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
from engine.base.options import TrustOptions
from engine.telemetry.log import get_logger

_log = get_logger(__name__)

MIN_SECRET_BYTES = 16
_MAX_SECRET_BYTES = 1024  # it travels in the headers of every call
_MAX_SECRETS = 8
_FLAG = "--cluster-token-file"
_KEY = "authorization"
SHARED_NAME = "diptych-cluster-token"  # of the file in memory
OPERATOR_NAME = "diptych-operator-token"  # of one with a token that workers do not ask for
_REMEDY = f"set {_FLAG} to the file that the processes of this cluster share"

Metadata = Iterable[tuple[str, str | bytes]]


@dataclass(frozen=True, slots=True)
class ClusterToken:
    """The secrets of one cluster, the one that is sent first."""

    _secrets: tuple[str, ...] = field(repr=False)

    @classmethod
    def load(cls, path: str) -> ClusterToken:
        """Read a file. Raises ConfigError naming the flag and never the content."""
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
        """One that nobody else has."""
        return cls((secrets.token_hex(32),))

    def share(self, name: str = SHARED_NAME) -> str:
        """A file in memory that `load` can read while this process lives; its owner's alone."""
        descriptor = os.memfd_create(name)
        os.fchmod(descriptor, 0o600)
        os.write(descriptor, "\n".join(self._secrets).encode())
        return f"/proc/{os.getpid()}/fd/{descriptor}"

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What a call carries."""
        return ((_KEY, f"Bearer {self._secrets[0]}"),)

    def check(self, metadata: Metadata | None) -> None:
        """Raise Unauthenticated where a call carries no token, PermissionDenied for another one."""
        self.check_values([str(value) for key, value in metadata or () if key == _KEY])

    def check_values(self, given: Sequence[str]) -> None:
        """The same, of the values of an `authorization` header."""
        if not given:
            raise Unauthenticated(f"no cluster token; {_REMEDY}")
        # Digests are of one length, and all are compared: the time taken tells nothing.
        found = False
        for value in given:
            scheme, _, sent = value.partition(" ")
            digest = _digest(sent if scheme.lower() == "bearer" else "")
            for secret in self._secrets:
                found |= hmac.compare_digest(digest, _digest(secret))
        if not found:
            raise PermissionDenied(f"not this cluster's token; {_REMEDY}")

    def pseudonym(self, text: str) -> str:
        """A short name for `text`, the same in all processes of the cluster, and no way back."""
        key = self._secrets[0].encode()[: hashlib.blake2b.MAX_KEY_SIZE]
        digest = hashlib.blake2b(text.encode(errors="replace"), key=key, digest_size=6)
        return f"~{digest.hexdigest()}"


def token_for(options: TrustOptions, flag: str, address: str) -> ClusterToken | None:
    """The token of a process whose internal services listen on `address`, given by `flag`.

    None where there is no file, which only an address of this machine alone allows: raises
    ConfigError for any other.
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
    """Whether nobody elsewhere can reach what listens on HOST:PORT."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:  # a name: who knows where it leads
        return False


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
