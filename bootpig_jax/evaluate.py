"""Draws, scores and reports: `python -m bootpig_jax.evaluate generate|score|report`.

    generate   subjects x prompts x pictures, by our method or a baseline
    score      any folder <subject>/<number of the prompt>/*.png, by the field's protocol
    report     several results side by side

Exit status 1: the result is there, but broken pictures were left out of it.
"""

import argparse
import dataclasses
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from bootpig_jax.attention import STRATEGIES
from bootpig_jax.compilation_cache import use_compilation_cache
from bootpig_jax.diffusion.solvers import SolverName
from bootpig_jax.errors import UserError, run_cli
from bootpig_jax.evaluation.datasets import DATASETS, Dataset, open_dataset
from bootpig_jax.evaluation.embedders import MODELS, EmbeddingCache, load_embedder
from bootpig_jax.evaluation.files import check_writable, name_some
from bootpig_jax.evaluation.generate import (
    IP_ADAPTER_FILE,
    METHODS,
    NAMES,
    GenerateSettings,
    check_dataset_references,
    generate,
    load_drawer,
)
from bootpig_jax.evaluation.lpips import load_lpips
from bootpig_jax.evaluation.render import write_report
from bootpig_jax.evaluation.report import describe_scores
from bootpig_jax.evaluation.score import (
    About,
    MethodScores,
    Settings,
    dump_scores,
    read_scores,
    score_folder,
    score_real,
)
from bootpig_jax.files import CACHE, local_name, local_path, write_whole
from bootpig_jax.sampling.references import SEGMENTERS
from bootpig_jax.sampling.settings import SamplingSettings
from bootpig_jax.toyland.render import SIZE

EMBEDDINGS = CACHE / "embeddings"
LEFT_OUT_STATUS = 1
_WEIGHTS = Path(__file__).parent / "toyland" / "weights"
# What differs from `SamplingSettings` on Toyland, whose pictures are cut out already.
_TOYLAND: dict[str, Any] = {
    "num_inference_steps": 20,
    "image_guidance_scale": 3.0,
    "guidance_scale": 3.0,
    "segmenter": "none",
    "height": SIZE,
    "width": SIZE,
}


