"""Paths with a scheme are refused wherever a path can be given, and files are written whole."""

import ast
import json
from pathlib import Path

import pydantic
import pytest

from bootpig_jax import evaluate, plot_run, sample
from bootpig_jax.checkpoints.diffusers import find_model
from bootpig_jax.config import TrainConfig
from bootpig_jax.errors import UserError
from bootpig_jax.files import local_path, write_whole
from bootpig_jax.sampling.jobs import read_jobs
from bootpig_jax.sampling.settings import SamplingSettings
from bootpig_jax.toyland.quickstart import QuickstartConfig
from bootpig_jax.toyland.reproduce import ReproduceConfig
from bootpig_jax.yaml_config import load_config, parse_command_line
from data_gen import run
from data_gen.config import DataGenConfig
from tests.mutants import ROOT

# What a configuration must say, and the fields that name files, folders or models.
TRAIN = ["model.base=a", "data.dir=a", "output_dir=a"]
DATA = ["pictures.model=a", "output_dir=a"]
FIELDS: list[tuple[type[pydantic.BaseModel], list[str], str]] = [
    (TrainConfig, TRAIN, "model.base data.dir data.cache validation.dir output_dir"),
    (DataGenConfig, DATA, "output_dir captions.file pictures.model pictures.folder"),
    (DataGenConfig, DATA, "pictures.refiner.model masks.sam3.model"),
    (DataGenConfig, DATA, "masks.grounded_sam.detector masks.grounded_sam.sam"),
    (QuickstartConfig, [], "output_dir model shipped data_gen train"),
    (ReproduceConfig, [], "output_dir model data data_gen train"),
]


@pytest.mark.parametrize(
    ("config", "given", "field"),
    [(config, given, field) for config, given, names in FIELDS for field in names.split()],
)
def test_a_field_with_a_scheme_is_one_line_that_names_mounting(config, given, field):
    load_config(config, None, [*given, f"{field}=fine/path"])
    for url in ("gs://bucket/run", "s3://bucket", "a+b.c-1://x"):
        with pytest.raises(UserError) as caught:
            load_config(config, None, [*given, f"{field}={url}"])
        message = str(caught.value)
        assert f"{field}: {url}: {url.split('//')[0]}// is no file system" in message
        assert "mount it" in message and "gcsfuse" in message and "\n" not in message


def paths_in(model: type[pydantic.BaseModel], prefix: str = "") -> set[str]:
    """The dotted names of the fields that are paths by their type."""
    names: set[str] = set()
    for name, field in model.model_fields.items():
        kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))
        if any(kind is Path or getattr(kind, "__origin__", None) is Path for kind in kinds):
            names.add(f"{prefix}{name}")
        for kind in kinds:
            if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
                names |= paths_in(kind, f"{prefix}{name}.")
    return names


def test_no_field_is_forgotten():
    for config in (TrainConfig, DataGenConfig, QuickstartConfig, ReproduceConfig):
        listed = {field for other, _, names in FIELDS if other is config for field in names.split()}
        assert paths_in(config) and paths_in(config) <= listed


def train_config(words: list[str]) -> TrainConfig:
    return parse_command_line(TrainConfig, words, prog="train", description="")


@pytest.mark.parametrize(
    ("parse", "arguments"),
    [
        (sample.parse_arguments, ["--output", "URL", "--prompt", "a"]),
        (sample.parse_arguments, ["--output", "a", "--model", "URL"]),
        (sample.parse_arguments, ["--output", "a", "--bootpig", "URL"]),
        (sample.parse_arguments, ["--output", "a", "--references", "a", "URL"]),
        (evaluate.parse_arguments, ["generate", "--dataset", "folder", "--output", "URL"]),
        (plot_run.main, ["URL"]),
        (run.parse_arguments, ["--config", "URL"]),
        (run.parse_arguments, [*DATA, "--images", "URL"]),
        (train_config, ["--config", "URL"]),
        (find_model, "URL"),
    ],
)
def test_an_option_with_a_scheme_is_one_line_that_names_mounting(parse, arguments):
    url = "gs://bucket/x"
    words = url if arguments == "URL" else [word.replace("URL", url) for word in arguments]
    with pytest.raises(UserError, match=r"gs://bucket/x: gs:// is no file system .* gcsfuse"):
        parse(words)


def test_a_job_with_a_scheme_is_one_line_that_names_mounting(tmp_path):
    line = {"id": "a", "prompt": "a", "references": ["gs://bucket/x"]}
    (tmp_path / "jobs.jsonl").write_text(json.dumps(line))
    with pytest.raises(UserError, match="jobs.jsonl:1: references.0: .* gs:// is no file system"):
        read_jobs(tmp_path / "jobs.jsonl", SamplingSettings())


def test_every_path_option_is_declared_so():
    """`type=Path` would take what has a scheme."""
    for folder in ("bootpig_jax", "data_gen", "benchmarks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.keyword) and node.arg == "type":
                    assert ast.unparse(node.value) not in ("Path", "pathlib.Path"), file


def test_other_paths_go():
    for name in ("a/b", "/a//b", "a:b", "gs:", "x:/y", "1://x", "://x"):
        assert local_path(name) == Path(name)


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("a")
    with pytest.raises(UserError, match="cannot be written"):
        write_whole(tmp_path / "file" / "below", "b")
    write_whole(tmp_path / "new" / "whole.json", json.dumps([1]))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["whole.json"]
