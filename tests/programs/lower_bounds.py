"""Prints the lowest versions that setup.cfg allows, one `name==version` per line, as constraints for pip.

torch is left out: its version stays the one in constraints.txt (setup.cfg says why).
"""

import re

from pages import SETTINGS


def lower_bounds() -> dict[str, str]:
    """Returns the lower bound of each requirement of the package and of its tests that has one."""
    extras = SETTINGS["options.extras_require"]
    of_extras = [extras[name] for name in extras if name != "dev"]
    requirements = "\n".join([SETTINGS["options"]["install_requires"], *of_extras])
    bounds = dict(re.findall(r"^([\w.-]+)[^\n#]*?>=([\w.]+)", requirements, flags=re.MULTILINE))
    del bounds["torch"]
    return bounds


if __name__ == "__main__":
    for name, version in lower_bounds().items():
        print(f"{name}=={version}")
