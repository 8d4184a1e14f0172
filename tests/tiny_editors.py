"""Tiny random editors beyond the first two, each complete in the layout that `from_pretrained` reads."""

from pathlib import Path

import diffusers
import torch
import transformers
from tiny import LEVELS, SCHEDULE, UNET, WIDTH, text_config, tiny_tokenizer, write_editor, write_img2img

DEEP = 27  # layers of the text encoder of FLUX.2, whose pipeline reads the 27th's states
BLOCKS = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}  # of a transformer


def _frozen(network: torch.nn.Module) -> torch.nn.Module:
    return network.eval().requires_grad_(False)


def _bytes_tokenizer() -> transformers.Qwen2Tokenizer:
    """A Qwen2Tokenizer that spells: a token a byte, and those that its templates name."""
    from tokenizers.pre_tokenizers import ByteLevel

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    vocab = {token: number for number, token in enumerate([*sorted(ByteLevel.alphabet()), *special])}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocab, merges=[], additional_special_tokens=special[1:])
    turn = "<|im_start|>{{ message.content }}<|im_end|>"
    tokenizer.chat_template = f"{{% for message in messages %}}{turn}{{% endfor %}}"
    return tokenizer


def write_sdxl(directory: Path) -> Path:
    """Writes a StableDiffusionXLInstructPix2PixPipeline."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        **UNET,
        in_channels=8,
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=WIDTH,
        projection_class_embeddings_input_dim=7 * WIDTH,  # six numbers and the pooled text
    )
    diffusers.StableDiffusionXLInstructPix2PixPipeline(
        vae=diffusers.AutoencoderKL(**LEVELS, latent_channels=4, scaling_factor=0.13025),
        text_encoder=transformers.CLIPTextModel(text_config(layers=2)),
        text_encoder_2=transformers.CLIPTextModelWithProjection(text_config(layers=2)),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(**SCHEDULE),
        add_watermarker=False,
    ).save_pretrained(directory)
    return directory


def write_kontext(directory: Path) -> Path:
    """Writes a FluxKontextPipeline of two double and three single blocks."""
    torch.manual_seed(0)
    letters = [(chr(code), -1.0) for code in range(ord("!"), ord("~") + 1)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    t5 = transformers.T5Tokenizer(vocab=[*special, *letters], extra_ids=0, model_max_length=64)  # FLUX: 512
    sizes = {"d_model": WIDTH, "d_kv": 4, "d_ff": WIDTH, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=len(t5), **sizes)
    diffusers.FluxKontextPipeline(
        vae=diffusers.AutoencoderKL(
            **LEVELS,
            latent_channels=16,
            shift_factor=0.1159,
            scaling_factor=0.3611,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        text_encoder=transformers.CLIPTextModel(text_config(layers=2)),
        text_encoder_2=transformers.T5EncoderModel(config),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=t5,
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=64,
            **BLOCKS | {"num_layers": 2},
            num_single_layers=3,
            joint_attention_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            axes_dims_rope=(2, 2, 4),
            guidance_embeds=True,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    ).save_pretrained(directory)
    return directory


def tiny_flux2_vae() -> diffusers.AutoencoderKLFlux2:
    """Makes a VAE of 32 latent channels whose batch norm has seen something."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLFlux2(**LEVELS)
    vae.bn.running_mean.uniform_(-0.5, 0.5)
    vae.bn.running_var.uniform_(0.2, 2)
    return _frozen(vae)


def write_klein(directory: Path) -> Path:
    """Writes a Flux2KleinPipeline, distilled, of two double and three single blocks."""
    vae, tokenizer = tiny_flux2_vae(), _bytes_tokenizer()
    diffusers.Flux2KleinPipeline(
        vae=vae,
        text_encoder=transformers.Qwen3ForCausalLM(
            transformers.Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=WIDTH,
                num_hidden_layers=DEEP,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=4,
            )
        ),
        tokenizer=tokenizer,
        transformer=diffusers.Flux2Transformer2DModel(
            in_channels=128,
            **BLOCKS | {"num_layers": 2},
            num_single_layers=3,
            joint_attention_dim=3 * WIDTH,
            timestep_guidance_channels=16,
            axes_dims_rope=(2, 2, 2, 2),
            guidance_embeds=False,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        is_distilled=True,
    ).save_pretrained(directory)
    return directory


def tiny_qwen_vae() -> diffusers.AutoencoderKLQwenImage:
    """Makes a VAE of 16 latent channels with Qwen-Image's statistics."""
    torch.manual_seed(0)
    return _frozen(diffusers.AutoencoderKLQwenImage(base_dim=4, num_res_blocks=1))


def write_qwen(directory: Path) -> Path:
    """Writes a QwenImageEditPlusPipeline."""
    vae, tokenizer = tiny_qwen_vae(), _bytes_tokenizer()
    numbers = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    config = transformers.Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 16,
            "fullatt_block_indexes": [0],
        },
        **numbers,
    )
    sizes = {"min_pixels": 56 * 56, "max_pixels": 56 * 56}
    diffusers.QwenImageEditPlusPipeline(
        vae=vae,
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config),
        tokenizer=tokenizer,
        processor=transformers.Qwen2VLProcessor(
            image_processor=transformers.Qwen2VLImageProcessor(**sizes),
            tokenizer=tokenizer,
            video_processor=transformers.Qwen2VLVideoProcessor(),
        ),
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=64,
            out_channels=16,
            **BLOCKS,
            joint_attention_dim=16,
            axes_dims_rope=(2, 2, 4),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    ).save_pretrained(directory)
    return directory


WRITERS = {  # by kind, in models.editors.EDITORS
    "instruct-pix2pix": write_editor,
    "stable-diffusion": write_img2img,
    "sdxl-instruct-pix2pix": write_sdxl,
    "flux-kontext": write_kontext,
    "flux2-klein": write_klein,
    "qwen-image-edit": write_qwen,
}
