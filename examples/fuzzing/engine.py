"""One surface in a process of its own: inputs, what became of each, and the worst of them.

Half of the inputs change the structure of valid files, half their bytes. One in fifty, of the
first kind, is hypothesis's; the others are atheris's, which looks for inputs that reach new lines,
or where there is none, those of a generator of random numbers.
"""

import base64
import json
import logging
import os
import random
import resource
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unicodedata import category

from fuzzing.guard import watch
from fuzzing.mutation import random_choice
from fuzzing.surfaces import Surface
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from transformers.utils.logging import disable_progress_bar

from fusion_upcycle.errors import UpcyclingError

try:
    import atheris
except ImportError:  # no wheel for this Python or this machine
    atheris = None

#: Bounds of one input; every surface's files are of kilobytes.
MOST_CPU_SECONDS = 2.0
MOST_MEGABYTES = 256
_SHARE_OF_HYPOTHESIS = 0.02  # it takes 7 ms for an input, atheris 0.1
_CORPUS, _LENGTH = 64, 256  # what atheris begins with: files, bytes of choices in each
_LONGEST = 5000  # characters of a message
#: What reads strangers' files.
_READERS = (
    "fusion_upcycle.untrusted",
    "fusion_upcycle.files",
    "fusion_upcycle.checkpoint",
    "fusion_upcycle.conversion.inherited",
    "fusion_upcycle.conversion.matching",
    "fusion_upcycle.importance.scores",
    "fusion_upcycle.merging",
    "fusion_upcycle.comparison",
    "fusion_upcycle.verify",
)
_KEPT = 20  # kinds of bad things of a surface


@contextmanager
def instrumented() -> Iterator[None]:
    """What is imported in the block tells atheris which lines an input reaches."""
    if atheris is None:
        yield
        return
    with (
        Path(os.devnull).open("w") as nowhere,
        redirect_stderr(nowhere),
        atheris.instrument_imports(include=list(_READERS)),
    ):
        yield


@dataclass
class Outcome:
    """What became of the inputs of a surface.

    Attributes:
        inputs: engine -> how many.
        refused: by an error of ours.
        bad: kind of what went wrong -> number, where, and the first input in base64.
        cpu_seconds, megabytes: the most that one input took, of memory beyond the most before it.
    """

    surface: str
    inputs: dict[str, int] = field(default_factory=dict)
    refused: int = 0
    bad: dict[str, dict[str, Any]] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    megabytes: float = 0.0
    total_cpu_seconds: float = 0.0


class Runner:
    """Puts inputs through a surface and looks at what they do."""

    def __init__(self, surface: Surface, folder: Path, done: Any):
        self.surface, self.folder, self.done = surface, folder, done
        self.outcome = Outcome(surface.name)
        self._current, self._engine = b"", ""

    def bad(self, kind: str, where: str = "") -> None:
        """Keep one example of each kind."""
        found = self.outcome.bad
        if kind in found or len(found) < _KEPT:
            entry = {"where": where, "input": base64.b64encode(self._current[:20000]).decode()}
            found.setdefault(kind, {"count": 0, **entry})["count"] += 1

    def run(self, content: bytes, engine: str) -> None:
        self._current = content
        peak, started = _peak(), time.process_time()
        try:
            self.surface.use(self.folder, content)
        except UpcyclingError as error:
            self.outcome.refused += 1
            if not 20 <= len(text := str(error)) <= _LONGEST or any(map(_hidden, text)):
                self.bad("message", text[:300])
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)
            ours = [f for f in last if "fusion_upcycle" in f.filename] or last
            place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
            self.bad(f"{type(error).__name__} at {place}", f"{error!r:.300}")
        seconds, grown = time.process_time() - started, _peak() - peak
        outcome = self.outcome
        outcome.inputs[engine] = outcome.inputs.get(engine, 0) + 1
        outcome.cpu_seconds = max(outcome.cpu_seconds, seconds)
        outcome.megabytes = max(outcome.megabytes, grown)
        outcome.total_cpu_seconds += seconds
        if seconds > MOST_CPU_SECONDS * self.surface.patience:
            self.bad("too slow", f"{seconds:.1f} CPU s")
        if grown > MOST_MEGABYTES:
            self.bad("too much memory", f"{grown:.0f} MB")
        self.done.value += 1


