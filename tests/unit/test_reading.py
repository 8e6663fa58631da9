"""Reading a configuration is quick: no torch, no Ray, under a second of CPU."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

CONFIGS = sorted((Path(__file__).parents[2] / "jobs").rglob("*.toml"))
LOADED = "import sys; loaded = {'torch', 'ray'} & set(sys.modules); assert not loaded, loaded"


def _run(*command: str, code: int = 0) -> str:
    """Output of a Python process that must use less than a second of CPU."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=50)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == code, done.stderr
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < 1.0, f"{used:.2f} s of CPU"
    return done.stdout + done.stderr


def test_shipped_configurations_load_neither_torch_nor_ray() -> None:
    paths = [str(path) for path in CONFIGS if path.parent.name == "configs"]
    assert len(paths) > 5
    _run("-c", f"import recray; [recray.load_config(path) for path in {paths}]; {LOADED}")


def test_a_wrong_configuration_is_answered_without_torch_and_ray(tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text('[model]\nname = "sasrec"\nlayer = 3\n[loss]\nname = "gbce"\nmargin = 1\n')
    script = f"""
import recray
try:
    recray.load_config({str(path)!r})
except recray.ConfigError as error:
    print(error)
{LOADED}
"""
    text = _run("-c", script)
    assert "2 problems" in text
    assert "unknown key 'model.layer'; did you mean 'model.layers'?" in text
    assert "unknown key 'loss.margin': loss.name = 'gbce' has no such key, cosine_contrastive has." in text


@pytest.mark.parametrize("command", [("--help",), ("keys",), ("train", "absent.toml")])
def test_the_command_line_starts_quickly(command: tuple[str, ...]) -> None:
    script = f"import sys; sys.argv = ['recray', *{command!r}]\nfrom recray.cli import main\n"
    script += f"try:\n    main()\nexcept SystemExit as end:\n    {LOADED}\n    raise\n"
    text = _run("-c", script, code=2 if command[0] == "train" else 0)
    assert "StorageError" in text if command[0] == "train" else "training" in text
