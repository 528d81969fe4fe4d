"""What makes a model fast on CPUs: packed and compiled products, fused modules. Nothing here is used elsewhere."""

import torch


def supported(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there are packed products of ``dtype``: ours of float32, oneDNN's of bfloat16 if it has them."""
    if device.type != "cpu":
        return False
    if dtype == torch.bfloat16:
        return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
