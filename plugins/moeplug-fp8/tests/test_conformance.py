"""fp8 passes what every plugin has to pass."""

from moeplug.testing import SchemeConformance


class TestFp8(SchemeConformance):
    plugin = "fp8"
    relative_rms = {  # noqa: RUF012  measured: 0.0264, 0.0265, 0.0265, 0.0264
        "fp8": 0.028,
        "fp8-tensor": 0.028,
        "fp8-block": 0.028,
        "fp8-w8a16": 0.028,
    }
