"""What is kept of a URL: all but passwords and signatures."""

import re
from urllib.parse import urlsplit, urlunsplit

# Of Amazon, Google, Azure, Alibaba, Tencent, CloudFront, and what others call such parameters.
_CREDENTIAL = re.compile(
    r"x-(amz|goog|oss|ms|cos)-.*|q-(sign|ak|key|header|url).*|(x-)?sig|expires|policy|key-pair-id"
    r"|(aws|oss)accesskeyid|googleaccessid|api_?key|auth|hmac|jwt|pwd"
    r"|.*(token|secret|passw|signature|credential).*",
    re.IGNORECASE,
)


def public_url(url: str) -> str:
    """Return a URL without user, password and the parameters that let one in.

    All else stays: `?id=3` may say which image it is.
    """
    try:
        parts = urlsplit(url)
    except ValueError:  # brackets that hold no address, say
        return url.partition("?")[0]
    query = [p for p in parts.query.split("&") if not _CREDENTIAL.fullmatch(p.partition("=")[0])]
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "&".join(query), ""))
