"""Which rows go to which experts, and back, as works of a ``threads.Program``: float32, all arguments addresses."""

from __future__ import annotations

import numpy as np
from numba import carray, cfunc, njit

from actors.engine.cpu.kernels import FLAGS, LOG2_E, LOWEST, ONE, ZERO, Work, as_shares, exp2
from actors.engine.cpu.threads import floats, integers, take


@njit(fastmath=FLAGS, error_model="numpy")
def _dot(x, y):  # type: ignore[no-untyped-def]
    total = ZERO
    for i in range(len(x)):
        total += x[i] * y[i]
    return total


@njit(error_model="numpy")
def _choose(scores, ids, weights):  # type: ignore[no-untyped-def]
    """The largest of ``scores [E]``, largest first, whatever they are; of their softmax, and without its sum."""
    for place in range(len(ids)):
        best = -1
        for expert in range(len(scores)):
            taken = False
            for before in range(place):
                taken = taken or ids[before] == expert
            if not taken and (best < 0 or scores[expert] > scores[best]):
                best = expert
        ids[place], weights[place] = best, scores[best]
    largest, total = weights[0], ZERO
    for expert in range(len(scores)):
        total += exp2(max((scores[expert] - largest) * LOG2_E, LOWEST))
    for place in range(len(ids)):
        weights[place] = exp2(max((weights[place] - largest) * LOG2_E, LOWEST))
    return total


@cfunc("void(CPointer(int64))", error_model="numpy", cache=True)
def _route(task):  # type: ignore[no-untyped-def]
    _, x_at, router_at, gate_at, ids_at, weights_at, rows, width, experts, top_k, normalize, shares = carray(task, 12)
    x, router = carray(floats(x_at), (rows, width)), carray(floats(router_at), (experts, width))
    ids, weights = carray(integers(ids_at), (rows, top_k)), carray(floats(weights_at), (rows, top_k + 1))
    gate = carray(floats(gate_at), width)
    scores = np.empty(experts, np.float32)
    while True:
        share = take(task)
        if share >= shares:
            return
        for row in range(rows * share // shares, rows * (share + 1) // shares):
            for expert in range(experts):
                scores[expert] = _dot(x[row], router[expert])
            total = _choose(scores, ids[row], weights[row])
            if normalize:
                total = ZERO
                for place in range(top_k):
                    total += weights[row, place]
            for place in range(top_k):
                weights[row, place] /= total
            weights[row, top_k] = ONE
            if gate_at != 0:
                power = min(max(-_dot(x[row], gate) * LOG2_E, LOWEST), -LOWEST)
                weights[row, top_k] = ONE / (ONE + exp2(power))


def route(
    x: int, router: int, gate: int, ids: int, weights: int,
    rows: int, width: int, experts: int, top_k: int, normalize: bool,
) -> Work:  # fmt: skip
    """The ``top_k`` largest of the softmax of ``router [experts, width] @ x``, by default not scaled to sum to one.

    ``ids [rows, top_k]`` int64; ``weights [rows, top_k + 1]``: theirs, then the sigmoid of ``gate [width] @ x``, which
    is 1 where ``gate`` is 0.
    """
    shares = as_shares(rows, experts * width)
    return _route, [x, router, gate, ids, weights, rows, width, experts, top_k, int(normalize), shares]


@cfunc("void(CPointer(int64))", error_model="numpy", cache=True)
def _group(task):  # type: ignore[no-untyped-def]
    _, x_at, ids_at, slots_at, gathered_at, places_at, groups_at, chosen_at = carray(task, 8)
    rows, width, experts, top_k, num_slots = carray(task, 13)[8:]
    if take(task) > 0:
        return
    x, gathered = carray(floats(x_at), (rows, width)), carray(floats(gathered_at), (rows * top_k, width))
    ids, places = carray(integers(ids_at), rows * top_k), carray(integers(places_at), rows * top_k)
    slots, chosen = carray(integers(slots_at), experts), carray(integers(chosen_at), experts)
    groups = carray(integers(groups_at), 1 + 3 * num_slots)
    borders = np.zeros(num_slots + 1, np.int64)
    for pair in range(len(ids)):
        chosen[ids[pair]] += 1
        borders[slots[ids[pair]] + 1] += 1
    count = 0
    for slot in range(num_slots):
        borders[slot + 1] += borders[slot]
        if borders[slot + 1] > borders[slot]:
            groups[1 + 3 * count], groups[2 + 3 * count], groups[3 + 3 * count] = borders[slot], borders[slot + 1], slot
            count += 1
    groups[0] = count
    for pair in range(len(ids)):
        slot = slots[ids[pair]]
        place = places[pair] = borders[slot]
        borders[slot] += 1
        for i in range(width):
            gathered[place, i] = x[pair // top_k, i]


def group(
    x: int, ids: int, slots: int, gathered: int, places: int, groups: int, chosen: int,
    rows: int, width: int, experts: int, top_k: int, num_slots: int,
) -> Work:  # fmt: skip
    """Copies each row to the places of its experts, rows of one slot together.

    ``slots [experts]``: where each expert stands. ``places [rows, top_k]``: where in ``gathered [rows * top_k, width]``
    the row is; ``groups``: as ``Panels.product`` takes them, at most ``num_slots``. ``chosen [experts]`` counts on. All
    are int64 but ``x`` and ``gathered``.
    """
    return _group, [x, ids, slots, gathered, places, groups, chosen, rows, width, experts, top_k, num_slots]


@cfunc("void(CPointer(int64))", fastmath=FLAGS - {"reassoc"}, error_model="numpy", cache=True)
def _combine(task):  # type: ignore[no-untyped-def]
    _, results_at, places_at, weights_at, shared_at, out_at, rows, width, top_k, shares = carray(task, 10)
    results = carray(floats(results_at), (rows * top_k, width))
    places, weights = carray(integers(places_at), (rows, top_k)), carray(floats(weights_at), (rows, top_k + 1))
    out, shared = carray(floats(out_at), (rows, width)), carray(floats(shared_at), (rows, width))
    while True:
        share = take(task)
        if share >= shares:
            return
        for row in range(rows * share // shares, rows * (share + 1) // shares):
            target = out[row]
            for i in range(width):
                target[i] = ZERO
            for place in range(top_k):
                source, weight = results[places[row, place]], weights[row, place]
                for i in range(width):
                    target[i] += weight * source[i]
            if shared_at != 0:
                weight = weights[row, top_k]
                for i in range(width):
                    target[i] += weight * shared[row, i]


def combine(results: int, places: int, weights: int, shared: int, out: int, rows: int, width: int, top_k: int) -> Work:
    """``out [rows, width]``: each row's weighted results, summed in the order of its experts, then ``shared``.

    ``shared`` may be 0: none.
    """
    return _combine, [results, places, weights, shared, out, rows, width, top_k, as_shares(rows, (top_k + 1) * width)]
