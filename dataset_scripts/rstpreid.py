"""RSTPReid: Deep Surroundings-person Separation Learning, ACM MM 2021."""

from .annotations import Layout, SplitSize
from .base import PersonRetrievalBuilder, PersonRetrievalConfig


class RstpReid(PersonRetrievalBuilder):
    """RSTPReid has the splits train, val and test, five images per person, and two captions per image."""

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
        "The owners' repository has a public link to the data, and the MIT licence, which is made for software. The "
        "images come from MSMT17, whose owners send it on request: it is doubtful whether the MIT licence covers them."
    )
    citation = """@inproceedings{zhu2021dssl,
  title = {DSSL: Deep Surroundings-person Separation Learning for Text-based Person Retrieval},
  author = {Zhu, Aichun and Wang, Zijie and Li, Yifeng and Wan, Xili and Jin, Jing and Wang, Tian and Hu, Fangqiang
            and Hua, Gang},
  booktitle = {ACM Multimedia},
  year = {2021}
}"""
