"""A clone of the project is a folder named vvupipe: working beside it must not shadow the package."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(60)
def test_commands_work_beside_a_folder_named_vvupipe(tmp_path):
    (tmp_path / "vvupipe").mkdir()
    (tmp_path / "kernels").mkdir()
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    command = shutil.which("vvupipe", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not command:
        pytest.skip("the vvupipe command is not installed")
    process = subprocess.Popen(
        [command, "device", "block", "--file", image, "--socket", "s.sock", "--json"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert '"ready"' in process.stdout.readline()
    sibling = subprocess.run(
        [command, "run", "--vhost-user-blk", "s.sock", "--timeout", "20s", "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=50,
        check=False,
    )
    process.terminate()
    assert process.wait(20) == 0
    process.stdout.close()
    assert sibling.returncode == 0, sibling.stderr
