"""What `train.py` measures, one model a process: `python train_job.py JSON_ARGUMENTS`.

The process trains with `fusion_upcycle.training.run.train`, as `method=continued_pretraining` does,
and stops in front of a forward pass until a line comes on stdin. Models that are compared so take
turns of a few steps each. It prints one JSON line when it is warm, and one after each turn.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WARM_UP = 2
#: More than any measurement takes: the process is ended by the one that started it.
BUDGET = 10**12


class Turns:
    """A forward pre-hook: the time from one forward pass to the next is that of a whole step.

    Backward pass, clipping, optimizer, logs and the next batch are in it.
    """

    def __init__(self, steps: int, report: Any, *, cuda: bool):
        self.steps, self.report, self.cuda = steps, report, cuda
        self.passes = 0
        self.measured: list[dict[str, float]] = []
        self.before = (0.0, 0.0)

    def __call__(self, *_: Any) -> None:
        now = self._now()
        if self.passes > WARM_UP:
            wall, cpu = (end - start for end, start in zip(now, self.before, strict=True))
            self.measured.append({"wall": wall, "cpu": cpu})
        if self.passes >= WARM_UP and len(self.measured) % self.steps == 0:
            # Of several processes the first one waits, and the others for it, in what they share.
            if self.report is not None:
                tell(self.report, {"steps": self.measured, "peak_bytes": self._peak_bytes()})
                if not sys.stdin.readline():
                    raise SystemExit
            self.measured = []
            now = self._now()
        self.passes += 1
        self.before = now

    def _now(self) -> tuple[float, float]:
        if self.cuda:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter(), self._cpu_seconds()

    def _cpu_seconds(self) -> float:
        """Of all processes together."""
        import torch
        import torch.distributed as dist

        seconds = torch.tensor(time.process_time(), dtype=torch.float64)
        if dist.is_initialized() and dist.get_world_size() > 1 and not self.cuda:
            dist.all_reduce(seconds)
        return float(seconds)

    def _peak_bytes(self) -> int:
        """Of the GPU's memory, or of the process's."""
        if self.cuda:
            import torch

            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tell(report: Any, message: dict[str, Any]) -> None:
    print(json.dumps(message), file=report, flush=True)


def work(
    model: str, folder: str, options: dict[str, Any], steps: int, limit_bytes: int, report: Any
) -> None:
    """Train until the end of stdin.

    Args:
        model: folder of the model.
        folder: for logs and packed data.
        steps: of a turn.
        limit_bytes: address space of a process without a GPU.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fusion_upcycle.training.options import make_training_options
    from fusion_upcycle.training.run import Origin, Places, train
    from fusion_upcycle.training.sharding import load_part

    cuda = options["accelerator"] != "cpu" and torch.cuda.is_available()
    if not cuda:
        resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    asked = make_training_options(tokens=BUDGET, **options)
    if asked.strategy == "fsdp":
        part = load_part(model, asked)
        trained, given = part.model, part
    else:
        trained = given = AutoModelForCausalLM.from_pretrained(model)
    first = os.environ.get("RANK", "0") == "0"
    trained.register_forward_pre_hook(Turns(steps, report if first else None, cuda=cuda))
    text = {"_target_": "fusion_upcycle.demo.domain_text", "domain": "prose", "split": "train"}
    train(
        given,
        AutoTokenizer.from_pretrained(model),
        asked,
        data={"prose": text},
        places=Places(Path(folder) / "work", Path(folder) / "logs"),
        origin=Origin(model),
        progress=False,
    )


class Worker:
    """A process that trains one model, whenever it is its turn.

    Args:
        model: its folder; logs go beside it.
        options: of training.
        steps: of a turn.
        memory_gib: that it may take without a GPU.
    """

    def __init__(self, model: Path, options: dict[str, Any], steps: int, memory_gib: float):
        self._work = Path(tempfile.mkdtemp(dir=model.parent))
        self._arguments = {
            "model": str(model),
            "folder": str(self._work),
            "options": options,
            "steps": steps,
            "limit_bytes": int(memory_gib * 2**30),
        }
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> dict[str, Any]:
        """Begin, and wait until it is warm, or has failed; says which."""
        with (self._work / "log").open("w") as log:
            self._process = subprocess.Popen(
                [*self._python(), __file__, json.dumps(self._arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        told = self._told()
        return {"failed": told["failed"]} if "failed" in told else {}

    def _python(self) -> list[str]:
        """One process, or torchrun and several."""
        devices = self._arguments["options"].get("devices", 1)
        several = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(devices)]
        return [sys.executable, *(several if devices > 1 else [])]

    def turn(self) -> dict[str, Any]:
        """Some steps: wall and CPU seconds of each, and peak memory."""
        assert self._process is not None and self._process.stdin is not None
        print("go", file=self._process.stdin, flush=True)
        told = self._told()
        if "failed" in told:
            raise SystemExit(told["failed"])
        return told

    def end(self) -> None:
        if self._process is not None:
            self._process.terminate()  # torchrun ends the processes that it has started
            self._process.communicate()

    def _told(self) -> dict[str, Any]:
        assert self._process is not None and self._process.stdout is not None
        if line := self._process.stdout.readline():
            return dict(json.loads(line))
        last = (self._work / "log").read_text().strip().splitlines()[-1:]
        return {"failed": f"exit code {self._process.wait()}: {''.join(last)}"}


def main(arguments: str, report: Any) -> None:
    """Work until the end of stdin, or tell what stands in the way."""
    try:
        work(**json.loads(arguments), report=report)
    except Exception as error:
        tell(report, {"failed": " ".join(str(error).split()) or type(error).__name__})
        raise


if __name__ == "__main__":
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    main(sys.argv[1], channel)
