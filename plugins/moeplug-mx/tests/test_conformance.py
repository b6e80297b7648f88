"""mx passes what every plugin has to pass."""

from moeplug.testing import SchemeConformance


class TestMx(SchemeConformance):
    plugin = "mx"
    relative_rms = {  # noqa: RUF012
        "mxfp4": 0.001,
        "mxfp8": 0.001,
    }
