"""The client against real sockets and scripted engines."""

import asyncio
import contextlib
import random

import pytest
from scripted_engine import ScriptedGroup

from actors import wire
from actors.wire import Load, SamplingParams
from app.client import Client
from app.errors import DeadlineExceeded, EngineDeadError, InvalidRequest, ModelError, Overloaded, Unavailable
from app.flight import Generation
from app.limits import Limits

PROMPT = [11, 12, 13, 14, 15]


def expected(count, prompt=PROMPT):
    return [prompt[i % len(prompt)] for i in range(count)]


@contextlib.asynccontextmanager
async def connected(group, ready=True, **options):
    limits = options.pop("limits", Limits(max_model_len=1000))
    client = Client(group.locate, limits, offset=0, beat_s=0.05, coordinator_timeout_s=0.3, **options)
    await client.start()
    try:
        if ready:
            await until(lambda: client.ready and all(link.attached for link in client._links.values()))
        yield client
    finally:
        await client.close()


async def until(condition, timeout_s=10.0):
    async def poll():
        while not condition():
            await asyncio.sleep(0.002)

    await asyncio.wait_for(poll(), timeout_s)


async def collect(client, request_id="r", max_tokens=20, prompt=PROMPT, **options):
    tokens, finish = [], None
    async for delta in client.generate(request_id, prompt, SamplingParams(max_tokens=max_tokens), **options):
        assert delta.offset == len(tokens)
        tokens += delta.tokens
        finish = delta.finish
    return tokens, finish


def run(scenario, **group_options):
    with ScriptedGroup(**group_options) as group:
        return asyncio.run(asyncio.wait_for(scenario(group), 30))


def test_a_request_streams_to_its_end_and_leaves_nothing_behind():
    async def scenario(group):
        async with connected(group) as client:
            assert await collect(client) == (expected(20), "length")
            assert (client.waiting, client.running) == (0, 0)
            assert (client.epoch, client.view.members) == (1, group.members)

    run(scenario)


def test_many_requests_spread_over_the_ranks():
    async def scenario(group):
        async with connected(group) as client:
            results = await asyncio.gather(*(collect(client, str(i)) for i in range(30)))
            assert results == [(expected(20), "length")] * 30
            assert {len(engine.submits) for engine in group.engines.values()} == {10}

    run(scenario, ranks=3)


def test_several_requests_of_one_call_share_a_stream():
    async def scenario(group):
        async with connected(group) as client:
            calls = [Generation(str(i), [i, i + 1], SamplingParams(max_tokens=5 + i)) for i in range(4)]
            got = {i: [] for i in range(4)}
            with client.call(calls) as call:
                async for batch in call:
                    for index, delta in batch:
                        got[index] += delta.tokens
            assert got == {i: expected(5 + i, [i, i + 1]) for i in range(4)}
            assert not group.aborted

    run(scenario)


def test_one_request_of_a_call_can_be_dropped():
    async def scenario(group):
        async with connected(group) as client:
            calls = [Generation(str(i), [i, i + 1], SamplingParams(max_tokens=200)) for i in range(3)]
            got = {i: [] for i in range(3)}
            with client.call(calls) as call:
                async for batch in call:
                    for index, delta in batch:
                        got[index] += delta.tokens
                        if index == 1 and len(got[1]) < 100:
                            got[1] = [None] * 100
                            call.drop(1)
            assert (got[0], got[2]) == (expected(200, [0, 1]), expected(200, [2, 3]))
            assert got[1] == [None] * 100
            await until(lambda: set(group.aborted) == {"1"})

    run(scenario)


def test_a_named_rank_is_used_and_an_unknown_one_refused():
    async def scenario(group):
        async with connected(group) as client:
            for i in range(3):
                await collect(client, str(i), rank=1)
            assert len(group.engines[1].submits) == 3
            with pytest.raises(InvalidRequest, match="rank 9 is not in the group"):
                await collect(client, "x", rank=9)
            assert client.waiting == 0

    run(scenario)


