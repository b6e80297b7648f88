"""nf4 passes what every plugin has to pass."""

from moeplug.testing import SchemeConformance


class TestNf4(SchemeConformance):
    plugin = "nf4"
    relative_rms = {  # noqa: RUF012  measured: 0.0921, 0.0924
        "nf4": 0.097,
        "nf4-dq": 0.098,
    }
