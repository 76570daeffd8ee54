"""The tables of a report, as data: what is written where, bold, underlined, and why."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean

from fusion_upcycle.comparison.metrics import written
from fusion_upcycle.comparison.rows import Row, Score, Task

#: Section of a report, its number, heading of the column, how it is written.
FACTS = (
    ("cost", "total_parameters", "parameters", "count"),
    ("cost", "active_parameters", "active per token", "count"),
    ("cost", "flops_per_token", "FLOPs per token", "count"),
    ("cost", "bytes", "bytes", "count"),
    ("cost", "prefill_tokens_per_second", "prefill tokens/s", "count"),
    ("cost", "decode_tokens_per_second", "decode tokens/s", "count"),
    ("cost", "peak_memory_bytes", "peak memory, bytes", "count"),
    ("routing", "load_cv", "load CV", "ratio"),
    ("routing", "dead_experts", "dead experts", "whole"),
    ("routing", "experts", "experts", "whole"),
    ("routing", "entropy_bits", "router entropy, bits", "ratio"),
    ("routing", "specialisation_bits", "specialisation, bits", "ratio"),
    ("routing", "left_out", "taken by no expert", "ratio"),
)
SMALLEST_SHARE = 1e-9


@dataclass(frozen=True)
class Cell:
    """One number.

    Attributes:
        value: None where there is none.
        text: as written.
        mark: best, second or nothing.
    """

    value: float | None
    text: str
    mark: str = ""


@dataclass(frozen=True)
class Line:
    """One row of a table: its name, its heading, its cells, and what it comes from."""

    label: str
    group: str
    cells: Sequence[Cell]
    row: Row | None


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        key: of its files and anchors.
        title: above it.
        note: below it, how to read it.
        headers: of the columns after the first.
        lines: in groups, which follow each other.
    """

    key: str
    title: str
    note: str
    headers: Sequence[str]
    lines: Sequence[Line]


@dataclass(frozen=True)
class Column:
    """How one column is made of a row."""

    header: str
    score: Callable[[Row], Score | None]
    form: str
    lower: bool | None = None
    spread: bool = field(default=False)


def make_tables(rows: Sequence[Row], tasks: Sequence[Task]) -> list[Table]:
    """Every table for which there are numbers."""
    tables = [
        scores(rows, tasks),
        normalised(rows, tasks),
        seen_and_unseen(rows, tasks),
        facts("cost", "What it costs", rows),
        facts("routing", "How experts are used", rows),
        cross(rows, tasks),
        subsets(rows, tasks),
    ]
    return [table for table in tables if table is not None and table.lines]


def average_of(pool: str, tasks: Sequence[Task]) -> list[Task]:
    """The tasks that a pool's average is over: all, unless their numbers do not add up."""
    own = [task for task in tasks if task.pool == pool]
    return own if len({(task.lower, task.form) for task in own}) == 1 else []


def pools_of(tasks: Sequence[Task]) -> list[str]:
    """Names of the task pools with scores."""
    return list(dict.fromkeys(task.pool for task in tasks))


def scores(rows: Sequence[Row], tasks: Sequence[Task]) -> Table:
    """Tasks as columns, and their average."""
    columns = []
    for pool in pools_of(tasks):
        own = [task for task in tasks if task.pool == pool]
        columns += [_task_column(task, tasks) for task in own]
        if len(own) > 1 and average_of(pool, tasks):
            columns.append(_average_column(pool, tasks))
    metrics = dict.fromkeys(
        f"{task.metric.replace('_', ' ')} ({'lower' if task.lower else 'higher'} is better"
        f"{', percent' if task.form == 'percent' else ''})"
        for task in tasks
    )
    note = f"{', '.join(metrics)}. "
    seeded = any(len(row.results) > 1 for row in rows)
    single = any(
        s.spread is not None for r in rows if len(r.results) == 1 for s in r.scores.values()
    )
    if seeded and single:
        note += "± is the standard deviation over seeds; of a single run, its standard error. "
    elif seeded or single:
        note += f"± is the standard {'deviation over seeds' if seeded else 'error'}. "
    note += "Best in bold, second underlined; reference rows do not compete."
    return _table("scores", "Scores", note, columns, rows, trials=True)


def normalised(rows: Sequence[Row], tasks: Sequence[Task]) -> Table | None:
    """Each score over that of the task's fine-tune, so that 1 is as good and more is better."""
    tuned = [row for row in rows if row.results[0].reference == "finetuned"]
    columns, said, ratios = [], [], {}
    for task in tasks:
        found = [best for row in rows if (best := fine_tune_of(task, row, tuned))]
        if not found:
            continue

        def ratio(row: Row, task: Task = task) -> Score | None:
            own, best = row.scores.get(task), fine_tune_of(task, row, tuned)
            if own is None or best is None:
                return None
            up, down = (best[1], own.value) if task.lower else (own.value, best[1])
            return Score(up / down, None, [up / down]) if abs(down) > SMALLEST_SHARE else None

        said += [f"{task.name} by {label}" for label in dict.fromkeys(best[0] for best in found)]
        ratios[task] = ratio
        columns.append(Column(_header(task, tasks), ratio, "ratio", lower=False))
    if not columns:
        return None

    def average(row: Row) -> Score | None:
        found = [ratio(row) for ratio in ratios.values()]
        values = [score.value for score in found if score is not None]
        return Score(mean(values), None, values) if len(values) == len(found) else None

    columns.append(Column("Average", average, "ratio", lower=False))
    note = (
        f"Relative to the fine-tune of each task: {'; '.join(said)}. 1 is as good as it, higher is "
        "better; where lower is better the quotient is turned round."
    )
    return _table("normalised", "Scores relative to each task's fine-tune", note, columns, rows)


