"""The list of commands of the reproduction, and the tables made of their results."""

import json
from pathlib import Path

import numpy as np
import pytest

from bootpig_jax.config import TrainConfig
from bootpig_jax.errors import UserError
from bootpig_jax.toyland import evaluate, reproduce
from bootpig_jax.toyland.evaluate import Report, Result, list_ways
from bootpig_jax.yaml_config import load_config


def result(subject: float, scene: float, references: int = 1, strategy: str = "softmax") -> Result:
    return Result(
        name="x",
        references=references,
        strategy=strategy,
        cases=4,
        subject_at_16=subject,
        subject_interval=(0, 1),
        subject_rank=2,
        scene_at_10=scene,
        scene_interval=(0, 1),
        seconds=1,
    )


def write(config: reproduce.ReproduceConfig, name: str, seed: int, *results: Result) -> None:
    settings = evaluate.sampling_settings(
        steps=2, image_guidance_scale=3, guidance_scale=3, seed=seed, batch_size=2
    )
    path = reproduce.report_path(config, name, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(Report(settings=settings, results=results).model_dump_json())


def test_every_training_is_a_valid_configuration_and_no_two_are_alike() -> None:
    jobs = reproduce.list_jobs(reproduce.ReproduceConfig())
    trainings = [job for job in jobs if job.arguments[0] == "bootpig_jax.train"]
    configs = [load_config(TrainConfig, job.arguments[2], job.arguments[3:]) for job in trainings]
    keys = {(c.trainable, c.data.augmentation, c.seed) for c in configs}
    assert len(keys) == len(configs) == 18
    for config, job in zip(configs, trainings, strict=True):
        assert job.result == config.output_dir / "bootpig.json"
        # Each reads the latents that were made with its own augmentation.
        assert config.data.cache is not None
        assert config.data.cache.name == f"cache_{config.data.augmentation}_{config.seed}"
    # Nothing but what Table 2 varies, the seed and the folders differs.
    rest = {
        c.model_copy(
            update={
                "trainable": None,
                "seed": 0,
                "output_dir": None,
                "data": c.data.model_copy(
                    update={"augmentation": "none", "cache": None, "cache_copies": 1}
                ),
            }
        ).__repr__()
        for c in configs
    }
    assert len(rest) == 1


def test_every_evaluation_parses_and_writes_where_the_tables_look() -> None:
    config = reproduce.ReproduceConfig(seeds=(7,))
    jobs = [j for j in reproduce.list_jobs(config) if j.arguments[0].endswith("evaluate")]
    for job in jobs:
        assert evaluate.parse_arguments(job.arguments[1:]).output == job.result
    names = [job.result.stem for job in jobs]
    assert names == [f"{row.name}_7" for row in reproduce.ROWS] + [
        "text_7",
        "before_7",
        "poolings_7",
    ]


def test_one_reference_is_drawn_once() -> None:
    assert list_ways([1, 3], ["average", "concat"]) == [
        (1, "average"),
        (3, "average"),
        (3, "concat"),
    ]
    with pytest.raises(UserError, match="references"):
        list_ways([0], ["softmax"])


def test_tables_hold_means_and_spreads_over_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = reproduce.ReproduceConfig(output_dir=tmp_path, seeds=(0, 1), references=(1, 2))
    for seed, subject in ((0, 0.5), (1, 0.7)):
        write(config, "rsa_all", seed, result(subject, 1.0))
    write(config, "poolings", 0, result(0.5, 1.0), *(result(0.6, 0.9, 2, s) for s in ("softmax",)))
    reproduce.write_results(config)
    text = (tmp_path / "results.md").read_text()
    assert (
        "| rsa / all, with augmentation | 60.0 ± 14.1 | 100.0 ± 0.0 | 2 | 67.4 | 79.7 | 31.1 |"
        in text
    )
    assert "| all / all, with augmentation | – | – | 0 | out of memory | – | – |" in text
    assert "| softmax | 50.0 | 60.0 |" in text
    assert "| argmax | 50.0 | – |" in text
    found = json.loads((tmp_path / "results.json").read_text())
    subjects = [r["subject_at_16"] for r in found["table_1_and_2"]["rsa_all"]]
    np.testing.assert_allclose(subjects, [0.5, 0.7])
    assert (tmp_path / "poolings.png").stat().st_size > 1000
    page = (tmp_path / "report.html").read_text()
    assert "60.0 ± 14.1" in page and page.count("<svg") == 2


def test_commands_with_a_result_are_not_run_again_and_a_failure_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = reproduce.ReproduceConfig(output_dir=tmp_path, data=tmp_path, seeds=(0,))
    ran: list[str] = []

    class Done:
        returncode = 0

    def pretend(command: list[str]) -> Done:
        ran.append(" ".join(command[2:]))
        jobs = {" ".join(job.arguments): job for job in reproduce.list_jobs(config)}
        if len(ran) == 4:
            Done.returncode = 2
            return Done()
        jobs[ran[-1]].result.parent.mkdir(parents=True, exist_ok=True)
        jobs[ran[-1]].result.touch()
        return Done()

    monkeypatch.setattr(reproduce.subprocess, "run", pretend)
    with pytest.raises(UserError, match="command 4 of"):
        reproduce.run(config)
    Done.returncode = 0
    monkeypatch.setattr(reproduce, "write_results", lambda config: None)
    reproduce.run(config)
    # The fourth again, and nothing else twice.
    assert ran[3] == ran[4]
    assert len(set(ran)) == len(ran) - 1 == len(reproduce.list_jobs(config))
