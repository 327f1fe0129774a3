"""ICFG-PEDES: Semantically Self-Aligned Network, 2021."""

from .annotations import Layout, SplitSize
from .base import PersonRetrievalBuilder, PersonRetrievalConfig


class IcfgPedes(PersonRetrievalBuilder):
    """ICFG-PEDES: train, test; one caption an image."""

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
        "On request from the owners. The images are of MSMT17, which is on request itself. They state no permission to "
        "pass the data on; the licence of the owners' repository is of its code."
    )
    citation = """@article{ding2021semantically,
  title = {Semantically Self-Aligned Network for Text-to-Image Part-aware Person Re-identification},
  author = {Ding, Zefeng and Ding, Changxing and Shao, Zhiyin and Tao, Dacheng},
  journal = {arXiv:2107.12666},
  year = {2021}
}"""
