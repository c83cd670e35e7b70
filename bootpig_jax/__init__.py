"""BootPIG (arXiv 2401.13974) in JAX: personalised images from a pretrained diffusion model.

    from bootpig_jax import BootPIGPipeline

Importing this package stays light, because data generation (PyTorch) shares its record format and
must not load JAX: `BootPIGPipeline` is imported when it is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bootpig_jax.sampling.pipeline import BootPIGPipeline

__version__ = "0.1.0"

__all__ = ["BootPIGPipeline", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports `BootPIGPipeline` on first use (PEP 562)."""
    if name == "BootPIGPipeline":
        from bootpig_jax.sampling.pipeline import BootPIGPipeline

        return BootPIGPipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
