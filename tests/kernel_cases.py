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

sys.path.insert(0, str(Path(__file__).parent))

from formats import FORMATS, SPECS, blocks
from formats import grouped as grouped_of

from moeplug.formats import NumberFormat, Unquantized
from moeplug.hookspecs import StageContext
from moeplug.kernels.select import Device, Kernel, KernelRequest
from moeplug.moe.layout import PROJECTIONS, LayerSpec, Projection, buffer_name
from moeplug.moe.reference import ExpertWeights, experts_reference
from moeplug.pipeline.create_scales import ScaleStore
from moeplug.quantization import Scales, dequantize, quantize
from moeplug.spec import ActivationSpec, WeightSpec

ID_PATTERNS = ("distinct", "hostile", "one_expert", "half_the_experts", "nobody")
CHANNEL: Final = WeightSpec(format="int8")
CPU: Final = Device("cpu")


def grouped(group_size: int, symmetric: bool = True, scale_dtype: str = "float32") -> WeightSpec:
    """Return an int8 spec with a scale for every group_size weights along K."""
    return grouped_of("int8", group_size, symmetric, scale_dtype)


@dataclass(frozen=True)
class Case:
    """One call of one kernel. gate_up and down None: unquantized, of weight_dtype.

    input_activations, intermediate: quantized activations. bias: float32 biases in both products.
    """

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
    input_activations: ActivationSpec | None = None
    intermediate: ActivationSpec | None = None
    bias: bool = False
    router_weight_on_input: bool = False
    activation_alpha: float = 1.702
    activation_limit: float | None = None
    activation_offset: float = 1.0
    gated: bool = True


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
    for size, H, I in ((32, 48, 80), (64, 104, 40), (48, 136, 200), (96, 160, 224)):
        spec = grouped(size, symmetric=False).model_copy(update={"pad": True})
        cases.append(Case(f"int8-padded-group{size}-K-{H}-and-{I}", H=H, I=I, gate_up=spec, down=spec))
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


def _format_cases() -> list[Case]:
    """Every format and scale of tests/formats.py; N is ragged everywhere, K where groups and nibbles allow it."""
    cases = []
    for name, spec in SPECS.items():
        least = 64 if FORMATS[spec.format].values_per_element == 2 else 32  # four nibbles a word: runs of 64
        G = max(spec.group_size or 32, least)
        for dtype in ("bfloat16", "float32"):
            cases.append(Case(f"{name}-{dtype}", M=5, H=3 * G, I=G, gate_up=spec, down=spec, dtype=dtype))
    for R, C, H, I in ((32, 48, 72, 100), (16, 16, 48, 40), (128, 128, 136, 264), (1, 32, 64, 32), (64, 300, 70, 30)):
        spec = blocks("fp8", R, C)
        cases.append(Case(f"fp8-block-{R}x{C}", M=5, H=H, I=I, gate_up=spec, down=spec, dtype="float32"))
    more = {
        "fp8-channel-ragged": (WeightSpec(format="fp8"), 53, 37),
        "int4-channel": (WeightSpec(format="int4"), 192, 64),
        "int4-channel-asym": (WeightSpec(format="int4", symmetric=False), 192, 64),
        "int4-tensor": (WeightSpec(format="int4", strategy="tensor"), 192, 64),
        "int4-g96": (grouped_of("int4", 96), 96, 192),
        "int4-g192": (grouped_of("int4", 192), 384, 192),
        "int4-g48-asym": (grouped_of("int4", 48, symmetric=False), 96, 192),
        "int4-g128-padded": (grouped_of("int4", 128).model_copy(update={"pad": True}), 192, 320),
        "int4-g128-padded-asym": (grouped_of("int4", 128, False).model_copy(update={"pad": True}), 192, 64),
        "int4-block": (blocks("int4", 24, 64), 192, 320),
        "int4-block-of-32-columns": (blocks("int4", 24, 32), 192, 64),
        "int8-g96": (grouped_of("int8", 96), 192, 96),
        "int8-g16": (grouped_of("int8", 16, symmetric=False), 64, 96),
        "int8-e8m0": (grouped_of("int8", 32, scale_dtype="float8_e8m0fnu"), 64, 96),
        "int8-e8m0-channel": (WeightSpec(format="int8", scale_dtype="float8_e8m0fnu"), 53, 37),
        "fp8-e4m3-scales": (grouped_of("fp8", 32, scale_dtype="float8_e4m3fn"), 64, 96),
    }
    cases += [Case(n, M=5, H=H, I=I, gate_up=s, down=s, dtype="float32") for n, (s, H, I) in more.items()]
    mixed: dict[str, Any] = {"M": 7, "H": 192, "I": 64, "ids": "hostile", "strided": True}
    cases.append(Case("nvfp4-then-int8", gate_up=SPECS["nvfp4"], down=CHANNEL, **mixed))
    cases.append(Case("block-then-mxfp4", gate_up=blocks("fp8", 48, 64), down=SPECS["mxfp4"], **mixed))
    return cases


