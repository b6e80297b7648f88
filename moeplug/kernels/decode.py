"""Turn tiles of stored weights into what tensor cores multiply, in few register instructions per weight.

A format's `triton_decode()` returns one of these, or a function of its own with the same signature:

    decode(words, DTYPE) -> tuple of tiles

words is a tile of 16-bit words, uint16, each holding 16 / bits weights, lowest bits first; the tuple has one tile of
their values for each place in a word, in any type that converts exactly to DTYPE, the triton type that will be
multiplied. The core applies scales and zero points. (A word looks like a bfloat16 to the compiler: it is loaded from
shared memory in the very places of the 16-bit operand, four times faster than bytes.)

Conversion instructions run at a quarter of the rate of logic (CUDA programming guide, table of throughputs), so 16-bit
floats are put together from bits: 0x4300 | n is 128 + n as a bfloat16, for n below 128; one fma takes the 128 away.
Small floats are moved to where a 16-bit float has its exponent and mantissa, and one multiplication by a power of two
corrects the bias, subnormal numbers included. Under triton's interpreter, and for other DTYPEs, plain conversions are
used; tests hold both ways to the same numbers.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

TWO_PLACES: tl.constexpr = tl.constexpr("=r,=r,r")
FOUR_PLACES: tl.constexpr = tl.constexpr("=r,=r,=r,=r,r")


def _assembly(registers: str, constants: dict[str, int], places: list[str]) -> tl.constexpr:
    """Return PTX that first sets registers to constants, in both halves, then makes the values of each place of a word.

    In a place's text {word} stands for the register of two words, {out} for that of the place's two values.
    """
    lines = [f".reg .b32 {registers};"]
    lines += [f"mov.b32 {name}, {value | value << 16:#010x};" for name, value in constants.items()]
    lines += [text.format(word=f"${len(places)}", out=f"${place}") for place, text in enumerate(places)]
    return tl.constexpr("{\n" + "\n".join(lines) + "\n}")


def _each_place(bits: int, text: str) -> list[str]:
    """Return the text of each place, written for the lowest bits of {word}: register w has the others shifted down."""
    shifted = text.replace("{word}", "w")
    return [text] + [f"shr.u32 w, {{word}}, {shift};\n{shifted}" for shift in range(bits, 16, bits)]


def _high_bytes(text: str) -> list[str]:
    """Return the text of two places, written for the high byte of {word}: register w has the low byte there."""
    return ["shl.b32 w, {word}, 8;\n" + text.replace("{word}", "w"), text]


@triton.jit
def decode_identity(words, DTYPE: tl.constexpr):
    """Return 16-bit floats as they are; the core reads unquantized weights in their own type."""
    return (words,)


# Which of the two triton.jit made of the functions here; it decides when a function is decorated, not when it runs.
INTERPRETED: tl.constexpr = tl.constexpr(not isinstance(decode_identity, JITFunction))


INT8_BF16: tl.constexpr = _assembly(
    "w, a, b, one",
    {"one": 0x3F80},
    _each_place(
        8,
        """
        lop3.b32 a, {word}, 0x007F007F, 0x43004300, 0xEA;  // 128 + the low seven bits
        lop3.b32 b, {word}, 0x00800080, 0xC300C300, 0xEA;  // -128, or -256 where the sign is set
        fma.rn.bf16x2 {out}, a, one, b;
        """,
    ),
)
_INT8_FP16 = """
    lop3.b32 w, u, 0x00FF00FF, 0x64006400, 0xEA;  // 1024 + 128 + n
    add.rn.f16x2 {out}, w, bias;
    """
INT8_FP16: tl.constexpr = _assembly(
    "w, u, bias",
    {"bias": 0xE480},  # -1152
    ["xor.b32 u, {word}, 0x80808080;" + _INT8_FP16, "shr.u32 u, u, 8;" + _INT8_FP16],
)


@triton.jit
def decode_int8(words, DTYPE: tl.constexpr):
    """Return two signed bytes: 1.75 instructions a weight in bfloat16, 1.5 in float16."""
    if not INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
        values = tl.inline_asm_elementwise(
            INT8_BF16, TWO_PLACES, [words], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
        )
    elif not INTERPRETED and DTYPE == tl.float16:  # noqa: SIM300
        values = tl.inline_asm_elementwise(
            INT8_FP16, TWO_PLACES, [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        values = (
            (words & 255).to(tl.uint8).to(tl.int8, bitcast=True),
            (words >> 8).to(tl.uint8).to(tl.int8, bitcast=True),
        )
    return values


@triton.jit
def _nibble(words, SHIFT: tl.constexpr):
    """Return four bits of each word, uint16."""
    return (words >> SHIFT) & 15


@triton.jit
def _e2m1(code):
    """Return what codes of four bits mean, float32."""
    magnitude = (code & 7).to(tl.int32)
    exponent, mantissa = magnitude >> 1, magnitude & 1
    value = tl.where(exponent == 0, 2 * mantissa, (2 + mantissa) << exponent).to(tl.float32) * 0.25
    return tl.where(code >= 8, -value, value)


INT4_BF16: tl.constexpr = _assembly(
    "w, t, one, bias",
    {"one": 0x3F80, "bias": 0xC308},  # -136
    _each_place(
        4,
        """
        lop3.b32 t, {word}, 0x000F000F, 0x43004300, 0xEA;  // 128 + n
        fma.rn.bf16x2 {out}, t, one, bias;
        """,
    ),
)
INT4_FP16: tl.constexpr = _assembly(
    "w, t, bias",
    {"bias": 0xE408},  # -1032
    _each_place(
        4,
        """
        lop3.b32 t, {word}, 0x000F000F, 0x64006400, 0xEA;  // 1024 + n
        add.rn.f16x2 {out}, t, bias;
        """,
    ),
)


@triton.jit
def decode_int4(words, DTYPE: tl.constexpr):
    """Return four nibbles less 8, -8 to 7: 1.4 instructions a weight."""
    if not INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
        values = tl.inline_asm_elementwise(
            INT4_BF16,
            FOUR_PLACES,
            [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    elif not INTERPRETED and DTYPE == tl.float16:  # noqa: SIM300
        values = tl.inline_asm_elementwise(
            INT4_FP16,
            FOUR_PLACES,
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        values = (
            _nibble(words, 0).to(tl.int8) - 8,
            _nibble(words, 4).to(tl.int8) - 8,
            _nibble(words, 8).to(tl.int8) - 8,
            _nibble(words, 12).to(tl.int8) - 8,
        )
    return values


E2M1_BF16: tl.constexpr = _assembly(
    "w, t, bias, nought",
    {"bias": 0x7E80, "nought": 0x8000},  # 2**126, -0
    _each_place(
        4,
        """
        and.b32 t, {word}, 0x000F000F;
        mul.lo.u32 t, t, 0x1040;  // sign to bit 15, the rest to bits 8 to 6
        and.b32 t, t, 0x81C081C0;
        fma.rn.bf16x2 {out}, t, bias, nought;
        """,
    ),
)
E2M1_FP16: tl.constexpr = _assembly(
    "w, t, u, bias",
    {"bias": 0x7400},  # 2**14
    _each_place(
        4,
        """
        shl.b32 u, {word}, 9;
        and.b32 u, u, 0x0E000E00;
        shl.b32 t, {word}, 12;
        lop3.b32 t, t, 0x80008000, u, 0xEA;
        mul.rn.f16x2 {out}, t, bias;
        """,
    ),
)


@triton.jit
def decode_e2m1(words, DTYPE: tl.constexpr):
    """Return four e2m1 numbers: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives (OCP MX v1.0)."""
    if not INTERPRETED and DTYPE == tl.bfloat16:  # noqa: SIM300
        values = tl.inline_asm_elementwise(
            E2M1_BF16,
            FOUR_PLACES,
            [words],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    elif not INTERPRETED and DTYPE == tl.float16:  # noqa: SIM300
        values = tl.inline_asm_elementwise(
            E2M1_FP16,
            FOUR_PLACES,
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        values = (
            _e2m1(_nibble(words, 0)),
            _e2m1(_nibble(words, 4)),
            _e2m1(_nibble(words, 8)),
            _e2m1(_nibble(words, 12)),
        )
    return values


E4M3_BF16: tl.constexpr = _assembly(
    "w, t, u, bias, nought",
    {"bias": 0x7B80, "nought": 0x8000},  # 2**120, -0
    _high_bytes(
        """
        shr.u32 u, {word}, 4;
        and.b32 u, u, 0x07F007F0;
        lop3.b32 t, {word}, 0x80008000, u, 0xEA;
        fma.rn.bf16x2 {out}, t, bias, nought;
        """
    ),
)
E4M3_FP16: tl.constexpr = _assembly(
    "w, t, u, bias",
    {"bias": 0x5C00},  # 2**8
    _high_bytes(
        """
        shr.u32 u, {word}, 1;
        and.b32 u, u, 0x3F803F80;
        lop3.b32 t, {word}, 0x80008000, u, 0xEA;
        mul.rn.f16x2 {out}, t, bias;
        """
    ),
)


@triton.jit
def decode_e4m3(words, DTYPE: tl.constexpr):
    """Return two e4m3 numbers (fn: no infinities; its NaN is never stored): 2.25 instructions a weight."""
    if not INTERPRETED and (DTYPE == tl.bfloat16 or DTYPE == tl.float32):  # noqa: SIM300  before Ada there is no fp8
        values = tl.inline_asm_elementwise(
            E4M3_BF16, TWO_PLACES, [words], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
        )
    elif not INTERPRETED and DTYPE == tl.float16:  # noqa: SIM300
        values = tl.inline_asm_elementwise(
            E4M3_FP16, TWO_PLACES, [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        values = (
            (words & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True),
            (words >> 8).to(tl.uint8).to(tl.float8e4nv, bitcast=True),
        )
    return values


_E2M1_IN_PLACE = """
    and.b32 t, {word}, 0x000F000F;
    mul.lo.u32 t, t, 0x1040;  // sign to bit 15, the rest to bits 8 to 6
    and.b32 {out}, t, 0x81C081C0;
    """
_E2M1_LAST_IN_PLACE = """
    shr.u32 w, {word}, 6;
    and.b32 t, w, 0x01C001C0;
    lop3.b32 {out}, {word}, 0x80008000, t, 0xEA;  // the sign is there already
    """
E2M1_SMALL: tl.constexpr = _assembly("w, t", {}, [*_each_place(4, _E2M1_IN_PLACE)[:3], _E2M1_LAST_IN_PLACE])
E4M3_SMALL: tl.constexpr = _assembly(
    "w, u",
    {},
    _high_bytes(
        """
        shr.u32 u, {word}, 4;
        and.b32 u, u, 0x07F007F0;
        lop3.b32 {out}, {word}, 0x80008000, u, 0xEA;
        """
    ),
)


@triton.jit
def decode_e2m1_small(words, DTYPE: tl.constexpr):
    """Return four e2m1 numbers times 2**-126, bfloat16: their bits in place, exponents not corrected."""
    tl.static_assert(DTYPE == tl.bfloat16)  # noqa: SIM300
    return tl.inline_asm_elementwise(
        E2M1_SMALL,
        FOUR_PLACES,
        [words],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def decode_e4m3_small(words, DTYPE: tl.constexpr):
    """Return two e4m3 numbers times 2**-120, bfloat16: their bits in place, exponents not corrected."""
    tl.static_assert(DTYPE == tl.bfloat16)  # noqa: SIM300
    return tl.inline_asm_elementwise(
        E4M3_SMALL, TWO_PLACES, [words], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
    )


# Where a power of two multiplies every weight anyway (a microscaling scale), it can correct the exponents too.
SMALL = {decode_e2m1: (decode_e2m1_small, 126), decode_e4m3: (decode_e4m3_small, 120)}
