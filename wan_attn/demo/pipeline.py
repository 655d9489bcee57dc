# SPDX-License-Identifier: Apache-2.0
"""pipeline.py - the WanPipeline of the demo: small and random, or real weights from a folder."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wan_attn.demo import weights
from wan_attn.demo.options import INSTALL, DemoError, Options

HEAD_DIM = 128  # as in every Wan model
NUM_HEADS = 2
NUM_LAYERS = 4
TEXT_DIM = 64
VAE_DIM = 16
FLOW_SHIFT = 3.0  # Wan's value for small pictures
TRAIN_STEPS = 1000


@dataclass(frozen=True, slots=True)
class Subject:
    """What is run: a pipeline, and where it starts."""

    pipe: Any
    latents: Tensor | None  # None: the pipeline draws its own noise from the seed

    @property
    def transformers(self) -> tuple[Any, ...]:
        """The denoising models: one, or two of a mixture of experts."""
        pair = (self.pipe.transformer, getattr(self.pipe, "transformer_2", None))
        return tuple(model for model in pair if model is not None)


def make(options: Options) -> Subject:
    """Build or load the pipeline on options.device.

    Raises:
        DemoError: the installed packages, or the folder, do not serve.
    """
    quiet_libraries()
    diffusers = _import("diffusers")
    if options.model is None:
        pipe = _random_pipeline(diffusers, options)
        pipe.to(options.device)
        return Subject(pipe, _random_latents(pipe, options))
    return Subject(_loaded_pipeline(diffusers, options), None)


def quiet_libraries() -> None:
    """Hides advice that packages give at import, which is not about this program."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message="CUDA initialization")
    for name in ("diffusers", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _import(name: str) -> Any:
    try:
        module = importlib.import_module(name)
        missing = [c for c in ("WanPipeline", "AutoencoderKLWan") if not hasattr(module, c)]
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]  # the lines before it name only its callers
        raise DemoError(f"{name} cannot be imported: {reason}; try: {INSTALL} --upgrade") from error
    if missing:
        raise DemoError(
            f"{name} {module.__version__} has no {missing[0]}; try: {INSTALL} --upgrade"
        )
    return module


def _random_pipeline(diffusers: Any, options: Options) -> Any:
    generator = torch.Generator().manual_seed(options.seed)
    tokenizer, text_encoder = _random_text_encoder(options.seed)
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=NUM_HEADS,
        attention_head_dim=HEAD_DIM,
        text_dim=TEXT_DIM,
        ffn_dim=2 * NUM_HEADS * HEAD_DIM,
        num_layers=2 if options.is_quick else NUM_LAYERS,
    ).eval()
    weights.draw_transformer(transformer, generator)
    _cast(transformer, options.dtype)
    # One residual block a level is the least there is; the decoder is not what is compared.
    vae = diffusers.AutoencoderKLWan(base_dim=VAE_DIM, num_res_blocks=0).eval()
    weights.draw_decoder(vae, generator)
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        num_train_timesteps=TRAIN_STEPS,
        flow_shift=FLOW_SHIFT,
    )
    return diffusers.WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.to(options.dtype),
        vae=vae,
        scheduler=scheduler,
        transformer=transformer,
    )


def _random_text_encoder(seed: int) -> tuple[Any, Any]:
    """A UMT5 encoder like Wan's, tiny, and a tokenizer whose tokens are the bytes of the prompt."""
    transformers, tokenizers = map(importlib.import_module, ("transformers", "tokenizers"))
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    pad, end, unknown = "<pad>", "</s>", "<unk>"
    letters = [pad, end, unknown, *sorted(byte_level.alphabet())]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    model = tokenizers.models.BPE(vocab=vocabulary, merges=[], unk_token=unknown)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = byte_level(add_prefix_space=False)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, vocabulary[end])]
    )
    config = transformers.UMT5Config(
        vocab_size=len(letters),
        d_model=TEXT_DIM,
        d_kv=16,
        d_ff=2 * TEXT_DIM,
        num_layers=2,
        num_heads=4,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = transformers.UMT5EncoderModel(config).eval()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=end, unk_token=unknown
    )
    return fast, encoder


def _cast(transformer: Any, dtype: torch.dtype) -> None:
    """Converts to `dtype`, except what from_pretrained(torch_dtype=...) keeps in float32, too."""
    kept = transformer._keep_in_fp32_modules or ()
    for name, weight in transformer.named_parameters():
        if not any(part in kept for part in name.split(".")):
            weight.data = weight.data.to(dtype)


def _random_latents(pipe: Any, options: Options) -> Tensor:
    size, config = options.size, pipe.vae.config
    shape = (
        1,
        config.z_dim,
        (size.frames - 1) // config.scale_factor_temporal + 1,
        size.height // config.scale_factor_spatial,
        size.width // config.scale_factor_spatial,
    )
    generator = torch.Generator().manual_seed(options.seed + 1)
    return weights.draw_latents(shape, generator)


def _loaded_pipeline(diffusers: Any, options: Options) -> Any:
    try:
        # The decoder in float32, as diffusers' own Wan example has it.
        vae = diffusers.AutoencoderKLWan.from_pretrained(
            options.model, subfolder="vae", torch_dtype=torch.float32, local_files_only=True
        )
        pipe = diffusers.WanPipeline.from_pretrained(
            options.model, vae=vae, torch_dtype=options.dtype, local_files_only=True
        )
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DemoError(
            f"--model {options.model} cannot be loaded: {reason}; is the download complete?"
        ) from error
    if options.device.type == "cuda" and importlib.util.find_spec("accelerate") is not None:
        # One model on the GPU at a time: a 5B model and its text encoder fit 24 GB that way.
        pipe.enable_model_cpu_offload(device=options.device)
    else:
        pipe.to(options.device)
    return pipe
