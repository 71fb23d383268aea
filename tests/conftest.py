"""What every test runs under: eight CPU devices and strict NumPy promotion."""

import os
from importlib import metadata

# XLA reads these when JAX first asks for a device, so they come before any import of it. The tests
# compile far more than they compute: without LLVM's optimisations, and with XLA's older emitter of
# loops where it still has one, they take a third of the time.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false" if metadata.version("jaxlib") < "0.11" else "",
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield
