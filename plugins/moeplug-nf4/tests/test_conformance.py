"""nf4 passes what every plugin has to pass."""

from moeplug.testing import SchemeConformance


class TestNf4(SchemeConformance):
    plugin = "nf4"
    relative_rms = {  # noqa: RUF012
        "nf4": 0.001,
        "nf4-dq": 0.001,
    }
