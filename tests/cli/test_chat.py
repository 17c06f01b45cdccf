"""`octavo chat`: history, commands, pipes, and Ctrl-C in a real terminal."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, SamplingParams
from octavo.cli import answering, message_input
from octavo.cli.answering import Answerer, AnswerInterrupted
from octavo.cli.chat import Chat
from octavo.core.errors import InvalidRequestError

from .conftest import Invoke

SOURCE = Path(__file__).parents[2] / "src"
GREEDY = SamplingParams(temperature=0, max_tokens=12)
LIMIT = ("--temperature", "0", "--max-tokens", "12")


@pytest.fixture(scope="module")
def tiny(tiny_llama_dir: Path) -> Iterator[LLM]:
    with LLM(str(tiny_llama_dir)) as llm:
        yield llm


def conversation(llm: LLM, *questions: str, system: str | None = None) -> list[str]:
    """The answers, each given all before it."""
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    for question in questions:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": llm.chat(messages, GREEDY)[0].outputs[0].text})
    return [message["content"] for message in messages if message["role"] == "assistant"]


# --- pipes ---


@pytest.mark.slow
@pytest.mark.usefixtures("smollm2_path")
def test_the_real_model_remembers(invoke: Invoke) -> None:
    """Guards the default model and template with a conversation; one short answer each."""
    stdin = b"What is the capital of France?\nWhat is the capital of Italy?\n"
    code, out, err = invoke("chat", "--backend", "reference", "--max-model-len", 512, *LIMIT, stdin=stdin)
    assert (code, err) == (0, "")
    assert out == "The capital of France is Paris.\nThe capital of Italy is Rome.\n"


def test_lines_are_turns(invoke: Invoke, tiny: LLM, tiny_llama_dir: Path) -> None:
    """Guards forgotten history; the input ends without a line end, has an empty line, and no prompt is printed."""
    questions = ["hello", "and then?", "why?"]
    stdin = b"hello\n\nand then?\r\nwhy?"
    code, out, err = invoke("chat", "--model", tiny_llama_dir, "--json", *LIMIT, stdin=stdin)
    assert (code, err) == (0, "")
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["text"] for answer in answers] == conversation(tiny, *questions)
    assert len({answer["request_id"] for answer in answers}) == 3
    assert answers[0]["prompt_tokens"] < answers[1]["prompt_tokens"] < answers[2]["prompt_tokens"]
    texts = conversation(tiny, *questions)
    assert invoke("chat", "--model", tiny_llama_dir, *LIMIT, stdin=stdin).out == "".join(t + "\n" for t in texts)


def test_messages_of_several_lines(invoke: Invoke, tiny: LLM, tiny_llama_dir: Path) -> None:
    """In a pipe as at a terminal; commands in quotes are text."""
    stdin = b'one \\\ntwo\n"""three\n\n/exit"""\n"""/clear"""\nfour\\'
    code, out, err = invoke("chat", "--model", tiny_llama_dir, "--json", *LIMIT, stdin=stdin)
    assert (code, err) == (0, "")
    texts = [json.loads(line)["text"] for line in out.splitlines()]
    assert texts == conversation(tiny, "one \ntwo", "three\n\n/exit", "/clear", "four")


def test_a_message_that_is_not_closed(invoke: Invoke, tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = invoke("chat", "--model", tiny_llama_dir, "--json", *LIMIT, stdin=b'hi\n"""one\ntwo\n')
    assert (code, out.count("\n")) == (2, 1)
    assert err == 'octavo: error: stdin: ends inside a message that """ began\n'
    monkeypatch.setattr(message_input, "MAX_MESSAGE_CHARS", 10)
    for stdin in (b'"""' + b"123\n" * 10, b"123\\\n" * 10):
        err = invoke("chat", "--model", tiny_llama_dir, *LIMIT, stdin=stdin).err
        assert err == "octavo: error: stdin: has a message of more than 10 characters\n"


def test_system_message_stays(invoke: Invoke, tiny: LLM, tiny_llama_dir: Path) -> None:
    expected = conversation(tiny, "a", "b", system="be brief")
    assert expected != conversation(tiny, "a", "b")
    code, out, _ = invoke(
        "chat", "--model", tiny_llama_dir, "--json", "--system", "be brief", *LIMIT, stdin=b"a\nb\n/clear\na\nb\n"
    )
    assert code == 0
    assert [json.loads(line)["text"] for line in out.splitlines()] == expected * 2, "/clear keeps the system message"


@pytest.mark.parametrize("command", ["/clear", "/reset"])
def test_clear_forgets(invoke: Invoke, tiny: LLM, tiny_llama_dir: Path, command: str) -> None:
    stdin = f"hello\n{command}\nhello\n".encode()
    out = invoke("chat", "--model", tiny_llama_dir, "--json", *LIMIT, stdin=stdin).out
    first, second = (json.loads(line) for line in out.splitlines())
    assert first["text"] == second["text"] == conversation(tiny, "hello")[0]
    assert first["prompt_tokens"] == second["prompt_tokens"]


@pytest.mark.parametrize("command", ["/exit", "/quit"])
def test_exit_leaves(invoke: Invoke, tiny_llama_dir: Path, command: str) -> None:
    code, out, _ = invoke("chat", "--model", tiny_llama_dir, "--json", *LIMIT, stdin=f"a\n{command}\nb\n".encode())
    assert (code, out.count("\n")) == (0, 1)


