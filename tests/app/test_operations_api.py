"""The endpoints that change the running group: real HTTP, a scripted manager."""

import asyncio
import contextlib
import json
import logging
import pickle
import socket

import httpx
import pytest
from api_server import in_thread, post, serving
from scripted_engine import ScriptedGroup
from scripted_manager import ScriptedManager

from app.config import HttpConfig, complaints
from app.control import AdminKey
from app.errors import Conflict, InvalidRequest, ScalingFailed
from app.operations import Operations

SCALE, STATE = "/scale_elastic_ep", "/is_scaling_elastic_ep"
KEY = "a key of 23 characters"


@contextlib.contextmanager
def operated(**options):
    """A server, and the manager behind it."""
    manager = ScriptedManager(**{name: options.pop(name) for name in ("size", "auto") if name in options})
    with ScriptedGroup() as group, serving(group, manager=manager, **options) as server:
        yield server, manager


def begin(server, manager, path=SCALE, **body):
    """A caller who waits; returns once the operation runs. Its answer will be the one item of the list."""
    answers = []
    count = len(manager.asked)
    thread = in_thread(lambda: answers.append(post(server, path, **body)))
    manager.wait(lambda: len(manager.asked) > count)
    return thread, answers


def error_of(response):
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_a_resize_is_answered_when_it_is_done():
    with operated() as (server, manager):
        body = {"new_data_parallel_size": 3, "drain_timeout": 2.5, "retire_ranks": [1]}
        thread, answers = begin(server, manager, **body, operation_id="mine")
        manager.step("joining", "1 of 2 ranks joined")
        assert not answers
        manager.finish(pause_s=0.025, experts_moved=7)
        thread.join()
        (response,) = answers
        assert response.status_code == 200
        result = response.json()
        assert (result["operation_id"], result["data_parallel_size"], result["epoch"]) == ("mine", 3, 2)
        assert result["operation"]["experts_moved"] == 7 and "pause 25 ms" in result["message"]
        assert manager.asked == [("scale", 3, 2.5, "mine", [1])]


def test_without_waiting_it_is_accepted_and_its_id_attaches_to_it_ever_after():
    with operated() as (server, manager):
        body = {"new_data_parallel_size": 3, "wait": False}
        response = post(server, SCALE, **body)
        assert (response.status_code, response.json()["data_parallel_size"]) == (202, 2)
        body["operation_id"] = response.json()["operation_id"]
        assert post(server, SCALE, **body).status_code == 202
        thread, answers = begin(server, manager, **body | {"wait": True})
        manager.finish()
        thread.join()
        assert answers[0].status_code == 200
        assert post(server, SCALE, **body).json()["data_parallel_size"] == 3
        assert manager.begun == [body["operation_id"]]


def test_a_second_operation_is_a_conflict_that_names_the_first():
    with operated() as (server, _manager):
        post(server, SCALE, new_data_parallel_size=3, wait=False, operation_id="first")
        for path, body in ((SCALE, {"new_data_parallel_size": 4}), ("/rebalance_experts", {})):
            response = post(server, path, **body)
            error = error_of(response)
            assert (response.status_code, error["code"]) == (409, "operation_running")
            assert "first" in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "words"),
    [
        (SCALE, {}, 422, "new_data_parallel_size", "Missing"),
        (SCALE, {"new_data_parallel_size": "3"}, 422, "new_data_parallel_size", "valid integer"),
        (SCALE, {"new_data_parallel_size": 0}, 400, "new_data_parallel_size", "greater than or equal to 1"),
        (SCALE, {"new_data_parallel_size": 2}, 400, "new_data_parallel_size", "2 ranks already"),
        (SCALE, {"new_data_parallel_size": 3, "drain_timeout": -1}, 400, "drain_timeout", "greater than or equal"),
        (SCALE, {"new_data_parallel_size": 3, "drain_timeout": "1"}, 422, "drain_timeout", "valid number"),
        (SCALE, {"new_data_parallel_size": 1, "retire_ranks": [0, 0]}, 400, "retire_ranks", "twice"),
        (SCALE, {"new_data_parallel_size": 1, "retire_ranks": []}, 400, "retire_ranks", "at least 1"),
        (SCALE, {"new_data_parallel_size": 1, "retire_ranks": [-1]}, 400, "retire_ranks.0", "greater than"),
        (SCALE, {"new_data_parallel_size": 3, "operation_id": "a b"}, 400, "operation_id", "match"),
        (SCALE, {"new_data_parallel_size": 3, "drain_timout": 5}, 422, "drain_timout", "Extra"),
        ("/cancel_scale_elastic_ep", {}, 422, "operation_id", "Missing"),
        ("/cancel_scale_elastic_ep", {"operation_id": "x"}, 400, "operation_id", "no operation x"),
    ],
)
def test_refusals_name_the_field(path, body, status, param, words):
    with operated() as (server, manager):
        response = post(server, path, **body)
        error = error_of(response)
        assert (response.status_code, error["param"]) == (status, param), error
        assert words in error["message"] and error["type"] == "invalid_request_error"
        assert not manager.begun


