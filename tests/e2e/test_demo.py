"""The demo as a user has it: scripts/demo.sh from start to Ctrl-C, over real Ray, Serve, HAProxy and HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

ROOT = Path(__file__).parents[2]
URL = "http://127.0.0.1:8000"
DASHBOARD = "http://127.0.0.1:8265"

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@dataclass
class Demo:
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    @property
    def text(self) -> str:
        return "".join(self.lines)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    # Short, because Ray puts Unix sockets below it.
    environment = os.environ | {"RAY_TMPDIR": os.environ["RAY_TMPDIR"]}
    process = subprocess.Popen(
        ["scripts/demo.sh"],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        # A shell that runs the tests in its background has them ignore Ctrl-C, and a script can't undo that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    running = Demo(process)
    reader = threading.Thread(target=running.read, daemon=True)
    reader.start()
    try:
        wait_for(lambda: "Ctrl-C stops it" in running.text or process.poll() is not None, 800)
        assert process.poll() is None, running.text
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(60)
        reader.join(10)


@pytest.fixture
def client(demo: Demo) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{URL}/v1", api_key="none")


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.1)


def ray_list(what: str) -> list[dict[str, Any]]:
    answer = subprocess.run(
        [ROOT / ".venv/bin/ray", "list", what, "--address", DASHBOARD, "--format", "json", "--detail"],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(answer.stdout)


def load() -> dict[str, Any]:
    return httpx.get(f"{URL}/load").json()


def test_the_printed_curl_line_answers_sensibly(demo: Demo) -> None:
    command = re.search(r"curl .*\n.*}'", demo.text)
    assert command, demo.text
    answer = subprocess.run(["bash", "-c", f"{command[0]} --silent"], capture_output=True, text=True, check=True)
    assert "Paris" in json.loads(answer.stdout)["choices"][0]["message"]["content"]


def test_the_openai_client_streams(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    stream = client.chat.completions.create(
        model="demo",
        temperature=0,
        max_tokens=32,
        stream=True,
        stream_options={"include_usage": True},
        messages=[{"role": "user", "content": "What is the capital of France?"}],
    )
    text, usage = "", None
    for chunk in stream:
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
        usage = chunk.usage or usage
    assert "Paris" in text
    assert usage is not None and usage.completion_tokens > 2


def test_greedy_answers_are_the_same_alone_and_together(client: openai.OpenAI) -> None:
    prompts = [f"{number} things that every {thing} needs are" for number in range(2, 6) for thing in ("cat", "town")]

    def complete(prompt: str) -> str:
        return client.completions.create(model="demo", prompt=prompt, max_tokens=16, temperature=0).choices[0].text

    alone = [complete(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(complete, prompts))
    assert together == alone
    assert len(set(alone)) > 4


def test_a_seeded_sample_repeats(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        answer = client.completions.create(model="demo", prompt="Once", max_tokens=12, temperature=1.0, seed=seed)
        return answer.choices[0].text

    assert sample(7) == sample(7)
    assert len({sample(seed) for seed in (7, 8, 9)}) > 1


def test_ray_shows_groups_and_actors_by_name(demo: Demo) -> None:
    groups = {group["name"]: group for group in ray_list("placement-groups")}
    assert set(groups) == {"dp_rank_0", "dp_rank_1"}
    assert {group["state"] for group in groups.values()} == {"CREATED"}
    actors = [actor for actor in ray_list("actors") if actor["state"] == "ALIVE"]
    names = {actor["name"] for actor in actors}
    assert {"dp_rank_0", "dp_rank_1"} <= names
    assert any(name.endswith("::manager") for name in names) and any(name.endswith("::coordinator") for name in names)
    assert {actor["repr_name"] for actor in actors if actor["name"].startswith("dp_rank_")} == {
        "dp_rank_0",
        "dp_rank_1",
    }


def test_the_dashboard_shows_the_application_healthy(demo: Demo) -> None:
    application = httpx.get(f"{DASHBOARD}/api/serve/applications/").json()["applications"]["accordion"]
    assert application["status"] == "RUNNING"
    assert application["deployments"]["Ingress"]["status"] == "HEALTHY"
    assert len(application["deployments"]["Ingress"]["replicas"]) == 2


def test_bad_input_is_refused_in_openai_form(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="gpt-7"):
        client.completions.create(model="gpt-7", prompt="x")
    with pytest.raises(openai.BadRequestError, match="2048"):
        client.completions.create(model="demo", prompt=[5] * 3000)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="demo", prompt="x", temperature=-1)
    assert client.completions.create(model="demo", prompt="x", max_tokens=1).choices


def test_a_client_that_goes_away_is_aborted_in_the_engine(client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model="demo", prompt="A very long story:", max_tokens=1500, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    wait_for(lambda: not any(rank["running"] for rank in load()["ranks"]))


def test_the_group_is_resized_four_ways_while_streams_run(client: openai.OpenAI) -> None:
    def complete(prompt: str) -> str:
        stream = client.completions.create(
            model="demo", prompt=prompt, max_tokens=24, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        return "".join(chunk.choices[0].text for chunk in stream)

    prompts = ["The sea", "A cat", "Rome"]
    undisturbed = [complete(prompt) for prompt in prompts]
    before = {actor["pid"] for actor in ray_list("actors") if actor["state"] == "ALIVE" and _lasts(actor["name"])}
    over = threading.Event()
    answers: list[tuple[int, str]] = []

    def stream_on(number: int) -> None:
        while not over.is_set():
            answers.append((number, complete(prompts[number])))

    with ThreadPoolExecutor(len(prompts)) as pool:
        streams = [pool.submit(stream_on, number) for number in range(len(prompts))]
        try:
            _deploy(3)
            wait_for(lambda: _scaled(3), 180)
            command = [str(ROOT / ".venv/bin/accordion"), "scale", "2", "--url", URL]
            shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            assert "done" in shown
            answer = httpx.post(f"{URL}/scale_elastic_ep", json={"new_data_parallel_size": 1}, timeout=180)
            assert answer.status_code == 200 and answer.json()["data_parallel_size"] == 1
            handle = (
                "from ray import serve; import ray; ray.init(address='auto', log_to_driver=False); "
                "h = serve.get_deployment_handle('Ingress', 'accordion'); "
                "print(h.scale_elastic_ep.remote(2).result()['data_parallel_size'])"
            )
            printed = subprocess.run(
                [str(ROOT / ".venv/bin/python"), "-c", handle], check=True, capture_output=True, text=True
            ).stdout
            assert printed.split()[-1] == "2"
        finally:
            over.set()
        for stream in streams:
            stream.result()
    assert len(answers) >= len(prompts)
    assert [text for _, text in answers] == [undisturbed[number] for number, _ in answers]
    # Not a front-end, nor the manager, nor rank 0 was started again.
    assert before <= {actor["pid"] for actor in ray_list("actors") if actor["state"] == "ALIVE"}
    assert {group["name"] for group in ray_list("placement-groups") if group["state"] == "CREATED"} == {
        "dp_rank_0",
        "dp_rank_1",
    }
    metrics = httpx.get(f"{URL}/metrics").text
    assert 'accordion_operations_total{result="done"}' in metrics


def _lasts(name: str) -> bool:
    return name == "dp_rank_0" or not name.startswith("dp_rank_")


def _deploy(size: int) -> None:
    config = (ROOT / "configs/demo-cpu.yaml").read_text()
    path = ROOT / "build" / "changed.yaml"
    path.write_text(config.replace("data_parallel_size: 2", f"data_parallel_size: {size}"))
    subprocess.run([ROOT / ".venv/bin/serve", "deploy", "-a", DASHBOARD, path], check=True, capture_output=True)


def _scaled(size: int) -> bool:
    status = _status()
    return status["data_parallel_size"] == size and not status["is_scaling_elastic_ep"]


def test_a_file_that_is_bad_or_no_news_changes_nothing(client: openai.OpenAI) -> None:
    def lasting() -> set[int]:
        return {actor["pid"] for actor in ray_list("actors") if actor["state"] == "ALIVE"}

    def group() -> tuple[int, int]:
        status = _status()
        return status["epoch"], status["data_parallel_size"]

    before = lasting()
    _deploy(1)
    wait_for(lambda: _scaled(1), 180)
    httpx.post(f"{URL}/scale_elastic_ep", json={"new_data_parallel_size": 2}, timeout=180).raise_for_status()
    scaled, before = group(), before & lasting()
    _deploy(1)  # the same file again
    _deploy(9)
    wait_for(lambda: "data_parallel_size=9 is outside 1 .. 4" in str(_status()["error"]))
    assert client.completions.create(model="demo", prompt="x", max_tokens=2, temperature=0).choices
    _deploy(1)
    wait_for(lambda: _status()["error"] == "")
    assert group() == scaled and before <= lasting()
    # A front-end that starts reads the file, too.
    replicas = [a for a in ray_list("actors") if a["name"].startswith("SERVE_REPLICA") and a["state"] == "ALIVE"]
    os.kill(replicas[0]["pid"], signal.SIGKILL)
    wait_for(lambda: _front_ends_other_than(replicas[0]["pid"]) == len(replicas), 120)
    assert group() == scaled
    # It may still be starting, by the former file, when the next one is deployed.
    _deploy(2)
    wait_for(lambda: _running_front_ends() == len(replicas), 120)
    assert group() == scaled


def _status() -> dict[str, Any]:
    status: dict[str, Any] = httpx.get(f"{URL}/is_scaling_elastic_ep").json()
    return status


def _running_front_ends() -> int:
    """Those that Serve has started, rather than those whose process is there."""
    (application,) = httpx.get(f"{DASHBOARD}/api/serve/applications/").json()["applications"].values()
    return sum(replica["state"] == "RUNNING" for replica in application["deployments"]["Ingress"]["replicas"])


def _front_ends_other_than(pid: int) -> int:
    alive = [a for a in ray_list("actors") if a["name"].startswith("SERVE_REPLICA") and a["state"] == "ALIVE"]
    return len([actor for actor in alive if actor["pid"] != pid])


def test_losing_a_front_end_costs_only_its_own_connections(client: openai.OpenAI) -> None:
    replicas = [a for a in ray_list("actors") if a["name"].startswith("SERVE_REPLICA") and a["state"] == "ALIVE"]
    assert len(replicas) == 2
    engines = {a["pid"] for a in ray_list("actors") if a["name"].startswith("dp_rank_") and a["state"] == "ALIVE"}
    assert len(engines) == 2
    os.kill(replicas[0]["pid"], signal.SIGKILL)
    patient = openai.OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=5)
    for _ in range(5):
        assert patient.completions.create(model="demo", prompt="x", max_tokens=2, temperature=0).choices

    wait_for(lambda: _front_ends_other_than(replicas[0]["pid"]) == 2, 120)
    assert engines <= {a["pid"] for a in ray_list("actors") if a["state"] == "ALIVE"}


def test_a_rank_that_dies_is_no_error_to_a_client(client: openai.OpenAI) -> None:
    def complete() -> str:
        stream = client.completions.create(
            model="demo", prompt="The sea", max_tokens=48, temperature=0, stream=True, extra_body={"ignore_eos": True}
        )
        return "".join(chunk.choices[0].text for chunk in stream)

    undisturbed = complete()
    engine = next(a for a in ray_list("actors") if a["name"] == "dp_rank_1" and a["state"] == "ALIVE")
    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(complete) for _ in range(4)]
        wait_for(lambda: sum(rank["running"] for rank in load()["ranks"]) > 0)
        os.kill(engine["pid"], signal.SIGKILL)
        assert [call.result() for call in calls] == [undisturbed] * 4


def test_ctrl_c_leaves_nothing_behind(demo: Demo) -> None:
    """The last test of the module: it ends the demo."""
    server = int(subprocess.check_output(["pgrep", "-P", str(demo.process.pid)], text=True).split()[0])
    session = {int(pid) for pid in subprocess.check_output(["pgrep", "-s", str(server)], text=True).split()}
    assert len(session) > 5
    demo.process.send_signal(signal.SIGINT)
    assert demo.process.wait(60) == 130
    left = [pid for pid in session if Path(f"/proc/{pid}").exists() and not _is_zombie(pid)]
    assert left == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{URL}/health")


def _is_zombie(pid: int) -> bool:
    return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
