"""JSON files of a model, with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.base.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError if it is missing, unreadable or not an object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: this file of the model is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return data
