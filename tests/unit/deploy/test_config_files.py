"""The TOML examples: every option of the command, its real default, and nothing that the command
would refuse.
"""

import argparse
import dataclasses
import re
import tomllib

import pytest

from coordinator.cli import START_GROUPS
from engine.base.errors import ConfigError
from engine.base.option_groups import WORKER_GROUPS, DraftOptions
from engine.base.options import resolve
from engine.rpc.auth import stays_on_this_machine
from tests.support.paths import ROOT

FOLDER = ROOT / "deploy" / "config"
GROUPS = {
    "one-machine.toml": START_GROUPS,
    "cluster-coordinator.toml": START_GROUPS,
    "cluster-prefill.toml": WORKER_GROUPS,
    "cluster-decode.toml": (*WORKER_GROUPS, DraftOptions),
}
# key = value, commented out or not, then two spaces and what it is
OPTION = re.compile(r"^(?P<off># )?(?P<line>(?P<key>[a-z_]+) = (?P<value>.+?))  +# (?P<text>.+)$")
OLD_DEFAULT = re.compile(r"^default (?P<value>[^;]+); ")


def options(name):
    """The file's option lines: (key, commented out, value, text)."""
    matches = filter(None, map(OPTION.match, (FOLDER / name).read_text().splitlines()))
    return [(m["key"], bool(m["off"]), value(m["value"]), m["text"]) for m in matches]


def value(text):
    return tomllib.loads(f"x = {text}")["x"]


def defaults(name):
    return {f.name: f.default for group in GROUPS[name] for f in dataclasses.fields(group)}


def resolved(path, groups):
    """What the command would run with, given this file and nothing else: field -> value."""
    out = resolve(argparse.Namespace(config=str(path)), *groups, environ={})
    return {key: item for group in out for key, item in dataclasses.asdict(group).items()}


def test_every_file_is_tested():
    assert {path.name for path in FOLDER.glob("*.toml")} == set(GROUPS)


@pytest.mark.parametrize("name", GROUPS)
def test_as_it_stands(name):
    active = {key: setting for key, off, setting, _ in options(name) if not off}
    assert resolved(FOLDER / name, GROUPS[name]) == defaults(name) | active


@pytest.mark.parametrize("name", GROUPS)
def test_every_option_stands_there_once_with_its_default(name):
    found = options(name)
    assert sorted(key for key, *_ in found) == sorted(defaults(name))
    for key, off, setting, text in found:
        old = setting if off else value(OLD_DEFAULT.match(text)["value"])
        assert (old, type(old)) == (defaults(name)[key], type(defaults(name)[key])), key


@pytest.mark.parametrize("name", GROUPS)
def test_with_all_comments_taken_away(name, tmp_path):
    lines = (FOLDER / name).read_text().splitlines()
    full = tmp_path / name
    full.write_text("\n".join(m["line"] if (m := OPTION.match(line)) else line for line in lines))
    assert set(tomllib.loads(full.read_text())) == set(defaults(name))
    assert resolved(full, GROUPS[name]) == resolved(FOLDER / name, GROUPS[name])


@pytest.mark.parametrize("name", GROUPS)
def test_only_option_lines_and_prose(name):
    """A commented option that the pattern above missed would escape the other tests."""
    for line in (FOLDER / name).read_text().splitlines():
        if " = " in line and not OPTION.match(line):
            assert re.match(r"# --- .*workers = ", line), line


def test_a_workers_command_refuses_a_coordinators_file():
    with pytest.raises(ConfigError, match="unknown option"):
        resolved(FOLDER / "cluster-coordinator.toml", WORKER_GROUPS)


def test_the_cluster_fits_together():
    """Workers dial the port that coordinators listen on, and listen where peers reach them."""
    port = resolved(FOLDER / "cluster-coordinator.toml", START_GROUPS)["listen"].split(":")[1]
    for name in ("cluster-prefill.toml", "cluster-decode.toml"):
        worker = resolved(FOLDER / name, GROUPS[name])
        assert {where.split(":")[1] for where in worker["coordinator"].split(",")} == {port}
        assert worker["advertise"] or not worker["listen"].startswith("0.0.0.0")


def test_a_process_that_other_machines_reach_has_a_token():
    """One for the whole cluster; the one for a single machine listens on loopback only."""
    files = {name: resolved(FOLDER / name, GROUPS[name]) for name in GROUPS}
    alone = files.pop("one-machine.toml")
    assert stays_on_this_machine(alone["listen"]) and not alone["cluster_token_file"]
    assert not any(stays_on_this_machine(options["listen"]) for options in files.values())
    tokens = {options["cluster_token_file"] for options in files.values()}
    assert len(tokens) == 1 and "" not in tokens
