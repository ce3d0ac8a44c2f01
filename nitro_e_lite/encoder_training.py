"""Training of the lite encoders: a small DC-AE and a small Llama, both on synthetic scenes.

At full scale the two encoders come ready-made and stay frozen. At lite scale the same library classes are
trained here, in minutes, and then frozen too.

**Autoencoder.** What a diffusion model wants from latents is not only that they decode well, but that they
are easy to predict. Three terms ask for it: the picture itself (absolute, squared and gradient error);
gaussian noise of up to ``latent_noise`` standard deviations on the latents, so that the decoder forgives
small errors of the diffusion model; and on every ``half_resolution_every``-th step *scale equivariance*:
latents averaged 2x2 must decode to the picture averaged 2x2, which removes high frequencies from the
latents. Source: arXiv 2502.14831 (diffusability), 2502.09509.

**Language model.** A causal language model learns to predict the next word, and may forget at the last word
what the first was. The diffusion model needs the opposite: hidden states which say which colour belongs to
which shape. So a second objective is added: from the *one* final hidden state at a random position (a word,
the end token or a padding token) a two-layer decoder, dropped after training, must write another caption of
the same scene. Whatever the decoder can say of the scene, that single vector had to hold. Differs:
Llama-3.2 is a plain causal language model; three million parameters need the hint.

Both runs are a pure function of their config: step k draws its scenes, noise and positions from (seed, k)
alone, so a killed run continues bit for bit from its last checkpoint.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nitro_e_lite.encoders import LatentStats, clean_caption, images_to_tensor
from nitro_e_lite.fitting import FitConfig, fit, step_generator
from nitro_e_lite.scenes import COLORS, SIZES, Scene, caption, render, sample_scene, words

END = "</s>"
PLACE_WORDS = frozenset("left right above over higher below under underneath lower top bottom".split())
Tokens = dict[str, Tensor]  # input_ids and attention_mask, (B, L)
HELD_OUT_SEED = 10_000  # scenes of this seed are never trained on


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig(FitConfig):
    """The lite autoencoder: f8, so that a 128 px picture becomes a 16x16 grid of latents."""

    steps: int = 3600
    batch_size: int = 16
    image_size: int = 128
    window: int = 64  # pixels a side of the part of a picture that a step looks at
    latent_channels: int = 8
    encoder_widths: tuple[int, ...] = (16, 16, 32, 128)  # first unused: no layer at 128x128
    encoder_layers: tuple[int, ...] = (0, 1, 1, 1)
    decoder_widths: tuple[int, ...] = (16, 16, 64, 128)
    decoder_layers: tuple[int, ...] = (0, 1, 1, 3)
    latent_noise: float = 0.1  # largest noise on the latents, in standard deviations of a channel
    half_resolution_every: int = 6  # 0 switches scale equivariance off
    squared_weight: float = 2.0
    gradient_weight: float = 1.0
    statistics_scenes: int = 2048


@dataclass(frozen=True, kw_only=True)
class LanguageModelConfig(FitConfig):
    """The lite text encoder: a byte-pair tokenizer and a small Llama with grouped-query attention."""

    steps: int = 1150
    batch_size: int = 64
    warmup_steps: int = 50
    learning_rate: float = 0.02  # of Muon, on the hidden matrices
    adam_learning_rate: float = 3e-3  # of AdamW, on embeddings and norms
    max_length: int = 32
    vocabulary_size: int = 512
    tokenizer_scenes: int = 4000
    width: int = 256
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    intermediate: int = 640
    decoder_layers: int = 2
    paraphrase_weight: float = 1.0
    candidates: int = 6  # captions among which the paraphrase is chosen


# -----------------------------------------------------------------------------------------------------------
# Autoencoder
# -----------------------------------------------------------------------------------------------------------


def build_autoencoder(config: AutoencoderConfig) -> AutoencoderDC:
    """A small `AutoencoderDC` of residual blocks, no attention, drawn from ``config.seed``."""
    torch.manual_seed(config.seed)
    stages = len(config.encoder_widths)
    return AutoencoderDC(
        latent_channels=config.latent_channels,
        encoder_block_out_channels=config.encoder_widths,
        decoder_block_out_channels=config.decoder_widths,
        encoder_layers_per_block=config.encoder_layers,
        decoder_layers_per_block=config.decoder_layers,
        encoder_qkv_multiscales=((),) * stages,
        decoder_qkv_multiscales=((),) * stages,
        decoder_conv_act_fn="silu",
    ).to(memory_format=torch.channels_last)


def scene_images(seed: int, indices: range, size: int, split: str = "train") -> Tensor:
    """Renders scenes as float images (B, 3, size, size) in [-1, 1]."""
    return images_to_tensor(np.stack([render(sample_scene(seed, i, split), size) for i in indices]))


def scene_windows(config: AutoencoderConfig, indices: range, generator: torch.Generator) -> Tensor:
    """One square window (B, 3, window, window) of each scene, around one of its objects.

    Most of a scene is soft background, which is learned at once; windows around objects are a quarter of the work and
    hold most of the edges. The network is convolutional: what it learns in windows holds for whole pictures.
    """
    size, window = config.image_size, config.window
    windows = []
    for index in indices:
        scene = sample_scene(config.seed, index)
        which, *jitter = torch.rand(3, generator=generator).tolist()
        centre = scene.objects[int(which * len(scene.objects))]
        corner = (centre.y * size - window * jitter[0], centre.x * size - window * jitter[1])
        top, left = (min(max(round(c), 0), size - window) for c in corner)
        windows.append(render(scene, size)[top : top + window, left : left + window])
    return images_to_tensor(np.stack(windows))


def picture_error(decoded: Tensor, target: Tensor, config: AutoencoderConfig) -> Tensor:
    """Absolute + squared + gradient error of images (B, 3, H, W)."""
    error = decoded - target
    slopes = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    plain = error.abs().mean() + config.squared_weight * error.square().mean()
    return plain + config.gradient_weight * slopes


def autoencoder_losses(vae: AutoencoderDC, config: AutoencoderConfig, step: int) -> dict[str, Tensor]:
    """Loss of one step and the PSNR of its (noisy, possibly half-size) reconstruction in dB."""
    generator = step_generator(config.seed, step)
    first = step * config.batch_size
    images = scene_windows(config, range(first, first + config.batch_size), generator)
    latents = vae.encode(images.contiguous(memory_format=torch.channels_last)).latent  # (B, C, H/8, W/8)
    spread = latents.std(dim=(0, 2, 3), keepdim=True)  # with gradient: growing latents gain nothing
    every = config.half_resolution_every
    if every and step % every == every - 1:
        latents, images = F.avg_pool2d(latents, 2), F.avg_pool2d(images, 2)
    level = config.latent_noise * torch.rand(len(latents), 1, 1, 1, generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    decoded = vae.decode(latents + level * spread * noise).sample
    psnr = -10 * torch.log10((decoded.detach() - images).square().mean() / 4)
    return {"loss": picture_error(decoded, images, config), "psnr": psnr}


def train_autoencoder(
    config: AutoencoderConfig, run_dir: str | Path, resume: bool = False, stop_at: int | None = None
) -> Path | None:
    """Trains the lite autoencoder and measures its latents.

    Args:
        config: everything the result depends on.
        run_dir: gets ``metrics.jsonl``, ``checkpoints/`` and, at the end, ``final/vae``.
        resume: continue a run that is already there.
        stop_at: ends early after this step, without a result.

    Returns:
        ``run_dir/final/vae``: an `AutoencoderDC` folder with ``latent_stats.json``; None when stopped early.
    """
    run_dir = Path(run_dir)
    vae = build_autoencoder(config)
    adam = torch.optim.AdamW(vae.parameters(), lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    losses = partial(autoencoder_losses, vae, config)
    fit(config, vae, [adam], losses, run_dir, resume, "autoencoder", stop_at)
    if stop_at is not None and stop_at < config.steps:
        return None
    folder = run_dir / "final" / "vae"
    vae.eval().save_pretrained(folder)
    stats = measure_latents(vae, config.statistics_scenes, config.image_size, config.seed)
    (folder / "latent_stats.json").write_text(stats.to_json(), encoding="utf-8")
    return folder


@torch.no_grad()
def measure_latents(vae: AutoencoderDC, scenes: int, size: int, seed: int, batch: int = 32) -> LatentStats:
    """Mean and standard deviation of every latent channel over ``scenes`` training scenes."""
    count, total, squares = 0, 0.0, 0.0
    for first in range(0, scenes, batch):
        images = scene_images(seed, range(first, min(first + batch, scenes)), size)
        latents = vae.encode(images.contiguous(memory_format=torch.channels_last)).latent.double()
        count += latents.numel() // latents.shape[1]
        total = total + latents.sum(dim=(0, 2, 3))
        squares = squares + latents.square().sum(dim=(0, 2, 3))
    mean = total / count
    return LatentStats(tuple(mean.tolist()), tuple((squares / count - mean**2).sqrt().tolist()))


# -----------------------------------------------------------------------------------------------------------
# Language model
# -----------------------------------------------------------------------------------------------------------


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


class Paraphraser(nn.Module):
    """The language model that is kept and the small decoder that teaches it, which is not."""

    def __init__(self, config: LanguageModelConfig, vocabulary_size: int, end: int):
        super().__init__()
        torch.manual_seed(config.seed)

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

    def forward(self, first: Tokens, second: Tokens, position: Tensor) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            first: tokens of one caption, ``input_ids`` and ``attention_mask`` (B, L).
            second: tokens of another caption of the same scene, (B, L).
            position: (B,) where in the first caption the decoder looks.
        """
        states = self.encoder.model(**first).last_hidden_state  # (B, L, D)
        memory = states[torch.arange(len(states)), position]  # (B, D)
        next_word = token_loss(self.encoder.lm_head(states[:, :-1]), first, 1)
        length = int(second["attention_mask"].sum(dim=1).max())
        words = self.decoder.model.embed_tokens(second["input_ids"][:, : length - 1])
        inputs = torch.cat([memory[:, None], words], dim=1)  # (B, length, D)
        logits = self.decoder(inputs_embeds=inputs).logits
        return {"next_word": next_word, "paraphrase": token_loss(logits, second, 0)}


