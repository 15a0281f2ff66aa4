"""JSON Schema conformance of constrained answers, against a stack of its own.

    python -m tests.ecosystem.conformance                            everything
    python -m tests.ecosystem.conformance --sources suite --json results.json
    python -m tests.ecosystem.conformance --offline                  no stack: grammars alone

The schemas are those of draft 2020-12 of JSON-Schema-Test-Suite, as the sources of jsonschema carry
it, and a seeded choice of SchemaStore's, as the package schemastore carries them. The exit status
is 1 if a finished answer, or a text sampled from a grammar, is not valid.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from engine.checkpoint.packaged import DEFAULT_MODEL
from engine.checkpoint.source import resolve
from tests.ecosystem.conformance import answers, offline, report, sources
from tests.ecosystem.conformance.sources import Case
from tests.support.stack import Stack


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tests.ecosystem.conformance")
    parser.add_argument("--sources", default="suite,schemastore", help="which schemas")
    parser.add_argument("--offline", action="store_true", help="without a stack")
    parser.add_argument("--store", type=int, default=250, help="how many of SchemaStore's to ask")
    parser.add_argument("--seed", type=int, default=1, help="of the choice, and of sampling")
    parser.add_argument("--walks", type=int, default=8, help="texts to draw from each grammar")
    parser.add_argument("--json", type=Path, help="write every answer there")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stack ends too
    cases = {name: sources.load(name) for name in options.sources.split(",")}
    results: dict[str, report.Results] = {}
    for name, found in cases.items():
        results[name] = report.Results(offline.study(found, options.walks, options.seed))
        print(report.offline_table(name, results[name].grammars), flush=True)
    if not options.offline:
        chosen = {
            name: sources.choice(found, options.store, options.seed)
            if name == "schemastore"
            else found
            for name, found in cases.items()
        }
        with (
            tempfile.TemporaryDirectory(prefix="conformance-") as logs,
            Stack(Path(logs), "--model", DEFAULT_MODEL) as stack,
        ):
            for name, asked in chosen.items():
                results[name].answers = _ask(stack.address, name, asked, options.seed)
                print(report.answers_table(name, results[name].answers), flush=True)
            stack.assert_at_rest()
    if options.json:
        rows = {
            name: {
                "grammars": [asdict(g) for g in result.grammars],
                "answers": [asdict(a) for a in result.answers],
            }
            for name, result in results.items()
        }
        options.json.write_text(json.dumps(rows, indent=1, ensure_ascii=False))
    problems = [line for result in results.values() for line in report.problems(result)]
    print("\n".join(problems))
    return 1 if problems else 0


def _ask(address: str, name: str, cases: Sequence[Case], seed: int) -> list[answers.Answer]:
    ways = answers.ways_of(resolve(DEFAULT_MODEL).folder, seed)
    return asyncio.run(answers.ask_all(address, cases, ways, answers.MAX_TOKENS[name]))


if __name__ == "__main__":
    sys.exit(main())
