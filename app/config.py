"""The one configuration of an Accordion application.

It is the ``args`` of a Serve config file, so changing a field restarts processes; only ``data_parallel_size`` belongs
in the deployment's ``user_config`` instead, where a change resizes the running group. Unknown keys and impossible
combinations are refused with the field, its value and the fix.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from actors.engine.config import EngineConfig
from actors.engine.quantization import blocks_of
from actors.settings import GroupSettings
from app.limits import Limits
from placement.request import Request

# GPUs of one machine that reach each other's memory.
MAX_PEERS = 8

Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


class HttpConfig(BaseModel):
    """Bounds a client of the HTTP API can't cross, and who may operate the group through it.

    The admin key itself is no setting: Serve stores the arguments of an application and shows them in its REST API, in
    ``serve status`` and in the dashboard. They name a file instead (a mounted secret), which front-ends read.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_body_bytes: Positive = Field(8 * 2**20, description="Largest request body; larger ones get 413.")
    max_queued_requests: Positive = Field(
        1024, description="Requests without a first token that one front-end holds; more get 429 with Retry-After."
    )
    max_sequences: Positive = Field(128, description="Most prompts times `n` of one request.")
    max_n: Positive = Field(16, description="Largest `n`.")
    max_stop_strings: Positive = Field(16, description="Most stop strings in one request.")
    max_stop_chars: Positive = Field(256, description="Longest stop string.")
    max_logprobs: Positive = Field(20, description="Most alternatives per token.")
    max_logit_bias: Positive = Field(1024, description="Most entries of `logit_bias`.")
    request_timeout_s: Seconds = Field(600.0, description="Deadline of a request; later it ends with 408.")
    start_timeout_s: Seconds = Field(60.0, description="Longest wait for a rank that can be reached; then 503.")
    admin_key_file: str | None = Field(
        None,
        description="File with the key that endpoints which change the group ask for, on the front-ends' nodes; unset: "
        "they are open.",
    )