def token_loss(logits: Tensor, tokens: Tokens, shift: int) -> Tensor:
    """Cross-entropy of ``logits`` (B, N, V) against tokens ``shift``, ``shift + 1``, …, padding left out."""
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


def tokenize(tokenizer: PreTrainedTokenizerFast, captions: list[str], length: int) -> Tokens:
    """Tokens (B, length) of captions."""
    batch = tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


def language_model_losses(
    model: Paraphraser, tokenizer: PreTrainedTokenizerFast, config: LanguageModelConfig, step: int
) -> dict[str, Tensor]:
    """Loss of one step: next word + paraphrase."""
    generator = step_generator(config.seed, step)
    scenes = [sample_scene(config.seed, step * config.batch_size + i) for i in range(config.batch_size)]
    drawn = torch.randint(1 << 20, (len(scenes), 1 + config.candidates), generator=generator).tolist()
    pairs = [caption_pair(scene, variants) for scene, variants in zip(scenes, drawn, strict=True)]
    first, second = (tokenize(tokenizer, list(side), config.max_length) for side in zip(*pairs, strict=True))
    ends = first["attention_mask"].sum(dim=1) - 1  # index of the end token
    random = torch.rand(2, len(scenes), generator=generator)
    inside = (random[0] * ends).long()  # a word
    after = ends + (random[0] * (config.max_length - ends)).long()  # the end token or padding
    losses = model(first, second, torch.where(random[1] < 0.5, inside, after))
    return {"loss": losses["next_word"] + config.paraphrase_weight * losses["paraphrase"], **losses}


def train_language_model(
    config: LanguageModelConfig, run_dir: str | Path, resume: bool = False, stop_at: int | None = None
) -> Path | None:
    """Trains the lite tokenizer and language model.

    Args:
        config: everything the result depends on.
        run_dir: gets ``metrics.jsonl``, ``checkpoints/`` and, at the end, ``final/tokenizer`` and
            ``final/text_encoder``.
        resume: continue a run that is already there.
        stop_at: ends early after this step, without a result.

    Returns:
        ``run_dir/final``; None when stopped early.
    """
    run_dir = Path(run_dir)
    tokenizer = train_tokenizer(config)
    model = Paraphraser(config, len(tokenizer), tokenizer.eos_token_id)
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or ".layers." not in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=config.learning_rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=config.adam_learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    losses = partial(language_model_losses, model, tokenizer, config)
    fit(config, model, optimizers, losses, run_dir, resume, "language model", stop_at)
    if stop_at is not None and stop_at < config.steps:
        return None
    final = run_dir / "final"
    tokenizer.save_pretrained(final / "tokenizer")
    model.encoder.model.eval().save_pretrained(final / "text_encoder")
    return final