TOKEN: Final = {name: ActivationSpec(format=name) for name in ("int8", "fp8", "mxfp8")}


def _activation_cases() -> list[Case]:
    """Quantized activations: of both products, of one, per token and per group, whatever the weights are."""
    groups, eights = (ActivationSpec(format=name, strategy="group", group_size=32) for name in ("fp8", "int8"))
    specs: dict[str, tuple[WeightSpec, ActivationSpec | None, ActivationSpec | None]] = {
        "int8-w8a8": (CHANNEL, TOKEN["int8"], TOKEN["int8"]),
        "int8-w8a8-input-only": (CHANNEL, TOKEN["int8"], None),
        "int8-w8a8-intermediate-only": (CHANNEL, None, TOKEN["int8"]),
        "int8-w8a8-asym": (WeightSpec(format="int8", symmetric=False), TOKEN["int8"], TOKEN["int8"]),
        "int8-g32-a8": (grouped(32), TOKEN["int8"], TOKEN["int8"]),
        "int8-tensor-a8": (WeightSpec(format="int8", strategy="tensor"), TOKEN["int8"], TOKEN["int8"]),
        "fp8-w8a8": (WeightSpec(format="fp8"), TOKEN["fp8"], TOKEN["fp8"]),
        "fp8-block-a8-g32": (blocks("fp8", 48, 32), groups, groups),
        "int8-w8a8-groups": (CHANNEL, eights, eights),
        "int4-a8-int8": (WeightSpec(format="int4"), TOKEN["int8"], TOKEN["int8"]),
        "int4-g64-a8-fp8": (SPECS["int4-g64"], TOKEN["fp8"], TOKEN["fp8"]),
        "int4-g64-asym-a8-int8": (SPECS["int4-g64-asym"], TOKEN["int8"], TOKEN["int8"]),
        "int4-g32-a8-int8": (grouped_of("int4", 32), TOKEN["int8"], TOKEN["int8"]),
        "int4-g32-a8-fp8": (grouped_of("int4", 32), TOKEN["fp8"], TOKEN["fp8"]),
        "mxfp4-a8-fp8": (SPECS["mxfp4"], TOKEN["fp8"], TOKEN["fp8"]),
        "mxfp8-a8": (SPECS["mxfp8"], TOKEN["mxfp8"], TOKEN["mxfp8"]),
        "nvfp4-a8-fp8": (SPECS["nvfp4"], TOKEN["fp8"], TOKEN["fp8"]),
        "nf4-a8-int8": (grouped_of("nf4", 32), TOKEN["int8"], TOKEN["int8"]),
    }  # fmt: skip
    cases = []
    for name, (spec, inputs, between) in specs.items():
        fields: dict[str, Any] = {"gate_up": spec, "down": spec, "input_activations": inputs, "intermediate": between}
        cases.append(Case(name, M=6, H=64, I=128, dtype="bfloat16", **fields))
    quantized: dict[str, Any] = {"input_activations": TOKEN["int8"], "intermediate": TOKEN["int8"]}
    cases.append(Case("int8-w8a8-float32", M=6, H=53, I=37, dtype="float32", **quantized))
    cases.append(Case("int8-w8a8-hostile-strided", M=9, H=53, I=37, ids="hostile", strided=True, **quantized))
    cases.append(Case("int8-w8a8-many-tokens", M=140, T=1, E=1, H=72, I=40, **quantized))
    return cases


