"""/v1/embeddings, the page, and what its strip shows."""

from __future__ import annotations

import re

import pytest
from openai import OpenAI

from octavo import LLM, PoolingParams
from octavo.server.routes.page import PATHS
from octavo.server.settings import ServerSettings

from .conftest import Running, error_of, serving

TEXTS = ["A whale.", "The sea is old."]


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_openais_client(server: Running, llm: LLM, encoding: str) -> None:
    expected = [output.outputs.embedding for output in llm.embed(TEXTS, use_tqdm=False)]
    client = OpenAI(base_url=server.url + "/v1", api_key="none")
    answer = client.embeddings.create(model="tiny", input=TEXTS, encoding_format=encoding)  # type: ignore[arg-type]
    found = [one.embedding for one in answer.data]
    if encoding == "float":
        for mine, theirs in zip(found, expected, strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)
    else:
        import array
        import base64

        for mine, theirs in zip(found, expected, strict=True):
            values = mine if isinstance(mine, list) else array.array("f", base64.b64decode(mine)).tolist()
            assert values == pytest.approx(theirs, abs=1e-5)
    assert [one.index for one in answer.data] == [0, 1]
    assert answer.usage.prompt_tokens == sum(len(llm.tokenizer.encode(text)) for text in TEXTS)
    by_itself = client.embeddings.create(model="tiny", input=TEXTS[0])  # asks for base64, gives floats
    assert by_itself.data[0].embedding == pytest.approx(expected[0], abs=1e-5)
    server.until_idle()


def test_forms_and_fields(server: Running, llm: LLM) -> None:
    ids = llm.tokenizer.encode(TEXTS[0])
    params = PoolingParams(pooling="last", normalize=False, dimensions=8)
    (expected,) = [output.outputs.embedding for output in llm.embed(TEXTS[0], params, use_tqdm=False)]
    fields = {"pooling": "last", "normalize": False, "dimensions": 8}
    for given in (TEXTS[0], [TEXTS[0]], ids, [ids]):
        answer = server.post("/v1/embeddings", {"input": given, **fields}).json()
        assert answer["data"][0]["embedding"] == pytest.approx(expected, abs=1e-5)
    server.until_idle()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input[1]"),
        ({"input": ["a", 5]}, "input[1]"),
        ({"input": [999_999]}, "input"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 99_999}, "dimensions"),
        ({"input": "a", "pooling": "max"}, "pooling"),
        ({"input": "a", "temperature": 1}, "temperature"),
    ],
)
def test_refused(server: Running, body: dict, param: str) -> None:
    error_of(server.post("/v1/embeddings", body), 400, param)
    server.until_idle()


def test_the_page_and_its_files(server: Running) -> None:
    """Every file that one names is there, and nothing is fetched from elsewhere."""
    page = server.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    named = set()
    for path in PATHS:
        answer = server.get(path)
        assert answer.status_code == 200
        text = answer.text
        assert not re.search(r"https?://|innerHTML|eval\(|document\.write", text), path
        named |= {f"/page/{name}" for name in re.findall(r'from "\./([\w.]+)"', text)}
        named |= {f"/{name}" for name in re.findall(r'(?:src|href)="(page/[\w.]+)"', text)}
    assert named == PATHS - {"/"}
    error_of(server.get("/page/../serve.py"), 404)
    error_of(server.get("/page/none.js"), 404)


def test_the_page_needs_no_key_and_tells_nothing(tiny_llama_dir: object) -> None:
    settings = ServerSettings(port=0, api_key=("secret",))
    with serving(tiny_llama_dir, settings) as running:  # type: ignore[arg-type]
        assert running.get("/").status_code == 200 and running.get("/page/main.js").status_code == 200
        for path in ("/v1/models", "/v1/octavo/stats", "/page", "/page/none.js", "//", "/page/main.js/"):
            assert running.get(path).status_code == 401, path
        assert running.post("/", {}).status_code == 401


def test_what_the_strip_shows(server: Running) -> None:
    figures = server.get("/v1/octavo/stats").json()
    assert figures["blocks"] == server.engine.kv.num_blocks and figures["stats"]["query_tokens"] >= 0
    assert {"steps", "running", "waiting", "available_blocks", "cached_blocks"} <= set(figures)
