"""What a command writes on standard error for a person: its sentences."""

import re

# As engine/telemetry/progress.py writes them: "Reading a.gguf: 40 %, 2 s". Compiling begins with
# a line of its own.
_PROGRESS = re.compile(r".*: (.*, )?\d+ s$|compiling the CPU kernels \(")


def sentences(stderr: str) -> list[str]:
    """The lines that are neither log lines nor bars nor progress, which a loaded machine shows."""
    return [
        line
        for line in stderr.splitlines()
        if line.strip() and not line.startswith(("{", "\r")) and not _PROGRESS.match(line)
    ]
