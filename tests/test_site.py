"""The site builds without a warning, and loads nothing from the network."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

LOADED = re.compile(r"""<(?:script|img|link)\b[^>]*?\b(?:src|href)=["'](https?:)?//[^"']+""")


@pytest.mark.timeout(200)
def test_the_site_builds_and_loads_nothing_from_the_network(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    made = subprocess.run(build, cwd=ROOT, env=env, capture_output=True, text=True, timeout=180)
    assert made.returncode == 0, made.stdout + made.stderr
    pages = {path.relative_to(tmp_path).as_posix(): path for path in tmp_path.rglob("*.html")}
    assert {"index.html", "start/index.html", "reference/api/index.html"} <= pages.keys()
    for name, path in pages.items():
        loaded = LOADED.search(path.read_text(encoding="utf-8"))
        assert loaded is None, f"{name}: {loaded}"
