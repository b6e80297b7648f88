"""nvfp4 passes what every plugin has to pass."""

from moeplug.testing import SchemeConformance


class TestNvfp4(SchemeConformance):
    plugin = "nvfp4"
    relative_rms = {  # noqa: RUF012  measured: 0.0951
        "nvfp4": 0.1,
    }
