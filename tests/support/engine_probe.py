"""An operation made of any function: how a test looks at, stops or kills an engine thread."""

from __future__ import annotations

from engine.step.operations import Operation

Probe = Operation  # the product itself sends named operations only
