"""Options from flags, environment, file and defaults: precedence, and clear refusals."""

import dataclasses

import pytest

from engine.base import options as config
from engine.base.errors import ConfigError
from engine.base.option_groups import (
    CacheOptions,
    FleetOptions,
    FrontOptions,
    LogOptions,
    ModelOptions,
    TransferOptions,
    WorkerOptions,
)
from engine.base.option_values import parse_size
from engine.base.options import to_flags

FRONT = (FrontOptions, FleetOptions, CacheOptions, LogOptions, ModelOptions)
WORKER = (WorkerOptions, ModelOptions)


def resolve(*argv, environ=None, toml=None, tmp_path=None, groups=FRONT):
    if toml is not None:
        path = tmp_path / "options.toml"
        path.write_text(toml)
        argv = (*argv, "--config", str(path))
    parser = config.parser("test", "")
    config.add_flags(parser, *groups)
    found = config.resolve(parser.parse_args(argv), *groups, environ=environ or {})
    return {k: v for group in found for k, v in dataclasses.asdict(group).items()}


def test_flags_override_environment_overrides_file_overrides_defaults(tmp_path):
    toml = "prefill-workers = 5\ndecode_workers = 5\nblock_size = 8\n"
    environ = {"DIPTYCH_PREFILL_WORKERS": "4", "DIPTYCH_DECODE_WORKERS": "4"}
    got = resolve("--prefill-workers", "3", environ=environ, toml=toml, tmp_path=tmp_path)
    assert (got["prefill_workers"], got["decode_workers"], got["block_size"]) == (3, 4, 8)
    assert got["max_queued_requests"] == FrontOptions().max_queued_requests
    environ = {"DIPTYCH_CONFIG": str(tmp_path / "options.toml")}
    assert resolve(environ=environ)["prefill_workers"] == 5


@pytest.mark.parametrize(
    "line",
    [
        "listen = 50051",
        "prefill_workers = 1.5",
        "prefill_workers = true",
        "model = 5",
        'log_format = ["json"]',
        'model_name = ["a", "b"]',
        "kv_cache_memory = 1.5",
        "max_request_s = inf",
        "[front]\nlisten = 'x:1'",
        "model = ",
    ],
)
def test_a_file_with_the_wrong_kind_of_value_is_refused(tmp_path, line):
    with pytest.raises(ConfigError, match=r"options\.toml") as caught:
        resolve(toml=line, tmp_path=tmp_path)
    assert "\n" not in caught.value.message


def test_a_file_may_have_numbers_as_numbers_or_text(tmp_path):
    toml = 'max_request_s = 5\nprefill_workers = "2"\nkv_cache_memory = 1024\nblock_size = 32\n'
    got = resolve(toml=toml, tmp_path=tmp_path)
    assert (got["max_request_s"], got["prefill_workers"]) == (5.0, 2)
    assert (got["kv_cache_memory"], got["block_size"]) == (1024, 32)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--kv-cache-memory", "1..2GiB"),
        ("--kv-cache-memory", "9" * 400),
        ("--listen", "50051"),
        ("--listen", "host:²"),
        ("--coordinator", "nonsense"),
        ("--coordinator", "a:1,,b:1"),
        ("--max-request-s", "nan"),
        ("--max-request-s", "inf"),
        ("--worker-wait-s", "nan"),
        ("--cors-origins", "chat.example.com"),
        ("--cors-origins", "https://a.example.com/"),
        ("--cors-origins", "https://a.example.com,*"),
        ("--http-keepalive-s", "0"),
        ("--sse-keepalive-s", "-1"),
    ],
)
def test_the_error_of_a_bad_flag_is_one_sentence_that_names_it(flag, value):
    with pytest.raises(ConfigError, match=flag) as caught:
        resolve(flag, value, groups=WORKER if flag == "--coordinator" else FRONT)
    assert "expected int" not in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("kind", ["CACHE", "STATE"])
def test_a_user_without_a_home_folder_gets_one_sentence(monkeypatch, kind):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for name in (f"DIPTYCH_{kind}_DIR", f"XDG_{kind}_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(config.Path, "home", no_home)
    where = config.cache_dir if kind == "CACHE" else config.state_dir
    with pytest.raises(ConfigError, match=f"no home folder: set HOME or DIPTYCH_{kind}_DIR"):
        where()


def test_sizes():
    assert parse_size("2GiB") == parse_size("2g") == 2 << 30
    assert parse_size("1.5k") == 1536
    assert parse_size(77) == 77


@pytest.mark.parametrize(
    ("argv", "on"),
    [
        ((), False),
        (("--kv-checksums",), True),
        (("--kv-checksums", "--quarantine-s", "5"), True),
        (("--kv-checksums=false",), False),
        (("--kv-checksums", "on"), True),
    ],
)
def test_a_flag_without_value_means_true(argv, on):
    got = resolve(*argv, groups=(TransferOptions,))
    assert got["kv_checksums"] is on
    assert resolve(*to_flags(TransferOptions(**got)), groups=(TransferOptions,)) == got


def test_flags_for_a_child_give_the_same_options():
    model = ModelOptions(model="-odd", dtype="float32", seed_weights=3)
    worker = WorkerOptions(worker_id="--config", coordinator="a:1,b:2")
    got = resolve(*to_flags(model, worker), groups=WORKER)
    assert {k: got[k] for k in ("model", "dtype", "seed_weights")} == {
        "model": "-odd",
        "dtype": "float32",
        "seed_weights": 3,
    }
    assert (got["worker_id"], got["coordinator"]) == ("--config", "a:1,b:2")
    assert to_flags(TransferOptions()) == []
