"""Searches a folder of person images with a sentence.

python -m eccl.search.gallery --model DIR --images FOLDER --query "a woman in a red coat" --output found.png
"""

from pathlib import Path

from ..utils.command_line import CommandParser, add_shared_option, command, say, tell
from ..utils.files import complete_file, require_no_input, require_picture_path


def make_parser() -> CommandParser:
    parser = CommandParser("python -m eccl.search.gallery", __doc__)
    add_shared_option(parser, "model")
    parser.add_argument("--images", required=True, help="folder with images, searched with all its subfolders")
    parser.add_argument("--query", required=True, help="sentence that describes a person")
    parser.add_argument("--top_k", type=int, default=10, help="number of images to show")
    add_shared_option(
        parser,
        "on_bad_image",
        help="error: stop at an unreadable image; skip: leave unreadable images out, and name them",
    )
    add_shared_option(parser, "batch_size")
    add_shared_option(parser, "output")
    return parser


@command
def main(arguments: list[str]) -> None:
    options = make_parser().parse_args(arguments)
    output = Path(options.output) if options.output else None
    if output:
        require_picture_path(output)
        require_no_input(output, {"--model": options.model}, "--output")
        if output.resolve().is_relative_to(Path(options.images).resolve()):
            raise ValueError(f"--output is {output}, inside the folder of --images: the next search would find it")
    if not options.query.strip():
        raise ValueError("--query is empty: it must be a sentence")
    if options.top_k < 1:
        raise ValueError(f"--top_k is {options.top_k}, it must be at least 1")
    say(f"loading {options.model}")
    # Imported here, so that --help and a mistake in the arguments answer at once.
    from ..hub.loading import load_model
    from ..pipeline_eccl import TextToPersonRetrievalPipeline
    from ..processing_eccl import list_images
    from ..utils.sheets import draw_ranked_images

    paths = list_images(options.images)
    model, processor = load_model(options.model)
    search = TextToPersonRetrievalPipeline(model=model, processor=processor, device=model.device)
    search.index(paths, batch_size=options.batch_size, on_bad_image=options.on_bad_image)
    for line in search.skipped:
        say(f"skipped {line}")
    # A list of sentences gives a list of results for each.
    (found,) = search([options.query], top_k=options.top_k)
    tell(f'"{options.query}" among {len(search.paths)} images:')
    for rank, match in enumerate(found, start=1):
        tell(f"{rank:3}  {match['score']:.3f}  {match['path']}")
    if output:
        with complete_file(output) as unfinished:
            draw_ranked_images([(options.query, [(Path(match["path"]), None) for match in found])]).save(unfinished)
        tell(f"picture: {output}")


if __name__ == "__main__":
    main()
