"""A transformer of pictures, whose class token and position embeddings no sample goes into."""

import transformers

from tests.models.batches import CLASSES, of_classes, pictures
from tests.models.loop import assert_collected, assert_stepped


def test_classes_of_pictures(tmp_path):
    configuration = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4,
        num_channels=1, num_labels=CLASSES,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(configuration).double()
    batches = [(size, {"pixel_values": inputs, "labels": classes}) for size, (inputs, classes) in pictures()]
    assert_collected(model, batches, tmp_path / "store", of_classes)
    assert_collected(model, batches, tmp_path / "default", loop=of_classes)
    assert_stepped(model, batches, tmp_path / "steps", of_classes, train=False)
