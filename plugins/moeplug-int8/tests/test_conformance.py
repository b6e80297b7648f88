"""int8 passes what every plugin has to pass."""

from moeplug.testing import SchemeConformance


class TestInt8(SchemeConformance):
    plugin = "int8"
