"""ICFG-PEDES: Semantically Self-Aligned Network, 2021."""

from .annotations import Layout, SplitSize
from .base import PersonRetrievalBuilder, PersonRetrievalConfig


class IcfgPedes(PersonRetrievalBuilder):
    """ICFG-PEDES has the splits train and test, and one caption per image."""

    BUILDER_CONFIGS = [
        PersonRetrievalConfig(
            name="icfg_pedes",
            layout=Layout(
                "ICFG-PEDES",
                ("ICFG-PEDES.json", "ICFG_PEDES.json"),
                ("file_path",),
                {"train": SplitSize(3_102, 34_674, 34_674), "test": SplitSize(1_000, 19_848, 19_848)},
            ),
        )
    ]
    homepage = "https://github.com/zifyloo/SSAN"
    terms = (
        "The owners send the data on request. The images come from MSMT17, whose owners also send it on request. No "
        "permission to pass the data on is stated. The licence of the owners' repository covers its code."
    )
    citation = """@article{ding2021semantically,
  title = {Semantically Self-Aligned Network for Text-to-Image Part-aware Person Re-identification},
  author = {Ding, Zefeng and Ding, Changxing and Shao, Zhiyin and Tao, Dacheng},
  journal = {arXiv:2107.12666},
  year = {2021}
}"""