class _Parser(argparse.ArgumentParser):
    """Reports a wrong argument like every other mistake: in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = _Parser(
        prog="python -m bootpig_jax.evaluate",
        description=__doc__.split("\n")[0],
        allow_abbrev=False,
    )
    stages = parser.add_subparsers(dest="stage", required=True, parser_class=_Parser)

    draw = stages.add_parser("generate", help="draw the pictures", allow_abbrev=False)
    _add_dataset(draw)
    draw.add_argument("--output", type=local_path, required=True, help="the method's folder")
    draw.add_argument("--method", choices=METHODS, default="bootpig")
    draw.add_argument("--name", help="of the method in tables; by default what it is")
    draw.add_argument("--model", type=local_name, help="folder in diffusers' layout, or hub id")
    draw.add_argument(
        "--bootpig", type=local_name, help="what training exports, for --method bootpig"
    )
    draw.add_argument(
        "--ip-adapter", type=local_name, help="folder or hub id, for --method ip-adapter"
    )
    draw.add_argument("--ip-adapter-file", default=IP_ADAPTER_FILE, help="its weights")
    draw.add_argument("--ip-adapter-scale", type=float, default=0.6)
    draw.add_argument("--references", type=int, default=0, help="of each subject; 0: all")
    draw.add_argument("--images", type=int, default=4, help="of each prompt")
    draw.add_argument("--seed", type=int, default=0)
    draw.add_argument("--steps", type=int, dest="num_inference_steps")
    draw.add_argument("--image-guidance", type=float, dest="image_guidance_scale")
    draw.add_argument("--guidance", type=float, dest="guidance_scale")
    draw.add_argument("--strategy", choices=STRATEGIES)
    draw.add_argument("--solver", choices=get_args(SolverName))
    draw.add_argument("--segmenter", choices=SEGMENTERS)
    draw.add_argument("--height", type=int)
    draw.add_argument("--width", type=int)
    draw.add_argument("--batch-size", type=int, default=4, help="pictures drawn together")
    draw.add_argument("--template", default="{}", help="what a prompt is put into, at {}")
    draw.add_argument("--shard", default="0/1", metavar="I/N", help="job I (0 ... N-1) of N")
    draw.add_argument("--allow-pickle", action="store_true", help="open .bin weights too")

    score = stages.add_parser("score", help="score a folder", allow_abbrev=False)
    _add_dataset(score)
    what = score.add_mutually_exclusive_group(required=True)
    what.add_argument("--pictures", type=local_path, help="a method's folder")
    what.add_argument(
        "--sanity", action="store_true", help="score the real pictures against themselves"
    )
    score.add_argument("--output", type=local_path, required=True, help="the result, a .json file")
    score.add_argument(
        "--embedder",
        action="append",
        metavar="NAME[=SOURCE]",
        help=f"{', '.join(MODELS)}; SOURCE is a folder or hub id; by default clip and dino, "
        "none for Toyland",
    )
    score.add_argument("--masked", action="store_true", help="score foregrounds too")
    score.add_argument("--lpips", action="store_true", help="score diversity by LPIPS too")
    score.add_argument("--template", default="{}", help="what a prompt is put into for CLIP-T")
    score.add_argument("--allow-missing", action="store_true", help="prompts may lack pictures")
    score.add_argument(
        "--cache", type=local_path, default=EMBEDDINGS, help="where embeddings are kept"
    )
    score.add_argument("--batch-size", type=int, default=32)
    score.add_argument("--workers", type=int, default=2, help="threads that read pictures")
    score.add_argument("--device", help="PyTorch's name; by default a GPU if there is one")
    score.add_argument("--allow-pickle", action="store_true", help="open .bin weights too")

    report = stages.add_parser("report", help="put results side by side", allow_abbrev=False)
    report.add_argument(
        "--scores", type=local_path, nargs="+", required=True, help="what score wrote"
    )
    report.add_argument("--output", type=local_path, required=True, help="folder")
    report.add_argument("--data", type=local_path, help="the dataset, to show its real pictures")
    report.add_argument("--title", default="")
    report.add_argument(
        "--force", action="store_true", help="also where protocol cards are different"
    )
    return parser.parse_args(argv)


def _add_dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", choices=DATASETS, required=True)
    parser.add_argument("--data", type=local_path, help="where the dataset lies")
    parser.add_argument("--limit", type=int, help="only the first N subjects and prompts of each")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line.

    Raises:
        UserError: something in the arguments or files is wrong.
    """
    options = parse_arguments(argv)
    arguments = sys.argv[1:] if argv is None else list(argv)
    command = shlex.join(["python", "-m", "bootpig_jax.evaluate", *arguments])
    match options.stage:
        case "generate":
            return run_generate(options, command)
        case "score":
            return run_score(options, command)
        case _:
            return run_report(options, command)