def test_nothing_to_say(invoke: Invoke, tiny_llama_dir: Path) -> None:
    assert invoke("chat", "--model", tiny_llama_dir) == (0, "", "")
    code, out, err = invoke("chat", "--model", tiny_llama_dir, stdin=b"/help\n")
    assert (code, out) == (0, "") and "/clear" in err


def test_speed_is_told_when_asked_for(invoke: Invoke, tiny_llama_dir: Path) -> None:
    err = invoke("chat", "--model", tiny_llama_dir, "-v", *LIMIT, stdin=b"a\nb\n").err
    assert err.count("12 generated tokens (") == 2


# --- the context ---


def test_a_conversation_that_outgrows_the_context_loses_its_oldest_turns(invoke: Invoke, tiny_llama_dir: Path) -> None:
    """Guards a chat that ends with an error after some turns; the loss is told, the newest message is kept."""
    arguments = ("chat", "--model", tiny_llama_dir, "--json", "--max-model-len", 200, "--max-tokens", 30)
    stdin = b"".join(b"question number %d\n" % n for n in range(8))
    code, out, err = invoke(*arguments, stdin=stdin)
    assert code == 0
    prompt_tokens = [json.loads(line)["prompt_tokens"] for line in out.splitlines()]
    assert len(prompt_tokens) == 8 and max(prompt_tokens) <= 150
    assert "octavo: the context of 200 tokens is full: the first 1 turns were dropped\n" in err
    assert invoke(*arguments, stdin=stdin[:36]).err == ""


def test_a_message_longer_than_the_context_is_refused(invoke: Invoke, tiny_llama_dir: Path) -> None:
    arguments = ("chat", "--model", tiny_llama_dir, "--json", "--max-model-len", 100, *LIMIT)
    code, out, err = invoke(*arguments, stdin=b"hi\n" + b"x" * 500 + b"\n")
    assert (code, out.count("\n")) == (2, 1)
    assert err.startswith("octavo: error: prompt: the message has 5") and err.count("\n") == 1


def test_an_answer_cut_by_the_context_says_so(invoke: Invoke, tiny_llama_dir: Path) -> None:
    arguments = ("chat", "--model", tiny_llama_dir, "--max-model-len", 100, "--ignore-eos")
    code, _, err = invoke(*arguments, stdin=b"hi\n")
    assert (code, err) == (0, "octavo: the answer ends here: the context of 100 tokens is full\n")


def test_a_model_without_chat_template(invoke: Invoke, tiny_llama_dir: Path, tmp_path: Path) -> None:
    for file in tiny_llama_dir.iterdir():
        if file.name != "tokenizer_config.json":
            shutil.copy(file, tmp_path)
    code, out, err = invoke("chat", "--model", tmp_path, stdin=b"hi\n")
    assert (code, out) == (2, "")
    assert "has no chat template and cannot chat" in err and err.count("\n") == 1
    assert invoke("run", "--model", tmp_path, "hi", *LIMIT).code == 0
    code, _, err = invoke("run", "--model", tmp_path, "--system", "x", "hi", *LIMIT)
    assert code == 2 and "no chat template" in err


# --- interrupts, in this process ---


@pytest.fixture
def chat(tiny_llama_dir: Path) -> Iterator[Chat]:
    answerer = Answerer(LLM(str(tiny_llama_dir)), "tiny")
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    yield Chat(answerer, params, None, as_json=False, show_speed=False)
    answerer.close()


def interrupt_after(monkeypatch: pytest.MonkeyPatch, pieces: int) -> None:
    """Ctrl-C when that many pieces of the answer were printed."""
    write = answering.TextWriter.write
    calls = iter(range(10**6))

    def writing(self: Any, text: str) -> None:
        write(self, text)
        if next(calls) == pieces:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(answering.TextWriter, "write", writing)


def test_a_stopped_answer_stays_and_frees_its_blocks(
    chat: Chat, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Guards an answer that runs on unseen after Ctrl-C, and history that does not match the screen."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(AnswerInterrupted):
            chat.answer("hello")
    shown = capsys.readouterr().out
    question, answer = chat._turns
    assert question == {"role": "user", "content": "hello"}
    assert answer["role"] == "assistant" and shown == answer["content"].removesuffix("\n") + "\n" != "\n"
    engine = chat._answerer.llm._loop.engine
    deadline = time.monotonic() + 20
    while engine.num_requests or engine.kv.num_available < engine.kv.num_blocks:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    chat._params = GREEDY
    chat.answer("go on")
    assert [turn["role"] for turn in chat._turns] == ["user", "assistant"] * 2


def test_an_interrupt_before_the_first_token_takes_the_question_back(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards two user's turns in a row, which many templates refuse."""
    engine = chat._answerer.llm._loop.engine
    step = engine.step

    def slow() -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        return step()

    monkeypatch.setattr(engine, "step", slow)
    with pytest.raises(AnswerInterrupted):
        chat.answer("hello")
    assert chat._turns == []


def test_a_refused_message_leaves_the_conversation_as_it_was(chat: Chat) -> None:
    chat._params = GREEDY
    chat.answer("hello")
    before = list(chat._turns)
    with pytest.raises(InvalidRequestError):
        chat.answer("x" * 10_000)
    assert chat._turns == before
