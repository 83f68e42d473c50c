"""The `ttt` section of params.yaml: score-first test-time training."""

from dataclasses import dataclass
from typing import Literal

from model.runtime.settings import Settings, require, setting

MIXED = 8  # adapters of a document, at most


@dataclass(frozen=True)
class TTTConfig(Settings):
    """Score-first test-time training: each document has adapters of its own."""

    mode: Literal["window", "cached"] = setting(
        "window: recompute the context for every chunk; cached: keep its keys and values"
    )
    chunk: int = setting("tokens scored, then trained on, at a time", "tokens", ge=1, le=2**24)
    largest_chunk: int = setting(
        "chunks double up to this while at most 1/64 of the tokens read; = chunk: constant size",
        "tokens",
        ge=1,
        le=2**24,
    )
    bptt_chunks: int = setting(
        "truncated BPTT: preceding chunks recomputed with gradient before each chunk (mode cached)",
        "chunks",
        ge=0,
        le=2**20,
    )
    context: int = setting(
        "tokens a chunk's last token sees at most, chunk included", "tokens", ge=1, le=2**24
    )
    refresh: int = setting(
        "recompute the cached context every so many chunks (mode cached); 0 = never",
        "chunks",
        ge=0,
        le=10**9,
    )
    steps: int = setting("optimizer steps on each chunk", "steps", ge=1, le=1000)
    rank: int = setting("of every adapter", ge=1, le=2**16)
    sites: list[Literal["query", "key", "value", "attention", "mlp", "head"]] = setting(
        "q, k, v projections; branches parallel to attention and MLP; output head"
    )
    lr: float = setting("AdamW with beta1 = 0, i.e. RMSProp", gt=0, le=1e6)
    lr_decay_tokens: int = setting(
        "lr falls as 1/(1 + position/this) inside a document; 0 = constant",
        "tokens",
        ge=0,
        le=10**9,
    )
    lr_warmup_tokens: int = setting(
        "lr rises linearly over the first tokens of a document, so many; 0 = at once",
        "tokens",
        off=0,
        ge=0,
        le=10**9,
    )
    lr_mixture: list[float] = setting(
        "adapters per document, of lr times these, or 0 for none; their probabilities are mixed; "
        "[] = off",
        off=[],
        max_length=MIXED,
    )
    mixture_tokens: int = setting(
        "mean age of the losses by which lr_mixture weighs its adapters",
        "tokens",
        off=9,
        ge=1,
        le=10**6,
    )
    beta2: float = setting("decay of the second moment", ge=0, lt=1)
    epsilon: float = setting("added to the root of the second moment", gt=0, le=1)
    weight_decay: float = setting("decoupled", "1/(lr*step)", ge=0, le=1e6)
    hash_buckets: int = setting(
        "rows of the eval-time hash embedding; 0 = off", "rows", ge=0, le=2**18
    )
    hash_rate: float = setting("rate of the hash embedding, times lr", gt=0, le=1e6)
    shared_lr: float = setting(
        "AdamW of the shared weights, on documents that have been scored; 0 = off",
        off=0,
        ge=0,
        le=1,
    )
    round_tokens: int = setting(
        "tokens of such a step, and at least of the documents scored before the next steps",
        "tokens",
        off=49152,
        ge=1,
        le=2**30,
    )
    seed: int = setting("of the adapters' initial A", ge=0, le=2**32 - 1)

    def __post_init__(self) -> None:
        require(
            self.largest_chunk >= self.chunk,
            "largest_chunk",
            f"{self.largest_chunk} is smaller than chunk ({self.chunk})",
            "make it chunk, or larger",
        )
        require(
            self.bptt_chunks == 0 or self.mode == "cached",
            "bptt_chunks",
            f"{self.bptt_chunks} chunks of BPTT, but mode window recomputes the whole context",
            "set bptt_chunks to 0, or mode to cached",
        )
        require(
            self.refresh == 0 or (self.mode == "cached" and self.context > self.longest_pass),
            "refresh",
            f"{self.refresh} asks to recompute cached keys and values, but there are none",
            "set refresh to 0, or mode to cached and context above (1 + bptt_chunks)·largest_chunk",
        )
        require(
            self.context >= self.longest_pass,
            "context",
            f"{self.context} is shorter than largest_chunk·(1 + bptt_chunks), {self.longest_pass}",
            "make context at least (1 + bptt_chunks)·largest_chunk",
        )
        for factor in self.lr_mixture:
            require(
                0 <= factor <= 1e3,
                "lr_mixture",
                f"{factor} is no factor of lr between 0 and 1000",
                "name factors such as [0.5, 1.0, 2.0]",
            )
        require(
            self.lr_mixture.count(0) <= 1 and bool(self.lr_factors),
            "lr_mixture",
            f"{self.lr_mixture} has 0, which stands for the model as it is, twice or alone",
            "name 0 at most once, and factors of lr beside it, such as [0.0, 0.5, 2.0]",
        )
        require(
            bool(self.sites) or self.hash_buckets > 0,
            "sites",
            "is empty and hash_buckets is 0: nothing would adapt",
            "name at least one site",
        )

    @property
    def lr_factors(self) -> list[float]:
        """Factors of lr, one for each of a document's adapters."""
        return [factor for factor in self.lr_mixture or [1.0] if factor]

    @property
    def unadapted(self) -> bool:
        """Whether the model as it is, without adapters, is mixed with them."""
        return 0 in self.lr_mixture

    @property
    def rates(self) -> int:
        """Number of a document's adapters."""
        return len(self.lr_factors)

    @property
    def longest_pass(self) -> int:
        """Tokens of a document that mode `cached` runs at once, at most."""
        return (1 + self.bptt_chunks) * self.largest_chunk
