"""The README's figures and `results/speculation.csv` are what the script makes of the raw results."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_nothing_is_typed_by_hand(tmp_path: Path) -> None:
    for name in ("results", "pretrained"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
    readme = shutil.copy(ROOT / "README.md", tmp_path)
    (tmp_path / "results/speculation.csv").unlink()
    command = [sys.executable, ROOT / "scripts/write_results.py", f"results={tmp_path / 'results'}"]
    command += [f"pretrained={tmp_path / 'pretrained'}", f"readme={readme}", f"docs={tmp_path / 'docs'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = [path.relative_to(tmp_path) for path in (tmp_path / "docs").iterdir()]
    assert {p.name for p in written} == {p.name for p in (ROOT / "docs").iterdir()}
    for name in ["README.md", "results/speculation.csv", *written]:
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), f"{name} is out of date"
