"""The zygote: ``python -m actors.zygote FD PATH DEVICE MODEL``, with the listening socket and where it stands."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import runpy
import sys
from pathlib import Path

from actors.zygote.server import Server

MODULES = {
    "any": (
        # What Ray's worker imports, and what it runs.
        "ray._private.node",
        "ray._private.worker",
        "ray.actor",
        "actors.engine_actor",
        # What a rank imports when it loads a model.
        "torch.distributed",
        "transformers.masking_utils",
        "actors.engine.core",
        "actors.engine.mailbox",
        "actors.engine.runner",
    ),
    "cpu": ("actors.engine.attention.compiled", "actors.engine.cpu.decoder", "actors.engine.cpu.fuse"),
    "cuda": ("actors.engine.cuda.steps", "actors.engine.cuda.fuse", "actors.engine.cuda.peers"),
}

CUDA_OPENS = "/dev/nvidia-uvm"


def prepare(device: str, model: str) -> None:
    """Imports what a rank with this model needs. Raises RuntimeError where a fork would not do instead."""
    # Whether there is a GPU is asked while importing; asked of CUDA itself, it would be of no use in a fork.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    gc.disable()
    for module in (*MODULES["any"], *MODULES[device]):
        importlib.import_module(module)
    with contextlib.suppress(Exception):  # what is wrong with a model is for its ranks to say
        importlib.import_module("actors.engine.model").summarize(model)
    gc.freeze()  # else a search for garbage writes to the pages that the forks share
    os.close(os.pidfd_open(os.getpid()))
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if str(descriptor.readlink()) == CUDA_OPENS:
                raise RuntimeError(
                    f"importing the modules for {device} initialised CUDA, which does not survive a fork"
                )


def main(fd: str, path: str, device: str, model: str) -> None:
    server = Server(int(fd), Path(path))
    prepare(device, model)
    wanted = server.serve()
    if wanted is not None:  # in a fork
        gc.enable()
        reseed()
        sys.argv = wanted
        sys.path[0] = str(Path(wanted[0]).parent)
        runpy.run_path(wanted[0], run_name="__main__")


def reseed() -> None:
    """Else all forks draw the same numbers."""
    import numpy
    import torch

    torch.seed()
    numpy.random.seed()


if __name__ == "__main__":
    main(*sys.argv[1:])
