"""The page to vote on: `python -m bootpig_jax.study --a FOLDER --b FOLDER --database FILE`."""

from bootpig_jax.errors import run_cli

if __name__ == "__main__":
    from bootpig_jax.web.study import main

    run_cli(main)
