"""int4 passes what every plugin has to pass."""

from moeplug.testing import SchemeConformance


class TestInt4(SchemeConformance):
    plugin = "int4"
    relative_rms = {  # noqa: RUF012
        "int4-g32": 0.001,
        "int4-g64": 0.001,
        "int4-g128": 0.001,
        "int4-g128-asym": 0.001,
        "int4-g128-search": 0.001,
        "int4-fp8": 0.001,
    }
