"""The models of the Vision Transformer paper, exact and exchangeable. Needs torch, numpy and safetensors alone."""

from vit_model.build import Model, build_model, count_parameters, replace_head
from vit_model.checkpoints import CheckpointError, load_model, load_weights, read_specs, save_weights
from vit_model.config import HeadKind, ModelConfig, ResNetConfig, ViTConfig, config_from_dict, config_to_dict
from vit_model.features import Features
from vit_model.flops import forward_macs, training_flops
from vit_model.initialize import initialize
from vit_model.masked import MaskedViT, build_masked, without_masking
from vit_model.preprocess import ImageError, InputSpec, OutputSpec, decode_image, load_image, normalize
from vit_model.resnet import ResNet
from vit_model.variants import VARIANTS, variant
from vit_model.vit import ViT

__all__ = [
    "VARIANTS",
    "CheckpointError",
    "Features",
    "HeadKind",
    "ImageError",
    "InputSpec",
    "MaskedViT",
    "Model",
    "ModelConfig",
    "OutputSpec",
    "ResNet",
    "ResNetConfig",
    "ViT",
    "ViTConfig",
    "build_masked",
    "build_model",
    "config_from_dict",
    "config_to_dict",
    "count_parameters",
    "decode_image",
    "forward_macs",
    "initialize",
    "load_image",
    "load_model",
    "load_weights",
    "normalize",
    "read_specs",
    "replace_head",
    "save_weights",
    "training_flops",
    "variant",
    "without_masking",
]
