"""Settings of all tests."""

import os

# Before jax starts its backend: parity needs full float32 products, and two test workers share two cores.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "float32")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: trains or compares with torch; left out on the newest Python")
