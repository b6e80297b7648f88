"""int4 passes what every plugin has to pass."""

from moeplug.testing import SchemeConformance


class TestInt4(SchemeConformance):
    plugin = "int4"
    relative_rms = {  # noqa: RUF012  measured: 0.0972, 0.1079, 0.1177, 0.1003, 0.1010, 0.1177
        "int4-g32": 0.11,
        "int4-g64": 0.12,
        "int4-g128": 0.13,
        "int4-g128-asym": 0.11,
        "int4-g128-search": 0.11,
        "int4-fp8": 0.13,
    }
