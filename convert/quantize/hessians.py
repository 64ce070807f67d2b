"""The sums x^T x that a calibration text gave, kept in a folder: either backend solves from them to the same bits."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from mlxgpt.common.errors import UserError
from mlxgpt.common.files import read_json, write_json
from mlxgpt.common.folders.tensors import read_tensors, write_tensors
from mlxgpt.common.inference.calibration import Inputs

FILE = "hessians.json"
VERSION = 1


class Hessians:
    """A folder of them: read where it is complete, else filled.

    Args:
        folder: there or not; an empty one is filled.
        asked: what they depend on, as JSON has it: the model's digest, the text's, bits and method.

    Raises:
        UserError: the folder holds something else, those of something else, or damaged ones.
    """

    def __init__(self, folder: Path, asked: dict[str, Any]):
        self.folder, self._asked, self._files = folder, asked, dict[str, str]()
        self.complete = (folder / FILE).is_file()
        if self.complete:
            self._read()
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"--hessians {folder}: holds no {FILE}: expected a new or an empty folder, or saved ones")
        elif not folder.parent.is_dir():
            raise UserError(f"{folder.parent}: no such folder")

    def _read(self) -> None:
        found = read_json(self.folder / FILE)
        settings, files = found.get("of"), found.get("files")
        if found.get("version") != VERSION or not isinstance(settings, dict) or not isinstance(files, dict):
            raise UserError(f"{self.folder / FILE}: expected version {VERSION}, with what it is of and its files")
        for name, asked in self._asked.items():
            found = settings.get(name)
            if found != asked:
                if isinstance(found, dict) and isinstance(asked, dict):  # of each module: the first that differs
                    module = next(each for each in (*asked, *found) if asked.get(each) != found.get(each))
                    name, found, asked = f"{name} of {module}", found.get(module), asked.get(module)
                had = f"{name} {_short(found)}, and {_short(asked)} is asked for"
                raise UserError(f"--hessians {self.folder}: gathered for {had}: expected another folder")
        for place, digest in files.items():
            path = self.folder / f"{place}.safetensors"
            if not path.is_file() or _sha256(path) != digest:
                raise UserError(
                    f"{path}: {'damaged' if path.is_file() else 'missing'}: expected sha256 {digest[:16]}..."
                )
        self._files = files

    def load(self, place: str) -> Inputs:
        """Those of a place, such as h.0.attn.q_proj or head.

        Raises:
            UserError: there are none.
        """
        if place not in self._files:
            raise UserError(f"--hessians {self.folder}: none of {place}: expected another folder")
        arrays = read_tensors(self.folder / f"{place}.safetensors")
        return Inputs(arrays["gram"], arrays["mean"], int(arrays["tokens"][0]))

    def save(self, place: str, inputs: Inputs) -> None:
        """Keeps those of a place."""
        self.folder.mkdir(exist_ok=True)
        path = self.folder / f"{place}.safetensors"
        arrays = {"gram": inputs.gram, "mean": inputs.mean, "tokens": np.array([inputs.tokens], np.int64)}
        write_tensors(path, arrays, metadata={})
        self._files[place] = _sha256(path)

    def finish(self) -> None:
        """Says that all are there."""
        if not self.complete and self._files:
            write_json(self.folder / FILE, {"version": VERSION, "of": self._asked, "files": self._files})

    def discard(self) -> None:
        """Removes what was filled in part."""
        if not self.complete and self._files:
            for place in self._files:
                (self.folder / f"{place}.safetensors").unlink(missing_ok=True)
            self.folder.rmdir()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _short(value: Any) -> str:
    return f"{value[:16]}..." if isinstance(value, str) and len(value) == 64 else str(value)
