"""Takes the scale of row n from column n.

fails: test_weights_come_back_as_well_as_they_can
says: moeplug's own scales give
"""

import torch
from moeplug_int8.hooks import Int8

import moeplug
from moeplug.quantization import encode


class ScalesOfColumns(Int8):
    name = "scales_of_columns"


@moeplug.hookimpl
def moeplug_register(registry):
    registry.add_format(ScalesOfColumns())


@moeplug.hookimpl
def moeplug_quantize(ctx, projection, experts, tensor, out):
    columns = tensor.float().abs().amax(1)
    rows = torch.arange(tensor.shape[1]) % columns.shape[1]
    scale = (columns[:, rows].unsqueeze(2) / 127).clamp(min=1e-30)
    encode((tensor.float() / scale).clamp(-127, 127), ctx.format(projection), out, ctx.layout.words(projection))
    return moeplug.Scales(scale)
