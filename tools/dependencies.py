"""Prints the requirements of pyproject.toml, with the extras named: dependencies.py demo test."""

import sys

from setuptools.config.pyprojecttoml import read_configuration

project = read_configuration("pyproject.toml", expand=False)["project"]
requirements = list(project["dependencies"])
for extra in sys.argv[1:]:
    requirements += project["optional-dependencies"][extra]
print("\n".join(requirements))
