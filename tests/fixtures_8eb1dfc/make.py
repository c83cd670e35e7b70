"""Makes fixtures.tar.xz: what commit 8eb1dfc writes, and what it makes of it when it goes on.

    git worktree add --detach ../at-8eb1dfc 8eb1dfc
    cd ../at-8eb1dfc && PYTHONPATH=$PWD python THIS_FILE

Run in that commit's tree, whose tests' helpers it borrows; `tests/test_fixtures.py` reads the
result. All paths in it are relative to the folder that it is unpacked to, and everything in it is
tiny and seeded. It holds

    model/          a Stable Diffusion of 13 000 parameters
    data/           eight training triplets
    train.yaml      the configuration of `run`
    run/            a training run of two updates: a checkpoint, history, the exported BootPIG
    cache/          latents and text features of `data`
    inputs/         references, a room and its mask
    pictures/       drawn with `run`: with references, from the text alone, and in the room
    jobs.jsonl      two jobs, of which
    jobs/           holds three pictures of four, and half of another that was being written
    data_gen.yaml   the configuration of `triplets`
    photos/         the pictures that `triplets` is made from
    triplets/       captions of a language model, and two of four shards
    dataset/        four subjects in DreamBooth's layout
    methods/        two methods' pictures of them
    scores/         their scores
    votes.sqlite    a study of both: one rater is done, the other is not

and in expected/ what this commit made of it, going on:

    history.json    the loss of the run's next two updates
    cache.npz       the cache's records as they are read, and two batches of its loader
    jobs/           the fourth picture
    triplets/       all four shards, and what was rejected
    report.json     of `scores`
    votes.json      the study's export, and what the other rater sees next
"""

import contextlib
import dataclasses
import http.server
import json
import os
import shutil
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

# As `tests/conftest.py` has it, before anything imports jax.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    ]
)

import numpy as np
from PIL import Image

import bootpig_jax.train
from bootpig_jax import cache_latents, evaluate, sample
from bootpig_jax.checkpoints.diffusers import save_network, save_unet
from bootpig_jax.config import TrainConfig
from bootpig_jax.data.cache import CacheSource, make_cached_loader
from bootpig_jax.evaluation.datasets import open_dataset
from bootpig_jax.models.text_encoder import TextEncoder, TextEncoderConfig
from bootpig_jax.models.unet import UNet
from bootpig_jax.models.vae import VAE
from bootpig_jax.training.metrics import read_history
from bootpig_jax.web import study
from bootpig_jax.web.votes import Database, arrange
from bootpig_jax.yaml_config import load_config
from data_gen import run as data_gen
from tests import sampling_models as models
from tests.evaluation_folders import (
    CLASSES,
    save_clip,
    save_dino,
    write_dreambooth,
    write_pictures,
)
from tests.tokenizer_folder import write_tokenizer
from tests.training_helpers import save_tiny_data

TRAIN = """\
model: {base: model}
data: {dir: data, image_size: 16, threads: 2}
output_dir: run
steps: 2
batch_size: 8
ema_decay: 0.9
optimizer: {lr_reference: 1e-2, lr_rsa: 1e-2}
reference_caption: first_clause
reference_key_scale: 1.1
checkpoint: {every: 1, keep: 1}
logging: {every: 1, grid_every: 0}
"""
DATA_GEN = """\
output_dir: triplets
dataset: tiny
candidates: 12
candidates_per_shard: 3
captions:
  source: llm
  llm: {model: stand-in, base_url: URL, captions_per_call: 5, concurrency: 1}
pictures: {source: folder, folder: photos, image_size: 32, min_side: 16, batch_size: 2}
masks: {segmenter: keying, filters: {border: 0.0}}
"""
JOBS = [
    {"id": "dog", "references": ["inputs/a.png", "inputs/b.png"], "prompt": "a dog"},
    {
        "id": "snow",
        "references": ["inputs/b.png", "inputs/a.png"],
        "prompt": "the snow",
        "negative_prompt": "a dog",
        "seed": 5,
    },
]
HOW_JOBS = ["--num-images", "2", "--steps", "4", "--segmenter", "none", "--batch-size", "1"]


def main() -> None:
    """Makes everything in a temporary folder, then packs it."""
    archive = Path(__file__).resolve().parent / "fixtures.tar.xz"
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        Path("expected").mkdir()
        make_model()
        save_tiny_data(Path("data"), count=8)
        make_run()
        make_cache()
        make_pictures()
        make_jobs()
        make_triplets()
        make_scores()
        make_study()
        with tarfile.open(archive, "w:xz", preset=9) as tar:
            for path in sorted(Path().rglob("*")):
                tar.add(path, recursive=False, filter=anonymous)


