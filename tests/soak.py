"""Train for a long time with random shapes, threads and DataLoader workers, and watch memory.

  python tests/soak.py --minutes 60 --out docs/soak

Four Python threads train modules of their own; every few seconds batches come from two worker processes, forked or
spawned in turn, that run a module themselves; the number of threads in torch changes all the time. One step in fifty is
compared with the reference, bit for bit with itself. Writes OUT.json and OUT.png with the memory of the process, and
ends with exit status 1 at the first failure.
"""

import argparse
import gc
import json
import random
import sys
import threading
import time
import traceback
import tracemalloc
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import numsru

THREADS = 4
MODULES = [
    {"num_layers": 2},
    {"num_layers": 2, "bidirectional": True, "dropout": 0.3},
    {"version": 2, "rnn_dropout": 0.2, "layer_norm": "post"},
    {"hidden_size": 24, "nonlinearity": "relu", "bias": False},
    {"dtype": torch.float64, "highway": False},
    {"dtype": torch.bfloat16},
]


class Features(Dataset[Tensor]):
    """Sequences that a module, in whatever process this runs, has already read."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.rnn = numsru.SRU(8, 16)

    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> Tensor:
        with torch.no_grad():
            return self.rnn(torch.randn(12, 1, 8))[0][:, 0]


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


class Soak:
    def __init__(self) -> None:
        self.stopped, self.failure, self.steps, self.compared, self.batches = threading.Event(), "", 0, 0, 0
        self.lock = threading.Lock()

    def guard(self, work: object, *arguments: object) -> None:
        try:
            work(*arguments)  # type: ignore[operator]
        except BaseException:
            self.failure = self.failure or traceback.format_exc()
            self.stopped.set()

    def train(self, seed: int) -> None:
        """Steps of one thread, with a new module every hundred of them."""
        draw = random.Random(seed)
        torch.manual_seed(seed)
        while not self.stopped.is_set():
            options = {"hidden_size": 16} | draw.choice(MODULES)
            rnn = numsru.SRU(16, **options)
            optimizer = torch.optim.SGD(rnn.parameters(), lr=1e-3)
            for step in range(100):
                if self.stopped.is_set():
                    return
                L, B = draw.randint(0, 60), draw.randint(1, 12)
                x = torch.randn(L, B, 16, dtype=rnn.weight_l0.dtype)
                lengths = torch.randint(0, L + 1, (B,)) if draw.random() < 0.5 else None
                output, c_n = rnn(x, lengths=lengths)
                loss = output.float().square().mean() if L else c_n.float().sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                assert torch.isfinite(loss), f"the loss is {loss}, {options}, L={L}, B={B}"
                if step % 50 == 49:
                    self.compare(rnn.eval(), x, lengths)
                    rnn.train()
                with self.lock:
                    self.steps += 1

    def compare(self, rnn: numsru.SRU, x: Tensor, lengths: Tensor | None) -> None:
        with torch.no_grad():
            first, again = rnn(x, lengths=lengths), rnn(x, lengths=lengths)
            with numsru.use_backend("reference"):
                expected = rnn(x, lengths=lengths)
        tolerance = 3e-2 if x.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(again, first, rtol=0, atol=0)
        torch.testing.assert_close(first, expected, rtol=tolerance, atol=tolerance)
        with self.lock:
            self.compared += 1

    def load(self) -> None:
        """Batches from worker processes."""
        for turn in range(sys.maxsize):
            # Forked while threads compute, a worker may inherit a lock that nobody will open: so do torch's own.
            context = "spawn" if turn % 2 else "forkserver"
            for batch in DataLoader(Features(), batch_size=4, num_workers=2, multiprocessing_context=context):
                assert torch.isfinite(batch).all()
                self.batches += 1
            if self.stopped.wait(20):
                return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--out", type=Path, required=True, metavar="OUT")
    args = parser.parse_args()
    soak, samples = Soak(), []
    workers = [threading.Thread(target=soak.guard, args=(soak.train, seed)) for seed in range(THREADS)]
    workers.append(threading.Thread(target=soak.guard, args=(soak.load,)))
    begin = time.monotonic()
    for worker in workers:
        worker.start()
    while not soak.stopped.wait(min(15.0, args.minutes * 6)) and time.monotonic() - begin < args.minutes * 60:
        torch.set_num_threads(random.choice([1, 2, 4]))
        gc.collect()
        if not tracemalloc.is_tracing() and time.monotonic() - begin > args.minutes * 6:
            tracemalloc.start()  # after a tenth of the time: while kernels are compiled, it would take most of it
        python, _ = tracemalloc.get_traced_memory()
        samples.append([time.monotonic() - begin, resident_bytes(), python, soak.steps])
        write(args.out, soak, samples)
    soak.stopped.set()
    for worker in workers:
        worker.join()
    write(args.out, soak, samples)
    print(soak.failure or f"{soak.steps} steps, {soak.compared} compared, {soak.batches} batches: no failure")
    return int(bool(soak.failure))


def write(out: Path, soak: Soak, samples: list[list[float]]) -> None:
    result = {
        "steps": soak.steps, "compared": soak.compared, "batches": soak.batches, "failure": soak.failure,
        "versions": {"numsru": numsru.__version__, "torch": torch.__version__},
        "columns": ["seconds", "resident bytes", "bytes of Python objects", "steps"], "samples": samples,
    }  # fmt: skip
    text = out.with_suffix(".json.tmp")
    text.write_text(json.dumps(result), encoding="utf-8")
    text.replace(out.with_suffix(".json"))
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    minutes = [s[0] / 60 for s in samples]
    axes.plot(minutes, [s[1] / 2**20 for s in samples], label="process")
    axes.plot(minutes, [s[2] / 2**20 for s in samples], label="Python objects, after a tenth of the time")
    axes.set(xlabel="minutes", ylabel="memory, MiB", ylim=(0, None))
    axes.legend()
    figure.savefig(out.with_suffix(".png"), dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
