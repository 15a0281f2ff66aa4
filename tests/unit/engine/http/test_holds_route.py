"""Request ids in /debug/holds are shown only with the cluster token."""

import httpx
import pytest
from prometheus_client import CollectorRegistry

from engine.base.holds import Hold, holds_as_json
from engine.http.guard import refusals_counter
from engine.http.holds import holds_route
from engine.http.server import make_app
from engine.rpc.auth import ClusterToken

HOLDS = (
    Hold("request", "secret-id", "is being answered", 1.0, 2.0),
    Hold("lease", "incarnation-of-d", "a peer may read", 0.5, 2.0, request_id="secret-id"),
)


async def ask(token, *headers):
    async def report():
        return {"holds": holds_as_json(HOLDS)}

    registry = CollectorRegistry()
    route = holds_route(report, token, refusals_counter(registry))
    app = make_app(registry, lambda: True, [route])
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answers = [await client.get("/debug/holds", headers=dict(some)) for some in headers]
    refused = registry.get_sample_value("diptych_http_refusals_total", {"reason": "token"})
    assert (refused or 0) == [answer.status_code for answer in answers].count(403)
    return answers


async def test_ids_are_shown_with_the_token():
    token = ClusterToken.random()
    plain, full, wrong = await ask(token, (), token.metadata, ClusterToken.random().metadata)
    assert "secret-id" not in plain.text
    request, lease = plain.json()["holds"]
    assert request["owner"] == lease["request_id"] == token.pseudonym("secret-id")
    assert lease["owner"] == "incarnation-of-d"
    request, lease = full.json()["holds"]
    assert request["owner"] == lease["request_id"] == "secret-id"
    assert wrong.status_code == 403
    assert "secret-id" not in wrong.text and "cluster's token" in wrong.json()["error"]["message"]


async def test_ids_are_never_shown_without_a_token():
    answers = await ask(None, (), ClusterToken.random().metadata)
    assert [answer.status_code for answer in answers] == [200, 403]
    assert all("secret-id" not in answer.text for answer in answers)


@pytest.mark.parametrize("given", ["", "Bearer", "Bearer ", "Basic x", "Bearer \udcff"])
async def test_malformed_credentials_are_refused(given):
    headers = [("authorization", given.encode(errors="surrogateescape"))]
    (answer,) = await ask(ClusterToken.random(), headers)
    assert answer.status_code == 403


def test_pseudonyms_are_equal_within_a_cluster():
    first, second = ClusterToken.random(), ClusterToken.random()
    assert first.pseudonym("a") == first.pseudonym("a") != second.pseudonym("a")
    assert first.pseudonym("a") != first.pseudonym("b")
