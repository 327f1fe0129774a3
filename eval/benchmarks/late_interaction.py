"""Tries late interaction of words and patches as a re-ranking that needs no training, and reports what it brings.

python -m eccl.eval.benchmarks.late_interaction --model DIR --dataset synthetic_pedes --data_dir DIR

For each word of a caption, the most similar patch of an image counts; the score of the image is the mean over the words
(ColBERT, SIGIR 2020, section 3.3; FILIP, ICLR 2022, section 3.1). It is added to the similarity of the pooled features
with several weights, both standardised within the query.
"""

import argparse
from typing import TYPE_CHECKING

from ...utils.command_line import CommandParser, add_shared_option, at_least, command, tell

if TYPE_CHECKING:
    import datasets
    import torch

    from ...modeling_eccl import ECCLModel
    from ...processing_eccl import ECCLProcessor

DEFAULT_WEIGHTS = (0.05, 0.1, 0.2, 0.5, 1.0)


def score_words(
    model: "ECCLModel", processor: "ECCLProcessor", dataset: "datasets.Dataset", batch_size: int
) -> "torch.Tensor":
    """Scores every caption of a split against every image by late interaction.

    Args:
        model, processor: a model and its processor.
        dataset: the split.
        batch_size: number of images, or of captions, encoded at a time.

    Returns:
        `(captions, images)`: the mean over the words of the largest cosine with a patch. A caption without a word has
        only its start and end tokens, and scores 0.
    """
    import torch

    from ...training.losses import unit_rows

    images = dataset["image"]
    captions = [caption for of_image in dataset["captions"] for caption in of_image]
    with torch.inference_mode():
        of_batches = []
        for start in range(0, len(images), batch_size):
            pixels = processor(images=images[start : start + batch_size], return_tensors="pt")["pixel_values"]
            of_batches.append(unit_rows(model.get_patch_features(pixels).flatten(1, 2)))
        patches = torch.cat(of_batches)
        scores = torch.zeros(len(captions), len(images))
        for start in range(0, len(captions), batch_size):
            tokens = processor(text=captions[start : start + batch_size], return_tensors="pt")
            features = unit_rows(model.get_token_features(tokens["input_ids"]))
            for row, (of_caption, mask) in enumerate(zip(features, tokens["attention_mask"], strict=True)):
                # The start token is first, and the end token last.
                words = of_caption[1 : int(mask.sum()) - 1]
                if len(words):
                    best = (patches @ words.T).amax(dim=1)
                    scores[start + row] = best.mean(dim=1)
    return scores


def make_parser() -> CommandParser:
    parser = CommandParser("python -m eccl.eval.benchmarks.late_interaction", __doc__)
    add_shared_option(parser, "model")
    parser.add_argument("--dataset", default="synthetic_pedes", help="data set to score on")
    add_shared_option(parser, "data_dir")
    parser.add_argument("--split", default="val", help="split to score")
    parser.add_argument(
        "--weights", nargs="+", type=float, default=list(DEFAULT_WEIGHTS), help="weights of the score of the words"
    )
    parser.add_argument("--resamples", type=at_least(100), default=10_000, help="number of resamples of the bootstrap")
    add_shared_option(parser, "batch_size")
    return parser


@command
def main(arguments: list[str]) -> None:
    options = make_parser().parse_args(arguments)
    for line in compare_weights(options):
        tell(line)


def compare_weights(options: argparse.Namespace) -> list[str]:
    """Scores the pooled features alone and with each weight; returns the lines of the table."""
    from ...dataset_scripts.sources import DataSource
    from ...encoding_eccl import embed_split
    from ...hub.loading import load_model
    from ...training.losses import unit_rows
    from ..comparison.runs import score_similarities
    from ..comparison.statistics import paired_bootstrap
    from ..scoring import load_benchmarks

    model, processor = load_model(options.model)
    source = DataSource(options.dataset, options.data_dir, option="--dataset")
    split = load_benchmarks([source], options.split)[0].dataset
    embeds = embed_split(model, processor, split, options.batch_size, progress=False)
    ids = embeds.query_person_ids.numpy(), embeds.gallery_person_ids.numpy()
    pooled = unit_rows(embeds.text_embeds) @ unit_rows(embeds.image_embeds).T
    words = score_words(model, processor, split, options.batch_size)

    def standardise(scores: "torch.Tensor") -> "torch.Tensor":
        return (scores - scores.mean(dim=1, keepdim=True)) / scores.std(dim=1, keepdim=True).clamp(min=1e-6)

    alone = score_similarities(pooled.numpy(), *ids)
    lines = ["| weight | Rank-1 | mAP | with the words minus without, Rank-1 | mAP |", "|--:|--:|--:|--:|--:|"]
    lines.append(f"| 0 | {alone.mean('rank1'):.2f} | {alone.mean('mAP'):.2f} | - | - |")
    rows = {f"{weight:g}": standardise(pooled) + weight * standardise(words) for weight in options.weights}
    rows["words alone"] = words
    for name, similarities in rows.items():
        mixed = score_similarities(similarities.numpy(), *ids)
        cells = [name, f"{mixed.mean('rank1'):.2f}", f"{mixed.mean('mAP'):.2f}"]
        for metric in ("rank1", "mAP"):
            interval = paired_bootstrap([mixed], [alone], metric, options.resamples)
            cells.append(f"{interval.difference:+.2f} ({interval.low:+.2f} to {interval.high:+.2f})")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
