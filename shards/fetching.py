"""How images at URLs are fetched: the options, and what a server's answer forbids."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dist_vse.common.version import __version__

if TYPE_CHECKING:
    from email.message import Message  # not here: most commands fetch nothing

ROBOTS = ("header", "full", "ignore")
REFUSED = frozenset(("noai", "noimageai", "noindex", "noimageindex"))
USER_AGENT = f"dist-vse/{__version__}"


@dataclass(frozen=True, slots=True)
class Fetching:
    """Limits hold for one process; `shared` divides those of a command among its processes."""

    connections: int = 32
    per_host: float = 0.0  # requests a second to one host; 0: as many as there are connections
    timeout_s: float = 10.0  # without an answer, or with hardly a byte
    retries: int = 2
    max_bytes: int = 50 * 10**6  # of an image
    user_agent: str = USER_AGENT
    robots: str = "header"
    """Whether X-Robots-Tag is respected, `full`: robots.txt as well, or `ignore`."""
    retry_failed: bool = False  # make the shards again in which an image could not be fetched

    @property
    def token(self) -> str:
        """The name by which robots.txt and X-Robots-Tag call us."""
        return self.user_agent.split("/")[0].strip().lower()


def refused_by(headers: "Message", token: str, directives: Collection[str] = REFUSED) -> str:
    """Return the directive of X-Robots-Tag that forbids to use the image; "" if none does.

    A line is for all (`noai, noindex`), or for one robot (`name: noai`).
    https://developers.google.com/search/docs/crawling-indexing/robots-meta-tag#xrobotstag
    """
    for line in headers.get_all("X-Robots-Tag", []):
        name, colon, rest = str(line).rpartition(":")
        if colon and name.strip().lower() != token:
            continue
        for directive in rest.split(","):
            if directive.strip().lower() in directives:
                return directive.strip().lower()
    return ""
