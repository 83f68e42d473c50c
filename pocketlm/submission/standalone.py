"""Score documents with an artifact, without params.yaml: what the bundle offers.

    python bundle.py --artifact model.pocket --tokenizer tokenizer.model --text FILE
    python bundle.py --artifact model.pocket --tokenizer tokenizer.model --tokens SHARD … --mode ttt
    python bundle.py -m steps.train --seed 0
    from bundle import load; load().score("Any text.").bpb

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.artifact.format import load_artifact
from model.data.loader import documents_in
from model.data.shards import BOS
from model.data.sources.files import Files
from model.data.tokenizer import Tokenizer
from model.evaluation.losses import plain_losses, sliding_losses, targets_of
from model.evaluation.score import TTT, WITHOUT_ADAPTATION, Score
from model.kernels import dispatch
from model.network.gpt import GPT
from model.runtime.config import ExecutionConfig
from model.runtime.distributed import Group, process_group
from model.runtime.errors import InputError, user_errors
from model.runtime.progress import ReportProgress
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


def load(
    artifact: Path, tokenizer: Path, device: torch.device | str = "cpu"
) -> tuple[GPT, Tokenizer]:
    """An artifact's model and its tokenizer; raises InputError if they do not fit each other."""
    model, pieces = load_artifact(artifact, device), Tokenizer(tokenizer)
    if pieces.vocabulary != model.config.vocabulary:
        raise InputError(
            f"{tokenizer}: {pieces.vocabulary} pieces, but {artifact} has a vocabulary of "
            f"{model.config.vocabulary}",
            "give the tokenizer of this artifact (--tokenizer)",
        )
    return model, pieces


@dataclass(frozen=True)
class Scorer:
    """A model with its tokenizer: what `load()` of a bundle returns.

    settings: the sections evaluate, ops and ttt.
    """

    model: GPT
    tokenizer: Tokenizer
    settings: Settings

    @classmethod
    def beside(cls, bundle: str, settings: Settings) -> "Scorer":
        """Load model.pocket and tokenizer.model from the folder of a bundle, on the CPU."""
        place = Path(bundle).parent
        return cls(*load(place / "model.pocket", place / "tokenizer.model"), settings)

    def losses(self, text: str, mode: str = "sliding") -> np.ndarray:
        """Loss of each token of one document and of its end, in nats, fp32 (tokens,).

        mode: plain, sliding (by a window), or ttt (adapting to the text as it is read).
        """
        document, group = as_document(self.tokenizer, text), Group(0, 1, self.model.device)
        given = (self.model, [document], self.settings, execution_of(1 << 15), group)
        return losses_of(mode, *given)[0]

    def score(self, text: str, mode: str = "sliding") -> Score:
        """The sums of one document: loss, bpb, tokens, bytes."""
        sizes = self.tokenizer.sizes(targets_of(as_document(self.tokenizer, text)))
        return Score.of([self.losses(text, mode)], [sizes])


def as_document(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """BOS and the pieces of a text, uint16 (n,)."""
    return np.array([BOS, *tokenizer.encode([text])[0]], np.uint16)


def score(settings: Settings, options: argparse.Namespace, group: Group) -> None:
    """Score the documents that the command line names, and print one line of JSON."""
    model, tokenizer = load(options.artifact, options.tokenizer, group.device)
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
    report: ReportProgress | None = None,
) -> list[np.ndarray]:
    """Losses in nats, fp32 (n,) per document of n tokens (BOS first), in one way of scoring."""
    if mode == TTT:
        return ttt_losses(model, documents, TTTConfig(**settings["ttt"]), execution, group, report)
    tokens = execution.evaluation_tokens
    if mode == "plain":
        return plain_losses(model, documents, tokens, group, report)
    stride = settings["evaluate"]["sliding_stride"]
    return sliding_losses(model, documents, stride, tokens, group, report)


def execution_of(batch_tokens: int) -> ExecutionConfig:
    """How an evaluation is run that takes so many tokens at once."""
    return ExecutionConfig(
        processes=1,
        nodes=1,
        device="auto",
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
    return [as_document(tokenizer, text) for text, _ in Files(options.text, "--text").texts()]
