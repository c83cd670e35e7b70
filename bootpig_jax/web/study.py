"""The page to vote on: which of two methods draws the subject, and the prompt, better.

    python -m bootpig_jax.study --dataset folder --data DIR --a DIR --b DIR --database votes.sqlite
    python -m bootpig_jax.study --database votes.sqlite --export votes.json

`--dataset` and `--data` are those of `python -m bootpig_jax.evaluate`, and so is the layout of the
methods' folders, `<subject>/<number of the prompt>/<name>.png`. Pictures of the same name make a
pair. Raters see neither the methods' names nor the files', and no data in a picture but its pixels.
"""

import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from jaxtyping import UInt8

from bootpig_jax.data.pictures import PictureError, open_picture, to_rgb
from bootpig_jax.errors import UserError
from bootpig_jax.evaluation.datasets import DATASETS, Dataset, open_dataset
from bootpig_jax.evaluation.files import Source, read_source
from bootpig_jax.evaluation.score import find_pictures, read_about
from bootpig_jax.files import local_path
from bootpig_jax.web.server import DELETE_UPLOADS, Parser, add_address, private_folder, serve
from bootpig_jax.web.votes import (
    QUESTIONS,
    Database,
    arrange,
    check_rater,
    export,
    format_rates,
    win_rates,
)

PORT = 7861
MAX_REFERENCES = 4
CSS = """
.gradio-container { max-width: 1000px !important; margin: 0 auto !important; }
#description { text-align: center; }
#description p { font-size: 1.35rem; margin: .2rem 0; }
/* Both pictures in one size, whatever sizes the methods draw. */
#left img, #right img { width: 100%; height: 100%; object-fit: contain; }
#references .grid-wrap { padding-top: 1.8rem; }
#references .grid-container {
    grid-template-columns: repeat(4, 9rem) !important;
    justify-content: center;
}
"""


@dataclass(frozen=True)
class Pair:
    """What is voted on.

    Attributes:
        prompt: what both methods were to draw.
        references: the subject's real pictures.
        a: the first method's picture.
        b: the second's.
    """

    prompt: str
    references: tuple[Source, ...]
    a: Path
    b: Path


def find_pairs(dataset: Dataset, a: Path, b: Path) -> dict[str, Pair]:
    """The pairs of two methods' pictures that have the same subject, prompt and name.

    Returns:
        By `subject/number of the prompt/name`.

    Raises:
        UserError: a folder is not laid out as it should be, a picture is broken, or there are no
            pairs.
    """
    by_method = []
    for folder in (a, b):
        found, _ = find_pictures(dataset, folder, allow_missing=True)
        by_method.append({f"{p.subject}/{p.prompt}/{p.path.stem}": p for p in found})
    subjects = {subject.name: subject for subject in dataset.subjects}
    pairs = {}
    for name, picture in by_method[0].items():
        if name in by_method[1]:
            subject = subjects[picture.subject]
            pairs[name] = Pair(
                subject.prompts[picture.prompt],
                tuple(r.source for r in subject.references[:MAX_REFERENCES]),
                picture.path,
                by_method[1][name].path,
            )
    if not pairs:
        raise UserError(f"--a, --b: {a} and {b} have no pictures of the same subject, prompt, name")
    for pair in pairs.values():
        # Here, not when a rater waits for it.
        for source in (pair.a, pair.b, *pair.references):
            read_pixels(source)
    return pairs


def read_pixels(source: Source) -> UInt8[np.ndarray, "h w 3"]:
    """A picture's pixels, without anything else that its file says.

    Raises:
        UserError: it can't be read.
    """
    name = "a reference" if isinstance(source, bytes) else source
    try:
        return to_rgb(open_picture(io.BytesIO(read_source(source))))[0]
    except PictureError as error:
        raise UserError(f"{name}: {error}") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror or error})") from None


