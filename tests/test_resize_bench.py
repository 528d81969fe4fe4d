"""The measurement of resizes, against a server that follows a script: what it finds, counts and prints."""

import asyncio
import json
import sys
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

sys.path.append(str(Path(__file__).parents[1] / "scripts" / "bench"))

import resize
import resize_report
import streams
from footprint import Footprint
from load import Recording, RequestFailed


class Script:
    """A server whose answer to a prompt is its first id counted up; ``say(number)`` is how it answers that request.

    Operations are done when they are asked for the second time; to ``broken`` sizes they are rolled back instead.
    """

    def __init__(self, say=lambda number: "complete", broken=()):
        self.say = say
        self.broken = broken
        self.size = 2
        self.asked = 0
        self.replayed = 7
        self.operations = {}
        self.app = web.Application()
        self.app.router.add_post("/v1/completions", self.complete)
        self.app.router.add_get("/v1/models", self.models)
        self.app.router.add_get("/metrics", self.metrics)
        self.app.router.add_post("/scale_elastic_ep", self.scale)
        self.app.router.add_get("/is_scaling_elastic_ep", self.status)

    async def models(self, request):
        return web.json_response({"data": [{"id": "scripted"}]})

    async def metrics(self, request):
        lines = f'accordion_requests_replayed_total{{reason="rank_left"}} {self.replayed}.0\nother_total 99.0\n'
        return web.Response(text=lines)

    async def complete(self, request):
        how = self.say(self.asked)
        self.asked += 1
        if how.isdigit():
            return web.json_response({"error": {"message": "no"}}, status=int(how))
        body = await request.json()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        tokens = body["max_tokens"]
        for place in range(tokens):
            number = body["prompt"][0] + place + (how == "different" and place == tokens - 1)
            finish = "length" if place == tokens - 1 else None
            if place == 5 and how == "abort":
                finish = "abort"
            choice = {"text": f" {number}", "logprobs": {"tokens": [f" {number}"]}, "finish_reason": finish}
            if place == 5 and how == "error":
                await response.write(b'data: {"error": {"message": "lost"}}\n\n')
                return response
            await response.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
            if place == 5 and how in ("cut", "abort"):
                if how == "cut":
                    request.transport.close()
                return response
            await asyncio.sleep(0)
        used = {"prompt_tokens": len(body["prompt"]), "completion_tokens": tokens - (how == "short")}
        await response.write(b"data: " + json.dumps({"choices": [], "usage": used}).encode() + b"\n\ndata: [DONE]\n\n")
        return response

    async def scale(self, request):
        body = await request.json()
        id_, size = body["operation_id"], body["new_data_parallel_size"]
        known = self.operations.get(id_)
        if known is None:
            operation = {"id": id_, "kind": "scale", "phase": "launching", "from_size": self.size, "to_size": size}
            self.operations[id_] = operation | {"done": False, "error": "", "failed_phase": "", "epoch": 1}
            return web.json_response({"operation": self.operations[id_]}, status=202)
        known |= {"done": True, "phase": "idle", "seconds": {"launching": 1.5, "armed": 0.01}}
        if size in self.broken:
            known |= {"error": "no room", "failed_phase": "placing"}
            error = {"message": "rolled back", "code": "scaling_failed"}
            return web.json_response({"error": error, "operation": known}, status=503)
        self.size = size
        self.replayed += 3
        return web.json_response({"operation": known | {"pause_s": 0.012, "experts_moved": 8, "epoch": 2}})

    async def status(self, request):
        last = next(reversed(self.operations.values()), None)
        done = {"done": True} if last else {}
        return web.json_response(
            {
                "data_parallel_size": self.size,
                "epoch": 1,
                "operation_id": last and last["id"],
                "operation": last and last | done,
                "is_scaling_elastic_ep": False,
            }
        )


def with_server(script, scenario):
    """What ``scenario(session, url)`` returns, beside the server."""

    async def run():
        async with TestServer(script.app) as server, aiohttp.ClientSession() as session:
            return await scenario(session, str(server.make_url("")).rstrip("/"))

    return asyncio.run(run())