def fine_tune_of(task: Task, row: Row, tuned: Sequence[Row]) -> tuple[str, float] | None:
    """The fine-tune of a task's name, else the best one for it, of the row's own experiment.

    What others left belongs to none, and is compared with all.
    """
    having = [one for one in tuned if task in one.scores and row.experiment in ("", one.experiment)]
    named = [one for one in having if list(one.results[0].models) == [task.name]]
    if not having:
        return None
    best = (min if task.lower else max)(named or having, key=lambda one: one.scores[task].value)
    return best.label, best.scores[task].value


def seen_and_unseen(rows: Sequence[Row], tasks: Sequence[Task]) -> Table | None:
    """Averages over tasks that some merged model was tuned for, and over the others."""
    names: dict[str, set[str]] = {}
    for row in rows:
        names.setdefault(row.experiment, set()).update(row.results[0].models)
    columns, alike = [], True
    for pool in pools_of(tasks):
        over = average_of(pool, tasks)
        if not over:
            continue

        def seen(row: Row, over: Sequence[Task] = over, wanted: bool = True) -> Score | None:
            return row.mean_over(chosen(row, over, wanted))

        def chosen(row: Row, over: Sequence[Task], wanted: bool) -> list[Task]:
            return [task for task in over if is_seen(row, task, names[row.experiment]) is wanted]

        def unseen(row: Row, over: Sequence[Task] = over) -> Score | None:
            return seen(row, over, False)

        where = f" ({pool})" if len(pools_of(tasks)) > 1 else ""
        # Averages over different tasks do not compete.
        sets = {tuple(chosen(r, over, False)) for r in rows if not r.reference and unseen(r)}
        alike = alike and len(sets) < 2
        form, lower = over[0].form, over[0].lower if len(sets) < 2 else None
        columns.append(Column(f"seen{where}", seen, form, lower=lower))
        columns.append(Column(f"unseen{where}", unseen, form, lower=lower))
    kept = [row for row in rows if any(column.score(row) for column in columns[1::2])]
    if not kept:
        return None
    note = (
        "A task is unseen where the experiment says so, and where it is named as a fine-tune that "
        "is not among the row's models."
    )
    if not alike:
        note += " It is not the same tasks in each row, so that no row is marked as best."
    return _table("generalisation", "Seen and unseen tasks", note, columns, kept)


def is_seen(row: Row, task: Task, fine_tunes: set[str]) -> bool:
    """Whether a model of the row was tuned for the task."""
    result = row.results[0]
    said = (result.tasks.get(task.pool) or {}).get("unseen") or ()
    if task.name in said:
        return False
    return result.reference == "pretrained" or not (
        result.models and task.name in fine_tunes and task.name not in result.models
    )


def facts(section: str, title: str, rows: Sequence[Row]) -> Table | None:
    """Numbers that are no scores."""
    columns = []
    for part, name, header, form in FACTS:
        if part == section and any(row.fact(part, name) is not None for row in rows):

            def fact(row: Row, name: str = name) -> Score | None:
                value = row.fact(section, name)
                return None if value is None else Score(value, None, [value])

            columns.append(Column(header, fact, form))
    if not columns:
        return None
    if section == "cost":
        columns += [
            Column("trained on, tokens", _result("tokens"), "count"),
            Column("seconds of the run", _result("seconds"), "seconds"),
        ]
    kept = [row for row in rows if any(column.score(row) for column in columns[:1])]
    notes = {
        "cost": "Speed and memory are of the machine of the runs, and of what else it did, as runs "
        "beside them: compare rows of one report, and differences of a factor only.",
        "routing": "Means over MoE layers; experts and dead experts are summed over them. "
        "Dense models have none of it.",
    }
    return _table(section, title, notes[section], columns, kept)


def _result(name: str) -> Callable[[Row], Score | None]:
    def read(row: Row) -> Score | None:
        values = [getattr(result, name) for result in row.results]
        known = [float(value) for value in values if value is not None]
        return Score(mean(known), None, known) if known else None

    return read


