"""Hand the name, version and requirements of settings.ini to setuptools."""

import shlex
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

parser = ConfigParser(delimiters=["="])
parser.read("settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]


def split(key):
    return shlex.split(settings.get(key, ""))


class BuildWithData(build_py):
    """Put the tiny models and tasks into the package, so that an installed wheel can run the demo."""

    def run(self):
        super().run()
        if not self.editable_mode:
            for part in ("models", "tasks", "mmlu", "suites"):
                target = Path(self.build_lib, "merge_lab", "data", part)
                shutil.copytree(Path("data", part), target, dirs_exist_ok=True)


extras = {
    key.removesuffix("_requirements"): split(key)
    for key in settings
    if key.endswith("_requirements")
}
python_versions = [f"3.{minor}" for minor in range(10, 14)]

setup(
    version=settings["version"],
    description=settings["description"],
    long_description=Path("README.md").read_text(encoding="utf-8")
    if Path("README.md").exists()
    else settings["description"],
    long_description_content_type="text/markdown",
    author=settings["author"],
    license="Apache-2.0",
    keywords=settings["keywords"],
    url=settings["git_url"],
    classifiers=[f"Programming Language :: Python :: {v}" for v in python_versions],
    packages=find_packages(include=["merge_lab", "merge_lab.*"]),
    include_package_data=True,
    cmdclass={"build_py": BuildWithData},
    install_requires=split("requirements"),
    extras_require=extras,
    entry_points={
        "console_scripts": split("console_scripts"),
        "nbdev": ["merge_lab=merge_lab._modidx:d"],
    },
)