def bench(script, *options):
    """A whole run against the script; returns its report."""
    arguments = resize.parse(["--url", "http://given-below", "--settle", "0.3", "--poll", "0.01", *options])
    run = resize.Run(arguments, streams.some_cases(4))

    async def scenario(session, url):
        await resize.measure(run, url, Footprint(url, dashboard=None, here=False))

    with_server(script, scenario)
    return run.report(run.streams.requests, run.streams.stalls)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(resize, "AFTER_S", 0.05)
    monkeypatch.setattr(streams, "BACK_OFF_S", 0.01)


def request(arrivals, outcome="complete", sent=0.0, ended=None):
    return streams.Request(0, 0, sent, arrivals[-1] if ended is None else ended, tuple(arrivals), outcome)


# --- gaps ---------------------------------------------------------------------------------------------------------


def test_gaps_that_touch_a_span_and_those_inside_it():
    requests = [request([1.0, 2.0, 2.5, 4.5]), request([0.5, 9.0]), request([1.0, 1.1])]
    assert streams.gaps(requests, 2.0, 3.0) == [500, 2000, 8500]
    assert streams.gaps(requests, 2.0, 3.0, inside=True) == [500]
    assert streams.gaps(requests, 20.0, 30.0) == []


def test_a_stream_that_breaks_off_or_hangs_has_a_gap_up_to_its_end():
    broken = request([1.0, 2.0], "failed", ended=6.0)
    hanging = request([1.0], "open", ended=9.0)
    assert streams.gaps([broken, hanging], 3.0, 4.0) == [4000, 8000]
    assert streams.gaps([request([1.0, 2.0], "different", ended=6.0)], 3.0, 4.0) == []


def test_waits_for_a_first_token():
    waiting = request([], "open", sent=1.0, ended=5.0)
    refused = request([], "refused", sent=1.0, ended=3.0)
    assert streams.first_tokens([request([3.0, 4.0], sent=1.0), waiting, refused], 2.0, 2.5) == [2000, 4000]
    assert streams.first_tokens([request([3.0, 4.0], sent=1.0)], 3.5, 4.5) == []


def test_a_resize_is_set_beside_the_steady_time_before_it():
    steady = [request([n / 10 for n in range(50)])]
    during = request([4.9, 5.0, 5.8, 6.0])
    operation = {"seconds": {"placing": 0.1, "launching": 0.5, "armed": 0.3, "retiring": 0.1}}
    made = resize_report.Resize(2, 3, (0.0, 5.0), 5.0, 1.0, 7.0, operation)
    row = resize_report.figures(made, [*steady, during], [(5.5, 0.2)])
    assert row["longest_gap_in"] == "armed"
    assert (row["longest_gap"], row["steady_gap_p99"], row["ratio"]) == (800, 100, 8)
    assert row["own_stall_max"] == 200 and row["requests"] == 1
    total = resize_report.totals([*steady, during], [row])
    assert not resize_report.met(total) and "and 8.0: MISSED" in resize_report.goal(total)
    assert resize_report.met(total | {"ratio_max": 3.0})


# --- answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "outcome", "note"),
    [
        ("complete", "complete", ""),
        ("different", "different", "token 47 is"),
        ("429", "refused", "HTTP 429"),
        ("400", "refused", "HTTP 400"),
        ("503", "refused", "HTTP 503"),
        ("500", "failed", "HTTP 500"),
        ("error", "failed", "lost"),
        ("abort", "aborted", "after 6"),
        ("cut", "failed", "Error"),
        ("short", "failed", "usage says 47"),
    ],
)
def test_each_way_to_answer_is_told_apart(how, outcome, note):
    case = streams.Case(streams.Prompt([1000, 1], ""), 48)
    words = tuple(f" {1000 + place}" for place in range(48))

    async def scenario(session, url):
        recording = Recording()
        await recording.fill(session, url, streams.dialect_of("scripted").body(case.prompt, case.tokens))
        return streams.judge(recording, 0, 0, 48, streams.Said("".join(words), words))

    judged = with_server(Script(lambda number: how), scenario)
    assert judged.outcome == outcome and note in judged.note
    assert len(judged.arrivals) == {"refused": 0, "failed": 5, "aborted": 6}.get(outcome, 48) or how in "500 cut short"


def test_a_server_that_fails_alone_is_not_measured():
    with pytest.raises(RequestFailed, match="HTTP 500"):
        bench(Script(lambda number: "500"), "--sequence", "2,3")


