"""What every test needs: no network, a CPU with eight devices, and shapes checked at run time."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before anything imports jax or a Hugging Face library.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # Tests compile much and compute little: this halves the compilation.
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)
# Programs that take long to compile are kept between runs.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import pytest  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

import tests.shape_checks  # noqa: E402, F401 - the hook finds it by name

# Must stand before the first import of the package: it instruments modules as they load.
install_import_hook("bootpig_jax", "tests.shape_checks.checked")


pytest_plugins = ("tests.scorecard",)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps hashes out of the user's cache folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bootpig_jax.files.CACHE", tmp_path_factory.mktemp("user_cache"))
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Stable Diffusion with random weights, in diffusers' layout."""
    from tests.sampling_models import save_stable_diffusion

    return save_stable_diffusion(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def bootpig_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What training exports for `model_folder`, with other random weights."""
    from tests.sampling_models import save_bootpig

    return save_bootpig(tmp_path_factory.mktemp("bootpig"))
