"""Late interaction of words and patches, as a re-ranking."""

import pytest
import torch

from eccl.dataset_scripts.sources import DataSource
from eccl.eval.benchmarks import late_interaction
from eccl.hub.loading import load_model


@pytest.fixture
def folder(backbone):
    return str(backbone)


def test_the_score_is_the_mean_over_the_words_of_the_best_patch(folder, benchmark):
    model, processor = load_model(folder)
    split = DataSource("cuhk_pedes", str(benchmark)).load().splits["val"]
    found = late_interaction.score_words(model, processor, split, batch_size=3)
    captions = [caption for row in split for caption in row["captions"]]
    assert found.shape == (len(captions), len(split))
    for row, caption in enumerate(captions):
        # One caption and one image at a time, without padding.
        ids = processor(text=caption, return_tensors="pt")["input_ids"]
        for column, image in enumerate(split["image"]):
            with torch.no_grad():
                words = model.get_token_features(ids)[0, 1:-1]
                pixels = processor(images=image, return_tensors="pt")["pixel_values"]
                patches = model.get_patch_features(pixels)[0].reshape(-1, words.shape[1])
            best = [max(float(torch.cosine_similarity(word, patch, dim=0)) for patch in patches) for word in words]
            assert found[row, column].item() == pytest.approx(sum(best) / len(best), abs=1e-5)


def test_the_table_starts_with_the_pooled_features_alone(folder, benchmark, capsys):
    words = ["--model", folder, "--dataset", "cuhk_pedes", "--data_dir", str(benchmark), "--resamples", "100"]
    late_interaction.main([*words, "--weights", "0.1", "1e9"])
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows] == ["weight", "0", "0.1", "1e+09", "words alone"]
    # With a huge weight only the words count.
    assert rows[-2][1:3] == rows[-1][1:3]
    model, processor = load_model(folder)
    split = DataSource("cuhk_pedes", str(benchmark)).load().splits["val"]
    scores = late_interaction.score_words(model, processor, split, 4)
    ids = torch.tensor(split["person_id"])
    queries = ids.repeat_interleave(torch.tensor([len(captions) for captions in split["captions"]]))
    first = (ids[scores.argmax(dim=1)] == queries).float().mean().item()
    assert float(rows[-1][1]) == pytest.approx(100 * first, abs=0.01)
    with pytest.raises(SystemExit):
        late_interaction.main([*words, "--split", "none"])
    error = capsys.readouterr().err
    assert "Unknown split in --split 'none': cuhk_pedes" in error and "has train, val, test;" in error
