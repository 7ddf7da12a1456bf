"""A page of ours in headless Chromium."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)


def in_browser(page: Path, script: str) -> dict[str, Any]:
    """Open the page, run `script` (it fills `found`), and return what it found."""
    reads = f"<script>const found = {{}}; {script}; document.title = JSON.stringify(found)</script>"
    opened = page.with_name("opened.html")
    opened.write_text(page.read_text("utf-8").replace("</body>", f"{reads}</body>"), "utf-8")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--dump-dom")
    made = subprocess.run(
        [BROWSER, *flags, opened.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    title = re.search(r"<title>(.*?)</title>", made.stdout, re.DOTALL)
    assert title is not None, made.stderr
    return dict(json.loads(unescape(title[1])))
