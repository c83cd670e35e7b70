"""The configuration is read strictly; every mistake is one line that names the file and the
field."""

import math
from pathlib import Path

import pytest

from bootpig_jax.config import TrainConfig
from bootpig_jax.errors import UserError
from bootpig_jax.yaml_config import dump_config, load_config
from tests.shipped_configs import assert_takes_effect

BASE = """\
model: {base: base}
data:
  dir: data
output_dir: runs/x
"""


@pytest.fixture
def write(tmp_path: Path):
    def write_config(text: str) -> Path:
        path = tmp_path / "x.yaml"
        path.write_text(text)
        return path

    return write_config


def refuse(path: Path | None, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(TrainConfig, path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_are_the_papers(write):
    config = load_config(TrainConfig, write(BASE))
    assert (config.batch_size, config.steps, config.data.image_size) == (64, 10_000, 512)
    assert (config.optimizer.lr_reference, config.optimizer.lr_rsa) == (5e-6, 1e-6)
    assert (config.reference_dropout, config.caption_dropout) == (0.15, 0.15)
    assert (config.reference_timestep, config.reference_key_scale) == ("same", 1.0)


def test_unknown_key_suggests_the_right_one(write):
    message = refuse(write(BASE + "batchsize: 4\n"))
    assert "x.yaml:5: unknown key batchsize: did you mean batch_size?" in message
    message = refuse(write(BASE + "optimizer:\n  lr_refrence: 1e-4\n"))
    assert (
        "x.yaml:6: unknown key optimizer.lr_refrence: did you mean optimizer.lr_reference"
        in message
    )
    # The right name in the wrong section.
    assert "did you mean optimizer.lr_rsa?" in refuse(write(BASE + "lr_rsa: 1e-4\n"))
    assert "command line: unknown key stepz" in refuse(write(BASE), "stepz=3")


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", "0.0001", ".0001", "+1e-4"])
def test_exponents_are_numbers(write, text):
    config = load_config(TrainConfig, write(BASE + f"optimizer: {{lr_rsa: {text}}}\n"))
    assert config.optimizer.lr_rsa == 1e-4
    config = load_config(TrainConfig, write(BASE), [f"optimizer.lr_rsa={text}", "steps=1e3"])
    assert config.optimizer.lr_rsa == 1e-4
    assert config.steps == 1000


@pytest.mark.parametrize(
    "text",
    ["-1e-4", ".nan", ".inf", "-.inf", "1e999", "nan", "abc", "true", "'1e-4'", "[1e-4]", "null"],
)
def test_bad_numbers_are_refused(write, text):
    message = refuse(write(BASE + f"optimizer:\n  lr_rsa: {text}\n"))
    assert "x.yaml:6: optimizer.lr_rsa: " in message


@pytest.mark.parametrize(
    "override",
    [
        "steps=0", "steps=1.5", "steps=true", "batch_size=-4", "reference_dropout=1.1",
        "reference_timestep=1", "reference_timestep=none", "precision=fp16", "trainable.base=attn",
        "data.image_size=65", "checkpoint.resume=no", "checkpoint.resume=false",
        "optimizer.betas=[0.9]", "optimizer.betas=[0.9,1.0]", "seed=-1", "mesh.data=0",
        "reference_key_scale=0", "model=3",
    ],
)  # fmt: skip
def test_wrong_values_are_refused(write, override):
    assert override.partition("=")[0].split(".")[0] in refuse(write(BASE), override)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainable.base=none", "trainable.reference=none"], "nothing would be trained"),
        (["mesh.data=-1", "mesh.fsdp=-1"], "only one of data and fsdp"),
        (["batch_size=10", "accumulation=4"], "batch_size 10 is not divisible by accumulation 4"),
        (["steps"], "write key=value"),
        (["--steps"], "needs a value"),
        (["=3"], "no override"),
        (["a b=3"], "no override"),
        (["steps.x=3"], "steps is a single value"),
        (["steps={a: 1"], "command line"),
        (["steps=!!python/object/apply:os.system ['true']"], "!!python/object/apply:os.system"),
    ],
)
def test_impossible_combinations_and_overrides(write, overrides, words):
    assert words in refuse(write(BASE + "steps: 4\n"), *overrides)


