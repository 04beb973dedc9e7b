"""`scripts/survey_model_code.py`: every file that touches tensors while loading has been read."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "survey_model_code.py"
_spec = importlib.util.spec_from_file_location("survey_model_code", SCRIPT)
survey = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(survey)


def test_all_of_the_installed_vllm_has_been_read(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("vllm")
    assert survey.main([]) == 0, capsys.readouterr().out


def test_an_unread_file_is_shown_with_what_it_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = tmp_path / "vllm" / "model_executor" / "models"
    models.mkdir(parents=True)
    (models / "bloom.py").write_text("def load_weights(weights):\n    weights.view(-1)\n")
    (models / "plain.py").write_text("def load_weights(weights):\n    name.split('.')\n")
    (models / "new.py").write_text(
        "class A:\n"
        "    def load_weights(self, weights):\n"
        "        for name, loaded_weight in weights:\n"
        "            self._swap(loaded_weight)\n"
        "    def _swap(self, w):\n"
        "        return w.unflatten(0, (2, -1)).transpose(0, 1)\n"
        "    def forward(self, x):\n"
        "        return x.view(-1)\n"
        "class B:\n"
        "    def load_weights(self, weights): ...\n"
    )
    assert survey.main([str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "models/bloom.py: a dense layer: in plan/model_code.py" in printed
    assert "models/new.py: NOT READ\n    _swap: w.unflatten(0, (2, -1)).transpose(0, 1)" in printed
    assert "plain.py" not in printed
