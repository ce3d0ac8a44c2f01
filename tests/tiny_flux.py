"""A FluxPipeline with random weights, small enough for any test: 32 px pictures, real FLUX arguments."""

import torch


def build_tiny_flux():
    """The real class with one block of each kind; it takes prompts of eight words and any other as unknown."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(0)
    words = {word: k for k, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "blue", "star", "heart"])}

    def tokenizer():
        inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        inner.pre_tokenizer = pre_tokenizers.Whitespace()
        inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        marks = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
        return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=16, **marks)

    clip = CLIPTextConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=16,
        bos_token_id=0,
        eos_token_id=1,
        max_position_embeddings=16,
    )
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )
    vae = AutoencoderKL(
        block_out_channels=(4,),
        latent_channels=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    )
    t5 = T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    pipeline = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(),
        vae.eval(),
        CLIPTextModel(clip).eval(),
        tokenizer(),
        T5EncoderModel(t5).eval(),
        tokenizer(),
        transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
