"""RSTPReid: Deep Surroundings-person Separation Learning, ACM MM 2021."""

from .annotations import Layout, SplitSize
from .base import PersonRetrievalBuilder, PersonRetrievalConfig


class RstpReid(PersonRetrievalBuilder):
    """RSTPReid: train, val, test; five images a person, two captions an image."""

    BUILDER_CONFIGS = [
        PersonRetrievalConfig(
            name="rstpreid",
            layout=Layout(
                "RSTPReid",
                ("data_captions.json",),
                ("img_path",),
                {
                    "train": SplitSize(3_701, 18_505, 37_010),
                    "val": SplitSize(200, 1_000, 2_000),
                    "test": SplitSize(200, 1_000, 2_000),
                },
            ),
        )
    ]
    homepage = "https://github.com/NjtechCVLab/RSTPReid-Dataset"
    terms = (
        "The owners' repository links the data publicly and carries the MIT licence, written for software. The images "
        "are of MSMT17, which is on request: whether that licence covers them is doubtful."
    )
    citation = """@inproceedings{zhu2021dssl,
  title = {DSSL: Deep Surroundings-person Separation Learning for Text-based Person Retrieval},
  author = {Zhu, Aichun and Wang, Zijie and Li, Yifeng and Wan, Xili and Jin, Jing and Wang, Tian and Hu, Fangqiang
            and Hua, Gang},
  booktitle = {ACM Multimedia},
  year = {2021}
}"""