def cross(rows: Sequence[Row], tasks: Sequence[Task]) -> Table | None:
    """Fine-tunes by task: what each is good for beside its own, which is marked."""
    tuned = [row for row in rows if row.results[0].reference == "finetuned"]
    names = {name for row in tuned for name in row.results[0].models}
    own = [task for task in tasks if task.name in names]
    if len(tuned) < 2 or len(own) < 2:
        return None
    lines = []
    for row in tuned:
        cells = []
        for task in own:
            value = row.scores[task].value if task in row.scores else None
            diagonal = list(row.results[0].models) == [task.name]
            cells.append(Cell(value, written(value, task.form), "best" if diagonal else ""))
        lines.append(Line(row.label, "", cells, row))
    headers = [_header(task, tasks) for task in own]
    return Table("cross", "Model by task", "Each fine-tune's own task in bold.", headers, lines)


def subsets(rows: Sequence[Row], tasks: Sequence[Task]) -> Table | None:
    """Merges of every pair, triple, ...: how often they beat the base, and their best part."""
    over = average_of(tasks[0].pool, tasks) if tasks else []
    bases = {
        row.experiment: row.mean_over(over)
        for row in rows
        if row.results[0].reference == "pretrained"
    }
    alone = {
        (row.experiment, row.results[0].models[0]): row.mean_over(over)
        for row in rows
        if row.results[0].reference == "finetuned"
    }
    chosen: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.results[0].subset:
            chosen.setdefault((row.experiment, row.results[0].row), []).append(row)
    lines = []
    for (experiment, name), merged in chosen.items():
        start = bases.get(experiment)
        sign = -1.0 if over and over[0].lower else 1.0
        gains, beats = [], []
        for row in merged:
            found = row.mean_over(over)
            parts = [alone.get((experiment, model)) for model in row.results[0].models]
            known = [sign * part.value for part in parts if part is not None]
            if found is None:
                continue
            if known and len(known) == len(parts):
                gains.append(sign * found.value - max(known))
            if start is not None:
                beats.append(float(sign * found.value > sign * start.value))
        share = mean(beats) if beats else None
        gain = mean(gains) if gains else None
        cells = [
            Cell(len(merged), str(len(merged))),
            Cell(share, written(share, "ratio")),
            Cell(gain, written(gain, "gain")),
        ]
        several = len({row.experiment for row in rows}) > 1
        lines.append(Line(f"{experiment}: {name}" if several else name, "", cells, None))
    note = (
        "Over subsets of the fine-tunes, by the average of their tasks; the gain over the best "
        "model of the subset is positive where merging is better."
    )
    headers = ("subsets", "P(beats base)", "gain over best constituent")
    return Table("subsets", "Subsets of the fine-tunes", note, headers, lines) if lines else None


def _task_column(task: Task, tasks: Sequence[Task]) -> Column:
    return Column(
        _header(task, tasks), lambda row: row.scores.get(task), task.form, task.lower, spread=True
    )


def _average_column(pool: str, tasks: Sequence[Task]) -> Column:
    over = average_of(pool, tasks)
    header = "Average" if len(pools_of(tasks)) == 1 else f"Average ({pool})"
    return Column(header, lambda row: row.mean_over(over), over[0].form, over[0].lower, spread=True)


def _header(task: Task, tasks: Sequence[Task]) -> str:
    alike = [other for other in tasks if other.name == task.name]
    return task.name if len(alike) == 1 else f"{task.name} ({task.pool})"


def _table(
    key: str,
    title: str,
    note: str,
    columns: Sequence[Column],
    rows: Sequence[Row],
    *,
    trials: bool = False,
) -> Table:
    found = [[column.score(row) for column in columns] for row in rows]
    marks = [_marks(column, rows, [line[i] for line in found]) for i, column in enumerate(columns)]
    lines = []
    tried = trials and any(row.results[0].trials for row in rows)
    for place, (row, values) in enumerate(zip(rows, found, strict=True)):
        cells = [
            Cell(s.value if s else None, _text(s, column), marks[i][place])
            for i, (s, column) in enumerate(zip(values, columns, strict=True))
        ]
        if tried:
            count = row.results[0].trials
            cells.append(Cell(count, str(count) if count else "-"))
        lines.append(Line(row.label, row.group, cells, row))
    headers = [column.header for column in columns]
    if tried:
        headers.append("settings tried")
        note += " Settings tried: on validation data, of which the best is shown."
    return Table(key, title, note, headers, lines)


def _text(score: Score | None, column: Column) -> str:
    if score is None:
        return "-"
    text = written(score.value, column.form)
    if column.spread and score.spread is not None:
        text += f" ± {written(score.spread, column.form)}"
    return text


def _marks(column: Column, rows: Sequence[Row], found: Sequence[Score | None]) -> list[str]:
    """The best and the second of those that compete, by what is written: equals share a mark."""
    if column.lower is None:
        return [""] * len(rows)
    texts = {
        written(score.value, column.form): score.value
        for row, score in zip(rows, found, strict=True)
        if score is not None and not row.reference
    }
    ranked = sorted(texts, key=lambda text: texts[text], reverse=not column.lower)
    names = dict(zip(ranked, ("best", "second"), strict=False)) if len(ranked) > 1 else {}
    return [
        names.get(written(score.value, column.form), "") if score and not row.reference else ""
        for row, score in zip(rows, found, strict=True)
    ]
