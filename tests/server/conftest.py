"""Servers for tests: the real application on uvicorn, on 127.0.0.1, over a real engine with the tiny model."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from octavo import LLM
from octavo.async_llm import AsyncLLM
from octavo.server.app import make_app
from octavo.server.metrics import Metrics
from octavo.server.served_llm import ServedLLM
from octavo.server.serving import Server, url_of
from octavo.server.settings import ServerSettings
from octavo.server.sockets import open_socket

MODEL = "tiny"
HERMES = (
    "{% if tools %}<|im_start|>system\nTools: {% for tool in tools %}{{ tool | tojson }}{% endfor %}\n"
    'Call one as <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>\n{% endif %}'
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{% if tools %}<|im_start|>system\nTools: {% for tool in tools %}{{ tool | tojson }}{% endfor %}\n"
    'Respond in the format {"name": function name, "parameters": dictionary}<|im_end|>\n{% endif %}'
    "{% for m in messages %}<|im_start|>{{ 'ipython' if m.role == 'tool' else m.role }}\n{{ m.content }}"
    '{% for c in m.tool_calls or [] %}{"name": "{{ c.function.name }}", '
    '"parameters": {{ c.function.arguments | tojson }}}{% endfor %}<|im_end|>\n'
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENGINE = {"max_num_seqs": 8, "max_num_batched_tokens": 64, "max_model_len": 2048}


class Running:
    """A server that runs in a thread of this process."""

    def __init__(self, llm: AsyncLLM, url: str, server: Server) -> None:
        self.llm = llm
        self.url = url
        self.server = server
        self.client = httpx.Client(timeout=60)  # one, since each reads all certificates of the system

    @property
    def engine(self) -> Any:
        """Where it is in this process."""
        return self.llm._loop.engine  # type: ignore[attr-defined]

    @property
    def context(self) -> Any:
        return self.server._context

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.client.post(self.url + path, json=body, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.client.get(self.url + path, **options)

    def until_idle(self) -> None:
        """Until no request is left and all blocks are home."""
        kv, until = self.engine.kv, time.monotonic() + 30
        while self.llm.num_unfinished_requests or kv.num_available < kv.num_blocks or self.context.num_open:
            assert time.monotonic() < until, "requests or blocks were left behind"
            time.sleep(0.002)
        assert self.context.admission.num_requests == self.context.admission.num_tokens == 0
        assert self.context.bodies.held == 0
        assert self.context.runs == {}


@contextmanager
def serving(
    model: Path, settings: ServerSettings | None = None, kind: type[AsyncLLM] = AsyncLLM, **engine: Any
) -> Iterator[Running]:
    settings = settings or ServerSettings(port=0, served_model_name=(MODEL,))
    llm = kind(str(model), **{**ENGINE, **engine})
    with open_socket(settings) as listener:
        metrics = None
        if isinstance(llm, ServedLLM):
            metrics = llm.metrics = Metrics(llm.figures, MODEL)
        server = Server(make_app(llm, settings, metrics), settings, llm.close)
        url = url_of(settings, listener)
        thread = threading.Thread(target=asyncio.run, args=(server.serve([listener]),), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.005)
        try:
            yield Running(llm, url, server)
        finally:
            assert server._loop is not None
            server._loop.call_soon_threadsafe(server.stop)
            thread.join(30)
            llm.close()
            assert not thread.is_alive()


def with_template(model: Path, folder: Path, template: str) -> Path:
    """A copy of a model with another chat template."""
    copied = folder / "model"
    shutil.copytree(model, copied)
    (copied / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((copied / "tokenizer_config.json").read_text())
    (copied / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return copied


@pytest.fixture(scope="session")
def shared_server(tiny_llama_dir: Path) -> Iterator[Running]:
    with serving(tiny_llama_dir) as running:
        yield running


@pytest.fixture(scope="session")
def hermes_server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Of a model whose chat template teaches calls of tools in the form of Hermes."""
    with serving(with_template(tiny_llama_dir, tmp_path_factory.mktemp("hermes"), HERMES)) as running:
        yield running


@pytest.fixture(scope="session")
def llama_server(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The same in the form of Llama."""
    with serving(with_template(tiny_llama_dir, tmp_path_factory.mktemp("llama"), LLAMA)) as running:
        yield running


@pytest.fixture
def servers(hermes_server: Running, llama_server: Running) -> Iterator[dict[str, Running]]:
    """Both, by the form of calls. After each test nothing was left behind."""
    yield {"hermes": hermes_server, "llama3_json": llama_server}
    hermes_server.until_idle()
    llama_server.until_idle()


@pytest.fixture
def server(shared_server: Running) -> Iterator[Running]:
    """One for all tests that change nothing of it. After each, the engine lives, and nothing was left behind."""
    yield shared_server
    shared_server.until_idle()
    assert shared_server.get("/health").status_code == 200


@pytest.fixture(scope="session")
def llm(tiny_llama_dir: Path) -> Iterator[LLM]:
    """The library on the same model: what answers must be."""
    with LLM(str(tiny_llama_dir), **ENGINE) as library:
        yield library


@pytest.fixture
def client(server: Running) -> OpenAI:
    """OpenAI's own client."""
    return OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


class Lines(logging.Handler):
    """Fields of what is told of requests."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def of(self, message: str, count: int = 1) -> list[dict[str, Any]]:
        """All of them, once there are as many."""
        limit = time.monotonic() + 60
        while len(found := [one for one in self.records if one.getMessage() == message]) < count:
            assert time.monotonic() < limit
            time.sleep(0.002)
        return [{**one.octavo_fields, "level": one.levelname} for one in found]  # type: ignore[attr-defined]

    def answered(self, response: httpx.Response) -> dict[str, Any]:
        """Of the request that had this answer, which is told when the answer may be there already."""
        limit, mine = time.monotonic() + 60, response.headers["x-request-id"]
        while not (found := [one for one in self.of("answered", 0) if one["request_id"] == mine]):
            assert time.monotonic() < limit
            time.sleep(0.002)
        (told,) = found
        return told


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler, logger = Lines(), logging.getLogger("octavo.server.requests")
    level = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


def error_of(response: httpx.Response, status: int, param: str | None = None) -> dict[str, Any]:
    """The error in the one envelope, checked."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"], body
    error: dict[str, Any] = body["error"]
    assert sorted(error) == ["code", "message", "param", "type"]
    assert error["code"] == status and isinstance(error["message"], str) and error["message"]
    assert error["type"].endswith("Error")
    assert "Traceback" not in error["message"] and "/tmp" not in error["message"] and "\n" not in error["message"]
    assert response.headers["x-request-id"]
    if param is not None:
        assert error["param"] == param, error
    return error
