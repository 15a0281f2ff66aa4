"""/docs: everything is described, and the page loads nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from coordinator.api.openai.openapi import description, page
from tests.support.scripted_frontend import ScriptedFrontend, client

# Elements and attributes by which a browser fetches or runs something.
LOADING = {"script", "link", "img", "iframe", "object", "embed", "audio", "video", "base", "form"}
SOURCES = {"src", "srcset", "action", "data", "style", "background", "http-equiv"}


class Elements(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


async def test_the_page_is_served_with_a_policy_that_forbids_everything() -> None:
    async with client(ScriptedFrontend()) as http:
        got = await http.get("/docs")
        assert got.status_code == 200
        assert got.headers["content-type"].startswith("text/html")
        policy = got.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; style-src 'sha256-")
        assert "unsafe" not in policy and "http" not in policy
        assert (await http.head("/docs")).content == b""
        assert (await http.post("/docs", json={})).status_code == 405


def test_the_page_loads_nothing() -> None:
    html = page(description("1")).body.decode()
    for tag, attributes in Elements(html).tags:
        assert tag not in LOADING, tag
        assert not SOURCES & attributes.keys() or tag == "meta", attributes
        assert not any(name.startswith("on") for name in attributes)
        href = attributes.get("href") or "#"
        assert href.startswith("#") or href == "openapi.json"
    assert "url(" not in html and "@import" not in html and "//" not in html


def test_every_path_option_and_object_is_on_the_page() -> None:
    described = description("1")
    html = page(described).body.decode()
    for path, operations in described["paths"].items():
        assert f"<code>{path}</code>" in html
        for operation in operations.values():
            if not isinstance(operation, dict) or "requestBody" not in operation:
                continue
            body = operation["requestBody"]["content"]["application/json"]["schema"]
            for one in body.get("anyOf", [body]):
                for name in one["properties"]:
                    assert f"<code>{name}</code>" in html, name
    ids = set(re.findall(r'id="(\w+)"', html))
    assert ids == described["components"]["schemas"].keys()
    assert set(re.findall(r'href="#(\w+)"', html)) <= ids


def test_what_is_described_is_escaped() -> None:
    described = description("<script>alert(1)</script>")
    assert "<script>" not in page(described).body.decode()
