"""Parts of training: schedule, averaging, precision, and what is refused."""

import pytest
import torch

from recray.config import OptimConfig
from recray.errors import ConfigError, DependencyError, ResourceError
from recray.training import optim
from recray.training.distributed import LocalContext


def test_learning_rate_by_hand() -> None:
    config = OptimConfig(learning_rate=1.0, warmup_steps=4, schedule="linear")
    assert [optim.learning_rate(config, s, 12) for s in (0, 1, 3, 4, 8, 12)] == [0.25, 0.5, 1.0, 1.0, 0.5, 0.0]
    cosine = OptimConfig(learning_rate=2.0, schedule="cosine")
    assert optim.learning_rate(cosine, 5, 10) == pytest.approx(1.0)
    assert optim.learning_rate(OptimConfig(learning_rate=0.3), 99, 10) == 0.3


def test_ema_by_hand() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(module.weight, 1.0)
    ema = optim.Ema(module, 0.9)
    torch.nn.init.constant_(module.weight, 2.0)
    ema.update()
    assert float(ema.weights()["weight"]) == pytest.approx(0.9 * 1 + 0.1 * 2)
    assert float(optim.Ema(module, 0.0).weights()["weight"]) == 2.0


def test_precision_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert optim.MixedPrecision("auto", cpu).dtype is torch.float32
    assert optim.MixedPrecision("bf16", cpu).dtype is torch.bfloat16
    with pytest.raises(ConfigError, match="fp16' needs a GPU: use 'auto'"):
        optim.MixedPrecision("fp16", cpu)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_no_gpu_where_one_is_asked_for() -> None:
    with pytest.raises(ResourceError, match=r"scaling\.use_gpu = true, but torch finds no GPU"):
        LocalContext(use_gpu=True)


def test_faiss_absent_names_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    import numpy as np

    from recray.retrieval import faiss_index

    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(DependencyError, match=r"pip install 'recray\[cpu\]'"):
        faiss_index.build(np.zeros((3, 2), np.float32), "Flat", "auto")
