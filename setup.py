"""Place the repository's ``kernels/`` folder at ``florence_fast.kernels``; everything else is in pyproject.toml.

A top-level distribution named ``kernels`` would shadow Hugging Face's package of that name, so the folder
is mapped below ours and never installed as itself.
"""

from setuptools import find_packages, setup

KERNELS = ["florence_fast.kernels", *(f"florence_fast.kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=[*find_packages(include=["florence_fast", "florence_fast.*"]), *KERNELS],
    package_dir={"florence_fast": "florence_fast", "florence_fast.kernels": "kernels"},
    package_data={"florence_fast.kernels": ["configs/*.json"]},
)
