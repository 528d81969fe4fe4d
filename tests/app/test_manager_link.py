"""How a front-end reaches a manager that Serve may recreate, with Ray's own errors."""

import asyncio

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

import app.manager_link
from app.errors import Unavailable
from app.manager_link import ManagerLink


class Manager:
    """A handle whose calls end one after the other as ``ends`` say."""

    def __init__(self, *ends):
        self.ends = list(ends)
        self.calls = []

    def __getattr__(self, method):
        class Method:
            def remote(_, *arguments):
                return self._call(method, arguments)

        return Method()

    async def _call(self, method, arguments):
        self.calls.append((method, *arguments))
        end = self.ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(app.manager_link, "RETRY_S", 0.001)


def test_a_call_is_made_again_when_its_manager_died():
    manager = Manager(ActorDiedError(), {"id": "mine"})
    handles = iter([None, manager, None, manager])

    def find():
        handle = next(handles)
        if handle is None:
            raise ValueError("no such actor")
        return handle

    answer = asyncio.run(ManagerLink(find).scale_elastic_ep(3, None, "mine", [1]))
    assert answer == {"id": "mine"}
    assert manager.calls == [("scale_elastic_ep", 3, None, "mine", [1])] * 2


def test_what_the_manager_raises_is_raised_also_when_ray_makes_it_look_like_no_actor():
    error = RayTaskError("declare", "its traceback", ValueError("a bug")).as_instanceof_cause()
    assert isinstance(error, ValueError)
    with pytest.raises(RuntimeError, match="a bug"):
        asyncio.run(ManagerLink(lambda: Manager(error)).declare(3))


def test_an_operator_is_told_in_time_that_there_is_no_manager():
    def find():
        raise ValueError("no such actor")

    with pytest.raises(Unavailable, match=r"not answered for 0\.05 s.*same operation_id"):
        asyncio.run(ManagerLink(find, patience_s=0.05).status())
