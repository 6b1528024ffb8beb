"""What Qwen-Image's relatives start from: machines without torchvision, and checkpoints of two kinds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from omni_rollout.nano.random_weights import qwen_image_edit_plus
from tests.parity.relatives import FAMILIES, Relative


def test_checkpoints_that_modulate_input_images_by_the_targets_time(tmp_path: Path) -> None:
    """Edit-Plus of 2509: no `zero_cond_t`."""
    sizes = {"layers": 2, "heads": 4, "head_dim": 32, "joint_dim": 64, "seed": 4}
    qwen_image_edit_plus.build(tmp_path, zero_cond_t=False, **sizes)
    relative = Relative("qwen_image_edit_plus", "bfloat16", tmp_path)
    try:
        assert not relative.policy.config.zero_cond_t
        assert all(relative.equal(relative.generate(relative.mixed())))
    finally:
        relative.engine.close()


WITHOUT_TORCHVISION = """
import importlib.machinery
import sys

found = importlib.machinery.PathFinder.find_spec


def without(name, path=None, target=None):
    return None if name.partition(".")[0] == "torchvision" else found(name, path, target)


importlib.machinery.PathFinder.find_spec = staticmethod(without)
from pathlib import Path
from relatives import FAMILIES, KINDS, Relative

for family in FAMILIES:
    one = Relative(family, "float32", Path(sys.argv[1]) / family)
    sampling, images = KINDS[family](0)
    assert one.equal(one.generate([one.request(0, images, **sampling)])) == [True]
    one.engine.close()
assert "torchvision" not in sys.modules
print("started without", *FAMILIES)
"""


def test_every_family_starts_without_torchvision(tmp_path: Path) -> None:
    root, here = Path(__file__).parents[2], Path(__file__).parent
    path = os.pathsep.join([str(here), str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCHVISION, str(tmp_path)],
        capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": path}, timeout=300,
    )  # fmt: skip
    assert f"started without {' '.join(FAMILIES)}" in done.stdout, done.stderr[-2000:]
