"""transformers' own model tests (`ModelTesterMixin`) on our classes.

They are in transformers' source distribution, not in the wheel, and without two of the modules they import: the
generation and export mixins are replaced by empty ones (generation is tested in this folder). Four tests run with
one thing changed, each with its reason below; all others as they are.
"""

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUBS = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
}
TESTS = """
import unittest
from unittest import mock

import deepseek_v3
from deepseek_v3.configuration import preset

from .test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask
from .generation.test_utils import GenerationTesterMixin

LENIENT = mock.patch("deepseek_v3.modeling_deepseek_v3.checkpoint.check_tensors")


class Tester:
    batch_size, seq_length, is_training = 4, 7, True
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, 99

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return preset("tiny", vocab_size=self.vocab_size, hidden_size=self.hidden_size, intermediate_size=32,
            moe_intermediate_size=16, num_hidden_layers=self.num_hidden_layers, kv_lora_rank=16,
            max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2, **OVERRIDES)

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size).clamp(3)
        mask = random_attention_mask([self.batch_size, self.seq_length])
        return self.get_config(), {"input_ids": input_ids, "attention_mask": mask}


class DeepseekV3Test(ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (deepseek_v3.DeepseekV3Model, deepseek_v3.DeepseekV3ForCausalLM,
        deepseek_v3.DeepseekV3ForSequenceClassification, deepseek_v3.DeepseekV3ForTokenClassification)
    test_all_params_have_gradient = False  # an expert that no token chose has none
    test_can_init_all_missing_weights_before_2023 = True
    model_split_percents = [0.5, 0.7, 0.8]

    def setUp(self):
        self.model_tester = Tester(self)

    # Our loader refuses what these three load: files with missing, unexpected or mismatched tensors. What lies behind
    # that check has to work as it does for every model.
    def test_correct_missing_keys(self):
        with LENIENT:
            super().test_correct_missing_keys()

    def test_load_with_mismatched_shapes(self):
        with LENIENT:
            super().test_load_with_mismatched_shapes()

    def test_model_weights_reload_no_missing_tied_weights(self):
        with LENIENT:
            super().test_model_weights_reload_no_missing_tied_weights()

    # The plan is the class's and covers queries with and without a latent; a model has one of them.
    def test_tp_plan_matches_params(self):
        absent = ["q_b_proj"] if self.model_tester.get_config().q_lora_rank is None else ["q_proj"]
        plan = deepseek_v3.DeepseekV3Config.base_model_tp_plan
        plan = {name: style for name, style in plan.items() if name.split(".")[-1] not in absent}
        with mock.patch.object(deepseek_v3.DeepseekV3Config, "base_model_tp_plan", plan):
            super().test_tp_plan_matches_params()
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("suite")
    version = importlib.metadata.version("transformers")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "1", "--timeout", "20"]
    download = ["download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", f"transformers=={version}"]
    install = ["install", "--no-deps", "--target", str(folder / "site"), "parameterized"]
    for arguments in (download + ["--dest", str(folder)], install):
        done = subprocess.run([*pip, *arguments], capture_output=True, text=True, timeout=300)
        if done.returncode:
            pytest.skip(f"pip {arguments[0]} failed (no network?): {done.stderr.strip().splitlines()[-1]}")
    with tarfile.open(folder / f"transformers-{version}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    folder /= f"transformers-{version}"
    for name, content in STUBS.items():
        (folder / "tests" / name).parent.mkdir(exist_ok=True)
        (folder / "tests" / name).write_text(content)
    (folder / "src").rename(folder / "unused")  # the installed package is what runs
    (folder / "pyproject.toml").unlink()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        {"num_nextn_predict_layers": 1, "q_lora_rank": 16},
        {"num_nextn_predict_layers": 0, "q_lora_rank": None, "tie_word_embeddings": True},
    ],
)
def test_transformers_common_tests_pass(overrides: dict, suite) -> None:
    (suite / "tests" / "test_deepseek_v3.py").write_text(TESTS.replace("OVERRIDES", repr(overrides)))
    (suite / "report.xml").unlink(missing_ok=True)
    paths = [str(suite), str(suite.parent / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "tests/test_deepseek_v3.py", "-q", "--junitxml=report.xml"]
    command += ["-p", "no:cacheprovider", "-o", "addopts=", "--rootdir", str(suite)]
    done = subprocess.run(command, cwd=suite, env=environment, capture_output=True, text=True, timeout=1200)
    assert (suite / "report.xml").exists(), done.stdout[-2000:] + done.stderr[-2000:]

    counts = {"passed": 0, "failed": 0, "skipped": 0}
    problems = []
    for case in ElementTree.parse(suite / "report.xml").iter("testcase"):
        failures = [child for child in case if child.tag in ("failure", "error")]
        problems += [f"{case.get('name')}: {failure.get('message', '')[:500]}" for failure in failures]
        counts["failed" if failures else "skipped" if case.find("skipped") is not None else "passed"] += 1
    print(counts)
    assert not problems, "\n".join(problems)
    assert counts["passed"] >= 113
