"""The command line: `coordinator start | generate | chat | status | drain`.

Errors are one sentence on stderr: status 2 for bad options and unusable models, 1 for failed calls.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.base import options as config
from engine.base.errors import CheckpointError, ConfigError, DiptychError
from engine.base.option_groups import START_GROUPS, StartOptions
from engine.base.option_values import MAX_REQUEST_S, parse_addresses

if TYPE_CHECKING:
    from engine.rpc.auth import ClusterToken

_Run = Callable[[argparse.Namespace], int]
DEFAULT_SERVER = "127.0.0.1:50051"
_EXAMPLES = """
examples:
  coordinator start                        default model, one prefill and one decode worker
  coordinator start --model ./llama --dtype bfloat16 --decode-workers 2
  coordinator start --workers external --listen 0.0.0.0:50051 --cluster-token-file token
  coordinator generate "Once upon a time" --max-tokens 64
  coordinator chat "What is a diptych?"
  coordinator status
  coordinator drain decode-1

Every option of `start` may also be set in a TOML file (--config) or by a variable DIPTYCH_...
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = config.parser(
        "coordinator", "Serves a language model with pools of prefill and decode workers."
    )
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, summary: str, run: _Run, text: str, **more: Any) -> Any:
        added = commands.add_parser(name, help=summary, description=text, **more)
        added.set_defaults(run=run)
        return added

    what = "Serve a model: listen for clients and workers, start local workers."
    raw = argparse.RawDescriptionHelpFormatter
    start = command("start", "serve a model", _start, what, epilog=_EXAMPLES, formatter_class=raw)
    config.add_flags(start, *START_GROUPS)

    what = "Complete a text; the output streams to stdout."
    generate = command("generate", "complete a text", _generate, what)
    generate.add_argument("prompt", help="text to complete; - reads standard input")
    generate.add_argument("--n", type=int, metavar="N", help="number of outputs [1]")
    _add_answer_flags(generate)

    what = "Talk to the model: one question, or without one a conversation."
    chat = command("chat", "talk to the model", _chat, what)
    chat.add_argument("prompt", nargs="?", help="a question; default: a conversation")
    chat.add_argument("--system", help="system message")
    _add_answer_flags(chat)

    what = "Show the pools of workers as a table."
    status = command("status", "show the workers", _status, what)
    _add_server_flag(status)
    status.add_argument(
        "--holds", action="store_true", help="also show what each worker holds, with owners"
    )
    _add_token_flag(status)

    what = (
        "Have a worker finish or hand over its requests and end. Its supervisor starts another one."
    )
    drain = command("drain", "end a worker in order", _drain, what)
    drain.add_argument("worker", metavar="WORKER", help="worker id, as in `status`")
    _add_server_flag(drain)
    drain.add_argument(
        "--deadline", type=float, metavar="S", help="time for its requests [the worker's --drain-s]"
    )
    _add_token_flag(drain)
    return parser


def _add_server_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--server",
        default=DEFAULT_SERVER,
        metavar="HOST:PORT[,...]",
        help=f"coordinators; if one is lost the next is called [{DEFAULT_SERVER}]",
    )


def _add_token_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cluster-token-file",
        metavar="FILE",
        help="as in `start`; needed unless the coordinator is this user's, on this machine",
    )
    parser.set_defaults(config=None)