class AppConfig(BaseModel):
    """Everything an operator sets. Field descriptions become the README's table."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field(description="Directory with a checkpoint in Hugging Face format; the same path on every node.")
    served_model_name: str | None = Field(None, description="Name in the API; the directory's name when unset.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Type of weights and KV cache.")
    device: Literal["cpu", "cuda"] = Field("cpu", description="What ranks compute on.")
    load_format: Literal["auto", "dummy"] = Field(
        "auto", description="`dummy`: random weights, for measurements; the model's directory needs none."
    )
    seed: int = Field(0, ge=0, description="What dummy weights are drawn by.")

    quantization: Literal["auto", "dequantize"] = Field(
        "auto",
        description="Of an FP8 checkpoint, `auto` keeps experts in FP8 where the device computes with them, "
        "`dequantize` has all weights in `dtype`.",
    )

    data_parallel_size: Positive = Field(
        1, description="DP ranks to start with. Set it in `user_config`, where changing it restarts nothing."
    )
    data_parallel_size_local: Positive | None = Field(
        None, description="Ranks on the head node (`strict`: on every node used); unset: as many as fit."
    )
    min_data_parallel_size: Positive = Field(1, description="Smallest size; decides the expert slots of a rank.")
    max_data_parallel_size: Positive | None = Field(None, description="Largest size; unset: what the cluster holds.")
    tensor_parallel_size: Positive = Field(1, description="Devices per rank; only 1 is supported.")
    pack_strategy: Literal["strict", "fill", "span"] = Field(
        "fill", description="How ranks are spread over nodes: exactly `data_parallel_size_local` each, or all that fit."
    )
    nodes: tuple[str, ...] | None = Field(
        None, description="Nodes that may be used, by node id, IP or `label=value`; unset: all."
    )
    placement_groups: dict[str, int] | None = Field(
        None, description="Placement groups made by the caller (id in hex to local rank), used instead of our own."
    )
    cpus_per_rank: Positive = Field(1, description="CPUs in a CPU rank's bundle, and its compute threads.")

    expert_slots: Positive | None = Field(
        None, description="Physical expert slots per MoE layer and rank; unset: experts / min_data_parallel_size."
    )
    block_size: Positive = Field(16, description="Tokens in a KV block.")
    kv_blocks: Positive | None = Field(None, description="KV blocks per rank; unset: from `memory_fraction`.")
    memory_fraction: float | None = Field(
        None,
        gt=0,
        le=1,
        description="The KV cache's share of the memory that weights, and on cuda the largest step, leave free; unset: "
        "0.9 on cuda, 0.2 on cpu.",
    )
    max_model_len: Positive | None = Field(None, description="Longest sequence in tokens; unset: the model's own.")
    max_num_seqs: Positive | None = Field(
        None, description="Most sequences in one step of a rank; unset: 64 on cpu, 256 on cuda."
    )
    max_num_batched_tokens: Positive | None = Field(
        None, description="Token budget of one step of a rank; unset: 512 on cpu, 8192 on cuda."
    )
    prefill_chunk: Positive | None = Field(
        None,
        description="Tokens of each prompt in one step while others decode. Fewer mean shorter gaps for them, and a "
        "later first token; unset: only the token budget counts.",
    )
    max_queue: Positive = Field(1024, description="Requests a rank lets wait; more get 429.")
    cuda_graphs: tuple[Positive, ...] | None = Field(
        None,
        description="Decodes for which a step is captured on cuda, with steps of up to 2,048 rows besides; unset: a "
        "ladder to `max_num_seqs`; `[]`: nothing is.",
    )

    placement_timeout_s: Seconds = Field(60.0, description="Longest wait for placement groups.")
    start_timeout_s: Seconds = Field(600.0, description="Longest wait for all ranks to be ready.")
    collective_timeout_s: Seconds = Field(60.0, description="Longest wait for a peer inside a step.")
    client_timeout_s: Seconds = Field(5.0, description="Silence after which a front-end's requests are aborted.")
    lease_s: Seconds = Field(20.0, description="How long ranks outlive a vanished manager.")
    max_restarts: int = Field(
        3, ge=0, description="Times a broken group is made anew within ten minutes, before it is given up."
    )
    switch_timeout_s: Seconds = Field(
        30.0, description="Longest wait for all ranks to change epochs, once all is ready; then it is rolled back."
    )
    drain_timeout_s: float = Field(
        30.0,
        ge=0,
        allow_inf_nan=False,
        description="Longest wait for the running requests of a leaving rank; then they go on elsewhere.",
    )
    rebalance_threshold: float | None = Field(
        None,
        ge=1,
        allow_inf_nan=False,
        description="Load of the busiest rank's experts over the mean that re-places experts; unset: only when asked.",
    )
    rebalance_interval_s: Seconds = Field(
        60.0, description="Window in which experts' load is measured, and how often it is looked at."
    )
    env_prefixes: tuple[str, ...] = Field(
        ("ACCORDION_", "NCCL_", "GLOO_", "TORCH_", "HF_"),
        description="Environment variables with these prefixes are copied to the ranks.",
    )
    http: HttpConfig = Field(default_factory=lambda: HttpConfig(), description="Bounds of the HTTP API.")

    @model_validator(mode="after")
    def _possible(self) -> AppConfig:
        check_size(self.data_parallel_size, self.min_data_parallel_size, self.max_data_parallel_size)
        if self.tensor_parallel_size != 1:
            raise ValueError(
                f"tensor_parallel_size={self.tensor_parallel_size} is not supported: set it to 1 and use "
                "data_parallel_size to spread the model's experts over more devices"
            )
        local = self.data_parallel_size_local
        if local is not None and local > self.data_parallel_size:
            raise ValueError(
                f"data_parallel_size_local={local} is more than data_parallel_size={self.data_parallel_size}: "
                "lower the first or raise the second"
            )
        if self.kv_blocks is not None and self.memory_fraction is not None:
            raise ValueError(
                f"kv_blocks={self.kv_blocks} and memory_fraction={self.memory_fraction} both size the KV cache: "
                "keep one"
            )
        if self.step_tokens < self.step_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.step_tokens} can't hold one token of each of "
                f"max_num_seqs={self.step_seqs}: raise the first or lower the second"
            )
        if self.kv_blocks is not None and self.max_model_len is not None:
            room = self.kv_blocks * self.block_size
            if room < self.max_model_len:
                raise ValueError(
                    f"kv_blocks={self.kv_blocks} of {self.block_size} tokens hold {room} tokens, less than "
                    f"max_model_len={self.max_model_len}: raise kv_blocks to "
                    f"{-(-self.max_model_len // self.block_size)} or lower max_model_len"
                )
        if self.device == "cuda" and self.cpus_per_rank != 1:
            raise ValueError(f"cpus_per_rank={self.cpus_per_rank} is for device=cpu only: leave it out on cuda")
        if self.seed and self.load_format != "dummy":
            raise ValueError(
                f"seed={self.seed} is for load_format=dummy only: leave it out, or set load_format to dummy"
            )
        if self.cuda_graphs is not None:
            if self.device != "cuda":
                raise ValueError(f"cuda_graphs={list(self.cuda_graphs)} is for device=cuda only: leave it out on cpu")
            if self.cuda_graphs and max(self.cuda_graphs) > self.step_seqs:
                raise ValueError(
                    f"cuda_graphs={list(self.cuda_graphs)} has a size above max_num_seqs={self.step_seqs}, which no "
                    "step can have: drop it or raise max_num_seqs"
                )
        self.placement_request()  # refuses what no placement can satisfy
        return self

    @model_validator(mode="after")
    def _checkpoint(self) -> AppConfig:
        directory = Path(self.model).expanduser().resolve()
        if not (directory / "config.json").is_file():
            raise ValueError(
                f"model={self.model!r}: {directory} has no config.json; name the directory of a checkpoint in Hugging "
                "Face format that stands at the same path on every node"
            )
        blocks_of(directory)  # refuses what no rank could load
        own = self._positions()
        if self.max_model_len is not None and self.max_model_len > own:
            raise ValueError(
                f"max_model_len={self.max_model_len} is more than the model's own {own} positions: lower it, or leave "
                "it out"
            )
        return self

    def _positions(self) -> int:
        directory = Path(self.model).expanduser().resolve()
        document = json.loads((directory / "config.json").read_text())
        said = document.get("text_config", document).get("max_position_embeddings")
        if said is None:
            # Seconds to import, on the cores of a node that serves: Serve builds the application for each deploy.
            from transformers import AutoConfig

            said = AutoConfig.from_pretrained(directory).get_text_config().max_position_embeddings
        return int(said)

    @property
    def context_length(self) -> int:
        """Longest sequence served, in tokens."""
        return self.max_model_len or self._positions()

    @property
    def step_seqs(self) -> int:
        """Most sequences in one step of a rank."""
        return self.max_num_seqs or (256 if self.device == "cuda" else 64)

    @property
    def step_tokens(self) -> int:
        """Most tokens in one step of a rank."""
        return self.max_num_batched_tokens or (8192 if self.device == "cuda" else 512)

    @property
    def model_name(self) -> str:
        return self.served_model_name or Path(self.model).resolve().name

    def engine_config(self) -> EngineConfig:
        fraction = self.memory_fraction or (0.9 if self.device == "cuda" else 0.2)
        return EngineConfig(
            model=str(Path(self.model).expanduser().resolve()),
            dtype=self.dtype,
            device=self.device,
            block_size=self.block_size,
            kv_blocks=self.kv_blocks,
            memory_fraction=fraction,
            max_model_len=self.context_length,
            max_num_seqs=self.step_seqs,
            max_num_batched_tokens=self.step_tokens,
            prefill_chunk=self.prefill_chunk,
            max_queue=self.max_queue,
            expert_slots=self.expert_slots,
            min_data_parallel_size=self.min_data_parallel_size,
            threads=self.cpus_per_rank if self.device == "cpu" else 1,
            collective_timeout_s=self.collective_timeout_s,
            client_timeout_s=self.client_timeout_s,
            load_format=self.load_format,
            seed=self.seed,
            quantization=self.quantization,
            cuda_graphs=self.cuda_graphs,
            max_ranks=min(self.max_data_parallel_size or MAX_PEERS, MAX_PEERS),
        )

    def placement_request(self, size: int | None = None) -> Request:
        return Request(
            data_parallel_size=size or self.data_parallel_size,
            data_parallel_size_local=self.data_parallel_size_local,
            world_size=self.tensor_parallel_size,
            device="GPU" if self.device == "cuda" else "CPU",
            devices_per_bundle=1 if self.device == "cuda" else self.cpus_per_rank,
            strategy=self.pack_strategy,
            nodes=self.nodes,
        )

    def group_settings(self) -> GroupSettings:
        return GroupSettings(
            engine=self.engine_config(),
            placement=self.placement_request(),
            min_size=self.min_data_parallel_size,
            max_size=self.max_data_parallel_size,
            placement_timeout_s=self.placement_timeout_s,
            start_timeout_s=self.start_timeout_s,
            lease_s=self.lease_s,
            max_restarts=self.max_restarts,
            env_prefixes=self.env_prefixes,
            placement_groups=self.placement_groups,
            switch_timeout_s=self.switch_timeout_s,
            drain_timeout_s=self.drain_timeout_s,
            rebalance_threshold=self.rebalance_threshold,
            rebalance_interval_s=self.rebalance_interval_s,
        )

    def limits(self) -> Limits:
        return Limits(max_model_len=self.context_length, **self.http.model_dump(exclude={"admin_key_file"}))


def check_size(size: int, smallest: int, largest: int | None) -> None:
    """Raises ValueError unless ``smallest <= size <= largest`` (None: no upper bound)."""
    if largest is not None and largest < smallest:
        raise ValueError(
            f"max_data_parallel_size={largest} is less than min_data_parallel_size={smallest}: swap or widen them"
        )
    if size < smallest or (largest is not None and size > largest):
        upper = "any" if largest is None else largest
        raise ValueError(
            f"data_parallel_size={size} is outside min_data_parallel_size={smallest} .. "
            f"max_data_parallel_size={upper}: choose a size inside, or widen the bounds"
        )


class UserConfig(BaseModel):
    """The deployment's ``user_config``: what changes without a restart."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data_parallel_size: Positive


