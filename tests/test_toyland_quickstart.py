"""The quickstart and the evaluation, with random weights and everything as small as it goes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bootpig_jax.checkpoints.diffusers import read_json, save_network, save_unet
from bootpig_jax.checkpoints.tokenizer import load_tokenizer
from bootpig_jax.errors import UserError
from bootpig_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from bootpig_jax.models.unet import UNet, UNetConfig
from bootpig_jax.models.vae import VAE, VAEConfig
from bootpig_jax.sampling.conditioning import Conditioning
from bootpig_jax.toyland import evaluate, quickstart, sd_config, world
from bootpig_jax.toyland.measures import make_cases
from tests.sampling_models import random_network

UNET = UNetConfig(
    block_out_channels=(8, 8),
    cross_attention_dim=8,
    attention_head_dim=1,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    use_linear_projection=True,
    sample_size=16,
)
VAE_SIZES = VAEConfig(
    block_out_channels=(4, 4, 4), layers_per_block=1, norm_num_groups=4, sample_size=64
)
TEXT_SIZES = TextEncoderConfig(
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    vocab_size=sd_config.text_encoder_sizes().vocab_size,
    max_position_embeddings=sd_config.TEXT_LENGTH,
)
DATA_GEN = """
output_dir: data
candidates: 16
candidates_per_shard: 16
captions: {source: toyland}
pictures: {model: sd, steps: 1, image_size: 64, batch_size: 16}
masks:
  grabcut: {working_size: 32, iterations: 1}
  filters: {min_area: 0, max_area: 1, border: 0, min_largest_component: 0}
