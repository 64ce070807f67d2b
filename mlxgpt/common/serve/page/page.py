"""The chat page as one HTML answer: style and scripts stand in it, and its policy allows exactly these."""

import base64
import hashlib
import re
from pathlib import Path

HERE = Path(__file__).parent
_STYLE = re.compile(r'<link rel="stylesheet" href="([^"]+)">')
_SCRIPT = re.compile(r'<script src="([^"]+)"></script>')
# a script with one of these would end early, or not at all, inside HTML
_ENDS_EARLY = re.compile(r"</?script|\r", re.IGNORECASE)


def page() -> tuple[bytes, dict[str, str]]:
    """The page and the headers that it is sent with; read once, when the server starts."""
    styles: list[str] = []
    scripts: list[str] = []

    def inline(found: re.Match[str], tag: str, hashes: list[str]) -> str:
        text = (HERE / found[1]).read_text(encoding="utf-8")
        assert not _ENDS_EARLY.search(text) and f"</{tag}" not in text, f"{found[1]} cannot stand inside HTML"
        hashes.append(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'")
        return f"<{tag}>{text}</{tag}>"

    html = (HERE / "index.html").read_text(encoding="utf-8")
    html = _STYLE.sub(lambda found: inline(found, "style", styles), html)
    html = _SCRIPT.sub(lambda found: inline(found, "script", scripts), html)
    policy = {
        "default-src": "'none'",
        "script-src": " ".join(scripts),
        "style-src": " ".join(styles),
        "connect-src": "'self'",
        "img-src": "data:",  # the icon of the tab
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        # text becomes HTML through DOMPurify or not at all
        "require-trusted-types-for": "'script'",
        "trusted-types": "dompurify",
    }
    return html.encode(), {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cache-Control": "no-cache",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }
