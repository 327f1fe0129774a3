"""The synthetic benchmark, in whichever of the three layouts it was written."""

from .annotations import Layout
from .base import PersonRetrievalBuilder, PersonRetrievalConfig
from .synthetic import ANNOTATION_FILES


class SyntheticPedes(PersonRetrievalBuilder):
    """Drawn pedestrians with captions from a grammar; see `python -m eccl.dataset_scripts.synthetic`."""

    BUILDER_CONFIGS = [
        PersonRetrievalConfig(
            name="synthetic_pedes",
            layout=Layout("synthetic_pedes", tuple(ANNOTATION_FILES.values()), ("file_path", "img_path")),
        )
    ]
    terms = "Apache-2.0, as the generator; no photograph and no person is in it."
