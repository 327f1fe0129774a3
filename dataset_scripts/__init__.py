"""The benchmarks as builders of `datasets`. After an import of this package, `load_dataset` finds them by name.

import eccl.dataset_scripts
datasets.load_dataset("cuhk_pedes", data_dir="/data/CUHK-PEDES")
"""

import hashlib
from pathlib import Path

import datasets.load
from datasets.data_files import DataFilesDict, sanitize_patterns
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

BENCHMARKS = ("cuhk_pedes", "icfg_pedes", "rstpreid", "synthetic_pedes")
# The builder of flat lists is no benchmark, but is found by name, too.
BUILDERS = (*BENCHMARKS, "person_pairs")
# What was prepared or checked with other code is not used again.
CODE_HASH = hashlib.sha256(
    b"".join(source.read_bytes() for source in sorted(Path(__file__).parent.glob("*.py")))
).hexdigest()


class _ModuleFactory(datasets.load.PackagedDatasetModuleFactory):
    """Does not list the files below `data_dir`, as the library does for its formats.

    The builders of the benchmarks know where their files are, and to list 40,000 images takes half a minute at each
    load.
    """

    def get_module(self) -> datasets.load.DatasetModule:
        if self.name not in BUILDERS:
            return super().get_module()
        module_path, code_hash = _PACKAGED_DATASETS_MODULES[self.name]
        data_files = DataFilesDict()
        if self.data_files is not None:
            folder = str(Path(self.data_dir or "").expanduser().absolute())
            data_files = DataFilesDict.from_patterns(sanitize_patterns(self.data_files), base_path=folder)
        return datasets.load.DatasetModule(
            module_path, code_hash, {"data_files": data_files, "dataset_name": self.name}
        )


def _register() -> None:
    for name in BUILDERS:
        _PACKAGED_DATASETS_MODULES[name] = (f"{__name__}.{name}", CODE_HASH)
    datasets.load.PackagedDatasetModuleFactory = _ModuleFactory


_register()
