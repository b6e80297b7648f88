"""The numbers of bitsandbytes' nf4 and of torchao's mxfp4, as data/make_peers.py wrote them down."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from interop_cases import case, edge_weights
from safetensors.torch import load_file

from moeplug.quantization import Scales, dequantize, quantize

PEERS = load_file(Path(__file__).parent / "data" / "peers.safetensors")
WEIGHT = PEERS["weight"]


def quantized(name):
    spec, fmt = case(name)
    out = torch.empty(1, WEIGHT.shape[0], WEIGHT.shape[1] // fmt.values_per_element, dtype=fmt.storage_dtype)
    return out[0], quantize(WEIGHT[None], spec, fmt, out), fmt


def swapped(packed):
    return packed >> 4 | packed << 4


def test_the_weights_that_the_peers_were_given_are_those_of_the_other_tests():
    assert torch.equal(WEIGHT, edge_weights((32, 128)))


def test_nf4_codes_decode_to_the_table_of_bitsandbytes():
    fmt = case("nf4")[1]
    codes = torch.arange(16, dtype=torch.uint8)
    decoded = torch.empty(32)
    fmt.decode(codes[0::2].repeat(2) | codes[1::2].repeat(2) << 4, decoded)
    assert torch.equal(decoded[:16], PEERS["nf4_table"])


def test_nf4_bytes_of_bitsandbytes_decode_as_it_decodes_them():
    fmt = case("nf4")[1]
    decoded = dequantize(swapped(PEERS["nf4_codes"])[None], Scales(PEERS["nf4_amax"][None]), fmt)
    assert torch.equal(decoded[0], PEERS["nf4_decoded"])


def test_nf4_codes_and_scales_are_those_of_bitsandbytes():
    stored, scales, _ = quantized("nf4")
    # Ours are never zero (1 for a group of zeros) nor subnormal, so that 1 / scale is finite.
    least = torch.finfo(torch.float32).tiny
    amax = PEERS["nf4_amax"]
    assert torch.equal(scales.scale[0], torch.where(amax == 0, 1.0, amax.clamp(min=least)))
    same = (amax == 0) | (amax >= least)
    assert torch.equal(stored.view(-1, 2, 32)[same], swapped(PEERS["nf4_codes"]).view(-1, 2, 32)[same])
    assert int((~same).sum()) == 2  # the row of subnormal weights


def test_mxfp4_is_the_floor_conversion_of_torchao():
    stored, scales, _ = quantized("mxfp4")
    zeros = (WEIGHT == 0).view(-1, 4, 32).all(-1)
    assert torch.equal(scales.scale[0], torch.where(zeros, 127, PEERS["mxfp4_scale"]))  # ours is 1 for a group of zeros
    subnormal = WEIGHT.shape[0] - 2
    others = torch.arange(WEIGHT.shape[0]) != subnormal
    assert torch.equal(stored[others], PEERS["mxfp4_packed"][others])


def test_a_subnormal_weight_comes_out_nearer_than_torchao_brings_it():
    stored, scales, fmt = quantized("mxfp4")
    theirs = Scales(PEERS["mxfp4_scale"][None])
    ours, peers = (
        dequantize(q[None], s, fmt)[0, -2] - WEIGHT[-2] for q, s in ((stored, scales), (PEERS["mxfp4_packed"], theirs))
    )
    assert ours.abs().max() < peers.abs().max()  # 2**-127 is exactly code 2; torchao gives code 1, half of it


@pytest.mark.parametrize("name", ["nf4", "mxfp4"])
def test_the_error_is_small_where_weights_are_normal(name):
    stored, scales, fmt = quantized(name)
    error = dequantize(stored[None], scales, fmt)[0] - WEIGHT
    assert 0.05 < float(error[:20].norm() / WEIGHT[:20].norm()) < 0.15
