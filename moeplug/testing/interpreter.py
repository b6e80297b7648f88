"""Run a plugin's schemes on the kernel that a GPU would get, under TRITON_INTERPRET=1, and print what is wrong as JSON.

    TRITON_INTERPRET=1 python -m moeplug.testing.interpreter PLUGIN
    {"unable": null, "schemes": {"mine": {"float16": null, "float32": "0.02 off the reference; …"}}, "formats": {…}}

null: as it should be. unable: why the interpreter runs no fused kernel here; schemes are left out then. The
interpreter is chosen when a kernel is decorated, so this is a process of its own.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import numpy as np
import torch

from moeplug import quantization
from moeplug.scheme import Scheme
from moeplug.testing.layers import (
    H100,
    Layer,
    Shape,
    WatchedRegistry,
    build,
    fitting_shape,
    problem_of,
    random_tokens,
)

# bfloat16 is left out: the interpreter multiplies with numpy, which has no such type.
DTYPES: Final = (torch.float16, torch.float32)


def round_conversions() -> None:
    """Have the interpreter round conversions to narrower floats to nearest even, as GPUs do; it would truncate them."""
    import triton.language as tl
    from triton.runtime import interpreter

    theirs = interpreter._convert_float
    types = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}

    def rounded(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source != tl.float32 or target not in types:
            return theirs(data, source, target, rounding)
        narrow = torch.from_numpy(np.ascontiguousarray(data).view(np.float32)).to(types[target])
        unsigned = {2: torch.uint16, 1: torch.uint8}[narrow.element_size()]
        return narrow.view(unsigned).numpy().reshape(data.shape)

    interpreter._convert_float = rounded


def problem_of_interpreter() -> str | None:
    """Return why the interpreter cannot run moeplug's fused kernel, whatever the scheme, or None.

    Triton 3.6 makes a loop's end of an array of one element by int(), which NumPy refuses from 2.4 on.
    """
    import triton

    from moeplug.testing._loaded_end import loop_kernel

    try:
        loop_kernel[(1,)](torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32))
    except Exception as error:
        return f"the interpreter of triton {triton.__version__} fails with NumPy {np.__version__}: {error}"
    return None


def problem_of_kernel(registry: WatchedRegistry, scheme: Scheme, dtype: torch.dtype) -> str | None:
    """Return how the kernel that a GPU would get differs from the reference, or None."""
    unit = fitting_shape(scheme).I // 2
    shape = Shape(2, 2, 2 * unit, unit)  # the interpreter takes a second for what a GPU does in microseconds
    layer = build(registry, scheme, shape, as_on_gpu=H100)
    hidden, topk_weights, topk_ids = random_tokens(shape, M=5, dtype=dtype)
    topk_ids[0, 0], topk_ids[1, 1] = -1, shape.E
    problem = problem_of(layer, layer.experts(hidden, topk_weights, topk_ids), hidden, topk_weights, topk_ids)
    return problem or problem_of_encode(layer)


def problem_of_encode(layer: Layer) -> str | None:
    """Return which weights a format's triton_encode stores otherwise than its encode, or None."""
    from moeplug.kernels import weights

    for (projection, expert), kept in layer.kept.items():
        ctx = layer.ctx_of(expert)
        spec, fmt, words = ctx.spec(projection), ctx.format(projection), ctx.layout.words(projection)
        if spec is None or not weights.serves(spec, fmt, kept.stored):
            continue
        expected, found = torch.zeros_like(kept.stored), torch.ones_like(kept.stored)
        scales = quantization.quantize(kept.given, spec, fmt, expected, words)
        assert scales.scale is not None
        weights.quantize(kept.given, spec, fmt, found, words, torch.empty_like(scales.scale))
        if not torch.equal(expected, found):
            return f"expert {expert}, {projection}: triton_encode stores other bytes than encode"
    return None


def problem_of_decode(registry: WatchedRegistry, name: str, dtype: torch.dtype) -> str | None:
    """Return which word of 16 bits the format's triton_decode decodes to other values than decode, or None."""
    from moeplug.testing._decode_words import decoded_and_expected

    fmt = registry.format(name)
    if fmt.triton_decode() is None:
        return "triton_decode is None"
    decoded, expected = decoded_and_expected(fmt, dtype)
    wrong = torch.nonzero((decoded != expected) & ~expected.isnan())  # a NaN is never stored
    if not len(wrong):
        return None
    place, word = wrong[0].tolist()
    return f"word {word:#06x}, place {place}: {decoded[place, word]:g}; decode says {expected[place, word]:g}"


def _caught(ask: Callable[[torch.dtype], str | None], dtype: torch.dtype) -> str | None:
    try:
        return ask(dtype)
    except Exception:
        return traceback.format_exc(limit=-4)


def main(plugin: str) -> None:
    """Print what is wrong with each scheme and each format of a plugin."""
    round_conversions()
    torch.set_num_threads(1)
    registry = WatchedRegistry.discover()
    installed = registry.activate(plugin, "the conformance kit")
    unable, schemes, formats = problem_of_interpreter(), {}, {}
    for name in installed.scheme_files() if unable is None else ():
        ask = partial(problem_of_kernel, registry, registry.scheme(name))
        schemes[name] = {str(dtype): _caught(ask, dtype) for dtype in DTYPES}
    for name in registry.manifests()[plugin].formats:
        ask = partial(problem_of_decode, registry, name)
        formats[name] = {str(dtype): _caught(ask, dtype) for dtype in registry.format(name).exact_in}
    print(json.dumps({"unable": unable, "schemes": schemes, "formats": formats}))


if __name__ == "__main__":
    main(sys.argv[1])
