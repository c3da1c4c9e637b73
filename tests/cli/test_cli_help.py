"""What the terminal says of itself, and what it loads to say it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import SHIPPED, command
from typer.main import get_command

from dlp_plugin.cli import app
from dlp_plugin.planning.methods.dlp import DLP
from dlp_plugin.planning.plan import Plan

HELP = {
    "oneshot": ["--recipe", "--output MODEL-pruned", "calibration samples", "[default: 128]"],
    "score": [
        "--strength,--alpha",
        "dlp, owl, alpha-pruning, linear",
        "dlp 0.15, owl 0.08, alpha-pruning 0.3, linear auto",
        "DLPModifier: {from_plan: plan.json}",
    ],
    "show": ["--strength,--alpha", "--plot", "also for another target or strength"],
    "inspect": ["--against", "zeros that FOLDER has lost", "of 4 and 8 bits are dequantized"],
    "ppl": [
        "windows that do not overlap",
        "Tokens per window. ",
        "--batch-size",
        "as many as hold 2,048 tokens",
    ],
    "zero-shot": ["paper7", "pip install '.[eval]'"],
    "speed": ["of a pruned model, dense and sparse", "--batches", "--json"],
    "compare": [
        "uniform, dlp, owl, alpha-pruning, linear",
        "dlp-refined",
        "--write-recipe",
        "--test-config",
    ],
    "merge": ["pip install '.[lora]'", "--allow-dense", "keeping every zero"],
    "pack": ["Nothing is lost", "16 bits, W4A16 or W8A16", "import dlp_plugin"],
    "unpack": ["folder that dlp-plugin pack wrote", "Restore the checkpoint"],
    "export-gptq": ["a 4-bit or 8-bit checkpoint in the GPTQ format", "W4A16 or W8A16"],
}


def help_text(*arguments: str) -> str:
    """In one line, without the frames."""
    return " ".join(command(*arguments, "--help").output.replace("│", " ").split())


def test_commands_stand_in_the_order_of_the_work() -> None:
    rows = re.findall(r"^│ ([a-z]\S*) ", command("--help").output, re.MULTILINE)
    assert rows == list(HELP)


@pytest.mark.parametrize("name", HELP)
def test_help_teaches(name: str) -> None:
    said = help_text(name)
    for words in (f"{name} [OPTIONS]", *HELP[name]):
        assert words in said


@pytest.mark.parametrize("name", HELP)
def test_no_two_options_have_one_name(name: str) -> None:
    """Of which only the last could be given."""
    names = [text for option in get_command(app).commands[name].params for text in option.opts]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", HELP)
def test_no_two_options_have_one_text(name: str) -> None:
    """Of which none would say what tells it from the other."""
    texts = [option.help for option in get_command(app).commands[name].params]
    assert len(texts) == len(set(texts))


@pytest.mark.parametrize("name", ["", *HELP])
def test_help_is_shown_as_it_is_written(name: str) -> None:
    """Not as pictures, which ``:M:`` and other names between colons become."""
    said = help_text(*name.split())
    assert set(re.findall(r"[^ -~─╭╮╰╯…]", said)) == set()


@pytest.mark.parametrize("verbose", [False, True])
def test_what_other_packages_say(verbose: bool) -> None:
    """Bars, lines and repeated warnings are shown only where that is asked for."""
    code = (
        "import warnings\nfrom dlp_plugin.cli.log import show_log\n"
        f"show_log({verbose}, host=False)\n"
        "from loguru import logger\nfrom tqdm import tqdm\n"
        "for _ in tqdm(range(2), desc='a bar'):\n"
        "    logger.info('a line')\n    logger.warning('a warning')\n"
        "for text in ('told', 'told'):\n"
        "    with warnings.catch_warnings():\n        pass\n"
        "    warnings.warn(text)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = "INFO: a line", "WARNING: a warning", "Warning: told"
    said = [done.stderr.count(line) for line in lines]
    assert said == ([2, 2, 2] if verbose else [0, 1, 1])
    assert ("a bar" in done.stderr) == verbose


def test_warnings_of_every_run_are_left_out() -> None:
    """Of llm-compressor's import without an accelerator, of tracing and of saving."""
    code = (
        "from dlp_plugin.cli.log import show_log\n"
        "show_log()\n"
        "from torch.fx import _symbolic_trace\n"
        "_symbolic_trace.is_fx_tracing()\n"
        "from tempfile import TemporaryDirectory\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(SHIPPED)!r})\n"
        "model.hf_device_map = {'': 'cpu'}\n"
        "with TemporaryDirectory() as folder:\n"
        "    model.save_pretrained(folder)\n"
        "import os\n"
        "assert 'LLM_COMPRESSOR_LOG_LEVEL' not in os.environ\n"  # for processes that it starts
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


@pytest.mark.parametrize("module", ["dlp_plugin", "dlp_plugin.cli"])
def test_it_runs_as_a_module(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, check=True
    )
    assert f"python -m {module} [OPTIONS] COMMAND" in done.stdout
    assert "Prune (and quantize) a model by a recipe and save it." in done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["show", "PLAN"]])
def test_what_needs_no_model_loads_neither_torch_nor_the_host(
    tmp_path: Path, arguments: list[str]
) -> None:
    plan = tmp_path / "plan.json"
    rows = [("model.layers.0", 8, 1.0), ("model.layers.1", 8, 2.0)]
    Plan.make(rows, model="m", method=DLP(alpha=0.1), target=0.5).save(plan)
    code = (
        "import sys\nfrom dlp_plugin.cli import app\n"
        f"app({[str(plan) if word == 'PLAN' else word for word in arguments]}, "
        "standalone_mode=False)\n"
        "print({'torch', 'transformers', 'llmcompressor'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
