"""The model runner of one rank: weights, KV cache, and one forward step at a time."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from actors.engine import cpu
from actors.engine.batch import Batch
from actors.engine.config import EngineConfig
from actors.engine.experts.exchange import Exchange, PeerLost, SoloExchange
from actors.engine.experts.layer import Experts, ExpertsBroken
from actors.engine.experts.map import ExpertMap
from actors.engine.experts.mesh import MeshExchange
from actors.engine.experts.routing import Routing
from actors.engine.loader import Loader, Progress
from actors.engine.model import MoEModel
from actors.engine.quantization import blocks_of
from actors.engine.steps import EagerSteps, Steps
from actors.engine.weights import open_loader

if TYPE_CHECKING:
    from actors.engine.cpu.decoder import Decoder
    from actors.engine.cuda.peers import PeerWindows

logger = logging.getLogger(__name__)


class StepFailed(RuntimeError):
    """The model raised on this rank's batch. Peers were served and the lockstep holds; nothing was sampled.

    The cause is chained. The caller may run the requests one by one to find the one at fault.
    """


class ModelRunner:
    """Loads the model and runs steps. One thread uses it.

    ``exchange`` may belong to a smaller group (a rank that has not joined yet) as long as ``adopt`` comes before the
    first step. ``progress(done, total)`` is told the bytes of weights in their places. Raises ValueError on a
    configuration that cannot work (map, checkpoint, dtype, too few KV blocks).
    """

    def __init__(
        self, config: EngineConfig, routing: Routing, exchange: Exchange, progress: Progress | None = None
    ) -> None:
        torch.set_num_threads(config.threads)
        self.config = config
        self.device = torch.device(config.device)
        self.model = MoEModel(config.model, config.dtype)
        self.summary = self.model.summary
        if config.max_model_len > self.summary.max_positions:
            raise ValueError(
                f"max_model_len is {config.max_model_len}, but {config.model} has {self.summary.max_positions} "
                f"positions; lower max_model_len"
            )
        blocks = blocks_of(config.model) if config.quantization == "auto" else None
        if self.device.type == "cuda":
            from actors.engine.cuda import flash, memory

            heads = self.model.module.config.get_text_config().num_attention_heads
            flash_ready = flash.prepare(
                self.model.dtype, self.device, {(heads, shape) for shape in self.model.kv_shapes}
            )
            self._weights = memory.weights_of(self.model, routing.num_slots, config.max_num_batched_tokens, blocks)
            memory.check(self._weights, torch.cuda.mem_get_info()[0], config.min_data_parallel_size)
        self._other: Experts | None = None
        self._decoder: Decoder | None = None
        self.model.allocate_slots(
            routing.num_slots, self.device, config.max_num_batched_tokens, config.max_ranks, blocks
        )
        self.adopt(routing, exchange)
        self.loader: Loader = open_loader(self.model, self.device, config.load_format, config.seed)
        if progress is not None:
            self.loader.watch(progress, routing.own_slots)
        with torch.inference_mode():
            self.loader.load_dense()
            if self.device.type == "cuda":
                self._prepare_for_cuda()
            elif cpu.supported(self.model.dtype, self.device):
                self._prepare_for_cpu()
            self.loader.load_experts(routing.own_slots)
        self.loader.close()
        logger.info("read %.1f MiB of weights from %s", self.loader.bytes_read / 2**20, config.model)
        if self.device.type == "cuda":
            flash_ready.join()
        with torch.inference_mode(), self._alone():
            self.steps = self._make_steps()
        self.num_kv_blocks = self.steps.num_kv_blocks

    @property
    def asynchronous(self) -> bool:
        """Whether ``step`` launches work that goes on beside the caller."""
        return self.steps.asynchronous

    def adopt(self, routing: Routing, exchange: Exchange) -> None:
        """Run the next step in another epoch or with another map; experts must stand in their slots already."""
        experts = self.model.experts
        if not experts.suits(exchange):
            self.model.experts, self._other = self._other or self.model.host_experts(), experts
        self.model.experts.adopt(routing, exchange)

    def exchange(
        self, mesh: MeshExchange, store: dist.Store, epoch: int, abandoned: threading.Event | None = None
    ) -> Exchange:
        """The exchange of ``epoch``, whose members are connected by ``mesh`` and share ``store`` with nobody else.

        On GPUs that reach each other's memory it goes through that, else through the mesh. Blocks until all members
        are here, while steps go on. Raises PeerLost when one does not come.
        """
        if self.device.type != "cuda" or mesh.size > self.config.max_ranks:
            return mesh
        from actors.engine.cuda.peers import NoPeerAccess

        try:
            return self._windows.connect(mesh, store, epoch, self.config.collective_timeout_s, abandoned)
        except NoPeerAccess as error:
            logger.warning("epoch %d exchanges rows through host memory, and runs without graphs: %s", epoch, error)
            return mesh

    @functools.cached_property
    def _windows(self) -> PeerWindows:
        from actors.engine.cuda.peers import PeerWindows

        return PeerWindows(self.model.experts.window)

    def mark(self) -> Any:
        """What to ``wait`` for until everything launched so far is complete."""
        return self.steps.mark()

    def wait(self, mark: Any) -> None:
        """Wait for what ``mark`` gave. Raises PeerLost when a lost peer has made the step before it void."""
        self.steps.wait(mark)

    @property
    def independent(self) -> bool:
        """Whether no row of a step leaves its rank, on any rank: all have every expert that there is."""
        return all(self.model.experts.routing.local)

    @torch.inference_mode()
    def step(self, batch: Batch, tokens_per_rank: Sequence[int], drawn: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``[S, vocab]``, one row for each of ``batch.sampling_slices``, float32 or in the model's dtype.

        They stand until the next step. ``tokens_per_rank`` is the same list on every rank, by rank index; this rank's
        entry is ``batch.num_tokens``. ``drawn``, int64, on the device: the tokens that slices follow. Raises
        StepFailed; PeerLost, when the step is void (where steps are ``asynchronous``, ``wait`` does); ExpertsBroken,
        when this rank cannot go on.
        """
        self.model.experts.begin(tokens_per_rank)
        try:
            return self.steps.run(batch, drawn)
        except (PeerLost, ExpertsBroken):
            raise
        except Exception as error:
            self.model.experts.finish()
            raise StepFailed(f"the model raised {type(error).__name__}: {error}") from error

    def request_expert(self, layer: int, expert: int) -> Future[Any]:
        """One expert of a MoE layer, ready for ``put_expert``: see ``Loader``."""
        return self.loader.request_expert(layer, expert)

    @torch.inference_mode()
    def put_expert(self, layer: int, slot: int, made: Any) -> None:
        self.model.experts.layers[layer].put(slot, made)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Runs steps of the usual shapes with nobody else, so that the first real one takes no longer than others.

        Before the first request only: it scribbles into the KV cache.
        """
        with self._alone():
            self.steps.warm_up()
        self.model.experts.reset_counts()

    @torch.inference_mode()
    def dummy_step(self, tokens_per_rank: Sequence[int]) -> None:
        """Serve the peers' rows in a step in which this rank has no tokens. Raises PeerLost, ExpertsBroken."""
        self.model.experts.begin(tokens_per_rank)
        self.steps.idle()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Steps within are of this rank by itself."""
        routing, exchange = self.model.experts.routing, self.model.experts.exchange
        self.adopt(routing.alone(), SoloExchange())
        yield
        self.adopt(routing, exchange)

    def _make_steps(self) -> Steps:
        if self.device.type == "cuda":
            from actors.engine.cuda.steps import CudaSteps

            return CudaSteps(self.model, self.config, self._weights, self._narrowed)
        return EagerSteps(self.model, self.config, self._decoder)

    def _prepare_for_cpu(self) -> None:
        # Numba is needed, and takes its time to import, on CPUs only.
        from actors.engine.cpu.decoder import find
        from actors.engine.cpu.fuse import fuse
        from actors.engine.cpu.linear import join

        joined = join(self.model.linear_groups)
        if self.model.dtype == torch.float32:
            fuse(self.model, joined)
            self._decoder = find(self.model, joined)

    def _prepare_for_cuda(self) -> None:
        from actors.engine.cuda.fuse import fuse

        torch.backends.cuda.matmul.allow_tf32 = False
        self._narrowed = fuse(self.model, self.config.max_model_len)


def ready(index: int, expert_map: ExpertMap, config: EngineConfig, report: Callable[[str], None]) -> ModelRunner:
    """A runner with the weights that member ``index`` holds by ``expert_map``, warmed up; not in any group yet.

    ``report`` is told what is being done. Raises as ``ModelRunner`` does.
    """
    report(f"loading weights of {config.model}")

    def progress(done: int, total: int) -> None:
        report(f"loading weights of {config.model}: {done / 2**30:.1f} of {total / 2**30:.1f} GiB")

    runner = ModelRunner(config, Routing(expert_map, index), SoloExchange(), progress)
    report("warming up")
    runner.warm_up()
    return runner
