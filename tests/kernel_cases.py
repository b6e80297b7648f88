"""Random experts, quantized into a kernel's layout and bound, beside the reference that they are held to.

Used by the kernel tests and by benchmarks/check_kernels.py; imports no pytest.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from moeplug.formats import NumberFormat, Unquantized
from moeplug.kernels.select import Device, Kernel, KernelRequest
from moeplug.moe.layout import PROJECTIONS, LayerSpec, Projection, buffer_name
from moeplug.moe.reference import ExpertWeights, experts_reference
from moeplug.quantization import Scales, dequantize, quantize
from moeplug.spec import WeightSpec

sys.path.append(str(Path(__file__).parents[1] / "plugins/moeplug-int8/src"))  # where the plugin is not installed

ID_PATTERNS = ("distinct", "hostile", "one_expert", "half_the_experts", "nobody")
CHANNEL: Final = WeightSpec(format="int8")
CPU: Final = Device("cpu")


def grouped(group_size: int, symmetric: bool = True, scale_dtype: str = "float32") -> WeightSpec:
    """Return a spec with a scale for every group_size weights along K."""
    return WeightSpec(
        format="int8", strategy="group", group_size=group_size, symmetric=symmetric, scale_dtype=scale_dtype
    )


@dataclass(frozen=True)
class Case:
    """One call of one kernel. gate_up and down None: unquantized, of weight_dtype."""

    name: str
    M: int = 4
    T: int = 2
    E: int = 3
    H: int = 40
    I: int = 24
    gate_up: WeightSpec | None = CHANNEL
    down: WeightSpec | None = CHANNEL
    dtype: str = "float16"
    weight_dtype: str = "bfloat16"
    activation: str = "silu"
    ids: str = "distinct"
    ids_dtype: str = "int64"
    out_dtype: str | None = None
    strided: bool = False


SCALE_DTYPES = ("float32", "bfloat16", "float16")
PLAIN: Any = {"gate_up": None, "down": None, "weight_dtype": "float16"}


def _int8_cases() -> list[Case]:
    specs: dict[str, WeightSpec] = {}
    for dtype in SCALE_DTYPES:
        specs[f"tensor-{dtype}"] = WeightSpec(format="int8", strategy="tensor", scale_dtype=dtype)
        for symmetric in (True, False):
            kind = f"{'symmetric' if symmetric else 'asymmetric'}-{dtype}"
            specs[f"channel-{kind}"] = WeightSpec(format="int8", symmetric=symmetric, scale_dtype=dtype)
            specs[f"group32-{kind}"] = grouped(32, symmetric, dtype)
    cases = [Case(f"int8-{name}", M=3, H=64, I=32, gate_up=spec, down=spec) for name, spec in specs.items()]
    for size, H, I in ((16, 48, 32), (20, 40, 60), (48, 96, 144), (64, 64, 128), (128, 128, 256), (40, 40, 40)):
        spec = grouped(size, symmetric=False)
        cases.append(Case(f"int8-group{size}-K-{H}-and-{I}", H=H, I=I, gate_up=spec, down=spec))
    return cases


def _shape_cases() -> list[Case]:
    cases = [
        Case("no-tokens", M=0),
        Case("one-token", M=1),
        Case("one-token-one-expert", M=1, T=1, E=1),
        Case("no-experts-per-token", T=0),
        Case("ragged-sizes", M=11, H=53, I=37),
        Case("odd-sizes-below-a-block", M=3, H=5, I=3),
        Case("K-of-several-blocks-and-a-tail", M=2, H=300, I=270),
        Case("several-blocks-and-column-tiles", M=9, H=72, I=100, dtype="float32"),
        Case("blocks-of-32", M=30, T=1, E=1, H=40, I=24),
        Case("blocks-of-64", M=60, T=1, E=1, H=40, I=24),
        Case("blocks-of-128-int8", M=140, T=1, E=1, H=40, I=72),
        Case(
            "blocks-of-128-unquantized", M=140, T=1, E=1, H=24, I=130, gate_up=None, down=None, weight_dtype="float16"
        ),
        Case("many-experts", M=4, T=4, E=1100, H=8, I=8),
        Case("more-choices-than-experts", M=6, T=7, E=3),
        Case("strided-inputs-and-output", M=9, strided=True),
        Case("strided-inputs-int32-ids", M=9, strided=True, ids_dtype="int32", ids="hostile"),
        Case("float32-output-of-float16", out_dtype="float32"),
    ]
    cases += [Case(f"ids-{ids}", M=9, ids=ids) for ids in ID_PATTERNS]
    cases.append(Case("ids-hostile-int32", M=9, ids="hostile", ids_dtype="int32"))
    cases += [Case(f"activation-{name}", activation=name) for name in ("silu", "gelu", "gelu_tanh", "relu")]
    return cases


def _dtype_cases() -> list[Case]:
    cases = []
    for dtype in ("float16", "float32", "bfloat16"):
        for weight_dtype in ("float16", "float32", "bfloat16"):
            name = f"hidden-{dtype}-weights-{weight_dtype}"
            cases.append(Case(name, gate_up=None, down=None, dtype=dtype, weight_dtype=weight_dtype))
        cases.append(Case(f"hidden-{dtype}-int8-channel", dtype=dtype))
        cases.append(
            Case(
                f"hidden-{dtype}-int8-group32-asymmetric",
                dtype=dtype,
                H=64,
                I=96,
                gate_up=grouped(32, False),
                down=grouped(32, False),
            )
        )
        cases.append(Case(f"hidden-{dtype}-unquantized-down", dtype=dtype, down=None))
        cases.append(Case(f"hidden-{dtype}-unquantized-gate-up", dtype=dtype, gate_up=None, weight_dtype="float32"))
    # float32 weights make the second product's blocks smaller than the first's: two tables in one call.
    cases.append(Case("two-sizes-of-block", M=40, E=2, gate_up=CHANNEL, down=None, weight_dtype="float32"))
    cases.append(Case("channel-and-group", H=40, I=64, down=grouped(32, False, "bfloat16")))
    return cases


CASES = {case.name: case for case in (*_int8_cases(), *_shape_cases(), *_dtype_cases())}


class StoredExperts(Sequence[ExpertWeights]):
    """The experts as a kernel's buffers hold them, dequantized to float32 one by one when asked for."""

    def __init__(self, kernel: Kernel, request: KernelRequest, E: int, seed: int = 0) -> None:
        """Fill w13 and w2 with quantized normal weights (std 1 / sqrt(K), so that outputs are near 1)."""
        self.kernel, self.request = kernel, request
        self.formats: dict[Projection, NumberFormat] = {
            p: request.down_format if p == "down" else request.gate_up_format for p in PROJECTIONS
        }
        device = str(request.device)
        H, I = request.layer.hidden_size, request.layer.intermediate_size
        self.weights = {
            "w13": torch.empty(E, 2 * I, H, dtype=request.gate_up_format.storage_dtype, device=device),
            "w2": torch.empty(E, H, I, dtype=request.down_format.storage_dtype, device=device),
        }
        self.parts: dict[Projection, list[Scales]] = {p: [] for p in PROJECTIONS}
        generator = torch.Generator(device).manual_seed(seed)
        for e in range(E):
            for p in PROJECTIONS:
                self.parts[p].append(self._fill(p, e, generator))
        self.scales = self._kernel_scales()

    def _fill(self, projection: Projection, e: int, generator: torch.Generator) -> Scales:
        N, K = self.request.layer.weight_shape(projection)
        weight = torch.randn(1, N, K, generator=generator, device=generator.device) / max(K, 1) ** 0.5
        out = self._stored(projection, e)
        spec = self.request.down if projection == "down" else self.request.gate_up
        if spec is None:
            self.formats[projection].encode(weight, out)
            return Scales()
        return quantize(weight, spec, self.formats[projection], out)

    def _stored(self, projection: Projection, e: int) -> Tensor:
        return self.kernel.layout.view(self.weights[buffer_name(projection)], projection)[e : e + 1]

    def _kernel_scales(self) -> dict[str, Tensor]:
        """Lay scales and zero points out as stage create_scales does: (E, rows, C) in the layout's row order."""
        result: dict[str, Tensor] = {}
        for p in PROJECTIONS:
            for kind in ("scale", "zero_point"):
                of_experts = [getattr(part, kind) for part in self.parts[p]]
                if of_experts and of_experts[0] is not None:
                    buffer = self.weights[buffer_name(p)]
                    name, C = f"{buffer_name(p)}_{kind}", of_experts[0].shape[2]
                    if name not in result:
                        result[name] = of_experts[0].new_empty(*buffer.shape[:2], C)
                    self.kernel.layout.view(result[name], p).copy_(torch.cat(of_experts))
        return result

    def __len__(self) -> int:
        return self.weights["w13"].shape[0]

    def __getitem__(self, e: int) -> ExpertWeights:
        return ExpertWeights(
            *(dequantize(self._stored(p, e), self.parts[p][e], self.formats[p])[0] for p in PROJECTIONS)
        )