def test_the_manager_may_name_the_field_itself_and_may_be_unable():
    with operated() as (server, manager):
        manager.refuse = {"refused": "invalid", "message": "rank 9 is no member", "param": "retire_ranks"}
        response = post(server, SCALE, new_data_parallel_size=1, retire_ranks=[9])
        assert (response.status_code, error_of(response)["param"]) == (400, "retire_ranks")
        manager.refuse = {"refused": "unavailable", "message": "the group is restarting"}
        response = post(server, SCALE, new_data_parallel_size=1)
        assert response.status_code == 503 and "restarting" in error_of(response)["message"]
        manager.absent = True
        for response in (post(server, SCALE, new_data_parallel_size=1), httpx.get(f"{server.url}{STATE}")):
            assert (response.status_code, error_of(response)["code"]) == (503, "unavailable")


def test_a_roll_back_says_in_which_phase_and_why_also_to_those_who_ask_later():
    with operated() as (server, manager):
        thread, answers = begin(server, manager, new_data_parallel_size=3, operation_id="mine")
        manager.roll_back("launching", "dp_rank_2 ended: out of memory.")
        thread.join()
        for response in (*answers, post(server, SCALE, new_data_parallel_size=3, operation_id="mine", wait=False)):
            assert (response.status_code, error_of(response)["code"]) == (503, "scaling_failed")
            message = error_of(response)["message"]
            assert "phase launching: dp_rank_2 ended: out of memory. The old group serves on" in message
            assert response.json()["operation"]["failed_phase"] == "launching"
        assert "out of memory" in httpx.get(f"{server.url}{STATE}").json()["error"]
        assert post(server, SCALE, new_data_parallel_size=3, wait=False).status_code == 202, "a retry right after works"