def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Leaves out who packed the file and when."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry


def make_model() -> None:
    """Writes a Stable Diffusion with random weights."""
    tokenizer = write_tokenizer(Path("model/tokenizer"), pad="!", kind="vocab.json", max_length=16)
    text = TextEncoderConfig(
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=len(json.loads((tokenizer / "vocab.json").read_text())),
        max_position_embeddings=16,
    )
    unet = dataclasses.replace(
        models.UNET,
        block_out_channels=(4,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        cross_attention_dim=8,
        norm_num_groups=2,
    )
    vae = dataclasses.replace(models.VAE_CONFIG, block_out_channels=(4, 4), norm_num_groups=2)
    save_unet("model/unet", models.random_network(UNet, unet, 1))
    save_network(
        "model/vae",
        models.random_network(VAE, vae, 2),
        "AutoencoderKL",
        "diffusion_pytorch_model",
    )
    save_network(
        "model/text_encoder",
        models.random_network(TextEncoder, text, 3),
        "CLIPTextModel",
        "model",
    )
    Path("model/scheduler").mkdir()
    Path("model/scheduler/scheduler_config.json").write_text(json.dumps(models.SCHEDULER))


def make_run() -> None:
    """Makes two updates; then two more, elsewhere."""
    Path("train.yaml").write_text(TRAIN)
    bootpig_jax.train.main(["--config", "train.yaml"])
    shutil.rmtree("run/tensorboard")  # nothing reads it again
    shutil.copytree("run", "further")
    bootpig_jax.train.main(["--config", "train.yaml", "output_dir=further", "steps=4"])
    losses = {row["step"]: row["loss"] for row in read_history(Path("further"))}
    Path("expected/history.json").write_text(json.dumps(losses))
    shutil.rmtree("further")


def make_cache() -> None:
    """Fills a cache and reads it."""
    changes = ["data.cache=cache", "data.cache_copies=2"]
    cache_latents.main(["--config", "train.yaml", *changes])
    config = load_config(TrainConfig, "train.yaml", changes)
    contents = bootpig_jax.train.cache_contents(config)
    source = CacheSource(Path("cache"), contents)
    records = [source[index] for index in range(len(source))]
    arrays = {name: np.stack([record[name] for record in records]) for name in records[0]}
    loader = make_cached_loader(Path("cache"), contents, batch_size=4, seed=0)
    for number in range(2):
        arrays |= {f"batch{number}.{name}": array for name, array in next(loader).items()}
    np.savez_compressed("expected/cache.npz", **arrays)


def make_pictures() -> None:
    """Draws with references, from the text alone, and in a room."""
    Path("inputs").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b", "room"):
        pixels = np.full((20, 24, 3), 250, np.uint8)
        pixels[4:16, 6:18] = rng.integers(0, 200, 3)
        Image.fromarray(pixels).save(f"inputs/{name}.png")
    mask = np.zeros((20, 24), np.uint8)
    mask[5:14, 8:20] = 255
    Image.fromarray(mask).save("inputs/mask.png")
    bootpig = ["--bootpig", "run", "--references", "inputs/a.png", "inputs/b.png"]
    for name, arguments in {
        "references": [*bootpig, "--steps", "4", "--segmenter", "keying", "--seed", "7"],
        "text": ["--steps", "3", "--solver", "ddim", "--negative-prompt", "the snow"],
        "room": [
            *(*bootpig, "--image", "inputs/room.png", "--mask", "inputs/mask.png"),
            *("--steps", "4", "--strategy", "average", "--guidance", "3"),
        ],
    }.items():
        output = f"pictures/{name}"
        prompt = ["--prompt", "a dog in the snow"]
        sample.main(["--model", "model", *prompt, *arguments, "--output", output])
        Path(output, "contact_sheet.png").unlink()


def make_jobs() -> None:
    """Draws all pictures of two jobs, then takes the last one away."""
    Path("jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in JOBS))
    sample.main(
        ["--model", "model", "--bootpig", "run", "--jobs", "jobs.jsonl", "--output", "jobs"]
        + HOW_JOBS
    )
    Path("expected/jobs/snow").mkdir(parents=True)
    content = Path("jobs/snow/01.png").read_bytes()
    Path("jobs/snow/01.png").rename("expected/jobs/snow/01.png")
    Path("jobs/snow/.01.png.tmp").write_bytes(content[: len(content) // 2])


@contextlib.contextmanager
def language_model() -> Iterator[str]:
    """Serves captions in several of the forms that models give them in; yields its address."""
    colours = ["red", "green", "blue", "yellow", "white", "black", "grey", "brown"]
    things = ["teapot", "bicycle", "lantern", "guitar", "boot", "drum", "kite", "clock"]
    answers = iter(range(100))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            number = next(answers)
            self.rfile.read(int(self.headers["Content-Length"]))
            lines = [
                f"A photo of a {colours[(number + i) % 8]} {things[(3 * number + i) % 8]}, "
                f"standing in the {'kitchen garden forest harbour street'.split()[i]}"
                for i in range(5)
            ]
            text = (
                json.dumps({"captions": lines})
                if number % 2
                else "\n".join(f"{i}. Caption: {line}" for i, line in enumerate(lines, 1))
            )
            message = {"role": "assistant", "content": text}
            body = json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]})
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
        server.shutdown()


def make_triplets() -> None:
    """Asks for captions and makes every second shard; then the others, elsewhere."""
    Path("photos").mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        pixels = np.full((32 + number, 40, 3), 235, np.uint8)
        if number % 5 != 3:  # nothing to cut out: rejected
            y, x = rng.integers(6, 14, 2)
            pixels[y : y + 12, x : x + 10] = rng.integers(0, 160, 3)
        Image.fromarray(pixels).save(f"photos/{number:02d}.png")
    with language_model() as url:
        Path("data_gen.yaml").write_text(DATA_GEN.replace("URL", url))
        made = data_gen.parse_arguments(["--config", "data_gen.yaml", "--only", "captions"])
        assert data_gen.run(made) == 0
    # Nobody answers there any more: what goes on has all its captions.
    Path("data_gen.yaml").write_text(DATA_GEN.replace("URL", "http://127.0.0.1:9/v1"))
    part = data_gen.parse_arguments(["--config", "data_gen.yaml", "--shards", "0/2"])
    assert data_gen.run(part) == 0
    shutil.copytree("triplets", "expected/triplets")
    rest = data_gen.parse_arguments(["--config", "data_gen.yaml", "output_dir=expected/triplets"])
    assert data_gen.run(rest) == 0
    shutil.rmtree("expected/triplets/.locks")
    for path in Path("expected/triplets").rglob("*"):
        if path.is_file() and (".tfrecord" not in path.name or path.name.endswith(".done.json")):
            path.unlink()


def make_scores() -> None:
    """Scores two methods with tiny CLIP and DINO models."""
    write_dreambooth(Path("dataset"), references=2)
    save_clip(Path("clip"))
    save_dino(Path("dino"))
    for number, name in enumerate(("ours", "theirs")):
        folder = write_pictures(Path("methods", name), list(CLASSES), prompts=3, images=1)
        for shift, path in enumerate(sorted(folder.rglob("*.png"))):
            if number:  # other pictures than the first method's
                image = Image.open(path)
                Image.fromarray(np.roll(np.asarray(image), 3 + shift, axis=(0, 2))).save(path)
        about = {"method": name, "details": {"seed": number, "references": 2}}
        (folder / "about.json").write_text(json.dumps(about))
        status = evaluate.main(
            ["score", "--dataset", "dreambooth", "--data", "dataset", "--pictures", str(folder)]
            + ["--embedder", "clip=clip", "--embedder", "dino=dino", "--cache", "embeddings"]
            + ["--output", f"scores/{name}.json"]
        )
        assert status == 0
    report = ["report", "--scores", "scores/ours.json", "scores/theirs.json", "--data", "dataset"]
    assert evaluate.main([*report, "--output", "report"]) == 0
    shutil.move("report/report.json", "expected/report.json")
    for folder in ("clip", "dino", "embeddings", "report"):
        shutil.rmtree(folder)


def make_study() -> None:
    """Lets one rater vote on every pair and another on five."""
    dataset = open_dataset("dreambooth", Path("dataset"))
    pairs = list(study.find_pairs(dataset, Path("methods/ours"), Path("methods/theirs")))
    database = Database.create(Path("votes.sqlite"), "ours", "theirs")
    for rater, count in (("Ada", len(pairs)), ("Bob", 5)):
        for number, (pair, a_left) in enumerate(arrange(database.key, rater, pairs)[:count]):
            subject = "left" if number % 3 else "right"
            prompt = "left" if a_left else "right"
            database.add(rater, pair, a_left, {"subject": subject, "prompt": prompt})
    study.main(["--database", "votes.sqlite", "--export", "expected/votes.json"])
    content = json.loads(Path("expected/votes.json").read_text())
    content["next"] = arrange(database.key, "Bob", pairs)[5]
    Path("expected/votes.json").write_text(json.dumps(content))


if __name__ == "__main__":
    main()
