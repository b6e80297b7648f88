"""The plugin under test: its schemes, the layers that they make, and what numbers, plans and refusals are held to."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from typing import Any, ClassVar, Final

import pytest
import torch
from torch import Tensor

from moeplug.errors import PluginError, SchemeError
from moeplug.formats import NumberFormat
from moeplug.manifest import Manifest
from moeplug.moe.layout import PROJECTIONS
from moeplug.pipeline import plan_layer
from moeplug.quantization import check_spec
from moeplug.registry import Plugin
from moeplug.scheme import Scheme
from moeplug.testing.layers import (
    RAGGED_SHAPES,
    Layer,
    Shape,
    WatchedRegistry,
    activate,
    activations_of,
    build,
    error_of,
    error_of_the_core,
    fitting_shape,
    layer_spec,
    problem_of,
    projections_of,
    random_tokens,
    random_weights,
    same_bytes,
    scheme_for,
    specs_of,
)

NOT_VERIFIED: Final = "not verified here: "
CPU: Final = torch.device("cpu")


class PluginUnderTest:
    """What the tests of a plugin share. plugin: the installed plugin's name."""

    plugin: ClassVar[str]

    # --- what is installed -------------------------------------------------------------------------------------------

    @classmethod
    @functools.cache
    def _registry(cls) -> WatchedRegistry:
        registry = WatchedRegistry.discover()
        registry.begin()
        return registry

    @classmethod
    @functools.cache
    def _is_usable(cls) -> bool:
        """Return whether the plugin loads; where it does not, one test says why and there is nothing else to test."""
        try:
            cls._registry().activate(cls.plugin, "the conformance kit")
        except PluginError:
            return False
        return True

    @classmethod
    def _installed(cls) -> Plugin:
        return cls._registry().require(cls.plugin, "the conformance kit")

    @classmethod
    def _manifest(cls) -> Manifest:
        return cls._registry().manifests()[cls._installed().name]

    @classmethod
    def _scheme_names(cls) -> list[str]:
        return sorted(cls._installed().scheme_files()) if cls._is_usable() else []

    @classmethod
    @functools.cache
    def _scheme(cls, name: str) -> Scheme:
        return cls._registry().scheme(name)

    @classmethod
    def _format(cls, name: str) -> NumberFormat:
        return cls._registry().format(name)

    # --- layers ------------------------------------------------------------------------------------------------------

    @classmethod
    def _fitting(cls, scheme: str) -> Shape:
        return fitting_shape(cls._scheme(scheme))

    @classmethod
    def _build(cls, scheme: str, shape: Shape | None = None, **options: Any) -> Layer:
        cls._require_cpu(options.get("weights"))
        return build(cls._registry(), cls._scheme(scheme), shape or cls._fitting(scheme), **options)

    @classmethod
    @functools.cache
    def _layer(cls, scheme: str) -> Layer:
        """A layer of fitting sizes that tests share; none may change it."""
        return cls._build(scheme)

    @classmethod
    @functools.cache
    def _on(cls, gpu: torch.device, scheme: str) -> Layer:
        shape = cls._fitting(scheme)
        return cls._build(scheme, weights=tuple(weight.to(gpu) for weight in random_weights(shape)))

    @classmethod
    def _require_cpu(cls, weights: tuple[Tensor, Tensor] | None) -> None:
        """Skip where the plugin says that it serves no CPU, and nothing else is asked for."""
        needs = cls._manifest().needs
        if needs is not None and needs.cpu is None and (weights is None or weights[0].device.type == "cpu"):
            pytest.skip(NOT_VERIFIED + "the plugin claims no CPU")

    @classmethod
    @functools.cache
    def _layer_or_refusal(cls, scheme: str, shape: str) -> Layer:
        """Return a layer of a named shape; skip where the scheme refuses it, as it may where a group does not fit."""
        if shape == "fitting":
            return cls._layer(scheme)
        sizes = RAGGED_SHAPES[shape]
        cls._expect_plan_or_refusal(scheme, sizes)
        if not cls._fits(scheme, sizes):
            pytest.skip("refused, as it should be: a group or a byte would be cut")
        return cls._build(scheme, sizes)

    @classmethod
    def _fits(cls, scheme: str, shape: Shape) -> bool:
        """Return whether whole groups and whole bytes fill the rows of these sizes."""
        given, layer = cls._scheme(scheme), layer_spec(shape)
        groups = [spec.group_size for spec in activations_of(given) if spec.group_size]
        if any(size % group for size in (shape.H, shape.I) for group in groups):
            return False
        try:
            for spec in specs_of(given):
                for projection in PROJECTIONS:
                    check_spec(spec, cls._registry().format(spec.format), *layer.weight_shape(projection))
        except SchemeError:
            return False
        return True

    @classmethod
    def _expect_plan_or_refusal(cls, scheme: str, shape: Shape) -> None:
        """Plan sizes on a CPU: they are served where they fit, and refused with a SchemeError where they do not."""
        cls._require_cpu(None)
        given, registry = cls._scheme(scheme), cls._registry()
        activate(registry, given)
        if cls._fits(scheme, shape):
            plan_layer(layer_spec(shape), given, registry, CPU)
        else:
            with pytest.raises(SchemeError):
                plan_layer(layer_spec(shape), given, registry, CPU)

    # --- what is expected --------------------------------------------------------------------------------------------

    @classmethod
    def _base(cls, number_format: str) -> Scheme | None:
        """Return a scheme of the plugin that uses a format: its scale_dtype and its options then serve others."""
        schemes = [cls._scheme(name) for name in cls._scheme_names()]
        return next((s for s in schemes if s.weights and s.weights.format == number_format), None)

    @classmethod
    def _expect_capability(cls, capability: str, number_format: str) -> None:
        """Quantize and run a scheme that asks for a capability, with the first format of activations that serves."""
        cls._require_cpu(None)
        refusals = []
        for activation in cls._activation_formats() if capability.startswith("activation_") else [number_format]:
            asked = scheme_for(capability, cls._manifest(), number_format, cls._base(number_format), activation)
            shape = fitting_shape(asked)
            try:
                layer = build(cls._registry(), asked, shape)
            except SchemeError as error:
                refusals.append(str(error))
                continue
            cls._expect_weights(layer)
            cls._expect_reference(layer, *random_tokens(shape))
            return
        with_zero_points = any(cls._format(name).asymmetric_range for name in cls._manifest().formats)
        if capability == "zero_points" and with_zero_points and not cls._format(number_format).asymmetric_range:
            return  # refused by name: another format of the plugin has them
        pytest.fail(f"{capability} is claimed for {number_format}, but refused: {'; '.join(refusals)}")

    @classmethod
    def _activation_formats(cls) -> list[str]:
        """The formats that the plugin's schemes give activations, then its own, then all others."""
        used = [spec.format for name in cls._scheme_names() for spec in activations_of(cls._scheme(name))]
        installed = [name for manifest in cls._registry().manifests().values() for name in manifest.formats]
        wanted = [*used, *cls._manifest().formats, *installed]
        return [name for name in dict.fromkeys(wanted) if name in installed]

    @classmethod
    def _expect_reference(cls, layer: Layer, hidden: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> None:
        """Hold a layer's output to the reference on what is stored."""
        out = layer.experts(hidden, topk_weights, topk_ids)
        assert out.shape == hidden.shape
        assert out.dtype == hidden.dtype, f"hidden is {hidden.dtype}, the result {out.dtype}"
        problem = problem_of(layer, out, hidden, topk_weights, topk_ids)
        assert problem is None, problem

    @staticmethod
    def _expect_weights(layer: Layer) -> None:
        """Hold what is stored to moeplug's own scales with each value rounded to the nearest."""
        for projection, expert, spec, kept in projections_of(layer):
            ctx = layer.ctx_of(expert)
            where, error = f"expert {expert}, {projection}", error_of(kept, ctx, projection)
            if spec is None:
                assert error == 0, f"{where}: not quantized, but changed"
                continue
            # 1 %: ties, and scales that a plugin chose for more than their error.
            limit = 1.01 * error_of_the_core(kept.given[0], spec, ctx.format(projection)) + 1e-6
            assert error <= limit, f"{where}: relative rms error {error:.4g}, moeplug's own scales give {limit:.4g}"

    @staticmethod
    def _expect_same_buffers(a: Layer, b: Layer) -> None:
        for name, buffer in a.stored_bytes.items():
            assert same_bytes(buffer, b.stored_bytes[name]), f"{name} differs"

    @classmethod
    @functools.cache
    def _interpreted(cls) -> dict[str, Any]:
        """What a process with triton's interpreter found; it is chosen when a kernel is decorated."""
        environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-m", "moeplug.testing.interpreter", cls.plugin]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    @classmethod
    def _expect_interpreted(cls, kind: str, name: str) -> None:
        needs = cls._manifest().needs
        if needs is not None and needs.cuda is None:
            pytest.skip("the plugin claims no GPU")
        if sys.platform != "linux":
            pytest.skip(NOT_VERIFIED + "triton runs on Linux alone")
        found = cls._interpreted()
        if kind == "schemes" and found["unable"] is not None:
            pytest.skip(NOT_VERIFIED + found["unable"])
        for what, problem in found[kind][name].items():
            assert problem is None, f"{what}: {problem}"