def run_generate(options: argparse.Namespace, command: str) -> int:
    """Draws a dataset's pictures."""
    toyland = options.dataset == "toyland"
    given = {
        name: getattr(options, name)
        for name in (
            *("num_inference_steps", "image_guidance_scale", "guidance_scale", "strategy"),
            *("solver", "segmenter", "height", "width"),
        )
        if getattr(options, name) is not None
    }
    settings = SamplingSettings(
        **(_TOYLAND if toyland else {}) | given,
        num_images=options.images,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    shard = re.fullmatch(r"(\d+)/(\d+)", options.shard)
    if shard is None:
        raise UserError(f"--shard: must be I/N, such as 0/8, not {options.shard!r}")
    how = GenerateSettings(
        references=options.references,
        template=options.template,
        shard=(int(shard[1]), int(shard[2])),
    )
    model, bootpig = options.model, options.bootpig
    if toyland and model is None:
        model = str(_WEIGHTS / "sd")
        if options.method == "bootpig":
            bootpig = bootpig or str(_WEIGHTS / "bootpig")
    if model is None:
        raise UserError("--model is missing: a folder in diffusers' layout, or a hub id")
    dataset = open_dataset(options.dataset, options.data).limited(options.limit)
    if options.method in ("bootpig", "untrained"):
        check_dataset_references(dataset, how)
    check_writable(options.output)

    use_compilation_cache()
    drawer, identity = load_drawer(
        options.method,
        model,
        settings,
        bootpig=bootpig,
        ip_adapter=options.ip_adapter,
        ip_adapter_file=options.ip_adapter_file,
        ip_adapter_scale=options.ip_adapter_scale,
        allow_pickle=options.allow_pickle,
    )
    # What pictures depend on; how many of them are drawn together is not part of it.
    drawn_with = dataclasses.asdict(settings)
    del drawn_with["batch_size"], drawn_with["strict"], drawn_with["num_images"]
    about = About(
        method=options.name or NAMES[options.method],
        details={
            **identity,
            **drawn_with,
            "images": options.images,
            "references": options.references,
            "template": options.template,
            "command": command,
        },
    )
    drawn = generate(
        dataset,
        drawer,
        options.output,
        about,
        num_images=options.images,
        settings=how,
        progress=True,
    )
    print(f"{drawn} pictures drawn: {options.output}")
    return 0


def run_score(options: argparse.Namespace, command: str) -> int:
    """Scores a folder, or the real pictures."""
    if options.output.suffix != ".json":
        raise UserError(f"--output: must be a .json file, not {options.output}")
    check_writable(options.output.parent)
    settings = Settings(
        masked=options.masked,
        template=options.template,
        batch_size=options.batch_size,
        workers=options.workers,
        allow_missing=options.allow_missing,
        progress=True,
        command=command,
    )
    dataset = open_dataset(options.dataset, options.data)
    if options.sanity and options.lpips:
        raise UserError("--lpips: compares the pictures of a prompt; with --sanity there are none")
    if options.pictures is not None and not options.pictures.is_dir():
        raise UserError(f"--pictures: {options.pictures} is no folder")
    named = options.embedder or ([] if dataset.toyland else ["clip", "dino"])
    names = [entry.partition("=")[0] for entry in named]
    if len(set(names)) < len(names):
        raise UserError(f"--embedder: {name_some(names)}: one is named twice")
    embedders = [
        load_embedder(
            name,
            entry.partition("=")[2] or None,
            allow_pickle=options.allow_pickle,
            device=options.device,
        )
        for name, entry in zip(names, named, strict=True)
    ]
    lpips = None
    if options.lpips:
        lpips = load_lpips(allow_pickle=options.allow_pickle, device=options.device)
    cache = EmbeddingCache(options.cache.expanduser())
    if options.sanity:
        scores = score_real(dataset, embedders, limit=options.limit, cache=cache, settings=settings)
    else:
        scores = score_folder(
            dataset,
            options.pictures,
            embedders,
            limit=options.limit,
            cache=cache,
            settings=settings,
            lpips=lpips,
        )
    write_whole(options.output, dump_scores(scores))
    print(format_summary(scores))
    print(options.output)
    for entry in scores.left_out:
        print(f"left out: {entry.file}: {entry.reason}", file=sys.stderr)
    return LEFT_OUT_STATUS if scores.left_out else 0


def run_report(options: argparse.Namespace, command: str) -> int:
    """Puts results side by side."""
    check_writable(options.output)
    scores = [read_scores(path) for path in options.scores]
    card = scores[0].card
    dataset: Dataset | None = None
    if options.data is not None or card.dataset == "toyland":
        dataset = open_dataset(card.dataset, options.data).limited(card.limit)
        if dataset.fingerprint() != card.dataset_sha256:
            raise UserError(
                f"--data: {options.data} is not the dataset that {options.scores[0]} was scored on"
            )
    report = describe_scores(
        scores, dataset, title=options.title, command=command, force=options.force
    )
    for path in write_report(report, options.output):
        print(path)
    return LEFT_OUT_STATUS if any(result.left_out for result in scores) else 0


def format_summary(scores: MethodScores) -> str:
    """The figures as a table for the terminal."""
    width = max(len(name) for name in scores.summary)
    lines = [f"{scores.method}: {len(scores.pictures)} pictures, times 100, 95 % intervals"]
    for name, summary in scores.summary.items():
        span = ""
        if summary.interval is not None:
            low, high = summary.interval
            span = f"  [{100 * low:5.1f}, {100 * high:5.1f}]"
        lines.append(f"{name:{width}}  {100 * summary.mean:5.1f}{span}")
    if scores.near_inputs:
        lines.append(f"{scores.near_inputs} pictures may be copied from an input: see near_input")
    if scores.missing:
        lines.append(f"{len(scores.missing)} prompts have no picture: {name_some(scores.missing)}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main)
