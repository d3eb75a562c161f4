"""A real browser on the MLflow UI. For the README: `python -m tests.integration.browser MODEL FILE.png`."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlparse

if TYPE_CHECKING:
    from playwright.sync_api import Page

ARGUMENTS = (
    "--no-sandbox",  # CI runs as root.
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


def chromium() -> str | None:
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def open_page() -> Iterator[Page]:
    """One page that reaches nothing but this machine."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=list(ARGUMENTS))
        context = browser.new_context(viewport={"width": 1400, "height": 800}, service_workers="block")
        context.route(
            "**/*",
            lambda route: (
                route.continue_()
                if urlparse(route.request.url).hostname in {"127.0.0.1", "localhost", None}
                else route.abort()
            ),
        )
        yield context.new_page()
        browser.close()


def visit(page: Page, path: str, until: str, timeout_seconds: float = 60.0) -> str:
    """Open a page of the UI, wait until it shows `until`, and return its text."""
    # Never "networkidle": the UI polls for ever. A blank page first: a change of the fragment alone loads nothing.
    page.goto("about:blank")
    page.goto(f"{os.environ['MLFLOW_TRACKING_URI']}/#{path}", wait_until="load", timeout=timeout_seconds * 1000)
    page.get_by_text(until).first.wait_for(timeout=timeout_seconds * 1000)
    page.wait_for_timeout(1500)
    return page.inner_text("body")


def main(model: str, picture: str) -> None:
    from infra.endpoints import ensure

    ensure()
    with open_page() as page:
        visit(page, f"/models/{model}", "champion")
        # Without MLflow's assistant, a panel at the right.
        page.screenshot(path=Path(picture), clip={"x": 0, "y": 0, "width": 1040, "height": 800})


if __name__ == "__main__":
    main(*sys.argv[1:])