def _add_answer_flags(parser: argparse.ArgumentParser) -> None:
    _add_server_flag(parser)
    parser.add_argument("--max-tokens", type=int, metavar="N", help="maximum tokens of an output")
    parser.add_argument("--temperature", type=float, metavar="T", help="0: greedy [0]")
    parser.add_argument("--top-p", type=float, metavar="P", help="nucleus sampling [1: off]")
    parser.add_argument(
        "--top-k", type=int, metavar="K", help="sample from the K likeliest [0: off]"
    )
    parser.add_argument("--min-p", type=float, metavar="P", help="share of the likeliest [0: off]")
    parser.add_argument("--seed", type=int, metavar="S", help="same seed, same output")
    parser.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before this text; may be repeated"
    )
    parser.add_argument(
        "--ignore-eos", action="store_true", default=None, help="continue up to --max-tokens"
    )
    constraint = parser.add_mutually_exclusive_group()
    constraint.add_argument(
        "--json-schema", metavar="FILE", help="the output fits this JSON schema"
    )
    constraint.add_argument("--regex", metavar="REGEX", help="the output matches this")
    parser.add_argument("--timeout", type=float, metavar="S", help="give up after this long")
    parser.add_argument("--quiet", action="store_true", help="no usage on stderr")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    config.set_default_env({"GRPC_VERBOSITY": "ERROR"})  # gRPC reads it on import
    for stream in (sys.stdout, sys.stderr):  # outputs may contain what a terminal cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        args = make_parser().parse_args(argv)
        run: _Run = args.run
        return run(args)
    except (ConfigError, CheckpointError) as error:
        print(f"coordinator: {error.message}", file=sys.stderr)
        return 2
    except DiptychError as error:
        print(f"coordinator: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; avoids an error at exit
        return 1
    except OSError as error:  # a full disk
        print(f"coordinator: {error.strerror or error}", file=sys.stderr)
        return 1


def _start(args: argparse.Namespace) -> int:
    from coordinator.process import serve

    return serve(StartOptions(*config.resolve(args, *START_GROUPS)))


def _answer_options(args: argparse.Namespace) -> dict[str, Any]:
    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "ignore_eos")
    options = {name: getattr(args, name) for name in names}
    options["n"] = getattr(args, "n", None)  # `chat` has none
    for name, bits in (("max_tokens", 32), ("top_k", 32), ("n", 32), ("seed", 64)):
        if options[name] is not None and not 0 <= options[name] < 2**bits:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag}: expected a number from 0 to {2**bits - 1}")
    options["stop"] = [_utf8("--stop", text) for text in args.stop or ()]
    if args.regex is not None:
        options["regex"] = _utf8("--regex", args.regex)
    if args.json_schema is not None:
        options["json_schema"] = _text_of("--json-schema", args.json_schema)
    if args.timeout is not None and not 0 < args.timeout <= MAX_REQUEST_S:
        raise ConfigError(f"--timeout: expected seconds above 0, got {args.timeout:g}")
    return options


def _server(args: argparse.Namespace) -> str:
    try:
        return parse_addresses(args.server)
    except ValueError as error:
        raise ConfigError(f"--server: {error}, got {args.server!r}") from None


def _utf8(what: str, argument: str) -> str:
    """An argument's bytes read as UTF-8, in any locale. Raises ConfigError."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeError:
        raise ConfigError(f"{what}: not valid UTF-8") from None


def _text_of(what: str, path: str) -> str:
    """The text of a file. Raises ConfigError."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{what}: {path}: {error.strerror or error}") from None
    except UnicodeError:
        raise ConfigError(f"{what}: {path}: not valid UTF-8") from None


def _standard_input() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeError:
        raise ConfigError("standard input: not valid UTF-8") from None


def _generate(args: argparse.Namespace) -> int:
    from coordinator.commands.generate import generate

    options = _answer_options(args)
    prompt = _standard_input() if args.prompt == "-" else _utf8("prompt", args.prompt)
    return generate(_server(args), prompt, args.timeout, args.quiet, options)


def _chat(args: argparse.Namespace) -> int:
    from coordinator.commands.generate import chat

    options = _answer_options(args)
    question = None if args.prompt is None else _utf8("prompt", args.prompt)
    system = None if args.system is None else _utf8("--system", args.system)
    return chat(_server(args), question, system, args.timeout, args.quiet, options)


def _status(args: argparse.Namespace) -> int:
    from coordinator.commands.status import status

    return status(_server(args), holds=args.holds, token=_token(args))


def _drain(args: argparse.Namespace) -> int:
    from coordinator.commands.status import drain

    return drain(_server(args), args.worker, args.deadline, _token(args))


def _token(args: argparse.Namespace) -> ClusterToken | None:
    """The token in the file that flag, environment or --config name."""
    from engine.rpc.auth import ClusterToken

    path = config.resolve(args, *START_GROUPS)[-1].cluster_token_file
    return ClusterToken.load(path) if path else None


if __name__ == "__main__":
    sys.exit(main())
