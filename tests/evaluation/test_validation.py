"""The score that train and quantize report."""

import numpy as np
import pytest
import torch

import steps.quantize
import steps.train
from model.data.shards import BOS
from model.evaluation.losses import plain_losses
from model.runtime.distributed import Group
from steps.common import StageRun
from steps.validation import validate
from tests.helpers.corpora import sentences, small_tokenizer
from tests.helpers.models import small_model
from tests.helpers.presets import preset


def test_the_score_is_that_of_the_plain_losses_over_the_bytes_of_the_text(tmp_path, capsys):
    tokenizer = small_tokenizer(tmp_path / "tokenizer.model")
    texts = list(sentences(3, seed=2))
    documents = [np.array([BOS, *pieces], np.uint16) for pieces in tokenizer.encode(texts)]
    model, group = small_model(vocabulary=320), Group(0, 1, torch.device("cpu"))
    step = StageRun("train", 0, preset("demo", "execution.evaluation_tokens=64"), group)
    score = validate(step, model, documents, tokenizer)
    assert score is not None
    assert score.tokens == sum(document.size for document in documents)
    assert score.bytes == sum(len(tokenizer.normalize(text).encode()) for text in texts)
    losses = plain_losses(model, documents, 4096, group)
    assert score.nats == pytest.approx(sum(float(loss.sum()) for loss in losses), rel=1e-6)
    assert "validate: tokens: 100 %" in capsys.readouterr().err


def test_both_steps_score_by_it():
    assert steps.train.validate is steps.quantize.validate is validate