def test_repeated_key_names_both_lines(write):
    message = refuse(write("seed: 1\n" + BASE + "seed: 2\n"))
    assert "x.yaml:6: key 'seed' appears twice (first on line 1)" in message
    assert "'dir' appears twice" in refuse(write("data: {dir: a, dir: b}\n"))


def test_tags_run_nothing(write, tmp_path):
    canary = tmp_path / "canary"
    message = refuse(write(f"seed: !!python/object/apply:pathlib.Path.touch ['{canary}']\n"))
    assert "x.yaml:1: the tag !!python/object/apply:pathlib.Path.touch is not allowed" in message
    assert not canary.exists()


NOT_CONFIGURATIONS = {
    "list": "- 1\n",
    "open": "a: [1\n",
    "alias": "a: &x 1\nb: *x\n",
    "number": "1: 2\n",
    "tab": "\t",
    "colons": "a: b: c\n",
    "documents": "--- 1\n--- 2\n",
    "deep": "[" * 5000,
    "nul": "\x00",
}


@pytest.mark.parametrize("kind", NOT_CONFIGURATIONS)
def test_not_a_configuration(write, kind):
    assert "x.yaml" in refuse(write(NOT_CONFIGURATIONS[kind]))


def test_missing_files_and_fields(write, tmp_path):
    assert "absent.yaml: no such configuration file" in refuse(tmp_path / "absent.yaml")
    assert "cannot be read" in refuse(tmp_path)
    assert "output_dir is missing" in refuse(write("model: {base: b}\ndata: {dir: d}\n"))
    (tmp_path / "latin.yaml").write_bytes(b"seed: \xff\n")
    assert "not UTF-8" in refuse(tmp_path / "latin.yaml")


def test_overrides_in_all_spellings_the_last_one_wins(write):
    config = load_config(
        TrainConfig,
        write(BASE + "logging:\n"),
        [
            "steps=7",
            "--optimizer.lr_rsa",
            "2e-4",
            "--mesh.fsdp=2",
            "logging.grid_prompts=[a cat, b]",
        ]
        + ["seed=1", "seed=2"],
    )
    assert (config.steps, config.optimizer.lr_rsa, config.mesh.fsdp, config.seed) == (7, 2e-4, 2, 2)
    assert config.logging.grid_prompts == ("a cat", "b")


def test_dump_reads_back_equal(write):
    config = load_config(
        TrainConfig, write(BASE), ["optimizer.lr_rsa=3e-7", "reference_timestep=0"]
    )
    assert load_config(TrainConfig, write(dump_config(config))) == config
    assert math.isclose(config.optimizer.lr_rsa, 3e-7)


CONFIGS = Path(__file__).parents[1] / "configs"
TRAINING_CONFIGS = [
    path for path in sorted(CONFIGS.glob("*.yaml")) if not path.name.startswith("data_gen_")
]


@pytest.mark.parametrize("path", TRAINING_CONFIGS, ids=lambda path: path.stem)
def test_shipped_training_configurations_take_effect(path, tmp_path):
    assert_takes_effect(TrainConfig, path, tmp_path / "dumped.yaml")


def test_paper_and_release_differ_as_documented():
    paper = load_config(TrainConfig, CONFIGS / "paper.yaml")
    release = load_config(TrainConfig, CONFIGS / "release.yaml")
    assert paper.optimizer.lr_rsa == 1e-6 and release.optimizer.lr_rsa == 1e-7
    assert paper.batch_size == 64 and release.batch_size == 128
    assert paper.reference_key_scale == 1.0 and release.reference_key_scale == 1.1
    assert paper.reference_caption == "target" and release.reference_caption == "first_clause"
    assert paper.reference_dropout_unit == "sample" and release.reference_dropout_unit == "batch"
    assert paper.data.augmentation == "paper" and release.data.augmentation == "release"
