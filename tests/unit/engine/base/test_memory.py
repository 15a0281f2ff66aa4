"""Available memory, read from files as kernels write them, and its shares."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.base.errors import ConfigError
from engine.base.kv_layout import KVLayout
from engine.base.memory import HostMemory, host_memory, readable_size
from engine.cache.sizing import (
    CONTEXT_BYTES,
    FLOOR_BYTES,
    MOST_BYTES,
    GpuMemory,
    PoolBudget,
    fit_pool,
    gpu_budget,
    host_budget,
)

GIB, MIB = 1 << 30, 1 << 20
# SmolLM2-135M: 368,640 bytes a block of 16 tokens.
LAYOUT = KVLayout(30, 3, 64, 16, "bfloat16")
LONGEST = LAYOUT.num_blocks(8192 + 16) * LAYOUT.block_bytes


class Machine:
    """A /proc and a /sys/fs/cgroup in a folder."""

    def __init__(self, folder: Path, free: int, cached: int, groups: str = "0::/\n") -> None:
        self.proc, self.cgroups = folder / "proc", folder / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        self.cgroups.mkdir()
        (self.proc / "self/cgroup").write_text(groups)
        self.set(free, cached)

    def set(self, free: int, cached: int) -> None:
        lines = {"MemTotal": 24 * GIB, "MemFree": free, "MemAvailable": free + cached}
        text = "".join(f"{name}: {size // 1024} kB\n" for name, size in lines.items())
        (self.proc / "meminfo").write_text(text)

    def group(self, path: str, **files: object) -> None:
        folder = self.cgroups / path
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            name = name.replace("__", ".")
            (folder / name).write_text(f"{value}\n")

    def read(self) -> HostMemory:
        return host_memory(self.proc, self.cgroups)


def context(memory: HostMemory) -> tuple[int, str]:
    size = fit_pool(
        host_budget(LONGEST, memory), LAYOUT, longest=8192, requested=0, draft_window=16
    )
    return size.max_model_len, size.limit


def test_the_page_cache_counts_as_available(tmp_path: Path) -> None:
    """The context does not depend on how much memory the page cache holds."""
    machine = Machine(tmp_path, 20 * GIB, 0)
    found = set()
    for cached in (0, 4, 12, 16, 19, 19.9):
        machine.set(int((20 - cached) * GIB), int(cached * GIB))
        found.add(context(machine.read().share(2)))
    assert found == {(8192, "")}


def test_a_cgroup_v2_limit(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 20 * GIB, 0, "0::/pods/one\n")
    machine.group("pods/one", memory__max=2 * GIB, memory__current=GIB)
    assert machine.read() == HostMemory(GIB, "the cgroup's 2 GiB")
    stat = f"anon {GIB // 4}\ninactive_file {3 * GIB // 4}"
    machine.group("pods/one", memory__stat=stat)
    assert machine.read().available_bytes == 7 * GIB // 4, "a page cache is reclaimed"
    read_twice = f"anon {GIB // 4}\ninactive_file {GIB // 4}\nactive_file {GIB // 2}\nfile 9"
    machine.group("pods/one", memory__stat=read_twice)
    assert machine.read().available_bytes == 7 * GIB // 4, "its active part as well"
    machine.group("pods/one", memory__max="max", memory__high=GIB)
    assert machine.read() == HostMemory(3 * GIB // 4, "the cgroup's 1 GiB")
    machine.group("pods", memory__max=GIB // 2, memory__current=GIB // 4)
    assert machine.read() == HostMemory(GIB // 4, "the cgroup's 512 MiB"), "of a parent"
    machine.group("pods", memory__current=GIB)
    assert machine.read().available_bytes == 0, "above its limit"
    machine.group("pods", memory__max="max")
    machine.group("pods/one", memory__max="max", memory__high="max")
    assert machine.read().available_bytes == 20 * GIB


def test_a_cgroup_v1_limit_also_mounted_as_the_root(tmp_path: Path) -> None:
    groups = "5:cpu,cpuacct:/docker/x\n4:memory:/docker/x\n0::/\n"
    machine = Machine(tmp_path, 20 * GIB, 0, groups)
    files = {"memory__limit_in_bytes": 2 * GIB, "memory__usage_in_bytes": GIB}
    machine.group("memory", **files, memory__stat=f"total_inactive_file {GIB // 2}")
    assert machine.read() == HostMemory(3 * GIB // 2, "the cgroup's 2 GiB")
    stat = f"total_inactive_file {GIB // 4}\ntotal_active_file {GIB // 4}\nactive_file 1"
    machine.group("memory", memory__stat=stat)
    assert machine.read().available_bytes == 3 * GIB // 2
    machine.group("memory/docker/x", memory__limit_in_bytes=GIB, memory__usage_in_bytes=0)
    assert machine.read().limit == "the cgroup's 1 GiB"
    machine.group("memory/docker/x", memory__limit_in_bytes=(1 << 63) - 4096)  # unlimited
    assert machine.read().limit == "the cgroup's 2 GiB"


def test_this_machine_has_memory() -> None:
    assert host_memory().available_bytes > 0


def test_a_share_is_passed_as_text() -> None:
    share = HostMemory(7 * GIB, "the cgroup's 8 GiB: half").share(2)
    assert HostMemory.parse(str(share)) == HostMemory(7 * GIB // 2, "the cgroup's 8 GiB: half")
    assert HostMemory.parse("") is None
    for text in ("lots", "12", "12:", "-1:x"):
        with pytest.raises(ConfigError, match=r"--memory-share .*BYTES:LIMIT"):
            HostMemory.parse(text)


def test_a_shorter_context_names_its_cause() -> None:
    assert context(HostMemory(20 * GIB, "x")) == (8192, "")
    assert context(HostMemory(GIB // 2, "x")) == (8192, ""), "half for one of full length"
    tokens, limit = context(HostMemory(GIB // 4, "the cgroup's 2 GiB"))
    assert (tokens, limit) == ((GIB // 8 // LAYOUT.block_bytes) * 16 - 16, "the cgroup's 2 GiB")
    assert context(HostMemory(0, "x"))[0] == FLOOR_BYTES // LAYOUT.block_bytes * 16 - 16
    budget = host_budget(8 * GIB, HostMemory(99 * GIB, "x"))
    assert budget.num_bytes == MOST_BYTES and "--kv-cache-memory" in budget.limit


def test_a_requested_length_that_does_not_fit_is_refused() -> None:
    budget = PoolBudget(32 * MIB, "the cgroup's 2 GiB")
    with pytest.raises(ConfigError, match="limited by the cgroup's 2 GiB: one request of 4096"):
        fit_pool(budget, LAYOUT, longest=4096, requested=4096, draft_window=0)
    size = fit_pool(budget, LAYOUT, longest=8192, requested=0, draft_window=0)
    assert (size.num_blocks, size.max_model_len) == (91, 91 * 16)
    assert size.num_bytes == 91 * LAYOUT.block_bytes <= budget.num_bytes
    with pytest.raises(ConfigError, match="needs"):
        fit_pool(PoolBudget(0), LAYOUT, longest=8192, requested=0, draft_window=0)


# Llama 3.1 8B in bfloat16: 2 MiB a block of 16 tokens, 16 GB of weights.
EIGHT_B = KVLayout(32, 8, 128, 16, "bfloat16")
EIGHT_B_TAKES = 18 * GIB  # with activations and workspaces


@pytest.mark.parametrize(("card_gib", "tokens"), [(24, 22_000), (40, 131_072), (80, 131_072)])
def test_an_8b_model_fits_cards_of_24_to_80_gb(card_gib: int, tokens: int) -> None:
    total = card_gib * GIB
    free = total - EIGHT_B_TAKES - CONTEXT_BYTES
    budget = gpu_budget(GpuMemory(total, free, EIGHT_B_TAKES), 0.9)
    assert budget.num_bytes == int(0.9 * total) - EIGHT_B_TAKES - CONTEXT_BYTES
    size = fit_pool(budget, EIGHT_B, longest=131_072, requested=0, draft_window=16)
    assert size.max_model_len >= tokens
    assert size.num_bytes + EIGHT_B_TAKES + CONTEXT_BYTES <= 0.9 * total
    assert bool(size.limit) == (tokens < 131_072)


def test_two_workers_on_one_gpu_keep_to_their_parts() -> None:
    """Whether the other worker has allocated nothing yet, a part, or all of its share."""
    total, taken = 80 * GIB, 18 * GIB
    part = gpu_budget(GpuMemory(total, total - taken - CONTEXT_BYTES, taken), 0.45)
    assert part.num_bytes == int(0.45 * total) - taken - CONTEXT_BYTES
    free = total - int(0.45 * total) - taken - CONTEXT_BYTES  # left by the other worker
    assert gpu_budget(GpuMemory(total, free, taken), 0.45).num_bytes == part.num_bytes
    assert 2 * (part.num_bytes + taken + CONTEXT_BYTES) <= 0.9 * total + 2


def test_gpu_memory_of_other_programs_is_not_used() -> None:
    budget = gpu_budget(GpuMemory(80 * GIB, 10 * GIB, 18 * GIB), 0.9)
    assert budget.num_bytes == 10 * GIB - CONTEXT_BYTES
    assert "10 GiB that are free of the GPU's 80 GiB" in budget.limit


def test_a_too_small_gpu_is_refused_with_figures() -> None:
    budget = gpu_budget(GpuMemory(16 * GIB, GIB // 4, 15 * GIB), 0.9)
    with pytest.raises(ConfigError, match=r"16 GiB.*needs \d+ bytes; expected .*--max-model-len"):
        fit_pool(budget, EIGHT_B, longest=8192, requested=0, draft_window=0)


def test_readable_sizes() -> None:
    assert [readable_size(n) for n in (0, 512, 1024, 192 * MIB, 3 * GIB // 2, 2 << 40)] == [
        "0 bytes",
        "512 bytes",
        "1 KiB",
        "192 MiB",
        "1.5 GiB",
        "2 TiB",
    ]
