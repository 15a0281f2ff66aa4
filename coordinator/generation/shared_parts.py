"""Parts that all choices of a request share: they travel to each decode worker once.

    turn() --True--> this call carries the parts --first message--> arrived(): the others go on
       |                       '--ended before that--> end_turn(): the next one carries them
       '----False--> the worker has them; where it has dropped them: forgotten(), turn() again

Prompt, biases, stop tokens and the constraint may take a megabyte; a worker would read them 64
times for 64 choices. Owned by the event loop and by one request.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence

from coordinator.generation.request import GenerationRequest
from engine.base.errors import DeadlineExceeded

_LARGE = 1024  # elements; fewer travel with each choice, which then waits for no other


class SharedParts:
    """Which decode workers have the parts of `key`; b"": each call carries them."""

    def __init__(self, key: bytes = b"") -> None:
        self.key = key
        self._known: set[str] = set()  # incarnations
        self._carried: dict[str, asyncio.Event] = {}  # on their way to an incarnation

    @classmethod
    def of(cls, request: GenerationRequest, prompt: Sequence[int]) -> SharedParts:
        """For a request: with a key where the parts are large and there are several choices."""
        size = len(prompt) + len(request.sampling.logit_bias) + len(request.stop_token_ids)
        size += len(request.constraint.source) // 4 if request.constraint else 0
        return cls(secrets.token_bytes(16) if request.num_choices > 1 and size > _LARGE else b"")

    async def turn(self, incarnation: str, limit_s: float) -> bool:
        """Whether a call of this worker has to carry the parts; waits while another one does.

        Raises DeadlineExceeded after `limit_s`.
        """
        if not self.key:
            return True
        try:
            async with asyncio.timeout(limit_s):
                while (carried := self._carried.get(incarnation)) is not None:
                    await carried.wait()
        except TimeoutError:
            raise DeadlineExceeded("the request's time ran out") from None
        if incarnation in self._known:
            return False
        self._carried[incarnation] = asyncio.Event()
        return True

    def arrived(self, incarnation: str) -> None:
        """The worker has answered the call that carried them."""
        self._known.add(incarnation)
        self.end_turn(incarnation)

    def end_turn(self, incarnation: str) -> None:
        """The call that carried them is over, or they have arrived."""
        if carried := self._carried.pop(incarnation, None):
            carried.set()

    def forgotten(self, incarnation: str) -> None:
        """The worker has dropped them."""
        self._known.discard(incarnation)