def validated(args: dict[str, Any]) -> AppConfig:
    """``AppConfig`` of ``args``; every complaint in one ValueError, a line each."""
    try:
        return AppConfig.model_validate(args)
    except ValidationError as error:
        raise ValueError(f"the application's configuration can't be used:\n{complaints(error)}") from None


def complaints(error: ValidationError) -> str:
    """A line for each complaint: the field, its value, what to do."""
    lines = []
    for item in error.errors():
        field = ".".join(map(str, item["loc"]))
        if field.endswith("admin_key"):
            lines.append(
                f"  {field}: settings show in the dashboard; write the key to a file, named in http.admin_key_file"
            )
        elif item["type"] == "extra_forbidden":
            lines.append(f"  {field}={item['input']!r}: no such setting; README.md lists them all")
        elif field:
            lines.append(f"  {field}={item['input']!r}: {item['msg']}")
        else:
            lines.append(f"  {item['msg'].removeprefix('Value error, ')}")
    return "\n".join(lines)


def load(path: str | Path, application: str | None = None) -> AppConfig:
    """Reads the configuration out of a Serve config file, ``user_config`` applied over ``args``.

    ``application`` names one when the file has several. Raises ValueError that names the file and what is wrong.
    """
    document: Any = yaml.safe_load(Path(path).read_text())
    applications = document.get("applications") if isinstance(document, dict) else None
    if not applications:
        raise ValueError(f"{path}: no `applications`; expected a Serve config file such as configs/demo-cpu.yaml")
    chosen = [a for a in applications if application in (None, a.get("name"))]
    if len(chosen) != 1:
        names = ", ".join(str(a.get("name")) for a in applications)
        raise ValueError(f"{path}: has applications {names}; name exactly one of them (asked for {application!r})")
    args = dict(chosen[0].get("args") or {})
    for deployment in chosen[0].get("deployments") or ():
        args.update(deployment.get("user_config") or {})
    return validated(args)


def table() -> str:
    """The configuration as a Markdown table, for the README."""
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for prefix, model in (("", AppConfig), ("http.", HttpConfig)):
        schema = model.model_json_schema()
        for name, field in schema["properties"].items():
            if name == "http":
                continue
            default = f"`{json.dumps(field['default'])}`" if "default" in field else "required"
            rows.append(f"| `{prefix}{name}` | {_type_name(field)} | {default} | {field['description']} |")
    return "\n".join(rows)


def _type_name(field: dict[str, Any]) -> str:
    if "enum" in field:
        return " / ".join(f"`{choice}`" for choice in field["enum"])
    kinds = [kind for kind in field.get("anyOf", [field]) if kind["type"] != "null"]
    name = str(kinds[0]["type"])
    return f"list of {_type_name(kinds[0]['items'])}s" if name == "array" else name