@pytest.mark.parametrize("held", [True, False])
def test_closing_the_iterator_aborts_in_the_engine(held):
    async def scenario(group):
        group.engines[0].held = held
        async with connected(group) as client:
            task = asyncio.create_task(collect(client, max_tokens=100_000))
            await until(lambda: group.submits and (held or client.running))
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: "r" in group.aborted)
            assert (client.waiting, client.running) == (0, 0)

    run(scenario, ranks=1)


def test_requests_wait_while_the_group_starts():
    async def scenario(group):
        group.engines[0].deaf = True
        async with connected(group, ready=False) as client:
            assert not client.ready and "starting" in client.trouble
            task = asyncio.create_task(collect(client))
            await until(lambda: client.view is not None)
            assert client.waiting == 1 and "attached" in client.trouble
            group.engines[0].deaf = False
            assert await task == (expected(20), "length")

    run(scenario, ranks=1)


def test_a_request_that_no_rank_can_take_fails_in_time_and_says_why():
    async def scenario(group):
        group.silent = True
        limits = Limits(max_model_len=100, start_timeout_s=0.1)
        async with connected(group, ready=False, limits=limits) as client:
            with pytest.raises(Unavailable, match=r"waited 0\.1 s .* no coordinator"):
                await collect(client)

    run(scenario)


def test_the_queue_is_bounded():
    async def scenario(group):
        for engine in group.engines.values():
            engine.held = True
        async with connected(group, limits=Limits(max_model_len=100, max_queued_requests=3)) as client:
            tasks = [asyncio.create_task(collect(client, str(i))) for i in range(3)]
            await until(lambda: client.waiting == 3)
            with pytest.raises(Overloaded, match="queue of 3"):
                await collect(client, "one too many")
            for engine in group.engines.values():
                engine.held = False
            await asyncio.gather(*tasks)
            await collect(client, "room again")

    run(scenario)


def test_deadline():
    async def scenario(group):
        group.engines[0].held = True
        async with connected(group) as client:
            with pytest.raises(DeadlineExceeded, match=r"0\.1 s"):
                await collect(client, timeout_s=0.1)
            await until(lambda: "r" in group.aborted)

    run(scenario, ranks=1)


@pytest.mark.parametrize(
    ("code", "error"), [("invalid", InvalidRequest), ("model_error", ModelError), ("overloaded", Overloaded)]
)
def test_the_engines_refusals_reach_the_caller_with_their_message(code, error):
    async def scenario(group):
        group.engines[0].refuse = wire.Failure(code, "because of this")
        async with connected(group) as client:
            with pytest.raises(error, match="because of this"):
                await collect(client)
            group.engines[0].refuse = None
            assert await collect(client) == (expected(20), "length")

    run(scenario, ranks=1)


def test_a_lost_group_fails_every_call_with_its_cause():
    async def scenario(group):
        group.engines[0].held = True
        async with connected(group) as client:
            tasks = [asyncio.create_task(collect(client, str(i))) for i in range(3)]
            await until(lambda: len(group.submits) == 3)
            await client.fail(RuntimeError("node n1 burned"))
            for task in [*tasks, asyncio.create_task(collect(client, "later"))]:
                with pytest.raises(EngineDeadError, match="RuntimeError: node n1 burned"):
                    await task
            assert "burned" in client.trouble

    run(scenario, ranks=1)


# --- epochs -------------------------------------------------------------------------------------------------------


def test_requests_move_off_a_rank_that_leaves_without_a_repeated_or_missing_token():
    async def scenario(group):
        async with connected(group) as client:
            tasks = [asyncio.create_task(collect(client, str(i), max_tokens=300)) for i in range(6)]
            await until(lambda: client.running == 6)
            group.engines[1].held = True
            group.change([0])
            assert await asyncio.gather(*tasks) == [(expected(300), "length")] * 6
            moved = [submit for submit in group.engines[0].submits if submit.generated]
            assert len(moved) == 3 and all(submit.epoch == 2 for submit in moved)
            assert client.epoch == 2 and set(client._links) == {0}

    run(scenario)


