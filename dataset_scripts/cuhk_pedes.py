"""CUHK-PEDES: Person Search with Natural Language Description, CVPR 2017."""

from .annotations import Layout, SplitSize
from .base import PersonRetrievalBuilder, PersonRetrievalConfig


class CuhkPedes(PersonRetrievalBuilder):
    """CUHK-PEDES has the splits train, val and test, and two captions per image; a few images have more."""

    BUILDER_CONFIGS = [
        PersonRetrievalConfig(
            name="cuhk_pedes",
            layout=Layout(
                "CUHK-PEDES",
                ("reid_raw.json",),
                ("file_path",),
                {
                    "train": SplitSize(11_003, 34_054, 68_126),
                    "val": SplitSize(1_000, 3_078, 6_158),
                    "test": SplitSize(1_000, 3_074, 6_156),
                },
            ),
        )
    ]
    homepage = "https://github.com/ShuangLI59/Person-Search-with-Natural-Language-Description"
    terms = (
        "The owners send the data on request, by e-mail from a university address, for academic use only. They state "
        "no licence, and they give no permission to pass the data on."
    )
    citation = """@inproceedings{li2017person,
  title = {Person Search with Natural Language Description},
  author = {Li, Shuang and Xiao, Tong and Li, Hongsheng and Zhou, Bolei and Yue, Dayu and Wang, Xiaogang},
  booktitle = {CVPR},
  year = {2017}
}"""
