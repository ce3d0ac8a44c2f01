"""Training of the lite text encoder: a byte-pair tokenizer and a small Llama, both on captions of synthetic scenes.

At full scale the language model comes ready-made and stays frozen. At lite scale the same library class is trained
here, in minutes, and then frozen too.

A causal language model learns to predict the next word, and may forget at the last word what the first was. The
diffusion model needs the opposite: hidden states which say which colour belongs to which shape, and where. So two
objectives are added, whose own weights are dropped after training:

* **paraphrase**: from the *one* final hidden state at a random position (a word, the end token or a padding token) a
  two-layer decoder must write another caption of the same scene. Whatever it can say of the scene, that single vector
  had to hold.
* **place**: from every final hidden state a linear layer must say where things are, see `grounding.py`.

Differs: Llama-3.2 is a plain causal language model; three million parameters need the hints.

A language model that a transformer has learned to read can be taught more without spoiling that: `start_from` goes on
from its weights and `keep` holds the features near what they were.
"""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nitro_e_lite.config import (
    AnyText,
    NonNegative,
    NonNegativeNumber,
    Positive,
    PositiveNumber,
    RunConfig,
    Share,
    settings,
)
from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.files import find_weights
from nitro_e_lite.inference.encoders import clean_caption
from nitro_e_lite.inference.hub import load_text_encoder
from nitro_e_lite.model.tokens import LITE_TEXT_LENGTH
from nitro_e_lite.runtime import generator
from nitro_e_lite.scenes.captions import caption, words
from nitro_e_lite.scenes.grammar import COLORS, SIZES, Scene, sample_scene
from nitro_e_lite.scenes.minimal_pairs import REDRAW
from nitro_e_lite.stages.grounding import PLACE_WORDS, PlaceReader, Said, said_places
from nitro_e_lite.training.engine import Engine, Placement, Stage, Trainable
from nitro_e_lite.training.optimizers import adamw, cosine_scale

END = "</s>"
Tokens = dict[str, Tensor]  # input_ids and attention_mask, (B, L)


@settings
class LanguageModelConfig(RunConfig):
    """The lite text encoder: a byte-pair tokenizer and a small Llama with grouped-query attention."""

    steps: Positive = 1150
    batch_size: Positive = 64
    warmup_steps: NonNegative = 50  # linear; then the rates fall to zero along a cosine
    learning_rate: NonNegativeNumber = 0.02  # of Muon, on the hidden matrices
    adam_learning_rate: NonNegativeNumber = 3e-3  # of AdamW, on embeddings and norms
    max_grad_norm: PositiveNumber = 1.0  # the global gradient norm is clipped there
    max_length: Positive = LITE_TEXT_LENGTH  # tokens of a caption
    vocabulary_size: Positive = 512
    tokenizer_scenes: Positive = 4000
    width: Positive = 256
    layers: Positive = 4
    heads: Positive = 4
    key_value_heads: Positive = 2
    intermediate: Positive = 640
    decoder_layers: Positive = 2
    candidates: Positive = 6  # captions among which the paraphrase is chosen
    related: Share = 0.5  # share of the scenes that are drawn among those with a clear relation, to teach places
    start_from: AnyText = ""  # "lite" or a folder: tokenizer and language model to go on from
    next_word_weight: NonNegativeNumber = 1.0
    paraphrase_weight: NonNegativeNumber = 1.0
    place_weight: NonNegativeNumber = 1.0
    # of the squared distance from the features of `start_from`, relative to their variance
    keep_weight: NonNegativeNumber = 0.0

    def __post_init__(self):
        if self.keep_weight and not self.start_from:
            raise InvalidValue(f"keep_weight={self.keep_weight}: there is nothing to keep; name start_from")
        if self.width % (2 * self.heads):  # positions turn the numbers of a head in pairs
            raise InvalidValue(f"width={self.width}: must be a multiple of twice heads={self.heads}")
        if self.heads % self.key_value_heads:
            raise InvalidValue(f"heads={self.heads}: must be a multiple of key_value_heads={self.key_value_heads}")


