"""The Python client and the commands that resize a group, against a real HTTP server with a scripted manager."""

import contextlib
import json
import os
import pty
import subprocess
import sys

import pytest
from api_server import in_thread, serving
from scripted_engine import ScriptedGroup
from scripted_manager import ScriptedManager

from app.cli import main
from app.control import AdminKey
from app.elastic import ElasticClient, Refused, RolledBack, Unreachable

KEY = "sésame"


@contextlib.contextmanager
def operated(auto=("launching", "joining", "retiring"), **options):
    manager = ScriptedManager(auto=auto)
    with ScriptedGroup() as group, serving(group, manager=manager, **options) as server:
        yield server, manager


def client_of(server, admin_key=None, patience_s=10.0):
    return ElasticClient(server.url, admin_key, poll_s=0.01, patience_s=patience_s)


class Flaky:
    """Every other question is lost: in turn before the server heard it, and after."""

    def __init__(self, opener):
        self._opener = opener
        self.asked = 0

    def open(self, request, timeout):
        self.asked += 1
        if self.asked % 4 == 1:
            raise ConnectionResetError("lost on the way")
        answer = self._opener.open(request, timeout=timeout)
        if self.asked % 4 == 3:
            answer.close()
            raise TimeoutError("lost on the way back")
        return answer


def test_a_resize_is_followed_to_its_end():
    with operated() as (server, manager):
        seen = []
        result = client_of(server).scale_elastic_ep(3, drain_timeout=5, retire_ranks=[0], on_progress=seen.append)
        assert result["data_parallel_size"] == 3 and result["operation"]["done"]
        assert {"launching", "joining"} & {status["phase"] for status in seen}
        assert all(status["is_scaling_elastic_ep"] for status in seen)
        assert len(manager.begun) == 1 and manager.asked[0] == ("scale", 3, 5, manager.begun[0], [0])
        assert client_of(server).rebalance_experts()["operation"]["kind"] == "rebalance"
        status = client_of(server).status()
        assert (status["data_parallel_size"], status["is_scaling_elastic_ep"]) == (3, False)


def test_lost_questions_and_answers_start_nothing_twice():
    with operated() as (server, manager):
        client = client_of(server)
        client._opener = flaky = Flaky(client._opener)
        assert client.scale_elastic_ep(3)["data_parallel_size"] == 3
        assert client.scale_elastic_ep(1)["data_parallel_size"] == 1
        assert len(manager.begun) == 2 and flaky.asked > 8


def test_a_manager_that_is_away_for_a_while_is_waited_for():
    with operated(auto=()) as (server, manager):
        results = []
        thread = in_thread(lambda: results.append(client_of(server).scale_elastic_ep(3)))
        manager.wait(lambda: manager.begun)
        manager.absent = True
        manager.finish()
        manager.absent = False
        thread.join()
        assert results[0]["data_parallel_size"] == 3


@pytest.mark.parametrize("reached", [True, False])
def test_an_operation_that_the_server_has_forgotten(reached):
    with operated(auto=()) as (server, manager):
        results = []

        def scale():
            try:
                results.append(client_of(server).scale_elastic_ep(3)["data_parallel_size"])
            except RolledBack as error:
                results.append(str(error))

        thread = in_thread(scale)
        manager.wait(lambda: manager.begun)
        with manager._lock:
            manager.size = 3 if reached else 2
            if not reached:
                manager.refuse = {"refused": "busy", "message": "operation other is joining"}
            manager.replace()
        thread.join()
        assert results[0] == 3 if reached else "unknown" in results[0]


def test_a_roll_back_is_raised_with_phase_and_cause():
    with operated(auto=()) as (server, manager):
        errors = []

        def scale():
            with pytest.raises(RolledBack) as raised:
                client_of(server).scale_elastic_ep(3)
            errors.append(raised.value)

        thread = in_thread(scale)
        manager.wait(lambda: manager.begun)
        manager.roll_back("joining", "no answer from dp_rank_2")
        thread.join()
        assert (errors[0].phase, errors[0].cause) == ("joining", "no answer from dp_rank_2")


def test_refusals():
    with operated(auto=(), admin_key=AdminKey(KEY)) as (server, manager):
        client = client_of(server, KEY)
        for call, status in (
            (lambda: client_of(server).scale_elastic_ep(3), 401),
            (lambda: client_of(server, "wrong").scale_elastic_ep(3), 401),
            (lambda: client.scale_elastic_ep(2), 400),
            (lambda: client.cancel(), 400),
        ):
            with pytest.raises(Refused) as refused:
                call()
            assert refused.value.status == status
        assert client.scale_elastic_ep(3, operation_id="mine", wait=False)["operation_id"] == "mine"
        with pytest.raises(Refused, match="mine") as refused:
            client.scale_elastic_ep(4)
        assert (refused.value.status, refused.value.code) == (409, "operation_running")
        assert client.cancel()["operation_id"] == "mine" and manager.operation["done"]
        assert KEY not in repr(client)
        with pytest.raises(ValueError, match="no header") as bad:
            ElasticClient(server.url, f"{KEY}\n{KEY}")
        assert KEY not in str(bad.value)
        with pytest.raises(ValueError, match="expected http"):
            ElasticClient("file:///etc/passwd")