def test_a_caller_who_goes_away_does_not_stop_the_operation():
    with operated() as (server, manager):
        host, port = server.url.removeprefix("http://").split(":")
        body = json.dumps({"new_data_parallel_size": 3, "operation_id": "mine"}).encode()
        with socket.create_connection((host, int(port))) as connection:
            head = [f"POST {SCALE} HTTP/1.1", "Host: x", "Content-Type: application/json"]
            connection.sendall("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)
            manager.wait(lambda: manager.begun)
        manager.step("joining")
        assert httpx.get(f"{server.url}{STATE}").json()["phase"] == "joining"
        manager.finish()
        assert post(server, SCALE, new_data_parallel_size=3, operation_id="mine").status_code == 200


def test_another_operation_right_after_does_not_hide_the_end_of_the_first():
    with operated() as (server, manager):
        thread, answers = begin(server, manager, new_data_parallel_size=3, operation_id="first")
        with manager._lock:  # no status between the two
            manager.finish()
            manager._begin("second", "scale", 4)
        thread.join()
        assert answers[0].status_code == 200 and answers[0].json()["operation"]["id"] == "first"


@pytest.mark.parametrize("reached", [True, False])
def test_when_the_manager_was_replaced_the_size_tells_how_it_ended(reached):
    with operated() as (server, manager):
        thread, answers = begin(server, manager, new_data_parallel_size=3)
        with manager._lock:
            if reached:
                manager.size, manager.epoch = 3, 5
            else:
                manager.refuse = {"refused": "busy", "message": "operation second is joining"}
            manager.replace()
        thread.join()
        (response,) = answers
        if reached:
            assert (response.status_code, response.json()["epoch"]) == (200, 5)
        else:
            assert response.status_code == 503 and "unknown end" in error_of(response)["message"]


def test_a_group_that_is_lost_meanwhile_ends_the_waiting():
    with operated() as (server, manager):
        thread, answers = begin(server, manager, new_data_parallel_size=3)
        manager.phase, manager.cause = "lost", "node n1 burned"
        manager.version += 1
        thread.join()
        assert answers[0].status_code == 503 and "node n1 burned" in error_of(answers[0])["message"]


def test_the_state_can_be_followed():
    with operated() as (server, manager):
        state = httpx.get(f"{server.url}{STATE}").json()
        assert state == {
            "is_scaling_elastic_ep": False,
            "phase": "idle",
            "epoch": 1,
            "progress": "2 ranks in epoch 1",
            "error": "",
            "data_parallel_size": 2,
            "wanted_data_parallel_size": 2,
            "operation_id": None,
            "operation": None,
        }
        post(server, SCALE, new_data_parallel_size=3, wait=False, operation_id="mine")
        manager.step("loading weights", "half")
        state = httpx.post(f"{server.url}{STATE}").json()
        assert (state["is_scaling_elastic_ep"], state["phase"], state["progress"]) == (True, "loading weights", "half")
        assert (state["data_parallel_size"], state["wanted_data_parallel_size"]) == (2, 3)
        assert state["operation_id"] == state["operation"]["id"] == "mine"
        manager.finish()
        manager.declared_refusal = "data_parallel_size=99 is outside 1 .. 4"
        state = httpx.get(f"{server.url}{STATE}").json()
        assert (state["is_scaling_elastic_ep"], state["phase"], state["epoch"]) == (False, "idle", 2)
        assert "99" in state["error"]
        manager.phase = "restarting"
        assert httpx.get(f"{server.url}{STATE}").json()["phase"] == "restarting"


def test_rebalancing_and_cancelling():
    with operated() as (server, manager):
        answers = []
        thread = in_thread(lambda: answers.append(httpx.post(f"{server.url}/rebalance_experts")))  # no body at all
        manager.wait(lambda: manager.begun)
        manager.finish()
        thread.join()
        assert answers[0].status_code == 200 and "Rebalancing" in answers[0].json()["message"]
        thread, answers = begin(server, manager, "/rebalance_experts", operation_id="mine")
        response = post(server, "/cancel_scale_elastic_ep", operation_id="mine")
        assert response.status_code == 200 and response.json()["operation"]["id"] == "mine"
        thread.join()
        assert answers[0].status_code == 503 and "cancelled" in error_of(answers[0])["message"]


def test_a_caller_who_leaves_while_the_manager_is_asked_leaves_the_question_with_it():
    """Serve cancels a request whose caller is gone; the manager may be in the middle of admitting the operation."""

    class Slow(ScriptedManager):
        async def scale_elastic_ep(self, *arguments):
            self.asked.append(arguments)
            await self.go_on.wait()
            return await super().scale_elastic_ep(*arguments)

    async def scenario():
        manager = Slow()
        manager.go_on = asyncio.Event()
        call = asyncio.create_task(Operations(manager).scale(3))
        while not manager.asked:
            await asyncio.sleep(0)
        call.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await call
        manager.go_on.set()
        while not manager.begun:
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(scenario(), 10))


@pytest.mark.parametrize("size", [0, -1, True, "3", 2.0, None])
def test_a_program_that_asks_for_no_size_is_refused(size):
    manager = ScriptedManager()
    with pytest.raises(InvalidRequest, match="give a number of 1 or more"):
        asyncio.run(Operations(manager).scale(size))
    assert not manager.asked


