"""The one schema of params.yaml: every parameter's type, unit, reason and limits.

The values live in `conf/` (presets) and params.yaml (the experiment in force); nothing has a
default here, so a value is written in exactly one place. Unknown keys, wrong types and impossible
combinations raise InputError with key, reason and repair; the Snakefile loads the file first, so
they show in `snakemake -n`.
"""

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from model.runtime.errors import InputError

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Decay = Annotated[float, Field(ge=0, lt=1)]
OpenFraction = Annotated[float, Field(gt=0, lt=1)]
SMALLEST_VOCABULARY, LARGEST_VOCABULARY = 260, 65_536
TEXT_SUFFIXES = (".jsonl", ".jsonl.zst", ".parquet", ".txt")
# Files that parameters name lie in folders that dvc.yaml knows, or changes would go unnoticed.
TOKENIZERS, BASELINES = Path("tokenizers"), Path("records")


def about(reason: str, unit: str = "") -> Any:
    """Describe a parameter; the text becomes its comment in params.yaml."""
    return Field(description=f"[{unit}] {reason}" if unit else reason)


class Section(BaseModel):
    """A section of params.yaml: immutable, no unknown keys, no silent type conversion."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class DataParams(Section):
    """Where the text comes from."""

    source: Literal["docstrings", "files", "fineweb"] = about(
        "docstrings: documentation of six pinned packages; files: your globs; "
        "fineweb: published shards"
    )
    files: list[str] = about("globs of .jsonl, .jsonl.zst, .parquet or .txt (source: files)")
    validation_files: list[str] = about(
        "globs of the held-out text; empty: hold out validation_fraction of files"
    )
    validation_fraction: Fraction = about(
        "documents held out by the hash of their text, where no validation set is given", "share"
    )
    docstring_megabytes: Positive = about("stop collecting documentation here", "MB")
    fineweb_shards: Count = about("training shards to download (source: fineweb)", "100 M tokens")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.source == "files":
            _require(bool(self.files), "files", "is empty", "name at least one glob")
            _require_readable("files", self.files)
        if self.source != "fineweb":
            _require_readable("validation_files", self.validation_files)
            _require(
                bool(self.validation_files) or 0 < self.validation_fraction < 1,
                "validation_fraction",
                f"{self.validation_fraction} leaves nothing to "
                f"{'train' if self.validation_fraction else 'evaluate'} on",
                "choose a share between 0 and 1, or name validation_files",
            )
        return self


class TokenizerParams(Section):
    """The SentencePiece model."""

    model: str | None = about("a given SentencePiece model, a file in tokenizers/; null: train one")
    vocabulary: Count = about("pieces; the published vocabulary has 1024", "tokens")
    training_megabytes: Positive = about("text the tokenizer is trained on", "MB")
    shard_tokens: Count = about("tokens per shard file", "tokens")


class ModelParams(Section):
    """Architecture; every component can be switched off."""

    vocabulary: Count = about("size of the embedding; must equal the tokenizer's", "tokens")
    layers: Count = about("transformer blocks")
    width: Count = about("residual stream", "values")
    heads: Count = about("query heads")
    kv_heads: Count = about("key/value heads, shared by groups of query heads")
    head_width: Count = about("width of one head", "values")
    mlp_width: Count = about("hidden width of the MLP", "values")
    sequence_length: Count = about("documents are cut here in training and evaluation", "tokens")
    rope_width: Natural = about("dimensions of a head that are rotated; 0 = off", "values")
    rope_base: Positive = about("pair i turns by rope_base^(-2i/rope_width) radians per token")
    query_gain: Positive = about("initial gain of the RMS-normed queries, learned per head")
    exclusive_attention: bool = about("XSA: remove the own value's direction from each head")
    bigram_buckets: Natural = about("rows of the hashed bigram embedding; 0 = off", "rows")
    bigram_width: Count = about("width of the hashed bigram embedding", "values")
    bigram_scale: Positive = about("initial scale of the hashed bigram embedding")
    smear_gate: bool = about("mix each embedding with its predecessor's, learned per channel")
    value_layers: list[Natural] = about("layers that add value embeddings; [] = off")
    value_width: Count = about("width of the value embedding's table", "values")
    value_scale: Positive = about("initial scale of the value embedding")
    input_mix: bool = about("feed the normalized embedding to every block (x0 re-injection)")
    branch_scales: bool = about("learned per-channel scales of attention and MLP outputs")
    depth_scaled_norm: bool = about("multiply normed block inputs by 1/sqrt(layer + 1)")
    skips: bool = about("U-Net skip connections from the first to the second half")
    softcap: NonNegative = about("logits are softcap*tanh(z/softcap); 0 = off", "nats")
    embedding_std: Positive = about("initial standard deviation of the tied embedding")

    @property
    def matrix_values(self) -> int:
        """Values in the matrices of the blocks: attention and MLP."""
        attention = 2 * self.width * self.head_width * (self.heads + self.kv_heads)
        return self.layers * (attention + 2 * self.width * self.mlp_width)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _require(
            self.heads % self.kv_heads == 0,
            "heads",
            f"{self.heads} heads do not divide into {self.kv_heads} kv_heads",
            f"make heads a multiple of kv_heads ({self.kv_heads})",
        )
        _require(
            self.rope_width % 2 == 0 and self.rope_width <= self.head_width,
            "rope_width",
            f"{self.rope_width} is odd or larger than head_width ({self.head_width})",
            "choose an even number up to head_width",
        )
        _require(
            all(layer < self.layers for layer in self.value_layers),
            "value_layers",
            f"{self.value_layers} names a layer that is not among 0..{self.layers - 1}",
            f"use layer numbers below layers ({self.layers})",
        )
        return self


class TrainParams(Section):
    """Optimization."""

    steps: Count = about("upper limit of optimizer steps", "steps")
    budget_seconds: Positive | None = about(
        "training clock at which to stop; null: stop at `steps`, schedule by steps", "s"
    )
    tokens_per_step: Count = about("batch of one optimizer step, all processes together", "tokens")
    tokens_per_microbatch: Count = about("flat span one process takes at once", "tokens")
    compile: bool = about("compile the model on CUDA, before the clock; CPUs always run eagerly")
    cooldown_steps: Natural = about("lr falls linearly to 0 over the last so many steps", "steps")
    matrix_lr: Positive = about("Muon, matrices of the blocks")
    embedding_lr: Positive = about("AdamW, embedding tables")
    scalar_lr: Positive = about("AdamW, scalars, vectors and small projections")
    muon_momentum: Decay = about("Nesterov momentum after its warm-up")
    muon_momentum_start: Decay = about("Nesterov momentum at the first step")
    muon_momentum_steps: Natural = about("length of the momentum warm-up", "steps")
    newton_schulz_steps: Count = about("iterations of the orthogonalization")
    adam_beta1: Decay = about("decay of AdamW's first moment")
    adam_beta2: Decay = about("decay of AdamW's second moment")
    adam_epsilon: Positive = about("added to the root of AdamW's second moment")
    weight_decay: NonNegative = about("decoupled, all groups", "1/(lr*step)")
    gradient_clip: Positive | None = about("global norm after the reduction; null = off")
    ema_decay: Decay = about("per step; the averaged weights are the result; 0 = off")
    qat_threshold: Fraction = about("matrices are rounded once lr multiplier < this; 0 = off")
    qat_bits: Annotated[int, Field(ge=2, le=8)] = about(
        "to which the matrices are rounded then; the artifact's own steps follow from the budget",
        "bits",
    )
    log_every: Count = about("steps between lines of the log", "steps")
    save_every_seconds: Positive = about("between saves of the state for resuming", "s")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _require(
            self.tokens_per_step % self.tokens_per_microbatch == 0,
            "tokens_per_step",
            f"{self.tokens_per_step} is not a multiple of tokens_per_microbatch "
            f"({self.tokens_per_microbatch})",
            "make it a whole number of micro-batches",
        )
        _require(
            self.qat_threshold == 0 or self.cooldown_steps > 0,
            "qat_threshold",
            f"{self.qat_threshold} is never reached: the lr stays at its full value because "
            "cooldown_steps is 0",
            "set cooldown_steps above 0 or qat_threshold to 0",
        )
        _require(
            self.qat_threshold == 0 or self.qat_threshold * self.cooldown_steps > 1,
            "qat_threshold",
            f"{self.qat_threshold} is never reached: the multiplier of the last step is "
            f"1/cooldown_steps = {1 / max(1, self.cooldown_steps):.3g}",
            "raise cooldown_steps or qat_threshold, or set qat_threshold to 0",
        )
        return self


class QuantizeParams(Section):
    """GPTQ, compression and the byte budget."""

    budget_bytes: Count = about(
        "code + artifact, decimal; weights are rounded as finely as it allows", "bytes"
    )
    calibration_sequences: Count = about("documents the model writes for its own calibration")
    calibration_tokens: Count = about("length of each of them", "tokens")
    calibration_temperature: Positive = about("of the sampling")
    calibration_seed: Natural = about("of the sampling, here and for sensitivities")
    cuda_graphs: bool = about("record the work of a calibration token and replay it (CUDA)")
    damping: Positive = about("added to the Hessian's diagonal", "share of its mean")
    block_columns: Count = about("columns GPTQ solves at once", "columns")
    compressors: list[Literal["lzma", "zstd", "brotli"]] = about(
        "tried on what is not codes, which are range-coded; the smallest result wins"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _require(bool(self.compressors), "compressors", "is empty", "name at least one")
        return self


class EvaluateParams(Section):
    """Evaluation without adaptation."""

    documents: Count | None = about("validation documents, evenly spaced; null = all")
    offset: Natural = about(
        "take those that stand so many places later: other documents, to tune on", "documents"
    )
    sliding_stride: Count = about("new tokens scored per window of sequence_length", "tokens")
    tokens_per_batch: Count = about("packed tokens evaluated at once", "tokens")


class TTTParams(Section):
    """Score-first test-time training: each document has adapters of its own."""

    mode: Literal["window", "cached"] = about(
        "window: every chunk reads its context again; cached: keys and values of it are kept"
    )
    chunk: Count = about("tokens scored, then trained on, at a time", "tokens")
    largest_chunk: Count = about(
        "chunks grow up to this, by doubling, to a 64th of what was read; = chunk: all alike",
        "tokens",
    )
    bptt_chunks: Natural = about(
        "that run again before each chunk, its gradient flowing through them (mode cached)",
        "chunks",
    )
    context: Count = about("tokens a chunk's last token sees at most, chunk included", "tokens")
    refresh: Natural = about(
        "compute the kept context anew after so many chunks (mode cached); 0 = never", "chunks"
    )
    steps: Count = about("optimizer steps on each chunk", "steps")
    rank: Count = about("of every adapter")
    sites: list[Literal["query", "key", "value", "attention", "mlp", "head"]] = about(
        "q, k, v projections; branches beside attention and MLP; output head"
    )
    lr: Positive = about("AdamW with beta1 = 0, i.e. RMSProp")
    lr_decay_tokens: Natural = about(
        "lr falls as 1/(1 + position/this) inside a document; 0 = constant", "tokens"
    )
    beta2: Decay = about("decay of the second moment")
    epsilon: Positive = about("added to the root of the second moment")
    weight_decay: NonNegative = about("decoupled", "1/(lr*step)")
    hash_buckets: Natural = about("rows of the eval-time hash embedding; 0 = off", "rows")
    hash_rate: Positive = about("rate of the hash embedding, times lr")
    batch: Count = about(
        "most documents adapted side by side; on CUDA fewer if memory asks for it", "documents"
    )
    tokens_per_batch: Count = about(
        "bound on the tokens they read at once: fewer documents where windows are long", "tokens"
    )
    cuda_graphs: bool = about("record chunks of equal shapes and replay them (CUDA)")
    seed: Natural = about("of the adapters' initial A")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _require(
            self.largest_chunk >= self.chunk,
            "largest_chunk",
            f"{self.largest_chunk} is smaller than chunk ({self.chunk})",
            "make it chunk, or larger",
        )
        _require(
            self.bptt_chunks == 0 or self.mode == "cached",
            "bptt_chunks",
            f"{self.bptt_chunks} asks to run chunks again, but mode window runs all of them",
            "set bptt_chunks to 0, or mode to cached",
        )
        _require(
            self.refresh == 0 or (self.mode == "cached" and self.context > self.longest_pass),
            "refresh",
            f"{self.refresh} asks to renew keys and values, but none are kept",
            "set refresh to 0, or mode to cached and context above (1 + bptt_chunks)·largest_chunk",
        )
        _require(
            self.context >= self.longest_pass,
            "context",
            f"{self.context} is shorter than largest_chunk·(1 + bptt_chunks), {self.longest_pass}",
            "make context at least (1 + bptt_chunks)·largest_chunk",
        )
        _require(
            bool(self.sites) or self.hash_buckets > 0,
            "sites",
            "is empty and hash_buckets is 0: nothing would adapt",
            "name at least one site",
        )
        return self

    @property
    def longest_pass(self) -> int:
        """Tokens of a document that mode `cached` runs at once, at most."""
        return (1 + self.bptt_chunks) * self.largest_chunk


class ReportParams(Section):
    """The significance test, and the time allowed."""

    baseline: str = about(
        "no_ttt: this run's own models without TTT; a file in records/; or none: no test"
    )
    margin: NonNegative = about("the loss must be lower than the baseline by this", "nats/token")
    significance: Fraction = about("claim it if p is below this", "probability")
    confidence: OpenFraction = about("level of the interval of the difference", "probability")
    train_budget_seconds: Positive = about("time allowed for training", "s")
    evaluate_budget_seconds: Positive = about("time allowed for evaluation", "s")


class OpsParams(Section):
    """Accelerators."""

    attention: Literal[
        "auto",
        "reference",
        "padded",
        "torch_varlen",
        "flash_attn_2",
        "flash_attn_3",
        "flash_attn_4",
        "triton",
    ] = about("auto: the fastest that works here; a named one fails if it cannot be had")
    cached_attention: Literal["auto", "reference", "triton"] = about(
        "attention to cached keys and values in TTT and generation; triton: no copies (Hopper)"
    )
    residual_norm: Literal["auto", "reference", "triton"] = about(
        "skip, mix and norm of a block's input, sums of gradients; triton: one kernel each (Hopper)"
    )
    mlp: Literal["auto", "reference", "triton"] = about(
        "MLP of a pass with gradients; triton: up-projection and activation in one kernel (Hopper)"
    )
    adapters: Literal["auto", "reference", "triton"] = about(
        "second products of the adapters in TTT; triton: those of one input in one kernel (Hopper)"
    )


class Params(Section):
    """The whole of params.yaml."""

    seeds: list[Seed] = about("one model each; a p-value needs at least two")
    processes: Count = about("per step; one GPU each if there are GPUs")
    data: DataParams
    tokenizer: TokenizerParams
    model: ModelParams
    train: TrainParams
    quantize: QuantizeParams
    evaluate: EvaluateParams
    ttt: TTTParams
    report: ReportParams
    ops: OpsParams

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _require(bool(self.seeds), "seeds", "is empty", "name at least two, e.g. [0, 1, 2]")
        _require(
            len(set(self.seeds)) == len(self.seeds),
            "seeds",
            f"{self.seeds} names a seed twice",
            "name each seed once",
        )
        _require(
            len(self.seeds) > 1 or self.report.baseline == "none",
            "seeds",
            f"{self.seeds} is one seed, but report.baseline asks for a significance test",
            "add a seed, or set report.baseline to none",
        )
        _require(
            self.model.vocabulary == self.tokenizer.vocabulary,
            "model.vocabulary",
            f"{self.model.vocabulary} differs from tokenizer.vocabulary "
            f"({self.tokenizer.vocabulary})",
            "make them equal",
        )
        _require(
            SMALLEST_VOCABULARY <= self.tokenizer.vocabulary <= LARGEST_VOCABULARY,
            "tokenizer.vocabulary",
            f"{self.tokenizer.vocabulary} is not between {SMALLEST_VOCABULARY} (256 bytes and 4 "
            f"control tokens) and {LARGEST_VOCABULARY} (shards hold 2 bytes per token)",
            "choose one between, e.g. 1024",
        )
        least = self.model.matrix_values // 4
        _require(
            least <= self.quantize.budget_bytes,
            "quantize.budget_bytes",
            f"{self.quantize.budget_bytes} bytes cannot hold the {self.model.matrix_values} values "
            f"of the matrices: {least} bytes even at two bits each",
            "raise budget_bytes, or make the model smaller",
        )
        per_round = self.processes * self.train.tokens_per_microbatch
        _require(
            self.train.tokens_per_step % per_round == 0,
            "processes",
            f"{self.processes} processes x {self.train.tokens_per_microbatch} tokens do not "
            f"divide train.tokens_per_step ({self.train.tokens_per_step})",
            "change processes, train.tokens_per_microbatch or train.tokens_per_step",
        )
        _require(
            self.train.tokens_per_microbatch >= self.model.sequence_length,
            "train.tokens_per_microbatch",
            f"{self.train.tokens_per_microbatch} is shorter than model.sequence_length "
            f"({self.model.sequence_length})",
            "make it at least one sequence",
        )
        _require(
            self.evaluate.sliding_stride <= self.model.sequence_length,
            "evaluate.sliding_stride",
            f"{self.evaluate.sliding_stride} exceeds model.sequence_length "
            f"({self.model.sequence_length}): tokens would be skipped",
            "make it at most sequence_length",
        )
        _require(
            self.quantize.calibration_tokens <= self.model.sequence_length,
            "quantize.calibration_tokens",
            f"{self.quantize.calibration_tokens} exceeds model.sequence_length "
            f"({self.model.sequence_length}): the model never saw such positions",
            "make it at most sequence_length",
        )
        return self


class _Impossible(ValueError):
    """A combination of values that cannot work."""

    def __init__(self, key: str, reason: str, repair: str) -> None:
        super().__init__(reason)
        self.key, self.reason, self.repair = key, reason, repair


def _require(condition: bool, key: str, reason: str, repair: str) -> None:
    if not condition:
        raise _Impossible(key, reason, repair)


def _require_readable(key: str, patterns: list[str]) -> None:
    """Refuse a glob that only names of unknown kind can match."""
    for pattern in patterns:
        *wild, end = re.split(r"[*?\]]", Path(pattern).name)  # names end with `end`
        _require(
            any(end.endswith(known) or (wild and known.endswith(end)) for known in TEXT_SUFFIXES),
            key,
            f"{pattern} names files of unknown kind",
            f"name files that end in {', '.join(TEXT_SUFFIXES)}",
        )


def load_params(path: str | Path = "params.yaml") -> Params:
    """Read and check a parameter file; raises InputError with file, key, reason and repair."""
    return check_params(read_yaml(path, "write it from a preset: pocketlm preset demo"), str(path))


def read_yaml(path: str | Path, otherwise: str) -> Any:
    """Read a YAML 1.2 file like DVC (3e-4 is a number); raises InputError if it is not one.

    otherwise: the repair if there is no such file.
    """
    try:
        return YAML(typ="safe", pure=True).load(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(f"{path}: no such file", otherwise) from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {error}", "correct the line named") from error


def check_params(values: Any, name: str) -> Params:
    """Validate a mapping read from `name`; raises InputError."""
    if not isinstance(values, dict):
        raise InputError(f"{name}: not a mapping of sections", "pocketlm preset demo")
    try:
        params = Params.model_validate(values)
    except ValidationError as error:
        raise InputError(*_explain(error, name)) from error
    _check_files(params, name)
    return params


def _check_files(params: Params, name: str) -> None:
    """Refuse parameters that name files which do not exist, or which DVC would not watch."""
    named = [("tokenizer.model", params.tokenizer.model, TOKENIZERS)]
    if params.report.baseline not in ("no_ttt", "none"):
        named.append(("report.baseline", params.report.baseline, BASELINES))
    for key, file, folder in named:
        if file is None:
            continue
        if not Path(file).is_file():
            raise InputError(f"{name}: {key}: {file}: no such file", f"correct {key}")
        if Path(file).absolute().parent != folder.absolute():
            raise InputError(
                f"{name}: {key}: {file} does not lie in {folder}/, where its changes are noticed",
                f"copy it to {folder}/ and name the copy",
            )


def _explain(error: ValidationError, name: str) -> tuple[str, str]:
    """Turn pydantic's list of errors into one problem and one repair."""
    problems, repairs = [], []
    for item in error.errors():
        path = [str(part) for part in item["loc"]]
        key = ".".join(path)
        cause = (item.get("ctx") or {}).get("error")
        if isinstance(cause, _Impossible):
            key = ".".join([*path, cause.key])
            reason, repair = cause.reason, cause.repair
        elif item["type"] == "extra_forbidden":
            known = _known_keys(path[:-1])
            near = difflib.get_close_matches(path[-1], known, n=1)
            reason = "unknown key"
            repair = (
                f"did you mean {'.'.join([*path[:-1], near[0]])}?"
                if near
                else (f"remove it; known keys: {', '.join(known)}")
            )
        elif item["type"] == "missing":
            reason = "missing"
            repair = f"add {key} (see conf/record.yaml for a value)"
        else:
            reason = f"{item['msg'].lower()}, but it is {item['input']!r}"
            repair = f"correct {key}"
        problems.append(f"{name}: {key}: {reason}")
        repairs.append(repair)
    return "\n".join(problems), "; ".join(repairs)


def _known_keys(path: list[str]) -> list[str]:
    """Names of the fields of the section at `path`."""
    section: Any = Params
    for part in path:
        section = section.model_fields[part].annotation
    return list(section.model_fields)