"""
TRAIN = """
model: {base: sd}
data: {dir: data, image_size: 64, threads: 1}
output_dir: training
steps: 2
batch_size: 8
reference_timestep: 0
optimizer: {lr_reference: 1e-2, lr_rsa: 1e-2}
logging: {grid_every: 0}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion in `sd/`, a BootPIG in `bootpig/`, and the configurations."""
    folder = tmp_path_factory.mktemp("quickstart")
    sd, bootpig = folder / "sd", folder / "bootpig"
    sd_config.write_small_files(sd)
    unet = random_network(UNet, UNET, 0)
    save_unet(sd / "unet", unet)
    vae = random_network(VAE, VAE_SIZES, 1)
    save_network(sd / "vae", vae, "AutoencoderKL", "diffusion_pytorch_model")
    text_encoder = random_network(TextEncoder, TEXT_SIZES, 2)
    save_network(sd / "text_encoder", text_encoder, "CLIPTextModel", "model")
    save_unet(bootpig / "base_unet", unet)
    save_unet(bootpig / "ref_unet", random_network(UNet, UNET, 3))
    Conditioning(reference_timestep=0).write(bootpig)
    (folder / "data_gen.yaml").write_text(DATA_GEN)
    (folder / "train.yaml").write_text(TRAIN)
    return folder


@pytest.fixture(scope="module")
def arguments(folder: Path) -> list[str]:
    return [
        f"output_dir={folder / 'runs'}",
        f"model={folder / 'sd'}",
        f"shipped={folder / 'bootpig'}",
        f"data_gen={folder / 'data_gen.yaml'}",
        f"train={folder / 'train.yaml'}",
        *("cases=4", "subjects=1", "batch_size=4", "steps=2"),
    ]


@pytest.fixture(scope="module")
def finished(folder: Path, arguments: list[str]) -> Path:
    quickstart.main(arguments)
    return folder / "runs"


def test_the_quickstart_makes_data_trains_draws_and_scores(finished: Path) -> None:
    report = evaluate.Report.model_validate_json((finished / "drawing" / "report.json").read_text())
    assert [result.name for result in report.results] == [
        "text alone",
        "BootPIG before training",
        "BootPIG after 16 samples",
        "BootPIG as shipped",
    ]
    assert all(result.cases == 4 for result in report.results)
    picture = np.asarray(Image.open(finished / "drawing" / "picture.png"))
    assert picture.shape[1] > 5 * 256
    assert (
        json.loads((finished / "training" / "bootpig.json").read_text())["reference_timestep"] == 0
    )


def test_what_is_complete_is_not_made_again(
    finished: Path,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("made again")

    for name in ("run_training", "draw_and_score"):
        monkeypatch.setattr(quickstart, name, refuse)
    quickstart.main(arguments)
    table = capsys.readouterr().out
    assert "BootPIG after 16 samples" in table and "picture.png" in table


def test_a_failing_command_is_one_line(folder: Path, arguments: list[str]) -> None:
    with pytest.raises(UserError, match="data_gen.run failed with status 2"):
        quickstart.main([*arguments, f"data_gen={folder / 'missing.yaml'}"])


def test_missing_weights_are_reported_before_anything_is_made(
    folder: Path, arguments: list[str]
) -> None:
    with pytest.raises(UserError, match="nowhere is missing"):
        quickstart.main([*arguments, f"shipped={folder / 'nowhere'}", f"output_dir={folder / 'x'}"])
    assert not (folder / "x").exists()


class TestStages:
    def test_a_stopped_stage_goes_on_and_a_complete_one_stays(self, tmp_path: Path) -> None:
        made: list[str] = []
        stage = tmp_path / "runs" / "stage"

        def stop() -> None:
            stage.mkdir()
            made.append("half")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quickstart.run_stage(stage, "inputs", "title", stop)
        for _ in range(2):
            quickstart.run_stage(stage, "inputs", "title", lambda: made.append("rest"))
        assert made == ["half", "rest"]
        assert stage.is_dir()

    def test_changed_inputs_start_over(self, tmp_path: Path) -> None:
        stage = tmp_path / "stage"
        quickstart.run_stage(stage, "a", "title", stage.mkdir)
        (stage / "old").touch()
        quickstart.run_stage(stage, "b", "title", stage.mkdir)
        assert not (stage / "old").exists()

    def test_a_folder_that_is_not_ours_is_left_alone(self, tmp_path: Path) -> None:
        stage = tmp_path / "data"
        stage.mkdir()
        (stage / "thesis.tex").touch()
        with pytest.raises(UserError, match="not from a quickstart"):
            quickstart.run_stage(stage, "inputs", "title", lambda: None)
        quickstart.discard(stage)
        assert (stage / "thesis.tex").exists()


def test_evaluate_writes_a_report_and_a_sheet(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "new" / "report.json"
    evaluate.main(
        [
            *("--model", str(folder / "sd"), "--bootpig", str(folder / "bootpig")),
            *("--cases", "4", "--batch-size", "4", "--steps", "2", "--output", str(output)),
        ]
    )
    (result,) = evaluate.Report.model_validate_json(output.read_text()).results
    low, high = result.subject_interval
    assert 0 <= low <= result.subject_at_16 <= high <= 1
    assert output.with_suffix(".png").is_file()
    assert "subject@16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--steps", "0"], "num_inference_steps"),
        (["--guidance", "nan"], "guidance_scale"),
        (["--references", "0"], "references"),
        (["--cases", "0"], "at least 1"),
        (["--output", "report.txt"], "output"),
        (["--bootpig", "nowhere"], "base_unet is missing"),
    ],
)
def test_evaluate_refuses_wrong_arguments(wrong: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        evaluate.main(["--output", str(tmp_path / "report.json"), *wrong])


def test_intervals_cover_the_share_and_shrink_with_more_cases() -> None:
    few, many = (np.arange(n) % 4 == 0 for n in (40, 4000))
    low, high = evaluate.bootstrap_interval(few)
    assert 0.05 < low < 0.25 < high < 0.45
    narrow = evaluate.bootstrap_interval(many)
    # Four standard errors of a share, sqrt(p (1 - p) / n), wide.
    np.testing.assert_allclose(narrow[1] - narrow[0], 3.92 * np.sqrt(0.25 * 0.75 / 4000), rtol=0.05)


def test_the_picture_shows_every_subject_with_every_prompt() -> None:
    cases = quickstart.picture_cases(seed=3, subjects=2)
    assert len(cases) == 2 * len(quickstart.PROMPTS)
    assert {(case.position, case.scene) for case in cases} == set(quickstart.PROMPTS)
    subjects = [case.subject for case in cases]
    assert subjects == [c.subject for c in make_cases(3, 2) for _ in quickstart.PROMPTS]


def test_every_word_is_one_token_and_no_caption_is_cut(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "sd" / "tokenizer")
    end = sd_config.byte_pairs()[0]["<|endoftext|>"]

    def length(text: str) -> int:
        """Without the two ends; padding is the end token, too."""
        return int((tokenizer([text])[0] != end).sum()) - 1

    assert [word for word in world.VOCABULARY if length(word) != 1] == []
    captions = [
        world.caption(category, position, scene)
        for category in world.CATEGORIES
        for position in world.POSITIONS
        for scene in world.SCENES
    ]
    assert max(map(length, captions)) <= sd_config.TEXT_LENGTH - 2
    assert len({tuple(ids) for ids in tokenizer(captions)}) == len(captions)


def test_the_vae_is_written_with_all_that_diffusers_needs(folder: Path) -> None:
    config = read_json(folder / "sd" / "vae" / "config.json")
    assert config["down_block_types"] == ["DownEncoderBlock2D"] * 3
    assert config["up_block_types"] == ["UpDecoderBlock2D"] * 3
