"""Score documents with an artifact, without params.yaml: the program of the bundle.

    python bundle.py --artifact model.pocket --tokenizer tokenizer.model --text FILE
    python bundle.py --artifact model.pocket --tokenizer tokenizer.model --tokens SHARD … --mode ttt
    python bundle.py -m steps.train --seed 0

Needs torch, numpy, sentencepiece and the coders that the artifact names; kernels are used where
their packages are installed. With -m it runs a stage's program as the repository does; the stages
besides need what requirements.txt lists. The settings of evaluation are those that the bundle was
made with; how much runs at once, on which no result depends beyond rounding, is asked here.
"""

import argparse
import json
import runpy
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from model.artifact.format import load_artifact
from model.data.loader import documents_in
from model.data.shards import BOS
from model.data.sources.files import Files
from model.data.tokenizer import Tokenizer, check_vocabulary
from model.evaluation.losses import plain_losses, sliding_losses, targets_of
from model.evaluation.score import TTT, WITHOUT_ADAPTATION, Score
from model.kernels import dispatch
from model.network.gpt import GPT
from model.runtime.config import ExecutionConfig
from model.runtime.distributed import Group, process_group
from model.runtime.errors import user_errors
from model.ttt.config import TTTConfig
from model.ttt.loop import ttt_losses

Settings = Mapping[str, Mapping[str, Any]]  # sections of params.yaml


def main(settings: Settings, words: Sequence[str]) -> None:
    """Run what the command line says; `settings` are the sections evaluate, ops and ttt."""
    if words[:1] == ["-m"]:
        sys.argv = list(words[1:])
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        return
    parser = argparse.ArgumentParser(description="Score documents with an artifact.")
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", nargs="+", help="files: .txt, .jsonl, .jsonl.zst, .parquet")
    text.add_argument("--tokens", nargs="+", type=Path, help="token shards, in their order")
    parser.add_argument("--mode", choices=[*WITHOUT_ADAPTATION, TTT], default=TTT)
    parser.add_argument("--documents", type=int, help="only the first so many")
    parser.add_argument("--losses", type=Path, help="write every loss, fp32, to this .npy file")
    parser.add_argument("--batch-tokens", type=int, default=1 << 17, help="run at once, at most")
    options = parser.parse_args(words)
    with user_errors(), process_group() as group:
        score(settings, options, group)


def score(settings: Settings, options: argparse.Namespace, group: Group) -> None:
    """Score the documents that the command line names, and print one line of JSON."""
    tokenizer = Tokenizer(options.tokenizer)
    model = load_artifact(options.artifact, group.device)
    check_vocabulary(tokenizer, model.config.vocabulary, "give the tokenizer of this artifact")
    dispatch.configure(device=group.device, **settings["ops"])
    documents = _documents(options, tokenizer)[: options.documents]
    began = time.perf_counter()
    execution = execution_of(options.batch_tokens)
    losses = losses_of(options.mode, model, documents, settings, execution, group)
    if not group.is_main:
        return
    found = Score.of(losses, [tokenizer.sizes(targets_of(document)) for document in documents])
    if options.losses:
        np.save(options.losses, np.concatenate(losses))
    result = {"mode": options.mode, "loss": found.loss, "bpb": found.bpb, "tokens": found.tokens}
    seconds = round(time.perf_counter() - began, 3)
    print(json.dumps({**result, "bytes": found.bytes, "seconds": seconds}), flush=True)


def losses_of(
    mode: str,
    model: GPT,
    documents: Sequence[np.ndarray],
    settings: Settings,
    execution: ExecutionConfig,
    group: Group,
) -> list[np.ndarray]:
    """Losses in nats, fp32 (n,) per document of n tokens (BOS first), in one way of scoring."""
    if mode == TTT:
        return ttt_losses(model, documents, TTTConfig(**settings["ttt"]), execution, group)
    if mode == "plain":
        return plain_losses(model, documents, execution.evaluation_tokens, group)
    stride = settings["evaluate"]["sliding_stride"]
    return sliding_losses(model, documents, stride, execution.evaluation_tokens, group)


def execution_of(batch_tokens: int) -> ExecutionConfig:
    """How an evaluation is run that takes so many tokens at once."""
    return ExecutionConfig(
        processes=1,
        log_every=1,
        save_every_seconds=1.0,
        compile=False,
        cuda_graphs=True,
        evaluation_tokens=batch_tokens,
        ttt_documents=512,
        ttt_tokens=batch_tokens,
    )


def _documents(options: argparse.Namespace, tokenizer: Tokenizer) -> list[np.ndarray]:
    if options.tokens:
        return documents_in(options.tokens)
    texts = [text for text, _ in Files(options.text, "--text").texts()]
    return [np.array([BOS, *pieces], np.uint16) for pieces in tokenizer.encode(texts)]
