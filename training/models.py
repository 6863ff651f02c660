"""The architecture of the embedded checkpoint: DeciDiffusion's four parts, each made small."""

from diffusers import AutoencoderKL, DDIMScheduler
from transformers import CLIPTextConfig, CLIPTextModel

from ov_decidiffusion.conversion.unet_nas import FlexibleUNet2DConditionModel

SIDE = 128  # of a picture, in pixels
VAE_FACTOR = 8
MAX_TOKENS = 77
TEXT_WIDTH = 128
WIDTHS = (64, 128, 192)
LATENT_NOISE = 0.05  # standard deviation, before scaling, of the noise that the decoder is trained to ignore


def make_text_encoder(vocab_size: int) -> CLIPTextModel:
    """CLIP's text encoder with two layers; the last token of the vocabulary ends every caption."""
    config = CLIPTextConfig(
        vocab_size=vocab_size,
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        hidden_act="quick_gelu",
        bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1,
        pad_token_id=vocab_size - 1,
    )
    return CLIPTextModel(config)


def make_vae() -> AutoencoderKL:
    """Stable Diffusion's autoencoder, narrow and without attention: 8x8 pixels per latent position."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 96, 128),
        layers_per_block=1,
        norm_num_groups=4,  # learns faster here than sixteen
        latent_channels=4,
        sample_size=SIDE,
        mid_block_add_attention=False,
    )


def make_unet() -> FlexibleUNet2DConditionModel:
    """A small U-Net-NAS: three levels, no attention at the first, a mid block that upsamples."""
    width = list(WIDTHS)
    return FlexibleUNet2DConditionModel(
        sample_size=SIDE // VAE_FACTOR,
        block_out_channels=[*width, width[-1]],
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        configurations={
            "sample_size": SIDE // VAE_FACTOR,
            "temb_dim": 4 * width[0],
            "resnet_eps": 1e-5,
            "resnet_act_fn": "silu",
            "num_attention_heads": 4,
            "cross_attention_dim": TEXT_WIDTH,
            "mix_block_in_forward": True,
            "down_blocks_in_channels": [width[0], width[0], width[1]],
            "down_blocks_out_channels": width,
            "down_blocks_num_attentions": [0, 1, 1],
            "down_blocks_num_resnets": [2, 2, 1],
            "add_downsample": [True, True, True],
            "add_upsample_mid_block": True,
            "mid_num_resnets": 1,
            "mid_num_attentions": 1,
            "prev_output_channels": [width[2], width[2], width[1]],
            "up_blocks_num_attentions": [1, 3, 0],
            "up_blocks_num_resnets": [2, 3, 3],
            "add_upsample": [True, True, False],
        },
    )


def make_scheduler() -> DDIMScheduler:
    """DDIM with v-prediction. Linear betas leave almost no signal at the last timestep, so that the model cannot read a
    picture's colours off the noise, and has to take them from the caption."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        beta_start=1e-4,
        beta_end=0.02,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",  # OpenVINO GenAI's DDIM does not know "trailing"
    )
