"""The HTTP API over a scripted group, served by uvicorn on a free port in a thread."""

import asyncio
import contextlib
import functools
import json
import tempfile
import threading
from pathlib import Path

import httpx
import tiny_tokenizer
import uvicorn
from scripted_engine import ScriptedGroup

from app.api import build_api
from app.client import Client
from app.limits import Limits
from app.operations import Operations
from app.tokenizer import Tokenizer

MODEL = "tiny"
COMPLETION, CHATTING = "/v1/completions", "/v1/chat/completions"
CHAT = [{"role": "user", "content": "hello world"}]


@functools.cache
def tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as directory:
        return Tokenizer(str(tiny_tokenizer.write(Path(directory))))


def tokens(text: str) -> list[int]:
    return asyncio.run(tokenizer().encode(text))


def saying(text: str, eos: bool = True):
    """A script whose answer to everything is ``text``, then the end of the sequence (or the text again)."""
    answer = tokens(text)

    def script(prompt, index):
        if eos and index == len(answer):
            return tiny_tokenizer.EOS
        return answer[index % len(answer)]

    return script


class Server:
    def __init__(self, group: ScriptedGroup, url: str, client: Client, loop: asyncio.AbstractEventLoop) -> None:
        self.group = group
        self.url = url
        self.client = client
        self._loop = loop

    def on_loop(self, coroutine):
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)


@contextlib.contextmanager
def serving(
    group: ScriptedGroup,
    limits: Limits | None = None,
    status=None,
    wait: bool = True,
    manager=None,
    admin_key=None,
    **client_options,
):
    """Serves ``group`` until left; by default only begins when the client is ready."""
    limits = limits or Limits(max_model_len=1000)
    operations = Operations(manager) if manager is not None else None
    started = threading.Event()
    box = {}

    async def serve():
        client = Client(group.locate, limits, offset=0, beat_s=0.05, **client_options)
        await client.start()
        app = build_api(client, tokenizer(), limits, MODEL, status, operations, admin_key)
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
        task = asyncio.create_task(server.serve())
        while not server.started or (wait and not client.ready):
            await asyncio.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        box.update(server=server, made=Server(group, f"http://127.0.0.1:{port}", client, asyncio.get_running_loop()))
        started.set()
        await task
        await client.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),), daemon=True)
    thread.start()
    assert started.wait(20)
    try:
        yield box["made"]
    finally:
        box["server"].should_exit = True
        box["server"].force_exit = True
        thread.join(20)


def post(server, path, **body):
    return httpx.post(f"{server.url}{path}", json=body, timeout=20)


def events(server, path, **body):
    """The decoded events of a stream, which must end with [DONE]."""
    with httpx.stream("POST", f"{server.url}{path}", json={**body, "stream": True}, timeout=20) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def in_thread(call):
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    return thread