def test_a_request_that_named_a_rank_goes_on_elsewhere_when_that_rank_leaves():
    async def scenario(group):
        async with connected(group) as client:
            task = asyncio.create_task(collect(client, max_tokens=300, rank=1))
            await until(lambda: client.running)
            group.change([0])
            assert await task == (expected(300), "length")

    run(scenario)


def test_a_leaving_rank_finishes_what_it_runs_and_gets_nothing_new():
    async def scenario(group):
        async with connected(group) as client:
            running = asyncio.create_task(collect(client, "old", max_tokens=300, rank=1))
            await until(lambda: client.running)
            group.leave([1])
            await until(lambda: client.leaving == (1,))
            named = collect(client, "named", rank=1)
            results = await asyncio.gather(named, *(collect(client, f"new {i}") for i in range(5)))
            assert results == [(expected(20), "length")] * 6
            assert [submit.request_id for submit in group.engines[1].submits] == ["old"]
            assert await running == (expected(300), "length")
            assert not client.replayed

    run(scenario)


def test_a_shrink_moves_what_is_left_after_the_drain_and_counts_it():
    async def scenario(group):
        async with connected(group) as client:
            tasks = [asyncio.create_task(collect(client, str(i), max_tokens=300)) for i in range(4)]
            await until(lambda: client.running == 4)
            group.leave([1])
            await until(lambda: client.leaving)
            group.engines[1].held = True
            group.change([0])
            assert await asyncio.gather(*tasks) == [(expected(300), "length")] * 4
            assert client.replayed == {"rank_left": 2} and client.leaving == ()

    run(scenario)


def test_requests_wait_while_no_rank_takes_anything_and_go_on_when_a_scaling_is_rolled_back():
    async def scenario(group):
        async with connected(group) as client:
            group.leave([0])
            await until(lambda: client.leaving)
            task = asyncio.create_task(collect(client))
            await until(lambda: client.waiting)
            group.leave([])
            assert await task == (expected(20), "length")

    run(scenario, ranks=1)


def test_a_view_that_another_overtook_changes_nothing():
    """Answers to look-ups and publications come over two sockets: in an epoch, too, the newest counts."""

    async def scenario(group):
        async with connected(group) as client:
            with group._lock:
                before = group.view()
            group.leave([1])
            await until(lambda: client.leaving == (1,))
            group.silent = True
            await asyncio.sleep(0.05)
            heard_at = client._coordinator._heard_at
            group.send_view(before)
            await until(lambda: client._coordinator._heard_at > heard_at)
            assert client.leaving == (1,)
            await asyncio.gather(*(collect(client, str(i)) for i in range(4)))
            assert not group.engines[1].submits

    run(scenario)


def test_a_removed_rank_is_not_revived_by_a_late_view_of_its_epoch():
    async def scenario(group):
        async with connected(group) as client:
            with group._lock:
                before = group.view()
            group.change([0])
            await until(lambda: client.epoch == 2)
            before.number = 10**6
            group.send_view(before)
            await asyncio.gather(*(collect(client, str(i)) for i in range(4)))
            assert (client.epoch, set(client._links)) == (2, {0}) and not group.engines[1].submits

    run(scenario)


def test_what_a_rank_finished_before_it_left_is_neither_lost_nor_made_again():
    """The news that a rank left, and its last outputs, arrive together: the client hears of the new epoch first."""

    async def scenario(group):
        async with connected(group) as client:
            group.engines[1].held = True
            task = asyncio.create_task(collect(client, max_tokens=20, rank=1))
            await until(lambda: group.engines[1].running)
            link = client._links[1]
            asyncio.get_running_loop().remove_reader(link._connection._socket.fileno())  # what comes is not looked at
            link.tick = lambda epoch: None
            group.engines[1].held = False
            await until(lambda: not group.engines[1].running)
            await asyncio.sleep(0.05)  # for the last frame to be in this side's queue
            group.change([0])
            assert await task == (expected(20), "length")
            assert not client.replayed and not group.engines[0].submits

    run(scenario)


