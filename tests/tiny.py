"""A whole pipeline small enough for any test."""

import json
from pathlib import Path

import torch

DRAWN_ROWS, TEACHER_STEPS, TEACHER_SHIFT = 14, 8, 3.0
NEW = ("dense_time", "guidance_embedding", "qk_norm")  # arguments of the transformer that came after the first weights


def build_tiny_pipeline(width: int = 32):
    """A whole pipeline with random weights: 64 px pictures on a 16x16 grid, 16 text tokens."""
    from diffusers import AutoencoderDC, FlowMatchEulerDiscreteScheduler
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast

    from nitro_e_lite.inference.pipeline import NitroEPipeline
    from nitro_e_lite.model.emmdit import EMMDiTTransformer2DModel
    from nitro_e_lite.scenes.captions import vocabulary

    torch.manual_seed(0)
    transformer = EMMDiTTransformer2DModel(
        in_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        caption_channels=width,
        block_groups=(1, 2, 1),
    )
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "ResBlock"),
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
        scaling_factor=0.5,
    )
    words = {word: index for index, word in enumerate(["</s>", "<unk>", *sorted(vocabulary())])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        padding_side="right",
    )
    text_encoder = LlamaModel(
        LlamaConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=None,
            eos_token_id=0,
        )  # fmt: skip
    )
    pipeline = NitroEPipeline(
        transformer.eval(),
        vae.eval(),
        text_encoder.eval(),
        tokenizer,
        FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
        latents_mean=[0.1, 0.0, -0.1, 0.2],
        latents_std=[1.0, 2.0, 0.5, 1.5],
        max_text_length=16,
        default_steps=3,
        default_guidance=3.0,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_tiny_teacher(folder: Path) -> Path:
    """Writes a tiny teacher with its encoders, so that both `load_pipeline` and `load_encoders` read it."""
    pipeline = build_tiny_pipeline()
    pipeline.register_to_config(max_text_length=32, default_shift=TEACHER_SHIFT)
    with torch.no_grad():  # velocities that change with the state, so that long steps leave the road
        pipeline.transformer.proj_out.weight.mul_(6.0)
    pipeline.save_pretrained(folder)
    (folder / "vae" / "latent_stats.json").write_text(pipeline.stats.to_json())
    file = folder / "transformer" / "config.json"  # as old as the shipped one: it names no new argument
    known = json.loads(file.read_text())
    file.write_text(json.dumps({name: known[name] for name in known if name not in NEW}))
    return folder


def draw(teacher, out, count=DRAWN_ROWS, **options):
    """A drawing of what students learn from, by a tiny teacher."""
    from nitro_e_lite.data import drawn

    options = {"steps": TEACHER_STEPS, "guidance": 3.0, "batch": 3, "shard_rows": 5} | options
    return drawn.Drawing(teacher, drawn.GrammarPrompts(0, count), out, **options)