def test_nobody_there():
    with pytest.raises(Unreachable, match="no answer for 0 s"):
        ElasticClient("http://127.0.0.1:9", poll_s=0.01, patience_s=0).status()
    with operated() as (server, manager):
        manager.absent = True
        with pytest.raises(Unreachable, match="The manager has not answered"):
            client_of(server, patience_s=0.05).scale_elastic_ep(3)


def test_a_redirect_does_not_take_the_key_along():
    from http.server import BaseHTTPRequestHandler, HTTPServer

    heard = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_GET(self):
            heard.append(self.path)
            self.send_response(302)
            self.send_header("Location", "/other")
            self.end_headers()

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Elsewhere) as server:
        in_thread(server.serve_forever)
        with pytest.raises(Refused) as refused:
            ElasticClient(f"http://127.0.0.1:{server.server_port}", KEY).status()
        server.shutdown()
    assert refused.value.status == 302 and heard == ["/is_scaling_elastic_ep"]


# --- the commands -------------------------------------------------------------------------------------------------


def test_scale_prints_a_line_for_each_phase(capsys):
    with operated(auto=("launching", "joining", "committed", "retiring") * 6) as (server, manager):
        assert main(["scale", "3", "--url", server.url, "--drain-timeout", "7", "--retire", "0,2"]) == 0
        assert manager.asked[0][:3] == ("scale", 3, 7.0) and manager.asked[0][4] == [0, 2]
        lines = capsys.readouterr().out.splitlines()
        assert "is done after" in lines[-1] and "from 2 to 3 ranks" in lines[-1]
        assert lines[:-1] and all(": now " in line for line in lines[:-1])


def test_commands_say_what_was_refused_and_exit_accordingly(capsys, tmp_path, monkeypatch):
    key_file = tmp_path / "key"
    key_file.write_text(f"{KEY}\n")
    with operated(auto=(), admin_key=AdminKey(KEY)) as (server, manager):
        url = ["--url", server.url]
        key = [*url, "--admin-key-file", str(key_file)]
        assert main(["scale", "3", *url]) == 1 and "admin key" in capsys.readouterr().err
        assert main(["scale", "2", *key]) == 1 and "2 ranks already" in capsys.readouterr().err
        assert main(["scale", "3", "--no-wait", *key]) == 0 and "has begun" in capsys.readouterr().out
        monkeypatch.setenv("ACCORDION_ADMIN_KEY", KEY)
        monkeypatch.setenv("ACCORDION_URL", server.url)
        assert main(["rebalance"]) == 1 and manager.begun[0] in capsys.readouterr().err
        manager.step("joining", "1 of 2")
        assert main(["status"]) == 0
        out = capsys.readouterr().out
        assert "2 ranks of 3 wanted, epoch 1: joining" in out and "1 of 2" in out and "scale 2 -> 3" in out
        assert main(["cancel"]) == 0 and "being cancelled" in capsys.readouterr().out
        assert main(["status", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["operation"]["failed_phase"] == "aborting"
        manager.auto = ("joining",)
        assert main(["rebalance"]) == 0 and "Rebalancing" in capsys.readouterr().out
        assert main(["scale", "3", *url, "--admin-key-file", str(tmp_path / "none")]) == 2
        assert main(["scale", "3", "--url", "nowhere"]) == 2
        with pytest.raises(SystemExit):
            main(["scale", "3", "--retire", "a"])
        assert KEY not in capsys.readouterr().err


def test_a_roll_back_has_exit_status_1(capsys):
    with operated(auto=()) as (server, manager):
        statuses = []
        thread = in_thread(lambda: statuses.append(main(["scale", "3", "--url", server.url])))
        manager.wait(lambda: manager.begun)
        manager.roll_back("placing", "no node has room")
        thread.join()
        assert statuses == [1] and "rolled back in phase placing: no node has room" in capsys.readouterr().err


def test_an_unreachable_server_has_exit_status_2(capsys, monkeypatch):
    monkeypatch.setattr("app.elastic.FIRST_PATIENCE_S", 0)
    assert main(["status", "--url", "http://127.0.0.1:9"]) == 2
    assert "--url" in capsys.readouterr().err


def test_a_terminal_gets_a_bar():
    with operated(auto=("launching", "joining", "committed", "retiring") * 8) as (server, _manager):
        terminal, side = pty.openpty()
        command = [sys.executable, "-m", "app.cli", "scale", "3", "--url", server.url]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=side, timeout=60, check=True)
        shown = os.read(terminal, 65536)
        os.close(side)
        os.close(terminal)
        assert b"|" in shown and b"now " in shown
        assert b"is done" in done.stdout and b"now " not in done.stdout