def test_an_abort_finds_its_request_where_it_has_moved_to():
    async def scenario(group):
        async with connected(group) as client:
            task = asyncio.create_task(collect(client, max_tokens=100_000, rank=1))
            await until(lambda: client.running)
            group.change([0])
            await until(lambda: group.engines[0].running)
            task.cancel()
            await until(lambda: not group.engines[0].running)
            assert "r~1" in group.engines[0].aborted

    run(scenario)


def test_a_request_cancelled_while_it_has_no_rank_is_never_submitted_again():
    async def scenario(group):
        async with connected(group) as client:
            task = asyncio.create_task(collect(client, max_tokens=100_000, rank=1))
            await until(lambda: client.running)
            group.engines[0].deaf = True
            client._balancer.withhold(0)
            group.change([0])
            await until(lambda: client.epoch == 2)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
            await until(lambda: "r" in group.engines[1].aborted)
            group.engines[0].deaf = False
            assert await collect(client, "next") == (expected(20), "length")
            assert [submit.request_id for submit in group.engines[0].submits] == ["next"]
            assert (client.waiting, client.running) == (0, 0)

    run(scenario)


def test_a_long_running_request_that_loses_its_rank_waits_for_another():
    async def scenario(group):
        limits = Limits(max_model_len=1000, start_timeout_s=0.4)
        async with connected(group, limits=limits) as client:
            task = asyncio.create_task(collect(client, max_tokens=900))
            await until(lambda: client.running)
            await asyncio.sleep(0.5)  # it runs for longer than a request may wait for a rank
            group.engines[0].held = True
            client._balancer.withhold(1)
            group.engines[1].deaf = True
            client._links[1].attached = False
            group.change([1])
            await until(lambda: client.epoch == 2)
            assert client._flights.unplaced
            client._give_up_waiting()
            group.engines[1].deaf = False
            assert await task == (expected(900), "length")

    run(scenario, step_s=0.002)


def test_an_output_of_a_newer_epoch_makes_the_client_ask_for_it():
    async def scenario(group):
        async with connected(group) as client:
            task = asyncio.create_task(collect(client, max_tokens=300))
            await until(lambda: client.running)
            client._coordinator.tick = lambda: None  # no look-up of its own accord
            with group._lock:
                group.change([0])
                group._publish_due = False  # and the publication is lost
            await until(lambda: client.epoch == 2)
            assert await task == (expected(300), "length")

    run(scenario, ranks=1)


@pytest.mark.parametrize("seed", range(3))
def test_streams_of_several_front_ends_through_many_resizes(seed):
    """Ranks join, leave, come back under the same number, lose outputs; views come late; engines and views change in
    either order. Every stream gets its tokens, each once."""
    draw = random.Random(seed)

    async def scenario(group):
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(connected(group)) for _ in range(3)]
            done = []

            async def stream(client, name):
                for turn in range(4):
                    prompt = [draw.randrange(1000) for _ in range(3)]
                    got = await collect(client, f"{name}-{turn}", max_tokens=150, prompt=prompt)
                    assert got == (expected(150, prompt), "length")
                    done.append(name)

            tasks = [
                asyncio.create_task(stream(client, f"{index}-{number}"))
                for index, client in enumerate(clients)
                for number in range(6)
            ]
            old = group.view()
            while not all(task.done() for task in tasks):
                await resize(group, draw, old)
                await asyncio.sleep(draw.uniform(0, 0.02))
            await asyncio.gather(*tasks)
            assert len(done) == 72
            assert all(client.replayed["rank_left"] for client in clients)
            assert all((client.waiting, client.running) == (0, 0) for client in clients)

    run(scenario, ranks=2)


