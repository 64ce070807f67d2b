"""Many texts to ids in several processes, in order; ``python -m mlxgpt.common.tokenizers.parallel FOLDER`` is one.

The processes talk over pipes: a request is a count, the byte length of each text and the texts; the answer is the
count, the number of ids of each text and the ids. A worker ends when its input does, so none outlives a killed parent.
"""

import os
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import IO

import numpy as np

from mlxgpt.common.errors import RunError, UserError
from mlxgpt.common.tokenizers.load import load_tokenizer
from mlxgpt.common.tokenizers.protocol import Tokenizer

_FAILED = 0xFFFFFFFF


def encode_in_order(
    tokenizer: Tokenizer, folder: Path, groups: Iterable[list[str]], workers: int
) -> Iterator[list[np.ndarray]]:
    """The ids of each group of texts, in the groups' order; ``folder`` is where the tokenizer is saved.

    Raises:
        RunError: a worker died.
    """
    if workers <= 1:
        for group in groups:
            yield tokenizer.encode_batch(group)
        return
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "mlxgpt.common.tokenizers.parallel", str(folder)]
    processes: list[subprocess.Popen[bytes]] = []
    free: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
    threads = ThreadPoolExecutor(workers)
    try:
        for _ in range(workers):
            # Its own session: Ctrl-C is for the parent, which then closes the pipes.
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
            )
            processes.append(process)
            free.put(process)
        waiting: deque[Future[list[np.ndarray]]] = deque()
        for group in groups:
            waiting.append(threads.submit(_ask, free, group))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for process in processes:
            process.kill()
        threads.shutdown(cancel_futures=True)
        for process in processes:
            process.communicate()


def _ask(free: "SimpleQueue[subprocess.Popen[bytes]]", texts: list[str]) -> list[np.ndarray]:
    process = free.get()
    assert process.stdin and process.stdout
    data = [text.encode() for text in texts]
    try:
        process.stdin.write(struct.pack("<I", len(data)) + np.array([len(item) for item in data], "<u8").tobytes())
        process.stdin.writelines(data)
        process.stdin.flush()
        (count,) = struct.unpack("<I", _exactly(process.stdout, 4))
        if count == _FAILED:
            (size,) = struct.unpack("<I", _exactly(process.stdout, 4))
            raise UserError(_exactly(process.stdout, size).decode())
        sizes = np.frombuffer(_exactly(process.stdout, 8 * count), "<u8")
        ids = np.frombuffer(_exactly(process.stdout, 4 * int(sizes.sum())), "<i4")
    except (BrokenPipeError, EOFError):
        raise RunError(f"a tokenizing process ended with status {process.wait()}: out of memory?") from None
    finally:
        free.put(process)
    return np.split(ids, np.cumsum(sizes[:-1]).astype(np.int64)) if count else []


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _work(folder: Path, requests: IO[bytes], answers: IO[bytes]) -> None:
    tokenizer = load_tokenizer(folder)
    while head := requests.read(4):
        (count,) = struct.unpack("<I", head)
        sizes = np.frombuffer(_exactly(requests, 8 * count), "<u8")
        texts = [_exactly(requests, int(size)).decode() for size in sizes]
        try:
            ids = tokenizer.encode_batch(texts)
        except UserError as error:
            message = str(error).encode()
            answers.write(struct.pack("<II", _FAILED, len(message)) + message)
        else:
            answers.write(struct.pack("<I", count) + np.array([len(item) for item in ids], "<u8").tobytes())
            answers.writelines(np.ascontiguousarray(item, "<i4").tobytes() for item in ids)
        answers.flush()


if __name__ == "__main__":
    try:
        _work(Path(sys.argv[1]), sys.stdin.buffer, sys.stdout.buffer)
    except (EOFError, BrokenPipeError):
        os._exit(1)  # the parent is gone
