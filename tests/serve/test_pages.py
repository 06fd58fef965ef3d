"""The files for browsers: they are there, light, cached by content, and need nothing from elsewhere."""

import gzip
import re

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from gpt_serve.serve import problems
from gpt_serve.serve.pages import add_pages, assets


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI(docs_url=None, redoc_url=None)
    problems.install(app)
    add_pages(app)
    return TestClient(app)


@pytest.mark.parametrize("path", ["/", "/docs", *(f"/static/{name}" for name in sorted(assets()))])
def test_every_file_is_served_with_a_type_and_a_policy(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 200 and response.content
    expected = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "html": "text/html"}
    ending = "html" if path in ("/", "/docs") else path.rpartition(".")[2]
    assert response.headers["content-type"].startswith(expected.get(ending, "text/plain"))
    assert "default-src 'self'" in response.headers["content-security-policy"]
    assert client.head(path).headers["content-length"] == response.headers["content-length"]


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_what_a_page_refers_to_is_there(client: TestClient, path: str) -> None:
    found = re.findall(r'(?:src|href)="(static/[^"]+)"', client.get(path).text)
    assert len(found) >= 3
    assert [client.get(f"/{name}").status_code for name in found] == [200] * len(found)


def test_a_file_that_has_not_changed_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/static/page.js")
    again = client.get("/static/page.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get("/static/page.css", headers={"If-None-Match": first.headers["etag"]}).status_code == 200


def test_swagger_ui_travels_compressed_to_who_understands_it(client: TestClient) -> None:
    path = "/static/swagger-ui/swagger-ui-bundle.js"
    zipped = client.get(path, headers={"Accept-Encoding": "gzip, br"})
    plain = client.get(path, headers={"Accept-Encoding": "identity"})
    assert zipped.headers["content-encoding"] == "gzip" and "content-encoding" not in plain.headers
    assert zipped.content == plain.content and len(plain.content) > 10**6
    assert int(zipped.headers["content-length"]) < len(plain.content) / 3


def test_swagger_ui_keeps_its_licence() -> None:
    shipped = assets()
    assert b"Apache License" in shipped["swagger-ui/LICENSE"].content
    assert b"SmartBear" in shipped["swagger-ui/NOTICE"].content
    assert b"swagger-ui" in gzip.decompress(shipped["swagger-ui/swagger-ui-bundle.js"].content)


@pytest.mark.parametrize("path", ["/static/none.js", "/static/../app.py", "/static/..%2fapp.py", "/static/", "/static"])
def test_no_other_file_is_there(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 404
    assert response.headers["content-type"] == "application/problem+json"
