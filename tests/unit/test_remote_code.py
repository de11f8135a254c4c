"""Python files beside somebody else's tokenizer or model are never executed."""

import ast
import json
from pathlib import Path

import pytest

from megascale.corpus.hugging_face import find_tokenizer
from megascale.errors import UserError

PACKAGE = Path(__file__).parents[2] / "megascale"
CODE = """
from pathlib import Path
Path(__file__).with_name("executed").touch()
(Path({mark!r})).touch()
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizer
class Config(PretrainedConfig):
    model_type = "theirs"
class Model(PreTrainedModel):
    config_class = Config
class Tokenizer(PreTrainedTokenizer):
    pass
"""


def calls_of(name):
    """(file, keywords) of every call of a method of that name in the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr == name:
                    yield path.name, {word.arg: word.value for word in node.keywords}


def test_every_load_says_that_no_code_may_run():
    """transformers asks the user, who may not know what it means, where nothing is said."""
    said = {}
    for file, words in calls_of("from_pretrained"):
        assert "trust_remote_code" in words, file
        said[file] = ast.unparse(words["trust_remote_code"])
    assert said.pop("model_folder.py") == "runs_code"
    assert set(said.values()) == {"False"} and len(said) >= 2


def test_only_what_export_has_just_written_may_run():
    tree = ast.parse((PACKAGE / "convert/huggingface/model_folder.py").read_text())
    texts = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.keyword)]
    runs = [text for text in texts if text.startswith("runs_code=")]
    assert runs == ["runs_code=(out / INFOWINDOW_CLASS.name).is_file()"]
    for path in PACKAGE.rglob("*.py"):
        if path.name != "model_folder.py":
            assert "runs_code" not in path.read_text(), path


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    """(a folder whose code leaves a mark, the mark); the user says yes to everything."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder, mark = tmp_path / "model", tmp_path / "mark"
    folder.mkdir()
    (folder / "theirs.py").write_text(CODE.format(mark=str(mark)))
    classes = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    config = {"model_type": "theirs", "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = {"AutoTokenizer": ["theirs.Tokenizer", None]}
    document = {"tokenizer_class": "Tokenizer", "auto_map": tokenizer}
    (folder / "tokenizer_config.json").write_text(json.dumps(document))
    yield folder
    assert not mark.exists() and not (folder / "executed").exists()


def test_a_tokenizer_of_a_recipe(hostile):
    with pytest.raises(UserError, match="neither a readable local folder nor a tokenizer"):
        find_tokenizer(str(hostile))


def test_a_tokenizer_of_an_export_or_an_evaluation(hostile):
    from megascale.convert.huggingface.model_folder import load_theirs

    with pytest.raises(UserError, match="transformers cannot load it"):
        load_theirs(hostile)


def test_a_model_to_import(hostile):
    import numpy as np
    import torch

    from megascale.convert.compare_logits import _their_logits

    ids, places = np.zeros((1, 1), dtype=np.int64), np.zeros(1, dtype=np.int64)
    with pytest.raises(UserError, match="transformers cannot run .* contains custom code"):
        _their_logits(hostile, ids, places, torch.float32)


def test_the_code_would_run_if_it_were_trusted(tmp_path, hostile):
    """Else the tests above could not fail."""
    from transformers import AutoConfig

    AutoConfig.from_pretrained(hostile, trust_remote_code=True)
    assert (tmp_path / "mark").exists()
    (tmp_path / "mark").unlink()
    (hostile / "executed").unlink(missing_ok=True)
