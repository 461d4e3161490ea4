"""The engines run on the CPU, also where there is a GPU."""

from tests.oracle.conftest import _on_cpu  # noqa: F401
