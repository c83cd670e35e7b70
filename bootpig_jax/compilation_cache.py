"""Keeps compiled programs on disk: the same command then compiles once, not at every start."""

import os

import jax

from bootpig_jax.files import CACHE

FOLDER = CACHE / "xla"
MIN_SECONDS = 1.0  # programs that compile faster are not worth a file


def use_compilation_cache() -> None:
    """Turns JAX's persistent compilation cache on, unless the user has set one up.

    `JAX_COMPILATION_CACHE_DIR` names another folder; `JAX_ENABLE_COMPILATION_CACHE=false` turns
    the cache off. A folder that cannot be written to is no reason to stop: then nothing is kept.
    """
    if jax.config.jax_compilation_cache_dir is not None:  # type: ignore[attr-defined]
        return
    folder = FOLDER.expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_SECONDS)
