"""The page to draw with: `python -m bootpig_jax.app --model FOLDER --bootpig FOLDER`."""

from bootpig_jax.errors import run_cli

if __name__ == "__main__":
    from bootpig_jax.web.app import main

    run_cli(main)
