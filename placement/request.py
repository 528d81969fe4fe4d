"""What a caller asks the planner for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import count, groupby

import msgspec

STRATEGIES = ("strict", "fill", "span")
DEVICES = ("GPU", "CPU")


class Placed(msgspec.Struct, frozen=True):
    """A rank that runs already; ``node_id`` is the node of its first device."""

    rank: int
    local_rank: int
    node_id: str


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``data_parallel_size`` ranks, of which ``existing`` run already and stay where they are.

    ``data_parallel_size_local`` are the ranks of the head node, or of each node used (``strict``); None: all that fit.
    A rank has ``world_size`` device bundles of ``devices_per_bundle`` each (1 on GPU; CPU cores on CPU). ``nodes`` are
    those allowed, each by node id, IP or ``label=value`` (None: all). The strategies are the planner's.

    Raises:
        ValueError: a field, or a combination of them, is impossible.
    """

    data_parallel_size: int
    data_parallel_size_local: int | None = None
    world_size: int = 1
    device: str = "GPU"
    devices_per_bundle: int = 1
    strategy: str = "fill"
    nodes: tuple[str, ...] | None = None
    existing: tuple[Placed, ...] = ()

    def __post_init__(self) -> None:
        for name, smallest in (("data_parallel_size", 1), ("world_size", 1), ("devices_per_bundle", 1)):
            if getattr(self, name) < smallest:
                raise ValueError(f"{name}={getattr(self, name)}: ask for {smallest} or more")
        for name, choices in (("device", DEVICES), ("strategy", STRATEGIES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(choices)}")
        if self.device == "GPU" and self.devices_per_bundle != 1:
            raise ValueError(f"devices_per_bundle={self.devices_per_bundle} with device='GPU': a bundle is one GPU")
        local = self.data_parallel_size_local
        if local is not None and local < 0:
            raise ValueError(f"data_parallel_size_local={local}: give 0 or more, or leave it out")
        if self.strategy == "strict" and not local:
            raise ValueError(
                f"data_parallel_size_local={local} with strategy='strict': say how many ranks each node gets, or use "
                "strategy='fill'"
            )
        if self.strategy == "span" and local is not None and local > 1:
            raise ValueError(
                f"data_parallel_size_local={local} with strategy='span': a node holds one rank at most; set 1, 0 or "
                "leave it out"
            )
        if self.strategy == "span" and self.world_size == 1:
            raise ValueError("world_size=1 with strategy='span': one device can't span nodes; use strategy='fill'")
        if len({r.rank for r in self.existing}) < len(self.existing):
            raise ValueError(f"existing={self.existing}: two have the same rank")
        if len({(r.node_id, r.local_rank) for r in self.existing}) < len(self.existing):
            raise ValueError(f"existing={self.existing}: two have the same local rank on one node")

    def with_size(self, data_parallel_size: int, existing: Sequence[Placed] = ()) -> Request:
        """The same request for another size, beside other ``existing`` ranks."""
        return msgspec.structs.replace(self, data_parallel_size=data_parallel_size, existing=tuple(existing))

    def new_ranks(self) -> Iterator[int]:
        """The global ranks for new ranks: the lowest that no existing one has."""
        return unused(placed.rank for placed in self.existing)

    @property
    def bundles(self) -> tuple[dict[str, float], ...]:
        """The bundles of a rank: one for each device, then the control bundle. A rank with one device computes in the
        process that controls it, so both share one bundle."""
        device = {self.device: float(self.devices_per_bundle)}
        if self.world_size > 1:
            return (device,) * self.world_size + ({"CPU": 1.0},)
        return ({"CPU": 1.0} | device,)

    @property
    def demand(self) -> dict[str, float]:
        """The sum of a rank's bundles."""
        total: dict[str, float] = {}
        for bundle in self.bundles:
            for name, value in bundle.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def __str__(self) -> str:
        size, local = self.data_parallel_size, self.data_parallel_size_local
        text = f"{size} rank{'s' * (size > 1)} of {show_bundles(self.bundles)}, strategy {self.strategy}"
        if local is not None:
            text += f", {local} on {'each node used' if self.strategy == 'strict' else 'the head node'}"
        if self.nodes is not None:
            text += f", on nodes {', '.join(self.nodes) or '(none)'}"
        if self.existing:
            text += f"; {len(self.existing)} of them run already"
        return text


def unused(taken: Iterable[int]) -> Iterator[int]:
    """0, 1, 2, ... without the ``taken`` numbers."""
    without = frozenset(taken)
    return (number for number in count() if number not in without)


def show_bundles(bundles: Sequence[dict[str, float]]) -> str:
    """``8 x {GPU: 1} + {CPU: 1}``"""
    parts = []
    for bundle, same in groupby(bundles):
        number = len(list(same))
        text = "{" + ", ".join(f"{name}: {value:g}" for name, value in sorted(bundle.items(), reverse=True)) + "}"
        parts.append(text if number == 1 else f"{number} x {text}")
    return " + ".join(parts)
