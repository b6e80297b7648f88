"""int8 passes what every plugin has to pass."""

from moeplug.testing import SchemeConformance


class TestInt8(SchemeConformance):
    plugin = "int8"
    relative_rms = {  # noqa: RUF012  measured: 0.0079, 0.0065, 0.0059, 0.0054, 0.0059
        "int8": 0.0085,
        "int8-w8a8": 0.0085,
        "int8-g128": 0.007,
        "int8-g64": 0.0065,
        "int8-g32": 0.006,
        "int8-g128-asym": 0.0065,
    }
