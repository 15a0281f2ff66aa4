"""Play a plan: `python -m benchmarks.load PLAN.json RESULT.json`."""

from __future__ import annotations

import gc
import sys
import time
from pathlib import Path

import uvloop

from benchmarks.load.drive import Api, Driver
from benchmarks.plan import Endpoint, Plan, Result


def make_api(endpoint: Endpoint, started_s: float) -> Api:
    """The client for an endpoint; only the one that is used gets imported."""
    if endpoint.api == "diptych":
        from benchmarks.load.diptych import DiptychApi

        return DiptychApi(endpoint, started_s)
    from benchmarks.load.openai import OpenAiApi

    return OpenAiApi(endpoint, started_s)


async def _play(plan: Plan) -> Result:
    started_s, cpu_s = time.monotonic(), time.process_time()
    api = make_api(plan.endpoint, started_s)
    driver = Driver(api, started_s)
    try:
        await driver.play(plan.lanes, plan.limit_s)
    finally:
        wall_s = time.monotonic() - started_s
        await api.close()
    return Result(started_s, wall_s, time.process_time() - cpu_s, driver.records)


def main() -> None:
    """Read the plan, play it, write the result."""
    plan = Plan.read(Path(sys.argv[1]))
    gc.freeze()
    gc.disable()  # a collection would look like a pause of the server
    uvloop.run(_play(plan)).write(Path(sys.argv[2]))


if __name__ == "__main__":
    main()