def request_of(case: Case, device: Device = CPU) -> KernelRequest:
    """Return what the case asks of a kernel."""
    layer = LayerSpec(3, "model.layers.3.mlp", case.E, case.T, case.H, case.I, case.activation)
    formats = [_format(spec, case.weight_dtype) for spec in (case.gate_up, case.down)]
    return KernelRequest(layer, device, case.gate_up, case.down, formats[0], formats[1])


def _format(spec: WeightSpec | None, weight_dtype: str) -> NumberFormat:
    if spec is None:
        return Unquantized(getattr(torch, weight_dtype))
    from moeplug_int8.hooks import Int8

    return Int8()


def inputs_of(case: Case, device: str = "cpu", seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return (hidden (M, H), topk_weights (M, T), topk_ids (M, T)), all with odd strides if the case is strided."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(case.M, case.H, generator=generator).to(getattr(torch, case.dtype))
    topk_weights = torch.rand(case.M, case.T, generator=generator) + 0.1
    topk_ids = _ids(case, generator).to(getattr(torch, case.ids_dtype))
    hidden, topk_weights, topk_ids = hidden.to(device), topk_weights.to(device), topk_ids.to(device)
    if case.strided:
        hidden = torch.stack([hidden, hidden * 3], 2)[:, :, 0]
        topk_weights, topk_ids = topk_weights.T.contiguous().T, topk_ids.T.contiguous().T
    return hidden, topk_weights, topk_ids


def _ids(case: Case, generator: torch.Generator) -> Tensor:
    M, T, E = case.M, case.T, case.E
    distinct = torch.rand(M, max(E, T), generator=generator).argsort(1)[:, :T] % max(E, 1)
    if case.ids == "one_expert":
        return torch.full((M, T), E - 1)
    if case.ids == "half_the_experts":
        return distinct // 2 * 2
    if case.ids == "nobody":
        return torch.full((M, T), -1)
    if case.ids == "hostile":  # out of range on both sides, and the same expert twice
        distinct[0::3, 0] = -1
        distinct[1::3, -1] = E
        distinct[2::3] = distinct[2::3, :1]
        distinct[4::7, 0] = torch.iinfo(torch.int32).max
        distinct[5::7, -1] = torch.iinfo(torch.int32).min
    return distinct


def poisoned_out(case: Case, hidden: Tensor) -> Tensor:
    """Return an output full of NaN, strided if the case is."""
    dtype = getattr(torch, case.out_dtype or case.dtype)
    if case.strided:
        return torch.full((case.M, case.H, 2), torch.nan, dtype=dtype, device=hidden.device)[:, :, 1]
    return torch.full((case.M, case.H), torch.nan, dtype=dtype, device=hidden.device)


@dataclass(frozen=True)
class Result:
    """How a kernel's outputs differ from the reference's float32 ones. Errors are relative to the reference's."""

    max_error: float
    rms_error: float
    repeats: bool
    limit: float

    @property
    def ok(self) -> bool:
        """Return whether the numbers agree and repeat bit for bit; NaN does not."""
        return self.repeats and self.max_error <= self.limit


def run_case(case: Case, kernel: Kernel, device: Device = CPU, slack: float = 1.0) -> Result:
    """Run one case twice into poisoned outputs and compare it with the reference."""
    request = request_of(case, device)
    experts = StoredExperts(kernel, request, case.E)
    forward = kernel.bind(request, experts.weights, experts.scales)
    hidden, topk_weights, topk_ids = inputs_of(case, str(device))
    out = forward(hidden, topk_weights, topk_ids, out=poisoned_out(case, hidden))
    again = forward(hidden, topk_weights, topk_ids)
    expected = experts_reference(
        hidden, topk_weights, topk_ids, experts, activation=case.activation, out_dtype=torch.float32
    )
    repeats = again.dtype == hidden.dtype and torch.equal(out.to(hidden.dtype), again)
    return compare(out, expected, hidden.dtype, repeats, slack)


def compare(out: Tensor, expected: Tensor, hidden_dtype: torch.dtype, repeats: bool, slack: float = 1.0) -> Result:
    """Return the errors relative to the largest and to the rms of expected (M, H) float32, and their limit.

    The limit: half a unit of the last place for the final cast, as much again for intermediates that float32 rounding
    moved across a rounding boundary; 64 float32 units (sums of up to 8192 terms, in another order, and exp of 2 units)
    where nothing is rounded, 100 times below what TF32 or a 16-bit operand would cost.
    """
    unit = torch.finfo(hidden_dtype).eps
    limit = slack * (unit if hidden_dtype.itemsize < 4 else 64 * unit)
    if not expected.numel():
        return Result(0.0, 0.0, repeats, limit)
    error = (out.float() - expected).double()
    largest, rms = float(expected.abs().max()), float(expected.double().square().mean().sqrt())
    if largest == 0:
        return Result(float(error.abs().max()), 0.0, repeats, 0.0)
    return Result(float(error.abs().max()) / largest, float(error.square().mean().sqrt()) / rms, repeats, limit)
