"""What the HTTP API refuses, what fails under way, and clients that go away: real HTTP, scripted engines."""

import json
import socket

import httpx
import openai
import pytest
from api_server import CHAT, CHATTING, COMPLETION, MODEL, events, in_thread, post, saying, serving
from scripted_engine import ScriptedGroup

from actors import wire
from app.limits import Limits

ANSWER = "the quick brown fox 😀 jumps over 世界"


@pytest.fixture(scope="module")
def server():
    with ScriptedGroup(script=saying(ANSWER)) as group, serving(group) as it:
        yield it


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "words"),
    [
        (COMPLETION, {}, 422, "prompt", "Missing required parameter"),
        (CHATTING, {}, 422, "messages", "Missing required parameter"),
        (COMPLETION, {"prompt": 7}, 422, "prompt", "must be a string"),
        (COMPLETION, {"prompt": ["a", [1]]}, 422, "prompt", "must be a string"),
        (COMPLETION, {"prompt": "a", "max_tokens": "10"}, 422, "max_tokens", "valid integer"),
        (COMPLETION, {"prompt": "a", "temperature": "hot"}, 422, "temperature", "valid number"),
        (COMPLETION, {"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
        (COMPLETION, {"prompt": "a", "temperature": 2.5}, 400, "temperature", "less than or equal to 2"),
        (COMPLETION, {"prompt": "a", "top_p": 0}, 400, "top_p", "greater than 0"),
        (COMPLETION, {"prompt": "a", "seed": 2**70}, 400, "seed", "less than"),
        (COMPLETION, {"prompt": "a", "n": 17}, 400, "n", "at most 16"),
        (COMPLETION, {"prompt": ["a"] * 20, "n": 10}, 400, "prompt", "200 sequences"),
        (COMPLETION, {"prompt": "a", "stop": ["x"] * 17}, 400, "stop", "17 strings"),
        (COMPLETION, {"prompt": "a", "stop": ""}, 400, "stop.0", "at least 1 character"),
        (COMPLETION, {"prompt": "a", "stop": "x" * 300}, 400, "stop", "300 characters"),
        (COMPLETION, {"prompt": ""}, 400, "prompt", "empty"),
        (COMPLETION, {"prompt": [5, 10**6]}, 400, "prompt", "1000000 is outside the vocabulary"),
        (COMPLETION, {"prompt": [5, -1]}, 400, "prompt", "-1 is outside the vocabulary"),
        (COMPLETION, {"prompt": [5] * 1000}, 400, "prompt", "1000 tokens, but the prompt has 1000"),
        (COMPLETION, {"prompt": [5] * 600, "max_tokens": 600}, 400, "max_tokens", "600 in the prompt and 600 in the"),
        (CHATTING, {"messages": CHAT, "max_completion_tokens": 5000}, 400, "max_completion_tokens", "context length"),
        (COMPLETION, {"prompt": "a", "logprobs": 21}, 400, "logprobs", "at most 20"),
        (COMPLETION, {"prompt": "a", "logit_bias": {"x": 1}}, 400, "logit_bias", "token ids"),
        (COMPLETION, {"prompt": "a", "logit_bias": {"99999": 1}}, 400, "logit_bias", "outside the vocabulary"),
        (COMPLETION, {"prompt": "a", "logit_bias": {"5": 101}}, 400, "logit_bias.5", "less than or equal to 100"),
        (COMPLETION, {"prompt": "a", "stop_token_ids": [99999]}, 400, "stop_token_ids", "outside the vocabulary"),
        (COMPLETION, {"prompt": "a", "min_tokens": 99}, 400, "min_tokens", "99"),
        (COMPLETION, {"prompt": "a", "best_of": 3}, 400, "best_of", "not supported"),
        (COMPLETION, {"prompt": "a", "suffix": "b"}, 400, "suffix", "not supported"),
        (COMPLETION, {"prompt": "a", "echo": True, "logprobs": 1}, 400, "logprobs", "not supported"),
        (COMPLETION, {"prompt": "a", "stream_options": {}}, 400, "stream_options", "only allowed when 'stream'"),
        (CHATTING, {"messages": []}, 400, "messages", "at least 1 item"),
        (CHATTING, {"messages": [{"content": "x"}]}, 422, "messages.0.role", "Missing required parameter"),
        (CHATTING, {"messages": [{"role": "wizard", "content": "x"}]}, 400, "messages", "no such role: wizard"),
        (CHATTING, {"messages": CHAT, "tools": [{"type": "function"}]}, 400, "tools", "not supported"),
        (CHATTING, {"messages": CHAT, "response_format": {"type": "json_object"}}, 400, "response_format", "supported"),
        (CHATTING, {"messages": CHAT, "top_logprobs": 2}, 400, "top_logprobs", "only allowed when 'logprobs'"),
        (
            CHATTING,
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            400,
            "messages",
            "'image_url' are not supported",
        ),
        (COMPLETION, {"prompt": "a", "model": "gpt-9"}, 404, "model", "'gpt-9' does not exist"),
        ("/v1/nothing", {}, 404, None, "POST /v1/nothing"),
        ("/v1/models", {}, 405, None, "POST /v1/models"),
    ],
)
def test_refusals_name_the_field_and_the_reason(server, path, body, status, param, words):
    submits = len(server.group.submits)
    response = post(server, path, **body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert words in error["message"]
    assert error["type"] == "invalid_request_error" and set(error) == {"message", "type", "param", "code"}
    assert len(server.group.submits) == submits


def test_fields_that_ask_for_nothing_and_unknown_ones_are_taken(server):
    harmless = {"tools": [], "response_format": {"type": "text"}, "user": "me", "metadata": {"a": "b"}, "frobnicate": 1}
    assert post(server, CHATTING, messages=CHAT, max_tokens=1, **harmless).status_code == 200


def test_null_is_as_good_as_absent(server):
    nulls = dict.fromkeys(["max_tokens", "stop", "ignore_eos", "min_tokens", "stream", "stream_options", "tools", "n"])
    assert post(server, COMPLETION, prompt="a", echo=None, logprobs=None, **nulls).status_code == 200


def test_a_body_that_is_no_json(server):
    response = httpx.post(f"{server.url}{COMPLETION}", content=b"{nope", headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and "not valid JSON" in response.json()["error"]["message"]
    response = httpx.post(f"{server.url}{COMPLETION}", data={"prompt": "a"})
    assert response.status_code == 400 and "Content-Type" in response.json()["error"]["message"]


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large(declared):
    with ScriptedGroup() as group, serving(group, Limits(max_model_len=100, max_body_bytes=10_000)) as server:
        body = json.dumps({"prompt": "a" * 5_000_000}).encode()
        content = body if declared else (body[i : i + 10_000] for i in range(0, len(body), 10_000))
        response = httpx.post(f"{server.url}/v1/completions", content=content)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "request_too_large" and "10000" in response.text
        assert post(server, "/v1/completions", prompt="a").status_code == 200


def test_the_official_client_raises_its_own_errors(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-9", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model=MODEL, prompt="x", temperature=9)
    with pytest.raises(openai.UnprocessableEntityError):
        client.completions.create(model=MODEL, prompt="x", max_tokens="many")


def held_server(**options):
    group = ScriptedGroup(script=saying(ANSWER, eos=False))
    for engine in group.engines.values():
        engine.held = True
    return group, serving(group, **options)


def test_a_full_queue():
    group, serve = held_server(limits=Limits(max_model_len=100, max_queued_requests=2))
    with group, serve as server:
        threads = [in_thread(lambda: post(server, COMPLETION, prompt="a")) for _ in range(2)]
        group.wait(lambda: len(group.submits) == 2)
        response = post(server, COMPLETION, prompt="a", stream=True)
        assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
        assert response.json()["error"]["type"] == "rate_limit_error"
        for engine in group.engines.values():
            engine.held = False
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("stream", [True, False])
def test_the_deadline_before_the_first_token(stream):
    group, serve = held_server(limits=Limits(max_model_len=100, request_timeout_s=0.2))
    with group, serve as server:
        response = post(server, COMPLETION, prompt="a", stream=stream)
        assert response.status_code == 408 and "0.2 s" in response.json()["error"]["message"]
        group.wait(lambda: len(set(group.aborted)) == 1)


def test_the_deadline_in_a_stream_is_an_event_and_the_official_client_raises_it():
    with ScriptedGroup(step_s=0.02) as group, serving(group, Limits(10**6, request_timeout_s=1.0)) as server:
        chunks = events(server, COMPLETION, prompt="a", max_tokens=10**5)
        assert len(chunks) > 2 and chunks[-1]["error"]["code"] == "timeout"
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        with client, pytest.raises(openai.APIError, match="did not finish"):
            list(client.completions.create(model=MODEL, prompt="a", max_tokens=10**5, stream=True))
        group.wait(lambda: len(set(group.aborted)) == 2)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("code", "status"), [("invalid", 400), ("model_error", 500), ("overloaded", 429), ("unheard of", 500)]
)
def test_what_the_engine_refuses_has_its_status_also_when_streamed(code, status, stream):
    with ScriptedGroup() as group, serving(group) as server:
        for engine in group.engines.values():
            engine.refuse = wire.Failure(code, "because of this")
        response = post(server, COMPLETION, prompt="a", stream=stream)
        assert (response.status_code, response.json()["error"]["message"]) == (status, "because of this")


@pytest.mark.parametrize("running", [True, False])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_is_aborted_in_the_engine(stream, running):
    group, serve = held_server()
    with group, serve as server:
        if running:
            group.engines[0].held = False
        host, port = server.url.removeprefix("http://").split(":")
        body = json.dumps({"prompt": "a", "max_tokens": 900, "n": 1, "stream": stream}).encode()
        group.step_s = 0.05
        with socket.create_connection((host, int(port))) as connection:
            head = [f"POST {COMPLETION} HTTP/1.1", "Host: x", "Content-Type: application/json"]
            head += [f"Content-Length: {len(body)}", "", ""]
            connection.sendall("\r\n".join(head).encode() + body)
            group.wait(lambda: len(group.submits) == 1)
            if running:
                group.wait(lambda: server.client.running == 1)
        group.wait(lambda: len(set(group.aborted)) == 1)
        group.wait(lambda: server.client.running + server.client.waiting == 0)
        group.wait(lambda: 'accordion_errors_total{status="499"} 1.0' in httpx.get(f"{server.url}/metrics").text)


def test_closing_the_official_clients_stream_aborts():
    with ScriptedGroup(step_s=0.01) as group, serving(group) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            stream = client.completions.create(model=MODEL, prompt="a", max_tokens=900, n=3, stream=True)
            next(iter(stream))
            stream.close()
        group.wait(lambda: len(set(group.aborted)) == 3)


def test_a_lost_group():
    group, serve = held_server()
    with group, serve as server:
        results = []
        thread = in_thread(lambda: results.append(post(server, COMPLETION, prompt="a")))
        group.wait(lambda: len(group.submits) == 1)
        server.on_loop(server.client.fail(RuntimeError("it burned")))
        thread.join()
        for response in (*results, post(server, COMPLETION, prompt="a"), httpx.get(f"{server.url}/health")):
            assert response.status_code == 503 and "it burned" in response.json()["error"]["message"]


def test_a_group_that_starts():
    group = ScriptedGroup()
    group.silent = True
    with group, serving(group, Limits(max_model_len=100, start_timeout_s=0.2), wait=False) as server:
        response = httpx.get(f"{server.url}/health")
        assert response.status_code == 503 and "starting" in response.json()["error"]["message"]
        response = post(server, COMPLETION, prompt="a")
        assert response.status_code == 503 and "waited 0.2 s" in response.json()["error"]["message"]