def build_page(pairs: dict[str, Pair], database: Database) -> gr.Blocks:
    """Makes the page.

    Args:
        pairs: by their name in the database.
        database: where votes go.
    """
    with gr.Blocks(
        title="Which picture is better?", analytics_enabled=False, delete_cache=DELETE_UPLOADS
    ) as page:
        rater, shown = gr.State(), gr.State()
        with gr.Column(elem_id="welcome") as welcome:
            gr.Markdown(
                "# Which picture is better?\n"
                "You will see pictures of one thing, a description, and two drawings. Say which "
                "drawing shows the same thing, and which one fits the description. You can stop at "
                "any time and go on later under the same name."
            )
            name = gr.Textbox(label="Your name, or any word that you will remember", elem_id="name")
            begin = gr.Button("Begin", variant="primary", elem_id="begin")
        with gr.Column(visible=False, elem_id="voting") as voting:
            progress = gr.Markdown(elem_id="progress")
            references = gr.Gallery(
                label="The thing",
                elem_id="references",
                format="png",
                columns=MAX_REFERENCES,
                height=205,
                object_fit="contain",
                allow_preview=False,
                interactive=False,
                buttons=[],
            )
            description = gr.HTML(elem_id="description")
            with gr.Row():
                sides = [
                    gr.Image(
                        label=side.capitalize(),
                        elem_id=side,
                        format="png",
                        height=380,
                        interactive=False,
                        buttons=[],
                    )
                    for side in ("left", "right")
                ]
            with gr.Row():
                answers = [
                    gr.Radio(
                        [("Left", "left"), ("Right", "right")],
                        label=text,
                        elem_id=f"answer-{question}",
                    )
                    for question, text in QUESTIONS.items()
                ]
            submit = gr.Button("Next", variant="primary", elem_id="next")
        with gr.Column(visible=False, elem_id="thanks") as thanks:
            gr.Markdown("# Thank you\nThat was the last pair.")

        def show_next(who: str) -> dict[Any, Any]:
            order = arrange(database.key, who, list(pairs))
            seen = database.seen_by(who)
            waiting = [(pair, a_left) for pair, a_left in order if pair not in seen]
            update: dict[Any, Any] = {
                rater: who,
                welcome: gr.Column(visible=False),
                voting: gr.Column(visible=bool(waiting)),
                thanks: gr.Column(visible=not waiting),
                **{answer: None for answer in answers},
            }
            if not waiting:
                return update
            pair, a_left = waiting[0]
            a, b = read_pixels(pairs[pair].a), read_pixels(pairs[pair].b)
            return update | {
                shown: (pair, a_left),
                progress: f"{len(order) - len(waiting) + 1} of {len(order)}",
                references: [read_pixels(source) for source in pairs[pair].references],
                description: f"<p>{html.escape(pairs[pair].prompt)}</p>",
                sides[0]: a if a_left else b,
                sides[1]: b if a_left else a,
            }

        def on_begin(text: str) -> dict[Any, Any]:
            try:
                return show_next(check_rater(text))
            except UserError as error:
                raise gr.Error(str(error), print_exception=False) from None

        def on_vote(who: str | None, on_page: Any, *chosen: Any) -> dict[Any, Any]:
            if who is None or on_page is None:
                raise gr.Error(
                    "The server has started anew. Reload the page and give the same name.",
                    print_exception=False,
                )
            if None in chosen:
                raise gr.Error("Answer both questions.", title="Next", print_exception=False)
            try:
                pair, a_left = on_page
                database.add(who, pair, a_left, dict(zip(QUESTIONS, chosen, strict=True)))
                return show_next(who)
            except UserError as error:
                raise gr.Error(str(error), print_exception=False) from None

        everything = [
            *(rater, shown, welcome, voting, thanks, progress, references, description),
            *(*sides, *answers),
        ]
        for start in (begin.click, name.submit):
            start(on_begin, name, everything, show_progress="hidden", api_visibility="private")
        submit.click(
            on_vote,
            [rater, shown, *answers],
            everything,
            show_progress="hidden",
            trigger_mode="once",
            api_visibility="private",
        )
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    """Serves the page, or writes the votes to a file; prints the win rates.

    Raises:
        UserError: an argument is wrong.
    """
    parser = Parser(prog="python -m bootpig_jax.study", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--database", type=local_path, required=True, help="SQLite file of the votes"
    )
    parser.add_argument(
        "--export", type=local_path, metavar="FILE", help=".csv or .json; no page then"
    )
    parser.add_argument("--dataset", default="folder", help=", ".join(DATASETS))
    parser.add_argument(
        "--data", type=local_path, help="where the dataset lies; Toyland needs none"
    )
    parser.add_argument("--a", type=local_path, help="folder with the first method's pictures")
    parser.add_argument("--b", type=local_path, help="folder with the second method's pictures")
    add_address(parser, PORT)
    options = parser.parse_args(arguments)
    if options.export:
        database = Database.open(options.database)
        export(database, options.export)
        print(format_rates(win_rates(database.votes()), database.a, database.b))
        return
    if options.a is None or options.b is None:
        raise UserError("--a, --b: name the folders of two methods' pictures")
    pairs = find_pairs(open_dataset(options.dataset, options.data), options.a, options.b)
    names = [
        read_about(folder).method or folder.resolve().name for folder in (options.a, options.b)
    ]
    if names[0] == names[1]:
        raise UserError(f"--a, --b: both are called {names[0]}; name two methods")
    database = Database.create(options.database, *names)
    with private_folder():
        serve(build_page(pairs, database), options.host, options.port, CSS)
    print(format_rates(win_rates(database.votes()), database.a, database.b))