def _epilogue_cases() -> list[Case]:
    """Activations, biases and where router weights go."""
    clamped: dict[str, Any] = {"activation": "swiglu_clamped", "activation_limit": 0.7}
    fields: dict[str, dict[str, Any]] = {
        "relu2": {"activation": "relu2"},
        "none": {"activation": "none"},
        "swiglu": {"activation": "swiglu_clamped"},
        "swiglu-clamped": clamped,
        "swiglu-clamped-parameters": {**clamped, "activation_alpha": 1.3, "activation_offset": 0.5},
        "bias": {"bias": True},
        "bias-unquantized": {"bias": True, "gate_up": None, "down": None, "weight_dtype": "float32"},
        "router-weight-on-input": {"router_weight_on_input": True},
        "everything": {"bias": True, "router_weight_on_input": True, **clamped},
        "no-gate": {"gated": False, "activation": "relu2"},
        "no-gate-bias": {"gated": False, "activation": "silu", "bias": True, "router_weight_on_input": True},
    }
    cases = [Case(f"epilogue-{n}", M=9, H=53, I=37, dtype="float32", ids="hostile", **f) for n, f in fields.items()]
    specs = {"int4-g64-asym": SPECS["int4-g64-asym"], "fp8-block": blocks("fp8", 48, 32), "nvfp4": SPECS["nvfp4"]}
    ungated: dict[str, Any] = {"M": 7, "H": 192, "I": 64, "dtype": "float32", "gated": False, "activation": "relu2"}
    for name, spec in specs.items():
        cases.append(Case(f"epilogue-no-gate-{name}", gate_up=spec, down=spec, **ungated))
    ungated |= {"input_activations": TOKEN["int8"], "intermediate": TOKEN["int8"]}
    return [*cases, Case("epilogue-no-gate-int8-w8a8", **ungated)]


FORMAT_CASES = {case.name: case for case in _format_cases()}
ACTIVATION_CASES = {case.name: case for case in _activation_cases()}
EPILOGUE_CASES = {case.name: case for case in _epilogue_cases()}
EIGHTS: Final[dict[str, Any]] = {"input_activations": TOKEN["int8"], "intermediate": TOKEN["int8"]}
FP8: Final[dict[str, Any]] = {"input_activations": TOKEN["fp8"], "intermediate": TOKEN["fp8"]}
FP8_GROUPS: Final = ActivationSpec(format="fp8", strategy="group", group_size=128)


def both(spec: WeightSpec | None, **fields: Any) -> dict[str, Any]:
    """Return the fields of a case whose two products share a spec."""
    return {"gate_up": spec, "down": spec} | fields


# One call of every kind that compiles to other kernels, sizes apart: H and I are multiples of 256 where none are named.
KINDS: Final[dict[str, dict[str, Any]]] = {
    "bf16": both(None),
    "float32": both(None, dtype="float32", weight_dtype="float32", activation="relu"),
    "float32-fp8": both(SPECS["fp8-channel"], dtype="float32"),
    "float16-int8": both(WeightSpec(format="int8"), dtype="float16", activation="gelu"),
    "int8": both(WeightSpec(format="int8"), bias=True, activation="swiglu_clamped"),
    "no-gate": both(WeightSpec(format="int8"), gated=False, activation="relu2"),
    "int8-bytes": both(WeightSpec(format="int8"), H=2000, I=760),
    "int8-g32-asym": both(grouped_of("int8", 32, symmetric=False)),
    "int8-g48-asym": both(grouped_of("int8", 48, symmetric=False), H=1920),
    "int8-w8a8": both(WeightSpec(format="int8"), **EIGHTS),
    "int4-g32-asym": both(SPECS["int4-g32-asym"]),
    "int4-g128": both(grouped_of("int4", 128, scale_dtype="bfloat16"), router_weight_on_input=True),
    "int4-g64-a8": both(SPECS["int4-g64"], **EIGHTS),
    "int4-g64-a8-fp8": both(SPECS["int4-g64"], **FP8),
    "mxfp4": both(SPECS["mxfp4"]),
    "mxfp8": both(SPECS["mxfp8"]),
    "nvfp4": both(SPECS["nvfp4"], activation="gelu_tanh"),
    "nf4": both(SPECS["nf4"]),
    "fp8-weights": both(SPECS["fp8-channel"]),
    "fp8-w8a8": both(SPECS["fp8-channel"], **FP8),
    "fp8-block": both(SPECS["fp8-block"], input_activations=FP8_GROUPS, intermediate=FP8_GROUPS),
}  # fmt: skip

ALL_CASES = CASES | FORMAT_CASES | ACTIVATION_CASES | EPILOGUE_CASES