@pytest.mark.parametrize(
    "error", [ScalingFailed("rolled back", {"id": "mine"}), Conflict("busy"), InvalidRequest("bad", "retire_ranks")]
)
def test_errors_survive_the_way_through_a_deployment_handle(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and again.body() == error.body() and str(again) == str(error)


# --- the admin key ------------------------------------------------------------------------------------------------

MUTATING = [
    (SCALE, {"new_data_parallel_size": 3, "wait": False}),
    ("/rebalance_experts", {}),
    ("/cancel_scale_elastic_ep", {"operation_id": "x"}),
]


@pytest.mark.parametrize(("path", "body"), MUTATING)
def test_what_changes_the_group_needs_the_key(path, body, caplog):
    with caplog.at_level(logging.DEBUG), operated(admin_key=AdminKey(KEY)) as (server, manager):
        for given in (None, "", KEY, f"Basic {KEY}", "Bearer", "Bearer wrong", f"Bearer {KEY}x", "Bearer é".encode()):
            headers = {} if given is None else {"Authorization": given}
            response = httpx.post(f"{server.url}{path}", json=body, headers=headers)
            assert (response.status_code, error_of(response)["code"]) == (401, "invalid_api_key"), given
            assert response.headers["www-authenticate"] == "Bearer" and KEY not in response.text
        assert httpx.post(f"{server.url}{path}", json={"nonsense": 1}).status_code == 401, (
            "before the body is looked at"
        )
        assert not manager.asked
        manager.refuse = {"refused": "unavailable", "message": "not now"}
        response = httpx.post(f"{server.url}{path}", json=body, headers={"Authorization": f"bearer {KEY}"})
        assert response.status_code in (400, 503)
        assert httpx.get(f"{server.url}{STATE}").status_code == 200, "looking is free"
    assert KEY not in caplog.text


def test_the_key_comes_from_a_file_and_shows_nowhere(tmp_path):
    path = tmp_path / "key"
    path.write_text(f"{KEY}\n")
    key = AdminKey.read(str(path))
    key.check(f"Bearer {KEY}")
    assert KEY not in repr(key) + str(vars(key))
    assert KEY not in HttpConfig(admin_key_file=str(path)).model_dump_json()
    path.write_text(" \n")
    with pytest.raises(ValueError, match=r"admin_key_file=.* is empty"):
        AdminKey.read(str(path))
    with pytest.raises(ValueError, match="can't be read on this node"):
        AdminKey.read(str(tmp_path / "none"))


def test_a_key_among_the_settings_is_refused_without_being_shown():
    with pytest.raises(ValueError) as refused:
        HttpConfig(admin_key=KEY)
    said = complaints(refused.value)
    assert "admin_key_file" in said and KEY not in said


# --- metrics ------------------------------------------------------------------------------------------------------


def metrics_of(server):
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_metrics_follow_operations_and_lose_nothing():
    with operated() as (server, manager):
        before = metrics_of(server)
        assert before['accordion_requests_replayed_total{reason="rank_left"}'] == 0
        post(server, SCALE, new_data_parallel_size=1, wait=False)
        post(server, "/v1/completions", prompt="a", max_tokens=3)
        server.group.leave([1])
        server.group.wait(lambda: server.client.leaving)
        manager.step("draining")
        httpx.get(f"{server.url}{STATE}")
        during = metrics_of(server)
        phases = {name: value for name, value in during.items() if name.startswith("accordion_scaling_phase")}
        assert phases.pop('accordion_scaling_phase{phase="draining"}') == 1 and not any(phases.values())
        assert during["accordion_ranks_leaving"] == 1 and during["accordion_ranks_wanted"] == 1
        server.group.change([0])
        server.group.wait(lambda: server.client.epoch == 2)
        manager.totals.update(experts_moved=5, pause_s_max=0.5)
        manager.imbalance = 1.25
        manager.finish(pause_s=0.25)
        httpx.get(f"{server.url}{STATE}")
        after = metrics_of(server)
        expected = {
            'accordion_scaling_phase{phase="idle"}': 1,
            'accordion_scaling_phase{phase="draining"}': 0,
            'accordion_operations_total{result="done"}': 1,
            'accordion_operations_total{result="rolled_back"}': 0,
            "accordion_scaling_pause_seconds": 0.25,
            "accordion_scaling_pause_max_seconds": 0.5,
            'accordion_scaling_seconds{phase="draining"}': 0.5,
            "accordion_experts_moved_total": 5,
            "accordion_expert_imbalance": 1.25,
            "accordion_epoch": 2,
            "accordion_ranks": 1,
            "accordion_ranks_leaving": 0,
            "accordion_generated_tokens_total": 3,
        }
        assert {name: after[name] for name in expected} == expected
