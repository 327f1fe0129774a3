"""The synthetic benchmark, in any of the three layouts."""

from .annotations import Layout
from .base import PersonRetrievalBuilder, PersonRetrievalConfig
from .synthetic import ANNOTATION_FILES


class SyntheticPedes(PersonRetrievalBuilder):
    """The synthetic benchmark: pedestrians are drawn, and a grammar writes the captions."""

    BUILDER_CONFIGS = [
        PersonRetrievalConfig(
            name="synthetic_pedes",
            layout=Layout("synthetic_pedes", tuple(ANNOTATION_FILES.values()), ("file_path", "img_path")),
        )
    ]
    terms = "Apache-2.0, as for the generator. The data set contains no photographs and no real persons."