class StoredExperts(Sequence[ExpertWeights]):
    """The experts as a kernel's buffers hold them, dequantized to float32 one by one when asked for."""

    def __init__(self, kernel: Kernel, request: KernelRequest, E: int, seed: int = 0, bias: bool = False) -> None:
        """Fill w13 and w2 with quantized normal weights (std 1 / sqrt(K), so that outputs are near 1)."""
        self.kernel, self.request, self.layout = kernel, request, kernel.layout_for(request)
        self.formats: dict[Projection, NumberFormat] = {
            p: request.down_format if p == "down" else request.gate_up_format for p in PROJECTIONS
        }
        device = str(request.device)
        H, I, rows = request.layer.hidden_size, request.layer.intermediate_size, request.layer.w13_rows
        first, second = request.gate_up_format, request.down_format
        self.weights = {
            "w13": torch.empty(E, rows, H // first.values_per_element, dtype=first.storage_dtype, device=device),
            "w2": torch.empty(E, H, I // second.values_per_element, dtype=second.storage_dtype, device=device),
        }
        self.parts: dict[Projection, list[Scales]] = {p: [] for p in PROJECTIONS}
        generator = torch.Generator(device).manual_seed(seed)
        for e in range(E):
            for p in request.layer.projections:
                self.parts[p].append(self._fill(p, e, generator))
        if bias:
            self.weights["w13_bias"] = torch.randn(E, rows, generator=generator, device=device)
            self.weights["w2_bias"] = torch.randn(E, H, generator=generator, device=device)
        self.scales = self._kernel_scales()

    def _fill(self, projection: Projection, e: int, generator: torch.Generator) -> Scales:
        N, K = self.request.layer.weight_shape(projection)
        weight = torch.randn(1, N, K, generator=generator, device=generator.device) / max(K, 1) ** 0.5
        out = self._stored(projection, e)
        spec = self.request.down if projection == "down" else self.request.gate_up
        if spec is None:
            self.formats[projection].encode(weight, out)
            return Scales()
        return quantize(weight, spec, self.formats[projection], out, self.layout.words(projection))

    def _stored(self, projection: Projection, e: int) -> Tensor:
        return self.layout.view(self.weights[buffer_name(projection)], projection)[e : e + 1]

    def _kernel_scales(self) -> dict[str, Tensor]:
        """Return scales as stage create_scales leaves them."""
        store = ScaleStore(StageContext(None, self.request, tuple(range(len(self))), self.kernel, {}))
        for p in self.request.layer.projections:
            for e, scales in enumerate(self.parts[p]):
                store.put(p, e, scales)
        return store.tensors

    def __len__(self) -> int:
        return self.weights["w13"].shape[0]

    def __getitem__(self, e: int) -> ExpertWeights:
        weights = [self._decoded(p, e) for p in PROJECTIONS]
        return ExpertWeights(*weights, *(self._bias(p, e) for p in PROJECTIONS))

    def _decoded(self, projection: Projection, e: int) -> Tensor | None:
        if projection not in self.request.layer.projections:
            return None
        stored, scales = self._stored(projection, e), self.parts[projection][e]
        return dequantize(stored, scales, self.formats[projection], None, self.layout.words(projection))[0]

    def _bias(self, projection: Projection, e: int) -> Tensor | None:
        bias = self.weights.get(f"{buffer_name(projection)}_bias")
        return None if bias is None else self.layout.view(bias, projection)[e]


def request_of(case: Case, device: Device = CPU) -> KernelRequest:
    """Return what the case asks of a kernel."""
    layer = LayerSpec(
        *(3, "model.layers.3.mlp", case.E, case.T, case.H, case.I, case.activation),
        activation_alpha=case.activation_alpha,
        activation_limit=case.activation_limit,
        activation_offset=case.activation_offset,
        router_weight_on_input=case.router_weight_on_input,
        gated=case.gated,
    )
    formats = [_format(spec, case.weight_dtype) for spec in (case.gate_up, case.down)]
    specs = (case.input_activations, case.intermediate)
    of_activations = [None if spec is None else FORMATS[spec.format] for spec in specs]
    return KernelRequest(layer, device, case.gate_up, case.down, *formats, *specs, *of_activations)


def _format(spec: WeightSpec | None, weight_dtype: str) -> NumberFormat:
    return Unquantized(getattr(torch, weight_dtype)) if spec is None else FORMATS[spec.format]


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
    experts = StoredExperts(kernel, request, case.E, bias=case.bias)
    forward = kernel.bind(request, experts.weights, experts.scales)
    hidden, topk_weights, topk_ids = inputs_of(case, str(device))
    out = forward(hidden, topk_weights, topk_ids, out=poisoned_out(case, hidden))
    again = forward(hidden, topk_weights, topk_ids)
    expected = experts_reference(hidden, topk_weights, topk_ids, experts, request=request, out_dtype=torch.float32)
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
