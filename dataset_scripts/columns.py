"""Finds the columns of a user's data set that hold the images, the persons and the captions."""

from collections.abc import Collection, Mapping, Sequence

# For each role, the usual names of its column. The first name that a data set has is taken. Flat lists such as those of
# APTM, RaSa and MALS have the person under `image_id`.
USUAL_NAMES: dict[str, tuple[str, ...]] = {
    "image": ("image", "img", "picture", "image_path", "img_path", "file_path", "file_name", "filename", "path"),
    "captions": ("captions", "caption", "texts", "text", "sentences", "sentence", "descriptions", "description"),
    "person_id": ("person_id", "id", "pid", "person", "identity", "label", "image_id"),
    "file_path": ("file_path", "img_path", "image_path", "file_name", "filename", "path"),
    "split": ("split",),
}
_NEEDED = {
    "image": "a picture, or the path of one",
    "person_id": "a whole number or a text for each person",
    "captions": "a sentence, or a list of sentences",
}


def parse_columns(words: Sequence[str] | Mapping[str, str] | None) -> dict[str, str]:
    """Reads `image=img person_id=pid` as a mapping from roles to columns.

    Raises:
        ValueError: an entry is not ROLE=COLUMN, a role is unknown, or is given twice.
    """
    pairs = words.items() if isinstance(words, Mapping) else [str(word).partition("=")[::2] for word in words or ()]
    columns: dict[str, str] = {}
    for role, column in pairs:
        if role not in USUAL_NAMES or not column or not isinstance(column, str):
            raise ValueError(f"columns: {role}={column} must be ROLE=COLUMN, with a role of {', '.join(USUAL_NAMES)}")
        if role in columns:
            raise ValueError(f"columns: {role} is given twice")
        columns[role] = column
    return columns


def find_columns(present: Collection[str], columns: Mapping[str, str], source: str) -> dict[str, str]:
    """Finds the column of each role.

    Args:
        present: the names of the columns that there are.
        columns: the columns that the user has named, by role.
        source: the data set, for messages.

    Returns:
        The column of `image`, `person_id` and `captions`, and of `file_path` and `split` if there is one.

    Raises:
        ValueError: a column that is needed, or was named, is missing.
    """
    found: dict[str, str] = {}
    missing = []
    for role, usual in USUAL_NAMES.items():
        if role in columns:
            if columns[role] not in present:
                missing.append(f"{role}: {columns[role]!r}, which columns names, is not there")
            found[role] = columns[role]
            continue
        # A path can be both: the image, and its name.
        taken = {column for other, column in columns.items() if {role, other} != {"image", "file_path"}}
        name = next((name for name in usual if name in present and name not in taken), None)
        if name is not None:
            found[role] = name
        elif role in _NEEDED:
            missing.append(f"{role} ({_NEEDED[role]})")
    if missing:
        words = " ".join(f"{role}=COLUMN" for role in _NEEDED if role not in found or found[role] not in present)
        names = ", ".join(present) or "no columns"
        raise ValueError(
            f"{source} has no column for {', '.join(missing)}; it has {names}: name the column"
            + (f" (--columns {words})" if words else "")
            + ("; a table must have commas, or tabs in a .tsv file" if len(present) == 1 and ";" in names else "")
        )
    return found


__all__ = ["USUAL_NAMES", "find_columns", "parse_columns"]
