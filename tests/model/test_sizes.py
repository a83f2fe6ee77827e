"""Sizes of the models against the published ones."""

import pytest
import torch

from odtk.config import ModelConfig
from odtk.model.backbones.catalog import BACKBONES
from odtk.model.detector import Detector
from odtk.model.sizes import classification_parameters, count_parameters, model_sizes


@pytest.mark.parametrize(
    ("name", "published"),  # torchvision's documentation
    [
        ("ResNet18", 11_689_512),
        ("ResNet34", 21_797_672),
        ("ResNet50", 25_557_032),
        ("ResNet101", 44_549_160),
        ("ResNet152", 60_192_808),
        ("ResNeXt50_32x4d", 25_028_904),
        ("ResNeXt101_32x8d", 88_791_336),
        ("MobileNetV2", 3_504_872),
    ],
)
def test_parameters_equal_torchvision(name: str, published: int) -> None:
    assert classification_parameters(name) == published


@pytest.mark.parametrize(
    ("name", "millions"),  # 2101.03697 and its repository; timm for GhostNet and EfficientNetLite
    [
        ("EfficientNetLite0", 4.65),
        ("EfficientNetLite1", 5.42),
        ("EfficientNetLite2", 6.09),
        ("RepVGGA0", 9.11),
        ("RepVGGA1", 14.09),
        ("RepVGGB0", 15.82),
        ("GhostNet", 5.18),
    ],
)
def test_parameters_equal_the_authors(name: str, millions: float) -> None:
    assert round(classification_parameters(name) / 1e6, 2) == millions


@pytest.mark.parametrize(("name", "millions"), [("RepVGGA0", 8.31), ("RepVGGA1", 12.79), ("RepVGGB0", 14.34)])
def test_folded_repvgg_has_the_published_size(name: str, millions: float) -> None:
    with torch.device("meta"):
        features = Detector(ModelConfig(backbones=(f"{name}FPN",))).fold().feature_extractors()[f"{name}FPN"]
    assert round((count_parameters(features) + features.classifier_parameters) / 1e6, 2) == millions


@pytest.mark.slow
def test_the_table_has_every_backbone_and_the_known_cost_of_resnet50() -> None:
    rows = {row.backbone: row for row in model_sizes()}
    assert rows.keys() == BACKBONES.keys()
    assert rows["ResNet50FPN"].gflops / 2 == pytest.approx(239, rel=0.01)  # G multiply-adds, of MMDetection
    assert rows["RepVGGA0FPN"].gflops < rows["RepVGGA1FPN"].gflops
