"""What a worker serves: Prefill, Decode and KvService, whatever its role.

A role is a pair of budgets (`engine.base.types.RoleBudgets`): it decides which calls are taken, not
which services exist. `worker` is above `prefill` and `decode` because it joins them here.
"""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.descriptor import ServiceDescriptor

from decode.service import DecodeServicer
from engine.pb.diptych.internal.v1 import worker_pb2
from prefill.service import PrefillServicer
from worker.process import WorkerProcess

Services = Sequence[tuple[ServiceDescriptor, object]]


def make_services(host: WorkerProcess) -> Services:
    """The services of one worker, each with its description."""
    decode = DecodeServicer(host)
    if host.role_budgets.answers:
        decode.prepare()
    services = worker_pb2.DESCRIPTOR.services_by_name
    return [
        (services["PrefillService"], PrefillServicer(host)),
        (services["DecodeService"], decode),
        (services["KvService"], host.kv),
    ]
