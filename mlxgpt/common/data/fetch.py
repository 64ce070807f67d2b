"""Downloads known corpora, or takes a copy, and checks their sha256; an interrupted download resumes."""

import hashlib
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mlxgpt.common.errors import UserError
from mlxgpt.common.files import put


class Known(NamedTuple):
    """A corpus: its address, the checksum and size of its one file, and the name it is kept under."""

    url: str
    sha256: str
    size: int
    file: str
    about: str


CORPORA = {
    "tinyshakespeare": Known(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        1_115_394,
        "tinyshakespeare.txt",
        "Shakespeare, public domain",
    ),
    "botchan": Known(
        "https://raw.githubusercontent.com/google/sentencepiece/master/data/botchan.txt",
        "464bd5300c24fce16fcc4555d4231a57632caae4d0090ad6aa92854a3b227ba7",
        278_779,
        "botchan.txt",
        "Natsume's Botchan in English, Project Gutenberg",
    ),
}
_BLOCK = 1 << 16


def fetch(known: Known, folder: Path, from_file: Path | None = None, say: Callable[[str], None] = print) -> Path:
    """The corpus's file in ``folder``: there already, copied from ``from_file``, or downloaded.

    Raises:
        UserError: the checksum differs, there is no network, or the download was interrupted (a new call resumes).
    """
    final = folder / known.file
    if final.is_file():
        found = _sha256(final)
        if found == known.sha256:
            say(f"{final}: here already, sha256 {found[:16]}...")
            return final
        raise UserError(f"{final}: sha256 {found}: expected {known.sha256}: remove it to fetch it again")
    if from_file is not None and not from_file.is_file():
        raise UserError(f"{from_file}: no such file")
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f".{known.file}.part"
    if from_file is not None:
        shutil.copyfile(from_file, part)
    else:
        _download(known, part, say)
    found, size = _sha256(part), part.stat().st_size
    if found != known.sha256:
        part.unlink()
        where = from_file or known.url
        raise UserError(f"{where}: {size} bytes, sha256 {found}: expected {known.size} bytes, sha256 {known.sha256}")
    put(part, final)
    say(f"{final}: {size:,} bytes, sha256 {found[:16]}... as expected")
    return final


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(known: Known, part: Path, say: Callable[[str], None]) -> None:
    """Appends to ``part`` what it lacks of the file at the address."""
    have = part.stat().st_size if part.exists() else 0
    if have >= known.size:
        part.unlink()
        have = 0
    request = urllib.request.Request(known.url, headers={"User-Agent": "mlxgpt"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        say(f"{known.url}: resuming at byte {have:,} of {known.size:,}")
    else:
        say(f"{known.url}: {known.size:,} bytes")
    advice = "download it elsewhere and give it with --from FILE"
    try:
        with urllib.request.urlopen(request, timeout=30) as answer, open(part, "ab" if have else "wb") as file:
            if have and answer.status != 206:
                file.truncate(0)  # the server does not continue: it sends everything
            while block := answer.read(_BLOCK):
                file.write(block)
                if file.tell() > known.size:
                    break  # not this file: the checksum says so
    except urllib.error.HTTPError as error:
        raise UserError(f"{known.url}: the server answers {error.code} {error.reason}: {advice}") from None
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        have = part.stat().st_size if part.exists() else 0
        reason = getattr(error, "reason", None) or error
        if have:
            raise UserError(f"{known.url}: interrupted at byte {have:,} ({reason}): run this again to resume") from None
        raise UserError(f"{known.url}: cannot be reached ({reason}): {advice}") from None
    have = part.stat().st_size
    if have < known.size:
        raise UserError(f"{known.url}: interrupted at byte {have:,} of {known.size:,}: run this again to resume")
