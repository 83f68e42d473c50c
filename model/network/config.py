"""The `model` section of params.yaml: the architecture."""

from dataclasses import dataclass

from model.runtime.settings import Settings, require, setting

GATE_INPUTS = 12  # values of a token's vector that its gates see
# Limits, so that a file of a stranger cannot ask for more than a model of this kind needs.
LAYERS, WIDTH, HEADS, TABLE_ROWS = 256, 2**16, 2**10, 2**18
LARGEST_WEIGHTS = 2**27  # of matrices and tables: 512 MiB in fp32
LARGEST_NUMBER = 1e9


@dataclass(frozen=True)
class ModelConfig(Settings):
    """Architecture; every component can be switched off."""

    vocabulary: int = setting(
        "size of the embedding; must equal the tokenizer's", "tokens", ge=1, le=TABLE_ROWS
    )
    layers: int = setting("transformer blocks", ge=1, le=LAYERS)
    width: int = setting("residual stream", "values", ge=1, le=WIDTH)
    heads: int = setting("query heads", ge=1, le=HEADS)
    kv_heads: int = setting("key/value heads, shared by groups of query heads", ge=1, le=HEADS)
    head_width: int = setting("width of one head", "values", ge=1, le=HEADS)
    mlp_width: int = setting("hidden width of the MLP", "values", ge=1, le=WIDTH)
    sequence_length: int = setting(
        "documents are cut here in training and evaluation", "tokens", ge=1, le=2**24
    )
    rope_width: int = setting(
        "dimensions of a head that are rotated; 0 = off", "values", ge=0, le=1024
    )
    rope_base: float = setting(
        "pair i is rotated by rope_base^(-2i/rope_width) radians per token",
        gt=0,
        le=LARGEST_NUMBER,
    )
    query_gain: float = setting(
        "initial gain of the RMS-normed queries, learned per head", gt=0, le=LARGEST_NUMBER
    )
    exclusive_attention: bool = setting("XSA: remove the own value's direction from each head")
    bigram_buckets: int = setting(
        "rows of the hashed bigram embedding; 0 = off", "rows", ge=0, le=TABLE_ROWS
    )
    bigram_width: int = setting("width of the hashed bigram embedding", "values", ge=1, le=WIDTH)
    bigram_scale: float = setting(
        "initial scale of the hashed bigram embedding", gt=0, le=LARGEST_NUMBER
    )
    smear_gate: bool = setting("mix each embedding with its predecessor's, learned per channel")
    value_layers: list[int] = setting(
        "layers that add value embeddings; [] = off", max_length=LAYERS
    )
    value_width: int = setting("width of the value embedding's table", "values", ge=1, le=WIDTH)
    value_scale: float = setting("initial scale of the value embedding", gt=0, le=LARGEST_NUMBER)
    input_mix: bool = setting("feed the normalized embedding to every block (x0 re-injection)")
    branch_scales: bool = setting("learned per-channel scales of attention and MLP outputs")
    depth_scaled_norm: bool = setting("multiply normed block inputs by 1/sqrt(layer + 1)")
    skips: bool = setting("U-Net skip connections from the first to the second half")
    softcap: float = setting(
        "logits are softcap*tanh(z/softcap); 0 = off", "nats", ge=0, le=LARGEST_NUMBER
    )
    embedding_std: float = setting(
        "initial standard deviation of the tied embedding", gt=0, le=LARGEST_NUMBER
    )
    layer_order: list[int] = setting(
        "depth recurrence: layers as a pass executes them, some more than once; [] = off",
        off=[],
        max_length=LAYERS,
    )
    parallel_from_layer: int | None = setting(
        "layers from this on have two residual lanes, for attention and MLP; null = off",
        off=None,
        ge=0,
        le=256,
    )
    output_gate: bool = setting("gate each head's output by the block's input", off=False)
    skip_init: float = setting(
        "initial weight of the skips", off=1.0, ge=-LARGEST_NUMBER, le=LARGEST_NUMBER
    )
    input_mix_init: float = setting(
        "initial weight of the embedding that input_mix feeds to every block",
        off=0.0,
        ge=-LARGEST_NUMBER,
        le=LARGEST_NUMBER,
    )
    mlp_slope: float = setting(
        "slope of the MLP's leaky ReLU for negative inputs, before the square", off=0.5, ge=0, le=1
    )
    exclusive_init: float | None = setting(
        "XSA removes a share tanh(alpha), learned per head; initial alpha; null = off, it removes "
        "all",
        off=None,
        ge=-10,
        le=10,
    )
    token_smear_gate: bool = setting(
        "add the predecessor's embedding to each token's, gated by the token", off=False
    )
    mudd_skips: bool = setting(
        "mix earlier states in before and after the last layer, weighted by each token", off=False
    )

    @property
    def executed_layers(self) -> list[int]:
        """The layers in the order in which a forward pass executes them."""
        return self.layer_order or list(range(self.layers))

    @property
    def lane_layers(self) -> range:
        """The layers with two residual lanes."""
        first = self.layers if self.parallel_from_layer is None else self.parallel_from_layer
        return range(first, self.layers)

    @property
    def matrix_values(self) -> int:
        """Values in the matrices of the blocks: attention and MLP."""
        attention = 2 * self.width * self.head_width * (self.heads + self.kv_heads)
        return self.layers * (attention + 2 * self.width * self.mlp_width)

    @property
    def table_values(self) -> int:
        """Values in the embeddings and their projections."""
        values = self.vocabulary * self.width
        if self.bigram_buckets:
            values += self.bigram_width * (self.bigram_buckets + self.width)
        if self.value_layers:
            values += self.value_width * (self.vocabulary + self.kv_heads * self.head_width)
        return values

    @property
    def weights(self) -> int:
        """Values in matrices and tables; those in vectors, some thousand, are left out."""
        return self.matrix_values + self.table_values

    def __post_init__(self) -> None:
        require(
            self.weights <= LARGEST_WEIGHTS,
            "width",
            f"the model has {self.weights:,} weights; at most {LARGEST_WEIGHTS:,} are allowed",
            "make it smaller: width, layers, mlp_width, vocabulary, bigram_buckets",
        )
        require(
            self.heads % self.kv_heads == 0,
            "heads",
            f"{self.heads} heads do not divide into {self.kv_heads} kv_heads",
            f"make heads a multiple of kv_heads ({self.kv_heads})",
        )
        require(
            self.rope_width % 2 == 0 and self.rope_width <= self.head_width,
            "rope_width",
            f"{self.rope_width} is odd or larger than head_width ({self.head_width})",
            "choose an even number up to head_width",
        )
        for key, most in (("value_layers", self.layers), ("layer_order", 1024)):
            listed = len(getattr(self, key))
            require(listed <= most, key, f"lists {listed} layers", f"list at most {most}")
        require(
            set(self.value_layers) <= set(range(self.layers)),
            "value_layers",
            f"{self.value_layers} names a layer that is not among 0..{self.layers - 1}",
            f"use layer numbers below layers ({self.layers})",
        )
        require(
            set(self.executed_layers) == set(range(self.layers)),
            "layer_order",
            f"{self.layer_order} does not name each of the layers 0..{self.layers - 1}",
            "name every layer at least once, e.g. [0, 1, 2, 1, 2, 3], or [] for each once",
        )
        require(
            self.parallel_from_layer is None or self.parallel_from_layer < self.layers,
            "parallel_from_layer",
            f"{self.parallel_from_layer} is not among the layers 0..{self.layers - 1}",
            f"use a layer number below layers ({self.layers}), or null",
        )
        lanes = [layer in self.lane_layers for layer in self.executed_layers]
        require(
            lanes == sorted(lanes),
            "layer_order",
            f"{self.layer_order} executes a layer below parallel_from_layer "
            f"({self.parallel_from_layer}) after one with two lanes",
            "let the recurrence end before the lanes begin",
        )
        for key in ("output_gate", "token_smear_gate"):
            require(
                not getattr(self, key) or self.width >= GATE_INPUTS,
                key,
                f"the gates see {GATE_INPUTS} values of the input, but width is {self.width}",
                f"make the model wider, or set {key} to false",
            )
        require(
            not self.mudd_skips or self.layers > 2,
            "mudd_skips",
            f"they need the state between two layers and the last, of {self.layers} layers",
            "make the model deeper, or set mudd_skips to false",
        )
        require(
            self.exclusive_init is None or self.exclusive_attention,
            "exclusive_init",
            f"{self.exclusive_init} is a share of what exclusive_attention removes, which is off",
            "set exclusive_attention to true, or exclusive_init to null",
        )