async def resize(group, draw, old):
    members = [member.rank for member in group.members]
    kind = draw.choice(["leave", "stay", "late", "lose", "shrink", "shrink", "grow", "grow", "replace"])
    if kind == "leave":
        group.leave(draw.sample(members, draw.randrange(len(members))))
    elif kind == "stay":
        group.leave([])
    elif kind == "late":
        group.send_view(old)
    elif kind == "lose":
        group.engines[draw.choice(members)].lose = 2
    else:
        if kind == "shrink" and len(members) > 1:
            members.remove(draw.choice(members))
        elif kind == "grow" and len(members) < 4:
            members = sorted([*members, min({0, 1, 2, 3} - set(members))])
            group.add(next(rank for rank in members if rank not in {member.rank for member in group.members}))
        elif kind == "replace":
            group.add(draw.choice(members))  # the same number, another engine
        steps = draw.choice([[(True, True)], [(True, False), (False, True)]])
        for engines_too, view_too in steps:
            group.change(members, engines_too=engines_too, view_too=view_too)
            await asyncio.sleep(draw.uniform(0, 0.005))


def test_a_joining_rank_is_offered_requests_once_it_answers():
    async def scenario(group):
        async with connected(group) as client:
            group.add(2).deaf = True
            group.change([0, 1, 2])
            await until(lambda: client.epoch == 2)
            await asyncio.gather(*(collect(client, str(i)) for i in range(4)))
            assert not group.engines[2].submits
            group.engines[2].deaf = False
            await until(lambda: client._links[2].attached)
            await asyncio.gather(*(collect(client, str(i)) for i in range(6)))
            assert group.engines[2].submits

    run(scenario)


@pytest.mark.parametrize("engine_first", [True, False])
def test_a_submit_of_another_epoch_is_sent_again_in_the_right_one(engine_first):
    """The engines switch before the client hears of it, or the client hears of it before the engines switch."""

    async def scenario(group):
        async with connected(group) as client:
            group.change([0], engines_too=engine_first, view_too=not engine_first)
            if not engine_first:
                await until(lambda: client.epoch == 2)
            task = asyncio.create_task(collect(client, rank=0))
            await until(lambda: len(group.engines[0].submits) >= 1)
            if engine_first:
                group.change([0], engines_too=False)
            else:
                group.engines[0].epoch = 2
            assert await task == (expected(20), "length")
            epochs = [submit.epoch for submit in group.engines[0].submits]
            assert epochs[0] == (1 if engine_first else 2) and epochs[-1] == 2
            assert len({submit.request_id for submit in group.engines[0].submits}) == len(epochs)

    run(scenario, ranks=1)


def test_lost_outputs_are_noticed_and_made_again():
    async def scenario(group):
        async with connected(group) as client:
            task = asyncio.create_task(collect(client, max_tokens=200))
            await until(lambda: client.running)
            group.engines[0].lose = 3
            assert await task == (expected(200), "length")
            assert len(group.submits) == 2 and "r" in group.aborted

    run(scenario, ranks=1)


def test_a_replayed_request_that_finds_a_full_queue_waits():
    async def scenario(group):
        async with connected(group) as client:
            task = asyncio.create_task(collect(client, max_tokens=200, rank=1))
            await until(lambda: client.running)
            group.engines[0].refuse = wire.Failure("overloaded", "full")
            group.change([0])
            await until(lambda: len(group.engines[0].submits) > 2)
            group.engines[0].refuse = None
            assert await task == (expected(200), "length")

    run(scenario)


def test_a_request_that_the_engine_still_runs_after_its_abort_is_aborted_again():
    async def scenario(group):
        async with connected(group) as client:
            task = asyncio.create_task(collect(client, max_tokens=100_000))
            await until(lambda: client.running)
            request = next(iter(group.engines[0].running.values()))
            task.cancel()
            await until(lambda: "r" in group.aborted)
            group.engines[0].running["r"] = request  # as if the abort had been of an older epoch
            await until(lambda: group.aborted.count("r") > 1 and not group.engines[0].running)

    run(scenario, ranks=1)


