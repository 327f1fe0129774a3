"""Runs transformers' own common tests on ECCL, and on CLIP for comparison: `make common-suite`.

The tests are in the source distribution of transformers, but not in its wheel. This program downloads the distribution
of the version that is installed, adds the few helpers that the distribution lacks, and runs `common_suite_cases.py`.
"""

import argparse
import os
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from pathlib import Path

import transformers

# The modules that the tests import and that the source distribution lacks, with as much as the tests need of them.
_MISSING_MODULES = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    # The configuration tests set these values and read them back; for a configuration with parts they are not used.
    "utils/test_configuration_utils.py": "config_common_kwargs = {'return_dict': False, 'output_attentions': True}\n",
    # Outside the package: the tests of processors add `utils` to the module path.
    "../utils/fetch_hub_objects_for_ci.py": "def url_to_local_path(url):\n    return url\n",
}


def download_tests(folder: Path) -> None:
    """Downloads the tests of the installed transformers into the package `transformers_tests` below a folder.

    Raises:
        RuntimeError: pip cannot download the source distribution.
    """
    version = transformers.__version__
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "transformers"]
    command += ["--quiet", "--dest", str(folder), f"transformers=={version}"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        last = (result.stderr.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"the source distribution of transformers {version} cannot be downloaded: {last}")
    with tarfile.open(folder / f"transformers-{version}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    package = folder / "transformers_tests"
    (folder / f"transformers-{version}" / "tests").rename(package)
    for name, text in _MISSING_MODULES.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def run_tests(folder: Path) -> dict[str, dict[str, tuple[str, str]]]:
    """Runs the tests.

    Args:
        folder: a folder in which `download_tests` has put the tests.

    Returns:
        For each test class the outcome of each test: `"passed"`, `"failed"` or `"skipped"`, and one line of its
        message.
    """
    here = Path(__file__).parent
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:randomly"]
    # Without this project's settings: the tests and their warnings are those of transformers.
    command += ["-c", os.devnull, "--rootdir", str(folder), "--junitxml", str(report)]
    command += [str(here / "common_suite_cases.py")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(here)]), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
    if result.returncode not in (0, 1):  # 1: some tests failed
        raise RuntimeError(f"the tests did not run:\n{result.stdout[-3000:]}{result.stderr[-3000:]}")
    return _read_report(report)


def _read_report(report: Path) -> dict[str, dict[str, tuple[str, str]]]:
    outcomes: dict[str, dict[str, tuple[str, str]]] = defaultdict(dict)
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        outcome, message = "passed", ""
        for element in case:
            if element.tag in ("failure", "error"):
                outcome = "failed"
            elif element.tag == "skipped":
                outcome = "skipped"
            message = (element.get("message") or "").strip().split("\n")[0]
        outcomes[case.get("classname", "").rpartition(".")[2]][case.get("name", "")] = outcome, message
    return dict(outcomes)


def failures(outcomes: dict[str, tuple[str, str]]) -> dict[str, str]:
    """The names of the tests that failed, and their messages."""
    return {name: message for name, (outcome, message) in outcomes.items() if outcome == "failed"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="keep the downloaded tests here, and use them the next time")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as temporary:
        folder = (folder or Path(temporary)).resolve()
        if not (folder / "transformers_tests").is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            download_tests(folder)
        outcomes = run_tests(folder)
    print(f"transformers {transformers.__version__}\n")
    print("| tests of | passed | failed | skipped |\n| --- | --- | --- | --- |")
    for name, results in outcomes.items():
        counts = [sum(outcome == kind for outcome, _ in results.values()) for kind in ("passed", "failed", "skipped")]
        print(f"| {name} | {' | '.join(map(str, counts))} |")
    for name, results in outcomes.items():
        for test, message in failures(results).items():
            print(f"{name}.{test}: {message}")


if __name__ == "__main__":
    main()
