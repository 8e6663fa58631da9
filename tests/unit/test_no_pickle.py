"""Files of strangers run no code: what recray loads is never unpickled."""

import ast
import io
import os
import pickle
from pathlib import Path

import pytest
import torch

from helpers.configs import REPOSITORY
from recray import storage
from recray.training import checkpoint

_UNPICKLE = {"pickle", "cloudpickle", "joblib", "dill", "marshal", "shelve", "yaml"}


class _Attack:
    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self._path,)


@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_state_that_holds_code_does_not_run_it(form: str, tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    data = io.BytesIO()
    if form == "pickle":
        pickle.dump({"step": _Attack(proof)}, data)
    else:
        torch.save({"step": _Attack(proof)}, data)
    storage.write_bytes(str(tmp_path / "state.pt"), data.getvalue())
    with pytest.raises(Exception, match=r"(?i)weights.only|unsupported|damaged"):
        checkpoint.load_state(str(tmp_path))
    assert not proof.exists()


def test_nothing_in_recray_unpickles_files() -> None:
    """Modules that unpickle are not imported (Ray's own is, to send plug-ins), and loaders that can are told not to."""
    for path in (REPOSITORY / "recray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not {name.name.partition(".")[0] for name in node.names} & _UNPICKLE, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in _UNPICKLE, path
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert {"weights_only": "True"}.items() <= {
                    k.arg: ast.unparse(k.value) for k in node.keywords
                }.items(), path
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("np.load", "numpy.load"):
                assert "allow_pickle" not in {k.arg for k in node.keywords}, path