def test_cases_are_the_same_every_time():
    assert streams.some_cases(16) == streams.some_cases(16) != streams.some_cases(16, seed=1)
    assert all(32 <= len(c.prompt.ids) <= 128 and 48 <= c.tokens <= 96 for c in streams.some_cases(16))


# --- whole runs ---------------------------------------------------------------------------------------------------


def test_a_run_in_which_nothing_goes_wrong():
    report = bench(Script(), "--sequence", "2,3,1,2")
    assert [(row["from_size"], row["to_size"], row["error"]) for row in report["resizes"]] == [
        (2, 3, ""),
        (3, 1, ""),
        (1, 2, ""),
    ]
    for row in report["resizes"]:
        assert row["seconds_by_phase"] == {"launching": 1.5, "armed": 0.01}
        assert (row["pause"], row["experts_moved"], row["replayed"], row["epoch"]) == (12, 8, 3, 2)
        assert row["requests"] > 0 and row["steady_gaps"] > 0 and row["ratio"] is not None
    total = report["totals"]
    assert total["requests"] > 4 and [total[bad] for bad in streams.BAD] == [0, 0, 0, 0]
    text = resize_report.table(report)
    assert "| 3 → 1 | " in text and "launching 1.5 |" in text and "0, 0, 0, 0 and" in text
    json.dumps(report)


def test_bad_answers_are_counted_and_shown():
    said = {4: "different", 5: "429", 6: "500", 7: "abort", 8: "503"}
    report = bench(Script(lambda number: said.get(number, "complete")), "--sequence", "2,3")
    total = report["totals"]
    assert {bad: total[bad] for bad in streams.BAD} == {"failed": 1, "aborted": 1, "refused": 2, "different": 1}
    assert len(total["notes"]) == 5
    assert "1, 1, 2, 1 and" in resize_report.table(report) and not resize_report.met(total)


def test_a_failed_resize_is_in_the_table_and_the_run_goes_on():
    report = bench(Script(broken=(4,)), "--sequence", "2,4,3,2")
    assert [(row["to_size"], row["error"]) for row in report["resizes"]] == [(4, "no room"), (3, ""), (2, "")]
    assert report["resizes"][0]["failed_phase"] == "placing" and report["resizes"][1]["from_size"] == 2
    text = resize_report.table(report)
    assert "2 → 4 FAILED: no room" in text and "| failed: placing |" in text and "3 resizes, 1 failed" in text


def test_random_sizes_end_with_the_first():
    arguments = resize.parse(["--url", "http://x", "--random-minutes", "1", "--largest", "3"])
    now = iter([0.0] + [1.0] * 20 + [61.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resize.time, "perf_counter", lambda: next(now))
        sizes = list(resize.targets(arguments))
    assert len(sizes) == 21 and sizes[-1] == 2 and set(sizes) == {1, 2, 3}
    assert all(a != b for a, b in zip([2, *sizes[:-2]], sizes[:-1], strict=True))


def test_an_operation_that_hangs_is_cancelled(monkeypatch):
    monkeypatch.setattr(resize, "CANCEL_S", 0.01)

    class Hanging:
        cancelled = ()

        def scale_elastic_ep(self, size, drain_timeout, operation_id):
            asyncio.run(asyncio.sleep(0.5))

        def cancel(self, operation_id):
            self.cancelled = (operation_id,)

    client = Hanging()
    with pytest.raises(TimeoutError, match="could not be cancelled"):
        asyncio.run(resize.operate(client, 3, None, 0.01))
    assert len(client.cancelled) == 1


def test_what_the_measurement_breaks_off_is_no_failure():
    async def scenario(session, url):
        cases = streams.some_cases(2)
        dialect = streams.dialect_of("scripted")
        expected, _ = await streams.reference(session, url, dialect, cases)
        load = streams.Streams(session, url, dialect, cases, expected, 3)
        with pytest.raises(KeyboardInterrupt):
            async with load:
                await asyncio.sleep(0.05)
                raise KeyboardInterrupt
        return load.requests

    requests = with_server(Script(), scenario)
    assert sum(request.outcome == "open" for request in requests) == 3
    assert {request.outcome for request in requests} <= {"open", "complete"}