def _hidden(character: str) -> bool:
    """Whether a terminal obeys it, or nobody sees it."""
    return character not in "\n\t" and category(character) in ("Cc", "Cf", "Cs")


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fuzz(surface: Surface, inputs: int, number: int, folder: Path, done: Any, out: Path) -> None:
    """Run a surface to its end and write its outcome; ends the process.

    Args:
        inputs: how many.
        number: seed.
        done: shared, counts inputs.
        out: file of the outcome.
    """
    os.chdir(folder)
    logging.disable(logging.CRITICAL)
    disable_progress_bar()
    log = os.open(folder.parent / f"{surface.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    surface.prepare(folder)
    for content in surface.samples():
        surface.use(folder, content)  # valid ones are read; and what is imported late is there
    runner = Runner(surface, folder, done)
    own = folder.parent / "own"
    set_hypothesis_home_dir(own)
    watch(folder, own, lambda what: runner.bad(f"outside: {what.partition(':')[0]}", what))

    def end() -> None:
        out.write_text(json.dumps(vars(runner.outcome)))
        os._exit(0)

    by_hypothesis = max(1, int(inputs * _SHARE_OF_HYPOTHESIS))
    _hypothesis(runner, by_hypothesis, number)
    rest = inputs - by_hypothesis
    if atheris is None:
        choose = random_choice(number)
        for _ in range(rest):
            runner.run(surface.made(choose), "random")
        end()
    _atheris(runner, rest, number, end)


def warm_up(own: Path) -> None:
    """Have hypothesis look through all modules for constants once, before the forks.

    Args:
        own: folder where it keeps them.
    """
    set_hypothesis_home_dir(own)

    @seed(0)
    @settings(max_examples=30, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.integers(0, 9), min_size=5))
    def examples(numbers: list[int]) -> None:
        assert numbers

    examples()


def _hypothesis(runner: Runner, inputs: int, number: int) -> None:
    """Structure alone; nothing is shrunk, since nothing is raised."""

    @seed(number)
    @settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def examples(data: Any) -> None:
        def choose(most: int) -> int:
            return int(data.draw(st.integers(0, most)))

        runner.run(runner.surface.structured(choose), "hypothesis")

    examples()
    missing = inputs - sum(runner.outcome.inputs.values())  # it stops early where it repeats itself
    choose = random_choice(number + 1)
    for _ in range(missing):
        runner.run(runner.surface.structured(choose), "random")


def _atheris(runner: Runner, inputs: int, number: int, end: Callable[[], None]) -> None:
    left = inputs

    def one(data: bytes) -> None:
        nonlocal left
        provider = atheris.FuzzedDataProvider(data)

        def choose(most: int) -> int:
            return int(provider.ConsumeIntInRange(0, most))

        runner.run(runner.surface.made(choose), "atheris")
        left -= 1
        if left == 0:
            end()

    # It would begin with nothing, by which every choice is the first.
    corpus = runner.folder.parent / "own" / "corpus"
    corpus.mkdir(parents=True)
    generator = random.Random(number)
    for index in range(_CORPUS):
        (corpus / str(index)).write_bytes(generator.randbytes(_LENGTH))
    atheris.Setup(
        [
            "fuzz",
            str(corpus),
            f"-seed={number + 1}",
            f"-runs={inputs + 1000}",
            f"-max_len={_LENGTH}",
            "-len_control=0",
            "-verbosity=0",
            "-timeout=60",
            "-rss_limit_mb=6000",
        ],
        one,
    )
    atheris.Fuzz()
