"""Prometheus metrics of one front-end: what it measures, and what it knows of the group when it is asked."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from app.client import REPLAY_REASONS, Client
from app.operations import PHASES, Operations, running

FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
INTER_TOKEN_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.5, 1.0, 5.0)
REQUEST_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0)


class Metrics:
    """All times in seconds. Inter-token latency is the time between two arrivals of one choice's tokens."""

    def __init__(self, client: Client, operations: Operations | None = None) -> None:
        self.registry = CollectorRegistry()
        self.prompt_tokens = Counter("accordion_prompt_tokens", "Prompt tokens accepted", registry=self.registry)
        self.requests = Counter(
            "accordion_requests", "Choices by how they ended", ["finish_reason"], registry=self.registry
        )
        self.errors = Counter("accordion_errors", "Errors by HTTP status", ["status"], registry=self.registry)
        self.first_token = Histogram(
            "accordion_time_to_first_token_seconds",
            "From the request's arrival to its first token",
            buckets=FIRST_TOKEN_S,
            registry=self.registry,
        )
        self.inter_token = Histogram(
            "accordion_inter_token_latency_seconds",
            "Between two arrivals of one choice's tokens",
            buckets=INTER_TOKEN_S,
            registry=self.registry,
        )
        self.request = Histogram(
            "accordion_request_seconds",
            "From the request's arrival to its last token",
            buckets=REQUEST_S,
            registry=self.registry,
        )
        self.registry.register(_Group(client))
        if operations is not None:
            self.registry.register(_Scaling(operations))

    def text(self) -> bytes:
        """The exposition format of ``GET /metrics``."""
        return generate_latest(self.registry)


class _Group(Collector):
    def __init__(self, client: Client) -> None:
        self._client = client

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        client = self._client
        wave, running = client.wave
        yield CounterMetricFamily("accordion_generated_tokens", "Tokens received", value=client.tokens_received)
        yield _gauge("accordion_requests_waiting", "Requests of this front-end without a token", client.waiting)
        yield _gauge("accordion_requests_running", "Requests of this front-end under way", client.running)
        yield _gauge("accordion_epoch", "Version of the group's membership", client.epoch)
        yield _gauge("accordion_wave", "Number of the group's wave", wave)
        yield _gauge("accordion_group_running", "1 while the group runs a wave, 0 while it is paused", running)
        yield _gauge("accordion_ranks", "Members of the group", len(client.loads))
        yield _gauge("accordion_ranks_leaving", "Members that are given nothing new", len(client.leaving))
        yield _gauge("accordion_ranks_missing", "Members that do not answer", len(client.missing))
        ranks = {
            name: GaugeMetricFamily(f"accordion_rank_{name}", text, labels=["rank"])
            for name, text in {
                "waiting": "Requests waiting at the rank",
                "running": "Requests the rank runs",
                "kv_used": "KV blocks in use",
                "kv_total": "KV blocks",
            }.items()
        }
        for load in client.loads:
            for name, family in ranks.items():
                family.add_metric([str(load.rank)], getattr(load, name))
        yield from ranks.values()
        replayed = CounterMetricFamily(
            "accordion_requests_replayed", "Attempts that were given up and continued elsewhere", labels=["reason"]
        )
        for reason in REPLAY_REASONS:
            replayed.add_metric([reason], client.replayed[reason])
        yield replayed


class _Scaling(Collector):
    """What the manager last said of its operations: the same on every front-end."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    def describe(self) -> Iterator[Metric]:
        return iter(())

    def collect(self) -> Iterator[Metric]:
        status = self._operations.latest
        if status is None:
            return
        last, totals = status["operation"], status["totals"]
        now = last["phase"] if running(status) else "idle"
        phase = GaugeMetricFamily("accordion_scaling_phase", "1 for the phase of the operation", labels=["phase"])
        for name in PHASES:
            phase.add_metric([name], name == now)
        yield phase
        results = CounterMetricFamily("accordion_operations", "Operations by how they ended", labels=["result"])
        for result, count in totals["operations"].items():
            results.add_metric([result], count)
        yield results
        yield CounterMetricFamily("accordion_experts_moved", "Experts put elsewhere", value=totals["experts_moved"])
        yield _gauge(
            "accordion_ranks_wanted", "Members that the group should have", status["wanted_data_parallel_size"]
        )
        longest = "Longest time a staying rank did not step because of an operation"
        yield _gauge("accordion_scaling_pause_max_seconds", longest, totals["pause_s_max"])
        if last is not None:
            yield _gauge("accordion_scaling_pause_seconds", f"{longest}: the last one", last["pause_s"])
            seconds = GaugeMetricFamily("accordion_scaling_seconds", "The last operation's time", labels=["phase"])
            for name, value in last["seconds"].items():
                seconds.add_metric([name], value)
            yield seconds
        if status["imbalance"] is not None:
            text = "Load of the busiest rank's experts over the mean"
            yield _gauge("accordion_expert_imbalance", text, status["imbalance"])


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value=value)
