"""What makes a model fast on CPUs: packed and compiled products, fused modules. Nothing here is used elsewhere."""

import torch


def supported(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this build of torch and this processor have packed products of ``dtype``."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
