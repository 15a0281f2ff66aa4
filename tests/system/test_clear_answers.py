"""Bad input and bad set-up: the right status or exit code, one sentence, no traceback, nothing
left behind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from engine.pb.diptych.v1 import inference_pb2
from engine.rpc.channel import open_channel
from engine.rpc.status import DETAILS_KEY
from tests.support.commands import Commands
from tests.support.stack import EXACT, SHARED, SharedStacks, Stack, free_port, until
from tests.support.stderr import sentences

pytestmark = pytest.mark.timeout(180)
Request = inference_pb2.GenerateRequest


def with_ids(*ids: int, **fields: Any) -> Request:
    return Request(token_ids=inference_pb2.TokenIds(ids=ids), **fields)


def sampling(**fields: Any) -> Request:
    return Request(text="hi", sampling=inference_pb2.Sampling(**fields))


def stop(**fields: Any) -> Request:
    return Request(text="hi", stop=inference_pb2.Stop(**fields))


INVALID = {
    "no prompt": (Request(), "prompt"),
    "empty text": (Request(text=""), "text"),
    "empty ids": (with_ids(), "token_ids"),
    "too long": (with_ids(*[5] * 3000), "token_ids"),
    "exactly the context": (with_ids(*[5] * 2048), "token_ids"),
    "10 MB of text": (Request(text="word " * 2_000_000), "text"),
    "id out of range": (with_ids(1, 49152), "token_ids.ids[1]"),
    "negative temperature": (sampling(temperature=-0.5), "sampling.temperature"),
    "NaN temperature": (sampling(temperature=math.nan), "sampling.temperature"),
    "infinite temperature": (sampling(temperature=math.inf), "sampling.temperature"),
    "top_p of 0": (sampling(top_p=0.0), "sampling.top_p"),
    "NaN top_p": (sampling(top_p=math.nan), "sampling.top_p"),
    "min_p above 1": (sampling(min_p=1.5), "sampling.min_p"),
    "penalty": (sampling(frequency_penalty=-2.5), "sampling.frequency_penalty"),
    "repetition": (sampling(repetition_penalty=0.0), "sampling.repetition_penalty"),
    "bias out of range": (sampling(logit_bias={1: 1000.0}), "sampling.logit_bias"),
    "bias of no token": (sampling(logit_bias={60000: 1.0}), "sampling.logit_bias"),
    "max_tokens 0": (stop(max_tokens=0), "stop.max_tokens"),
    "min above max": (stop(max_tokens=2, min_tokens=3), "stop.min_tokens"),
    "empty stop string": (stop(stop=[""]), "stop.stop"),
    "stop id out of range": (stop(stop_token_ids=[99999]), "stop.stop_token_ids"),
    "no choice": (Request(text="hi", n=0), "n"),
    "too many choices": (Request(text="hi", n=1000), "n"),
    "too many alternatives": (
        Request(text="hi", output=inference_pb2.Output(logprobs=1000)),
        "output.logprobs",
    ),
    "long request id": (Request(text="hi", request_id="x" * 200), "request_id"),
    "no schema": (
        Request(text="hi", constraint=inference_pb2.Constraint(json_schema='{"type": "strin"}')),
        "constraint",
    ),
    "no regex": (Request(text="hi", constraint=inference_pb2.Constraint(regex="a(")), "constraint"),
}


def fail(stack: Stack, request: Request) -> grpc.RpcError:
    call = stack.client._inference[0].Generate(request, timeout=60)
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    error: Any = caught.value
    assert "\n" not in error.details()
    assert "Traceback" not in error.details()
    return caught.value


def field_of(error: Any) -> str:
    raw = dict(error.trailing_metadata())[DETAILS_KEY]
    bad = error_details_pb2.BadRequest()
    assert any(d.Unpack(bad) for d in status_pb2.Status.FromString(raw).details)
    return str(bad.field_violations[0].field)


@pytest.mark.parametrize("name", INVALID)
def test_invalid_requests_name_their_field(stack: Stack, name: str) -> None:
    request, field = INVALID[name]
    error: Any = fail(stack, request)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field_of(error).startswith(field)
    assert field.split(".")[-1].split("[")[0] in error.details()


def test_unknown_model(stack: Stack) -> None:
    error: Any = fail(stack, Request(text="hi", model="gpt-9"))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert "gpt-9" in error.details()


@pytest.mark.parametrize(
    "raw", [b"\x1a\x02\xff\xfe", b"\x1a\x7fshort", b"\xff\xff\xff"], ids=["utf-8", "cut", "bytes"]
)
async def test_malformed_bytes(stack: Stack, raw: bytes) -> None:
    async with open_channel(stack.address) as channel:
        call = channel.unary_stream("/diptych.v1.InferenceService/Generate")(raw, timeout=20)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in call:
                pass
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "\n" not in (caught.value.details() or "")


def test_nothing_leaked_and_no_traceback(stack: Stack) -> None:
    stack.assert_at_rest()
    assert stack.generate("Hello", max_tokens=2)[0]
    assert "Traceback" not in "".join(stack.logs().values())


def used_ports(stack: Stack) -> dict[str, tuple[str, ...]]:
    """By the address in use: flags of a coordinator."""
    return {
        stack.address: ("--listen", stack.address, "--http", f"127.0.0.1:{free_port()}"),
        stack.http_address: ("--listen", f"127.0.0.1:{free_port()}", "--http", stack.http_address),
    }


def test_a_second_coordinator_on_a_used_port(stack: Stack, ends: Commands) -> None:
    for address in (stack.address, stack.http_address):
        out = ends.result(address)
        assert out.returncode == 2
        assert address in out.stderr
        one_sentence(out.stderr)


def one_sentence(stderr: str) -> None:
    """Besides log lines and progress, standard error holds one line."""
    assert "Traceback" not in stderr
    assert len(sentences(stderr)) == 1, stderr


MISMATCHES = {
    "another dtype": (("--dtype", "bfloat16"), "bfloat16"),
    "another block size": (("--block-size", "32"), "block"),
    "another model's name": (("--model-name", "other"), "other"),
    "other weights": (("--seed-weights", "1"), "random-1"),
}


def mismatch(name: str, stack: Stack) -> tuple[str, ...]:
    """Flags of a decode worker that does not fit to `stack`."""
    flags, _ = MISMATCHES[name]
    default = ("--dtype", "float32") if name != "another dtype" else ()
    args = (*default, *flags, "--kv-cache-memory", "256MiB", "--max-model-len", "1024")
    return (*args, "--coordinator", stack.address, "--log-format", "json", stack.token_flag())


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_worker_that_does_not_match_is_refused(stack: Stack, ends: Commands, name: str) -> None:
    out = ends.result(name)
    assert out.returncode == 2
    assert MISMATCHES[name][1] in out.stderr.splitlines()[-1]
    one_sentence(out.stderr)
    assert len(stack.workers()) == 2


def truncated_gguf(folder: Path) -> Path:
    from engine.checkpoint.source import resolve

    source = resolve("smollm2").gguf
    assert source is not None
    path = folder / "cut.gguf"
    path.write_bytes(source.read_bytes()[:5_000_000])
    return path


def missing_file(folder: Path) -> Path:
    return folder / "absent.gguf"


def not_a_model(folder: Path) -> Path:
    path = folder / "text.gguf"
    path.write_text("hello")
    return path


def folder_without_weights(folder: Path) -> Path:
    from engine.checkpoint.source import resolve

    source = resolve("smollm2").folder
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


MAKERS = (truncated_gguf, missing_file, not_a_model, folder_without_weights)
MODULES = ("coordinator.cli", "worker.cli")


def start_without_model(module: str, path: Path, folder: Path) -> tuple[str, ...]:
    """Arguments of a coordinator or a prefill worker whose model is `path`."""
    flags = ("start", "--model", str(path), "--listen", "127.0.0.1:0")
    if module == "worker.cli":
        return ("prefill", *flags)
    return (*flags, "--http", "127.0.0.1:0", "--log-dir", str(folder / "logs"))


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("module", MODULES)
def test_a_missing_or_truncated_model_file(
    ends: Commands, make: Callable[[Path], Path], module: str
) -> None:
    out = ends.result((module, make))
    assert out.returncode == 2, out.stderr
    one_sentence(out.stderr)
    assert str(out.args[out.args.index("--model") + 1]) in out.stderr


SMALL_POOL = ("--max-model-len", "8192", "--kv-cache-memory", "16MiB", *EXACT[:2])
BAD_OPTIONS = {
    "--dtype": "int3",
    "--listen": "nowhere",
    "--prefill-workers": "-1",
    "--kv-cache-memory": "lots",
    "--config": "/absent.toml",
    "--nonsense": "1",
}


def test_bad_options_name_the_flag(ends: Commands) -> None:
    for flag, value in BAD_OPTIONS.items():
        out = ends.result(flag)
        assert out.returncode == 2
        assert (value if flag == "--config" else flag) in out.stderr
        one_sentence(out.stderr)


@pytest.fixture(scope="module")
def lonely(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("lonely")
    flags = ("--workers", "external", "--worker-wait-s", "1")
    with Stack(folder, *flags, prefill=0, decode=0, wait=False) as stack:
        yield stack


@pytest.fixture(scope="module", autouse=True)
def ends(
    stacks: SharedStacks, lonely: Stack, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Commands]:
    """The commands of this module, by what is wrong with each; they run beside its requests."""
    stack = stacks.get(*SHARED)
    with Commands() as commands:
        for address, flags in used_ports(stack).items():
            commands.start(address, "coordinator.cli", "start", *flags)
        for name in MISMATCHES:
            commands.start(name, "worker.cli", "decode", "start", *mismatch(name, stack))
        for module in MODULES:
            for make in MAKERS:
                folder = tmp_path_factory.mktemp("model")
                args = start_without_model(module, make(folder), folder)
                commands.start((module, make), module, *args)
        for flag, value in BAD_OPTIONS.items():
            commands.start(flag, "coordinator.cli", "start", flag, value)
        commands.start("small pool", "worker.cli", "decode", "start", *SMALL_POOL)
        yield commands


def _model_answers(stack: Stack) -> bool:
    try:
        return not stack.client.model(timeout_s=2).ready
    except Exception:
        return False


async def test_a_coordinator_with_no_workers(lonely: Stack) -> None:
    until(lambda: _model_answers(lonely), 30, "the coordinator answers")
    async with open_channel(lonely.address) as channel:
        from engine.pb.diptych.v1 import inference_pb2_grpc

        service: Any = inference_pb2_grpc.InferenceServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in service.Generate(Request(text="hi"), timeout=20):
                pass
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "worker" in (caught.value.details() or "")
    metadata = dict(caught.value.trailing_metadata() or ())
    assert int(metadata["grpc-retry-pushback-ms"]) > 0
    retry = error_details_pb2.RetryInfo()
    raw = metadata[DETAILS_KEY]
    assert isinstance(raw, bytes)
    assert any(d.Unpack(retry) for d in status_pb2.Status.FromString(raw).details)


def test_a_pool_too_small_for_the_length_asked_is_refused(ends: Commands) -> None:
    out = ends.result("small pool")
    assert out.returncode == 2
    assert "--kv-cache-memory" in out.stderr
    one_sentence(out.stderr)
