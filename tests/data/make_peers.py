"""Write peers.safetensors: what bitsandbytes and torchao make of the same weights.

pip install bitsandbytes==0.50.2 torchao==0.18.0; PYTHONPATH=tests python tests/data/make_peers.py

They are no requirement of the tests: bitsandbytes is 43 MB, and torchao, where it is installed, is imported by
transformers and prints to standard error.
"""

from pathlib import Path

import torch
from bitsandbytes.functional import dequantize_4bit, get_4bit_type, quantize_4bit
from interop_cases import edge_weights
from safetensors.torch import save_file
from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx

HERE = Path(__file__).parent

weight = edge_weights((32, 128))
codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
scale, packed = to_mx(weight, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode.FLOOR)
tensors = {
    "weight": weight,
    "nf4_table": get_4bit_type("nf4", device="cpu"),
    "nf4_codes": codes.view(32, 64),  # two in a byte, the first in the high nibble
    "nf4_amax": state.absmax.view(32, 2),
    "nf4_decoded": dequantize_4bit(codes, state),
    "mxfp4_packed": packed,
    "mxfp4_scale": scale.view(torch.uint8),
}
save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, HERE / "peers.safetensors")
