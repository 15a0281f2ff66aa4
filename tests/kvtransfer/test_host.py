"""What a worker tells others about where it is."""

from __future__ import annotations

import pytest

from engine.config import WorkerOptions
from engine.errors import ConfigError
from kvtransfer.host import advertised


@pytest.mark.parametrize(
    ("advertise", "listen", "address"),
    [
        ("", "127.0.0.1:0", "127.0.0.1:7"),
        ("10.0.0.2", "0.0.0.0:0", "10.0.0.2:7"),
        ("fd00::1", "[::]:0", "[fd00::1]:7"),
        ("", "[::1]:0", "[::1]:7"),
        ("pod.workers", "0.0.0.0:50052", "pod.workers:7"),
    ],
)
def test_an_address_that_peers_can_dial(advertise: str, listen: str, address: str) -> None:
    assert advertised(WorkerOptions(advertise=advertise), listen, 7) == address


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:50052"])
def test_a_wildcard_alone_is_refused(listen: str) -> None:
    with pytest.raises(ConfigError, match="--advertise"):
        advertised(WorkerOptions(), listen, 7)