# --- waves and loads ----------------------------------------------------------------------------------------------


def test_a_submit_to_a_paused_group_tells_the_coordinator():
    async def scenario(group):
        async with connected(group) as client:
            await collect(client, "a")
            assert group.first_requests == []
            group.pause()
            await until(lambda: client.wave == (2, False))
            assert await collect(client, "b") == (expected(20), "length")
            submit = group.submits[-1]
            rank = next(rank for rank, engine in group.engines.items() if submit in engine.submits)
            assert group.first_requests == [wire.FirstRequest(epoch=1, rank=rank, wave=2)]
            assert client.wave == (2, True)

    run(scenario)


def test_published_loads_steer_requests():
    async def scenario(group):
        async with connected(group) as client:
            group.loads = {rank: Load(rank, 1, 10**6, 5 - 5 * rank, 0, 7, 100) for rank in (0, 1)}
            group.publish()
            await until(lambda: client.loads[0].waiting == 5)
            await asyncio.gather(*(collect(client, str(i), max_tokens=3) for i in range(5)))
            assert (len(group.engines[0].submits), len(group.engines[1].submits)) == (0, 5)

    run(scenario)


# --- liveness -----------------------------------------------------------------------------------------------------


def test_a_rank_that_does_not_answer_is_missing_and_gets_no_requests():
    async def scenario(group):
        async with connected(group, echo_timeout_s=0.3) as client:
            assert client.missing == ()
            group.engines[0].deaf = True
            await until(lambda: client.missing == (0,))
            assert client.ready
            await asyncio.sleep(0.1)  # a tick
            await asyncio.gather(*(collect(client, str(i)) for i in range(4)))
            assert len(group.engines[1].submits) == 4
            group.engines[0].deaf = False
            await until(lambda: client.missing == ())

    run(scenario)


def test_a_replaced_coordinator_is_found_again():
    async def scenario(group):
        async with connected(group) as client:
            task = asyncio.create_task(collect(client, max_tokens=300))
            group.replace_coordinator()
            group.add(2)
            group.change([0, 1, 2])
            await until(lambda: client.epoch == 2)
            assert await task == (expected(300), "length")

    run(scenario)


def test_a_coordinator_that_can_not_be_located_yet_is_asked_for_again():
    async def scenario(group):
        calls = 0

        async def locate():
            nonlocal calls
            calls += 1
            if calls < 3:
                raise ConnectionError("not yet")
            return group.addresses

        client = Client(locate, Limits(max_model_len=100), beat_s=0.05)
        await client.start()
        await until(lambda: client.ready)
        await client.close()
        await client.close()

    run(scenario)


def test_clients_come_and_go_while_others_are_served():
    async def scenario(group):
        async with connected(group) as staying:
            task = asyncio.create_task(collect(staying, max_tokens=400))
            for visit in range(3):
                async with connected(group) as guest:
                    assert await collect(guest, f"guest {visit}") == (expected(20), "length")
            assert await task == (expected(400), "length")

    run(scenario)


def test_closing_ends_waiting_calls_and_aborts_them():
    async def scenario(group):
        group.engines[0].held = True
        async with connected(group) as client:
            task = asyncio.create_task(collect(client))
            await until(lambda: group.submits)
        with pytest.raises(Unavailable, match="shutting down"):
            await task
        await until(lambda: "r" in group.aborted)

    run(scenario, ranks=1)


def test_frames_that_are_no_message_are_dropped():
    async def scenario(group):
        async with connected(group) as client:
            task = asyncio.create_task(collect(client, max_tokens=200))
            await until(lambda: client.running)
            with group._lock:
                identity = next(iter(group.engines[0].running.values())).client
                group.engines[0].socket.send_multipart([identity, b"\xc1 no msgpack"])
            assert await task == (expected(200), "length")

    run(scenario, ranks=1)
