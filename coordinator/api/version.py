"""The version of the installed package."""

from __future__ import annotations

from importlib import metadata


def installed_version() -> str:
    """The version; "0" where the package runs from a folder and is not installed."""
    try:
        return metadata.version("diptych")
    except metadata.PackageNotFoundError:
        return "0"
