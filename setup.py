"""Puts the recipes, which lie at the top of a checkout, into the package; all else is in setup.cfg."""

from setuptools import find_packages, setup


setup(
    packages=[*find_packages(include=["maple_trl*"]), "maple_trl.recipes"],
    package_dir={"maple_trl.recipes": "recipes"},
)