def train_tokenizer(config: LanguageModelConfig) -> PreTrainedTokenizerFast:
    """Byte-pair tokenizer learned from captions: caption -> tokens + end token, padded with the end token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    scenes = (sample_scene(config.seed, i) for i in range(config.tokenizer_scenes))
    tokenizer.train_from_iterator((clean_caption(caption(s, 0)) for s in scenes), trainer)
    end = tokenizer.token_to_id(END)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {END}", special_tokens=[(END, end)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        model_max_length=config.max_length,
        padding_side="right",
    )


class Student(nn.Module):
    """The language model that is kept, and what teaches it, which is not: a small decoder and a reader of places."""

    def __init__(self, config: LanguageModelConfig, vocabulary_size: int, end: int):
        super().__init__()
        torch.manual_seed(config.seed)
        self.config = config

        def llama(layers: int) -> LlamaForCausalLM:
            return LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=vocabulary_size,
                    hidden_size=config.width,
                    intermediate_size=config.intermediate,
                    num_hidden_layers=layers,
                    num_attention_heads=config.heads,
                    num_key_value_heads=config.key_value_heads,
                    max_position_embeddings=4 * config.max_length,
                    tie_word_embeddings=True,
                    bos_token_id=None,
                    eos_token_id=end,
                    pad_token_id=end,
                    initializer_range=0.05,
                )
            )

        self.encoder = llama(config.layers)
        self.decoder = llama(config.decoder_layers)
        self.places = PlaceReader(config.width)

    def forward(self, first: Tokens, second: Tokens, position: Tensor, said: Said) -> tuple[Tensor, dict[str, Tensor]]:
        """Features and losses of a batch; a loss whose weight is zero is left out.

        Args:
            first: tokens of one caption, `input_ids` and `attention_mask` (B, L).
            second: tokens of another caption of the same scene, (B, L).
            position: (B,) where in the first caption the decoder looks.
            said: what the first caption has said of places.
        """
        states, losses = self.encoder.model(**first).last_hidden_state, {}  # (B, L, D)
        if self.config.next_word_weight:
            losses["next_word"] = token_loss(self.encoder.lm_head(states[:, :-1]), first, 1)
        if self.config.paraphrase_weight:
            memory = states[torch.arange(len(states)), position]  # (B, D)
            length = int(second["attention_mask"].sum(dim=1).max())
            words = self.decoder.model.embed_tokens(second["input_ids"][:, : length - 1])
            inputs = torch.cat([memory[:, None], words], dim=1)  # (B, length, D)
            losses["paraphrase"] = token_loss(self.decoder(inputs_embeds=inputs).logits, second, 0)
        if self.config.place_weight:
            losses["place"] = self.places.loss(states, said)
        return states, losses


def token_loss(logits: Tensor, tokens: Tokens, shift: int) -> Tensor:
    """Cross-entropy of `logits` (B, N, V) against tokens `shift`, `shift + 1`, …, padding left out."""
    span = slice(shift, shift + logits.shape[1])
    target = tokens["input_ids"][:, span].masked_fill(tokens["attention_mask"][:, span] == 0, -100)
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-100)


def mentioned(text: str) -> set[str]:
    """What a caption says beyond shapes: its colours, its sizes, and "place" when it says where things are."""
    said = set(words(text))
    return (said & {*COLORS, *SIZES}) | ({"place"} if said & PLACE_WORDS else set())


def caption_pair(scene: Scene, variants: list[int]) -> tuple[str, str]:
    """Two captions of a scene which say about the same: of all later variants the one nearest to the first.

    A second caption that mentions what the first left out would teach guessing.
    """
    first, *others = (clean_caption(caption(scene, v)) for v in variants)
    facts = mentioned(first)
    return first, min(others, key=lambda other: (len(facts ^ mentioned(other)), other == first))


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: list[str], length: int) -> tuple[Tokens, Tensor]:
    """Tokens (B, length) of captions, and where in the text each of them ends (B, length), 0 for the end token."""
    settings = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
    batch = tokenizer(captions, return_offsets_mapping=True, **settings)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}, batch["offset_mapping"][..., 1]


def draw_scene(config: LanguageModelConfig, index: int, related: bool) -> Scene:
    """Scene `index` of the data set, or with `related` the next draw of it that has a clear relation."""
    scene = sample_scene(config.seed, index)
    while related and scene.relation is None:
        index += REDRAW
        scene = sample_scene(config.seed, index)
    return scene


class LanguageModel(Stage):
    """The lite tokenizer and language model in training; `export` leaves `tokenizer` and `text_encoder`.

    Raises:
        EncoderUnavailable: `config.start_from` holds no language model.
    """

    def __init__(self, config: LanguageModelConfig, placement: Placement):
        self.config, self.placement = config, placement
        if config.start_from:
            try:
                source = find_weights(config.start_from, "text_encoder/model*.safetensors").parent
            except FileNotFoundError:
                source = config.start_from  # a hub id, or a folder that holds tokenizer and model side by side
            self.tokenizer, self.before = load_text_encoder(source, device=placement.device)
        else:
            self.tokenizer, self.before = train_tokenizer(config), None
        self.student = Student(config, len(self.tokenizer), self.tokenizer.eos_token_id)
        if self.before is not None:
            self.student.encoder.model.load_state_dict(self.before.state_dict())
        schedule = partial(cosine_scale, steps=config.steps, warmup_steps=config.warmup_steps)
        self.modules = {"student": Trainable(self.student, self._optimizers, schedule, config.max_grad_norm)}

    def _optimizers(self, masters: dict[str, Tensor]) -> dict[str, torch.optim.Optimizer]:
        matrices = [p for n, p in masters.items() if p.ndim == 2 and ".layers." in n]
        others = [p for n, p in masters.items() if p.ndim != 2 or ".layers." not in n]
        rate = self.config.adam_learning_rate
        return {
            "muon": torch.optim.Muon(matrices, lr=self.config.learning_rate, weight_decay=0.01),
            "adamw": adamw(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
        }

    def losses(self, step: int, part: int) -> dict[str, dict[str, Tensor]]:
        """The weighted sum of next word, paraphrase, place and the distance from `start_from`, and each of them."""
        config, rows = self.config, self.placement.microbatches[part]
        count, mine = config.batch_size, slice(rows.start, rows.stop)
        related = torch.rand(count, generator=generator(config.seed, step, "related"))[mine] < config.related
        variants = torch.randint(
            1 << 20, (count, 1 + config.candidates), generator=generator(config.seed, step, "caption")
        )
        random = torch.rand(2, count, generator=generator(config.seed, step, "position"))[:, mine]
        scenes = [draw_scene(config, step * count + row, one) for row, one in zip(rows, related.tolist(), strict=True)]
        pairs = [caption_pair(scene, some) for scene, some in zip(scenes, variants[mine].tolist(), strict=True)]
        captions, others = (list(side) for side in zip(*pairs, strict=True))
        first, text_ends = tokenize(self.tokenizer, captions, config.max_length)
        second, _ = tokenize(self.tokenizer, others, config.max_length)
        ends = first["attention_mask"].sum(dim=1) - 1  # index of the end token
        inside = (random[0] * ends).long()  # a word
        after = ends + (random[0] * (config.max_length - ends)).long()  # the end token or padding
        position = torch.where(random[1] < 0.5, inside, after).to(self.placement.device)
        said = said_places(captions, scenes, text_ends)
        first, second = ({name: x.to(self.placement.device) for name, x in t.items()} for t in (first, second))
        states, losses = self.student(first, second, position, said.to(self.placement.device))
        if config.keep_weight:
            with torch.no_grad():
                old = self.before(**first).last_hidden_state
            losses["keep"] = (states - old).square().mean() / (old - old.mean(dim=(0, 1))).square().mean()
        total = sum(getattr(config, f"{name}_weight") * loss for name, loss in losses.items())
        return {"student": {"loss": total, **losses}}

    def export(self, weights: dict[str, dict[str, Tensor]], folder: Path) -> None:
        """`tokenizer` and `text_encoder`, the model without its head."""
        self.tokenizer.save_pretrained(folder / "tokenizer")
        self.student.encoder.model.save_pretrained(folder / "text_encoder")


def train_language_model(
    config: LanguageModelConfig, run_dir: str | Path, resume: bool = False, device: str | None = None
) -> Path:
    """Trains the lite tokenizer and language model; see `Engine`. Returns `run_dir/final`."""
    return Engine(config, LanguageModel, run_dir, resume, device).fit()
